r"""Diffusion posterior sampling (Chung et al. 2023, arXiv 2209.14687, algorithms 1 and 2), the baseline.

Ancestral (DDPM) sampling of the prior in which every step is followed by one along the likelihood of the denoised image. In the paper's
variance-preserving coordinates :math:`x_i = \sqrt{\bar\alpha_i}\, x_0 + \sqrt{1 - \bar\alpha_i}\, w`, for :math:`i = N, \dots, 1`,

.. math::

    \hat x_0 &= D(x_i / \sqrt{\bar\alpha_i};\ \sigma_i), \qquad \sigma_i^2 = (1 - \bar\alpha_i)/\bar\alpha_i \\
    x'_{i-1} &= \frac{\sqrt{\alpha_i}\,(1 - \bar\alpha_{i-1})}{1 - \bar\alpha_i}\, x_i
        + \frac{\sqrt{\bar\alpha_{i-1}}\,\beta_i}{1 - \bar\alpha_i}\, \hat x_0 + \tilde\sigma_i w,
        \qquad \tilde\sigma_i^2 = \frac{1 - \bar\alpha_{i-1}}{1 - \bar\alpha_i}\, \beta_i \\
    x_{i-1} &= x'_{i-1} - \frac{\zeta}{\|y - A(\hat x_0)\|}\, \nabla_{x_i} \|y - A(\hat x_0)\|^2 .

The likelihood of the denoised image stands in for that of the noisy one, and the normalised step is a rule of thumb, so that no number of
steps makes the draws exact; how far off they are is what a comparison shows.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dpnp_inference.baselines.common import (
    TIMESTEPS,
    Baseline,
    Run,
    alpha_bars,
    check_differentiable,
    check_range,
    ddim_step,
    noise_level,
    time_steps,
)
from dpnp_inference.proximal import ProximalInfo
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel

__all__ = ["DPS", "alpha_bars", "noise_level"]


class DPS(Baseline):
    r"""Draws by diffusion posterior sampling, one independent draw a chain.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: a differentiable operator, and noise.
        steps: how many of the 1000 time steps are used, evenly spaced, 1 to 1000; the paper's 1000 by default. Those whose
            noise level is outside of the prior's range are left out.
        zeta: the paper's :math:`\zeta'` of the step :math:`\zeta'/\|y - A(\hat x_0)\| \cdot \nabla \|y - A(\hat x_0)\|^2`; 0
            samples the prior. The released code multiplies :math:`\nabla \|y - A(\hat x_0)\|`, half of that, by its ``scale``:
            its 0.3 (super-resolution, deblurring; the default here), 0.5 (inpainting) and 1.0 (phase retrieval) are
            ``zeta`` = 0.15, 0.25 and 0.5. Images in [-1, 1] are meant; the step does not scale with the prior.
        dtype: of the images; a trained network computes in its own.

    For other noise the residual is replaced by the likelihood: the step is :math:`2\zeta\, J^T u/\|u\|`, with
    :math:`u = -\nabla_{\bar y} \log p(y \mid \bar y)` at :math:`\bar y = A(\hat x_0)` and J the Jacobian of :math:`x_i \mapsto \bar y`. For
    isotropic Gaussian noise, :math:`u = -(y - \bar y)/\sigma^2`, this is the paper's step itself.

    Raises:
        ValueError: an argument out of range, no time step within the prior's noise levels, or an operator for another number of
            channels than the prior's.
        TypeError: the operator or the noise says that it is not differentiable.
    """

    advice = "lower zeta, or check the forward model's scale and gradient"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        steps: int = TIMESTEPS,
        zeta: float = 0.15,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("zeta", zeta, 0)
        check_differentiable(forward_model, "DPS")
        self.steps, self.zeta = steps, zeta
        self.alpha_bars = time_steps(prior, steps)
        self.schedule = [noise_level(a) for a in self.alpha_bars]
        self.settings = {"steps": steps, "zeta": zeta}

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        x = run.generator.normal_like(self.blank(len(run.chains)))
        for alpha_bar, alpha_bar_next in itertools.pairwise([*self.alpha_bars, 1.0]):
            x_0, step = self._denoise_and_step(x, alpha_bar, y, run)
            x = ddim_step(x, x_0, alpha_bar, alpha_bar_next, 1.0, run.generator) - step
            run.report(x, noise_level(alpha_bar), ProximalInfo(2 if self.zeta > 0 else 0))
        return x[:, None]

    def _denoise_and_step(self, x: Tensor, alpha_bar: float, y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        r"""The denoised images, and :math:`2\zeta\, J^T u/\|u\|` of the class's docstring, both shaped like ``x``."""
        root, sigma = math.sqrt(alpha_bar), noise_level(alpha_bar)
        if self.zeta == 0:
            return run.denoise(x / root, sigma), torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            x_0 = run.denoise(x / root, sigma)
            clean = self.forward_model.operator(x_0)
            free = clean.detach().requires_grad_(True)
            (u,) = torch.autograd.grad(-self.forward_model.noise.log_prob(y, free).sum(), free)
            norm = u.abs().flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
            unit = u / norm.reshape(-1, *[1] * (u.ndim - 1))
            (gradient,) = torch.autograd.grad(clean, x, unit)
        run.network_gradients += 1
        return x_0.detach(), 2 * self.zeta * gradient
