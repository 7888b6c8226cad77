r"""Decoupled annealing posterior sampling, DAPS (Zhang et al. 2024, arXiv 2407.01521, algorithm 1).

For the levels :math:`\sigma_1 > \dots > \sigma_N > 0`, from :math:`x \sim N(0, \sigma_1^2 I)`, repeat

1. :math:`\hat x_0`: the probability flow of the prior from x at :math:`\sigma_i` down to (almost) no noise, in a few Euler steps;
2. Langevin steps for :math:`x_0 \mid x, y` with :math:`x_0 \mid x \approx N(\hat x_0, \sigma_i^2 I)`,

   .. math:: z \leftarrow z + \gamma_i \Big[\beta \nabla \log p(y \mid z) + \frac{\hat x_0 - z}{\sigma_i^2}\Big] + \sqrt{2 \gamma_i}\; w,
             \qquad \gamma_i = \gamma \Big(1 - (1 - \delta) \frac iN\Big), \quad z = \hat x_0 \text{ at first};

3. new noise, :math:`x = z + \sigma_{i+1} w`.

As a draw may move far in step 3, an error made at large noise is not kept. The Gaussian of step 2 is an approximation, and so is its width,
even for a Gaussian prior, and the Langevin steps have no Metropolis step: no number of steps makes the law exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, check_differentiable, check_range
from dpnp_inference.proximal import ProximalInfo
from dpnp_inference.proximal.likelihood import value_and_gradient
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.solvers import karras_levels, solve


class DAPS(Baseline):
    r"""Draws by decoupled annealing, one a chain.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: a differentiable operator, and noise.
        steps: levels N of the annealing; 200 as published.
        sigma_max: the first level, in image units, or the prior's largest if that is less; 100 as published.
        sigma_min: the grid's end, even in :math:`\sigma^{1/7}`; 0.1 as published. The last step goes from the level before it to 0.
        ode_steps: Euler steps of the probability flow; 5 as published (DAPS-1K).
        ode_sigma_min: where the flow ends, or the prior's least level if that is more; 0.01 as released.
        langevin_steps: 100 as published.
        step_size: γ, in squared image units; the released 5e-5 (inpainting, phase retrieval; 1e-4 for Gaussian deblurring) for images
            in [-1, 1] with noise of 0.05. The steps diverge for :math:`\gamma > 2/(1/\sigma_i^2 + \beta \|A\|^2/\sigma_y^2)`.
        step_decay: δ; 0.01 as published.
        power: β of the likelihood. The released configurations have a standard deviation of 0.01 in place of the noise's 0.05,
            which is the default 25 (their gradient lacks the half of :math:`|y - A(z)|^2/2`, which doubles it). 1 is the likelihood
            itself.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, or an operator for another number of channels than the prior's.
        TypeError: the operator or the noise says that it is not differentiable.
    """

    advice = "lower step_size or power, or check the forward model's scale and gradient"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        steps: int = 200,
        sigma_max: float = 100.0,
        sigma_min: float = 0.1,
        ode_steps: int = 5,
        ode_sigma_min: float = 0.01,
        langevin_steps: int = 100,
        step_size: float = 5e-5,
        step_decay: float = 0.01,
        power: float = 25.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        for name, count in (("steps", steps), ("ode_steps", ode_steps), ("langevin_steps", langevin_steps)):
            check_range(name, count, 1)
        for name, value in (("sigma_min", sigma_min), ("ode_sigma_min", ode_sigma_min), ("step_size", step_size)):
            check_range(name, value, 0, open_low=True)
        check_range("sigma_max", sigma_max, sigma_min)
        check_range("step_decay", step_decay, 0, 1)
        check_range("power", power, 0)
        check_differentiable(forward_model, "DAPS")
        high = min(sigma_max, prior.sigma_max)
        prior.check_sigma(max(sigma_min, prior.sigma_min))
        self.schedule = karras_levels(high, max(sigma_min, prior.sigma_min), steps + 1)[:-2]
        self.ode_steps, self.ode_sigma_min = ode_steps, max(ode_sigma_min, prior.sigma_min)
        self.langevin_steps, self.step_size, self.step_decay = langevin_steps, step_size, step_decay
        self.power = power
        self.settings = {
            "steps": steps,
            "sigma_max": sigma_max,
            "sigma_min": sigma_min,
            "ode_steps": ode_steps,
            "ode_sigma_min": ode_sigma_min,
            "langevin_steps": langevin_steps,
            "step_size": step_size,
            "step_decay": step_decay,
            "power": power,
        }

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        x = self.schedule[0] * run.generator.normal_like(self.blank(len(run.chains)))
        for i, sigma in enumerate(self.schedule):
            x = self._langevin(self._flow(x, sigma, run), sigma, i / len(self.schedule), y, run)
            run.report(x, sigma, ProximalInfo(2 * self.langevin_steps))
            if i + 1 < len(self.schedule):
                x = x + self.schedule[i + 1] * run.generator.normal_like(x)
        return x[:, None]

    def _flow(self, x: Tensor, sigma: float, run: Run) -> Tensor:
        """The probability flow's end, ``(B, C, H, W)``, from ``x`` at ``sigma``."""
        if sigma <= self.ode_sigma_min:
            return run.denoise(x, sigma)
        # an exponential integrator's step of first order is Euler's where the noise level is the time
        return solve(run.denoise, x, karras_levels(sigma, self.ode_sigma_min, self.ode_steps + 1)[:-1], order=1)

    def _langevin(self, x_0: Tensor, sigma: float, ratio: float, y: Tensor, run: Run) -> Tensor:
        """Langevin steps from ``x_0`` ``(B, C, H, W)`` for the image given the noisy one and ``y``."""
        step, z = self.step_size * (1 - (1 - self.step_decay) * ratio), x_0
        for _ in range(self.langevin_steps):
            _, gradient = value_and_gradient(self.forward_model, z, y)
            drift = self.power * gradient + (x_0 - z) / sigma**2
            z = z + step * drift + math.sqrt(2 * step) * run.generator.normal_like(z)
        return z
