r"""Exact proximal draws for any linear Gaussian model, matrix-free (Papandreou & Yuille 2010; Orieux et al. 2012).

With :math:`\hat y = y + N(0, R)` and :math:`\hat x = x + \eta w`, the minimiser of
:math:`|\hat y - A z|^2_{R^{-1}} + |\hat x - z|^2/\eta^2` is a draw from the proximal law. It is found by conjugate gradients on

.. math:: (A^T R^{-1} A + I/\eta^2)\, (z - \hat x) = A^T R^{-1} (\hat y - A \hat x) .
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpnp_inference.proximal.base import ProximalInfo
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import LinearOperator


class PerturbAndSolveState(NamedTuple):
    """The model.

    Attributes:
        operator: A.
        noise: with covariance R.
        y: measurement ``(*y_shape)``.
    """

    operator: LinearOperator
    noise: GaussianNoise
    y: Tensor


@dataclass(frozen=True)
class PerturbAndSolve:
    """Perturb the data and the centre, then solve by conjugate gradients, all chains at once.

    Attributes:
        tolerance: relative residual at which a chain's solve stops.
        most_iterations: bound on the iterations; a draw that ends above the tolerance is reported by a warning.
    """

    tolerance: float = 1e-5
    most_iterations: int = 500
    exact_splitting: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or self.most_iterations < 1:
            raise ValueError(
                f"tolerance = {self.tolerance} must be in (0, 1) and most_iterations = {self.most_iterations} positive"
            )
        if self.exact_splitting:
            raise ValueError("exact_splitting = True needs a closed form; PerturbAndSolve draws with R itself")

    @staticmethod
    def supports(forward_model: ForwardModel) -> bool:
        """Whether the model is linear with Gaussian noise."""
        return forward_model.linear_gaussian

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> PerturbAndSolveState:
        """See :class:`ProximalSampler`."""
        operator, noise = forward_model.operator, forward_model.noise
        if not (isinstance(operator, LinearOperator) and isinstance(noise, GaussianNoise)):
            raise TypeError(
                f"PerturbAndSolve needs a LinearOperator with GaussianNoise, got {type(operator).__name__} "
                f"with {type(noise).__name__}"
            )
        return PerturbAndSolveState(operator, noise, y)

    def step(
        self, state: PerturbAndSolveState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[PerturbAndSolveState, Tensor, ProximalInfo]:
        """See :class:`ProximalSampler`."""
        operator, noise, y = state
        x_hat = x + eta * generator.normal_like(x)
        clean = operator(x_hat)
        y_hat = y + noise.sqrt_mul(generator.normal_like(clean))
        b = operator.adjoint(noise.precision_mul(y_hat - clean))

        def matvec(v: Tensor) -> Tensor:
            return operator.adjoint(noise.precision_mul(operator(v))) + v / eta**2

        precondition = None
        if operator.has_gram_function:  # exact for white noise, a good preconditioner for any other
            precision = float(noise.precision_mul(torch.ones_like(clean[:1])).mean())
            if precision > 0:
                precondition = lambda r: operator.gram_function(lambda s: 1 / (precision * s + eta**-2), r)  # noqa: E731
        delta, residual, iterations = conjugate_gradients(
            matvec, b, precondition, tolerance=self.tolerance, most_iterations=self.most_iterations
        )
        worst = float(residual.max())
        if not worst <= self.tolerance:
            warnings.warn(
                f"conjugate gradients stopped at a relative residual of {worst:.1e} (tolerance {self.tolerance:g}) after "
                f"{iterations} iterations at eta = {eta:g}; raise most_iterations",
                RuntimeWarning,
                stacklevel=2,
            )
        return state, x_hat + delta, ProximalInfo(forward_calls=2 * iterations + 2, residual=residual)


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor] | None = None,
    *,
    tolerance: float,
    most_iterations: int,
) -> tuple[Tensor, Tensor, int]:
    """Solve ``M v = b`` for each chain, M symmetric positive definite (Hestenes & Stiefel 1952).

    A chain that has reached the tolerance is left as it is, so that its result does not depend on the others.

    Args:
        matvec: ``v ↦ M v``, batched.
        b: right-hand sides ``(B, …)``.
        precondition: ``r ↦ P r`` with P symmetric positive definite and close to the inverse of M.
        tolerance: relative residual ``|b - M v| / |b|`` at which a chain stops.
        most_iterations: bound on the iterations.

    Returns:
        Solutions shaped like ``b``, relative residuals ``(B,)`` by the recursion, and the number of iterations.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (b.ndim - 1))

    v, r = torch.zeros_like(b), b
    s = precondition(r) if precondition else r
    p, rs = s, dot(r, s)
    scale = dot(b, b).sqrt().clamp(min=torch.finfo(b.dtype).tiny)
    residual = dot(r, r).sqrt() / scale
    iterations = 0
    while iterations < most_iterations and bool((active := residual > tolerance).any()):
        mp = matvec(p)
        alpha = torch.where(active, rs / dot(p, mp), 0.0)
        v, r = v + alpha * p, r - alpha * mp
        s = precondition(r) if precondition else r
        rs_next = dot(r, s)
        p = torch.where(active, s + (rs_next / rs) * p, p)
        rs = torch.where(active, rs_next, rs)
        residual = torch.where(active, dot(r, r).sqrt() / scale, residual)
        iterations += 1
    return v, residual.flatten(), iterations
