"""Gaussian noise, independent or with a full covariance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpnp_shared.noise.base import Entries, Noise, drawing_device, entries_argument, match, spread, sum_entries, widen
from dpnp_shared.operators.base import array_argument


class GaussianNoise(Noise):
    r""":math:`y = \bar y + R^{1/2} w`, :math:`w \sim N(0, I)`.

    Complex measurements are taken as pairs of reals: ``sigma`` is then the standard deviation of the real
    and of the imaginary part, each.

    Args:
        sigma: standard deviation, in the units of ``y``: a number, or one an entry (a tensor, a list, or the
            path of a ``.npy`` file; it must broadcast to ``y_shape``).
        covariance: instead of ``sigma``, the full :math:`R` ``(m, m)`` of the flattened measurement,
            likewise.

    Attributes:
        sigma: standard deviation, 0-d or one an entry; None where a covariance was given.

    Raises:
        TypeError: none or both of the arguments are given.
        ValueError: an entry of ``sigma`` is not positive and finite, or ``covariance`` is not symmetric and
            positive definite.
    """

    sigma: Tensor | None
    cholesky: Tensor | None  # lower triangular (m, m), R = L L^T

    def __init__(
        self,
        sigma: Entries | None = None,
        covariance: list[list[float]] | str | Tensor | None = None,
    ) -> None:
        super().__init__()
        if (sigma is None) == (covariance is None):
            raise TypeError(f"give either sigma or covariance, got sigma = {sigma} and covariance = {covariance}")
        self.register_buffer("sigma", None if sigma is None else entries_argument(sigma, "sigma"))
        self.register_buffer("cholesky", None if covariance is None else _cholesky(covariance))

    @property
    def is_scalar(self) -> bool:
        r"""Whether :math:`R = \sigma^2 I`."""
        return self.sigma is not None and self.sigma.ndim == 0

    @property
    def resolution(self) -> float:
        """Square root of the smallest eigenvalue of :math:`R`."""
        if self.sigma is not None:
            return float(self.sigma.min())
        return float(torch.linalg.svdvals(self._factor()).min())

    def sqrt_mul(self, w: Tensor) -> Tensor:
        """:math:`R^{1/2} w`, ``(B, *y_shape)``; :math:`L w` for a full :math:`R = L L^T`."""
        if self.sigma is not None:
            return w * self._std(w)
        return (self._flat(w) @ self._factor().to(w.dtype).T).reshape(w.shape)

    def whiten(self, r: Tensor) -> Tensor:
        """:math:`R^{-1/2} r`, ``(B, *y_shape)``; :math:`L^{-1} r` for a full :math:`R`."""
        if self.sigma is not None:
            return r / self._std(r)
        L = self._factor().to(r.dtype)
        white: Tensor = torch.linalg.solve_triangular(L, self._flat(r).T, upper=False).T
        return white.reshape(r.shape)

    def precision_mul(self, r: Tensor) -> Tensor:
        """:math:`R^{-1} r`, ``(B, *y_shape)``."""
        if self.sigma is not None:
            return r / self._std(r) ** 2
        return torch.cholesky_solve(self._flat(r).T, self._factor().to(r.dtype)).T.reshape(r.shape)

    def covariance_matrix(self, y_shape: Sequence[int]) -> Tensor:
        """:math:`R` written out, ``(m, m)`` in float64, for measurements of shape ``y_shape``."""
        if self.sigma is None:
            L = self._factor().double()
            return L @ L.T
        zeros = torch.zeros(1, *y_shape, dtype=torch.float64, device=self.sigma.device)
        return torch.diag((zeros + self._std(zeros)).flatten() ** 2)

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``clean + R^{1/2} w``; see :meth:`Noise.sample`."""
        device = drawing_device(clean, generator)
        w = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=device).to(clean.device)
        if clean.is_complex():
            w = w * math.sqrt(2)  # PyTorch's complex normal has variance 1/2 in each part
        return clean + self.sqrt_mul(w)

    @property
    def independent(self) -> bool:
        """Whether there is no full covariance."""
        return self.sigma is not None and type(self).log_prob is GaussianNoise.log_prob

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`-\tfrac12 |y - \bar y|^2/\sigma^2 - \tfrac12 \log 2\pi\sigma^2`, the latter twice for complex entries.

        See :meth:`Noise.entry_log_prob`.

        Raises:
            RuntimeError: there is a covariance.
            TypeError: one of ``y`` and ``clean`` is complex and the other is not.
            ValueError: the shapes do not fit.
        """
        square = self._white_square(y, clean)
        log_sigma = self._std(clean).to(square).log()
        return -0.5 * square - (2 if clean.is_complex() else 1) * (log_sigma + 0.5 * math.log(2 * math.pi))

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`-\tfrac12 |R^{-1/2}(y - \bar y)|^2 - \tfrac12 \log\det(2\pi R)`.

        See :meth:`Noise.log_prob`.

        Raises:
            TypeError: one of ``y`` and ``clean`` is complex and the other is not.
            ValueError: the shapes do not fit.
        """
        if self.sigma is not None:
            return super().log_prob(y, clean)
        square = self._white_square(y, clean)
        half_log_det = float(self._factor().double().diagonal().log().sum())
        return -0.5 * sum_entries(square) - half_log_det - 0.5 * square[0].numel() * math.log(2 * math.pi)

    def _white_square(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`|R^{-1/2}(y - \bar y)|^2` of each entry, ``(B, *y_shape)``."""
        y = match(y, clean)
        if y.is_complex() != clean.is_complex():
            raise TypeError(f"y has dtype {y.dtype}, the noiseless measurement {clean.dtype}; one of them is complex")
        z = self.whiten(y.to(clean.dtype) - clean)
        return widen(z.real**2 + z.imag**2 if z.is_complex() else z**2)

    def _factor(self) -> Tensor:
        if self.cholesky is None:
            raise RuntimeError("this GaussianNoise has no covariance")
        return self.cholesky

    def _flat(self, r: Tensor) -> Tensor:
        """Flatten ``(B, *y_shape)`` to ``(B, m)``, where ``m`` is that of the covariance."""
        flat = r.reshape(r.shape[0], -1)
        if flat.shape[1] != self._factor().shape[0] or r.is_complex():
            raise ValueError(
                f"covariance is for {self._factor().shape[0]} real entries; got measurements of shape "
                f"{tuple(r.shape[1:])} and dtype {r.dtype}"
            )
        return flat

    def _std(self, r: Tensor) -> Tensor:
        """``sigma`` for ``r`` ``(B, *y_shape)``."""
        if self.sigma is None:
            raise RuntimeError("this GaussianNoise has a covariance instead of sigma")
        return spread(self.sigma, r, "sigma")


def _cholesky(covariance: list[list[float]] | str | Tensor) -> Tensor:
    R = array_argument(covariance, "covariance")
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not torch.allclose(R, R.T, rtol=1e-6, atol=0):
        raise ValueError(f"covariance has shape {tuple(R.shape)}; allowed is a symmetric matrix (m, m)")
    L: Tensor
    L, info = torch.linalg.cholesky_ex((R + R.T) / 2)
    if int(info):
        smallest = float(torch.linalg.eigvalsh(R).min())
        raise ValueError(f"covariance has an eigenvalue {smallest:.3g}; all must be positive")
    return L
