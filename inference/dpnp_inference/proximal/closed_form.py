r"""Exact proximal draws for linear Gaussian models whose :math:`A^T A` can be diagonalised.

Split Gibbs sampling at coupling η, with the likelihood of noise covariance :math:`R'` in its proximal step, targets the posterior for noise
covariance :math:`R' + \eta^2 A A^T`. **Exact splitting** therefore gives that step less noise than the measurement has. With
:math:`R = \sigma^2 I`, the part :math:`e = \min(\eta^2, \sigma^2/\|A\|^2)` of :math:`\eta^2` is taken out,

.. math:: R' = \sigma^2 I - e A A^T, \qquad R' + \eta^2 A A^T = \sigma^2 I + c A A^T, \quad c = \eta^2 - e,

so that DPnP is unbiased at finite :math:`\eta \le \sigma/\|A\|`, where c = 0. The proximal law is :math:`z \sim N(\mu, \Sigma)` with

.. math:: \mu = x + \frac{\eta^2}{\sigma^2 + c A^T A} A^T (y - A x), \qquad
          \Sigma = \eta^2\, \frac{\sigma^2 - e A^T A}{\sigma^2 + c A^T A} .

Without splitting, e = 0, this is the law for the likelihood itself.
"""

from __future__ import annotations

import math
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
    """Two matrix functions of :math:`A^T A` a draw; nothing to tune.

    Attributes:
        exact_splitting: take the splitting's own noise out of the likelihood as far as it goes, all of it for ``η ≤ σ/‖A‖``.
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
        e = min(eta**2, self.split_variance(state))
        c = eta**2 - e

        def gain(s: Tensor) -> Tensor:
            # the residual has no part in A's null space; f(0) = 0 keeps its rounding errors from being amplified there
            return torch.where(s > 0, eta**2 / (sigma**2 + c * s), 0.0)

        def std(s: Tensor) -> Tensor:
            return eta * ((sigma**2 - e * s).clamp(min=0) / (sigma**2 + c * s)).sqrt()

        mean = x + operator.gram_function(gain, operator.adjoint(state.y - operator(x)))
        z = mean + operator.gram_function(std, generator.normal_like(x))
        return state, z, ProximalInfo(forward_calls=2)

    def split_variance(self, state: ClosedFormState) -> float:
        """Largest part of η² that is taken out of the likelihood; see :class:`ProximalSampler`."""
        if not self.exact_splitting:
            return 0.0
        return (state.sigma / state.norm) ** 2 if state.norm > 0 else math.inf

    def select(self, state: ClosedFormState, index: Tensor) -> ClosedFormState:
        """See :class:`ProximalSampler`; nothing of the state belongs to a chain."""
        return state
