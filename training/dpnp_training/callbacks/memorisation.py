"""Has the network learned the training images by heart?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor, nn

from dpnp_training.callbacks.generated import draw_share, gather
from dpnp_training.callbacks.held_out import BATCH, batches, held_out_images
from dpnp_training.callbacks.periodic import Periodic
from dpnp_training.callbacks.pictures import image_grid, publish_figures, publish_picture, unit_range
from dpnp_training.callbacks.sample_quality import check_extractor
from dpnp_training.module import ScoreMatching

LEVEL = 0.05  # the part of the held-out images that counts as close


class Memorisation(Periodic):
    r"""Compares how close samples come to training images and to images that were never seen.

    Half of the held-out images are references :math:`R`, beside the training images :math:`T`; the other half :math:`Q` are what samples
    ought to be: unseen images. With :math:`d_A(x)` the distance from x to the nearest image of A, the figures are

    - ``memorisation/closer_to_train``: the part of the samples with :math:`d_T < d_R`. A sample that owes nothing to particular images
      cannot tell T from R, so :math:`|T|/(|T| + |R|)` is expected (``closer_to_train_expected``), whatever the samples look like;
    - ``memorisation/too_close``: the part of the samples with :math:`d_T` below the 5% quantile of :math:`d_T` over Q. 0.05 is expected
      of samples distributed as the data; samples that are smoother than the data have more without any memorisation;
    - ``memorisation/distance_ratio``: the median of :math:`d_T/d_R` over samples, and ``distance_ratio_held_out`` over Q.

    The picture shows the samples with the smallest ratios (above), their nearest training images (middle) and nearest references
    (below). Every look reads the whole training set, of which each rank takes its share.

    Args:
        every_n_steps: optimiser steps from one check to the next; there is a last one at the end of training.
        samples: how many are drawn, and at most as many as there are images in Q.
        extractor: feature space of the distance, a module that maps images ``(B, C, H, W)`` in [0, 1] to ``(B, d)``; the pixels'
            Euclidean distance by default.
        train_images: training images to search; all by default.
        pairs: columns of the picture.
        calls: network calls a sample.
        seed: of the initial noise.

    Raises:
        ValueError: an argument out of range; at the start of training, fewer than two held-out images or an extractor that gives
            something else than ``(B, d)``.
    """

    def __init__(
        self,
        every_n_steps: int = 20_000,
        samples: int = 500,
        extractor: nn.Module | None = None,
        train_images: int | None = None,
        pairs: int = 8,
        calls: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps)
        if min(samples, pairs, calls, 1 if train_images is None else train_images) < 1:
            raise ValueError(
                f"samples = {samples}, train_images = {train_images}, pairs = {pairs}, calls = {calls}: all must be positive"
            )
        self.extractor = (nn.Flatten() if extractor is None else extractor).eval().requires_grad_(False)
        self.samples, self.train_images, self.pairs, self.calls, self.seed = samples, train_images, pairs, calls, seed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse now what would fail hours later."""
        if isinstance(pl_module, ScoreMatching):
            self.extractor.to(pl_module.device)
            check_extractor(self.extractor, held_out_images(trainer, 2, at_least=2).to(pl_module.device), pl_module)

    @torch.no_grad()
    def look(self, trainer: L.Trainer, module: ScoreMatching) -> None:
        """Check, on all ranks together."""
        held_out = torch.cat(list(batches(trainer, "validation_set")))
        references, unseen = held_out[::2], held_out[1::2][: self.samples]
        drawn = gather(draw_share(trainer, module, min(self.samples, len(unseen)), calls=self.calls, seed=self.seed))
        queries = torch.cat([drawn.cpu(), unseen])
        train = self._nearest(queries, batches(trainer, "train_set", self.train_images, share=True), module)
        world, rank = trainer.world_size, trainer.global_rank
        other = self._nearest(queries, torch.split(references[rank::world], BATCH), module)
        n = len(drawn)
        figures = compare(train.distance[:n], other.distance[:n], train.distance[n:], other.distance[n:])
        figures["closer_to_train_expected"] = train.searched / (train.searched + other.searched)
        publish_figures(trainer, {f"memorisation/{name}": value for name, value in figures.items()})
        shown = (train.distance[:n] / other.distance[:n]).argsort()[: self.pairs]
        rows = torch.cat([queries[shown], train.image[shown], other.image[shown]])
        publish_picture(trainer, "memorisation", image_grid(rows, module.card().value_range, columns=len(shown)))

    def _nearest(self, queries: Tensor, parts: Iterable[Tensor], module: ScoreMatching) -> Nearest:
        """Nearest images of all ranks' parts together to queries ``(n, C, H, W)``."""
        value_range = module.card().value_range

        def features(x: Tensor) -> Tensor:
            out: Tensor = self.extractor(unit_range(x.to(module.device), value_range))
            return out.double()

        wanted = torch.cat([features(x) for x in torch.split(queries, BATCH)])
        distance = torch.full((len(queries),), math.inf, dtype=torch.float64, device=module.device)
        image, searched = queries.new_zeros(queries.shape), 0
        for part in parts:
            found, index = torch.cdist(wanted, features(part)).min(1)
            closer = found < distance
            distance = torch.where(closer, found, distance)
            image = torch.where(closer.cpu()[:, None, None, None], part[index.cpu()], image)
            searched += len(part)
        # (ranks, n): the nearest of each rank's nearest
        distances = gather(distance).reshape(-1, *distance.shape)
        images = gather(image.to(module.device)).reshape(-1, *image.shape)
        best = distances.argmin(0, keepdim=True)
        chosen = images.gather(0, best[..., None, None, None].expand(1, *queries.shape))[0]
        total = gather(torch.tensor([searched], device=module.device)).sum()
        return Nearest(distances.gather(0, best)[0].cpu(), chosen.cpu(), int(total))


class Nearest(NamedTuple):
    """Nearest images to ``n`` queries.

    Attributes:
        distance: to them, ``(n,)``.
        image: they, ``(n, C, H, W)``.
        searched: number of images among which they are nearest.
    """

    distance: Tensor
    image: Tensor
    searched: int


def compare(train: Tensor, other: Tensor, unseen_train: Tensor, unseen_other: Tensor) -> dict[str, float]:
    """Figures of :class:`Memorisation` from distances.

    Args:
        train: of the samples to the nearest training image, ``(n,)``.
        other: of the samples to the nearest reference, ``(n,)``.
        unseen_train: of unseen images to the nearest training image, ``(m,)``.
        unseen_other: of unseen images to the nearest reference, ``(m,)``.
    """
    return {
        "closer_to_train": float((train < other).double().mean()),
        "too_close": float((train < unseen_train.quantile(LEVEL)).double().mean()),
        "distance_ratio": float((train / other).median()),
        "distance_ratio_held_out": float((unseen_train / unseen_other).median()),
    }
