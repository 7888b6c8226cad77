"""From a foreign file and what its user knows of the data to a portable prior."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dpnp_shared.prior import Prior, PriorCard, PriorError
from dpnp_training.data import DataDescription, ImageData
from dpnp_training.foreign import adm, diffusers, edm
from dpnp_training.foreign.adm import ADMOptions
from dpnp_training.foreign.edm import EDMOptions
from dpnp_training.foreign.weights import Converted

Format = Literal["adm", "diffusers", "edm"]


def import_prior(
    source: str | Path,
    *,
    format: Format,
    name: str,
    image_shape: tuple[int, int, int] | None = None,
    data_std: float | None = None,
    spread: float | None = None,
    images: str | Path | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    source_range: tuple[float, float] | None = None,
    sigma_range: tuple[float, float] | None = None,
    dataset: str = "not stated",
    license: str = "not stated",
    notes: str = "",
    options: ADMOptions | EDMOptions | None = None,
) -> Prior:
    """Convert another project's unconditional image network.

    The standard deviations of the data set the noise levels at which a sampler starts. No foreign file holds them: give both numbers, or
    images of the kind the network was trained on, from which they are measured.

    Args:
        source: the foreign file or folder.
        format: ``adm``: the state dict of a guided-diffusion or improved-diffusion U-Net;
            ``diffusers``: a folder with a ``UNet2DModel`` and its scheduler; ``edm``: the state dict of a network of EDM's code.
        name: title of the card.
        image_shape: ``(C, H, W)`` the network was trained at; may be left out where the file tells it.
        data_std: standard deviation of all pixel values of the data, in units of ``value_range``.
        spread: standard deviation of the data along its widest direction, in the same units.
        images: a folder of images, or any other source that :class:`~dpnp_training.data.ImageData` takes; brought to ``image_shape``.
        value_range: ``(low, high)`` of a pixel as the network sees it.
        source_range: ``(low, high)`` of the data's own values; that of ``images``, or 0 to 255, by default.
        sigma_range: ``(low, high)`` noise levels the prior may be used at; those the network was trained at by default.
        dataset: which data it was trained on, for the card.
        license: of weights and data, for the card.
        notes: free text for the card.
        options: what a file of this format does not say: :class:`ADMOptions` or :class:`EDMOptions`, none for ``diffusers``.

    Returns:
        The prior in evaluation mode, its parameters frozen.

    Raises:
        PriorError: the file is missing or damaged, or is not an unconditional network of this format; names the key.
        ValueError: an argument is missing or out of range.
    """
    converted = _convert(source, format, options)
    shape = _image_shape(image_shape, converted)
    provenance = dict(converted.provenance)
    if images is not None:
        if data_std is not None or spread is not None:
            raise ValueError(
                f"data_std = {data_std}, spread = {spread} and images = {str(images)!r}: give one or the other"
            )
        described = _describe(images, shape)
        unit = (value_range[1] - value_range[0]) / 2  # images are described in [-1, 1]
        data_std, spread = unit * described.data_std, unit * described.spread
        source_range = source_range if source_range is not None else described.source_range
        provenance["standard deviations measured on"] = described.dataset
    if data_std is None or spread is None:
        raise ValueError(
            f"data_std = {data_std}, spread = {spread}: the file does not hold the data's standard deviations; "
            "give both, or images to measure them on"
        )
    preconditioning = converted.preconditioning
    card = PriorCard(
        name=name,
        image_shape=shape,
        value_range=value_range,
        source_range=source_range if source_range is not None else (0.0, 255.0),
        sigma_range=sigma_range if sigma_range is not None else (preconditioning.sigma_min, preconditioning.sigma_max),
        data_std=data_std,
        spread=spread,
        dataset=dataset,
        license=license,
        training=provenance,
        notes=notes,
    )
    return Prior(converted.network, preconditioning, card).eval().requires_grad_(False)


def _convert(source: str | Path, format: Format, options: ADMOptions | EDMOptions | None) -> Converted:
    """The converter of the format, given options of its own kind."""
    if format == "adm" and (options is None or isinstance(options, ADMOptions)):
        return adm.convert(source, options)
    if format == "edm" and (options is None or isinstance(options, EDMOptions)):
        return edm.convert(source, options)
    if format == "diffusers" and options is None:
        return diffusers.convert(source)
    if format in ("adm", "edm", "diffusers"):
        raise ValueError(
            f"options = {options} do not belong to format = {format!r}; adm takes ADMOptions, edm EDMOptions, diffusers none"
        )
    raise ValueError(f"format = {format!r}; allowed are adm, diffusers and edm")


def _image_shape(given: tuple[int, int, int] | None, converted: Converted) -> tuple[int, int, int]:
    """The shape given, checked against the file's, or that of the file."""
    channels, height, width = converted.image_shape
    if given is None:
        if height < 1 or width < 1:
            raise ValueError(
                "image_shape is missing: the file does not tell at which (C, H, W) the network was trained"
            )
        return converted.image_shape
    if given[0] != channels:
        raise PriorError(f"image_shape = {tuple(given)}, but the network takes {channels} channels")
    return given


def _describe(images: str | Path, shape: tuple[int, int, int]) -> DataDescription:
    """The figures of the user's images, brought to the network's shape."""
    channels, height, width = shape
    data = ImageData(str(images), channels=channels if channels in (1, 3) else None, size=(height, width))
    data.prepare_data()
    data.setup("fit")
    description = data.description
    if description.image_shape != shape:
        raise ValueError(f"images = {str(images)!r} have shape {description.image_shape}, image_shape is {shape}")
    return description
