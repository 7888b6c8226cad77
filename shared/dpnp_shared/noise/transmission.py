"""Transmission tomography: photons that came through, as counts and as their logarithm."""

from __future__ import annotations

import torch
from torch import Tensor

from dpnp_shared.noise.base import (
    Entries,
    Noise,
    check_real,
    entries_argument,
    match_real,
    positive,
    spread,
    widen,
)
from dpnp_shared.noise.poisson import MOST, check_counts, check_together, draw_counts, poisson_log_prob_of


class TransmissionNoise(Noise):
    r"""Counts behind an absorber, :math:`y \sim \mathrm{Poisson}(I_0\, e^{-\bar y} + b)` (Beer and Lambert's law).

    The noiseless value :math:`\bar y` is the line integral of the attenuation along the ray, without a unit.
    :class:`LogPoissonNoise` is for measurements that were turned into line integrals already.

    Args:
        photons: :math:`I_0`, mean count of an entry without absorber: a number, or one an entry (a tensor, a list, or the
            path of a ``.npy`` file; it must broadcast to ``y_shape``).
        background: :math:`b`, mean count without primary photons (scatter, dark counts), likewise.

    Raises:
        ValueError: an entry of ``photons`` is not positive or one of ``background`` negative, or the two do not broadcast
            to a common shape.
    """

    counts = True
    photons: Tensor
    background: Tensor

    def __init__(self, photons: Entries, background: Entries = 0.0) -> None:
        super().__init__()
        self.register_buffer("photons", entries_argument(photons, "photons"))
        self.register_buffer("background", entries_argument(background, "background", zero=True))
        check_together(photons=self.photons, background=self.background)

    @property
    def resolution(self) -> float:
        r""":math:`\sqrt{I_0 + b}/I_0`, the least of all entries.

        The Fisher information falls with :math:`\bar y`; this is that of a ray that meets no absorber, :math:`\bar y = 0`.
        """
        return float(((self.photons + self.background).sqrt() / self.photons).min())

    def fisher_information(self, clean: Tensor) -> Tensor:
        r""":math:`I^2/(I + b)`, :math:`I = I_0 e^{-\bar y}`; see :meth:`Noise.fisher_information`."""
        log_primary = spread(self.photons, clean, "photons").log() - clean
        return (2 * log_primary - self._log_mean(clean)).exp()

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts, with the dtype of ``clean``; see :meth:`Noise.sample`.

        Raises:
            ValueError: the mean count of an entry is beyond 2^53.
        """
        return draw_counts(self._log_mean(widen(check_real(clean, "clean"))).exp(), generator).to(clean)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`y \log\lambda - \lambda - \log y!` with :math:`\lambda = I_0 e^{-\bar y} + b`.

        See :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: an entry of ``y`` is no count, or the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        log_mean = self._log_mean(clean)
        return poisson_log_prob_of(check_counts(y), log_mean.exp(), log_mean)

    def _log_mean(self, clean: Tensor) -> Tensor:
        photons, background = spread(self.photons, clean, "photons"), spread(self.background, clean, "background")
        return torch.logaddexp(photons.log() - clean, background.log())


class LogPoissonNoise(Noise):
    r"""Line integrals from counts, :math:`y = -\frac1\mu \log(N/I_0)`, :math:`N \sim \mathrm{Poisson}(I_0 e^{-\mu \bar y} + b)`.

    These are :class:`TransmissionNoise`'s counts after the logarithm. The law is discrete, on the lattice of the logarithms
    of whole numbers, and :meth:`log_prob` is the log probability of the count that an entry stands for. An entry that
    stands for none, beyond what single precision rounds (in which such data are mostly kept, whatever their dtype now),
    is refused. Over some million photons single precision cannot tell neighbouring counts; the nearest one is taken.

    A count of 0, which has no logarithm, is recorded as :math:`N` = ``zero``, as it is in LoDoPaB-CT (Leuschner et al. 2021,
    Sci. Data 8, 109: 0.1 photons of :math:`I_0 = 4096`), and read so: its log probability is that of the count 0.

    Args:
        photons: :math:`I_0`, mean count of an entry without absorber: a number, or one an entry (a tensor, a list, or the
            path of a ``.npy`` file; it must broadcast to ``y_shape``).
        background: :math:`b`, mean count without primary photons, likewise. It is not taken off before the logarithm.
        mu: :math:`\mu`, attenuation that the measurement was divided by.
        zero: what stands for a count of 0 in the logarithm, over 0 and at most 0.5.

    Raises:
        ValueError: an entry of ``photons``, or ``mu``, is not positive, one of ``background`` is negative, ``zero`` is out
            of range, or ``photons`` and ``background`` do not broadcast to a common shape.
    """

    def __init__(self, photons: Entries, background: Entries = 0.0, mu: float = 1.0, zero: float = 0.1) -> None:
        super().__init__()
        self.of_counts = TransmissionNoise(photons, background)
        self.mu = positive(mu, "mu")
        if not 0 < zero <= 0.5:
            raise ValueError(f"zero = {zero}; allowed are numbers over 0 and up to 0.5")
        self.zero = zero

    @property
    def resolution(self) -> float:
        r""":math:`\sqrt{I_0 + b}/(\mu I_0)`; see :attr:`TransmissionNoise.resolution`."""
        return self.of_counts.resolution / self.mu

    def fisher_information(self, clean: Tensor) -> Tensor:
        r""":math:`\mu^2` times that of the counts; see :meth:`TransmissionNoise.fisher_information`."""
        return self.mu**2 * self.of_counts.fisher_information(self.mu * clean)

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw line integrals; see :meth:`Noise.sample`.

        Raises:
            ValueError: the mean count of an entry is beyond 2^53.
        """
        counts = self.of_counts.sample(self.mu * widen(check_real(clean, "clean")), generator)
        return (-(counts.clamp(min=self.zero) / self._photons(counts)).log() / self.mu).to(clean.dtype)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        """Log probability of the counts that ``y`` stands for; see :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: an entry of ``y`` stands for no count, or the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        return self.of_counts.entry_log_prob(self.counts_of(y).expand_as(clean), self.mu * clean)

    def counts_of(self, y: Tensor) -> Tensor:
        """The counts that line integrals stand for.

        Args:
            y: ``(B, *y_shape)``.

        Returns:
            Whole numbers, ``(B, *y_shape)`` in float64 where the device has it.

        Raises:
            ValueError: an entry stands for no count.
        """
        log_ratio = -self.mu * widen(y)
        value = self._photons(log_ratio) * log_ratio.exp()
        counts = torch.where(value < (1 + self.zero) / 2, 0.0, value.round())
        expected = torch.where(counts == 0, self.zero, counts)
        rounding = 2 * torch.finfo(torch.float32).eps * (4 + log_ratio.abs()) * expected
        bad = ~(((value - expected).abs() <= rounding) & (value <= MOST))
        if bool(bad.any()):
            raise ValueError(
                f"y holds {int(bad.sum())} entries like {float(y[bad][0])}, which stands for {float(value[bad][0]):.8g} photons; "
                f"allowed are whole numbers of photons up to 2^53, and {self.zero} for none"
            )
        return counts

    def _photons(self, like: Tensor) -> Tensor:
        return spread(self.of_counts.photons, like, "photons")
