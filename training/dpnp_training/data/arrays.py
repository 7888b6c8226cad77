"""Array files: ``.npy``, ``.npz`` and HDF5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dpnp_shared.optional import load
from dpnp_training.data.images import Rows

SUFFIXES = (".npy", ".npz", ".h5", ".hdf5")


class OnDisk:
    """An array in a file, read as it is needed. Each process opens the file itself, so that none copies the array.

    Args:
        path: a ``.npy`` file, or one of HDF5.
        key: name of the data set in an HDF5 file.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path, self.key = path, key
        self._open: Any = None
        self.shape: tuple[int, ...] = tuple(self._array().shape)
        self._open = None  # HDF5 handles do not survive a fork

    def _array(self) -> Any:
        if self._open is None:
            if self.path.suffix == ".npy":
                self._open = np.load(self.path, mmap_mode="r", allow_pickle=False)
            else:
                self._open = load("h5py", "medical").File(self.path, "r")[self.key]
        return self._open

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Any:
        return self._array()[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}


def array_rows(path: Path, key: str | None) -> Rows:
    """Images of an array file.

    ``.npy`` and HDF5 stay on disk; the array of a ``.npz`` file is read into memory, as it may be compressed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the array is not one of images, or ``key`` is missing or wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"source = {str(path)!r} does not exist")
    rows: Any
    if path.suffix == ".npy":
        rows = OnDisk(path)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            rows = arrays[_choose(path, key, arrays.files)]
    else:
        h5py = load("h5py", "medical")
        with h5py.File(path, "r") as file:
            names: list[str] = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        rows = OnDisk(path, _choose(path, key, names))
    if len(rows.shape) not in (3, 4):
        raise ValueError(f"{path} has shape {rows.shape}; needed is (N, H, W), (N, H, W, C) or (N, C, H, W)")
    return rows  # type: ignore[no-any-return]


def _choose(path: Path, key: str | None, names: list[str]) -> str:
    if key is None and len(names) != 1:
        raise ValueError(f"{path} holds the arrays {names}; name one by key")
    if key is not None and key not in names:
        raise ValueError(f"key = {key!r}; {path} holds {names}")
    return key if key is not None else names[0]
