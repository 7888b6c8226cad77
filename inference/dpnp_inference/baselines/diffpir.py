r"""DiffPIR: half-quadratic splitting with a diffusion model (Zhu et al. 2023, arXiv 2305.08995, algorithm 1).

For DDPM's time steps, from noisy to clean, with :math:`\bar\sigma_t^2 = (1 - \bar\alpha_t)/\bar\alpha_t`,

.. math::

    x_0 &= D(x_t/\sqrt{\bar\alpha_t};\ \bar\sigma_t) \\
    \hat x_0 &= \arg\min_z\ \|y - A z\|^2 + \rho_t \|z - x_0\|^2, \qquad \rho_t = \lambda \sigma_n^2/\bar\sigma_t^2 \\
    x_s &= \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s}\, \big(\sqrt{1 - \zeta}\; \hat\varepsilon + \sqrt\zeta\, w\big), \qquad
        \hat\varepsilon = \frac{x_t - \sqrt{\bar\alpha_t}\, \hat x_0}{\sqrt{1 - \bar\alpha_t}} .

The second line is the most likely image, and no draw, so that nothing makes the draws' spread the posterior's. For a noise covariance R it
reads :math:`\hat x_0 = x_0 + c A^T (R + c A A^T)^{-1} (y - A x_0)` with :math:`c = \bar\sigma_t^2/\lambda`. The released code starts from y
with noise where y is an image, leaves the second line out at the last step, and returns the image at the level before.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, Spacing, check_range, noise_level, time_steps
from dpnp_inference.baselines.linear import LinearGaussian
from dpnp_inference.proximal import ProximalInfo
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel


class DiffPIR(Baseline):
    r"""Draws by DiffPIR, one a chain.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: a linear operator and Gaussian noise.
        steps: how many of DDPM's 1000 time steps are used; 100 as published. Those whose noise level is outside of the prior's
            range are left out.
        lambda_: weight λ of the prior. The released code runs 7 for deblurring, with :math:`\sigma_n` of images in [0, 1] and
            :math:`\bar\sigma_t` of images in [-1, 1]: in one unit that is 7/4, the default here.
        zeta: new part ζ of the noise, 0 to 1; 0.3 in the released runs for deblurring, 1 for inpainting.
        spacing: of the time steps; ``quad``, dense at small noise, as released, or ``uniform``.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, no time step within the prior's noise levels, or an operator for another number of
            channels than the prior's.
        TypeError: the model is not linear and Gaussian.
    """

    advice = "check the forward model's scale"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        steps: int = 100,
        lambda_: float = 1.75,
        zeta: float = 0.3,
        spacing: Spacing = "quad",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("lambda_", lambda_, 0, open_low=True)
        check_range("zeta", zeta, 0, 1)
        self.model = LinearGaussian(forward_model, self.blank(), "DiffPIR")
        self.lambda_, self.zeta = lambda_, zeta
        self.alpha_bars = time_steps(prior, steps, spacing)
        self.schedule = [noise_level(a) for a in self.alpha_bars]
        self.settings = {"steps": steps, "lambda_": lambda_, "zeta": zeta, "spacing": spacing}

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        y = self.model.measurement(y)
        x = run.generator.normal_like(self.blank(len(run.chains)))
        for alpha_bar, alpha_bar_next in itertools.pairwise([*self.alpha_bars, 1.0]):
            sigma = noise_level(alpha_bar)
            x_0 = run.denoise(x / math.sqrt(alpha_bar), sigma)
            correction, calls = self.model.correction(x_0, y, sigma**2 / self.lambda_)
            x_0 = x_0 + correction
            noise = (x - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
            x, scatter = math.sqrt(alpha_bar_next) * x_0, math.sqrt(1 - alpha_bar_next)
            x = x + scatter * math.sqrt(1 - self.zeta) * noise
            if scatter * self.zeta > 0:
                x = x + scatter * math.sqrt(self.zeta) * run.generator.normal_like(x)
            run.report(x, sigma, ProximalInfo(calls))
        return x[:, None]
