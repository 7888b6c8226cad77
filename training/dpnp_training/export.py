"""From a training checkpoint to a portable prior, its picture and its precision."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torchvision.utils import save_image

from dpnp_shared.preconditioning import EDM, Preconditioning
from dpnp_shared.prior import Prior, PriorCard, PriorError, build
from dpnp_shared.solvers import sample_unconditional
from dpnp_shared.task import Gram, TaskCard, TrainedTaskDenoiser
from dpnp_training.callbacks import image_grid, newest_picture
from dpnp_training.post_hoc import Averages
from dpnp_training.verify import precision_loss

Precision = Literal["float32", "float16", "bfloat16"]
EMA_PREFIX = "ema.ema_model."


def read_checkpoint(path: Path, *, task: bool = False) -> dict[str, Any]:
    """A checkpoint written by training, without running any code stored in it.

    Args:
        path: the file.
        task: whether it should be one of a task-dependent denoiser instead of one of a prior.

    Raises:
        PriorError: the file is missing or is not such a checkpoint.
    """
    if not path.is_file():
        raise PriorError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files; none may pass
        raise PriorError(f"checkpoint {path} cannot be read safely: {error}") from error
    if not isinstance(checkpoint, dict) or "prior" not in checkpoint:
        raise PriorError(f"checkpoint {path} holds no description of a prior; was it written by dpnp-train?")
    if ("task" in checkpoint["prior"]["card"]) is not task:
        kinds = "a prior", "a task-dependent denoiser (read by dpnp_training.export.task_from_checkpoint)"
        raise PriorError(f"checkpoint {path} is of {kinds[not task]}, not of {kinds[task]}")
    return checkpoint


def prior_from_checkpoint(
    file: str | Path, *, trusted_modules: Sequence[str] = (), sigma_rel: float | None = None
) -> Prior:
    """Read the averaged network out of a checkpoint without running any code stored in it.

    Args:
        file: a ``.ckpt`` written by training.
        trusted_modules: modules outside of this package whose classes may be imported.
        sigma_rel: relative width of the average, made from the profiles that training tracked
            (:class:`~dpnp_training.post_hoc.Averages`); the main average by default. The card's figures, which are those of the main
            average, are then left off.

    Returns:
        The prior, in evaluation mode.

    Raises:
        PriorError: the file is missing, is not such a checkpoint, its weights do not fit its network, or it does not hold what an average
            of width ``sigma_rel`` needs.
        ValueError: ``sigma_rel`` is out of range.
    """
    path = Path(file)
    checkpoint = read_checkpoint(path)
    prior = main_average(checkpoint, path, trusted_modules)
    if sigma_rel is not None:
        use_width(prior, Averages(checkpoint, path), sigma_rel)
    return prior


def task_from_checkpoint(file: str | Path, *, trusted_modules: Sequence[str] = ()) -> TrainedTaskDenoiser:
    """Read the averaged task-dependent denoiser out of a checkpoint without running any code stored in it.

    Args:
        file: a ``.ckpt`` written by training with a task.
        trusted_modules: modules outside of this package whose network may be imported.

    Raises:
        PriorError: the file is missing or is no such checkpoint.
    """
    checkpoint = read_checkpoint(Path(file), task=True)
    card = TaskCard(**checkpoint["prior"]["card"])
    preconditioning = build(checkpoint["prior"]["preconditioning"], ())
    if not isinstance(preconditioning, EDM):
        raise PriorError(f"checkpoint {file}: its preconditioning is not EDM")
    denoiser = TrainedTaskDenoiser(
        build(checkpoint["prior"]["network"], trusted_modules),
        preconditioning,
        Gram(card.image_shape, card.task["rank"]),
        torch.zeros(*card.task["measurement"]),
        torch.zeros(card.image_shape),
        card,
    )
    names = {
        EMA_PREFIX: "network.",
        "task.gram.": "gram.",
        "task.task.probe": "probe",
        "task.task.offset_entries": "offset",
    }
    weights = {
        new + key.removeprefix(old): value
        for key, value in checkpoint["state_dict"].items()
        for old, new in names.items()
        if key.startswith(old)
    }
    try:
        denoiser.load_state_dict(weights)
    except RuntimeError as error:
        raise PriorError(f"checkpoint {file}: {error}") from error
    return denoiser.eval().requires_grad_(False)


def main_average(checkpoint: Mapping[str, Any], path: Path, trusted_modules: Sequence[str] = ()) -> Prior:
    """The main average of a checkpoint that was read from ``path``; see :func:`prior_from_checkpoint`."""
    network = build(checkpoint["prior"]["network"], trusted_modules)
    preconditioning = build(checkpoint["prior"]["preconditioning"], trusted_modules)
    if not isinstance(preconditioning, Preconditioning):
        raise PriorError(f"checkpoint {path}: its preconditioning is not a Preconditioning")
    weights = {
        key.removeprefix(EMA_PREFIX): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(EMA_PREFIX)
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise PriorError(f"checkpoint {path}: {error}") from error
    return Prior(network, preconditioning, PriorCard(**checkpoint["prior"]["card"])).eval().requires_grad_(False)


def use_width(prior: Prior, averages: Averages, sigma_rel: float) -> None:
    """Give a checkpoint's prior the weights of another average, and a card without figures that says so.

    Raises:
        PriorError: the averages at hand do not come close to it.
        ValueError: ``sigma_rel`` is out of range.
    """
    prior.network.load_state_dict(averages.synthesise(sigma_rel))
    prior.card.metrics, prior.card.validation = {}, {}
    prior.card.training["moving average"] = (
        f"power function, σ_rel = {sigma_rel:g}, from {len(averages)} averages, error of the profile {averages.error(sigma_rel):.1%}"
    )


def samples_of_run(checkpoint: str | Path) -> bytes | None:
    """The newest picture of samples (PNG) of the run that wrote a checkpoint, ``samples/`` beside ``checkpoints/``, if there is one."""
    return newest_picture(Path(checkpoint).resolve().parents[1], "samples")


def draw_samples(prior: Prior, images: int, *, calls: int = 30, seed: int = 0) -> bytes:
    """A picture (PNG) of unconditional samples by the prior's probability flow.

    Args:
        prior: what to draw from.
        images: how many.
        calls: network calls of one image.
        seed: of the initial noise.

    Raises:
        PriorError: a sample is not finite.
    """
    device = next(prior.parameters()).device
    x = sample_unconditional(prior, images, generator=torch.Generator().manual_seed(seed), steps=calls, device=device)
    if not bool(torch.isfinite(x).all()):
        raise PriorError("the prior's samples are not finite")
    buffer = io.BytesIO()
    save_image(image_grid(x, prior.card.value_range), buffer, format="png")
    return buffer.getvalue()


def round_weights(prior: Prior, precision: Precision, *, images: int = 16, seed: int = 0) -> Prior:
    """The prior with its weights in another precision, and on its card what that changes.

    Args:
        prior: in full precision; it is left as it is.
        precision: of the weights.
        images: generated images on which the change of ``D(x; sigma)`` is measured.
        seed: of these images.

    Returns:
        A prior that computes in ``precision``; as it will be loaded by default, in float32 with the rounded weights, is how the change
        is measured.

    Raises:
        ValueError: an unknown precision.
        PriorError: a weight exceeds the range of ``precision``.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision = {precision!r}; allowed are {', '.join(get_args(Precision))}")
    dtype = getattr(torch, precision)
    network = copy.deepcopy(prior.network).to(dtype)
    large = [name for name, value in network.state_dict().items() if not bool(torch.isfinite(value).all())]
    if large:
        raise PriorError(
            f"precision = {precision!r}: {large[0]} has values beyond its range; bfloat16 has that of float32"
        )
    rounded = Prior(copy.deepcopy(network).float(), prior.preconditioning, prior.card)
    loss = precision_loss(prior, rounded, images=images, seed=seed)
    record = {
        "weights": precision,
        "images": images,
        "seed": seed,
        "difference": {f"{low:g}-{high:g}": list(values) for (low, high), values in loss.items()},
    }
    card = dataclasses.replace(prior.card, precision=record)
    return Prior(network, prior.preconditioning, card).eval().requires_grad_(False)
