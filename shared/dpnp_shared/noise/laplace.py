"""Noise of long tails: Laplace's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_shared.noise.base import (
    Entries,
    Noise,
    check_real,
    drawing_device,
    entries_argument,
    match_real,
    spread,
    widen,
)


class LaplaceNoise(Noise):
    r""":math:`p(y \mid \bar y) = \frac{1}{2b}\, e^{-|y - \bar y|/b}`, independent in each entry.

    The standard deviation is :math:`\sqrt2\, b`. At :math:`\bar y = y` the gradient is taken as 0.

    Args:
        scale: :math:`b`, in the units of ``y``: a number, or one an entry (a tensor, a list, or the path of a ``.npy``
            file; it must broadcast to ``y_shape``).

    Raises:
        ValueError: an entry of ``scale`` is not positive and finite.
    """

    scale: Tensor

    def __init__(self, scale: Entries) -> None:
        super().__init__()
        self.register_buffer("scale", entries_argument(scale, "scale"))

    @property
    def resolution(self) -> float:
        r"""The least scale: the Fisher information is :math:`1/b^2` everywhere."""
        return float(self.scale.min())

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``clean`` plus a difference of two exponential numbers; see :meth:`Noise.sample`."""
        wide = widen(check_real(clean, "clean"))
        device = drawing_device(clean, generator)
        u = torch.rand(*clean.shape, 2, generator=generator, dtype=wide.dtype, device=device).to(clean.device)
        e = torch.log1p(-u)  # u < 1
        return (wide + spread(self.scale, wide, "scale") * (e[..., 0] - e[..., 1])).to(clean.dtype)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`-|y - \bar y|/b - \log 2b`; see :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        scale = spread(self.scale, clean, "scale")
        return -(y - clean).abs() / scale - scale.log() - math.log(2)
