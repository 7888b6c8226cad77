r"""Exact proximal draws for any linear Gaussian model, matrix-free (Papandreou & Yuille 2010; Orieux et al. 2012), with exact splitting.

With the whitened :math:`\tilde A = R^{-1/2} A`, :math:`G = \tilde A^T \tilde A`, and the part e of :math:`\eta^2 = e + c` taken out of the
likelihood (see :mod:`~dpnp_inference.proximal.closed_form`), the draw perturbs the centre and the measurement,

.. math:: \hat x = x + \eta w, \qquad \varepsilon' = (I - e \tilde A \tilde A^T)^{1/2}\, w' \sim N(0, R^{-1/2} R' R^{-T/2}),

and moves the one towards the other (Matheron's rule; :math:`(R + c A A^T)^{-1}` by the push-through identity):

.. math:: z = \hat x + \eta^2 (I + c G)^{-1} \big[ \tilde A^T R^{-1/2} (y - A \hat x) - (I - e G)^{1/2} \tilde A^T w' \big] .

Then z has mean :math:`x + \eta^2 A^T (R + c A A^T)^{-1} (y - A x)` and covariance :math:`\eta^2 I - \eta^4 A^T (R + c A A^T)^{-1} A`.
The solve is done by conjugate gradients, and there is none where c = 0. At the first couplings c is far above the noise, so that hundreds
of iterations would be needed; for images of moderate size G is diagonalised once, and its inverse as preconditioner leaves one or two,
with the residual as the check. The square root is a Chebyshev polynomial in G. It converges
geometrically, since e is held at or under :math:`(0.9/\|\tilde A\|)^2`. Without splitting, e = 0, this is the usual perturb and solve.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpnp_inference.proximal.base import ProximalInfo
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import LinearOperator

MARGIN = 0.9  # of σ/‖A‖; the rest is for the square root to converge and for the norm to be an estimate
POWER_ITERATIONS = 64
ROOT_ERROR = 1e-6
BASIS_BATCH = 64  # images that a map is applied to at once to find its matrix


class PerturbAndSolveState(NamedTuple):
    """The model.

    Attributes:
        operator: A.
        noise: with covariance R.
        y: measurement ``(*y_shape)``.
        split_variance: largest e, in squared image units.
        spectrum: eigenvalues ``(C·H·W,)`` and eigenvectors (columns) of G; None for a large image.
    """

    operator: LinearOperator
    noise: GaussianNoise
    y: Tensor
    split_variance: float = 0.0
    spectrum: tuple[Tensor, Tensor] | None = None

    def whitened(self, v: Tensor) -> Tensor:
        r""":math:`\tilde A v`, ``(B, *y_shape)``, of ``v`` ``(B, C, H, W)``."""
        return self.noise.whiten(self.operator(v))

    def whitened_adjoint(self, u: Tensor) -> Tensor:
        r""":math:`\tilde A^T u = A^T R^{-T/2} u`, ``(B, C, H, W)``, of ``u`` ``(B, *y_shape)``."""
        return self.operator.adjoint(self.noise.precision_mul(self.noise.sqrt_mul(u)))

    def gram(self, v: Tensor) -> Tensor:
        """``G v``, ``(B, C, H, W)``."""
        return self.operator.adjoint(self.noise.precision_mul(self.operator(v)))


@dataclass(frozen=True)
class PerturbAndSolve:
    """Perturb the data and the centre, then solve by conjugate gradients, all chains at once.

    Attributes:
        tolerance: relative residual at which a chain's solve stops.
        most_iterations: bound on the iterations; a draw that ends above the tolerance is reported by a warning.
        exact_splitting: take the splitting's own noise out of the likelihood as far as it goes, all of it (and then without a
            solve) for ``η ≤ 0.9 σ/‖A‖``, that is ``0.9/‖R^{-1/2} A‖``.
        most_diagonalised: images of at most so many entries have G diagonalised, once a run, in a time that grows with their cube.
    """

    tolerance: float = 1e-5
    most_iterations: int = 500
    exact_splitting: bool = True
    most_diagonalised: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1 or self.most_iterations < 1:
            raise ValueError(
                f"tolerance = {self.tolerance} must be in (0, 1) and most_iterations = {self.most_iterations} positive"
            )
        if self.most_diagonalised < 0:
            raise ValueError(f"most_diagonalised = {self.most_diagonalised}; allowed is a number of at least 0")

    @staticmethod
    def supports(forward_model: ForwardModel) -> bool:
        """Whether the model is linear with Gaussian noise."""
        return forward_model.linear_gaussian

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> PerturbAndSolveState:
        r"""See :class:`ProximalSampler`; exact splitting estimates :math:`\|R^{-1/2} A\|` by power iteration."""
        operator, noise = forward_model.operator, forward_model.noise
        if not (isinstance(operator, LinearOperator) and isinstance(noise, GaussianNoise)):
            raise TypeError(
                f"PerturbAndSolve needs a LinearOperator with GaussianNoise, got {type(operator).__name__} "
                f"with {type(noise).__name__}"
            )
        state = PerturbAndSolveState(operator, noise, y)
        if x[0].numel() <= self.most_diagonalised:
            state = state._replace(spectrum=diagonalised(state.gram, x[:1]))
        if not self.exact_splitting:
            return state
        square = largest_eigenvalue(state.gram, x[:1])
        return state._replace(split_variance=MARGIN**2 / square if square > 0 else math.inf)

    def step(
        self, state: PerturbAndSolveState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[PerturbAndSolveState, Tensor, ProximalInfo]:
        """See :class:`ProximalSampler`."""
        e = min(eta**2, state.split_variance)
        c = eta**2 - e
        x_hat = x + eta * generator.normal_like(x)
        r = state.noise.whiten(state.y - state.operator(x_hat))
        w = generator.normal_like(r)
        if e > 0:
            high = MARGIN**2 * e / state.split_variance  # of the eigenvalues of e G
            root = chebyshev_root(high)
            b = state.whitened_adjoint(r)
            b = b - matrix_polynomial(lambda v: e * state.gram(v), root, high, state.whitened_adjoint(w))
            calls = 3 + 2 * (len(root) - 1)
        else:
            b, calls = state.whitened_adjoint(r - w), 2
        if c == 0:
            return state, x_hat + eta**2 * b, ProximalInfo(forward_calls=calls)

        delta, residual, iterations = conjugate_gradients(
            lambda v: v + c * state.gram(v),
            b,
            self._preconditioner(state, c, r),
            tolerance=self.tolerance,
            most_iterations=self.most_iterations,
        )
        worst = float(residual.max())
        if not worst <= self.tolerance:
            warnings.warn(
                f"conjugate gradients stopped at a relative residual of {worst:.1e} (tolerance {self.tolerance:g}) after "
                f"{iterations} iterations at eta = {eta:g}; raise most_iterations",
                RuntimeWarning,
                stacklevel=2,
            )
        return state, x_hat + eta**2 * delta, ProximalInfo(forward_calls=2 * iterations + calls, residual=residual)

    def select(self, state: PerturbAndSolveState, index: Tensor) -> PerturbAndSolveState:
        """See :class:`ProximalSampler`; nothing of the state belongs to a chain."""
        return state

    def split_variance(self, state: PerturbAndSolveState) -> float:
        """See :class:`ProximalSampler`."""
        return state.split_variance

    @staticmethod
    def _preconditioner(state: PerturbAndSolveState, c: float, like: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The inverse where G is diagonalised; else that for white noise, close to any other's, where the operator has it."""
        if state.spectrum is not None:
            values, vectors = state.spectrum
            return lambda r: ((r.flatten(1) @ vectors) / (1 + c * values) @ vectors.T).reshape(r.shape)
        if not state.operator.has_gram_function:
            return None
        precision = float(state.noise.precision_mul(torch.ones_like(like[:1])).real.mean())
        if not precision > 0:
            return None
        return lambda r: state.operator.gram_function(lambda s: 1 / (1 + c * precision * s), r)


def diagonalised(matvec: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite map, by its matrix.

    Args:
        matvec: the map, batched.
        like: ``(1, C, H, W)``, an image of the kind it takes.

    Returns:
        Values ``(d,)`` of at least 0 and vectors ``(d, d)``, its columns, with d = C·H·W; computed in float64, given like the image.
    """
    d = like.numel()
    matrix = torch.empty(d, d, dtype=torch.float64)
    for first in range(0, d, BASIS_BATCH):
        n = min(BASIS_BATCH, d - first)
        basis = torch.zeros(n, d, dtype=like.dtype, device=like.device)
        basis[:, first : first + n].fill_diagonal_(1.0)
        matrix[first : first + n] = matvec(basis.reshape(n, *like.shape[1:])).flatten(1).to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.clamp(min=0).to(like), vectors.to(like)


def largest_eigenvalue(matvec: Callable[[Tensor], Tensor], like: Tensor) -> float:
    """Largest eigenvalue of a symmetric positive semi-definite map, by power iteration from a fixed start.

    Whatever the spectrum, the estimate is expected to be low by less than 20% after 64 iterations for up to a million
    unknowns (Kuczyński & Woźniakowski 1992, theorem 3.1), and mostly by far less.

    Args:
        matvec: the map, batched.
        like: ``(1, C, H, W)``, an image of the kind it takes.
    """
    v = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)
    eigenvalue = 0.0
    for _ in range(POWER_ITERATIONS):
        v = matvec(v / v.norm())
        previous, eigenvalue = eigenvalue, float(v.norm())
        if abs(eigenvalue - previous) <= 1e-6 * eigenvalue:  # also where the map is 0
            break
    return eigenvalue


def chebyshev_root(high: float) -> list[float]:
    """Chebyshev coefficients of ``√(1 - t)`` on ``[0, high]``, with an error of at most 1e-6.

    Args:
        high: in [0, 1).
    """
    degree = 64  # far more than is needed; the tail is cut off
    u = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))  # Chebyshev points
    coefficients = np.polynomial.chebyshev.chebfit(u, np.sqrt(1 - high * (u + 1) / 2), degree)
    tail = np.abs(coefficients[::-1]).cumsum()[::-1]  # of all coefficients from this one on
    return [float(a) for a in coefficients[: max(1, int((tail > ROOT_ERROR).sum()))]]


def matrix_polynomial(matvec: Callable[[Tensor], Tensor], coefficients: list[float], high: float, v: Tensor) -> Tensor:
    """Apply ``Σ_k a_k T_k(2 M/high - I)`` to ``v`` (Clenshaw's recurrence).

    Args:
        matvec: ``v ↦ M v``, batched; M symmetric with eigenvalues in ``[0, high]``.
        coefficients: ``a_k`` of the Chebyshev polynomials on that interval.
        high: end of the interval.
        v: ``(B, …)``.
    """
    b_1, b_2 = coefficients[-1] * v, torch.zeros_like(v)
    if len(coefficients) == 1:
        return b_1
    for a in coefficients[-2:0:-1]:
        b_1, b_2 = a * v + 2 * (2 / high * matvec(b_1) - b_1) - b_2, b_1
    return coefficients[0] * v + 2 / high * matvec(b_1) - b_1 - b_2


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
