r"""Proximal draws for models that see every pixel by itself, whatever the noise (Murray, Adams & MacKay 2010, arXiv 1001.0175, figure 2).

Where the likelihood is a product of one factor a pixel (denoising, clipping, quantisation, photon counting), so is the proximal law, and
elliptical slice sampling goes on in each of its dimensions at once: pixel i, with a fresh :math:`\nu_i \sim N(0, \eta^2)`, moves to

.. math:: z_i(\theta_i) = x_i + (z_i - x_i) \cos\theta_i + \nu_i \sin\theta_i

at an angle of its own, drawn from its slice :math:`\log L_i(z_i(\theta_i)) > \log L_i(z_i) + \log u_i` by shrinking a bracket around 0.
In one dimension a few such steps forget where they began, however sharp the likelihood; for an image as a whole they would hardly move it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpnp_inference.proximal.base import ProximalInfo
from dpnp_inference.proximal.likelihood import jump
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel


class PixelwiseSliceState(NamedTuple):
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
class PixelwiseSlice:
    """Slice sampling on an ellipse for each pixel.

    A non-finite log-likelihood counts as a likelihood of 0. A pixel that starts there looks ever further around its centre until it finds
    a point of positive likelihood.

    Attributes:
        steps: slices a draw.
        most_proposals: bound on the points that are tried on one ellipse; a pixel that reaches it stays where it is, which leaves the
            law invariant as well.
    """

    steps: int = 5
    most_proposals: int = 100

    def __post_init__(self) -> None:
        if self.steps < 1 or self.most_proposals < 1:
            raise ValueError(f"steps = {self.steps} and most_proposals = {self.most_proposals} must be positive")

    @property
    def exact_splitting(self) -> bool:
        """False: it draws with the likelihood itself."""
        return False

    @staticmethod
    def supports(forward_model: ForwardModel) -> bool:
        """Whether the model is pixelwise."""
        return forward_model.pixelwise

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> PixelwiseSliceState:
        """See :class:`ProximalSampler`."""
        if not self.supports(forward_model):
            raise TypeError(
                "PixelwiseSlice needs a pixelwise operator and noise of independent entries, got "
                f"{type(forward_model.operator).__name__} and {type(forward_model.noise).__name__}"
            )
        return PixelwiseSliceState(forward_model, y, x)

    @torch.no_grad()
    def step(
        self, state: PixelwiseSliceState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[PixelwiseSliceState, Tensor, ProximalInfo]:
        """See :class:`ProximalSampler`; acceptance and non-finite proposals are those of all pixels."""
        model, y, z = state
        log_l, calls = _log_likelihood(model, z, y), 1
        accepted, proposals, non_finite = (torch.zeros(len(x), dtype=x.dtype, device=x.device) for _ in range(3))
        for _ in range(self.steps):
            nu, own = eta * generator.normal_like(x), generator.spawn()
            threshold = log_l + own.uniform_like(x).log()
            theta = 2 * math.pi * own.uniform_like(x)
            low, high = theta - 2 * math.pi, theta
            lost = log_l == -torch.inf
            start = torch.where(lost, x, z)
            searching = torch.ones_like(z, dtype=torch.bool)  # pixels without a point on their slice yet
            for _ in range(self.most_proposals):
                z_new = torch.where(searching, x + (start - x) * theta.cos() + nu * theta.sin(), z)
                log_l_new = _log_likelihood(model, z_new, y)
                finite = log_l_new > -torch.inf
                accept = searching & finite & (log_l_new > threshold)
                calls += 1
                proposals += _count(searching, proposals)
                non_finite += _count(searching & ~finite, proposals)
                accepted += _count(accept, proposals)
                z, log_l = torch.where(accept, z_new, z), torch.where(accept, log_l_new, log_l)
                searching = searching & ~accept
                if not bool(searching.any()):
                    break
                low = torch.where(~lost & (theta < 0), theta, low)
                high = torch.where(~lost & (theta >= 0), theta, high)
                nu = torch.where(lost, 1.25 * nu, nu)
                theta = low + (high - low) * own.uniform_like(x)
        info = ProximalInfo(calls, accepted / proposals, None, non_finite, jump(z, state.z, eta))
        return state._replace(z=z), z, info

    def select(self, state: PixelwiseSliceState, index: Tensor) -> PixelwiseSliceState:
        """See :class:`ProximalSampler`."""
        return state._replace(z=state.z[index])

    def retarget(self, state: PixelwiseSliceState, forward_model: ForwardModel) -> PixelwiseSliceState:
        """See :class:`MarkovKernel`."""
        return state._replace(forward_model=forward_model)

    def split_variance(self, state: PixelwiseSliceState) -> float:
        """See :class:`ProximalSampler`; always 0."""
        return 0.0


def _log_likelihood(forward_model: ForwardModel, z: Tensor, y: Tensor) -> Tensor:
    """Of each pixel ``(B, C, H, W)``; minus infinity where it is not finite."""
    log_l = forward_model.pixel_log_likelihood(z, y)
    return torch.where(torch.isfinite(log_l), log_l, -torch.inf)


def _count(pixels: Tensor, like: Tensor) -> Tensor:
    """How many of each chain's pixels, ``(B,)``."""
    return pixels.flatten(1).sum(1).to(like)
