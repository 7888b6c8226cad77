"""Anyone's images as batches in [-1, 1].

The value range is handled here and nowhere else: whatever the data's own values are, the network sees [-1, 1], and the prior's card
records the range they were mapped from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset
from torchvision.transforms.v2 import functional as TF  # noqa: N812 - torchvision's own convention

from dpnp_shared.randomness import derive_seed

INTEGER_RANGES = {np.dtype(bool): 1.0, np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}


@dataclass
class DataDescription:
    """The figures of a data set that end up on the prior's card.

    Attributes:
        name: title of the prior's card.
        image_shape: ``(C, H, W)``.
        value_range: of a pixel as the network sees it.
        source_range: of a pixel in the data, mapped linearly onto ``value_range``.
        data_std: standard deviation of all pixel values, in units of ``value_range``.
        spread: standard deviation along the widest direction, in the same units.
        dataset: where the images come from and how many they are.
        license: of the data.
    """

    name: str
    image_shape: tuple[int, int, int]
    value_range: tuple[float, float]
    source_range: tuple[float, float]
    data_std: float
    spread: float
    dataset: str
    license: str


class Rows(Protocol):
    """Random access to raw images."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> Any:
        """A PIL image or an array."""
        ...


class ImageData(L.LightningDataModule):
    """Images from where they are.

    Args:
        source: one of

            - ``torchvision:FashionMNIST``: a torchvision data set, kept below ``root``;
            - a folder with ``dataset_info.json`` (``datasets``' ``save_to_disk``), with ``.parquet`` or ``.arrow`` files, or with
              images (sub-folders included);
            - a ``.parquet`` or ``.arrow`` file; a ``.npy`` or ``.npz`` file holding ``(N, H, W)``, ``(N, H, W, C)`` with C of at
              most 4, or ``(N, C, H, W)``;
            - the Hub id of a data set.
        split: which split to train on, where the source has splits.
        validation_split: which split to validate on; without it, ``validation_fraction`` of the training images is held out.
        validation_fraction: used where there is no ``validation_split``.
        column: column of the images in a ``datasets`` table; found by its type if not given.
        key: name of the array in a ``.npz`` file; needed if it holds several.
        channels: convert every image to so many channels (1 gray, 3 RGB); by default images are taken as they are.
        size: resize the shorter side to it and crop the centre, ``(H, W)`` or one number; by default images are taken as they are.
        value_range: ``(low, high)`` of the data's values; known for integer images, needed for floating-point ones.
        root: folder of torchvision's data sets.
        download: let torchvision fetch a data set that is not in ``root``.
        batch_size: images a step and device.
        workers: loader processes.
        name: title of the prior's card.
        license: licence of the data, for the card.
        seed: of the order of the images and of the held-out choice.

    Raises:
        ValueError: an argument out of range, or data that does not fit; names the first offending image.
        FileNotFoundError: ``source`` looks like a path and does not exist.
    """

    def __init__(
        self,
        source: str,
        split: str = "train",
        validation_split: str | None = None,
        validation_fraction: float = 0.05,
        column: str | None = None,
        key: str | None = None,
        channels: int | None = None,
        size: int | tuple[int, int] | None = None,
        value_range: tuple[float, float] | None = None,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        workers: int = 0,
        name: str | None = None,
        license: str = "not stated",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction = {validation_fraction}; it must be in (0, 1)")
        if batch_size < 1 or workers < 0:
            raise ValueError(f"batch_size = {batch_size} must be positive and workers = {workers} at least 0")
        if channels not in (None, 1, 3):
            raise ValueError(
                f"channels = {channels}; images can be converted to 1 (gray) or 3 (RGB), or left as they are"
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value_range = {value_range} must increase")
        self.source, self.split, self.validation_split = source, split, validation_split
        self.validation_fraction = validation_fraction
        self.column, self.key, self.root, self.download = column, key, root, download
        self.channels, self.value_range = channels, value_range
        self.size = (size, size) if isinstance(size, int) else size
        self.batch_size, self.workers = batch_size, workers
        self.title = name if name is not None else f"prior of {source}"
        self.license, self.seed = license, seed
        self._description: DataDescription | None = None

    def prepare_data(self) -> None:
        """Fetch on one process what would otherwise be fetched by all of them."""
        for split in filter(None, (self.split, self.validation_split)):
            self._rows(split)

    def setup(self, stage: str) -> None:
        """Open the data and look at the first image."""
        train = self._images(self.split)
        if self.validation_split is not None:
            self.train_set: Dataset[Tensor] = train
            self.validation_set: Dataset[Tensor] = self._images(self.validation_split)
        else:
            held_out = max(1, round(len(train) * self.validation_fraction))
            if held_out >= len(train):
                raise ValueError(f"source = {self.source!r} holds {len(train)} images; at least 2 are needed")
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(derive_seed(self.seed))).tolist()
            self.train_set = Subset(train, order[held_out:])
            self.validation_set = Subset(train, order[:held_out])
        self._images_description = train

    @property
    def description(self) -> DataDescription:
        """The data's figures; the spread is measured once, on up to 4,096 training images."""
        if self._description is None:
            images = self._images_description
            data_std, spread = measure_spread(self.train_set)
            self._description = DataDescription(
                name=self.title,
                image_shape=images.image_shape,
                value_range=(-1.0, 1.0),
                source_range=images.source_range,
                data_std=data_std,
                spread=spread,
                dataset=f"{self.source}, {len(self.train_set)} training images",  # type: ignore[arg-type]
                license=self.license,
            )
        return self._description

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches ``(B, C, H, W)`` in [-1, 1], shuffled anew each epoch; the last incomplete one is dropped."""
        length = len(self.train_set)  # type: ignore[arg-type]
        return self._loader(self.train_set, self._sampler(), drop_last=length >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches in order."""
        return self._loader(self.validation_set, None, drop_last=False)

    def _sampler(self) -> Sampler[int]:
        """An order that depends on seed and epoch only, so that a resumed training sees the images as an uninterrupted one does."""
        trainer = self.trainer
        return DistributedSampler(
            self.train_set,
            num_replicas=trainer.world_size if trainer else 1,
            rank=trainer.global_rank if trainer else 0,
            seed=derive_seed(self.seed) % 2**31,
        )

    def _loader(self, data: Dataset[Tensor], sampler: Sampler[int] | None, *, drop_last: bool) -> DataLoader[Tensor]:
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _images(self, split: str) -> Images:
        return Images(self._rows(split), self.source, self.channels, self.size, self.value_range)

    def _rows(self, split: str) -> Rows:
        if self.source.startswith("torchvision:"):
            return _torchvision_rows(self.source.removeprefix("torchvision:"), self.root, split, self.download)
        path = Path(self.source).expanduser()
        if path.suffix in (".npy", ".npz"):
            return _array_rows(path, self.key)
        return _table_rows(self.source, path, split, self.column)


class Images(Dataset[Tensor]):
    """Raw images as float32 tensors in [-1, 1], all of one shape.

    Args:
        rows: the raw images.
        source: name of the data, for messages.
        channels: convert to so many channels.
        size: resize and crop to ``(H, W)``.
        value_range: of the raw values, if the dtype does not tell.
    """

    def __init__(
        self,
        rows: Rows,
        source: str,
        channels: int | None,
        size: tuple[int, int] | None,
        value_range: tuple[float, float] | None,
    ) -> None:
        if len(rows) == 0:
            raise ValueError(f"source = {source!r} holds no image")
        self.rows, self.source, self.channels, self.size = rows, source, channels, size
        first = self._array(0)
        if value_range is None and first.dtype not in INTEGER_RANGES:
            raise ValueError(
                f"source = {source!r} holds {first.dtype} values, whose range is not known; give value_range, "
                f"for example [{float(first.min()):g}, {float(first.max()):g}] (the first image's)"
            )
        self.dtype = first.dtype if value_range is None else None
        self.source_range = value_range if value_range is not None else (0.0, INTEGER_RANGES[first.dtype])
        self._shape: tuple[int, ...] | None = None
        c, h, w = self[0].shape
        self.image_shape = (c, h, w)
        self._shape = (c, h, w)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        low, high = self.source_range
        array = self._array(index)
        if self.dtype is not None and array.dtype != self.dtype:
            raise ValueError(
                f"image {index} of {self.source!r} holds {array.dtype} values, the first {self.dtype}; "
                "give the value_range that is common to all"
            )
        x = torch.from_numpy(array.astype(np.float32))
        x = 2 * (x - low) / (high - low) - 1
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"image {index} of {self.source!r} contains values that are not finite")
        if self.size is not None:
            # the shorter side (relative to the wanted shape) is matched, the rest cropped
            scale = max(self.size[0] / x.shape[1], self.size[1] / x.shape[2])
            shape = [max(s, round(n * scale)) for s, n in zip(self.size, x.shape[1:], strict=True)]
            x = TF.center_crop(TF.resize(x, shape, antialias=True), list(self.size))
        if self._shape is not None and x.shape != self._shape:
            raise ValueError(
                f"image {index} of {self.source!r} has shape {tuple(x.shape)}, the first has {tuple(self._shape)} (C, H, W); "
                "give size (and channels) to bring all to one shape"
            )
        return x

    def _array(self, index: int) -> np.ndarray[Any, np.dtype[Any]]:
        """The raw image as ``(C, H, W)``."""
        row = self.rows[index]
        if isinstance(row, Image.Image):
            if self.channels is not None and not row.mode.startswith(("I", "F")):
                row = row.convert("L" if self.channels == 1 else "RGB")
            elif row.mode == "P":
                row = row.convert("RGB")
            array = np.asarray(row)
            array = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
            if array.dtype == np.int32:  # PIL's mode of 16-bit files
                array = array.astype(np.uint16)
        else:
            array = np.asarray(row)
            if array.ndim == 2:
                array = array[None]
            elif array.ndim == 3 and array.shape[-1] <= 4 < array.shape[0]:
                array = np.moveaxis(array, -1, 0)
        if array.ndim != 3:
            raise ValueError(
                f"image {index} of {self.source!r} has shape {array.shape}; needed is (H, W) or three axes"
            )
        if self.channels is not None and array.shape[0] != self.channels:
            if array.shape[0] == 1:
                array = np.repeat(array, self.channels, axis=0)
            else:
                raise ValueError(
                    f"image {index} of {self.source!r} has {array.shape[0]} channels, channels = {self.channels}"
                )
        return np.ascontiguousarray(array)


def _torchvision_rows(name: str, root: str, split: str, download: bool) -> Rows:
    """Images of a torchvision data set, labels left out."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, name, None)
    if kind is None:
        raise ValueError(f"source = 'torchvision:{name}': torchvision.datasets has no {name}")
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}; torchvision data sets have 'train' and 'test'")
    try:
        data = kind(root, train=split == "train", download=download)
    except RuntimeError as error:
        raise FileNotFoundError(f"source = 'torchvision:{name}' below root = {root!r}: {error}") from error
    return _Mapped(data, lambda item: item[0])


def _array_rows(path: Path, key: str | None) -> Rows:
    """Images of an array file, read from disk as they are needed (``.npy``)."""
    if not path.is_file():
        raise FileNotFoundError(f"source = {str(path)!r} does not exist")
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        with np.load(path, allow_pickle=False) as arrays:
            if key is None and len(arrays.files) != 1:
                raise ValueError(f"{path} holds the arrays {arrays.files}; name one by key")
            if key is not None and key not in arrays.files:
                raise ValueError(f"key = {key!r}; {path} holds {arrays.files}")
            array = arrays[key or arrays.files[0]]
    if array.ndim not in (3, 4):
        raise ValueError(f"{path} has shape {array.shape}; needed is (N, H, W), (N, H, W, C) or (N, C, H, W)")
    rows: Rows = array
    return rows


def _table_rows(source: str, path: Path, split: str, column: str | None) -> Rows:
    """Images of a ``datasets`` table."""
    import datasets

    files = [str(path)] if path.is_file() else sorted(map(str, (*path.rglob("*.parquet"), *path.rglob("*.arrow"))))
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"split = {split!r}; {source!r} has {list(table)}")
            table = table[split]
    elif path.is_file() and path.suffix not in (".parquet", ".arrow"):
        raise ValueError(f"source = {source!r}; files may be .parquet, .arrow, .npy or .npz")
    elif files:
        table = datasets.load_dataset(Path(files[0]).suffix[1:], data_files={split: files}, split=split)
    elif path.is_dir():
        table = datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
    elif path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"source = {source!r} does not exist")
    else:
        table = datasets.load_dataset(source, split=split)
    if column is None:
        column = _image_column(table.features)
    elif column not in table.features:
        raise ValueError(f"column = {column!r}; the table has {list(table.features)}")
    return _Mapped(table.select_columns([column]), lambda item: item[column])


def _image_column(features: Any) -> str:
    """The one column that holds images, or failing that the one that holds arrays."""
    import datasets

    kinds: Sequence[Any] = (datasets.Image, (datasets.Array2D, datasets.Array3D))
    for kind in kinds:
        found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"several columns hold images, {found}; name one by column")
    raise ValueError(f"no column holds images; the table has {dict(features)}")


class _Mapped:
    """Rows seen through a function."""

    def __init__(self, rows: Any, function: Callable[[Any], Any]) -> None:
        self.rows, self.function = rows, function

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.rows[index])


def measure_spread(data: Dataset[Tensor], most_images: int = 4096, most_values: int = 2 * 10**8) -> tuple[float, float]:
    """Pixel standard deviation and standard deviation along the widest direction, on evenly chosen images.

    Args:
        data: images ``(C, H, W)``.
        most_images: upper limit of images looked at.
        most_values: upper limit of pixel values held in memory.

    Returns:
        Both in image units. The second is the square root of the largest eigenvalue of the sample covariance.
    """
    length = len(data)  # type: ignore[arg-type]
    n = max(2, min(length, most_images, most_values // max(1, data[0].numel())))
    x = torch.stack([data[i].flatten() for i in np.linspace(0, length - 1, n).astype(int).tolist()])
    data_std = float(x.std())
    x -= x.mean(0)
    small = x @ x.T if n <= x.shape[1] else x.T @ x
    spread = float(torch.linalg.eigvalsh(small.double())[-1].clamp(min=0) / (n - 1)) ** 0.5
    if not (data_std > 0 and spread > 0):
        raise ValueError("all images are equal; there is nothing to learn from them")
    return data_std, spread
