"""Samples of the averaged network, from the same noise through all of training."""

from __future__ import annotations

import lightning as L  # noqa: N812 - Lightning's own convention
import torch

from dpnp_shared.solvers import sample_unconditional
from dpnp_training.callbacks.periodic import Periodic
from dpnp_training.callbacks.pictures import image_grid, publish_picture
from dpnp_training.module import ScoreMatching


class SampleGrid(Periodic):
    """Draws unconditional samples of the averaged network from the same noise each time.

    Writes ``samples/step_00001000.png`` below the trainer's root folder and to the logger.

    Args:
        every_n_steps: optimiser steps from one grid to the next; a last one is drawn at the end of training.
        images: how many.
        calls: network calls a sample.
        seed: of the initial noise.

    Raises:
        ValueError: an argument that is not positive.
    """

    def __init__(self, every_n_steps: int = 2000, images: int = 64, calls: int = 30, seed: int = 0) -> None:
        super().__init__(every_n_steps)
        if images < 1 or calls < 1:
            raise ValueError(f"images = {images} and calls = {calls} must be positive")
        self.images, self.calls, self.seed = images, calls, seed

    def look(self, trainer: L.Trainer, module: ScoreMatching) -> None:
        """Draw, on the first rank."""
        prior = module.to_prior()
        if not trainer.is_global_zero:
            return
        x = sample_unconditional(
            prior,
            self.images,
            generator=torch.Generator().manual_seed(self.seed),
            steps=self.calls,
            device=module.device,
        )
        publish_picture(trainer, "samples", image_grid(x, module.card().value_range))
