"""The log-likelihood as Metropolis kernels need it: of each chain, with its gradient, and never trusted to be finite."""

from __future__ import annotations

import torch
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel


def value_and_gradient(forward_model: ForwardModel, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihood of each chain ``(B,)`` and its gradient, shaped like ``z``."""
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        log_l = forward_model.log_likelihood(z, y)
        (gradient,) = torch.autograd.grad(log_l.sum(), z)
    return log_l.detach(), gradient


def all_finite(log_l: Tensor, gradient: Tensor) -> Tensor:
    """Whether value and gradient of a chain are finite, ``(B,)``."""
    return torch.isfinite(log_l) & torch.isfinite(gradient).flatten(1).all(1)


def square(v: Tensor) -> Tensor:
    """Squared norm of each chain's image, ``(B,)``."""
    return v.square().flatten(1).sum(1)


def as_column(v: Tensor, x: Tensor) -> Tensor:
    """One number a chain ``(B,)`` as ``(B, 1, …)``, to go with images ``x``."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


def jump(z: Tensor, z_before: Tensor, eta: float) -> Tensor:
    """How far each chain has moved, ``(B,)``; see :attr:`ProximalInfo.jump <dpnp_inference.proximal.ProximalInfo>`."""
    return square(z - z_before) / (2 * eta**2 * z[0].numel())
