r"""Denoising diffusion restoration models, DDRM (Kawar, Elad, Ermon & Song 2022, arXiv 2201.11793, equations 7 and 8).

With :math:`A = U S V^T`, white noise of standard deviation :math:`\sigma_y`, coordinates :math:`\bar x = V^T x` at noise level
:math:`\sigma_t` (the image plus :math:`\sigma_t w`) and the measurement's own image :math:`\bar y = S^\dagger U^T y`, whose noise is
:math:`\sigma_y/s_i`. At the first level

.. math:: \bar x^{(i)} \sim N(\bar y^{(i)},\ \sigma_T^2 - \sigma_y^2/s_i^2) \ \text{ where } s_i \sigma_T > \sigma_y, \quad
          \text{else } N(0, \sigma_T^2),

and from :math:`\sigma_t` to :math:`\sigma_r < \sigma_t`, with the denoised image :math:`\bar x_\theta`,

.. math::

    s_i = 0:\quad & N\big(\bar x_\theta + \sqrt{1 - \eta^2}\, \sigma_r\, (\bar x - \bar x_\theta)/\sigma_t,\ \eta^2 \sigma_r^2\big) \\
    \sigma_r < \sigma_y/s_i:\quad & N\big(\bar x_\theta + \sqrt{1 - \eta^2}\, \sigma_r\, (\bar y - \bar x_\theta)\, s_i/\sigma_y,\
        \eta^2 \sigma_r^2\big) \\
    \sigma_r \ge \sigma_y/s_i:\quad & N\big((1 - \eta_b)\, \bar x_\theta + \eta_b\, \bar y,\ \sigma_r^2 - \eta_b^2 \sigma_y^2/s_i^2\big) .

All of it are functions of :math:`s_i^2`, so that it is written with :math:`f(A^T A)`, for which an operator needs no V. The network is not
differentiated. The coordinates are treated as if they were independent given y; where the prior's covariance and :math:`A^T A` do not share
their eigenvectors the law is another one than the posterior.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, check_range, noise_level, time_steps
from dpnp_inference.baselines.linear import LinearGaussian
from dpnp_inference.proximal import ProximalInfo
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel


class DDRM(Baseline):
    r"""Draws by DDRM, one independent draw a chain.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: a linear operator and Gaussian noise. Its singular values must be known (``gram_function``, white noise), or the
            image be of at most 4096 entries, so that they are computed.
        steps: how many of DDPM's 1000 time steps are used, evenly spaced; 20 as published. Those whose noise level is outside of the
            prior's range are left out. (The released code has the steps 0, 50, …, 950, here both ends are in.)
        eta: η, 0 to 1; 0.85 as published.
        eta_b: :math:`\eta_b`, 0 to 1; 1 as published.
        null: singular values of at most this part of the largest one count as 0. (The released code does so below 0.03 for
            blurs.)
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, singular values that are not known, no time step within the prior's noise levels, or an
            operator for another number of channels than the prior's.
        TypeError: the model is not linear and Gaussian.
    """

    advice = "raise null, or check the forward model's scale"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        steps: int = 20,
        eta: float = 0.85,
        eta_b: float = 1.0,
        null: float = 1e-5,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("eta", eta, 0, 1)
        check_range("eta_b", eta_b, 0, 1)
        check_range("null", null, 0, 1)
        self.model = LinearGaussian(forward_model, self.blank(), "DDRM", spectrum=True)
        self.eta, self.eta_b = eta, eta_b
        self.least = (null * self.model.operator.norm()) ** 2  # of the eigenvalues of A^T A
        self.alpha_bars = time_steps(prior, steps)
        self.schedule = [noise_level(a) for a in self.alpha_bars]
        self.settings = {"steps": steps, "eta": eta, "eta_b": eta_b, "null": null}

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        # in image coordinates throughout; A^T y has the coordinates s_i² ȳ_i
        back = self.model.back(self.blank(), self.model.measurement(y)) * self.model.sigma**2
        x = self._start(back, run)
        for sigma, sigma_next in itertools.pairwise([*self.schedule, 0.0]):
            x_0 = run.denoise(x, sigma)
            x = self._step(x, x_0, back, sigma, sigma_next, run).to(self.dtype)
            run.report(x, sigma, ProximalInfo(2 if sigma == self.schedule[0] else 0))
        return x[:, None]

    def _start(self, back: Tensor, run: Run) -> Tensor:
        """Images at the first level."""
        sigma, sigma_y = self.schedule[0], self.model.sigma

        def seen(s: Tensor) -> Tensor:
            return (s > self.least) & (s * sigma**2 > sigma_y**2)

        def std(s: Tensor) -> Tensor:
            return (sigma**2 - torch.where(seen(s), sigma_y**2 / s, 0.0)).sqrt()

        w = run.generator.normal_like(self.blank(len(run.chains)))
        x = self.model.function(lambda s: torch.where(seen(s), 1 / s, 0.0), back) + self.model.function(std, w)
        return x.to(self.dtype)

    def _step(self, x: Tensor, x_0: Tensor, back: Tensor, sigma: float, sigma_next: float, run: Run) -> Tensor:
        """Images at ``sigma_next`` from those at ``sigma``, in the dtype of the linear algebra."""
        sigma_y, eta_b = self.model.sigma, self.eta_b
        keep = math.sqrt(1 - self.eta**2) * sigma_next

        def cases(null: float, noisy: Tensor, clean: Tensor | float, s: Tensor) -> Tensor:
            """By coordinate: nothing measured, the measurement noisier than the level, and less noisy."""
            least = torch.where(s * sigma_next**2 < sigma_y**2, noisy, clean)
            return torch.where(s > self.least, least, null)

        def of_denoised(s: Tensor) -> Tensor:
            return cases(1 - keep / sigma, 1 - keep / sigma_y * s.sqrt(), 1 - eta_b, s)

        def of_measured(s: Tensor) -> Tensor:
            return cases(0.0, keep / (sigma_y * s.sqrt()), eta_b / s, s)

        def of_previous(s: Tensor) -> Tensor:
            return torch.where(s > self.least, 0.0, keep / sigma)

        def std(s: Tensor) -> Tensor:
            fresh = torch.full_like(s, self.eta * sigma_next)
            left = (sigma_next**2 - eta_b**2 * sigma_y**2 / s).clamp(min=0).sqrt()
            return cases(self.eta * sigma_next, fresh, left, s)

        image = self.model.function(of_denoised, x_0) + self.model.function(of_measured, back)
        image = image + self.model.function(of_previous, x)
        if sigma_next == 0:
            return image
        return image + self.model.function(std, run.generator.normal_like(x))
