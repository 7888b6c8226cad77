r"""Metropolis-adjusted Langevin draws for any differentiable likelihood (Xu & Chi 2024, section 3.1; Roberts & Tweedie 1996).

The proposal integrates the Ornstein-Uhlenbeck part of the Langevin equation exactly. With step h and :math:`s = h/\eta^2`,

.. math:: z' = a z + (1 - a) x + b \nabla \log L(z) + c w, \quad a = e^{-s},\ b = \eta^2 (1 - a),\ c = \eta \sqrt{1 - a^2}

and it is accepted with the Metropolis-Hastings probability, so that the law is exact at every step size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpnp_inference.proximal.base import ProximalInfo
from dpnp_inference.proximal.likelihood import all_finite, as_column, jump, square, value_and_gradient
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel


class MALAState(NamedTuple):
    """Where the chains are, and their step sizes.

    Attributes:
        forward_model: gives the likelihood.
        y: measurement ``(*y_shape)``.
        z: last draw ``(B, C, H, W)``.
        log_s: log of the step size in units of η², of each chain ``(B,)``.
        eta: the η that the step sizes were adapted at; NaN before the first draw.
    """

    forward_model: ForwardModel
    y: Tensor
    z: Tensor
    log_s: Tensor
    eta: float


@dataclass(frozen=True)
class MALA:
    """Langevin proposals with the Metropolis step; each chain adapts its own step size when η changes, then freezes it.

    Attributes:
        steps: proposals a draw, after the adaptation.
        warmup: proposals during which the step size is adapted, whenever η is new.
        target: acceptance aimed at (0.574 is optimal in high dimension, Roberts & Rosenthal 1998).
        first_step: initial step size in units of η².
    """

    steps: int = 20
    warmup: int = 20
    target: float = 0.574
    first_step: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0:
            raise ValueError(f"steps = {self.steps} must be positive and warmup = {self.warmup} at least 0")
        if not 0 < self.target < 1 or not self.first_step > 0:
            raise ValueError(f"target = {self.target} must be in (0, 1) and first_step = {self.first_step} positive")

    @property
    def exact_splitting(self) -> bool:
        """False: it draws with the likelihood itself."""
        return False

    @staticmethod
    def supports(forward_model: ForwardModel) -> bool:
        """Whether operator and noise say that they are differentiable."""
        return forward_model.differentiable

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> MALAState:
        """See :class:`ProximalSampler`."""
        if not self.supports(forward_model):
            raise TypeError(
                f"MALA needs a differentiable likelihood; of {type(forward_model.operator).__name__} and "
                f"{type(forward_model.noise).__name__} one says it is not"
            )
        log_s = torch.full((x.shape[0],), self.first_step, dtype=x.dtype, device=x.device).log()
        return MALAState(forward_model, y, x, log_s, float("nan"))

    def step(
        self, state: MALAState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[MALAState, Tensor, ProximalInfo]:
        """See :class:`ProximalSampler`."""
        z, log_s = state.z, state.log_s
        adapt = self.warmup if state.eta != eta else 0
        log_l, gradient = value_and_gradient(state.forward_model, z, state.y)
        gradient = torch.where(torch.isfinite(gradient), gradient, 0.0)  # of a start that no proposal led to
        accepted, non_finite = torch.zeros_like(log_s), torch.zeros_like(log_s)
        distance = square(z - x)
        for i in range(adapt + self.steps):
            if i <= adapt:  # the step sizes are new
                s = as_column(log_s.exp(), x)
                a = torch.exp(-s)
                b, c = -(eta**2) * torch.expm1(-s), eta * (-torch.expm1(-2 * s)).sqrt()
                pull, twice_variance = (1 - a) * x, 2 * c.flatten() ** 2
                mean = a * z + pull + b * gradient
            z_new = mean + c * generator.normal_like(x)
            log_l_new, gradient_new = value_and_gradient(state.forward_model, z_new, state.y)
            mean_back = a * z_new + pull + b * gradient_new
            distance_new = square(z_new - x)
            # log of π(z') q(z | z') / (π(z) q(z' | z)), π(z) = L(z) N(z; x, η² I)
            log_ratio = log_l_new - log_l
            log_ratio += (distance - distance_new) / (2 * eta**2)
            log_ratio += (square(z_new - mean) - square(z - mean_back)) / twice_variance
            u = generator.uniform(dtype=x.dtype, device=x.device)
            finite = all_finite(log_l_new, gradient_new)
            # a chain that starts where the likelihood is zero or undefined takes the first finite proposal
            bad = ~torch.isfinite(log_l)
            accept = finite & ((u.log() < log_ratio) | bad)
            keep = as_column(accept, x)
            z = torch.where(keep, z_new, z)
            gradient = torch.where(keep, gradient_new, gradient)
            mean = torch.where(keep, mean_back, mean)
            log_l = torch.where(accept, log_l_new, log_l)
            distance = torch.where(accept, distance_new, distance)
            if i < adapt:  # Robbins-Monro on the log of the step size
                probability = torch.where(finite, log_ratio.clamp(max=0).exp().nan_to_num(1.0), 0.0)
                probability = torch.where(bad, 1.0, probability)  # such a start is left by large steps
                log_s = (log_s + 2 * (probability - self.target) / (1 + i) ** 0.5).clamp(-20.0, 3.0).to(log_s)
            else:
                accepted += accept.to(accepted)
                non_finite += (~finite).to(non_finite)
        info = ProximalInfo(adapt + self.steps + 1, accepted / self.steps, None, non_finite, jump(z, state.z, eta))
        return MALAState(state.forward_model, state.y, z, log_s, eta), z, info

    def select(self, state: MALAState, index: Tensor) -> MALAState:
        """See :class:`ProximalSampler`; a chain takes its step size along."""
        return state._replace(z=state.z[index], log_s=state.log_s[index])

    def retarget(self, state: MALAState, forward_model: ForwardModel) -> MALAState:
        """See :class:`MarkovKernel`; the step sizes are kept and adapted anew."""
        return state._replace(forward_model=forward_model, eta=float("nan"))

    def split_variance(self, state: MALAState) -> float:
        """See :class:`ProximalSampler`; always 0."""
        return 0.0
