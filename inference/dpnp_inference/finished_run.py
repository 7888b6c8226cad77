"""What the folder of a finished run holds, read back and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from dpnp_inference.files import MARKER
from dpnp_inference.posterior import Posterior

MEASUREMENT, TRUTH, DISPLAY = "measurement.npy", "truth.npy", "display.npy"


class RunFolderError(ValueError):
    """A folder is not that of a finished run, or a file in it is missing or damaged."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        record: ``run.json``.
        posterior: the draws and how they came about.
        measurement: ``(*y_shape)``, real or complex.
        display: the measurement as a picture ``(C', H', W')``, where the operator has one.
        truth: ``(C, H, W)`` if it is known.
    """

    folder: Path
    record: dict[str, Any]
    posterior: Posterior
    measurement: Tensor
    display: Tensor | None = None
    truth: Tensor | None = None

    @property
    def value_range(self) -> tuple[float, float] | None:
        """``(low, high)`` of a pixel in the prior's units; None in records that do not have it."""
        return self._range("value_range")

    @property
    def source_range(self) -> tuple[float, float] | None:
        """``(low, high)`` of the training data's own values, which lie at the ends of :attr:`value_range`."""
        return self._range("source_range")

    def _range(self, name: str) -> tuple[float, float] | None:
        found = self.record["prior"].get(name)
        return None if found is None else (float(found[0]), float(found[1]))


def read_run(folder: str | Path) -> Run:
    """Read the folder of a finished run.

    Args:
        folder: as ``dpnp-reconstruct`` wrote it.

    Returns:
        All that it holds.

    Raises:
        RunFolderError: it is no such folder, or a file is missing, damaged or does not fit the others; names the file.
    """
    path = Path(folder)
    if not path.is_dir():
        raise RunFolderError(f"run = {str(path)!r} is not a folder")
    if not (path / MARKER).is_file():
        raise RunFolderError(f"run = {str(path)!r} is not the folder of a finished run: {MARKER} is missing")
    try:
        record = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunFolderError(f"{path / MARKER} is damaged: {error}") from error
    known = (
        isinstance(record, dict) and isinstance(record.get("config"), dict) and isinstance(record.get("prior"), dict)
    )
    if not known or "check" in record:
        raise RunFolderError(f"{path / MARKER} is not the record of a reconstruction")
    try:
        posterior = Posterior.load(path)
    except FileNotFoundError as error:
        raise RunFolderError(str(error)) from error
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise RunFolderError(f"the draws in {path} are damaged: {error}") from error
    measurement = _read_array(path / MEASUREMENT)
    if measurement is None:
        raise RunFolderError(f"{path / MEASUREMENT} is missing")
    truth = _read_array(path / TRUTH)
    shape = tuple(posterior.samples.shape[2:])
    if truth is not None and tuple(truth.shape) != shape:
        raise RunFolderError(f"{path / TRUTH} has shape {tuple(truth.shape)}; that of a draw is {shape}")
    return Run(path, record, posterior, measurement, _read_array(path / DISPLAY), truth)


def _read_array(file: Path) -> Tensor | None:
    """A ``.npy`` file, None where there is none."""
    if not file.is_file():
        return None
    try:
        return torch.from_numpy(np.load(file, allow_pickle=False))
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise RunFolderError(f"{file} is damaged: {error}") from error
