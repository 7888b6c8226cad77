"""Super-resolution from block averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dpnp_shared.operators.base import LinearOperator


class SuperResolution(LinearOperator):
    r"""``y`` holds the means of blocks of ``factor`` x ``factor`` pixels, ``(B, C, H/factor, W/factor)``.

    :math:`A A^T = I/\text{factor}^2`, hence :math:`P = \text{factor}^2 A^T A` is the orthogonal projection
    onto the images that are constant on blocks.

    Args:
        image_shape: ``(C, H, W)``.
        factor: side of a block, in pixels.

    Raises:
        ValueError: ``factor`` does not divide ``H`` and ``W``.
    """

    def __init__(self, image_shape: tuple[int, int, int], factor: int) -> None:
        super().__init__(image_shape)
        _, h, w = self._known_image_shape("__init__")
        if factor < 1 or h % factor or w % factor:
            raise ValueError(f"factor = {factor}; allowed is a positive number that divides H = {h} and W = {w}")
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Block means of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        return functional.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        """Spread each mean of ``y`` ``(B, C, H/factor, W/factor)`` over its block."""
        return self._repeat(y) / self.factor**2

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r""":math:`f(0)(x - Px) + f(1/\text{factor}^2)\,Px`."""
        Px = self._repeat(self(x))
        values = f(torch.tensor([0.0, 1 / self.factor**2], dtype=x.dtype, device=x.device))
        return values[0] * (x - Px) + values[1] * Px

    def norm(self) -> float:
        """``1/factor``."""
        return 1 / self.factor

    def display(self, y: Tensor) -> Tensor:
        """The blocks at the image's size, ``(C, H, W)``."""
        return self._repeat(y)

    def _repeat(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, dim=-2).repeat_interleave(self.factor, dim=-1)
