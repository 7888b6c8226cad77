"""Compressed sensing: a few random linear measurements of the whole image.

Candès and Tao 2006, IEEE Trans. Inf. Theory 52, 5406 (Gaussian rows); Do, Gan, Nguyen and Tran 2012, IEEE Trans.
Signal Process. 60, 139 (random signs, a fast orthonormal transform, and a random choice of its rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator
from dpnp_shared.operators.matrix import MatrixOperator


class CompressedSensing(LinearOperator):
    r"""``m`` random measurements, ``(B, m)``.

    ``transform="gaussian"``: :math:`y = G\,\mathrm{vec}(x)` with independent entries :math:`G_{ij} \sim N(0, 1/m)`, so that
    :math:`E A^T A = I`. The matrix ``(m, C·H·W)`` and its singular value decomposition are kept.

    ``"hadamard"`` and ``"dct"``: :math:`y = S\,\Phi\,D\,x`, where :math:`D` flips random signs of the pixels,
    :math:`\Phi` is the orthonormal Walsh-Hadamard transform of each channel's ``H·W`` pixels or its orthonormal 2-D
    discrete cosine transform (DCT-II), and :math:`S` keeps ``m`` of the ``C·H·W`` coefficients, drawn without
    replacement. No matrix is kept; :math:`A A^T = I`, so that :math:`A^T A` is an orthogonal projection.

    Args:
        image_shape: ``(C, H, W)``. ``"hadamard"`` needs a power of two as ``H·W``: padding would lose
            :math:`A A^T = I`; for images of another size :class:`~dpnp_shared.operators.ZeroPadding` stands before.
        measurements: ``m``; at most ``C·H·W`` for ``"hadamard"`` and ``"dct"``.
        transform: ``"gaussian"``, ``"hadamard"`` or ``"dct"``.
        seed: of the matrix, or of signs and rows.

    Raises:
        ValueError: an argument is out of range.
    """

    signs: Tensor  # (C, H, W) of ±1; empty for "gaussian"
    kept: Tensor  # (m,), indices into C·H·W; empty for "gaussian"
    row_dct: Tensor  # (H, H); empty but for "dct"
    column_dct: Tensor  # (W, W)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        measurements: int,
        transform: Literal["gaussian", "hadamard", "dct"] = "gaussian",
        seed: int = 0,
    ) -> None:
        super().__init__(image_shape)
        c, h, w = shape = self._known_image_shape("__init__")
        d = c * h * w
        if transform not in ("gaussian", "hadamard", "dct"):
            raise ValueError(f"transform = {transform!r}; allowed are 'gaussian', 'hadamard' and 'dct'")
        if transform == "hadamard" and (h * w) & (h * w - 1):
            raise ValueError(
                f"transform = 'hadamard' with H·W = {h}·{w} = {h * w}; it needs a power of two. "
                "put ZeroPadding before it, or take 'dct', which takes images of any size"
            )
        if measurements < 1 or (transform != "gaussian" and measurements > d):
            most = "" if transform == "gaussian" else f" of at most C·H·W = {d}"
            raise ValueError(f"measurements = {measurements}; allowed is a positive whole number{most}")
        self.measurements, self.transform = measurements, transform
        generator = torch.Generator().manual_seed(seed)
        self.dense: MatrixOperator | None = None
        signs, kept = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        if transform == "gaussian":
            G = torch.randn(measurements, d, generator=generator, dtype=torch.float64) / math.sqrt(measurements)
            self.dense = MatrixOperator(G, shape)
        else:
            signs = 2.0 * torch.randint(2, shape, generator=generator) - 1
            kept = torch.randperm(d, generator=generator)[:measurements].sort().values
        self.register_buffer("signs", signs)
        self.register_buffer("kept", kept)
        self.register_buffer("row_dct", _dct_matrix(h if transform == "dct" else 0))
        self.register_buffer("column_dct", _dct_matrix(w if transform == "dct" else 0))

    def forward(self, x: Tensor) -> Tensor:
        """The measurements ``(B, m)`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        if self.dense is not None:
            y: Tensor = self.dense(x)
            return y
        return self._transform(self.signs.to(x.dtype) * x).flatten(1).index_select(1, self.kept)

    def adjoint(self, y: Tensor) -> Tensor:
        r""":math:`G^T y` or :math:`D\,\Phi^T S^T y`, ``(B, C, H, W)``, of ``y`` ``(B, m)``."""
        if self.dense is not None:
            return self.dense.adjoint(y)
        shape = self._known_image_shape("adjoint")
        coefficients = y.new_zeros(y.shape[0], math.prod(shape)).index_copy(1, self.kept, y)
        return self.signs.to(y.dtype) * self._transform(coefficients.reshape(-1, *shape), transpose=True)

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r""":math:`f(0)\,x + (f(1) - f(0))\,A^T A x` for an orthonormal transform."""
        if self.dense is not None:
            return self.dense.gram_function(f, x)
        values = f(torch.tensor([0.0, 1.0], dtype=x.dtype, device=x.device))
        Px = self.adjoint(self(x))
        return values[0] * (x - Px) + values[1] * Px

    def norm(self) -> float:
        """Largest singular value; 1 for an orthonormal transform."""
        return 1.0 if self.dense is None else self.dense.norm()

    def _transform(self, x: Tensor, transpose: bool = False) -> Tensor:
        """Orthonormal transform of every channel, or its transpose; ``(B, C, H, W)`` both."""
        if self.transform == "hadamard":
            return _hadamard(x.flatten(2)).reshape(x.shape)  # symmetric
        rows, columns = self.row_dct.to(x.dtype), self.column_dct.to(x.dtype)
        return rows.T @ x @ columns if transpose else rows @ x @ columns.T


def _hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform over the last dimension ``n``, a power of two, in natural order."""
    n = x.shape[-1]
    y = x
    block = 1
    while block < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * block), 2, block)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([first + second, first - second], dim=-2)
        block *= 2
    return y.reshape(x.shape) / math.sqrt(n)


def _dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II as a matrix ``(n, n)``."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k[:, None] * (2 * k + 1) / (2 * n)) * math.sqrt(2 / n) if n else k.reshape(0, 0)
    matrix[:1] /= math.sqrt(2)
    return matrix
