r"""The targets that DPnP passes through as its coupling η falls, and how probable a state is under each of them.

Split Gibbs at coupling η leaves :math:`\pi_\eta(x, z) \propto p(x) L(z) N(z; x, \eta^2 I)` invariant. Between two couplings the prior
cancels, so that moving a population from one to the next, or swapping two replicas, needs no network call. Both see a target through
one function of η.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import LinearOperator

LogDensity = Callable[[float], Tensor]


class Targets(Protocol):
    """Log densities of given states under all targets, up to what does not depend on the state."""

    joint: bool

    def at(self, x: Tensor, z: Tensor) -> LogDensity:
        r"""The log density as a function of η.

        Args:
            x: images ``(B, C, H, W)``.
            z: their proximal draws, likewise.

        Returns:
            Maps η, in image units, to ``(B,)`` in float64. Differences between two η's are what counts.
        """
        ...


class JointTargets:
    r""":math:`\log N(z; x, \eta^2 I)` of the pair ``(x, z)``: for any forward model."""

    joint = True

    def at(self, x: Tensor, z: Tensor) -> LogDensity:
        """See :class:`Targets`."""
        square, d = (x - z).to(torch.float64).square().flatten(1).sum(1), x[0].numel()
        return lambda eta: -square / (2 * eta**2) - d * math.log(eta)


class SpectralTargets:
    r""":math:`\log N(y; A x, \sigma^2 I + c A A^T)` of ``x`` alone, where :math:`A^T A` can be diagonalised.

    It has less variance than the joint form, since z is integrated out. With :math:`g = A^T (y - A x)` the part that depends on x is

    .. math:: -\tfrac12\, g^T h(A^T A)\, g, \qquad h(s) = \frac{1}{s\,(\sigma^2 + c s)},\ h(0) = 0,
              \qquad c = \max(\eta^2 - e, 0)

    where e is the part of η² that the proximal sampler takes out of the likelihood by exact splitting. At infinite η it vanishes: the
    first target is the prior.

    Args:
        operator: A.
        sigma: standard deviation of the white noise.
        y: measurement ``(*y_shape)``.
        split_variance: e, in squared image units.
    """

    joint = False

    def __init__(self, operator: LinearOperator, sigma: float, y: Tensor, split_variance: float) -> None:
        self.operator, self.sigma, self.y, self.split_variance = operator, sigma, _double(y)[None], split_variance
        self.negligible = 1e-10 * operator.norm() ** 2

    def at(self, x: Tensor, z: Tensor) -> LogDensity:
        """See :class:`Targets`; ``z`` is not looked at."""
        x = x.to(torch.float64)
        g = self.operator.adjoint(self.y - self.operator(x))

        def log_density(eta: float) -> Tensor:
            if math.isinf(eta):
                return g.new_zeros(len(g))
            c = max(eta**2 - self.split_variance, 0.0)

            def h(s: Tensor) -> Tensor:
                s = s.to(torch.float64)
                return torch.where(s > self.negligible, 1 / (s * (self.sigma**2 + c * s)), 0.0)

            return -0.5 * (g * self.operator.gram_function(h, g)).flatten(1).sum(1)

        return log_density


class LanczosTargets:
    r""":math:`\log N(y; A x, R + c A A^T)` of ``x`` alone, for any linear Gaussian model, matrix-free.

    With :math:`M = A^T R^{-1} A` and :math:`g = A^T R^{-1}(y - A x)` the part that depends on x is

    .. math:: -\tfrac12 \left( |y - A x|^2_{R^{-1}} - c\, g^T (I + c M)^{-1} g - m \right) .

    Here m is the limit at infinite c, the misfit of y to the range of A, which no x changes: at infinite η the first target is the prior.
    Some Lanczos steps on M, started at g, give :math:`g^T f(M) g` for all c at once, as a Gauss quadrature (Golub & Meurant 2010,
    section 7). c is as in :class:`SpectralTargets`.

    Args:
        operator: A.
        noise: with covariance R.
        y: measurement ``(*y_shape)``.
        split_variance: e, in squared image units.
        steps: the most Lanczos steps.
    """

    joint = False

    def __init__(
        self, operator: LinearOperator, noise: GaussianNoise, y: Tensor, split_variance: float, steps: int = 100
    ) -> None:
        self.operator, self.noise, self.y, self.split_variance, self.steps = (
            operator,
            noise,
            _double(y)[None],
            split_variance,
            steps,
        )
        self.misfit: float | None = None  # of y to the range of A, found with the first images

    def at(self, x: Tensor, z: Tensor) -> LogDensity:
        """See :class:`Targets`; ``z`` is not looked at."""
        if self.misfit is None:
            self.misfit = float(self._squares(torch.zeros_like(x[:1], dtype=torch.float64))(math.inf))
        squares, misfit = self._squares(x.to(torch.float64)), self.misfit
        return lambda eta: -0.5 * (squares(eta) - misfit)

    def _squares(self, x: Tensor) -> LogDensity:
        """The squared residual under ``R + c A A^T`` of ``x`` ``(B, C, H, W)``, as a function of η."""
        r = self.y - self.operator(x)
        weighted = self.noise.precision_mul(r)
        square = (r.conj() * weighted).real.flatten(1).sum(1)
        g = self.operator.adjoint(weighted)
        matvec = lambda v: self.operator.adjoint(self.noise.precision_mul(self.operator(v)))  # noqa: E731
        rank = min(x[0].numel(), self.y.numel() * (2 if self.y.is_complex() else 1))  # the largest that A can have
        nodes, weights = lanczos_quadrature(matvec, g, min(self.steps, rank))
        seen = nodes > 1e-10 * nodes.amax(1, keepdim=True)

        def squares(eta: float) -> Tensor:
            if math.isinf(eta):
                f = torch.where(seen, 1 / nodes, 0.0)
            else:
                c = max(eta**2 - self.split_variance, 0.0)
                f = c / (1 + c * nodes)
            rest: Tensor = square - (weights * f).sum(1)
            return rest

        return squares


def lanczos_quadrature(matvec: Callable[[Tensor], Tensor], g: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    r"""Nodes and weights with :math:`g^T f(M) g \approx \sum_i \omega_i f(\lambda_i)` (Golub & Meurant 2010, section 7).

    Args:
        matvec: ``v ↦ M v``, batched, M symmetric positive semi-definite.
        g: ``(B, …)``.
        steps: Lanczos steps; as many as M has different eigenvalues make it exact.

    Returns:
        λ and ω, ``(B, steps)`` each.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1)

    def column(a: Tensor) -> Tensor:
        return a.reshape(-1, *[1] * (g.ndim - 1))

    size = dot(g, g).sqrt()
    v, v_previous = g / column(size.clamp(min=torch.finfo(g.dtype).tiny)), torch.zeros_like(g)
    beta, tridiagonal = torch.zeros_like(size), g.new_zeros(len(g), steps, steps)
    scale = torch.zeros_like(size)
    for k in range(steps):
        u = matvec(v)
        alpha = dot(u, v)
        tridiagonal[:, k, k] = alpha
        scale = torch.maximum(scale, alpha.abs())
        u = u - column(alpha) * v - column(beta) * v_previous
        beta = dot(u, u).sqrt()
        # where the Krylov space is exhausted, what is left is rounding, and the rest of the matrix stays apart
        beta = torch.where(beta > 1e-10 * scale, beta, 0.0)
        if k + 1 < steps:
            tridiagonal[:, k, k + 1] = tridiagonal[:, k + 1, k] = beta
        v, v_previous = torch.where(column(beta) > 0, u / column(beta.clamp(min=torch.finfo(g.dtype).tiny)), 0.0), v
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes.clamp(min=0), (column(size).flatten()[:, None] * vectors[:, 0]) ** 2


def choose_targets(forward_model: ForwardModel, y: Tensor, split_variance: float) -> tuple[Targets, str]:
    """The form with the least variance that the forward model allows, and why.

    Args:
        forward_model: operator and noise.
        y: measurement ``(*y_shape)``.
        split_variance: part of η² that the proximal sampler takes out of the likelihood.

    Returns:
        The targets and one sentence for the log.
    """
    operator, noise = forward_model.operator, forward_model.noise
    if not (isinstance(operator, LinearOperator) and isinstance(noise, GaussianNoise)):
        return JointTargets(), "joint weights, which any forward model allows"
    if operator.has_gram_function and noise.is_scalar and noise.sigma is not None:
        targets = SpectralTargets(operator, float(noise.sigma), y, split_variance)
        return targets, "marginal weights, because the model is linear and Gaussian and its spectrum is known"
    return LanczosTargets(operator, noise, y, split_variance), (
        "marginal weights by Lanczos quadrature, because the model is linear and Gaussian"
    )


def _double(y: Tensor) -> Tensor:
    return y.to(torch.promote_types(y.dtype, torch.float64))
