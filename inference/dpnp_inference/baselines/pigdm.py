r"""Pseudoinverse-guided diffusion, ΠGDM (Song, Vahdat, Mardani & Kautz, ICLR 2023).

The image given its noisy version is taken as Gaussian, :math:`x_0 \mid x_t \approx N(\hat x_t, r_t^2 I)`, so that for
:math:`y = A x_0 + N(0, R)` the noisy likelihood has a gradient in closed form (section 3),

.. math:: g = \Big(\frac{\partial \hat x_t}{\partial x_t}\Big)^T A^T (r_t^2 A A^T + R)^{-1} (y - A \hat x_t), \qquad
          r_t^2 = \frac{\sigma_t^2}{1 + \sigma_t^2} ,

which is exact for :math:`x_0 \sim N(0, I)`. For a prior of standard deviation s it is
:math:`r_t^2 = \sigma_t^2 s^2/(\sigma_t^2 + s^2)`. DDIM then goes from :math:`\bar\alpha_t` to :math:`\bar\alpha_s` with one of two
guidances:

- ``score``: g is added to the score, :math:`\hat x_t \leftarrow \hat x_t + (1 - \bar\alpha_t)/\sqrt{\bar\alpha_t}\; g`;
- ``adaptive``: :math:`x_s \leftarrow x_s + \sqrt{\bar\alpha_s \bar\alpha_t}\; r_t^2 g`, the weights of the authors' released code. (That
  has noiseless measurements: :math:`A^\dagger` is the limit of :math:`r_t^2 A^T (r_t^2 A A^T + \sigma^2 I)^{-1}`.)

The first is a sampler of the posterior as far as the Gaussian holds; the second is not, whatever the prior.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, check_range, ddim_step, noise_level, time_steps
from dpnp_inference.baselines.linear import LinearGaussian
from dpnp_inference.proximal import ProximalInfo
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel


class PiGDM(Baseline):
    r"""Draws by pseudoinverse guidance, one independent draw a chain.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: a linear operator and Gaussian noise.
        steps: how many of DDPM's 1000 time steps are used, evenly spaced. Those whose noise level is outside of the prior's range are
            left out. The authors' code (NVlabs/RED-diff) has 100 in its example commands, also for noisy measurements; the script for
            its tables has 1000, and its default is 50.
        eta: randomness of DDIM, 0 to 1; 1 is ancestral, as in these commands. The default of that code is 0.
        guidance: ``adaptive``, as released, or ``score``; see above.
        prior_std: the prior's standard deviation s in :math:`r_t`, in image units; 1 as published.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, no time step within the prior's noise levels, or an operator for another number of
            channels than the prior's.
        TypeError: the model is not linear and Gaussian.
    """

    advice = "take guidance='score', or check the forward model's scale and prior_std"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        steps: int = 100,
        eta: float = 1.0,
        guidance: Literal["adaptive", "score"] = "adaptive",
        prior_std: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("eta", eta, 0, 1)
        check_range("prior_std", prior_std, 0, open_low=True)
        if guidance not in ("adaptive", "score"):
            raise ValueError(f"guidance = {guidance!r}; allowed are 'adaptive' and 'score'")
        self.model = LinearGaussian(forward_model, self.blank(), "PiGDM")
        self.eta, self.guidance, self.prior_std = eta, guidance, prior_std
        self.alpha_bars = time_steps(prior, steps)
        self.schedule = [noise_level(a) for a in self.alpha_bars]
        self.settings = {"steps": steps, "eta": eta, "guidance": guidance, "prior_std": prior_std}

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        y = self.model.measurement(y)
        x = run.generator.normal_like(self.blank(len(run.chains)))
        for alpha_bar, alpha_bar_next in itertools.pairwise([*self.alpha_bars, 1.0]):
            sigma = noise_level(alpha_bar)
            with torch.enable_grad():
                x_ve = (x / math.sqrt(alpha_bar)).detach().requires_grad_(True)
                x_0 = run.denoise(x_ve, sigma)
                r_2 = 1 / (1 / sigma**2 + 1 / self.prior_std**2)
                with torch.no_grad():
                    correction, calls = self.model.correction(x_0, y, r_2)  # r^2 A^T (r^2 A A^T + R)^-1 (y - A x_0)
                (gradient,) = torch.autograd.grad(x_0, x_ve, correction)  # r^2 g √ᾱ
            run.network_gradients += 1
            x_0 = x_0.detach()
            if self.guidance == "score":
                x = ddim_step(x, x_0 + sigma**2 / r_2 * gradient, alpha_bar, alpha_bar_next, self.eta, run.generator)
            else:
                x = ddim_step(x, x_0, alpha_bar, alpha_bar_next, self.eta, run.generator)
                x = x + math.sqrt(alpha_bar_next) * gradient
            run.report(x, sigma, ProximalInfo(calls))
        return x[:, None]
