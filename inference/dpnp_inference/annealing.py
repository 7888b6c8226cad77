"""The coupling schedule η of DPnP: constant for a few iterations, then a geometric decay (Xu & Chi 2024, section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpnp_inference.acceleration import not_compiled
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import Noise
from dpnp_shared.operators import LinearOperator, Operator


@dataclass(frozen=True)
class Annealing:
    """Constant-then-geometric schedule.

    Attributes:
        eta_max: first coupling, in image units; the prior's spread by default.
        eta_min: last coupling, in image units; by default nine tenths of the noise seen through the forward map, ``σ/‖A‖``
            (:func:`noise_through`), where the proximal sampler splits exactly (there it costs no bias), half of it where it does not.
        constant: iterations at ``eta_max``.
        decay: iterations of the geometric decay, the one at ``eta_min`` included.
        final: further iterations at ``eta_min``.
        temper: how much a Markov kernel's likelihood is tempered on the way (see :meth:`power`); 0 for not at all.
    """

    eta_max: float | None = None
    eta_min: float | None = None
    constant: int = 2
    decay: int = 26
    final: int = 4
    temper: float = 0.1

    def __post_init__(self) -> None:
        for name in ("eta_max", "eta_min"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}; it must be positive and finite")
        if self.eta_max is not None and self.eta_min is not None and self.eta_min > self.eta_max:
            raise ValueError(f"eta_min = {self.eta_min} exceeds eta_max = {self.eta_max}")
        if not 0 <= self.temper < math.inf:
            raise ValueError(f"temper = {self.temper}; allowed is a number of at least 0")
        if self.constant < 0 or self.decay < 1 or self.final < 0:
            raise ValueError(
                f"constant = {self.constant} and final = {self.final} must be at least 0, decay = {self.decay} at least 1"
            )

    def power(self, eta: float, eta_min: float) -> float:
        r"""The power β of the likelihood at a coupling, for kernels that mix slowly where the likelihood is sharp.

        .. math:: \frac1\beta = 1 + \text{temper}\; \frac{\eta^2 - \eta_{min}^2}{(2 \eta_{min})^2}

        By default :math:`2 \eta_{min} = \sigma/\|A\|`: at coupling η the splitting itself adds :math:`\eta^2 A A^T` to the noise
        covariance R, and tempering adds a tenth as much, :math:`0.1\, (\eta/2\eta_{min})^2 R`. The proximal law's condition number,
        :math:`1 + \beta \eta^2 \|A\|^2/\sigma^2`, then never exceeds 11, where it would be millions at the first coupling. At the last
        one β = 1: only the way there is tempered, never the law that is drawn from.

        Args:
            eta: coupling, in image units.
            eta_min: the last one.

        Returns:
            β in (0, 1].
        """
        return 1 / (1 + self.temper * (eta**2 - eta_min**2) / (2 * eta_min) ** 2)

    def schedule(
        self, prior: Denoiser, forward_model: ForwardModel, blank: Tensor, *, exact_splitting: bool = False
    ) -> list[float]:
        """The couplings, one an iteration.

        Args:
            prior: gives the default ``eta_max`` and the noise levels that are allowed.
            forward_model: gives the default ``eta_min``.
            blank: an image ``(1, C, H, W)`` of zeros, of the dtype and on the device that sampling uses.
            exact_splitting: whether the proximal sampler cancels the splitting's bias for ``η ≤ 0.9 σ/‖A‖``.

        Returns:
            ``constant + decay + final`` values that never increase.

        Raises:
            ValueError: a given coupling is outside of the noise levels that the prior may be used at.
        """
        for value in (self.eta_max, self.eta_min):
            if value is not None:
                prior.check_sigma(value)
        high = self.eta_max if self.eta_max is not None else min(prior.spread, prior.sigma_max)
        low = self.eta_min
        if low is None:
            low = noise_through(forward_model, prior, blank) * (0.9 if exact_splitting else 0.5)
            low = min(max(low, 2 * prior.sigma_min, 1e-4 * high), high)
        high = max(high, low)
        ratio = (low / high) ** (1 / self.decay)
        decayed = [high * ratio**i for i in range(1, self.decay)]
        return [high] * self.constant + decayed + [low] * (1 + self.final)


def noise_through(forward_model: ForwardModel, prior: Denoiser, blank: Tensor) -> float:
    r"""The noise in image units, along the direction that it hides least: :math:`\lambda_{max}(J^T I J)^{-1/2}`.

    I is the noise's Fisher information and J the forward map's Jacobian, both at the prior's mean image. Where all entries have one
    standard deviation σ, whatever the image, and the map is linear, this is :math:`\sigma/\|A\|`.

    Args:
        forward_model: operator and noise.
        prior: gives the point.
        blank: an image ``(1, C, H, W)`` of zeros.

    Returns:
        That noise, infinite for a map whose Jacobian vanishes.

    Raises:
        ValueError: the noise model does not say its resolution, or the map's derivative is not finite.
    """
    operator, noise = forward_model.operator, forward_model.noise
    unknown = (
        f"annealing: {type(noise).__name__} does not say its resolution, from which eta_min is taken; give eta_min"
    )
    resolution = noise.resolution
    if resolution is None:
        raise ValueError(unknown)

    def information(clean: Tensor) -> Tensor:
        found = noise.fisher_information(clean)
        if found is None:
            raise ValueError(unknown)
        return found

    if type(noise).fisher_information is not Noise.fisher_information:  # it depends on the value
        norm, resolution = jacobian_norm(operator, prior, blank, information=information), 1.0
    else:
        norm = operator.norm() if isinstance(operator, LinearOperator) else jacobian_norm(operator, prior, blank)
    if math.isnan(norm):
        raise ValueError(
            f"annealing: the derivative of {type(operator).__name__} is not finite at the prior's mean image; give eta_min, or see what "
            "'dpnp-reconstruct check-model' says"
        )
    return resolution / norm if norm > 0 else math.inf


def jacobian_norm(
    operator: Operator,
    prior: Denoiser,
    blank: Tensor,
    iterations: int = 20,
    information: Callable[[Tensor], Tensor] | None = None,
) -> float:
    r"""Largest singular value of the forward map's Jacobian J near the prior's mean image.

    By the power method on :math:`J^T J`; for a map without gradient, by differences along random unit directions v, from which follows
    the least that it can be, :math:`\|J\|^2 \ge \|J\|_F^2 / \min(d, m)` with :math:`\|J\|_F^2 = d\, E|J v|^2`.

    Args:
        operator: the forward map.
        prior: gives the point, by one network call at its largest noise level.
        blank: an image ``(1, C, H, W)`` of zeros.
        iterations: of the power method, or directions.
        information: I of each entry given the noiseless value, for :math:`J^T I J` and :math:`I^{1/2} J`; 1 by default.

    Returns:
        The norm; 0 for a map that is constant there.
    """
    generator = ChainGenerators(0, range(1))
    d, eps = blank.numel(), 0.1 * prior.spread / math.sqrt(blank.numel())
    with torch.no_grad(), not_compiled(prior):
        x = prior(blank, min(prior.sigma_max, 1e3 * prior.spread))
    # a little noise, since at a perfectly flat image a map like |F x| has no gradient
    x = x + eps * generator.normal_like(x)
    with torch.no_grad():
        clean: Tensor = operator(x)
        weight = torch.ones_like(clean.real) if information is None else information(clean).to(clean.real)
    if not operator.differentiable:
        with torch.no_grad():
            steps = [eps * generator.normal_like(x) for _ in range(iterations)]
            squares = [
                float((weight * (operator(x + h) - clean).abs().square()).sum() / h.square().sum()) for h in steps
            ]
        m = clean.numel() * (2 if clean.is_complex() else 1)
        return math.sqrt(sum(squares) / iterations * d / min(d, m))
    v, norm = generator.normal_like(x), 0.0
    for _ in range(iterations):
        v = v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)
        jv = _jacobian_product(operator, x, v, eps)
        _, v = torch.autograd.functional.vjp(operator, x, weight * jv)  # type: ignore[no-untyped-call]
        norm = math.sqrt(float(v.norm()))
    return norm


def _jacobian_product(operator: Operator, x: Tensor, v: Tensor, eps: float) -> Tensor:
    """``J v``: by differentiating twice, or by a difference where the map's own backward pass cannot be differentiated."""
    try:
        _, jv = torch.autograd.functional.jvp(operator, x, v, strict=True)  # type: ignore[no-untyped-call]
    except RuntimeError:
        with torch.no_grad():
            jv = (operator(x + eps * v) - operator(x - eps * v)) / (2 * eps)
    product: Tensor = jv
    return product
