"""Held-out images, noisy and denoised, over noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor

from dpnp_training.callbacks.held_out import held_out_images
from dpnp_training.callbacks.periodic import Periodic
from dpnp_training.callbacks.pictures import image_grid, publish_picture
from dpnp_training.module import ScoreMatching


class DenoisingStrips(Periodic):
    """Draws what the averaged network makes of noisy held-out images, with the same noise each time.

    Two rows an image: noisy above, denoised below; the clean image leads both, and the noise grows to the right. Writes
    ``denoising/step_00001000.png`` below the trainer's root folder and to the logger.

    Args:
        every_n_steps: optimiser steps from one picture to the next; a last one is drawn at the end of training.
        images: how many held-out images.
        sigmas: noise levels in image units; by default six, evenly spaced in log σ from a tenth of a pixel's standard deviation to
            the data's spread along its widest direction.
        seed: of the noise.

    Raises:
        ValueError: an argument that is not positive.
    """

    def __init__(
        self, every_n_steps: int = 2000, images: int = 4, sigmas: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        super().__init__(every_n_steps)
        if images < 1:
            raise ValueError(f"images = {images} must be positive")
        if sigmas is not None and (not sigmas or any(not 0 < sigma < math.inf for sigma in sigmas)):
            raise ValueError(f"sigmas = {list(sigmas)}; needed are positive noise levels")
        self.images, self.sigmas, self.seed = images, sigmas, seed

    @torch.no_grad()
    def look(self, trainer: L.Trainer, module: ScoreMatching) -> None:
        """Draw, on the first rank."""
        prior = module.to_prior()
        if not trainer.is_global_zero:
            return
        x_0 = held_out_images(trainer, self.images).to(module.device)
        w = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(self.seed)).to(x_0)
        sigmas = self.sigmas
        if sigmas is None:
            low, high = 0.1 * prior.card.data_std, prior.card.spread
            sigmas = [min(max(low * (high / low) ** (i / 5), prior.sigma_min), prior.sigma_max) for i in range(6)]
        w = prior.colour(w)
        noisy = [x_0 + sigma * w for sigma in sigmas]
        denoised: list[Tensor] = [prior(x, sigma) for x, sigma in zip(noisy, sigmas, strict=True)]
        # (image, noisy or denoised, column, C, H, W)
        strips = torch.stack([torch.stack([x_0, *noisy], 1), torch.stack([x_0, *denoised], 1)], 1)
        picture = image_grid(strips.flatten(0, 2), prior.card.value_range, columns=1 + len(sigmas))
        publish_picture(trainer, "denoising", picture)
