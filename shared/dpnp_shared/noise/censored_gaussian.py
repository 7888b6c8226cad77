"""Gaussian noise on a sensor that saturates."""

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


class CensoredGaussianNoise(Noise):
    r""":math:`y = \mathrm{clip}(\bar y + \sigma w,\ \text{low},\ \text{high})`, :math:`w \sim N(0, I)`: over- and underexposure.

    Between the limits the law has a density, at a limit a probability, that of all that lies beyond. Whether an entry is at
    a limit is seen in single precision, so that a file's dtype does not decide it.

    Args:
        sigma: standard deviation, in the units of ``y``: a number, or one an entry (a tensor, a list, or the path of a
            ``.npy`` file; it must broadcast to ``y_shape``).
        low: least measurement, in the same units; None for no limit.
        high: largest measurement, likewise.

    Raises:
        ValueError: an entry of ``sigma`` is not positive and finite, or the limits are not finite, not in order or
            both None.
    """

    sigma: Tensor

    def __init__(self, sigma: Entries, low: float | None, high: float | None) -> None:
        super().__init__()
        self.register_buffer("sigma", entries_argument(sigma, "sigma"))
        self.low, self.high = -math.inf if low is None else low, math.inf if high is None else high
        given = [limit for limit in (low, high) if limit is not None]
        if not given or not all(math.isfinite(limit) for limit in given) or not self.low < self.high:
            raise ValueError(f"(low, high) = {(low, high)}; allowed are numbers in order, or None for one of them")

    @property
    def resolution(self) -> float:
        r"""The least ``sigma``: the Fisher information is :math:`1/\sigma^2` far from the limits and less near them."""
        return float(self.sigma.min())

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw :math:`\bar y + \sigma w` and clip it; see :meth:`Noise.sample`."""
        wide = widen(check_real(clean, "clean"))
        device = drawing_device(clean, generator)
        w = torch.randn(clean.shape, generator=generator, dtype=wide.dtype, device=device).to(clean.device)
        return (wide + spread(self.sigma, wide, "sigma") * w).clamp(self.low, self.high).to(clean.dtype)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r"""The log density between the limits and the log probability at them.

        The latter are :math:`\log\Phi((\text{low} - \bar y)/\sigma)` and :math:`\log\Phi((\bar y - \text{high})/\sigma)`,
        right however far :math:`\bar y` is. See :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: an entry of ``y`` is beyond a limit, or the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        single = y.float()
        low, high = torch.tensor([self.low, self.high], dtype=single.dtype, device=y.device)
        bad = y[~((single >= low) & (single <= high))]
        if bad.numel():
            raise ValueError(
                f"y holds {bad.numel()} entries like {float(bad[0])}; allowed are values from {self.low} to {self.high}"
            )
        sigma = spread(self.sigma, clean, "sigma")
        terms = -0.5 * ((y - clean) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
        for limit, at, side in ((self.low, single == low, -1), (self.high, single == high, 1)):
            if math.isfinite(limit):
                terms = torch.where(at, _log_normal_cdf(side * (clean - limit) / sigma), terms)
        return terms


def _log_normal_cdf(z: Tensor) -> Tensor:
    r""":math:`\log\Phi(z)`, with a gradient that is right far below 0 (that of ``torch.special.log_ndtr`` is not)."""
    low, high = torch.where(z < -1, z, -1.0), torch.where(z < -1, -1.0, z)
    tail = -0.5 * low**2 + (0.5 * torch.special.erfcx(-low / math.sqrt(2))).log()
    return torch.where(z < -1, tail, torch.special.log_ndtr(high))
