"""A dense matrix, as in compressed sensing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator, array_argument


class MatrixOperator(LinearOperator):
    r""":math:`y = A\,\mathrm{vec}(x)`, ``(B, m)``; vec runs over ``(C, H, W)`` with ``W`` fastest.

    The thin singular value decomposition :math:`A = U S V^T` is taken once, in float64.

    Args:
        A: the matrix ``(m, C·H·W)``, or the path of a ``.npy`` file that holds it.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: ``A`` does not have ``C·H·W`` columns, or an entry is not finite.
    """

    matrix: Tensor  # (m, d)
    singular_values: Tensor  # (r,) with r = min(m, d), decreasing
    right_vectors: Tensor  # (r, d), V^T

    def __init__(self, A: Tensor | list[list[float]] | str, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        matrix = array_argument(A, "A")
        c, h, w = self._known_image_shape("__init__")
        if matrix.ndim != 2 or matrix.shape[1] != c * h * w:
            raise ValueError(f"A has shape {tuple(matrix.shape)}; images of shape {(c, h, w)} need (m, {c * h * w})")
        _, singular_values, right_vectors = torch.linalg.svd(matrix, full_matrices=False)
        self.register_buffer("matrix", matrix)
        self.register_buffer("singular_values", singular_values)
        self.register_buffer("right_vectors", right_vectors)

    def forward(self, x: Tensor) -> Tensor:
        """``A vec(x)``, ``(B, m)``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        return x.flatten(1) @ self.matrix.to(x.dtype).T

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y`` as images ``(B, C, H, W)``, of ``y`` ``(B, m)``."""
        return (y @ self.matrix.to(y.dtype)).reshape(-1, *self._known_image_shape("adjoint"))

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r""":math:`f(0)\,x + V (f(S^2) - f(0)) V^T x`, so that the thin decomposition is enough."""
        self._check_image(x)
        flat, Vt = x.flatten(1), self.right_vectors.to(x.dtype)
        f_S = f(self.singular_values**2)  # (r,)
        if Vt.shape[0] == Vt.shape[1]:  # V is a full basis
            return ((flat @ Vt.T) * f_S.to(x.dtype) @ Vt).reshape(x.shape)
        f_0 = f(torch.zeros_like(self.singular_values[:1]))  # (1,)
        return (f_0.to(x.dtype) * flat + (flat @ Vt.T) * (f_S - f_0).to(x.dtype) @ Vt).reshape(x.shape)

    def norm(self) -> float:
        """Largest singular value."""
        return float(self.singular_values[0])
