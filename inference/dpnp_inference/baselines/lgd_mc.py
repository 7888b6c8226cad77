r"""Loss-guided diffusion with Monte Carlo, LGD-MC (Song et al., ICML 2023).

The likelihood of a noisy image is estimated with several clean ones instead of the one denoised image of DPS. With
:math:`\hat x_t = D(x_t/\sqrt{\bar\alpha_t}; \sigma_t)`,

.. math:: \log p(y \mid x_t) \approx \log \frac1n \sum_{i=1}^n p(y \mid \hat x_t + r_t w_i), \qquad
          r_t^2 = \frac{\sigma_t^2}{1 + \sigma_t^2}, \quad w_i \sim N(0, I),

differentiated in :math:`x_t` through the network. As n grows this is the likelihood under
:math:`x_0 \mid x_t \approx N(\hat x_t, r_t^2 I)`, for any operator and noise. That is exact for :math:`x_0 \sim N(0, I)`, and for
:math:`N(0, s^2 I)` with :math:`r_t^2 = \sigma_t^2 s^2/(\sigma_t^2 + s^2)`. Each ancestral (DDPM) step of the prior takes one of two
guidances:

- ``score``: the gradient is added to the score. For a few samples of a sharp likelihood it is far too long at large noise;
- ``normalised``: with the weights :math:`p_i \propto p(y \mid \hat x_t + r_t w_i)` and
  :math:`u_i = -\nabla_{\bar y} \log p(y \mid \bar y)` at :math:`\bar y = A(\hat x_t + r_t w_i)`, a step of
  :math:`2\zeta \sum_i p_i J_i^T u_i / (\sum_i p_i |u_i|^2)^{1/2}`, which for one sample without noise is that of DPS.

No code of the authors' is public. InverseBench has 10 samples and normalises, and averages the gradients without weights.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from dpnp_inference.baselines.common import (
    TIMESTEPS,
    Baseline,
    Run,
    check_differentiable,
    check_range,
    ddim_step,
    noise_level,
    time_steps,
)
from dpnp_inference.proximal import ProximalInfo
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel


class LGDMC(Baseline):
    r"""Draws by loss-guided diffusion, one independent draw a chain.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: a differentiable operator, and noise.
        steps: how many of DDPM's 1000 time steps are used, evenly spaced. Those whose noise level is outside of the prior's range are
            left out.
        samples: clean images n for each noisy one; 10 in InverseBench.
        guidance: ``normalised`` or ``score``, see above.
        zeta: ζ of the normalised step; see :class:`~dpnp_inference.baselines.DPS` for published values.
        prior_std: the prior's standard deviation s in :math:`r_t`, in image units; 1 as published.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, no time step within the prior's noise levels, or an operator for another number of
            channels than the prior's.
        TypeError: the operator or the noise says that it is not differentiable.
    """

    advice = "take guidance='normalised', lower zeta, or check the forward model's scale and gradient"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        steps: int = TIMESTEPS,
        samples: int = 10,
        guidance: Literal["normalised", "score"] = "normalised",
        zeta: float = 0.15,
        prior_std: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("samples", samples, 1)
        check_range("zeta", zeta, 0)
        check_range("prior_std", prior_std, 0, open_low=True)
        if guidance not in ("normalised", "score"):
            raise ValueError(f"guidance = {guidance!r}; allowed are 'normalised' and 'score'")
        check_differentiable(forward_model, "LGD-MC")
        self.samples, self.guidance, self.zeta, self.prior_std = samples, guidance, zeta, prior_std
        self.alpha_bars = time_steps(prior, steps)
        self.schedule = [noise_level(a) for a in self.alpha_bars]
        self.settings = {
            "steps": steps,
            "samples": samples,
            "guidance": guidance,
            "zeta": zeta,
            "prior_std": prior_std,
        }

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        x = run.generator.normal_like(self.blank(len(run.chains)))
        for alpha_bar, alpha_bar_next in itertools.pairwise([*self.alpha_bars, 1.0]):
            sigma = noise_level(alpha_bar)
            x_0, gradient = self._denoise_and_guide(x / math.sqrt(alpha_bar), sigma, y, run)
            if self.guidance == "score":
                x = ddim_step(x, x_0 + sigma**2 * gradient, alpha_bar, alpha_bar_next, 1.0, run.generator)
            else:
                x = ddim_step(x, x_0, alpha_bar, alpha_bar_next, 1.0, run.generator)
                x = x + 2 * self.zeta / math.sqrt(alpha_bar) * gradient
            run.report(x, sigma, ProximalInfo(2 * self.samples))
        return x[:, None]

    def _denoise_and_guide(self, x: Tensor, sigma: float, y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        r"""The denoised images, and the gradient in ``x`` ``(B, C, H, W)``, the noisy ones in image units.

        It is that of the likelihood's logarithm, or :math:`-\sum_i p_i J_i^T u_i/(\sum_i p_i |u_i|^2)^{1/2}`.
        """
        r = 1 / math.sqrt(1 / sigma**2 + 1 / self.prior_std**2)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            x_0 = run.denoise(x, sigma)
            w = run.generator.normal_like(x_0.detach()[:, None].expand(-1, self.samples, -1, -1, -1))
            clean = self.forward_model.operator((x_0[:, None] + r * w).flatten(0, 1))
            free = clean.detach().requires_grad_(True)
            log_l = self.forward_model.noise.log_prob(y, free)
            (slope,) = torch.autograd.grad(log_l.sum(), free)
            p = log_l.detach().reshape(-1, self.samples).softmax(1).to(x.dtype)
            if self.guidance == "normalised":
                square = slope.abs().flatten(1).square().sum(1).reshape(p.shape)
                p = p / (p * square).sum(1, keepdim=True).sqrt().clamp(min=torch.finfo(p.dtype).tiny)
            slope = slope * p.reshape(-1, *[1] * (slope.ndim - 1))
            (gradient,) = torch.autograd.grad(clean, x, slope)
        run.network_gradients += 1
        return x_0.detach(), gradient
