"""Photon counts."""

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

MOST = 2.0**53  # whole numbers beyond it have no exact float64


class PoissonNoise(Noise):
    r""":math:`y \sim \mathrm{Poisson}(g \bar y + b)`, independent in each entry.

    Measurements are counts, 0, 1, 2, …, in whatever dtype. A noiseless value whose mean count :math:`g \bar y + b` is
    negative has log probability :math:`-\infty`, as has one of mean 0 where something was counted. A sampler that starts
    where one pixel is negative hardly ever finds a way out, so that :class:`~dpnp_shared.operators.PhysicalUnits` with
    ``clamp`` and a positive background should stand before.

    Args:
        gain: :math:`g`, photons per unit of the noiseless value: a number, or one an entry (a tensor, a list, or the path
            of a ``.npy`` file; it must broadcast to ``y_shape``).
        background: :math:`b`, photons that are counted without any signal (dark counts, scatter, randoms), likewise.

    Raises:
        ValueError: an entry of ``gain`` is not positive or one of ``background`` negative, or the two do not broadcast
            to a common shape.
    """

    counts = True
    gain: Tensor
    background: Tensor

    def __init__(self, gain: Entries = 1.0, background: Entries = 0.0) -> None:
        super().__init__()
        self.register_buffer("gain", entries_argument(gain, "gain"))
        self.register_buffer("background", entries_argument(background, "background", zero=True))
        check_together(gain=self.gain, background=self.background)

    @property
    def resolution(self) -> float:
        r""":math:`\sqrt{\max(b, 1)} / g`, the least of all entries.

        The Fisher information of :math:`\bar y` is :math:`g^2/(g \bar y + b)`, which has no largest value where there is
        no background. What is taken is that of entries of one photon or more: as a function of :math:`\bar y`, the
        probability of the count y is a gamma density of standard deviation :math:`\sqrt{y + 1}/g`, never finer than
        one photon.
        """
        return float((self.background.clamp(min=1).sqrt() / self.gain).min())

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts, with the dtype of ``clean``; see :meth:`Noise.sample`.

        Raises:
            ValueError: the mean count of an entry is negative, or beyond 2^53.
        """
        return draw_counts(self._mean(widen(check_real(clean, "clean"))), generator).to(clean)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`y \log(g \bar y + b) - (g \bar y + b) - \log y!`; see :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: an entry of ``y`` is no count, or the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        mean = self._mean(clean)
        return poisson_log_prob(check_counts(y), mean)

    def _mean(self, clean: Tensor) -> Tensor:
        return spread(self.gain, clean, "gain") * clean + spread(self.background, clean, "background")


def poisson_log_prob(counts: Tensor, mean: Tensor) -> Tensor:
    r"""Poisson log probability of each entry, :math:`-\infty` where the mean is negative or NaN.

    Args:
        counts: whole numbers of at least 0; broadcasts against ``mean``.
        mean: :math:`\lambda`; where it is 0, so must the count be.

    Returns:
        Of the common shape.
    """
    lit = mean > 0
    log_mean = torch.where(lit, mean, 1.0).log()
    return torch.where(lit | ((mean == 0) & (counts == 0)), poisson_log_prob_of(counts, mean, log_mean), -torch.inf)


def poisson_log_prob_of(counts: Tensor, mean: Tensor, log_mean: Tensor) -> Tensor:
    r"""Poisson log probability of each entry, from the mean and its logarithm.

    With :math:`d = \log \lambda - \log n`,

    .. math:: n \log \lambda - \lambda - \log n! = n (d - (e^d - 1)) - r(n), \qquad r(n) = \log n! - n \log n + n

    loses nothing where large terms nearly cancel (Loader 2000, "Fast and accurate computation of binomial
    probabilities", who has it for the Poisson law as well).

    Args:
        counts: :math:`n`, whole numbers of at least 0; broadcasts against ``mean``.
        mean: :math:`\lambda`.
        log_mean: its logarithm, which may be finite where the mean is rounded to 0.

    Returns:
        Of the common shape.
    """
    n = counts.clamp(min=1)
    d = log_mean - n.log()
    return torch.where(counts > 0, n * (d - d.expm1()) - _factorial_remainder(n), -mean)


def _factorial_remainder(n: Tensor) -> Tensor:
    r""":math:`\log n! - n \log n + n` for :math:`n \ge 1`, by Stirling's series from 16 on (there right to 1e-14)."""
    m = 1 / (n * n)
    series = 0.5 * (2 * math.pi * n).log() + (1 / 12 - m * (1 / 360 - m * (1 / 1260 - m / 1680))) / n
    return torch.where(n < 16, torch.lgamma(n + 1) - n * n.log() + n, series)


def draw_counts(mean: Tensor, generator: torch.Generator | None) -> Tensor:
    """Poisson counts of the given means, on their device and in their dtype.

    Raises:
        ValueError: a mean is negative, NaN, or beyond 2^53.
    """
    bad = ~((mean >= 0) & (mean <= MOST))
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"clean gives {int(bad.sum())} entries of {mean.numel()} a mean count out of range, the first "
            f"{float(mean[tuple(index)])} at {index}; allowed are 0 to 2^53"
        )
    return torch.poisson(mean.detach().to(drawing_device(mean, generator)), generator=generator).to(mean.device)


def check_counts(y: Tensor) -> Tensor:
    """``y`` itself, where its entries are whole numbers from 0 to 2^53.

    Raises:
        ValueError: says how many are not, and what one of them is.
    """
    bad = y[~((y >= 0) & (y <= MOST) & (y == y.round()))]
    if bad.numel():
        raise ValueError(f"y holds {bad.numel()} entries like {float(bad[0])}; allowed are counts, 0, 1, 2, … to 2^53")
    return y


def check_together(**parameters: Tensor) -> None:
    """Refuse parameters of entries that do not fit each other.

    Raises:
        ValueError: names them and their shapes.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    try:
        torch.broadcast_shapes(*shapes.values())  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(f"the shapes {shapes} do not broadcast to a common one") from None
