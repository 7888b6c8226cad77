"""Photon and read noise together, the noise of camera sensors."""

from __future__ import annotations

import math
from typing import Any

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
from dpnp_shared.noise.poisson import check_together, draw_counts, poisson_log_prob

MOST_PHOTONS = 2.0**40  # in a measurement: beyond, float64 no longer tells which count is likeliest
MOST_READ_NOISE = 1e4  # in photons
TERMS = 2**17  # of the sum that are held at once: they fit into a processor's cache


class PoissonGaussianNoise(Noise):
    r""":math:`y = a N + \sigma w`, :math:`N \sim \mathrm{Poisson}(\bar y/a + b)`, :math:`w \sim N(0, 1)`, in each entry.

    The usual model of a sensor's raw data (Foi et al. 2008, IEEE Trans. Image Process. 17, 1737, without its clipping):
    the mean is :math:`\bar y + ab` and the variance :math:`a \bar y + a^2 b + \sigma^2`. A noiseless value whose mean count
    is negative has log density :math:`-\infty`.

    The density is the sum over the counts k,

    .. math:: p(y \mid \bar y) = \sum_{k=0}^\infty \frac{\lambda^k e^{-\lambda}}{k!}\,
              \frac{1}{\sqrt{2\pi}\sigma} e^{-(y - ak)^2/(2\sigma^2)}, \qquad \lambda = \bar y/a + b,

    cut to a window around its largest term, of each entry by itself, that leaves out less than 1e-17 of it; see
    :func:`_half_width`. It takes some ten times the lesser of :math:`\sigma/a` and :math:`\sqrt{\lambda}` terms.

    Args:
        gain: :math:`a`, units of ``y`` per photon (:class:`PoissonNoise` has photons per unit): a number, or one an entry (a
            tensor, a list, or the path of a ``.npy`` file; it must broadcast to ``y_shape``).
        sigma: read noise, in the units of ``y``, likewise; at most 10,000 ``gain``.
        background: :math:`b`, photons (or dark electrons) that are counted without any signal, likewise.

    Raises:
        ValueError: an entry of ``gain`` or ``sigma`` is not positive or one of ``background`` negative, ``sigma`` exceeds
            10,000 ``gain``, or the three do not broadcast to a common shape.
    """

    gain: Tensor
    sigma: Tensor
    background: Tensor

    def __init__(self, gain: Entries, sigma: Entries, background: Entries = 0.0) -> None:
        super().__init__()
        self.register_buffer("gain", entries_argument(gain, "gain"))
        self.register_buffer("sigma", entries_argument(sigma, "sigma"))
        self.register_buffer("background", entries_argument(background, "background", zero=True))
        check_together(gain=self.gain, sigma=self.sigma, background=self.background)
        most = float((self.sigma / self.gain).max())
        if most > MOST_READ_NOISE:
            raise ValueError(
                f"sigma is up to {most:g} times gain; allowed are 10,000 times: beyond, take GaussianNoise"
            )

    @property
    def resolution(self) -> float:
        r""":math:`\sqrt{a^2 \max(b, 1) + \sigma^2}`, the least of all entries.

        That is the standard deviation of an entry of one photon, or of the background where it is more. The Fisher information
        at that mean count has no closed form; it is at most a quarter larger than :math:`1/\text{resolution}^2`. (At lower
        counts it has no useful bound; see :attr:`PoissonNoise.resolution`.)
        """
        return float((self.gain**2 * self.background.clamp(min=1) + self.sigma**2).sqrt().min())

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw measurements; see :meth:`Noise.sample`.

        Raises:
            ValueError: the mean count of an entry is negative, or beyond 2^53.
        """
        wide = widen(check_real(clean, "clean"))
        counts = draw_counts(self._mean(wide), generator)
        device = drawing_device(clean, generator)
        w = torch.randn(clean.shape, generator=generator, dtype=wide.dtype, device=device).to(clean.device)
        return (spread(self.gain, wide, "gain") * counts + spread(self.sigma, wide, "sigma") * w).to(clean.dtype)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r"""The log density; see :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: an entry of ``y`` is beyond :math:`\pm 2^{40}` photons, or the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        gain, sigma = spread(self.gain, clean, "gain"), spread(self.sigma, clean, "sigma")
        photons = y / gain
        bad = ~(photons.abs() <= MOST_PHOTONS)
        if bool(bad.any()):
            raise ValueError(
                f"y holds {int(bad.sum())} entries like {float(y[bad][0])}, {float(photons[bad][0]):g} photons; "
                "allowed are up to 2^40 photons"
            )
        mean = self._mean(clean)
        log_p: Tensor = _LogSum.apply(mean, photons.expand_as(mean), (sigma / gain).expand_as(mean))
        return log_p - gain.log()

    def _mean(self, clean: Tensor) -> Tensor:
        return clean / spread(self.gain, clean, "gain") + spread(self.background, clean, "background")


class _LogSum(torch.autograd.Function):
    r""":math:`\log \sum_k \mathrm{Poisson}(k; \lambda)\, N(y; k, s^2)` of each entry, differentiable in :math:`\lambda`.

    The derivative is a sum over the same terms and taken with them, so that nothing but one number an entry is kept, however
    many terms there are.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, y: Tensor, s: Tensor) -> Tensor:
        allowed = (mean >= 0) & (mean < torch.inf)
        rate = torch.where(allowed, mean, 1.0).flatten()
        log_p, derivative = _sum_over_counts(rate, y.flatten(), s.flatten())
        ctx.save_for_backward(torch.where(allowed, derivative.reshape(mean.shape), 0.0))
        return torch.where(allowed, log_p.reshape(mean.shape), -torch.inf)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return gradient * derivative, None, None


def _sum_over_counts(rate: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    r"""Log of the sum and its derivative in :math:`\lambda`, both ``(n,)``, a bounded number of terms at a time.

    Args:
        rate: :math:`\lambda`, of at least 0, ``(n,)``.
        y: measurement in photons ``(n,)``.
        s: standard deviation of the Gaussian in photons ``(n,)``.
    """
    peak = _likeliest_count(rate, y, s)
    half = _half_width(peak, s)
    ratio, excess = torch.empty_like(rate), torch.empty_like(rate)  # sum over its largest term; E[k] - peak
    order, start = half.argsort(descending=True), 0
    while start < len(order):
        terms = 2 * int(half[order[start]]) + 1
        rows = order[start : start + max(1, TERMS // terms)]
        ratio[rows], excess[rows] = _window(rate[rows], y[rows], s[rows], peak[rows], half[rows], terms)
        start += len(rows)
    largest = poisson_log_prob(peak, rate) - 0.5 * ((y - peak) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)
    dark = torch.expm1((y - 0.5) / s**2)  # at rate 0, p(y - 1)/p(y) - 1 for counts of 0
    return largest + ratio, torch.where(rate > 0, (peak - rate + excess) / rate, dark)


def _window(rate: Tensor, y: Tensor, s: Tensor, peak: Tensor, half: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Log of the sum over its term at the peak, and the mean of k less the peak, both ``(n,)``.

    The terms' logarithms are sums of those of the ratios of neighbours.
    """
    first, c = (peak - half).clamp(min=0), peak[:, None]
    k = first[:, None] + torch.arange(terms, dtype=rate.dtype, device=rate.device)
    steps = (rate[:, None] / k[:, 1:]).log_() + ((y[:, None] + 0.5 - k[:, 1:]) / s[:, None] ** 2)
    log_terms = torch.cat([torch.zeros_like(c), steps.cumsum_(1)], dim=1)
    at_peak = log_terms.gather(1, (peak - first).long()[:, None])
    largest = log_terms.amax(1, keepdim=True)  # the one at the peak, up to rounding
    weights = (log_terms - largest).exp_().mul_(k <= c + half[:, None])
    total = weights.sum(1)
    return total.log() + (largest - at_peak)[:, 0], (weights * (k - c)).sum(1) / total


def _likeliest_count(rate: Tensor, y: Tensor, s: Tensor) -> Tensor:
    r"""The k of the largest term, ``(n,)``: the last one that exceeds the one before.

    Neighbours are equal where :math:`\log(\lambda/k) + (y + \frac12 - k)/s^2 = 0`, so that :math:`w = k/s^2` solves
    :math:`w + \log w = \log(\lambda/s^2) + (y + \frac12)/s^2`: Newton's method, which climbs to the root from below.
    """
    z = (rate.log() - 2 * s.log() + (y + 0.5) / s**2).clamp(min=-700.0)
    w = torch.where(z > 1, z - z.clamp(min=1).log(), torch.sigmoid(z))
    for _ in range(6):
        w = w * (1 + z - w.log()) / (1 + w)
    return (s**2 * w).floor()


def _half_width(peak: Tensor, s: Tensor) -> Tensor:
    r"""How many terms to take on either side of the largest one, ``(n,)``.

    The terms' logarithms have second differences of at most :math:`-c`, :math:`c = 1/s^2 + 1/(k + 1)`, and do not grow away
    from the peak. So the j-th term beyond it is smaller by :math:`e^{-c j (j - 1)/2}` at least, with the c of the window's
    last term, and what lies beyond J terms on both sides is at most :math:`e^{-L} J/L` of the largest term where
    :math:`c J^2/2 \ge L`. That holds if either part of c is enough for it: :math:`J = s \sqrt{2 L}`, or
    :math:`J = L + \sqrt{L^2 + 2 L (\mathrm{peak} + 1)}`. With :math:`L = 40 + \log(1 + s)` the bound is below 1e-17.
    """
    enough = 40 + s.log1p()
    return torch.minimum(s * (2 * enough).sqrt(), enough + (enough**2 + 2 * enough * (peak + 1)).sqrt()).ceil()
