r"""The flux of the whole image, which a short baseline or a single dish measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator


class TotalFlux(LinearOperator):
    r""":math:`y = \sum_{ij} x_{ij}`, the sum over the pixels of each channel, ``(B, C)``.

    Closure phases and amplitudes do not see it; a :class:`~dpnp_shared.operators.Stack` adds it to them.

    Args:
        image_shape: ``(C, H, W)``.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Sums ``(B, C)`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        return x.sum((-2, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        """``y`` ``(B, C)`` at all pixels, ``(B, C, H, W)``."""
        _, h, w = self._known_image_shape("adjoint")
        return y[:, :, None, None].expand(-1, -1, h, w).clone()

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r""":math:`f(HW)` times the mean of each channel, and :math:`f(0)` times what is left."""
        self._check_image(x)
        mean = x.mean((-2, -1), keepdim=True)
        values = f(torch.tensor([0.0, x[0, 0].numel()], dtype=x.dtype, device=x.device))
        return values[0] * (x - mean) + values[1] * mean

    def norm(self) -> float:
        r""":math:`\sqrt{HW}`."""
        _, h, w = self._known_image_shape("norm")
        return float((h * w) ** 0.5)
