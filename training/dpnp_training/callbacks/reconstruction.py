"""Reconstructions of held-out images by a posterior sampler, while the prior is being trained."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor

from dpnp_shared.prior import Prior
from dpnp_training.callbacks.held_out import held_out_images
from dpnp_training.callbacks.periodic import Periodic
from dpnp_training.callbacks.pictures import publish_figures, publish_picture
from dpnp_training.module import ScoreMatching

PosteriorSampler = Callable[[Prior, Tensor], tuple[dict[str, float], Tensor]]
"""Measures and reconstructs one image: takes the averaged network as a prior and a clean image ``(C, H, W)`` in the prior's value range,
on the prior's device; gives figures by name, the same names each time, and a picture ``(1 or 3, H', W')`` in [0, 1], of one size."""


class Reconstruction(Periodic):
    """Shows what the averaged network is worth as a prior: a posterior sampler reconstructs held-out images with it.

    The sampler is named by class path in the configuration, so that training needs nothing of inference;
    ``dpnp_inference.during_training.HeldOutReconstruction`` is one. Figures are logged as ``reconstruction/NAME``, the mean over images,
    and the pictures, one below the other, as ``reconstruction`` and ``reconstruction/step_00001000.png``.

    Args:
        sampler: called with the prior and a clean image ``(C, H, W)``; returns figures by name and a picture
            ``(1 or 3, H', W')`` in [0, 1].
        every_n_steps: optimiser steps from one reconstruction to the next; there is a last one at the end of training.
        images: how many held-out images.
        name: of the folder and of the figures, should there be several such callbacks.

    Raises:
        ValueError: an argument that is not positive; at the first look, a sampler that returns something else.
    """

    def __init__(
        self, sampler: PosteriorSampler, every_n_steps: int = 10_000, images: int = 2, name: str = "reconstruction"
    ) -> None:
        super().__init__(every_n_steps)
        if images < 1:
            raise ValueError(f"images = {images} must be positive")
        self.sampler, self.images, self.name = sampler, images, name

    def look(self, trainer: L.Trainer, module: ScoreMatching) -> None:
        """Reconstruct, on the first rank."""
        prior = module.to_prior()
        if not trainer.is_global_zero:
            return
        results = [
            self._checked(self.sampler(prior, x)) for x in held_out_images(trainer, self.images).to(module.device)
        ]
        names = results[0][0].keys()
        means = {f"{self.name}/{key}": sum(figures[key] for figures, _ in results) / len(results) for key in names}
        publish_figures(trainer, means)
        publish_picture(trainer, self.name, torch.cat([picture.float().cpu() for _, picture in results], 1))

    def _checked(self, result: tuple[dict[str, float], Tensor]) -> tuple[dict[str, float], Tensor]:
        """A sampler's result, or the error that says what is wrong with it."""
        try:
            figures, picture = result
            figures, shape = {str(key): float(value) for key, value in figures.items()}, tuple(picture.shape)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"sampler = {self.sampler!r} returned {type(result).__name__}; needed are figures by name and a picture: {error}"
            ) from error
        if len(shape) != 3 or shape[0] not in (1, 3):
            raise ValueError(
                f"sampler = {self.sampler!r} returned a picture of shape {shape}; needed is (1 or 3, H, W)"
            )
        return figures, picture
