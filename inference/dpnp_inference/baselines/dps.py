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
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dpnp_inference.dpnp import SamplingError, Sweep, image_shape_of
from dpnp_inference.posterior import Posterior
from dpnp_inference.proximal import ProximalInfo
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel

TIMESTEPS, BETA_FIRST, BETA_LAST = 1000, 1e-4, 0.02  # the linear schedule of Ho et al. 2020, which the paper uses


class DPS:
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

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        steps: int = TIMESTEPS,
        zeta: float = 0.15,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 1 <= steps <= TIMESTEPS:
            raise ValueError(f"steps = {steps}; allowed are 1 to {TIMESTEPS}")
        if not 0 <= zeta < math.inf:
            raise ValueError(f"zeta = {zeta}; it must be at least 0 and finite")
        if not forward_model.differentiable:
            raise TypeError(
                f"DPS needs a differentiable likelihood; of {type(forward_model.operator).__name__} and "
                f"{type(forward_model.noise).__name__} one says it is not"
            )
        self.prior, self.forward_model = prior, forward_model
        self.steps, self.zeta, self.dtype = steps, zeta, dtype
        self.device = next((t.device for t in (*prior.parameters(), *prior.buffers())), torch.device("cpu"))
        self.image_shape = image_shape_of(prior, forward_model)
        self.alpha_bars = [a for a in alpha_bars(steps) if prior.sigma_min <= noise_level(a) <= prior.sigma_max]
        if not self.alpha_bars:
            raise ValueError(
                f"steps = {steps}: none of their noise levels is in the prior's [{prior.sigma_min:g}, {prior.sigma_max:g}]"
            )

    def sample(
        self,
        y: Tensor,
        *,
        chains: int,
        seed: int,
        batch_size: int | None = None,
        on_sweep: Callable[[Sweep], None] | None = None,
    ) -> Posterior:
        """Run independent chains.

        Args:
            y: one measurement, without a batch dimension.
            chains: how many chains, of one draw each.
            seed: not negative; chain i's randomness depends on ``(seed, i)`` only.
            batch_size: chains that run together, all by default; it changes memory and speed, not the draws (up to the
                rounding of floating-point sums).
            on_sweep: called after each time step, with its noise level σ in place of the coupling.

        Returns:
            The draws and the record of how they came about.

        Raises:
            ValueError: an argument out of range, or a measurement that does not fit the forward model.
            SamplingError: a chain has left the finite numbers.
        """
        size = chains if batch_size is None else batch_size
        for name, value, least in (("chains", chains, 1), ("seed", seed, 0), ("batch_size", size, 1)):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        self.forward_model.check_measurement(y, self.image_shape, dtype=self.dtype, device=self.device)
        y = y.to(device=self.device, dtype=self.dtype.to_complex() if y.is_complex() else self.dtype)
        start = time.perf_counter()
        batches = [range(first, min(first + size, chains)) for first in range(0, chains, size)]
        samples = torch.cat([self._run(y, batch, seed, on_sweep) for batch in batches])
        calls = len(batches) * len(self.alpha_bars)
        diagnostics = {
            "sampler": "DPS",
            "steps": self.steps,
            "zeta": self.zeta,
            "schedule": [noise_level(a) for a in self.alpha_bars],
            "chains": chains,
            "draws": 1,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            "batches": len(batches),
            "network_calls": calls,
            "network_gradients": calls if self.zeta > 0 else 0,
            "forward_calls": 2 * calls if self.zeta > 0 else 0,
            "convergence": None,
        }
        return Posterior(samples[:, None].cpu(), diagnostics)

    @torch.no_grad()
    def _run(self, y: Tensor, chains: range, seed: int, on_sweep: Callable[[Sweep], None] | None) -> Tensor:
        """Draws ``(chains, C, H, W)`` of one batch of chains."""
        generator = ChainGenerators(seed, chains)
        x = generator.normal_like(torch.zeros((len(chains), *self.image_shape), dtype=self.dtype, device=self.device))
        for i, (alpha_bar, alpha_bar_next) in enumerate(itertools.pairwise([*self.alpha_bars, 1.0]), 1):
            alpha = alpha_bar / alpha_bar_next
            beta = 1 - alpha
            x_0, step = self._denoise_and_step(x, alpha_bar, y)
            keep = math.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)
            move = math.sqrt(alpha_bar_next) * beta / (1 - alpha_bar)
            scatter = math.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * beta)
            x = keep * x + move * x_0 - step
            if scatter > 0:
                x = x + scatter * generator.normal_like(x)
            finite = torch.isfinite(x).flatten(1).all(1)
            if not bool(finite.all()):
                broken = [chain for chain, ok in zip(chains, finite.tolist(), strict=True) if not ok]
                raise SamplingError(
                    f"chains {broken} are no longer finite after step {i} at sigma = {noise_level(alpha_bar):g}; "
                    "lower zeta, or check the forward model's scale and gradient"
                )
            if on_sweep is not None:
                info = ProximalInfo(2 if self.zeta > 0 else 0)
                on_sweep(Sweep(chains, i, len(self.alpha_bars), noise_level(alpha_bar), i, info))
        return x

    def _denoise_and_step(self, x: Tensor, alpha_bar: float, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""The denoised images, and :math:`2\zeta\, J^T u/\|u\|` of the class's docstring, both shaped like ``x``."""
        root, sigma = math.sqrt(alpha_bar), noise_level(alpha_bar)
        if self.zeta == 0:
            return self.prior(x / root, sigma), torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            x_0 = self.prior(x / root, sigma)
            clean = self.forward_model.operator(x_0)
            free = clean.detach().requires_grad_(True)
            (u,) = torch.autograd.grad(-self.forward_model.noise.log_prob(y, free).sum(), free)
            norm = u.abs().flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
            unit = u / norm.reshape(-1, *[1] * (u.ndim - 1))
            (gradient,) = torch.autograd.grad(clean, x, unit)
        return x_0.detach(), 2 * self.zeta * gradient


def alpha_bars(steps: int) -> list[float]:
    r"""``steps`` of the 1000 values :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)` of the linear schedule, from noisy to clean.

    Args:
        steps: 1 to 1000; the time steps are evenly spaced, as in the paper's code, both ends included.

    Returns:
        Increasing values, the first one belonging to the last time step.
    """
    beta = torch.linspace(BETA_FIRST, BETA_LAST, TIMESTEPS, dtype=torch.float64)
    times = torch.linspace(TIMESTEPS - 1, 0, steps, dtype=torch.float64).round().long()
    return [float(a) for a in (1 - beta).cumprod(0)[times]]


def noise_level(alpha_bar: float) -> float:
    r""":math:`\sigma = \sqrt{(1 - \bar\alpha)/\bar\alpha}`, in image units."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)
