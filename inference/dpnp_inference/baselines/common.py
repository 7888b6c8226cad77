"""What the baselines share: the loop over batches with its record, the time steps of DDPM, and one DDIM step.

A baseline is one file with its paper on top. It says in :meth:`Baseline._run` what one batch of chains does.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dpnp_inference.acceleration import BatchSize, chains_together, in_batches
from dpnp_inference.dpnp import SamplingError, Sweep, image_shape_of
from dpnp_inference.fit import record_fit
from dpnp_inference.gibbs import OnSweep, describe_step
from dpnp_inference.posterior import Posterior
from dpnp_inference.proximal import ProximalInfo
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser, check_white
from dpnp_shared.forward_model import ForwardModel

TIMESTEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 0.02  # the linear schedule of Ho et al. 2020
Spacing = Literal["uniform", "quad"]


@dataclass
class Run:
    """One batch of chains on its way, and the account of what it costs.

    Attributes:
        prior: the denoiser.
        generator: one stream a chain.
        chains: indices of the chains.
        draws: wanted of each chain.
        thin: steps from one draw to the next.
        steps: how many reports there will be.
        advice: what to do about chains that diverge.
        on_sweep: called at each report.
        network_calls: made so far, each on the whole batch.
        network_gradients: likewise, of vector-Jacobian products.
        forward_calls: likewise, of the forward map; adjoints and gradients count as one each.
        rows: one record a report, JSON-able, as DPnP's iterations have.
        reported: network calls that these account for.
        since: when the last report was made, or the run began.
    """

    prior: Denoiser
    generator: ChainGenerators
    chains: range
    draws: int
    thin: int
    steps: int
    advice: str
    on_sweep: OnSweep | None
    network_calls: int = 0
    network_gradients: int = 0
    forward_calls: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    reported: int = 0
    since: float = field(default_factory=time.perf_counter)

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        """``D(x; sigma)``, counted; ``x`` ``(B, C, H, W)``, ``sigma`` in image units."""
        self.network_calls += 1
        denoised: Tensor = self.prior(x, sigma)
        return denoised

    def report(self, x: Tensor, sigma: float, info: ProximalInfo | None = None) -> None:
        """Account for one step of the chains.

        Args:
            x: where they are, ``(B, C, H, W)``.
            sigma: noise level or coupling of the step, in image units.
            info: what was done with the likelihood; its forward calls are added to those counted so far.

        Raises:
            SamplingError: a chain is no longer finite; names it.
        """
        info = info or ProximalInfo(0)
        self.forward_calls += info.forward_calls
        row = describe_step(sigma, self.network_calls - self.reported, info)
        self.rows.append(row)
        self.reported = self.network_calls
        finite = torch.isfinite(x).flatten(1).all(1)  # waits for the device
        now = time.perf_counter()
        row["seconds"], self.since = now - self.since, now
        if not bool(finite.all()):
            broken = [chain for chain, ok in zip(self.chains, finite.tolist(), strict=True) if not ok]
            raise SamplingError(
                f"chains {broken} are no longer finite after step {len(self.rows)} at sigma = {sigma:g}; {self.advice}"
            )
        if self.on_sweep is not None:
            self.on_sweep(Sweep(self.chains, len(self.rows), self.steps, sigma, self.network_calls, info))


class Baseline(ABC):
    """A sampler with the interface of :class:`~dpnp_inference.dpnp.DPnP`.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: operator and noise, on the prior's device.
        dtype: of the images; a trained network computes in its own.

    Attributes:
        settings: what was chosen, JSON-able, for the record.
        schedule: the noise level, or the coupling, of each step, in image units.
        advice: what to do about chains that diverge.
        takes_field: whether the prior's noise may be a random field.
        calls_forward_map: whether sampling needs the forward map; one that does without is not asked for the fit of its draws either.

    Raises:
        ValueError: an operator for another number of channels than the prior's.
        TypeError: the prior is for noise that is not white, and the sampler needs white noise.
    """

    settings: dict[str, Any]
    schedule: list[float]
    advice: ClassVar[str]
    takes_field: ClassVar[bool] = False
    calls_forward_map: ClassVar[bool] = True

    def __init__(self, prior: Denoiser, forward_model: ForwardModel, dtype: torch.dtype) -> None:
        if not self.takes_field:
            check_white(prior, type(self).__name__)
        self.prior, self.forward_model, self.dtype = prior, forward_model, dtype
        self.device = next((t.device for t in (*prior.parameters(), *prior.buffers())), torch.device("cpu"))
        self.image_shape = image_shape_of(prior, forward_model)

    @property
    def plan(self) -> str:
        """What is going to happen, in one sentence for the log."""
        return f"{type(self).__name__}: {len(self.schedule)} steps, sigma from {self.schedule[0]:.3g} to {self.schedule[-1]:.3g}"

    @property
    def reports(self) -> int:
        """How many steps a batch of chains reports."""
        return len(self.schedule)

    def blank(self, chains: int = 1) -> Tensor:
        """Zeros ``(chains, C, H, W)`` of the dtype and on the device that sampling uses."""
        return torch.zeros((chains, *self.image_shape), dtype=self.dtype, device=self.device)

    def sample(
        self,
        y: Tensor,
        *,
        chains: int,
        seed: int,
        draws: int = 1,
        thin: int = 1,
        batch_size: BatchSize = None,
        on_sweep: OnSweep | None = None,
    ) -> Posterior:
        """Run independent chains.

        Args:
            y: one measurement, without a batch dimension.
            chains: how many chains.
            seed: not negative; chain i's randomness depends on ``(seed, i)`` only.
            draws: draws of each chain; 1, except for samplers that are Markov chains.
            thin: 1, except for samplers that are Markov chains.
            batch_size: chains that run together, all by default; ``auto`` runs all, with as many images in a network call as fit the
                memory (of no use to a sampler that differentiates through its calls: what they keep adds up). It changes memory
                and speed, not the draws (up to the rounding of floating-point sums).
            on_sweep: called after each step, with its noise level σ in place of the coupling.

        Returns:
            The draws and the record of how they came about.

        Raises:
            ValueError: an argument out of range, or a measurement that does not fit the forward model.
            SamplingError: a chain has left the finite numbers.
        """
        for name, value, least in (
            ("chains", chains, 1),
            ("seed", seed, 0),
            ("draws", draws, 1),
            ("thin", thin, 1),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        size = chains_together(batch_size, chains)
        self._check_draws(draws, thin)
        measured, y = y, self._measured(y)
        start = time.perf_counter()
        samples, runs = [], []
        for first in range(0, chains, size):
            batch = range(first, min(first + size, chains))
            prior = in_batches(self.prior, "auto" if batch_size == "auto" else size, len(batch))
            run = Run(prior, ChainGenerators(seed, batch), batch, draws, thin, self.reports, self.advice, on_sweep)
            with torch.no_grad():
                samples.append(self._run(y, run).cpu())
            runs.append(run)
        diagnostics = {
            "sampler": type(self).__name__,
            **self.settings,
            "schedule": self.schedule,
            "chains": chains,
            "draws": draws,
            "thin": thin,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            "batches": len(runs),
            "network_calls": sum(run.network_calls for run in runs),
            "network_gradients": sum(run.network_gradients for run in runs),
            "forward_calls": sum(run.forward_calls for run in runs),
            "iterations": [run.rows for run in runs],
            "warnings": [],
        }
        posterior = Posterior(torch.cat(samples), diagnostics)
        if self.calls_forward_map:
            diagnostics["fit"] = record_fit(
                self.forward_model, measured.to(self.device), posterior.flat.to(self.blank()), seed=seed
            )
        posterior.diagnostics["convergence"] = posterior.convergence()
        return posterior

    def _measured(self, y: Tensor) -> Tensor:
        """What the chains need of the measurement: by default ``y`` itself, checked, on the sampler's device.

        Raises:
            TypeError: ``y`` is no tensor, or complex where the model is not.
            ValueError: ``y`` does not fit the forward model.
        """
        self.forward_model.check_measurement(y, self.image_shape, dtype=self.dtype, device=self.device)
        return y.to(device=self.device, dtype=self.dtype.to_complex() if y.is_complex() else self.dtype)

    def _check_draws(self, draws: int, thin: int) -> None:
        """Refuse what the sampler cannot give.

        Raises:
            ValueError: names the argument.
        """
        for name, value in (("draws", draws), ("thin", thin)):
            if value != 1:
                raise ValueError(
                    f"{name} = {value}; {type(self).__name__} gives one draw a chain, so that it must be 1: raise chains instead"
                )

    @abstractmethod
    def _run(self, y: Tensor, run: Run) -> Tensor:
        """Draws ``(B, draws, C, H, W)`` of one batch of chains, given ``y`` ``(*y_shape)``; called without autograd."""


def check_differentiable(forward_model: ForwardModel, method: str) -> None:
    """Refuse a likelihood without gradient.

    Args:
        forward_model: operator and noise.
        method: who needs it.

    Raises:
        TypeError: names operator and noise.
    """
    if not forward_model.differentiable:
        raise TypeError(
            f"{method} needs a differentiable likelihood; of {type(forward_model.operator).__name__} and "
            f"{type(forward_model.noise).__name__} one says it is not"
        )


def check_range(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Refuse a number outside of [low, high], and infinity.

    Args:
        name: of the argument.
        value: received.
        low: least value; with ``open_low`` it is itself not allowed.
        high: largest value.
        open_low: see ``low``.

    Raises:
        ValueError: names argument, value and range.
    """
    if (low < value if open_low else low <= value) and value <= high and value < math.inf:
        return
    least = f"above {low:g}" if open_low else f"at least {low:g}"
    raise ValueError(
        f"{name} = {value}; it must be {least} and " + ("finite" if high == math.inf else f"at most {high:g}")
    )


def alpha_bars(steps: int, spacing: Spacing = "uniform") -> list[float]:
    r"""``steps`` of the 1000 values :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)` of the linear schedule, from noisy to clean.

    Args:
        steps: 1 to 1000.
        spacing: ``uniform``, evenly spaced time steps, both ends included; ``quad``, dense at small noise: the times
            :math:`T - \lfloor\sqrt{u}\rfloor - 1` for even u from 0 to :math:`T^2` (the code of Zhu et al. 2023).

    Returns:
        Increasing values, the first one belonging to the last time step.

    Raises:
        ValueError: an argument out of range.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps = {steps}; allowed are 1 to {TIMESTEPS}")
    if spacing not in ("uniform", "quad"):
        raise ValueError(f"spacing = {spacing!r}; allowed are 'uniform' and 'quad'")
    beta = torch.linspace(BETA_FIRST, BETA_LAST, TIMESTEPS, dtype=torch.float64)
    if spacing == "uniform":
        times = torch.linspace(TIMESTEPS - 1, 0, steps, dtype=torch.float64).round().long()
    else:
        roots = torch.linspace(0, TIMESTEPS**2, steps, dtype=torch.float64).sqrt().long().clamp(max=TIMESTEPS - 1)
        times = TIMESTEPS - 1 - torch.unique(roots)
    return [float(a) for a in (1 - beta).cumprod(0)[times]]


def noise_level(alpha_bar: float) -> float:
    r""":math:`\sigma = \sqrt{(1 - \bar\alpha)/\bar\alpha}`, in image units."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def time_steps(prior: Denoiser, steps: int, spacing: Spacing = "uniform") -> list[float]:
    r"""The :math:`\bar\alpha_t` of :func:`alpha_bars` at which the prior may be used.

    Args:
        prior: gives the noise levels that are allowed.
        steps: before the others are left out.
        spacing: of the time steps.

    Returns:
        As :func:`alpha_bars`, at least one value.

    Raises:
        ValueError: an argument out of range, or no value is left.
    """
    kept = [a for a in alpha_bars(steps, spacing) if prior.sigma_min <= noise_level(a) <= prior.sigma_max]
    if not kept:
        raise ValueError(
            f"steps = {steps}: none of their noise levels is in the prior's [{prior.sigma_min:g}, {prior.sigma_max:g}]"
        )
    return kept


def ddim_noise(alpha_bar: float, alpha_bar_next: float, eta: float) -> tuple[float, float]:
    r"""The parts of a DDIM step's noise: :math:`c_1` of the new one and :math:`c_2` of the predicted one.

    .. math:: c_1 = \eta \sqrt{\tfrac{1 - \bar\alpha_s}{1 - \bar\alpha_t} \big(1 - \tfrac{\bar\alpha_t}{\bar\alpha_s}\big)}, \qquad
              c_2 = \sqrt{1 - \bar\alpha_s - c_1^2}

    (Song, Meng & Ermon 2021, arXiv 2010.02502, equations 12 and 16.)

    Args:
        alpha_bar: of the step's start.
        alpha_bar_next: of its end, larger, at most 1.
        eta: 0 (deterministic) to 1 (ancestral, DDPM).
    """
    c_1 = eta * math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
    return c_1, math.sqrt(max(1 - alpha_bar_next - c_1**2, 0.0))


def ddim_step(
    x: Tensor, x_0: Tensor, alpha_bar: float, alpha_bar_next: float, eta: float, generator: ChainGenerators
) -> Tensor:
    r"""One step :math:`x_s = \sqrt{\bar\alpha_s}\, \hat x_0 + c_2\, \hat\varepsilon + c_1 w` in variance-preserving coordinates.

    Args:
        x: ``(B, C, H, W)`` at ``alpha_bar``.
        x_0: the denoised images, shaped alike.
        alpha_bar: of the step's start.
        alpha_bar_next: of its end.
        eta: see :func:`ddim_noise`.
        generator: one stream a chain; no number is drawn where :math:`c_1 = 0`.

    Returns:
        ``(B, C, H, W)`` at ``alpha_bar_next``.
    """
    c_1, c_2 = ddim_noise(alpha_bar, alpha_bar_next, eta)
    x = math.sqrt(alpha_bar_next) * x_0 + c_2 / math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * x_0)
    return x + c_1 * generator.normal_like(x) if c_1 > 0 else x
