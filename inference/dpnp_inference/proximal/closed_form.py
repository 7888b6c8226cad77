r"""Exact proximal draws for linear Gaussian models whose :math:`A^T A` can be diagonalised.

For :math:`y = A x + N(0, \sigma^2 I)` the proximal law is :math:`z \sim N(\mu, \Sigma)` with

.. math:: \Sigma = (A^T A / \sigma^2 + I/\eta^2)^{-1}, \qquad \mu = x + \Sigma\, A^T (y - A x) / \sigma^2 .

**Exact splitting.** Split Gibbs sampling at coupling η targets the prior times :math:`\int L(z) N(z; x, \eta^2 I)\,dz`, for a linear
Gaussian model the likelihood with noise covariance :math:`R + \eta^2 A A^T`. Where :math:`R' = \sigma^2 I - \eta^2 A A^T` is positive
semi-definite, a draw made with :math:`R'` in place of R cancels that, and DPnP is unbiased at finite η:

.. math:: \Sigma = \eta^2 (I - \eta^2 A^T A/\sigma^2), \qquad \mu = x + \eta^2 A^T (y - A x)/\sigma^2 .
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpnp_inference.proximal.base import ProximalInfo
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import LinearOperator, MatrixOperator


class ClosedFormState(NamedTuple):
    """The model with white noise, and its measurement.

    Attributes:
        operator: A.
        y: measurement ``(1, *y_shape)``.
        sigma: noise standard deviation.
        norm: largest singular value of A.
    """

    operator: LinearOperator
    y: Tensor
    sigma: float
    norm: float


@dataclass(frozen=True)
class ClosedForm:
    """One matrix function of :math:`A^T A` a draw; nothing to tune.

    Attributes:
        exact_splitting: take :math:`R'` in place of R wherever it is positive semi-definite, that is for ``η ≤ σ/‖A‖``.
    """

    exact_splitting: bool = True

    @staticmethod
    def supports(forward_model: ForwardModel) -> bool:
        """Whether the model has a closed form: linear, Gaussian, with a known spectrum and white noise (any noise for a matrix)."""
        operator, noise = forward_model.operator, forward_model.noise
        if not (
            isinstance(operator, LinearOperator) and isinstance(noise, GaussianNoise) and operator.has_gram_function
        ):
            return False
        return noise.is_scalar or isinstance(operator, MatrixOperator)

    def init(self, forward_model: ForwardModel, y: Tensor, x: Tensor) -> ClosedFormState:
        """See :class:`ProximalSampler`; a matrix with coloured noise is whitened first."""
        operator, noise = forward_model.operator, forward_model.noise
        if not self.supports(forward_model):
            raise TypeError(
                "ClosedForm needs a linear operator with a gram_function and Gaussian noise of one standard deviation "
                f"(or a MatrixOperator), got {type(operator).__name__} and {type(noise).__name__}"
            )
        assert isinstance(operator, LinearOperator)
        assert isinstance(noise, GaussianNoise)
        if noise.sigma is not None and noise.is_scalar:
            return ClosedFormState(operator, y[None], float(noise.sigma), operator.norm())
        assert isinstance(operator, MatrixOperator)
        columns = noise.whiten(operator.matrix.T.to(x))  # row i of A^T is column i of A, a batch of measurements
        _, c, h, w = x.shape
        white = MatrixOperator(columns.T, (c, h, w)).to(x)
        return ClosedFormState(white, noise.whiten(y[None]), 1.0, white.norm())

    def step(
        self, state: ClosedFormState, x: Tensor, eta: float, *, generator: ChainGenerators
    ) -> tuple[ClosedFormState, Tensor, ProximalInfo]:
        """See :class:`ProximalSampler`."""
        operator, sigma = state.operator, state.sigma
        gradient = operator.adjoint(state.y - operator(x)) / sigma**2
        if self.exact_splitting and splits_exactly(eta, sigma, state.norm):

            def variance(s: Tensor) -> Tensor:
                return (eta**2 * (1 - (eta / sigma) ** 2 * s)).clamp(min=0)

            mean = x + eta**2 * gradient
        else:

            def variance(s: Tensor) -> Tensor:
                return 1 / (s / sigma**2 + eta**-2)

            # the gradient has no part in A's null space; f(0) = 0 keeps its rounding errors from being amplified there
            mean = x + operator.gram_function(lambda s: torch.where(s > 0, variance(s), 0.0), gradient)
        z = mean + operator.gram_function(lambda s: variance(s).sqrt(), generator.normal_like(x))
        return state, z, ProximalInfo(forward_calls=2)


def splits_exactly(eta: float, sigma: float, norm: float) -> bool:
    """Whether ``σ² I - η² A Aᵀ`` is positive semi-definite, up to rounding."""
    return eta * norm <= sigma * (1 + 1e-6)
