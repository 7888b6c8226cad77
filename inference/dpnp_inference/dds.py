r"""Denoising diffusion samplers: draw :math:`x \sim p(x_0 \mid x_0 + \eta w = z)` with unconditional scores only.

Xu & Chi 2024 (arXiv 2403.17042), algorithms 2 (DDS-DDPM) and 3 (DDS-DDIM). Each is a continuous-time process, which a choice of solvers
integrates: the paper's own, of first order, and ones of second order, which need fewer network calls for the same error.

Both processes go through states :math:`s_i = \alpha_i \hat x_0 + \sigma_i w`, in which the clean image :math:`\hat x_0` has the
conditional mean :math:`D_i`, one call of the network:

========  =====================  =====================  ====================  ======================================
kind      :math:`\hat x_0`       :math:`\alpha_i`       :math:`\sigma_i`      :math:`D_i`
========  =====================  =====================  ====================  ======================================
DDS-DDPM  :math:`x_0`            1                      η sin θ               :math:`D(s_i; \sigma_i)`
DDS-DDIM  :math:`x_0 - z`        cos θ                  η sin θ               :math:`D(z + \alpha_i s_i; \sigma_i) - z`
========  =====================  =====================  ====================  ======================================

from :math:`\theta = \pi/2`, the noise level η, down to 0.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, get_args

from torch import Tensor

from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser

StochasticSolver = Literal["euler", "heun", "adams-bashforth", "sde-dpm++2m"]
AnySolver = Literal["euler", "heun", "adams-bashforth", "dpm++2m", "sde-dpm++2m"]
TOLERANCE = 0.05  # what the numbers of calls were measured for
LEAST_CALLS = 3  # fewer are too few at any noise level


class DDSInfo(NamedTuple):
    """What one draw cost.

    Attributes:
        network_calls: calls of the denoiser, each on the whole batch.
    """

    network_calls: int


class DenoisingSampler(Protocol):
    """Draws from the denoising posterior."""

    def __call__(
        self, denoiser: Denoiser, z: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[Tensor, DDSInfo]:
        """Draw ``x ~ p(x_0 | x_0 + eta w = z)``.

        Args:
            denoiser: the prior.
            z: noisy images ``(B, C, H, W)``.
            eta: their noise level, in image units.
            generator: one stream a chain.

        Returns:
            ``x`` shaped like ``z``, and what it cost.

        Raises:
            ValueError: ``eta`` is outside of the denoiser's range.
        """
        ...


class _Node(NamedTuple):
    """A noise level: the time that slopes refer to, and the state's ``alpha`` and ``sigma``."""

    time: float
    alpha: float
    sigma: float


@dataclass(frozen=True)
class _DDS(ABC):
    """What DDS-DDPM and DDS-DDIM have in common: their fields, and the loop over the noise levels."""

    calls: int | Literal["auto"] = "auto"
    solver: AnySolver = "adams-bashforth"
    power: float = 1.0
    tolerance: float = TOLERANCE

    solvers: ClassVar[tuple[str, ...]]
    growth: ClassVar[tuple[float, float]]

    def __post_init__(self) -> None:
        if self.calls != "auto" and (not isinstance(self.calls, int) or self.calls < 1):
            raise ValueError(f"calls = {self.calls!r}; allowed are 'auto' and numbers of at least 1")
        if self.solver not in self.solvers:
            raise ValueError(f"solver = {self.solver!r}; {type(self).__name__} has {', '.join(self.solvers)}")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power = {self.power}; it must be positive")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance = {self.tolerance}; it must be positive")

    def calls_for(self, denoiser: Denoiser, eta: float) -> int:
        """The most network calls that a draw makes.

        Args:
            denoiser: the prior, for its spread.
            eta: noise level of ``z``, in image units.
        """
        if self.calls != "auto":
            return self.calls
        least, more = self.growth
        calls = least + more * math.sqrt(eta / max(eta, denoiser.spread))
        return max(LEAST_CALLS, round(calls * math.pow(TOLERANCE / self.tolerance, 2 / 3)))

    def __call__(
        self, denoiser: Denoiser, z: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[Tensor, DDSInfo]:
        """See :class:`DenoisingSampler`."""
        denoiser.check_sigma(eta)
        calls = self.calls_for(denoiser, eta)
        steps = (calls + 1) // 2 if self.solver == "heun" else calls
        nodes = [self._node(theta, eta) for theta in angles(steps, self.power, denoiser.sigma_min / eta)]
        process = self._process(denoiser, z, eta, generator)
        run = _by_mean if "dpm" in self.solver else _by_slope
        return process.image(run(self.solver, process, nodes)), DDSInfo(process.network_calls)

    @abstractmethod
    def _node(self, theta: float, eta: float) -> _Node: ...

    @abstractmethod
    def _process(self, denoiser: Denoiser, z: Tensor, eta: float, generator: ChainGenerators) -> _Process: ...


@dataclass(frozen=True)
class DDSDDPM(_DDS):
    r"""Stochastic: the reverse heat flow, started at ``z`` itself (Xu & Chi 2024, algorithm 2).

    .. math:: dx = -2 \sigma\, s(x; \sigma)\, d\sigma + \sqrt{2 \sigma |d\sigma|}\; d\bar w, \qquad \sigma: \eta \to 0,\ x(\eta) = z

    Solvers, with :math:`\varepsilon_i = (x - D_i)/\sigma_i` (a flow without noise would give a single image for a given z, hence there
    is none):

    - ``euler``: the paper's exponential integrator,
      :math:`x \leftarrow x + 2 (\sigma_{i+1} - \sigma_i)\, \varepsilon_i + \sqrt{\sigma_i^2 - \sigma_{i+1}^2}\; w`;
    - ``heun``: :math:`\varepsilon` averaged over the step's two ends, two calls a step;
    - ``adams-bashforth``: :math:`\varepsilon` extrapolated to the step's middle from the step before;
    - ``sde-dpm++2m``: the same for :math:`D` in :math:`\ln \sigma` (SDE-DPM-Solver++ 2M; Lu et al. 2022, arXiv 2211.01095, section 4.3).

    All but ``euler`` end at the mean :math:`D_{N-1}`. They lack no more than the last level's variance, while the paper's last step
    leaves up to twice that variance as noise on an image without any uncertainty.

    ``calls="auto"`` takes :math:`7 + 13 \sqrt{\min(1, \eta/\text{spread})}`, rounded: a few where the posterior is nearly Gaussian, more
    where modes are decided; see :class:`DDSDDIM` for why it depends on no smaller scale of the prior. A stochastic draw takes a
    few calls more for the same distance (``benchmarks/denoising_samplers.py``).

    Attributes:
        calls: network calls a draw at most (``heun`` makes an odd number); ``auto`` as above.
        solver: name of the solver.
        power: spacing of the noise levels, see :func:`angles`.
        tolerance: makes fewer or more calls by the same factor as that of :class:`DDSDDIM`, where it was measured.
    """

    solver: StochasticSolver = "adams-bashforth"
    power: float = 1.5
    tolerance: float = TOLERANCE

    solvers: ClassVar[tuple[str, ...]] = get_args(StochasticSolver)
    growth: ClassVar[tuple[float, float]] = (7, 13)

    def _node(self, theta: float, eta: float) -> _Node:
        sigma = eta * math.sin(theta)
        return _Node(sigma, 1.0, sigma)

    def _process(self, denoiser: Denoiser, z: Tensor, eta: float, generator: ChainGenerators) -> _Process:
        return _HeatFlow(denoiser, z, eta, generator, paper=self.solver == "euler")


@dataclass(frozen=True)
class DDSDDIM(_DDS):
    r"""Deterministic after its first noise: a probability flow towards the denoising posterior (Xu & Chi 2024, algorithm 3).

    The noised posterior has a score made of unconditional ones. With :math:`u_\tau = (x_0 - z) + \tau w`,

    .. math:: \nabla \log q_\tau(u) = \frac{\eta^2}{\eta^2 + \tau^2}\, s(z + m; \sigma_c) - \frac{u}{\eta^2 + \tau^2},
              \qquad m = \frac{\eta^2}{\eta^2 + \tau^2}\, u,\quad \sigma_c = \frac{\eta\tau}{\sqrt{\eta^2 + \tau^2}} < \eta .

    In the angle :math:`\theta = \arctan(\tau/\eta)` and :math:`v = u/\sqrt{\eta^2 + \tau^2}` the flow
    :math:`du/d\tau = -\tau \nabla \log q_\tau(u)` loses its linear part and its infinite time,

    .. math:: \frac{dv}{d\theta} = \varepsilon(z + \eta \cos\theta\; v;\ \eta \sin\theta), \qquad \theta: \tfrac{\pi}{2} \to 0,

    it starts from :math:`v \sim N(0, I)` exactly and ends at :math:`x = z + \eta v`. Solvers:

    - ``euler``: :math:`\varepsilon = (x - D)/\sigma` frozen over a step, the paper's exponential integrator (the same in VE and VP form,
      since the linear part is solved exactly);
    - ``heun``: averaged over the step's two ends, two calls a step;
    - ``adams-bashforth``: extrapolated to the step's middle from the step before;
    - ``dpm++2m``, ``sde-dpm++2m``: the mean :math:`D - z` of the posterior, at its own noise level τ, extrapolated in :math:`\ln \tau`
      (DPM-Solver++ 2M, deterministic, and its stochastic form; Lu et al. 2022, arXiv 2211.01095, algorithm 2 and section 4.3).

    ``calls="auto"`` takes :math:`5 + 11 \sqrt{\min(1, \eta/\text{spread})}`, rounded, so that the draw for a given noise lies within
    some 5% of the posterior's standard deviation of where 100 calls lead it. Measured on mixtures of 8 and 784 dimensions and on
    the trained prior (``benchmarks/denoising_samplers.py``): at most 4.4% for η below a third of the spread (9% on the mixture of
    images), 5 to 8% above, where 8 calls throughout give 8 to 22%. No smaller scale of the prior enters, since images have
    directions of every scale. Another ``tolerance`` than 0.05 multiplies the number by :math:`(0.05/\text{tolerance})^{2/3}`, 3 calls
    at least: the error falls as the number to the power of -1.3 to -1.7 on the trained prior (same file).

    Attributes:
        calls: network calls a draw at most (``heun`` makes an odd number); ``auto`` as above.
        solver: name of the solver.
        power: spacing of θ, see :func:`angles`.
        tolerance: error of a draw that ``auto`` aims at, in standard deviations of the denoising posterior.
    """

    solver: AnySolver = "adams-bashforth"
    power: float = 1.75
    tolerance: float = TOLERANCE

    solvers: ClassVar[tuple[str, ...]] = get_args(AnySolver)
    growth: ClassVar[tuple[float, float]] = (5, 11)

    def _node(self, theta: float, eta: float) -> _Node:
        return _Node(theta, 0.0 if theta == math.pi / 2 else math.cos(theta), eta * math.sin(theta))

    def _process(self, denoiser: Denoiser, z: Tensor, eta: float, generator: ChainGenerators) -> _Process:
        return _Bridge(denoiser, z, eta, generator)


class _Process(ABC):
    """One draw's process, as a solver sees it."""

    network_calls = 0

    def __init__(self, denoiser: Denoiser, z: Tensor, eta: float, generator: ChainGenerators) -> None:
        self.denoiser, self.z, self.eta, self.generator = denoiser, z, eta, generator

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        self.network_calls += 1
        denoised: Tensor = self.denoiser(x, sigma)
        return denoised

    @abstractmethod
    def start(self) -> Tensor:
        """The state at noise level η."""

    @abstractmethod
    def mean(self, state: Tensor, at: _Node) -> Tensor:
        """Of the clean image given the state, by one network call."""

    @abstractmethod
    def slope(self, state: Tensor, mean: Tensor, at: _Node) -> Tensor:
        """Of the state, by the node's time."""

    def noise(self, state: Tensor, at: _Node, to: _Node) -> Tensor | float:
        """What a step along the slope adds."""
        return 0.0

    def last(self, at: _Node, to: _Node) -> bool:
        """Whether the step is to give the mean in place of one along the slope."""
        return False

    def image(self, state: Tensor) -> Tensor:
        """The image that a state without noise stands for."""
        return state


class _HeatFlow(_Process):
    """DDS-DDPM: the state is ``x``, its time σ."""

    def __init__(self, denoiser: Denoiser, z: Tensor, eta: float, generator: ChainGenerators, *, paper: bool) -> None:
        super().__init__(denoiser, z, eta, generator)
        self.paper = paper

    def start(self) -> Tensor:
        return self.z

    def mean(self, state: Tensor, at: _Node) -> Tensor:
        return self.denoise(state, at.sigma)

    def slope(self, state: Tensor, mean: Tensor, at: _Node) -> Tensor:
        return 2 * (state - mean) / at.sigma  # 2 ε

    def noise(self, state: Tensor, at: _Node, to: _Node) -> Tensor | float:
        return math.sqrt(at.sigma**2 - to.sigma**2) * self.generator.normal_like(state)

    def last(self, at: _Node, to: _Node) -> bool:
        # a single step from z is left to the slope: its mean would be the same image for all chains of a z
        return not self.paper and to.sigma == 0 and at.sigma < self.eta


class _Bridge(_Process):
    """DDS-DDIM: the state is ``η v``, its time θ."""

    def start(self) -> Tensor:
        return self.eta * self.generator.normal_like(self.z)

    def mean(self, state: Tensor, at: _Node) -> Tensor:
        return self.denoise(self.z + at.alpha * state, at.sigma) - self.z

    def slope(self, state: Tensor, mean: Tensor, at: _Node) -> Tensor:
        return (at.alpha * state - mean) * (self.eta / at.sigma)  # η ε, since sin θ = σ/η

    def image(self, state: Tensor) -> Tensor:
        return self.z + state


def _by_slope(solver: str, process: _Process, nodes: list[_Node]) -> Tensor:
    """Euler, Heun and Adams-Bashforth."""
    state, previous = process.start(), None
    for at, to in itertools.pairwise(nodes):
        mean, h = process.mean(state, at), to.time - at.time
        if process.last(at, to):
            return mean
        slope, noise = process.slope(state, mean, at), process.noise(state, at, to)
        over_step = slope
        if solver == "heun" and to.sigma > 0:
            ahead = state + h * slope + noise
            over_step = (slope + process.slope(ahead, process.mean(ahead, to), to)) / 2
        if solver == "adams-bashforth" and previous is not None:
            over_step = slope + (slope - previous[0]) * (h / (2 * previous[1]))
        state, previous = state + h * over_step + noise, (slope, h)
    return state


def _by_mean(solver: str, process: _Process, nodes: list[_Node]) -> Tensor:
    r"""DPM-Solver++ 2M and SDE-DPM-Solver++ 2M, with :math:`e^{-h} = (\sigma_{i+1}/\alpha_{i+1})/(\sigma_i/\alpha_i)`.

    The first step of the bridge, from :math:`\alpha = 0`, and the last one, to :math:`\sigma = 0`, have infinite h; beside them nothing is
    extrapolated.
    """
    state, previous = process.start(), None
    for at, to in itertools.pairwise(nodes):
        mean, decay = process.mean(state, at), to.sigma * at.alpha / (at.sigma * to.alpha)  # exp(-h)
        h = -math.log(decay) if decay > 0 else math.inf
        over_step = mean
        if previous is not None and h < math.inf:
            over_step = mean + (mean - previous[0]) * (h / (2 * previous[1]))
        ratio = to.sigma / at.sigma
        if solver == "dpm++2m":
            state = ratio * state + to.alpha * (1 - decay) * over_step
        else:
            spread = to.sigma * math.sqrt(1 - decay**2)
            state = ratio * decay * state + to.alpha * (1 - decay**2) * over_step
            state = state + spread * process.generator.normal_like(state)
        previous = (mean, h)
    return state


def angles(calls: int, power: float, sine_min: float = 0.0) -> list[float]:
    r"""Steps from π/2 to 0, :math:`\theta_i = \frac{\pi}{2} (1 - i/N)^p`, with noise levels :math:`\sigma_i = \eta \sin\theta_i`.

    Levels close to η are close together, where the flow decides between modes, and so are small ones for ``power`` above 1.

    Args:
        calls: N.
        power: p.
        sine_min: steps with a smaller ``sin θ`` are replaced by a single one there (a denoiser's ``sigma_min`` over η).

    Returns:
        At most ``calls + 1`` decreasing angles, the last one 0.
    """
    floor = math.asin(min(1.0, sine_min))
    inner = [math.pi / 2 * (1 - i / calls) ** power for i in range(calls)]
    kept = [theta for theta in inner if theta > floor]
    if len(kept) < calls:
        kept.append(floor)
    return [*kept, 0.0]


def make_dds(dds: str | DenoisingSampler) -> DenoisingSampler:
    """The sampler of a name, ``ddpm`` or ``ddim``; any other sampler as it is.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(dds, str):
        return dds
    named: dict[str, DenoisingSampler] = {"ddpm": DDSDDPM(), "ddim": DDSDDIM()}
    if dds not in named:
        raise ValueError(f"dds = {dds!r}; allowed are {', '.join(named)} and any DenoisingSampler")
    return named[dds]
