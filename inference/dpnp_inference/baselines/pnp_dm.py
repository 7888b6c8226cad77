r"""PnP-DM (Wu, Sun, Chen, Zhang, Yue & Bouman 2024, arXiv 2405.18782, algorithm 1), split Gibbs sampling with a diffusion prior.

For the couplings :math:`\rho_k = \max(\rho_0\, \alpha^k, \rho_{min})`, from :math:`x \sim N(0, I)`, repeat

1. likelihood step: :math:`z \sim L(z; y)\, N(z; x, \rho_k^2 I)`,
2. prior step: :math:`x \sim p(x_0 \mid x_0 + \rho_k w = z)`, by a reverse diffusion in the form of EDM (Karras et al. 2022) that starts at
   noise level :math:`\rho_k` from z itself.

With noise level :math:`\sigma(t)` and scale :math:`s(t)`, that diffusion is integrated by Euler's method (algorithm 2),

.. math:: dx = \Big[\Big(\lambda \frac{\dot\sigma}{\sigma} + \frac{\dot s}{s}\Big) x
              - \lambda \frac{\dot\sigma s}{\sigma}\, D(x/s; \sigma)\Big] dt + [\lambda = 2]\; s \sqrt{2 \dot\sigma \sigma}\; d\bar w ,

with :math:`\lambda = 2` for the stochastic equation and :math:`\lambda = 1` for the probability flow, in one of four processes
(Karras et al., table 1):

=========  =============================================  ==============================  =====================================
process    noise level                                    scale                           levels, 100 by default
=========  =============================================  ==============================  =====================================
``vp``     :math:`\sqrt{e^{\beta_d t^2/2 + \beta_m t}-1}`  :math:`1/\sqrt{1 + \sigma^2}`   even in t, from 1 to 0.001
``ve``     :math:`\sqrt t`                                1                               even in log t
``iddpm``  t                                              1                               the cosine table of 1000, thinned
``edm``    t                                              1                               even in :math:`\sigma^{1/7}`
=========  =============================================  ==============================  =====================================

At fixed ρ, with both steps exact, x follows :math:`p(x) \int L(z) N(z; x, \rho^2 I)\, dz`: the likelihood is widened by the coupling. The
probability flow is a function of z and no draw given z, so that with it the law is another one even then. DPnP has the same two steps;
what differs is how each is done, that its coupling ends where the noise is, and that it can take the widening back.

The released code starts the prior step from z at the first level *below* ρ, as if z had less noise than it has; here ρ itself is the first
level (``insert_rho=False`` for the code's way). Of several runs its tables keep the one nearest to the true image; ``restarts`` keeps the
most likely one.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, check_differentiable, check_range
from dpnp_inference.proximal import ClosedForm, PerturbAndSolve, ProximalInfo
from dpnp_inference.proximal.likelihood import value_and_gradient
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.solvers import karras_levels

ProcessName = Literal["vp", "ve", "iddpm", "edm"]


class LikelihoodStep(Protocol):
    """What is used of a proximal sampler, in types that a class path can be checked against."""

    def init(self, forward_model: Any, y: Any, x: Any) -> Any:
        """See :class:`~dpnp_inference.proximal.ProximalSampler`, also for what follows."""
        ...

    def step(self, state: Any, x: Any, eta: Any, *, generator: Any) -> Any: ...  # noqa: D102


class LangevinState(NamedTuple):
    """What unadjusted Langevin steps need.

    Attributes:
        forward_model: gives the likelihood.
        y: measurement ``(*y_shape)``.
    """

    forward_model: ForwardModel
    y: Tensor


@dataclass(frozen=True)
class UnadjustedLangevin:
    r"""The likelihood step of PnP-DM for differentiable models (Wu et al. 2024, section 3.1), as a proximal sampler.

    From :math:`z = x`, a number of times
    :math:`z \leftarrow z + \gamma\, [\nabla \log L(z) - (z - x)/\rho^2] + \sqrt{2\gamma}\, w`. There is no Metropolis step: the law is
    wrong by an error of order γ, and the steps diverge for :math:`\gamma > 2/(1/\rho^2 + \|A\|^2/\sigma^2)`.

    Attributes:
        steps: 100 in the paper, 200 for black holes.
        step_size: γ, in squared image units; the released code has 1e-3 for coded diffraction, 1e-4 for phase retrieval (both for images
            in [-1, 1]) and 1e-5 for black holes.

    Raises:
        ValueError: an attribute out of range.
    """

    steps: int = 100
    step_size: float = 1e-4

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1)
        check_range("step_size", self.step_size, 0, open_low=True)

    @property
    def exact_splitting(self) -> bool:
        """False: it draws with the likelihood itself."""
        return False

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> LangevinState:
        """See :class:`~dpnp_inference.proximal.ProximalSampler`, also for the other methods."""
        check_differentiable(forward_model, "UnadjustedLangevin")
        return LangevinState(forward_model, y)

    def step(
        self, state: LangevinState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[LangevinState, Tensor, ProximalInfo]:
        """``steps`` gradients of the likelihood."""
        z = x
        for _ in range(self.steps):
            _, gradient = value_and_gradient(state.forward_model, z, state.y)
            drift = gradient - (z - x) / eta**2
            z = z + self.step_size * drift + math.sqrt(2 * self.step_size) * generator.normal_like(z)
        return state, z, ProximalInfo(forward_calls=2 * self.steps)

    def select(self, state: LangevinState, index: Tensor) -> LangevinState:
        """Nothing of the state belongs to a chain."""
        return state

    def split_variance(self, state: LangevinState) -> float:
        """Always 0."""
        return 0.0


PUBLISHED: dict[str, dict[str, Any]] = {
    "gaussian_deblurring": {"rho": 10.0, "decay": 0.9, "rho_min": 0.3},
    "motion_deblurring": {"rho": 10.0, "decay": 0.9, "rho_min": 0.3},
    "super_resolution": {"rho": 10.0, "decay": 0.9, "rho_min": 0.3},
    "coded_diffraction": {
        "rho": 10.0,
        "decay": 0.9,
        "rho_min": 0.1,
        "stochastic": False,
        "likelihood": UnadjustedLangevin(100, 1e-3),
    },
    "phase_retrieval": {
        "rho": 10.0,
        "decay": 0.9,
        "rho_min": 0.1,
        "likelihood": UnadjustedLangevin(100, 1e-4),
        "restarts": 4,
    },
    "black_hole": {
        "rho": 10.0,
        "decay": 0.93,
        "rho_min": 0.02,
        "iterations": 200,
        "likelihood": UnadjustedLangevin(200, 1e-5),
    },
}
"""The published settings of the paper's six problems (the commands of the released code; the process is ``edm``, one of its four)."""


class PnPDM(Baseline):
    r"""Draws by PnP-DM, each chain a Markov chain whose coupling falls.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: operator and noise.
        rho: first coupling :math:`\rho_0`, in image units; like the other defaults that of the paper's linear problems, for images in
            [-1, 1].
        decay: its factor α an iteration.
        rho_min: least coupling. The paper has 0.3 (deblurring, super-resolution), 0.1 (coded diffraction, phase retrieval) and
            0.02 (black holes, with a decay of 0.93); see :meth:`published`.
        iterations: 100 in the paper, 200 for black holes.
        burn_in: iterations before the first of several draws of a chain.
        process: ``vp``, ``ve``, ``iddpm`` or ``edm``, see above.
        stochastic: the stochastic equation; False for the probability flow.
        steps: levels of the whole grid, of which a prior step uses those below its coupling.
        insert_rho: start the prior step at ρ; False for the released code's way.
        likelihood: ``auto`` takes the closed form or conjugate gradients for a linear Gaussian model, as the paper does, and
            :class:`UnadjustedLangevin` for others; or any proximal sampler.
        restarts: runs of each chain, of which the last image's likelihood picks one. More than one bends the law towards
            the likelihood; the paper has 4 for phase retrieval.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, a coupling outside of the prior's noise levels, or an operator for another number of
            channels than the prior's.
        TypeError: ``likelihood="auto"`` and the forward model has no gradient.
    """

    advice = "lower the step_size of the likelihood step, or check the forward model's scale and gradient"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        rho: float = 10.0,
        decay: float = 0.9,
        rho_min: float = 0.3,
        iterations: int = 100,
        burn_in: int = 40,
        process: ProcessName = "edm",
        stochastic: bool = True,
        steps: int = 100,
        insert_rho: bool = True,
        likelihood: Literal["auto"] | LikelihoodStep = "auto",
        restarts: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("rho_min", rho_min, 0, open_low=True)
        check_range("rho", rho, rho_min)
        check_range("decay", decay, 0, 1, open_low=True)
        check_range("iterations", iterations, 1)
        check_range("burn_in", burn_in, 0)
        check_range("steps", steps, 2)
        check_range("restarts", restarts, 1)
        if process not in PROCESSES:
            raise ValueError(f"process = {process!r}; allowed are {', '.join(PROCESSES)}")
        self.schedule = [max(rho * decay**k, rho_min) for k in range(iterations)]
        prior.check_sigma(torch.tensor(self.schedule, dtype=torch.float64))
        self.process = PROCESSES[process](prior, steps)
        self.model = forward_model.homogeneous
        self.likelihood = self._likelihood_step(likelihood)
        self.stochastic, self.insert_rho = stochastic, insert_rho
        self.iterations, self.burn_in, self.restarts = iterations, burn_in, restarts
        self.settings = {  # the number of iterations is that of the schedule's entries
            "rho": rho,
            "decay": decay,
            "rho_min": rho_min,
            "burn_in": burn_in,
            "process": process,
            "stochastic": stochastic,
            "steps": steps,
            "insert_rho": insert_rho,
            "likelihood": repr(self.likelihood),
            "restarts": restarts,
        }

    @classmethod
    def published(cls, problem: str, prior: Denoiser, forward_model: ForwardModel, **changes: Any) -> PnPDM:
        """The sampler with a problem's published settings, :data:`PUBLISHED`.

        Args:
            problem: ``gaussian_deblurring``, ``motion_deblurring``, ``super_resolution``, ``coded_diffraction``, ``phase_retrieval``
                or ``black_hole``.
            prior: as for the class.
            forward_model: as for the class.
            changes: arguments of the class that replace published ones.

        Raises:
            ValueError: another problem.
        """
        if problem not in PUBLISHED:
            raise ValueError(f"problem = {problem!r}; published are {', '.join(PUBLISHED)}")
        return cls(prior, forward_model, **(PUBLISHED[problem] | changes))

    @property
    def reports(self) -> int:
        """Iterations of all restarts."""
        return self.iterations * self.restarts

    def _likelihood_step(self, likelihood: Literal["auto"] | LikelihoodStep) -> LikelihoodStep:
        if not isinstance(likelihood, str):
            return likelihood
        if likelihood != "auto":
            raise ValueError(f"likelihood = {likelihood!r}; allowed are 'auto' and a proximal sampler")
        if ClosedForm.supports(self.model):
            return ClosedForm(exact_splitting=False)
        if PerturbAndSolve.supports(self.model):
            return PerturbAndSolve(exact_splitting=False)
        check_differentiable(self.model, "PnP-DM with likelihood='auto'")
        return UnadjustedLangevin()

    def _check_draws(self, draws: int, thin: int) -> None:
        most = max(1, self.iterations - 1 - self.burn_in)
        if draws > most:
            raise ValueError(
                f"draws = {draws}; iterations = {self.iterations} with burn_in = {self.burn_in} allow at most {most}"
            )
        if thin != 1:
            raise ValueError(f"thin = {thin}; PnP-DM spreads the draws over the iterations after burn_in, it must be 1")

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        y = self.forward_model.homogeneous_measurement(y, self.blank())
        best = self._chain(y, run)
        if self.restarts == 1:
            return best
        log_l = self._fit(best, y, run)
        for _ in range(self.restarts - 1):
            samples = self._chain(y, run)
            fit = self._fit(samples, y, run)
            better = fit > log_l
            best = torch.where(better.reshape(-1, 1, 1, 1, 1), samples, best)
            log_l = torch.where(better, fit, log_l)
        return best

    def _fit(self, samples: Tensor, y: Tensor, run: Run) -> Tensor:
        """Log-likelihood ``(B,)`` of each chain's last image."""
        run.forward_calls += 1
        return self.model.log_likelihood(samples[:, -1], y)

    def _chain(self, y: Tensor, run: Run) -> Tensor:
        """One annealed run of a batch of chains: draws ``(B, draws, C, H, W)``, the last one from the last iteration."""
        first, last = min(self.burn_in, self.iterations - 1), self.iterations - 1
        kept = {first + (last - first) * (i + 1) // run.draws for i in range(run.draws)}
        x = run.generator.normal_like(self.blank(len(run.chains)))
        state, samples = self.likelihood.init(self.model, y, x), []
        for k, rho in enumerate(self.schedule):
            state, z, info = self.likelihood.step(state, x, rho, generator=run.generator)
            x = self.prior_step(z, rho, run)
            run.report(x, rho, info)
            if k in kept:
                samples.append(x)
        return torch.stack(samples, dim=1)

    def prior_step(self, z: Tensor, rho: float, run: Run) -> Tensor:
        r"""The reverse diffusion from noise level ρ to 0.

        Args:
            z: ``(B, C, H, W)``.
            rho: its noise level, in image units.
            run: gives the denoiser and the noise.

        Returns:
            ``(B, C, H, W)``.
        """
        levels = self.process.levels_below(rho)
        if self.insert_rho or not levels:
            levels = [rho, *levels]
        nodes = [self.process.node(sigma) for sigma in levels] + [Node(0.0, 0.0, math.inf, 1.0, 0.0)]
        factor = 2.0 if self.stochastic else 1.0
        x = nodes[0].s * z
        for i, (now, after) in enumerate(itertools.pairwise(nodes)):
            dt = after.t - now.t
            pull = factor * now.sigma_dot / now.sigma
            denoised = run.denoise(x / now.s, now.sigma)
            x = x + dt * ((pull + now.s_dot / now.s) * x - pull * now.s * denoised)
            if self.stochastic and i < len(nodes) - 2:
                x = x + now.s * math.sqrt(-2 * dt * now.sigma_dot * now.sigma) * run.generator.normal_like(x)
        return x


class Node(NamedTuple):
    """One time of a diffusion process: noise level, scale, and their derivatives in time."""

    t: float
    sigma: float
    sigma_dot: float
    s: float
    s_dot: float


class Process(ABC):
    """A diffusion process and its grid of noise levels, within those that the prior may be used at.

    Args:
        prior: gives the noise levels that are allowed.
        steps: levels of the grid.

    Attributes:
        levels: the grid, decreasing, in image units.
        span: the process's own least and largest level.
    """

    levels: list[float]
    span: tuple[float, float]

    def __init__(self, prior: Denoiser, steps: int) -> None:
        low, high = self.span
        self.low, self.high = max(low, prior.sigma_min), min(high, prior.sigma_max)
        if not self.low < self.high:
            raise ValueError(
                f"process: its noise levels [{low:g}, {high:g}] and the prior's [{prior.sigma_min:g}, {prior.sigma_max:g}] "
                "have none in common"
            )
        self.levels = self.grid(steps)

    def levels_below(self, rho: float) -> list[float]:
        """The grid's levels below ``rho``, decreasing."""
        return [sigma for sigma in self.levels if sigma < rho * (1 - 1e-9)]

    @abstractmethod
    def grid(self, steps: int) -> list[float]:
        """Decreasing levels from ``high`` to ``low``."""

    def node(self, sigma: float) -> Node:
        """The time of a noise level; by default σ is the time and the scale is 1."""
        return Node(sigma, sigma, 1.0, 1.0, 0.0)


class EDMProcess(Process):
    """Karras et al. 2022."""

    span = (0.002, 80.0)

    def grid(self, steps: int) -> list[float]:
        """Even in the 7th root."""
        return karras_levels(self.high, self.low, steps)[:-1]


class IDDPMProcess(Process):
    r"""Nichol & Dhariwal 2021 in the form of Karras et al. 2022, table 1, with M = 1000, C_1 = 0.001, C_2 = 0.008."""

    span = (0.002, 81.0)

    def grid(self, steps: int) -> list[float]:
        """Evenly thinned table; at most as many levels as there are in it."""

        def bar(j: int) -> float:
            return math.sin(math.pi / 2 * j / (1000 * 1.008)) ** 2

        u = [0.0]
        for j in range(1000, 0, -1):
            u.append(math.sqrt((u[-1] ** 2 + 1) / max(bar(j - 1) / bar(j), 0.001) - 1))
        table = [level for level in reversed(u) if self.low <= level <= self.high]
        picked = {round((len(table) - 1) / (steps - 1) * i): None for i in range(steps)}
        return [table[i] for i in picked]


class VEProcess(Process):
    """Song et al. 2021 in the form of Karras et al. 2022, table 1: the variance is the time."""

    span = (0.02, 100.0)

    def grid(self, steps: int) -> list[float]:
        """Geometric."""
        return [self.high * (self.low / self.high) ** (i / (steps - 1)) for i in range(steps)]

    def node(self, sigma: float) -> Node:
        """See :class:`Process`."""
        return Node(sigma**2, sigma, 0.5 / sigma, 1.0, 0.0)


class VPProcess(Process):
    r"""Song et al. 2021 in the form of Karras et al. 2022, table 1; β from the ends of the range at t = 0.001 and 1."""

    first = 1e-3
    span = (
        math.sqrt(math.expm1(19.9 * first**2 / 2 + 0.1 * first)),
        math.sqrt(math.expm1(19.9 / 2 + 0.1)),
    )

    def grid(self, steps: int) -> list[float]:
        """Even in time."""
        log_low, log_high = math.log1p(self.low**2), math.log1p(self.high**2)
        self.beta_d = 2 * (log_low / self.first - log_high) / (self.first - 1)
        self.beta_min = log_high - self.beta_d / 2
        if not self.beta_min + min(self.beta_d, 0.0) > 0:
            raise ValueError(
                f"process = 'vp': no linear beta(t) goes from the level {self.low:g} at t = {self.first} to {self.high:g} at 1; "
                "take another process"
            )
        times = [1 + i / (steps - 1) * (self.first - 1) for i in range(steps)]
        return [math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t)) for t in times]

    def node(self, sigma: float) -> Node:
        """See :class:`Process`."""
        log = math.log1p(sigma**2)
        t = 2 * log / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * self.beta_d * log))
        sigma_dot = 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)
        s = 1 / math.sqrt(1 + sigma**2)
        return Node(t, sigma, sigma_dot, s, -sigma * sigma_dot * s**3)


PROCESSES: dict[str, Callable[[Denoiser, int], Process]] = dict(
    zip(get_args(ProcessName), (VPProcess, VEProcess, IDDPMProcess, EDMProcess), strict=True)
)
