r"""Denoising score matching: :math:`E_\sigma E_{x_0, w}\, \lambda(\sigma)\, |D_\theta(x_0 + \sigma w; \sigma) - x_0|^2`.

A loss is two choices, the distribution of σ and the weighting λ(σ) (Karras et al. 2022, arXiv 2206.00364, equations 2 and 8).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dpnp_shared.denoiser import expand_sigma
from dpnp_shared.preconditioning import DiscreteVP, VPSchedule

Weighting = Literal["edm", "epsilon", "v", "flow", "x0"]


class NoiseDistribution(ABC):
    """The distribution of training noise levels."""

    @abstractmethod
    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """``n`` noise levels ``(n,)`` in float32, in image units, on the generator's device."""


class LogNormal(NoiseDistribution):
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


class LogUniform(NoiseDistribution):
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


class UniformFlowTime(NoiseDistribution):
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


class DenoisingScoreMatching:
    """The training objective.

    Args:
        noise: distribution of σ; EDM's log-normal by default.
        weighting: λ(σ), named by what the plain squared error is then taken of. ``edm``: ``(σ² + σ_data²)/(σ σ_data)²``, unit
            loss at every σ at the start; ``epsilon``: ``1/σ²``, DDPM's loss on the noise; ``v``: ``(1 + σ²)/σ²``, the loss on
            v of Salimans & Ho 2022; ``flow``: ``((1 + σ)/σ)²``, flow matching's loss on the velocity; ``x0``: 1.
        sigma_data: standard deviation of the data's pixels, used by ``edm``.

    Raises:
        ValueError: an unknown weighting or a ``sigma_data`` that is not positive.
    """

    def __init__(
        self, noise: NoiseDistribution | None = None, weighting: Weighting = "edm", sigma_data: float = 0.5
    ) -> None:
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting = {weighting!r}; allowed are {', '.join(get_args(Weighting))}")
        if not sigma_data > 0:
            raise ValueError(f"sigma_data = {sigma_data}; it must be positive")
        self.noise = noise if noise is not None else LogNormal()
        self.weighting, self.sigma_data = weighting, sigma_data

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

    def __call__(
        self, denoise: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Weighted squared error of one draw of noise.

        Args:
            denoise: ``D(x; sigma)`` with ``sigma`` of shape ``(B,)``.
            x_0: clean images ``(B, C, H, W)``.
            generator: source of σ and w, on the device of ``x_0``.

        Returns:
            Scalar, the mean over batch and pixels.
        """
        sigma = self.noise.sample(x_0.shape[0], generator=generator).to(x_0)
        error = squared_error(denoise, x_0, sigma, generator=generator)
        return (self.weight(sigma) * error).mean()


def squared_error(
    denoise: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, sigma: Tensor, *, generator: torch.Generator
) -> Tensor:
    """Mean squared denoising error of each image at its own noise level.

    Args:
        denoise: ``D(x; sigma)``.
        x_0: clean images ``(B, C, H, W)``.
        sigma: noise levels ``(B,)``.
        generator: source of w, on the device of ``x_0``.

    Returns:
        ``(B,)``.
    """
    w = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)
    return (denoise(x_0 + expand_sigma(sigma, x_0) * w, sigma) - x_0).square().flatten(1).mean(1)
