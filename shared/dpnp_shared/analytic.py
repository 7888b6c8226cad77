r"""Priors with closed-form denoisers, scores and posteriors: the truth that samplers are measured against.

For :math:`y = Ax + N(0, R)` the posterior of a Gaussian prior :math:`N(m, C)` is Gaussian, with gain
:math:`G = C A^T S^{-1}`, :math:`S = A C A^T + R`:

.. math:: \mu = m + G(y - Am), \qquad \Sigma = C - G A C, \qquad p(y) = N(y; Am, S)

and that of a mixture is a mixture whose weights are :math:`\propto w_k N(y; A m_k, S)` (Bishop 2006, section
2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpnp_shared.denoiser import Denoiser, expand_sigma
from dpnp_shared.forward_model import ForwardModel, real_entries
from dpnp_shared.operators.base import array_argument, check_image_shape


class GaussianPrior(Denoiser):
    r""":math:`p = N(m, C)`, so that :math:`D(x; \sigma) = m + C(C + \sigma^2 I)^{-1}(x - m)`.

    Args:
        mean: a number, or an array that broadcasts to ``(C, H, W)``, in image units.
        covariance: a variance for all entries, one an entry ``(d,)``, or the full matrix ``(d, d)`` of the
            flattened image, ``d = C·H·W``; positive semi-definite.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: an argument has another shape, or ``covariance`` is not symmetric or has a negative
            eigenvalue.
    """

    mean: Tensor  # (d,), like all buffers in float64; they are cast to the dtype of x at use
    eigenvalues: Tensor  # (d,)
    eigenvectors: Tensor | None  # (d, d), one a column; None where they are the unit vectors

    def __init__(
        self,
        mean: float | list[float] | str | Tensor,
        covariance: float | list[float] | list[list[float]] | str | Tensor,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        d = math.prod(self.image_shape)
        m, C = array_argument(mean, "mean"), array_argument(covariance, "covariance")
        if tuple(C.shape) not in ((), (d,), (d, d)):
            raise ValueError(f"covariance has shape {tuple(C.shape)}; allowed are a number, ({d},) and ({d}, {d})")
        vectors = None
        if C.ndim == 2:
            if not torch.allclose(C, C.T, rtol=1e-6, atol=1e-8 * float(C.abs().max())):
                raise ValueError("covariance is not symmetric")
            values, vectors = torch.linalg.eigh((C + C.T) / 2)
        else:
            values = C.expand(d).clone()
        largest = float(values.max())
        if float(values.min()) < -1e-10 * abs(largest):
            raise ValueError(f"covariance has an eigenvalue {float(values.min()):.3g}; none may be negative")
        self.register_buffer("mean", _broadcast(m, self.image_shape, "mean"))
        self.register_buffer("eigenvalues", values.clamp_min(0))
        self.register_buffer("eigenvectors", vectors)
        self.sigma_min, self.sigma_max, self.spread = 0.0, math.inf, math.sqrt(max(largest, 0.0))

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Exact ``D(x; sigma)``; see :meth:`Denoiser.forward <dpnp_shared.denoiser.Denoiser.forward>`."""
        total, r = self._total_variance(x, sigma)
        # at sigma = 0, D = x, also along directions without any variance
        shrinkage = torch.where(total > 0, self.eigenvalues.to(x.dtype) / total, 1.0)
        return (self.mean.to(x.dtype) + self._in_eigenbasis(shrinkage, r)).reshape(x.shape)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Exact :math:`-(C + \sigma^2 I)^{-1}(x - m)`, without Tweedie's cancellation at small noise."""
        total, r = self._total_variance(x, sigma)
        return -self._in_eigenbasis(1 / total, r).reshape(x.shape)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        r""":math:`\log p_\sigma(x)`, ``(B,)``, of ``x`` ``(B, C, H, W)``."""
        total, r = self._total_variance(x, sigma)
        if self.eigenvectors is not None:
            r = r @ self.eigenvectors.to(r.dtype)
        return -0.5 * (r**2 / total + (2 * math.pi * total).log()).sum(1)

    def sample(self, n: int, *, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw from the prior.

        Args:
            n: number of images.
            generator: source of the random numbers; None takes PyTorch's global one.
            dtype: of the images, by default PyTorch's.

        Returns:
            ``(n, C, H, W)``.
        """
        x = self.mean + _root_mul(self._root(), _normal((n, self.mean.numel()), generator, self.mean))
        return x.reshape(n, *self.image_shape).to(dtype or torch.get_default_dtype())

    def posterior(self, forward_model: ForwardModel, y: Tensor, extra_noise: float = 0.0) -> LinearGaussianPosterior:
        """Exact posterior; see :class:`LinearGaussianPosterior` for arguments and errors."""
        log_weights = self.mean.new_zeros(1)
        return LinearGaussianPosterior(
            self.mean[None], log_weights, self._root(), self.image_shape, forward_model, y, extra_noise
        )

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """As a mixture of one: means ``(1, d)``, log weights ``(1,)``, and a square root ``(d, d)`` of the covariance."""
        root = self._root()
        return self.mean[None], self.mean.new_zeros(1), root if root.ndim == 2 else torch.diag(root)

    def _total_variance(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues of ``C + sigma^2 I``, ``(1 or B, d)``, and ``x - m`` ``(B, d)``."""
        self.check_sigma(sigma)
        _check_images(x, self.image_shape)
        return self.eigenvalues.to(x.dtype) + expand_sigma(sigma, x).flatten(1) ** 2, x.flatten(1) - self.mean.to(
            x.dtype
        )

    def _in_eigenbasis(self, multiplier: Tensor, r: Tensor) -> Tensor:
        if self.eigenvectors is None:
            return multiplier * r
        U = self.eigenvectors.to(r.dtype)
        return multiplier * (r @ U) @ U.T

    def _root(self) -> Tensor:
        std = self.eigenvalues.sqrt()
        return std if self.eigenvectors is None else self.eigenvectors * std


class GaussianMixturePrior(Denoiser):
    r""":math:`p = \sum_k w_k N(m_k, v I)`.

    With the responsibilities :math:`r_k \propto w_k \exp(-|x - m_k|^2 / 2(v + \sigma^2))`,
    :math:`D(x; \sigma) = (v x + \sigma^2 \sum_k r_k m_k)/(v + \sigma^2)`.

    Args:
        means: ``(K, d)`` or ``(K, C, H, W)``, in image units; or the path of a ``.npy`` file.
        weights: ``(K,)``, not negative, of sum 1; the path of a ``.npy`` file; or ``"equal"``.
        variance: :math:`v`, of every component.
        image_shape: ``(C, H, W)``.

    Raises:
        ValueError: an argument has another shape or value.
    """

    means: Tensor  # (K, d), like all buffers in float64; they are cast to the dtype of x at use
    log_weights: Tensor  # (K,)
    mean: Tensor  # (d,), of the whole prior

    def __init__(
        self,
        means: list[list[float]] | str | Tensor,
        weights: list[float] | str | Tensor,
        variance: float,
        image_shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        d = math.prod(self.image_shape)
        m = array_argument(means, "means")
        if m.ndim not in (2, 4) or m.numel() == 0 or tuple(m.shape[1:]) not in ((d,), self.image_shape):
            raise ValueError(f"means has shape {tuple(m.shape)}; allowed are (K, {d}) and (K, *{self.image_shape})")
        m = m.reshape(-1, d)
        w = (
            m.new_full((len(m),), 1 / len(m))
            if isinstance(weights, str) and weights == "equal"
            else array_argument(weights, "weights")
        )
        if w.shape != m.shape[:1] or bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-4:
            raise ValueError(
                f"weights has shape {tuple(w.shape)}, minimum {float(w.min()):.3g} and sum "
                f"{float(w.sum()):.6g}; allowed are {len(m)} numbers, not negative, of sum 1"
            )
        if not 0 < variance < math.inf:
            raise ValueError(f"variance = {variance}; allowed is a positive number")
        w = w / w.sum()
        self.variance = float(variance)
        self.register_buffer("means", m)
        self.register_buffer("log_weights", w.log())
        self.register_buffer("mean", w @ m)
        M = w.sqrt()[:, None] * (m - self.mean)  # M^T M is the covariance of the means; M M^T has its eigenvalues
        between = torch.linalg.eigvalsh(M.T @ M if d <= len(m) else M @ M.T)[-1]
        self.sigma_min, self.sigma_max = 0.0, math.inf
        self.spread = math.sqrt(self.variance + max(float(between), 0.0))

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Exact ``D(x; sigma)``; see :meth:`Denoiser.forward <dpnp_shared.denoiser.Denoiser.forward>`."""
        flat, s2, logits = self._logits(x, sigma)
        mean = logits.softmax(1) @ self.means.to(x.dtype)  # sum_k r_k m_k
        return ((self.variance * flat + s2 * mean) / (self.variance + s2)).reshape(x.shape)

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Exact :math:`(\sum_k r_k m_k - x)/(v + \sigma^2)`; see :meth:`GaussianPrior.score`."""
        flat, s2, logits = self._logits(x, sigma)
        mean = logits.softmax(1) @ self.means.to(x.dtype)
        return ((mean - flat) / (self.variance + s2)).reshape(x.shape)

    def log_prob(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        r""":math:`\log p_\sigma(x)`, ``(B,)``, of ``x`` ``(B, C, H, W)``."""
        flat, s2, logits = self._logits(x, sigma)
        total = (self.variance + s2)[:, 0]
        square = ((flat - self.mean.to(x.dtype)) ** 2).sum(1)
        return logits.logsumexp(1) - square / (2 * total) - 0.5 * flat.shape[1] * (2 * math.pi * total).log()

    def sample(self, n: int, *, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw ``(n, C, H, W)`` from the prior; arguments as in :meth:`GaussianPrior.sample`."""
        means = self.means[_categorical(self.log_weights.exp(), n, generator)]
        x = means + math.sqrt(self.variance) * _normal(means.shape, generator, means)
        return x.reshape(n, *self.image_shape).to(dtype or torch.get_default_dtype())

    def posterior(self, forward_model: ForwardModel, y: Tensor, extra_noise: float = 0.0) -> LinearGaussianPosterior:
        """Exact posterior; see :class:`LinearGaussianPosterior` for arguments and errors."""
        root = self.means.new_tensor(math.sqrt(self.variance))
        return LinearGaussianPosterior(
            self.means, self.log_weights, root, self.image_shape, forward_model, y, extra_noise
        )

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means ``(K, d)``, log weights ``(K,)``, and the square root ``(d, d)`` of the covariance of each component."""
        root = math.sqrt(self.variance) * torch.eye(
            self.means.shape[1], dtype=self.means.dtype, device=self.means.device
        )
        return self.means, self.log_weights, root

    def _logits(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""``x`` ``(B, d)``, :math:`\sigma^2` ``(1 or B, 1)`` and :math:`\log r_k + \text{const}` ``(B, K)``.

        :math:`|x - m_k|^2` is expanded around the prior's mean :math:`c`, so that only ``(B, K)`` numbers are
        held and little is lost to cancellation. Left out is :math:`-|x - c|^2/2(v + \sigma^2)`.
        """
        self.check_sigma(sigma)
        _check_images(x, self.image_shape)
        flat, s2 = x.flatten(1), expand_sigma(sigma, x).flatten(1) ** 2
        m = (self.means - self.mean).to(x.dtype)
        inner = (flat - self.mean.to(x.dtype)) @ m.T - 0.5 * (m**2).sum(1)
        return flat, s2, self.log_weights.to(x.dtype) + inner / (self.variance + s2)


class LinearGaussianPosterior:
    r"""Posterior of a mixture :math:`\sum_k w_k N(m_k, C)` for :math:`y = Ax + N(0, R + \eta^2 A A^T)`.

    At :math:`\eta > 0` this is the stationary law of a DPnP run at fixed :math:`\eta`. All in float64.

    Args:
        means: ``(K, d)``.
        log_weights: ``(K,)``.
        root: :math:`C^{1/2}`, of the same :math:`C` for all components: a 0-d tensor (isotropic), ``(d,)``
            (diagonal) or any square root ``(d, d)``.
        image_shape: ``(C, H, W)``.
        forward_model: linear operator and Gaussian noise.
        y: one measurement ``(*y_shape)``.
        extra_noise: :math:`\eta`, in image units.

    Attributes:
        mean: posterior mean ``(C, H, W)``.
        weights: of the components given ``y``, ``(K,)``.
        log_evidence: :math:`\log p(y)`.

    Raises:
        TypeError: the forward model is not linear Gaussian.
        ValueError: ``y`` does not fit the forward model, or ``extra_noise`` is negative.
    """

    def __init__(
        self,
        means: Tensor,
        log_weights: Tensor,
        root: Tensor,
        image_shape: tuple[int, int, int],
        forward_model: ForwardModel,
        y: Tensor,
        extra_noise: float = 0.0,
    ) -> None:
        if not 0 <= extra_noise < math.inf:
            raise ValueError(f"extra_noise = {extra_noise}; allowed is a number of at least 0")
        linear = forward_model.homogeneous
        A, R = linear.linear_gaussian_dense(image_shape)
        forward_model.check_measurement(y, image_shape, dtype=torch.float64, device=A.device)
        y = y.detach().to(device=A.device, dtype=torch.complex128 if y.is_complex() else torch.float64)
        y = forward_model.homogeneous_measurement(y, A.new_zeros(1, *image_shape))
        self.image_shape = image_shape
        self._means, self._root = means.double().to(A.device), root.double().to(A.device)
        self._A: Tensor = A
        self._y: Tensor = real_entries(y[None])[0]
        R = R + extra_noise**2 * (A @ A.T)
        self._noise_root: Tensor = torch.linalg.cholesky(R)
        AC = A @ self._root if self._root.ndim == 2 else A * self._root  # A C^(1/2), (m, d)
        S_root = torch.linalg.cholesky(AC @ AC.T + R)
        self._G: Tensor = _root_mul(self._root, torch.cholesky_solve(AC, S_root)).T  # C A^T S^-1, (d, m)
        z = torch.linalg.solve_triangular(S_root, (self._y - self._means @ A.T).T, upper=False)  # (m, K)
        log_normaliser = float(S_root.diagonal().log().sum()) + 0.5 * len(self._y) * math.log(2 * math.pi)
        log_joint = log_weights.double().to(A.device) - 0.5 * (z**2).sum(0) - log_normaliser
        self.log_evidence = float(log_joint.logsumexp(0))
        self.weights: Tensor = log_joint.softmax(0)
        self.mean = self._update(self.weights @ self._means).reshape(image_shape)

    def _update(self, x: Tensor, noise: Tensor | float = 0.0) -> Tensor:
        """``x + G (y - A x - noise)``, for ``x`` ``(…, d)``."""
        return x + (self._y - x @ self._A.T - noise) @ self._G.T

    @property
    def covariance(self) -> Tensor:
        """Posterior covariance of the flattened image, ``(d, d)``."""
        full, d = self._root.ndim == 2, self._A.shape[1]
        C: Tensor = self._root @ self._root.T if full else torch.diag((self._root**2).expand(d))
        deviation: Tensor = self._update(self._means) - self.mean.flatten()  # (K, d)
        return C - self._G @ (self._A @ C) + (self.weights[:, None] * deviation).T @ deviation

    def sample(self, n: int, *, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
        r"""Draw ``(n, C, H, W)``; arguments as in :meth:`GaussianPrior.sample`.

        By Matheron's rule: :math:`x + G(y - Ax - \varepsilon)` with :math:`x` from the prior's component and
        :math:`\varepsilon` from the noise is a draw from the posterior's component.
        """
        means = self._means[_categorical(self.weights, n, generator)]
        x = means + _root_mul(self._root, _normal(means.shape, generator, means))
        noise = _normal((n, len(self._y)), generator, means) @ self._noise_root.T
        return self._update(x, noise).reshape(n, *self.image_shape).to(dtype or torch.get_default_dtype())


def _root_mul(root: Tensor, w: Tensor) -> Tensor:
    """``root w`` for each row of ``w`` ``(n, d)``."""
    return w @ root.T if root.ndim == 2 else w * root


def _normal(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device=device).to(like.device)


def _categorical(weights: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    device = weights.device if generator is None else generator.device
    return torch.multinomial(weights.to(device), n, replacement=True, generator=generator).to(weights.device)


def _broadcast(value: Tensor, image_shape: tuple[int, int, int], name: str) -> Tensor:
    """``value`` as a flattened image ``(d,)``."""
    if tuple(value.shape) == (math.prod(image_shape),):
        return value
    try:
        return value.broadcast_to(image_shape).flatten().clone()
    except RuntimeError as error:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must broadcast to {image_shape}") from error


def _check_images(x: Tensor, image_shape: tuple[int, int, int]) -> None:
    if x.ndim != 4 or tuple(x.shape[1:]) != image_shape:
        raise ValueError(f"x has shape {tuple(x.shape)}; this prior is over images (B, *{image_shape})")
