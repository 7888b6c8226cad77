"""Which moving average becomes the prior: the one with the smallest validation loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpnp_shared.model_card import noise_bands
from dpnp_shared.prior import Prior, PriorError
from dpnp_training import verify
from dpnp_training.export import main_average, read_checkpoint, use_width
from dpnp_training.losses import DenoisingScoreMatching
from dpnp_training.post_hoc import LARGEST_ERROR, Averages

WIDTHS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12, 0.15, 0.2)
"""Relative widths that are tried if none are named."""


class Candidate(NamedTuple):
    """An average and what was measured of it."""

    sigma_rel: float | None
    """Relative width; none for the main average."""
    errors: Tensor
    """Squared error ``(bands, images)``."""
    losses: Tensor
    """The same, weighted as in training."""

    @property
    def name(self) -> str:
        """As the card and the command line name it."""
        return "main" if self.sigma_rel is None else f"{self.sigma_rel:g}"

    @property
    def loss(self) -> float:
        """The validation loss of training: the mean over bands, images and pixels."""
        return float(self.losses.mean())

    def above(self, other: Candidate) -> tuple[float, float]:
        """How much larger the loss is than another one's, and the standard error of that: images and noise are the same."""
        difference = (self.losses - other.losses).mean(0)
        error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
        return float(difference.mean()), error


class Choice(NamedTuple):
    """What came of comparing averages."""

    prior: Prior
    candidates: list[Candidate]
    """All that were measured, in rising order of their loss."""
    left_out: list[str]
    """Averages that were not measured or have no finite loss, and why."""


def choose(
    file: str | Path,
    *,
    widths: Sequence[float] | None = None,
    data: str | None = None,
    root: str = "data",
    device: torch.device | str = "cpu",
    trusted_modules: Sequence[str] = (),
) -> Choice:
    """Measure the averages of a checkpoint on the validation images of its training, with the same noise, and take the best.

    On the same type of device the loss of the main average is the ``val/loss`` of training at that step.

    Args:
        file: a ``.ckpt`` of a training with profiles.
        widths: relative widths to compare, besides the main average; by default those that were tracked and :data:`WIDTHS`, as
            far as the snapshots give them.
        data: where the data is now; by default where training found it.
        root: folder of torchvision's data sets.
        device: where to compute.
        trusted_modules: modules outside of this package whose network classes may be imported.

    Raises:
        PriorError: the checkpoint has no profiles, no validation yet or a loss of its own; the data is not the training's; a width that was
            asked for cannot be made; or no loss is finite.
        ValueError: a width is out of range.
    """
    path = Path(file)
    checkpoint = read_checkpoint(path)
    averages = Averages(checkpoint, path)
    left_out: list[str] = []
    if widths is None:
        tried = sorted({*averages.widths, *WIDTHS})
        widths = [width for width in tried if averages.error(width) <= LARGEST_ERROR]
        left_out = [f"σ_rel = {width:g}: too few snapshots" for width in tried if width not in widths]
    prior = main_average(checkpoint, path, trusted_modules)
    loss = _loss(checkpoint, path)
    images, record = _validation(prior, path, data, root, torch.device(device))
    bands = list(noise_bands(prior.card.metrics))

    def measured(sigma_rel: float | None) -> Candidate:
        chosen = main_average(checkpoint, path, trusted_modules)
        if sigma_rel is not None:
            use_width(chosen, averages, sigma_rel)
        sigma, errors = verify.errors_by_image(chosen.to(device), images, bands, record, device=device)
        return Candidate(sigma_rel, errors, loss.weight(sigma) * errors)

    candidates = [measured(sigma_rel) for sigma_rel in (None, *widths)]
    finite = [candidate for candidate in candidates if math.isfinite(candidate.loss)]
    if not finite:
        raise PriorError(f"checkpoint {path}: the validation loss of no average is finite")
    left_out += [
        f"{candidate.name}: its loss is not finite" for candidate in candidates if not math.isfinite(candidate.loss)
    ]
    finite.sort(key=lambda candidate: candidate.loss)
    best = finite[0]
    if best.sigma_rel is not None:
        use_width(prior, averages, best.sigma_rel)
    else:
        prior.card.training["moving average"] = "main"
    prior.card.training["validation loss by moving average"] = {c.name: float(f"{c.loss:.6g}") for c in finite}
    prior.card.metrics["val/loss"] = best.loss
    for (low, high), errors, losses in zip(bands, best.errors, best.losses, strict=True):
        prior.card.metrics[f"val/loss/{low:g}-{high:g}"] = float(losses.mean())
        prior.card.metrics[f"val/mse/{low:g}-{high:g}"] = float(errors.mean())
    prior.card.validation = dataclasses.asdict(record)
    return Choice(prior, finite, left_out)


def _loss(checkpoint: Mapping[str, Any], path: Path) -> DenoisingScoreMatching:
    weights = checkpoint["ema"]["loss"]
    if weights is None:
        raise PriorError(
            f"checkpoint {path}: its training's loss has weights of its own, which cannot be measured here; choose the average by its width"
        )
    return DenoisingScoreMatching(**weights)


def _validation(
    prior: Prior, path: Path, data: str | None, root: str, device: torch.device
) -> tuple[verify.ImageSet, verify.ValidationRecord]:
    """The validation images of the training, and how they are measured on ``device``."""
    record = verify.record_on(prior.card)
    if record is None or not noise_bands(prior.card.metrics):
        raise PriorError(
            f"checkpoint {path} does not say how its training was validated (it was written before the first validation, or the data "
            "is not an ImageData); choose the average by its width"
        )
    source = data if data is not None else record.data["source"]
    images = verify.validation_images(prior.card, record, source, None, root)
    if record.images_sha256 and record.images_sha256 != verify.fingerprint(images):
        raise PriorError(f"data = {source!r}: not the images that the training was validated on")
    if device.type != record.device:
        record = dataclasses.replace(record, device="cpu")  # where the noise is drawn instead
    return images, record
