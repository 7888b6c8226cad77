r"""Denoising score matching: :math:`E_\sigma E_{x_0, w}\, \lambda(\sigma)\, |D_\theta(x_0 + \sigma w; \sigma) - x_0|^2`.

A loss is two choices, the distribution of σ and the weighting λ(σ) (Karras et al. 2022, arXiv 2206.00364, equations 2 and 8).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpnp_shared.denoiser import expand_sigma
from dpnp_shared.preconditioning import DiscreteVP, VPSchedule
from dpnp_training.augment import Augmentation
from dpnp_training.share import Share

Weighting = Literal["edm", "epsilon", "v", "flow", "x0"]


class NoiseDistribution(ABC):
    """The distribution of training noise levels."""

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """``n`` noise levels ``(n,)`` in float32, in image units, on the generator's device."""

    def importance(self, sigma: Tensor) -> Tensor:
        """Factor of each drawn level's loss, shaped like ``sigma``: 1 unless levels are drawn from another distribution than is meant."""
        return torch.ones_like(sigma)

    def observe(self, sigma: Tensor, loss: Tensor) -> None:  # noqa: B027 - most distributions have nothing to learn
        """Be told the weighted squared error ``(B,)`` at the levels ``(B,)`` of one training batch."""


class NoiseDensity(NoiseDistribution):
    """A distribution of noise levels whose density is known."""

    @abstractmethod
    def density(self, sigma: Tensor) -> Tensor:
        """Density of log σ at ``sigma``, of the same shape."""


class LogNormal(NoiseDensity):
    """``log σ ~ N(mean, std²)`` (Karras et al. 2022, Table 1).

    On the path of flow matching ``σ = t/(1-t)``, so that ``log σ = logit t``: this is the logit-normal distribution of t of
    Esser et al. 2024 (arXiv 2403.03206, section 3.1) with the same mean and std, and their shift of t by a factor α
    (section 5.3.2), ``t → α t/(1 + (α-1) t)``, is ``mean + log α``.

    Args:
        mean: of log σ.
        std: of log σ, positive.

    Raises:
        ValueError: ``std`` is not positive.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not std > 0:
            raise ValueError(f"std = {std}; it must be positive")
        self.mean, self.std = mean, std

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """See :class:`NoiseDistribution`."""
        return (self.mean + self.std * torch.randn(n, generator=generator, device=generator.device)).exp()

    def density(self, sigma: Tensor) -> Tensor:
        """See :class:`NoiseDensity`."""
        z = (sigma.log() - self.mean) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi))


class LogUniform(NoiseDensity):
    """``log σ`` uniform between the logs of two levels.

    Args:
        low: smallest level, positive.
        high: largest level.

    Raises:
        ValueError: not ``0 < low < high``.
    """

    def __init__(self, low: float = 0.002, high: float = 80.0) -> None:
        if not 0 < low < high < math.inf:
            raise ValueError(f"low = {low}, high = {high}; needed is 0 < low < high < inf")
        self.low, self.high = low, high

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """See :class:`NoiseDistribution`."""
        u = torch.rand(n, generator=generator, device=generator.device)
        return (math.log(self.low) + u * math.log(self.high / self.low)).exp()

    def density(self, sigma: Tensor) -> Tensor:
        """See :class:`NoiseDensity`."""
        return ((sigma >= self.low) & (sigma <= self.high)) / math.log(self.high / self.low)


class UniformFlowTime(NoiseDensity):
    """``t`` uniform on the straight path of flow matching, ``σ = t/(1-t)`` (Lipman et al. 2023; Liu et al. 2023).

    Args:
        low: smallest t, positive.
        high: largest t, below 1.

    Raises:
        ValueError: not ``0 < low < high < 1``.
    """

    def __init__(self, low: float = 0.002, high: float = 0.998) -> None:
        if not 0 < low < high < 1:
            raise ValueError(f"low = {low}, high = {high}; needed is 0 < low < high < 1")
        self.low, self.high = low, high

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """See :class:`NoiseDistribution`."""
        t = self.low + (self.high - self.low) * torch.rand(n, generator=generator, device=generator.device)
        return t / (1 - t)

    def density(self, sigma: Tensor) -> Tensor:
        """See :class:`NoiseDensity`."""
        t = sigma / (1 + sigma)
        return ((t >= self.low) & (t <= self.high)) * t * (1 - t) / (self.high - self.low)  # dt/d log σ = t (1-t)


class UniformTime(NoiseDistribution):
    """Uniform in the own time of a variance-preserving process.

    With a table of β's the times are its entries, as DDPM trains (Ho et al. 2020, algorithm 1); with a continuous-time
    schedule every time between its earliest and its latest (Song et al. 2021).

    Args:
        schedule: the process.
    """

    def __init__(self, schedule: VPSchedule) -> None:
        self.discrete = isinstance(schedule, DiscreteVP)
        if isinstance(schedule, DiscreteVP):
            self.log_levels = schedule.log_sigmas.float()
        else:  # invert time(σ) on a fine grid, so that any schedule serves
            grid = torch.linspace(math.log(schedule.sigma_min), math.log(schedule.sigma_max), 20_001).double()
            times = schedule.time(grid.exp())
            wanted = torch.linspace(float(times[0]), float(times[-1]), 10_001, dtype=torch.float64)
            right = torch.searchsorted(times, wanted).clamp(1, len(grid) - 1)
            fraction = ((wanted - times[right - 1]) / (times[right] - times[right - 1])).clamp(0, 1)
            self.log_levels = torch.lerp(grid[right - 1], grid[right], fraction).float()

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """See :class:`NoiseDistribution`."""
        levels = self.log_levels.to(generator.device)
        if self.discrete:
            return levels[torch.randint(len(levels), (n,), generator=generator, device=generator.device)].exp()
        position = torch.rand(n, generator=generator, device=generator.device) * (len(levels) - 1)
        left = position.long().clamp(max=len(levels) - 2)
        return torch.lerp(levels[left], levels[left + 1], position - left).exp()


class AdaptiveBands(nn.Module, NoiseDistribution):
    """Draws noise levels where the loss is, without changing the objective (after Kingma & Gao 2023, arXiv 2303.00848).

    The objective is that of ``target``, between ``low`` and ``high``. Levels are drawn from bands of equal width in log σ, each in
    proportion to a moving average of what it contributes to the objective, and each loss is divided by how much more often than
    meant its level is drawn. The expected loss and gradient are those of ``target``; their variance is smaller.

    The average counts images of all processes and is the same on each of them; of accumulated batches it learns after each one.
    It is part of the module's state, and so of the checkpoint of a training.

    Args:
        target: the distribution that is meant; EDM's log-normal by default.
        low: smallest level.
        high: largest level.
        bands: how many.
        half_life: observations of a band after which an older one counts by half.
        floor: share of draws, in (0, 1], that are of the target itself; no loss is multiplied by more than 1/floor, up to how much
            the target's density varies within a band.

    Raises:
        ValueError: a value out of range, or a target without mass between ``low`` and ``high``.
    """

    def __init__(
        self,
        target: NoiseDensity | None = None,
        low: float = 0.002,
        high: float = 80.0,
        bands: int = 32,
        half_life: float = 2000.0,
        floor: float = 0.2,
    ) -> None:
        super().__init__()
        if not 0 < low < high < math.inf:
            raise ValueError(f"low = {low}, high = {high}; needed is 0 < low < high < inf")
        if bands < 1 or not 0 < half_life < math.inf:
            raise ValueError(f"bands = {bands} and half_life = {half_life} must be positive")
        if not 0 < floor <= 1:
            raise ValueError(f"floor = {floor}; it must be in (0, 1]")
        self.target = target if target is not None else LogNormal()
        self.low, self.high, self.half_life, self.floor = low, high, half_life, floor
        self.width = math.log(high / low) / bands
        points = math.log(low) + self.width * (torch.arange(100 * bands) + 0.5) / 100
        self.meant = self.target.density(points.exp()).view(bands, 100).mean(1)
        if not float(self.meant.sum()) > 0:
            raise ValueError(f"low = {low}, high = {high}: the target {type(self.target).__name__} has no mass there")
        # as if the weighted loss were 1 at every level; no buffers, which a cast of the module to half precision would touch
        self.contribution = self.meant.clone()

    def probabilities(self) -> Tensor:
        """Probability of each band, ``(bands,)``, smallest levels first."""
        adaptive, meant = (p / p.sum() for p in (self.contribution, self.meant))
        return (1 - self.floor) * adaptive + self.floor * meant

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """See :class:`NoiseDistribution`."""
        self._to(generator.device)
        u = torch.rand(2, n, generator=generator, device=generator.device)
        edges = self.probabilities().cumsum(0)
        band = torch.searchsorted(edges, u[0] * edges[-1], right=True).clamp(max=len(edges) - 1)
        return (math.log(self.low) + self.width * (band + u[1])).exp()

    def importance(self, sigma: Tensor) -> Tensor:
        """Density of the target over that of the draws, at levels ``(B,)``."""
        self._to(sigma.device)
        return self.target.density(sigma) * self.width / self.probabilities()[self._band(sigma)].to(sigma)

    def observe(self, sigma: Tensor, loss: Tensor) -> None:
        """See :class:`NoiseDistribution`; every process must call it, a loss that is not finite is left out."""
        self._to(sigma.device)
        part = (self.target.density(sigma) * loss.detach()).float()
        finite = part.isfinite()
        hit = torch.nn.functional.one_hot(self._band(sigma), len(self.meant)) * finite[:, None]
        sums = torch.stack([(hit * part.where(finite, 0.0)[:, None]).sum(0), hit.sum(0).float()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, count = sums
        keep = 0.5 ** (count / self.half_life)
        self.contribution = keep * self.contribution + (1 - keep) * total / count.clamp(min=1)

    def _band(self, sigma: Tensor) -> Tensor:
        band = (sigma.float().log() - math.log(self.low)) / self.width
        return band.long().clamp(0, len(self.meant) - 1)

    def _to(self, device: torch.device) -> None:
        self.meant, self.contribution = self.meant.to(device), self.contribution.to(device)

    def get_extra_state(self) -> Tensor:
        """The moving average ``(bands,)``, for the checkpoint."""
        return self.contribution.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from a checkpoint's moving average.

        Raises:
            ValueError: it is of another number of bands.
        """
        if state.shape != self.meant.shape:
            raise ValueError(f"the checkpoint's noise distribution has {len(state)} bands, this one {len(self.meant)}")
        self.contribution = state.to(self.meant).clone()


class DenoisingScoreMatching(nn.Module):
    """The training objective.

    What it learns itself (the state of an adaptive ``noise``) is part of its module state. In evaluation mode images are not augmented
    and nothing is learned.

    Args:
        noise: distribution of σ; EDM's log-normal by default.
        weighting: λ(σ), named by what the plain squared error is then taken of. ``edm``: ``(σ² + σ_data²)/(σ σ_data)²``, unit
            loss at every σ at the start; ``epsilon``: ``1/σ²``, DDPM's loss on the noise; ``v``: ``(1 + σ²)/σ²``, the loss on
            v of Salimans & Ho 2022; ``flow``: ``((1 + σ)/σ)²``, flow matching's loss on the velocity; ``x0``: 1.
        sigma_data: standard deviation of the data's pixels, used by ``edm``.
        augmentation: changes of the training images, of which the network is told; none by default.

    Raises:
        ValueError: an unknown weighting or a ``sigma_data`` that is not positive.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        noise: NoiseDistribution | None = None,
        weighting: Weighting = "edm",
        sigma_data: float = 0.5,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting = {weighting!r}; allowed are {', '.join(get_args(Weighting))}")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data = {sigma_data}; it must be positive")
        self.noise = noise if noise is not None else LogNormal()
        self.weighting, self.sigma_data = weighting, sigma_data
        self.augmentation = augmentation

    def weight(self, sigma: Tensor) -> Tensor:
        """λ(σ), shaped like ``sigma``."""
        if self.weighting == "edm":
            return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        if self.weighting == "epsilon":
            return sigma**-2
        if self.weighting == "v":
            return 1 + sigma**-2
        if self.weighting == "flow":
            return (1 + 1 / sigma) ** 2
        return torch.ones_like(sigma)

    def forward(
        self, denoise: Callable[..., Tensor], x_0: Tensor, *, generator: torch.Generator, share: Share | None = None
    ) -> Tensor:
        """Weighted squared error of one draw of noise.

        Args:
            denoise: ``D(x; sigma)`` with ``sigma`` of shape ``(B,)``; with augmentation a third argument is the augmentation
                vector ``(B, A)``.
            x_0: clean images ``(B, C, H, W)``.
            generator: source of the augmentation, of σ and of w, on the device of ``x_0``; the same for all shares of a batch.
            share: which images of the whole batch these are; all of them by default.

        Returns:
            Scalar, the mean over batch and pixels.
        """
        share = share if share is not None else Share.all(x_0.shape[0])
        informed: Callable[..., Tensor] = denoise
        if self.augmentation is not None and self.training:
            x_0, vector = self.augmentation(x_0, generator=generator, share=share)

            def informed(x: Tensor, sigma: Tensor) -> Tensor:
                return denoise(x, sigma, vector)

        sigma = share.of(self.noise.sample(share.whole, generator=generator)).to(x_0)
        importance = self.noise.importance(sigma)
        loss = self.weight(sigma) * squared_error(informed, x_0, sigma, share.normal_like(x_0, generator))
        if self.training:
            self.noise.observe(sigma, loss.detach())
        return (importance * loss).mean()


def squared_error(denoise: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, sigma: Tensor, w: Tensor) -> Tensor:
    """Mean squared denoising error of each image at its own noise level.

    Args:
        denoise: ``D(x; sigma)``.
        x_0: clean images ``(B, C, H, W)``.
        sigma: noise levels ``(B,)``.
        w: standard normal noise, shaped like ``x_0``.

    Returns:
        ``(B,)``.
    """
    return (denoise(x_0 + expand_sigma(sigma, x_0) * w, sigma) - x_0).square().flatten(1).mean(1)


def error_in_band(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x_0: Tensor,
    band: tuple[float, float],
    *,
    generator: torch.Generator,
    share: Share,
) -> tuple[Tensor, Tensor]:
    """Noise levels uniform in log σ within a band, and the denoising error at them.

    Args:
        denoise: ``D(x; sigma)``.
        x_0: clean images ``(B, C, H, W)``.
        band: its ends.
        generator: source of σ and w, on the device of ``x_0``; the same for all shares of a batch.
        share: which images of the whole batch these are.

    Returns:
        Levels and mean squared errors, each ``(B,)``.
    """
    low, high = band
    u = share.of(torch.rand(share.whole, generator=generator, device=x_0.device)).to(x_0)
    sigma = low * (high / low) ** u
    return sigma, squared_error(denoise, x_0, sigma, share.normal_like(x_0, generator))
