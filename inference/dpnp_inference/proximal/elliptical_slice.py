r"""Gradient-free proximal draws for any likelihood (Murray, Adams & MacKay 2010, arXiv 1001.0175, figure 2).

The proximal law is a likelihood times the Gaussian :math:`N(x, \eta^2 I)`. With a fresh :math:`\nu \sim N(0, \eta^2 I)` the points

.. math:: z(\theta) = x + (z - x) \cos\theta + \nu \sin\theta

lie on an ellipse through z that leaves the Gaussian invariant. An angle is drawn from the slice
:math:`\log L(z(\theta)) > \log L(z) + \log u` by shrinking a bracket around 0, the present state. Nothing but values of the likelihood is
needed, and nothing is tuned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpnp_inference.proximal.base import ProximalInfo
from dpnp_inference.proximal.likelihood import as_column, jump
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel


class EllipticalSliceState(NamedTuple):
    """Where the chains are.

    Attributes:
        forward_model: gives the likelihood.
        y: measurement ``(*y_shape)``.
        z: last draw ``(B, C, H, W)``.
    """

    forward_model: ForwardModel
    y: Tensor
    z: Tensor


@dataclass(frozen=True)
class EllipticalSlice:
    """Slice sampling on ellipses, with a bracket for each chain.

    A non-finite log-likelihood counts as a likelihood of 0. A chain that starts there tries whole ellipses until it finds a
    point of positive likelihood.

    Attributes:
        steps: slices a draw. Each moves far where the likelihood is flat and little where it is sharp.
        most_proposals: bound on the points that are tried on one ellipse; a chain that reaches it stays where it is, which
            leaves the law invariant as well.
    """

    steps: int = 20
    most_proposals: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1 or self.most_proposals < 1:
            raise ValueError(f"steps = {self.steps} and most_proposals = {self.most_proposals} must be positive")

    @property
    def exact_splitting(self) -> bool:
        """False: it draws with the likelihood itself."""
        return False

    @staticmethod
    def supports(forward_model: ForwardModel) -> bool:
        """True: every forward model gives values of its likelihood."""
        return True

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> EllipticalSliceState:
        """See :class:`ProximalSampler`."""
        return EllipticalSliceState(forward_model, y, x)

    @torch.no_grad()
    def step(
        self, state: EllipticalSliceState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[EllipticalSliceState, Tensor, ProximalInfo]:
        """See :class:`ProximalSampler`; the acceptance is that of points on the ellipses."""
        model, y, z = state
        log_l, evaluations = _log_likelihood(model, z, y), len(x)
        accepted, proposals, non_finite = (torch.zeros(len(x), dtype=x.dtype, device=x.device) for _ in range(3))
        for _ in range(self.steps):
            nu = eta * generator.normal_like(x)
            # as many numbers as any chain could need, so that no stream depends on when the other chains are done
            u = _uniforms(generator, x, 1 + self.most_proposals)
            threshold = log_l + u[:, 0].log()  # -inf for a start of zero likelihood
            theta = 2 * math.pi * u[:, 1]
            low, high = theta - 2 * math.pi, theta
            z_next, log_l_next = z.clone(), log_l.clone()
            searching = torch.arange(len(x), device=x.device)  # chains without a point on their slice yet
            for k in range(1, 1 + self.most_proposals):
                angle = as_column(theta, x)
                centre, start = x[searching], z[searching]
                z_new = centre + (start - centre) * angle.cos() + nu[searching] * angle.sin()
                log_l_new = _log_likelihood(model, z_new, y)
                finite = log_l_new > -torch.inf
                accept = finite & (log_l_new > threshold[searching])
                evaluations += len(searching)
                proposals[searching] += 1
                non_finite[searching] += (~finite).to(x.dtype)
                accepted[searching] += accept.to(x.dtype)
                z_next[searching[accept]], log_l_next[searching[accept]] = z_new[accept], log_l_new[accept]
                rest = ~accept
                if k == self.most_proposals or not bool(rest.any()):
                    break
                # shrink towards the present state, unless that is no state at all
                shrink = threshold[searching] > -torch.inf
                low = torch.where(shrink & (theta < 0), theta, low)[rest]
                high = torch.where(shrink & (theta >= 0), theta, high)[rest]
                searching = searching[rest]
                theta = low + (high - low) * u[searching, k + 1]
            z, log_l = z_next, log_l_next
        moved = jump(z, state.z, eta)
        info = ProximalInfo(math.ceil(evaluations / len(x)), accepted / proposals, None, non_finite, moved)
        return state._replace(z=z), z, info

    def select(self, state: EllipticalSliceState, index: Tensor) -> EllipticalSliceState:
        """See :class:`ProximalSampler`."""
        return state._replace(z=state.z[index])

    def retarget(self, state: EllipticalSliceState, forward_model: ForwardModel) -> EllipticalSliceState:
        """See :class:`MarkovKernel`."""
        return state._replace(forward_model=forward_model)

    def split_variance(self, state: EllipticalSliceState) -> float:
        """See :class:`ProximalSampler`; always 0."""
        return 0.0


def _log_likelihood(forward_model: ForwardModel, z: Tensor, y: Tensor) -> Tensor:
    """``(B,)``; minus infinity where it is not finite."""
    log_l = forward_model.log_likelihood(z, y)
    return torch.where(torch.isfinite(log_l), log_l, -torch.inf)


def _uniforms(generator: ChainGenerators, x: Tensor, n: int) -> Tensor:
    """Uniform numbers of each chain, ``(B, n)``."""
    uniforms: Tensor = torch.special.ndtr(generator.normal_like(x.new_empty(len(x), n)))
    return uniforms
