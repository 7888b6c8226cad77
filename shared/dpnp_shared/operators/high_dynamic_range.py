"""A sensor that saturates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator


class HighDynamicRange(Operator):
    r""":math:`y = \mathrm{clip}(\text{gain} \cdot x,\ \text{low},\ \text{high})`, entry by entry.

    What is clipped is only known to lie beyond the limit. The gradient is the gain between the limits and 0
    beyond them. ``y`` has the image's shape, and any shape is taken.

    Args:
        gain: a positive factor.
        low: the lowest value that the sensor gives.
        high: the highest.

    Raises:
        ValueError: ``gain`` is not positive and finite, or not ``low < high``, both finite.
    """

    pixelwise = True

    def __init__(self, gain: float = 2.0, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        if not 0 < gain < math.inf:
            raise ValueError(f"gain = {gain}; allowed is a positive number")
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"(low, high) = {(low, high)}; allowed are finite numbers with low < high")
        self.gain, self.low, self.high = gain, low, high

    def forward(self, x: Tensor) -> Tensor:
        """Clipped images, shaped like ``x`` ``(B, C, H, W)``."""
        return torch.clamp(self.gain * x, self.low, self.high)

    def display(self, y: Tensor) -> Tensor:
        """The measurement with ``low`` at -1 and ``high`` at 1; noise may lead beyond."""
        return 2 * (y - self.low) / (self.high - self.low) - 1
