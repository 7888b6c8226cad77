r"""DPnP as a population: sequential Monte Carlo over the couplings (Del Moral, Doucet & Jasra 2006).

Single chains freeze the frequencies of well separated modes at the coupling where they stop to hop between them. A population carries
weights instead: as η falls, each particle is weighted by how much more probable the next target makes it, particles are resampled when
the weights become uneven, and Gibbs sweeps of DPnP move them. As the number of particles grows the result is exact at the last coupling,
whatever the modes, and the product of the mean weights estimates the evidence :math:`p(y)`. Weights need no network call.

The path of targets: the prior (infinite η), then falling η's. For models that are not linear and Gaussian, where the likelihood has to be
evaluated at z, η first stays at its largest value while the likelihood's power β rises from 0 to 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpnp_inference.gibbs import Gibbs, SamplingError
from dpnp_inference.proximal import TemperedForwardModel
from dpnp_inference.state import changes, restored
from dpnp_inference.targets import choose_targets
from dpnp_shared.forward_model import ForwardModel


@dataclass(frozen=True)
class Population:
    """How a population is run.

    Attributes:
        start: draws from the prior a particle. The first step weighs all of them and keeps one in ``start``: where little is
            measured and many images are possible, more of them find the right ones.
        ess: fraction to which a step along the path may lower the effective sample size (the conditional ESS of Zhou,
            Johansen & Aston 2016). A larger one takes more and smaller steps.
        resample: fraction of the effective sample size below which particles are resampled.
        sweeps: Gibbs sweeps after each step.
        final: sweeps at the last coupling, the particles being resampled before.
        populations: independent populations that the particles are divided into, whose spread gives the evidence a
            standard error; by default 4, as far as each keeps 100 particles.
        correct: whether what bias the last coupling leaves is removed by weights, if that keeps half of the effective sample size.
    """

    start: int = 8
    ess: float = 0.8
    resample: float = 0.9
    sweeps: int = 1
    final: int = 4
    populations: int | None = None
    correct: bool = True

    def __post_init__(self) -> None:
        for name in ("start", "sweeps", "final"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}; it must be at least 1")
        if not 0 < self.ess < 1 or not 0 < self.resample <= 1:
            raise ValueError(f"ess = {self.ess} must be in (0, 1) and resample = {self.resample} in (0, 1]")
        if self.populations is not None and self.populations < 1:
            raise ValueError(f"populations = {self.populations}; it must be at least 1")

    def divide(self, particles: int) -> list[range]:
        """Indices of the particles of each population, as even as they go.

        Raises:
            ValueError: a population would have fewer than 2 particles.
        """
        number = max(1, min(4, particles // 100)) if self.populations is None else self.populations
        if particles < 2 * number:
            raise ValueError(f"chains = {particles} in {number} populations; a population needs at least 2 particles")
        edges = [particles * i // number for i in range(number + 1)]
        return [range(a, b) for a, b in itertools.pairwise(edges)]


class Level(NamedTuple):
    """One step of the path and the particles after it.

    Attributes:
        eta: coupling, in image units.
        power: of the likelihood.
        state: of the proximal sampler.
        x: ``(B, C, H, W)``.
        z: likewise.
    """

    eta: float
    power: float
    state: Any
    x: Tensor
    z: Tensor


class Path:
    """Particles and their weights on the way from the prior to the last coupling.

    It begins with :meth:`start`, or with :meth:`load_state_dict` where it was interrupted.

    Args:
        settings: how.
        gibbs: the sweeps.
        forward_model: gives the likelihood.
        y: measurement ``(*y_shape)``.
        like: a tensor of the particles' shape ``(B, C, H, W)``, dtype and device.
        eta_max: largest coupling, in image units. Where weights are marginal the path starts at infinite η, and this is not used.
        eta_min: last coupling.
        generator: of the resampling.
    """

    def __init__(
        self,
        settings: Population,
        gibbs: Gibbs,
        forward_model: ForwardModel,
        y: Tensor,
        like: Tensor,
        eta_max: float,
        eta_min: float,
        generator: torch.Generator,
    ) -> None:
        self.settings, self.gibbs, self.forward_model, self.y = settings, gibbs, forward_model, y
        self.generator = generator
        self.like, self.n, self.eta_max, self.eta_min = like, len(like), eta_max, eta_min
        self.state = self.initial = gibbs.proximal.init(forward_model, y, like)
        self.targets, reason = choose_targets(forward_model, y, gibbs.proximal.split_variance(self.state))
        self.joint = self.targets.joint
        # no coupling is larger than the prior allows, and far above its spread nothing changes any more
        self.eta_top = max(min(gibbs.prior.sigma_max, 100 * gibbs.prior.spread), eta_min)
        self.eta, self.power = (eta_max, 0.0) if self.joint else (math.inf, 1.0)
        self.x = self.z = like
        self.log_w = torch.zeros(self.n, dtype=torch.float64, device=like.device)
        self.log_evidence = 0.0
        self.levels: list[dict[str, Any]] = []
        self.founders = torch.arange(self.n, device=like.device)
        self.record: dict[str, Any] = {"weights": reason, "levels": self.levels}

    def start(self) -> None:
        """Draw the first particles."""
        number = self.settings.start
        self.x = self.z = torch.cat([self.gibbs.start(self.like) for _ in range(number)])
        if self.joint:
            noise = torch.cat([self.gibbs.generator.normal_like(self.like) for _ in range(number)])
            self.z = self.x + self.eta_max * noise
        self.log_w = torch.zeros(len(self.x), dtype=torch.float64, device=self.like.device)
        self.founders = torch.arange(len(self.x), device=self.like.device)

    @property
    def done(self) -> bool:
        """Whether the last coupling is reached."""
        return self.power == 1 and self.eta == self.eta_min

    def step(self) -> Level:
        """Weigh, resample if need be, and sweep."""
        first = len(self.x) > self.n
        fraction = self.settings.ess / self.settings.start if first else self.settings.ess
        t, increment = self._furthest(fraction)
        self.eta, self.power = self._at(t)
        conditional = conditional_ess(self.log_w, increment)
        self._weigh(increment)
        effective = ess(self.log_w) / len(self.x)
        row: dict[str, Any] = {"eta": self.eta, "power": self.power, "conditional_ess": conditional, "ess": effective}
        self.levels.append(row)
        if first or self.done or effective < self.settings.resample:
            row["ancestors"] = self._resample()
        row["founders"] = len(set(self.founders.tolist()))
        self.gibbs.standing = {"level": len(self.levels), "ESS": effective, "founders": row["founders"]}
        if self.joint and (self.power < 1 or len(self.levels) == 1 or self.levels[-2]["power"] < 1):
            self.state = self._init(self.z)  # the likelihood has changed
        for _ in range(self.settings.final if self.done else self.settings.sweeps):
            self.state, self.x, self.z = self.gibbs.sweep(self.state, self.x, self.eta)
        return Level(self.eta, self.power, self.state, self.x, self.z)

    def finish(self) -> float:
        """Give the particles equal weights; what bias the last coupling has left is removed if the weights allow it.

        Returns:
            Estimate of log p(y).
        """
        if self.joint:
            rest = self.forward_model.log_likelihood(self.x, self.y) - self.forward_model.log_likelihood(self.z, self.y)
            constant = 0.0
        else:
            at = self.targets.at(self.x, self.z)
            rest = at(0.0) - at(self.eta)
            # the densities leave out what does not depend on x: the same for every particle
            one, y = self.x[:1].to(torch.float64), self.y.to(torch.promote_types(self.y.dtype, torch.float64))
            constant = float(self.forward_model.log_likelihood(one, y) - at(0.0)[:1])
        fraction = conditional_ess(self.log_w, rest)
        log_evidence = self.log_evidence + constant
        bias = "that of the last coupling"
        if bool((rest == 0).all()):
            bias = "none: exact splitting"
        elif self.settings.correct and fraction >= 0.5:
            bias = "none: corrected by weights"
            self._weigh(rest)
            log_evidence = self.log_evidence + constant
            self.record["correction_ancestors"] = self._resample()
        elif (
            not self.joint
        ):  # without its determinant the last target has no evidence of its own; that of the model always can be had
            log_evidence += float((self.log_w.log_softmax(0) + rest).logsumexp(0))
        self.record |= {"log_evidence": log_evidence, "bias": bias, "correction_ess": fraction}
        return log_evidence

    def state_dict(self) -> dict[str, Any]:
        """Where the particles are; the sweeps' own state apart."""
        named = {name: getattr(self, name) for name in ("x", "z", "log_w", "founders", "eta", "power", "log_evidence")}
        return named | {
            "record": {**self.record, "levels": list(self.levels)},
            "proximal": changes(self.state, self.initial),
            "resampling": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called."""
        for name in ("x", "z", "log_w", "founders"):
            setattr(self, name, state[name].to(self.like.device))
        self.eta, self.power, self.log_evidence = state["eta"], state["power"], state["log_evidence"]
        self.levels = list(state["record"]["levels"])
        self.record = {**state["record"], "levels": self.levels}
        self.generator.set_state(state["resampling"].clone())
        template = self._init(self.like) if self.power < 1 else self.initial
        self.state = restored(template, state["proximal"], self.like.device)

    def _init(self, z: Tensor) -> Any:
        """State of the proximal sampler at the likelihood's present power."""
        tempered = TemperedForwardModel(self.forward_model, self.power) if self.power < 1 else self.forward_model
        return self.gibbs.proximal.init(tempered, self.y, z)

    def _at(self, t: float) -> tuple[float, float]:
        """η and β at ``t`` in (0, 1] of the way to the next corner of the path."""
        if self.power < 1:
            return self.eta, 1.0 if t == 1 else self.power + t * (1 - self.power)
        top = min(self.eta, self.eta_top)
        return self.eta_min if t == 1 else top * (self.eta_min / top) ** t, 1.0

    def _furthest(self, fraction: float) -> tuple[float, Tensor]:
        """How far the next step may go, and the log weights that it gives."""
        increment: Callable[[float], Tensor]
        if self.power < 1:
            log_l = self.forward_model.log_likelihood(self.z, self.y).nan_to_num(-math.inf, math.inf, -math.inf)
            increment = lambda t: (self._at(t)[1] - self.power) * log_l  # noqa: E731
        else:
            at = self.targets.at(self.x, self.z)
            now = at(self.eta)
            increment = lambda t: at(self._at(t)[0]) - now  # noqa: E731
        low, high = 0.0, 1.0
        if conditional_ess(self.log_w, increment(1.0)) >= fraction:
            return 1.0, increment(1.0)
        for _ in range(16):
            middle = (low + high) / 2
            if conditional_ess(self.log_w, increment(middle)) >= fraction:
                low = middle
            else:
                high = middle
        return high, increment(high)  # never no step at all

    def _weigh(self, increment: Tensor) -> None:
        if not bool((torch.isfinite(increment) & torch.isfinite(self.log_w)).any()):
            raise SamplingError(
                f"none of the {self.n} particles of a population has a positive likelihood at eta = {self.eta:g}; check the "
                "measurement and the forward model, or raise chains"
            )
        self.log_evidence += float((self.log_w.log_softmax(0) + increment).logsumexp(0))
        self.log_w = self.log_w + increment

    def _resample(self) -> list[int]:
        """Equal weights, and where each particle comes from."""
        u = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        index = systematic_resampling(self.log_w, self.n, u)
        self.x, self.z, self.founders = self.x[index], self.z[index], self.founders[index]
        if len(self.log_w) == self.n:
            self.state = self.gibbs.proximal.select(self.state, index)
        self.log_w = torch.zeros_like(self.log_w[: self.n])
        ancestors: list[int] = index.tolist()
        return ancestors


def ess(log_w: Tensor) -> float:
    r"""Effective sample size :math:`1/\sum W_i^2` of log weights ``(B,)``."""
    return float(1 / log_w.softmax(0).square().sum())


def conditional_ess(log_w: Tensor, increment: Tensor) -> float:
    r"""Conditional effective sample size of a step, as a fraction (Zhou, Johansen & Aston 2016, equation 3.16).

    Args:
        log_w: log weights before the step ``(B,)``.
        increment: what it adds to them.

    Returns:
        :math:`(\sum W_i u_i)^2 / \sum W_i u_i^2`: 1 for equal increments, 0 where all have weight 0.
    """
    total = log_w.log_softmax(0) + increment
    if bool(torch.isinf(total).all()):
        return 0.0
    return float((2 * total.logsumexp(0) - (total + increment).logsumexp(0)).exp())


def systematic_resampling(log_w: Tensor, n: int, u: float) -> Tensor:
    """Ancestors ``(n,)`` of particles of log weights ``(B,)``, by one uniform number (Kitagawa 1996).

    A particle of weight W has ``n W`` descendants, rounded up or down.

    Args:
        log_w: log weights; need not be normalised.
        n: how many ancestors.
        u: in [0, 1).
    """
    edges = log_w.to(torch.float64).softmax(0).cumsum(0)
    points = (torch.arange(n, dtype=torch.float64, device=log_w.device) + u) / n
    return torch.searchsorted(edges, points, right=True).clamp(max=len(log_w) - 1)
