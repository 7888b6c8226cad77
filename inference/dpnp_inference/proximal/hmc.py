r"""Hamiltonian Monte Carlo draws for stiff differentiable likelihoods (Duane et al. 1987; Neal 2011, arXiv 1206.1901).

With a velocity :math:`v \sim N(0, \eta^2 I)` and :math:`q = z - x`, the Hamiltonian
:math:`H = -\log L(z) + (|q|^2 + |v|^2)/(2\eta^2)` is split into the Gaussian, whose flow is a rotation of (q, v) and is done exactly, and
the likelihood, whose flow is a kick (Shahbaba et al. 2014, arXiv 1106.5941; Pakman & Paninski 2014). A leapfrog step of angle s is

.. math:: v \leftarrow v + \tfrac{s}{2} \eta^2 \nabla\log L, \qquad
          (q, v) \leftarrow (q \cos s + v \sin s,\; v \cos s - q \sin s), \qquad v \leftarrow v + \tfrac{s}{2} \eta^2 \nabla\log L

and the end of a trajectory is accepted with probability :math:`\min(1, e^{-\Delta H})`, so that the law is exact at every step size.
Without likelihood a trajectory of a quarter turn is an independent draw; the likelihood alone limits the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpnp_inference.proximal.base import ProximalInfo
from dpnp_inference.proximal.likelihood import all_finite, as_column, jump, square, value_and_gradient
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel


class HMCState(NamedTuple):
    """Where the chains are, and their step sizes.

    Attributes:
        forward_model: gives the likelihood.
        y: measurement ``(*y_shape)``.
        z: last draw ``(B, C, H, W)``.
        log_s: log of the angle of a leapfrog step, in radians, of each chain ``(B,)``.
        eta: the η that the step sizes were adapted at; NaN before the first draw.
    """

    forward_model: ForwardModel
    y: Tensor
    z: Tensor
    log_s: Tensor
    eta: float


@dataclass(frozen=True)
class HMC:
    """Hamiltonian trajectories with the Metropolis step; each chain adapts its own step size when η changes, then freezes it.

    The angle of each trajectory's steps is the adapted one times a uniform number in [0.8, 1.2], so that no direction stays in
    resonance. The Gaussian turns by a quarter at most (before that factor).

    Attributes:
        steps: trajectories a draw, after the adaptation.
        leapfrogs: steps of a trajectory, one gradient each.
        warmup: trajectories during which the step size is adapted, whenever η is new.
        target: acceptance aimed at (0.651 is optimal in high dimension, Beskos et al. 2013).
        first_step: initial angle of a step, in radians.
    """

    steps: int = 3
    leapfrogs: int = 10
    warmup: int = 10
    target: float = 0.651
    first_step: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1 or self.leapfrogs < 1 or self.warmup < 0:
            raise ValueError(
                f"steps = {self.steps} and leapfrogs = {self.leapfrogs} must be positive and warmup = {self.warmup} at least 0"
            )
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

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> HMCState:
        """See :class:`ProximalSampler`."""
        if not self.supports(forward_model):
            raise TypeError(
                f"HMC needs a differentiable likelihood; of {type(forward_model.operator).__name__} and "
                f"{type(forward_model.noise).__name__} one says it is not"
            )
        log_s = torch.full((x.shape[0],), self.first_step, dtype=x.dtype, device=x.device).log()
        return HMCState(forward_model, y, x, log_s, float("nan"))

    def step(
        self, state: HMCState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[HMCState, Tensor, ProximalInfo]:
        """See :class:`ProximalSampler`; a proposal is a trajectory, and counts as not finite where any point of it is not."""
        z, log_s = state.z, state.log_s
        adapt = self.warmup if state.eta != eta else 0
        log_l, gradient = value_and_gradient(state.forward_model, z, state.y)
        start_is_bad = ~all_finite(log_l, gradient)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)  # of a start that no proposal led to
        accepted, non_finite = torch.zeros_like(log_s), torch.zeros_like(log_s)
        for i in range(adapt + self.steps):
            v = eta * generator.normal_like(x)
            energy = (square(z - x) + square(v)) / (2 * eta**2) - log_l
            jitter = 0.8 + 0.4 * generator.uniform(dtype=x.dtype, device=x.device)
            s = as_column(jitter * log_s.exp(), x)
            q, gradient_new, finite = z - x, gradient, torch.ones_like(log_s, dtype=torch.bool)
            for _ in range(self.leapfrogs):
                v = v + s / 2 * eta**2 * gradient_new
                q, v = q * s.cos() + v * s.sin(), v * s.cos() - q * s.sin()
                log_l_new, gradient_new = value_and_gradient(state.forward_model, x + q, state.y)
                finite = (finite | start_is_bad) & all_finite(log_l_new, gradient_new)
                gradient_new = gradient_new.nan_to_num(0.0, 0.0, 0.0)  # such a trajectory will be refused
                v = v + s / 2 * eta**2 * gradient_new
            log_ratio = energy - ((square(q) + square(v)) / (2 * eta**2) - log_l_new)
            u = generator.uniform(dtype=x.dtype, device=x.device)
            # a chain that starts where the likelihood is zero or undefined takes the first finite proposal
            accept = finite & ((u.log() < log_ratio) | start_is_bad)
            keep = as_column(accept, x)
            z = torch.where(keep, x + q, z)
            gradient = torch.where(keep, gradient_new, gradient)
            log_l = torch.where(accept, log_l_new, log_l)
            if i < adapt:  # Robbins-Monro on the log of the step size
                probability = torch.where(finite, log_ratio.clamp(max=0).exp().nan_to_num(1.0), 0.0)
                probability = torch.where(start_is_bad, 1.0, probability)  # such a start is left by large steps
                log_s = log_s + 2 * (probability - self.target).to(log_s) / (1 + i) ** 0.5
                log_s = log_s.clamp(-20.0, math.log(math.pi / 2 / self.leapfrogs))
            else:
                accepted += accept.to(accepted)
                non_finite += (~finite).to(non_finite)
            start_is_bad = start_is_bad & ~accept
        calls = (adapt + self.steps) * self.leapfrogs + 1
        return (
            state._replace(z=z, log_s=log_s, eta=eta),
            z,
            ProximalInfo(calls, accepted / self.steps, None, non_finite, jump(z, state.z, eta)),
        )

    def select(self, state: HMCState, index: Tensor) -> HMCState:
        """See :class:`ProximalSampler`; a chain takes its step size along."""
        return state._replace(z=state.z[index], log_s=state.log_s[index])

    def retarget(self, state: HMCState, forward_model: ForwardModel) -> HMCState:
        """See :class:`MarkovKernel`; the step sizes are kept and adapted anew."""
        return state._replace(forward_model=forward_model, eta=float("nan"))

    def split_variance(self, state: HMCState) -> float:
        """See :class:`ProximalSampler`; always 0."""
        return 0.0
