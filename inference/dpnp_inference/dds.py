r"""Denoising diffusion samplers: draw :math:`x \sim p(x_0 \mid x_0 + \eta w = z)` with unconditional scores only.

Xu & Chi 2024 (arXiv 2403.17042), algorithms 2 (DDS-DDPM) and 3 (DDS-DDIM). Both come at first order, as in the paper, and at second
order, which needs fewer network calls for the same error.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.solvers import check_order


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


@dataclass(frozen=True)
class DDSDDPM:
    r"""Stochastic: the reverse heat flow, started at ``z`` itself.

    .. math:: dx = -2 \sigma\, s(x; \sigma)\, d\sigma + \sqrt{2 \sigma |d\sigma|}\; d\bar w, \qquad \sigma: \eta \to 0,\ x(\eta) = z

    ``order=1`` is the paper's exponential integrator,
    :math:`x \leftarrow x + 2 (\sigma_{i+1} - \sigma_i)\, \varepsilon(x; \sigma_i) + \sqrt{\sigma_i^2 - \sigma_{i+1}^2}\; w`
    with :math:`\varepsilon = (x - D)/\sigma`; ``order=2`` extrapolates ε over the step (Adams-Bashforth), at one
    network call a step as well.

    Attributes:
        calls: network calls a draw.
        order: 1 or 2.
        power: spacing of the noise levels, see :func:`angles`.
    """

    calls: int = 10
    order: int = 2
    power: float = 1.5

    def __post_init__(self) -> None:
        _check(self.calls, self.order, self.power)

    def __call__(
        self, denoiser: Denoiser, z: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[Tensor, DDSInfo]:
        """See :class:`DenoisingSampler`."""
        denoiser.check_sigma(eta)
        sigmas = [eta * math.sin(theta) for theta in angles(self.calls, self.power, denoiser.sigma_min / eta)]
        x, slope = z, _Slope(self.order)
        for sigma, sigma_next in itertools.pairwise(sigmas):
            epsilon, h = (x - denoiser(x, sigma)) / sigma, sigma_next - sigma
            w = generator.normal_like(x)
            x = x + 2 * h * slope(epsilon, h) + math.sqrt(sigma**2 - sigma_next**2) * w
        return x, DDSInfo(len(sigmas) - 1)


@dataclass(frozen=True)
class DDSDDIM:
    r"""Deterministic after its first noise: a probability flow towards the denoising posterior.

    The noised posterior has a score made of unconditional ones. With :math:`u_\tau = (x_0 - z) + \tau w`,

    .. math:: \nabla \log q_\tau(u) = \frac{\eta^2}{\eta^2 + \tau^2}\, s(z + m; \sigma_c) - \frac{u}{\eta^2 + \tau^2},
              \qquad m = \frac{\eta^2}{\eta^2 + \tau^2}\, u,\quad \sigma_c = \frac{\eta\tau}{\sqrt{\eta^2 + \tau^2}} < \eta .

    In the angle :math:`\theta = \arctan(\tau/\eta)` and :math:`v = u/\sqrt{\eta^2 + \tau^2}` the flow
    :math:`du/d\tau = -\tau \nabla \log q_\tau(u)` loses its linear part and its infinite time,

    .. math:: \frac{dv}{d\theta} = \varepsilon(z + \eta \cos\theta\; v;\ \eta \sin\theta), \qquad \theta: \tfrac{\pi}{2} \to 0,

    it starts from :math:`v \sim N(0, I)` exactly and ends at :math:`x = z + \eta v`. ``order=1`` freezes
    :math:`\varepsilon = (x - D)/\sigma` over a step, the paper's exponential integrator (the same in VE and VP form, since the linear
    part is solved exactly); ``order=2`` extrapolates it (Adams-Bashforth), at one network call a step as well.

    Attributes:
        calls: network calls a draw.
        order: 1 or 2.
        power: spacing of θ, see :func:`angles`.
    """

    calls: int = 8
    order: int = 2
    power: float = 2.0

    def __post_init__(self) -> None:
        _check(self.calls, self.order, self.power)

    def __call__(
        self, denoiser: Denoiser, z: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[Tensor, DDSInfo]:
        """See :class:`DenoisingSampler`."""
        denoiser.check_sigma(eta)
        thetas = angles(self.calls, self.power, denoiser.sigma_min / eta)
        v = generator.normal_like(z)
        slope = _Slope(self.order)
        for theta, theta_next in itertools.pairwise(thetas):
            x, sigma = z + eta * math.cos(theta) * v, eta * math.sin(theta)
            epsilon, h = (x - denoiser(x, sigma)) / sigma, theta_next - theta
            v = v + h * slope(epsilon, h)
        return z + eta * v, DDSInfo(len(thetas) - 1)


class _Slope:
    """The slope over a step: the one at its start, at second order extrapolated to its middle from the step before."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.previous: tuple[Tensor, float] | None = None

    def __call__(self, slope: Tensor, h: float) -> Tensor:
        previous, self.previous = self.previous, (slope, h)
        if self.order == 1 or previous is None:
            return slope
        return slope + (slope - previous[0]) * (h / (2 * previous[1]))


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


def _check(calls: int, order: int, power: float) -> None:
    if calls < 1:
        raise ValueError(f"calls = {calls}; at least 1 is needed")
    check_order(order)
    if not 0 < power < math.inf:
        raise ValueError(f"power = {power}; it must be positive")
