"""FID and KID of the averaged network's samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from dpnp_training.callbacks.generated import draw_share, gather
from dpnp_training.callbacks.held_out import BATCH, batches, held_out_images
from dpnp_training.callbacks.periodic import Periodic
from dpnp_training.callbacks.pictures import publish_figures, unit_range
from dpnp_training.module import ScoreMatching

SUBSETS, LARGEST_SUBSET = 20, 1000  # of KID


class SampleQuality(Periodic):
    """Compares samples of the averaged network with held-out images in a feature space.

    FID (Heusel et al. 2017, arXiv 1706.08500, equation 6) and KID (Bińkowski et al. 2018, arXiv 1801.01401, section 4), by torchmetrics.
    Both are logged (``quality/fid``, ``quality/kid``) and kept for the prior's card. Beside them stand the same two of as many *training*
    images (``quality/fid_train``, ``quality/kid_train``), which is what a perfect prior would reach: the FID of finitely many images
    is biased upwards, so only figures of one extractor and of equally many images may be compared. KID is unbiased.

    Args:
        extractor: the feature space, by class path: any module that maps images ``(B, C, H, W)`` in [0, 1] to ``(B, d)``;
            :mod:`dpnp_shared.features` has some.
        every_n_steps: optimiser steps from one comparison to the next; there is a last one at the end of training.
        samples: how many are drawn, and at most as many as there are held-out images.
        images: held-out images to compare with; all by default.
        calls: network calls a sample.
        seed: of the initial noise, the same at each comparison.

    Raises:
        ValueError: an argument out of range; at the start of training, fewer than two held-out images or an extractor that gives
            something else than ``(B, d)``.
    """

    def __init__(
        self,
        extractor: nn.Module,
        every_n_steps: int = 10_000,
        samples: int = 1000,
        images: int | None = None,
        calls: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps)
        if samples < 2 or (images is not None and images < 2) or calls < 1:
            raise ValueError(
                f"samples = {samples} and images = {images} must be at least 2, and calls = {calls} positive"
            )
        self.extractor = extractor.eval().requires_grad_(False)
        self.samples, self.images, self.calls, self.seed = samples, images, calls, seed
        self._real: Tensor | None = None
        self._figures: dict[str, float] = {}
        self._card: dict[str, float] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse now what would fail hours later."""
        if isinstance(pl_module, ScoreMatching):
            self.extractor.to(pl_module.device)
            check_extractor(self.extractor, held_out_images(trainer, 2, at_least=2).to(pl_module.device), pl_module)

    @torch.no_grad()
    def look(self, trainer: L.Trainer, module: ScoreMatching) -> None:
        """Compare, on all ranks together."""
        if self._real is None:
            self._real = self._features(batches(trainer, "validation_set", self.images, share=True), module)
            train = self._features(
                batches(trainer, "train_set", min(self.samples, len(self._real)), share=True), module
            )
            self._figures = {f"quality/{name}_train": value for name, value in compare(self._real, train).items()}
        n = min(self.samples, len(self._real))
        drawn = draw_share(trainer, module, n, calls=self.calls, seed=self.seed)
        fake = self._features(torch.split(drawn, BATCH), module)
        figures = compare(self._real, fake)
        self._figures |= {f"quality/{name}": value for name, value in figures.items()}
        publish_figures(trainer, self._figures)
        of = f"{n} samples, {len(self._real)} held-out images, {type(self.extractor).__name__}"
        self._card = {f"{name.upper()}, {of}": value for name, value in figures.items()}
        module.metrics.update(self._card)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A validation renews the module's figures; these stay among them."""
        if isinstance(pl_module, ScoreMatching):
            pl_module.metrics.update(self._card)

    def _features(self, parts: Iterable[Tensor], module: ScoreMatching) -> Tensor:
        """Features of all ranks' images ``(n, d)``, in float64 on the CPU."""
        found = [self.extractor(unit_range(x.to(module.device), module.card().value_range)) for x in parts]
        width = self._width(module)
        return gather(torch.cat([torch.zeros(0, width, device=module.device), *found]).double()).cpu()

    def _width(self, module: ScoreMatching) -> int:
        """Number of features."""
        blank = torch.zeros(1, *module.card().image_shape, device=module.device)
        return int(self.extractor(blank).shape[1])


def check_extractor(extractor: nn.Module, x: Tensor, module: ScoreMatching) -> None:
    """Try an extractor on images ``(B, C, H, W)`` in the network's range.

    Raises:
        ValueError: it does not give ``(B, d)``.
    """
    with torch.no_grad():
        shape = tuple(extractor(unit_range(x, module.card().value_range)).shape)
    if len(shape) != 2 or shape[0] != len(x):
        raise ValueError(
            f"extractor = {type(extractor).__name__} maps images {tuple(x.shape)} to {shape}; needed is ({len(x)}, d)"
        )


def compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    """FID and KID of features ``(n, d)``, at least two of each.

    KID is the mean over random subsets of at most half of the smaller set, the same each time; training's own random
    numbers are left alone.
    """
    fid = FrechetInceptionDistance(_Identity(real.shape[1]), sync_on_compute=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all", UserWarning)
        size = max(2, min(LARGEST_SUBSET, min(len(real), len(fake)) // 2))
        kid = KernelInceptionDistance(_Identity(real.shape[1]), SUBSETS, size, sync_on_compute=False)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # torchmetrics draws the subsets by the global generator
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}


class _Identity(nn.Module):
    """Stands where torchmetrics has its network: features come in already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
