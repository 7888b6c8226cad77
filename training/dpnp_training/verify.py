r"""Measuring a prior's figures again: the denoising error on validation images, by band of the noise level.

The noise is drawn as the validation of :class:`~dpnp_training.module.ScoreMatching` draws it, from the numbers that a
:class:`ValidationRecord` on the card holds, so that a figure can be measured again to rounding. Where that cannot be
(no record, or noise that was drawn on a device that is not here) the figures are compared within their Monte Carlo error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dpnp_shared.model_card import noise_bands
from dpnp_shared.prior import CONFIG, README, Prior, PriorCard, PriorError, denoise, locate, read_config, sha256
from dpnp_shared.randomness import derive_seed
from dpnp_shared.solvers import sample_unconditional
from dpnp_training.data import ImageData
from dpnp_training.losses import error_in_band
from dpnp_training.share import Share

BANDS = (0.02, 0.07, 0.2, 0.6, 2.0, 6.0, 20.0)
EXACT_TOLERANCE = 0.01
"""Relative difference allowed between mean squared errors of the same noise on the same images: other devices and kernels."""
STANDARD_ERRORS = 5.0
"""Standard errors of the difference allowed between mean squared errors of different noise."""
FINGERPRINTED = 16


class ImageSet(Protocol):
    """Images by index."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int) -> Tensor:
        """``(C, H, W)``, in the prior's value range."""
        ...


@dataclass
class ValidationRecord:
    """What it takes to measure a card's figures by noise band again.

    Attributes:
        batches: validation batches of each process.
        batch_size: images of one batch and process.
        processes: that shared the validation images (one after the other, as a distributed sampler deals them).
        seed: of the noise, the module's.
        device: type of the device that drew the noise; another one draws other numbers from the same seed.
        images_sha256: fingerprint of the first images.
        data: arguments of :class:`~dpnp_training.data.ImageData` that chose the images.
    """

    batches: int
    batch_size: int
    processes: int = 1
    seed: int = 0
    device: str = "cpu"
    images_sha256: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.batches, self.batch_size, self.processes) < 1 or self.seed < 0:
            raise ValueError(
                f"validation record: batches = {self.batches}, batch_size = {self.batch_size} and processes = {self.processes} "
                f"must be positive, seed = {self.seed} at least 0"
            )


class Errors(NamedTuple):
    """Denoising errors of one band, over images and pixels."""

    mse: float
    standard_error: float
    images: int


class Comparison(NamedTuple):
    """A figure of the card and the same figure measured now."""

    band: tuple[float, float]
    card: float
    measured: float
    allowed: float
    """Largest absolute difference."""

    @property
    def agrees(self) -> bool:
        """Whether the difference is allowed; no number agrees with NaN."""
        return abs(self.measured - self.card) <= self.allowed


def denoising_errors(
    prior: Prior,
    images: ImageSet,
    bands: Sequence[tuple[float, float]],
    record: ValidationRecord,
    *,
    device: torch.device | str = "cpu",
) -> dict[tuple[float, float], Errors]:
    """Mean squared error of ``D(x_0 + σ w; σ)`` in each band, σ uniform in log σ.

    Args:
        prior: on ``device``.
        images: validation images.
        bands: ``(low, high)`` of σ, in the order in which training validates them.
        record: how many images, in which batches, with which noise.
        device: where the prior is; noise is drawn there if the record's noise was drawn on such a device, else on the CPU.

    Raises:
        PriorError: there are fewer images than the record says.
    """
    _, errors = errors_by_image(prior, images, bands, record, device=device)
    return {band: _summary(found) for band, found in zip(bands, errors, strict=True)}


@torch.no_grad()
def errors_by_image(
    prior: Prior,
    images: ImageSet,
    bands: Sequence[tuple[float, float]],
    record: ValidationRecord,
    *,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """What :func:`denoising_errors` is the mean of: noise levels and squared errors, both ``(bands, images)`` on the CPU."""
    noise_device = torch.device(device) if torch.device(device).type == record.device else torch.device("cpu")
    # a distributed sampler deals the images in turn, and repeats the first ones until all have the same number
    length = math.ceil(len(images) / record.processes) * record.processes
    if (record.batches - 1) * record.batch_size >= length // record.processes:
        raise PriorError(
            f"the data holds {len(images)} validation images; the card's figures were measured on {record.batches} batches of "
            f"{record.batch_size} on each of {record.processes} processes"
        )
    order = [i % len(images) for i in range(length)]
    found: list[Tensor] = []  # of each batch, (2, bands, images)

    def denoiser(
        x: Tensor, sigma: Tensor
    ) -> Tensor:  # as training has it: bands may reach beyond the card's noise levels
        return denoise(prior.network, prior.preconditioning, x.to(device), sigma.to(device)).to(noise_device)

    for rank in range(record.processes):
        mine = order[rank :: record.processes]
        for batch in range(record.batches):
            chosen = mine[batch * record.batch_size : (batch + 1) * record.batch_size]
            x_0 = torch.stack([images[i] for i in chosen]).to(noise_device)
            share = Share(
                len(x_0), len(x_0) * record.processes, rank, record.processes, prior.preconditioning.noise_field
            )
            of_batch = []
            for band, ends in enumerate(bands):
                generator = torch.Generator(noise_device).manual_seed(derive_seed(record.seed, 1, batch, band))
                of_batch.append(torch.stack(error_in_band(denoiser, x_0, ends, generator=generator, share=share)))
            found.append(torch.stack(of_batch, dim=1).double().cpu())
    sigma, errors = torch.cat(found, dim=2)
    return sigma, errors


def _summary(errors: Tensor) -> Errors:
    n = len(errors)
    return Errors(float(errors.mean()), float(errors.std()) / math.sqrt(n) if n > 1 else math.inf, n)


def fingerprint(images: ImageSet) -> str:
    """SHA-256 of the first images at 8 bits, by which other data is told from another prior."""
    digest = hashlib.sha256()
    for i in range(min(FINGERPRINTED, len(images))):
        digest.update((images[i] * 127.5 + 127.5).round().to(torch.int32).numpy().tobytes())
    return digest.hexdigest()


def record_of(data: ImageData, *, batches: int, processes: int, seed: int, device: str) -> ValidationRecord:
    """The record of a validation on ``data``.

    Args:
        data: set up.
        batches: validation batches of each process.
        processes: that share the images.
        seed: of the noise.
        device: type of the device that draws it.
    """
    names = (
        "source",
        "split",
        "validation_split",
        "validation_fraction",
        "column",
        "key",
        "channels",
        "size",
        "resize",
        "value_range",
        "axis",
        "on_error",
        "streaming",
        "validation_images",
        "seed",
    )
    # only what differs from the default, as plain values
    default = ImageData(data.source)
    chosen: dict[str, Any] = {"source": data.source}
    for name in names[1:]:
        value = getattr(data, name)
        if value != getattr(default, name):
            chosen[name] = list(value) if isinstance(value, tuple) else value
    if data.clip:
        chosen["value_window"] = chosen.pop("value_range")
    images: Any = data.validation_set
    return ValidationRecord(batches, data.batch_size, processes, seed, device, fingerprint(images), chosen)


def record_on(card: PriorCard) -> ValidationRecord | None:
    """The card's record, if it has one.

    Raises:
        PriorError: it has one that cannot be read.
    """
    if not card.validation:
        return None
    try:
        return ValidationRecord(**card.validation)
    except (TypeError, ValueError) as error:
        raise PriorError(f"the card's validation record cannot be read: {error}") from error


def validation_images(
    card: PriorCard, record: ValidationRecord | None, source: str, split: str | None, root: str
) -> ImageSet:
    """The validation images of a data set, brought to the prior's shape and value range.

    Args:
        card: of the prior.
        record: how the card's images were chosen, if known.
        source: where the data is here; see :class:`~dpnp_training.data.ImageData`.
        split: a split to take all images of; by default what the record says, or else the split ``test``.
        root: folder of torchvision's data sets.

    Raises:
        PriorError: the images do not have the prior's shape.
        ValueError: as :class:`~dpnp_training.data.ImageData`.
        FileNotFoundError: there is no such data.
    """
    c, h, w = card.image_shape
    if record is not None and split is None:
        arguments = {**record.data, "source": source}
        for name in ("size", "value_range", "value_window"):
            if isinstance(arguments.get(name), list):
                arguments[name] = tuple(arguments[name])
    else:
        split = split or "test"
        arguments = {
            "source": source,
            "split": split,
            "validation_split": split,
            "value_range": card.source_range,
            "size": (h, w),
        }
        arguments["channels"] = c if c in (1, 3) else None
    data = ImageData(**arguments, root=root)
    data.setup("validate")
    images: Any = data.validation_set
    shape = tuple(images[0].shape)
    if shape != card.image_shape:
        raise PriorError(f"the images of {source!r} have shape {shape}, the prior's {card.image_shape} (C, H, W)")
    return images  # type: ignore[no-any-return]


def compare(
    card: PriorCard,
    measured: Mapping[tuple[float, float], Errors],
    *,
    same_noise: bool,
    tolerance: float = EXACT_TOLERANCE,
) -> list[Comparison]:
    """The card's mean squared errors beside those measured now.

    Args:
        card: of the prior.
        measured: by :func:`denoising_errors`.
        same_noise: whether images and noise were those of the card's figures.
        tolerance: relative difference that is allowed in any case; with other noise, five standard errors of the difference of two
            such measurements are allowed on top.
    """
    comparisons = []
    for band, figures in noise_bands(card.metrics).items():
        if "mse" in figures and band in measured:
            found = measured[band]
            allowed = tolerance * figures["mse"]
            if not same_noise:
                allowed += STANDARD_ERRORS * math.sqrt(2) * found.standard_error
            comparisons.append(Comparison(band, figures["mse"], found.mse, allowed))
    return comparisons


def check_folder(
    name: str, *, revision: str | None = None, trusted_modules: Sequence[str] = ()
) -> tuple[Prior, list[str], list[str]]:
    """Everything that can be checked without data.

    Args:
        name: as :meth:`~dpnp_shared.prior.Prior.from_pretrained` takes it.
        revision: of a prior on the Hub.
        trusted_modules: modules outside of this package whose classes may be imported.

    Returns:
        The prior, what was found in order, and what was not.

    Raises:
        PriorError: format, signature, hash, keys, shapes or values of the weights are wrong.
    """
    prior = Prior.from_pretrained(name, revision=revision, trusted_modules=trusted_modules)
    folder = locate(name, revision)
    config = read_config(folder, quiet=True)
    weights = prior.network.state_dict().values()
    passed = [
        f"format: {CONFIG}, written by {config['written_by']}",
        f"weights: hash, keys and shapes; {sum(value.numel() for value in weights):,} numbers, all finite",
    ]
    failed: list[str] = []
    signed = config.get("readme_sha256")
    if signed is None:
        passed.append("signature: none, the folder is of an older format; `dpnp-prior migrate` adds one")
    else:
        passed.append(f"signature: {config['content_sha256']}")
        same = (folder / README).is_file() and sha256(folder / README) == signed
        (passed if same else failed).append(f"{README}: {'as' if same else 'not as'} it was written from the card")
    x = torch.randn((1, *prior.image_shape), generator=torch.Generator().manual_seed(0))
    levels = torch.logspace(math.log10(prior.sigma_min), math.log10(prior.sigma_max), 5).tolist()[1:-1]
    levels = [prior.sigma_min, *levels, prior.sigma_max]
    with torch.no_grad():
        broken = [sigma for sigma in levels if not bool(torch.isfinite(prior(sigma * prior.colour(x), sigma)).all())]
    where = ", ".join(f"{sigma:.3g}" for sigma in broken or levels)
    (failed if broken else passed).append(f"D(x; σ): {'not finite' if broken else 'finite'} at σ = {where}")
    return prior, passed, failed


@torch.no_grad()
def precision_loss(
    exact: Prior, rounded: Prior, *, images: int = 16, seed: int = 0, calls: int = 20
) -> dict[tuple[float, float], tuple[float, float]]:
    """RMS change of ``D(x; σ)`` by another precision of the weights, on images that the exact prior generates.

    Args:
        exact: the prior in its own precision.
        rounded: the same with rounded weights.
        images: how many images to generate; a batch of all of them must fit into memory.
        seed: of images and noise.
        calls: network calls of one generated image.

    Returns:
        For each band of σ within the prior's range: the change relative to the RMS of ``D(x; σ)``, and relative to the RMS error of
        ``D(x; σ)`` as an estimate of the generated image.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    x_0 = sample_unconditional(exact, images, generator=generator, steps=calls)
    losses = {}
    for index, (low, high) in enumerate(bands_of(exact.card)):
        generator = torch.Generator().manual_seed(derive_seed(seed, 1, index))
        sigma = low * (high / low) ** torch.rand(images, generator=generator)
        x = x_0 + sigma.reshape(-1, 1, 1, 1) * exact.colour(torch.randn(x_0.shape, generator=generator))
        d = exact(x, sigma)
        change = _rms(rounded(x, sigma) - d)
        losses[low, high] = (change / _rms(d), change / _rms(d - x_0))
    return losses


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.double().square().mean()))


def bands_of(card: PriorCard) -> list[tuple[float, float]]:
    """The card's bands of σ, or the usual ones, as far as the prior's noise levels reach."""
    bands = list(noise_bands(card.metrics)) or list(itertools.pairwise(BANDS))
    low, high = card.sigma_range
    inside = [(max(a, low), min(b, high)) for a, b in bands if a < high and b > low]
    return inside or [(low, high)]


def with_figures(
    card: PriorCard, measured: Mapping[tuple[float, float], Errors], record: ValidationRecord
) -> PriorCard:
    """The card with newly measured figures and their record; figures by band that were there before are dropped."""
    kept = {name: value for name, value in card.metrics.items() if not name.startswith("val/")}
    figures = {f"val/mse/{low:g}-{high:g}": errors.mse for (low, high), errors in measured.items()}
    return dataclasses.replace(card, metrics={**figures, **kept}, validation=dataclasses.asdict(record))
