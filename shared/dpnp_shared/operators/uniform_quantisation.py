"""Uniform quantisation to a number of levels."""

from __future__ import annotations

import math

from torch import Tensor

from dpnp_shared.operators.base import Operator


class Quantisation(Operator):
    r"""The nearest of ``levels`` equally spaced values, entry by entry; :math:`2^n` levels are ``n`` bits.

    .. math:: y = \text{low} + (i + \tfrac12)\,\Delta, \qquad
        i = \min(\max(\lfloor (x - \text{low}) / \Delta \rfloor,\ 0),\ \text{levels} - 1), \qquad
        \Delta = (\text{high} - \text{low}) / \text{levels}

    Values beyond ``low`` and ``high`` go to the outermost levels. ``y`` has the image's shape, and any shape is taken.

    The operator is piecewise constant: its gradient is 0 almost everywhere and of no use, so that it says
    ``differentiable = False``. With Gaussian or other noise on the quantised values the likelihood is piecewise constant
    in ``x`` and is handled by samplers without gradients. For one-bit cameras with noise before the quantiser, where the
    likelihood is smooth, see :class:`~dpnp_shared.operators.DitheredQuantisation`.

    Args:
        levels: how many, at least 2.
        low: lower end of the range, the first level's lower edge.
        high: upper end.

    Raises:
        ValueError: ``levels`` is not a whole number of at least 2, or not ``low < high``, both finite.
    """

    differentiable = False
    pixelwise = True

    def __init__(self, levels: int, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        if levels < 2 or int(levels) != levels:
            raise ValueError(f"levels = {levels}; allowed is a whole number of at least 2")
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"(low, high) = {(low, high)}; allowed are finite numbers with low < high")
        self.levels, self.low, self.high = levels, low, high

    def forward(self, x: Tensor) -> Tensor:
        """Quantised images, shaped like ``x`` ``(B, C, H, W)``."""
        width = (self.high - self.low) / self.levels
        level = ((x - self.low) / width).floor().clamp(0, self.levels - 1)
        return self.low + (level + 0.5) * width

    def display(self, y: Tensor) -> Tensor:
        """The measurement with ``low`` at -1 and ``high`` at 1."""
        return 2 * (y - self.low) / (self.high - self.low) - 1
