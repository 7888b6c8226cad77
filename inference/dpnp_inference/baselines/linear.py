r"""Linear Gaussian models :math:`y = A x + N(0, R)` as the baselines for them need it: products with functions of :math:`G = A^T R^{-1} A`.

Where the operator knows its spectrum and the noise is white, the products are exact and cheap. An image of moderate size has the matrix of
its whitened operator written out and decomposed, once. Larger ones are solved by conjugate gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dpnp_inference.proximal import ClosedForm
from dpnp_inference.proximal.perturb_and_solve import BASIS_BATCH, conjugate_gradients
from dpnp_shared.forward_model import ForwardModel, real_entries
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import LinearOperator, MatrixOperator

MOST_DIAGONALISED = 4096  # entries of an image
TOLERANCE, MOST_ITERATIONS = 1e-5, 500  # of conjugate gradients


class LinearGaussian:
    r"""A linear Gaussian model with what of :math:`G = A^T R^{-1} A` can be had.

    Where there is a spectrum, all is computed in float64: corrections at large noise levels amplify rounding errors.

    Args:
        forward_model: operator and noise; an affine operator is taken as its linear part.
        blank: an image ``(1, C, H, W)`` of zeros, of the dtype and on the device that sampling uses.
        method: who needs it.
        spectrum: whether it needs more of the spectrum than linear solves.

    Attributes:
        spectral: whether :math:`A^T A` is diagonalised, and :math:`R = \sigma^2 I`.
        operator: A, whitened where the matrix was written out.
        sigma: noise standard deviation where it is spectral.

    Raises:
        TypeError: the model is not linear and Gaussian.
        ValueError: the spectrum is needed and is not known for an image of this size.
    """

    def __init__(self, forward_model: ForwardModel, blank: Tensor, method: str, *, spectrum: bool = False) -> None:
        model = forward_model.homogeneous
        operator, noise = model.operator, model.noise
        if not (isinstance(operator, LinearOperator) and isinstance(noise, GaussianNoise)):
            raise TypeError(
                f"{method} needs a linear operator and Gaussian noise, got {type(operator).__name__} and {type(noise).__name__}"
            )
        self.forward_model, self.noise = forward_model, noise
        self.operator: LinearOperator = operator
        self.sigma, self._blank = 1.0, blank
        self.white = False
        self.spectral = True
        if ClosedForm.supports(model) and noise.sigma is not None and noise.is_scalar:
            self.sigma = float(noise.sigma)
        elif blank.numel() <= MOST_DIAGONALISED:
            self.operator, self.white = self._written_out(), True
        elif spectrum:
            raise ValueError(
                f"{method} needs the singular values of {type(operator).__name__}, which are not known for noise that is not white or for "
                f"an operator without gram_function; images of at most {MOST_DIAGONALISED} entries have them computed, this one has "
                f"{blank.numel()}"
            )
        else:
            self.spectral = False
        self.dtype = torch.float64 if self.spectral and blank.device.type != "mps" else blank.dtype

    def _written_out(self) -> MatrixOperator:
        """The matrix of :math:`R^{-1/2} A`, decomposed."""
        d, shape = self._blank.numel(), tuple(self._blank.shape[1:])
        rows = []
        with torch.no_grad():
            for first in range(0, d, BASIS_BATCH):
                n = min(BASIS_BATCH, d - first)
                basis = self._blank.new_zeros(n, d)
                basis[:, first : first + n].fill_diagonal_(1.0)
                rows.append(real_entries(self.noise.whiten(self.operator(basis.reshape(n, *shape)))))
        return MatrixOperator(torch.cat(rows).T, (shape[0], shape[1], shape[2])).to(self._blank.device)

    def measurement(self, y: Tensor) -> Tensor:
        """The measurement of :attr:`operator`, ``(1, *shape)``, of ``y`` ``(*y_shape)``."""
        y = self.forward_model.homogeneous_measurement(y, self._blank)[None]
        return real_entries(self.noise.whiten(y)) if self.white else y

    def back(self, x: Tensor, y: Tensor) -> Tensor:
        r""":math:`A^T R^{-1} (y - A x)`.

        Args:
            x: ``(B, C, H, W)``.
            y: as :meth:`measurement` gives it.

        Returns:
            ``(B, C, H, W)``; two calls of the forward map.
        """
        residual = self._double(y) - self.operator(self._double(x))
        if self.spectral:
            return self.operator.adjoint(residual) / self.sigma**2
        return self.operator.adjoint(self.noise.precision_mul(residual))

    def correction(self, x: Tensor, y: Tensor, c: float) -> tuple[Tensor, int]:
        r""":math:`c\,(I + c G)^{-1} A^T R^{-1} (y - A x) = c A^T (R + c A A^T)^{-1} (y - A x)`.

        It moves x to the mean of its posterior if x is the mean of a prior of covariance c I.

        Args:
            x: ``(B, C, H, W)``.
            y: as :meth:`measurement` gives it.
            c: not negative, in squared image units.

        Returns:
            The correction, shaped like ``x``, and the calls of the forward map.
        """
        b = self.back(x, y)
        if self.spectral:
            # the residual has no part in A's null space; 0 there keeps its rounding errors from being amplified
            return self.function(lambda s: torch.where(s > 0, c / (1 + c * s / self.sigma**2), 0.0), b).to(x), 2
        solution, residual, iterations = conjugate_gradients(
            lambda v: v + c * self.operator.adjoint(self.noise.precision_mul(self.operator(v))),
            b,
            tolerance=TOLERANCE,
            most_iterations=MOST_ITERATIONS,
        )
        worst = float(residual.max())
        if not worst <= TOLERANCE:
            warnings.warn(
                f"conjugate gradients stopped at a relative residual of {worst:.1e} (tolerance {TOLERANCE:g}) after "
                f"{iterations} iterations",
                RuntimeWarning,
                stacklevel=2,
            )
        return c * solution, 2 + 2 * iterations

    def function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``f(A^T A) x`` in :attr:`dtype`, of ``x`` ``(B, C, H, W)``, where it is spectral."""
        return self.operator.gram_function(f, self._double(x))

    def _double(self, v: Tensor) -> Tensor:
        return v.to(self.dtype.to_complex() if v.is_complex() else self.dtype)
