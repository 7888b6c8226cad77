"""How good a reconstruction is, by torchmetrics, and whether its uncertainty can be trusted.

torchmetrics is imported where it is used, since its import takes as long as all others of a command together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpnp_inference.posterior import Posterior


def psnr(x: Tensor, truth: Tensor, value_range: tuple[float, float]) -> float:
    """Peak signal-to-noise ratio in dB of an image ``(C, H, W)`` clipped to its value range."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    low, high = value_range
    return float(peak_signal_noise_ratio(x.clamp(low, high), truth, data_range=high - low))


def ssim(x: Tensor, truth: Tensor, value_range: tuple[float, float]) -> float:
    """Structural similarity (Wang et al. 2004) of an image ``(C, H, W)`` clipped to its value range.

    Raises:
        ValueError: an image smaller than the 11 x 11 window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(x.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs images of at least 11 x 11 pixels, got {tuple(x.shape)}")
    low, high = value_range
    value = structural_similarity_index_measure(x.clamp(low, high)[None], truth[None], data_range=high - low)
    assert isinstance(value, Tensor)
    return float(value)


def coverage(
    posterior: Posterior, truth: Tensor, level: float = 0.9, where: Tensor | None = None
) -> tuple[float, float]:
    """How often the order-statistic interval of a pixel contains the truth.

    Args:
        posterior: the draws.
        truth: ``(C, H, W)``.
        level: wanted coverage.
        where: boolean, broadcastable to ``(C, H, W)``: the pixels that count; all by default.

    Returns:
        The fraction of pixels covered, and the level that the interval has by construction.

    Raises:
        ValueError: too few draws for the level, or no pixel counts.
    """
    low, high, exact, _ = posterior.interval(level)
    inside = (low <= truth) & (truth <= high)
    if where is not None:
        inside = inside[where.expand_as(inside)]
    if inside.numel() == 0:
        raise ValueError("where selects no pixel")
    return float(inside.to(torch.float64).mean()), exact


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 1000, seed: int = 0) -> float:
    r"""Sliced Wasserstein-1 distance of two sets of draws, the mean over random unit directions u of :math:`W_1(u^T a, u^T b)`.

    Args:
        a: ``(n, …)``, in any units.
        b: ``(n, …)``, as many draws of as many entries.
        projections: number of directions.
        seed: of the directions.

    Returns:
        The distance, in the units of the draws.

    Raises:
        ValueError: the sets differ in shape.
    """
    if a.shape != b.shape:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; they must be equal")
    a, b = a.flatten(1).to(torch.float64), b.flatten(1).to(torch.float64)
    u = torch.randn(a.shape[1], projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(a)
    u = u / u.norm(dim=0)
    return float(((a @ u).sort(0).values - (b @ u).sort(0).values).abs().mean())
