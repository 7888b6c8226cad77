"""``dpnp-reconstruct export``: images of a finished run for other programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from dpnp_inference.export_images import Format, What, export_run
from dpnp_inference.finished_run import read_run


def export(arguments: list[str]) -> None:
    """Write images of a run.

    Args:
        arguments: of the command, after its name.

    Raises:
        RunFolderError: the folder is not that of a finished run, or a file in it is damaged.
        ValueError: as for :func:`~dpnp_inference.export_images.export_run`, also for what else it raises.
    """
    parser = argparse.ArgumentParser(
        prog="dpnp-reconstruct export", description="Images of a finished run as PNG, TIFF, NIfTI or DICOM files."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--format", required=True, choices=get_args(Format))
    parser.add_argument(
        "--what", default="mean,std", help=f"of {', '.join(get_args(What))}, with commas; mean,std by default"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument(
        "--quantiles", default="0.05,0.5,0.95", help="which ones, with commas; 0.05,0.5,0.95 by default"
    )
    parser.add_argument("--bits", type=int, default=8, help="of a PNG file, 8 or 16; 8 by default")
    parser.add_argument(
        "--like",
        help="DICOM or NIfTI file whose geometry the images take, of DICOM the patient as well; by default the geometry of the run's own "
        "input if it was such a file; none for no geometry",
    )
    given = parser.parse_args(arguments)
    try:
        quantiles = [float(q) for q in given.quantiles.split(",")]
    except ValueError as error:
        raise ValueError(f"quantiles = {given.quantiles!r}; needed are numbers with commas between them") from error
    files = export_run(
        read_run(given.run),
        given.format,
        given.what.split(","),
        given.output,
        quantiles=quantiles,
        bits=given.bits,
        like=given.like,
    )
    print(f"{len(files)} files in {given.output}")
