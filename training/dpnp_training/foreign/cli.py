"""The subcommand ``dpnp-prior import``."""

from __future__ import annotations

from pathlib import Path

from dpnp_shared.prior import PriorError
from dpnp_training.foreign.adm import ADMOptions
from dpnp_training.foreign.edm import EDMOptions
from dpnp_training.foreign.importer import Format, import_prior


def import_folder(
    format: Format,
    source: str,
    directory: str,
    name: str | None = None,
    image_shape: tuple[int, int, int] | None = None,
    data_std: float | None = None,
    spread: float | None = None,
    images: str | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    source_range: tuple[float, float] | None = None,
    sigma_range: tuple[float, float] | None = None,
    dataset: str = "not stated",
    license: str = "not stated",
    notes: str = "",
    adm: ADMOptions | None = None,
    edm: EDMOptions | None = None,
) -> None:
    """Turn another project's unconditional network into a portable prior.

    Give ``--images``, or both ``--data_std`` and ``--spread``: no foreign file holds them.

    Args:
        format: ``adm`` (guided-diffusion or improved-diffusion U-Net), ``diffusers`` (folder with a UNet2DModel and its scheduler)
            or ``edm`` (network of EDM's code).
        source: the foreign file or folder.
        directory: the folder to write.
        name: title of the card; the folder's name by default.
        image_shape: (C, H, W) the network was trained at; may be left out where the file tells it.
        data_std: standard deviation of all pixel values of the data, in units of value_range.
        spread: standard deviation of the data along its widest direction, in the same units.
        images: folder of images of the kind the network was trained on, to measure both.
        value_range: (low, high) of a pixel as the network sees it.
        source_range: (low, high) of the data's own values; that of the images, or 0 to 255, by default.
        sigma_range: (low, high) noise levels the prior may be used at; those the network was trained at by default.
        dataset: which data the network was trained on, for the card.
        license: of weights and data, for the card.
        notes: free text for the card.
        adm: what a guided-diffusion file does not say.
        edm: what an EDM file does not say.
    """
    if adm is not None and edm is not None:
        raise PriorError("options of both adm and edm are given; the format is one of them")
    try:
        prior = import_prior(
            source,
            format=format,
            name=name if name is not None else Path(directory).name,
            image_shape=image_shape,
            data_std=data_std,
            spread=spread,
            images=images,
            value_range=value_range,
            source_range=source_range,
            sigma_range=sigma_range,
            dataset=dataset,
            license=license,
            notes=notes,
            options=adm if adm is not None else edm,
        )
    except (ValueError, FileNotFoundError) as error:  # of arguments and of the images
        raise PriorError(str(error)) from error
    print(f"prior written to {prior.save_pretrained(directory)}")
