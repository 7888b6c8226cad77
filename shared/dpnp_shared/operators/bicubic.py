"""Super-resolution from antialiased bicubic downsampling.

Keys 1981, IEEE Trans. Acoust., Speech, Signal Process. 29, 1153: the cubic kernel with a = -1/2. Stretched by the
factor and with the border mirrored, as MATLAB's imresize does by default.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator


class BicubicSuperResolution(LinearOperator):
    r""":math:`Y = R_h X R_w^T` in every channel, ``(B, C, H/factor, W/factor)``.

    Row ``i`` of :math:`R_h` holds the weights :math:`\propto \kappa((j - c_i)/\text{factor})` of pixels ``j``,
    of sum 1, where :math:`c_i = (i + \tfrac12)\,\text{factor} - \tfrac12` is the middle of the large pixel and
    :math:`\kappa` the cubic kernel on [-2, 2]. Beyond the border the image is mirrored, the outermost pixels
    repeated. As :math:`A = R_h \otimes R_w`, functions of :math:`A^T A` follow from the singular value
    decompositions of the two small matrices, which are taken once, in float64.

    Args:
        image_shape: ``(C, H, W)``.
        factor: by how much ``H`` and ``W`` shrink.

    Raises:
        ValueError: ``factor`` does not divide ``H`` and ``W``.
    """

    row_matrix: Tensor  # (H/factor, H), R_h
    column_matrix: Tensor  # (W/factor, W), R_w
    row_vectors: Tensor  # (H, H), the right singular vectors V^T of R_h
    column_vectors: Tensor  # (W, W)
    row_values: Tensor  # (H,), its singular values, zeros after the first H/factor
    column_values: Tensor  # (W,)

    def __init__(self, image_shape: tuple[int, int, int], factor: int) -> None:
        super().__init__(image_shape)
        _, h, w = self._known_image_shape("__init__")
        if factor < 1 or h % factor or w % factor:
            raise ValueError(f"factor = {factor}; allowed is a positive number that divides H = {h} and W = {w}")
        self.factor = factor
        for name, n in (("row", h), ("column", w)):
            matrix = _downsampling_matrix(n, factor)
            _, values, vectors = torch.linalg.svd(matrix, full_matrices=True)
            self.register_buffer(f"{name}_matrix", matrix)
            self.register_buffer(f"{name}_vectors", vectors)
            self.register_buffer(f"{name}_values", torch.cat([values, values.new_zeros(n - values.numel())]))

    def forward(self, x: Tensor) -> Tensor:
        """``R_h x R_w^T`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        return self.row_matrix.to(x.dtype) @ x @ self.column_matrix.to(x.dtype).T

    def adjoint(self, y: Tensor) -> Tensor:
        """``R_h^T y R_w`` of ``y`` ``(B, C, H/factor, W/factor)``."""
        return self.row_matrix.to(y.dtype).T @ y @ self.column_matrix.to(y.dtype)

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r""":math:`V_h \left( f(s_h^2 {s_w^2}^T) \odot V_h^T x V_w \right) V_w^T`."""
        self._check_image(x)
        Vh, Vw = self.row_vectors.to(x.dtype), self.column_vectors.to(x.dtype)  # V^T each
        f_S = f(torch.outer(self.row_values, self.column_values) ** 2)  # (H, W)
        return Vh.T @ (f_S.to(x.dtype) * (Vh @ x @ Vw.T)) @ Vw

    def norm(self) -> float:
        """Product of the two matrices' largest singular values."""
        return float(self.row_values[0] * self.column_values[0])

    def display(self, y: Tensor) -> Tensor:
        """The large pixels at the image's size, ``(C, H, W)``."""
        return y.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)


def _downsampling_matrix(n: int, factor: int) -> Tensor:
    """``(n/factor, n)``, rows of sum 1."""
    centres = (torch.arange(n // factor, dtype=torch.float64) + 0.5) * factor - 0.5
    positions = torch.arange(-2 * factor, n + 2 * factor)  # with the mirrored border
    weights = _keys((positions - centres[:, None]) / factor)
    weights = weights / weights.sum(1, keepdim=True)
    wrapped = positions % (2 * n)
    mirrored = torch.minimum(wrapped, 2 * n - 1 - wrapped)
    return torch.zeros(n // factor, n, dtype=torch.float64).index_add(1, mirrored, weights)


def _keys(s: Tensor) -> Tensor:
    r"""The cubic kernel :math:`\kappa(s)` with a = -1/2."""
    s = s.abs()
    near = 1.5 * s**3 - 2.5 * s**2 + 1
    far = -0.5 * s**3 + 2.5 * s**2 - 4 * s + 2
    return torch.where(s <= 1, near, torch.where(s < 2, far, torch.zeros_like(s)))
