r"""Exponential integrators of the probability flow, which carry a noisy image from a large noise level to a small one.

They see a denoiser :math:`x, \sigma \mapsto D(x; \sigma)` of *some* distribution and a decreasing list of noise
levels; they know nothing of priors or posteriors. With :math:`h = \ln(\sigma_{i}/\sigma_{i+1})`, the data-prediction update is

.. math:: x \leftarrow e^{-h} x + (1 - e^{-h})\,\tilde D

where :math:`\tilde D = D_i` at first order (DDIM) and :math:`\tilde D = D_i + \frac{h}{2 h_{prev}} (D_i - D_{i-1})` at second order
(DPM-Solver++ 2M; Lu et al. 2022, arXiv 2211.01095, algorithm 2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpnp_shared.denoiser import Denoiser

Denoise = Callable[[Tensor, float], Tensor]


def karras_levels(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> list[float]:
    r"""Noise levels evenly spaced in :math:`\sigma^{1/\rho}` (Karras et al. 2022, equation 5), then 0.

    Args:
        sigma_max: the first level, in image units.
        sigma_min: the last positive level.
        steps: number of positive levels, that is of network calls.
        rho: larger puts more levels at small noise.

    Returns:
        ``steps + 1`` decreasing levels, the last one 0.

    Raises:
        ValueError: an argument out of range.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}; at least 1 is needed")
    if not 0 < sigma_min <= sigma_max < math.inf:
        raise ValueError(
            f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; needed is 0 < sigma_min <= sigma_max < inf"
        )
    if steps == 1:
        return [sigma_max, 0.0]
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    inner = [(high + i / (steps - 1) * (low - high)) ** rho for i in range(1, steps - 1)]
    return [sigma_max, *inner, sigma_min, 0.0]


def solve(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    order: int = 2,
) -> Tensor:
    """Integrate from ``sigmas[0]`` to ``sigmas[-1]``, one call of ``denoise`` a step.

    Args:
        denoise: ``D(x; sigma)``.
        x: ``(B, C, H, W)``, distributed as data plus noise of level ``sigmas[0]``.
        sigmas: decreasing noise levels, in image units; the last one may be 0.
        order: 1 or 2.

    Returns:
        ``(B, C, H, W)`` at noise level ``sigmas[-1]``.

    Raises:
        ValueError: ``order`` is neither 1 nor 2, or the levels do not decrease.
    """
    check_order(order)
    if any(not 0 <= b < a < math.inf for a, b in itertools.pairwise(sigmas)):
        raise ValueError(f"sigmas must decrease and end at 0 or above, got {list(sigmas)}")
    d_prev, h_prev = None, math.inf
    for sigma, sigma_next in itertools.pairwise(sigmas):
        d = denoise(x, sigma)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        d_tilde = d
        if order == 2 and d_prev is not None and math.isfinite(h):
            d_tilde = d + (d - d_prev) * (h / (2 * h_prev))
        decay = math.exp(-h)
        x = decay * x + (1 - decay) * d_tilde
        d_prev, h_prev = d, h
    return x


def check_order(order: int) -> None:
    """Refuse an order other than 1 and 2.

    Raises:
        ValueError: names the value.
    """
    if order not in (1, 2):
        raise ValueError(f"order = {order}; allowed are 1 and 2")


@torch.no_grad()
def sample_unconditional(
    denoiser: Denoiser,
    n: int,
    *,
    generator: torch.Generator,
    steps: int = 40,
    sigma_max: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw from the prior by its probability flow (DPM-Solver++ 2M).

    Args:
        denoiser: the prior.
        n: number of images.
        generator: source of the initial noise, drawn on the generator's device.
        steps: network calls.
        sigma_max: noise level to start at; by default ten times the prior's spread, within its range.
        dtype: of the images.
        device: where the denoiser is.

    Returns:
        ``(n, C, H, W)`` in the prior's value range (not clipped).
    """
    noise = torch.randn((n, *denoiser.image_shape), generator=generator, dtype=dtype, device=generator.device)
    return denoise_noise(denoiser, noise.to(device), steps, sigma_max)


def denoise_noise(denoiser: Denoiser, w: Tensor, steps: int, sigma_max: float | None = None) -> Tensor:
    """Carry standard normal noise to draws from the prior, along its probability flow (DPM-Solver++ 2M).

    The flow starts around the prior's mean, which the denoiser gives at the largest noise level.

    Args:
        denoiser: the prior.
        w: ``(B, C, H, W)``, standard normal.
        steps: network calls; one more, on a single image, gives the mean.
        sigma_max: noise level to start at; by default ten times the prior's spread, within its range.

    Returns:
        ``(B, C, H, W)`` in the prior's value range (not clipped).
    """
    top = min(denoiser.sigma_max, 10 * denoiser.spread) if sigma_max is None else sigma_max
    low = min(top, max(denoiser.sigma_min, 1e-3 * denoiser.spread))
    mean = denoiser(torch.zeros_like(w[:1]), top)
    return solve(denoiser, mean + top * denoiser.colour(w), karras_levels(top, low, steps))
