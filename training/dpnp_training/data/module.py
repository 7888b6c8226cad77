"""The data module: which source, which split, which batches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from dpnp_shared.medical import DICOM_SUFFIXES, NIFTI_SUFFIXES, Dicom, Nifti
from dpnp_shared.randomness import derive_seed
from dpnp_training.data import arrays
from dpnp_training.data.cached import CachedImages, fingerprint_files
from dpnp_training.data.description import DataDescription, measure_spread
from dpnp_training.data.files import Files, OnError, Reader, list_files, with_suffix
from dpnp_training.data.folders import folder_rows
from dpnp_training.data.images import Crop, Images, Rows
from dpnp_training.data.order import EpochSampler, ResumableLoader
from dpnp_training.data.pictures import Pictures
from dpnp_training.data.stream import HeldOut, Position, Stream, StreamBatch, StreamedTable, collate
from dpnp_training.data.tables import Table, is_table, table_rows, torchvision_rows


class ImageData(L.LightningDataModule):
    """Images from where they are.

    Args:
        source: one of

            - ``torchvision:FashionMNIST``: a torchvision data set, kept below ``root``;
            - a folder with ``dataset_info.json`` (``datasets``' ``save_to_disk``), with ``.parquet`` or ``.arrow`` files, or with
              pictures (JPEG, PNG, TIFF, …), ``.dcm`` or ``.nii`` and ``.nii.gz`` files (sub-folders included);
            - ``dicom:path/to/folder``: a folder of DICOM files, whatever their names;
            - a ``.parquet`` or ``.arrow`` file; a ``.npy``, ``.npz`` or HDF5 file holding ``(N, H, W)``, ``(N, H, W, C)`` with C of
              at most 4, or ``(N, C, H, W)``;
            - the Hub id of a data set.
        split: which split to train on, where the source has splits; of a folder of files, the sub-folder of that name if it exists.
        validation_split: which split to validate on; without it, ``validation_fraction`` of the training images is held out.
        validation_fraction: used where there is no ``validation_split``.
        column: column of the images in a ``datasets`` table; found by its type if not given.
        key: name of the array in a ``.npz`` or HDF5 file; needed if it holds several.
        channels: convert every image to so many channels (1 gray, 3 RGB); by default images are taken as they are.
        size: ``(H, W)`` or one number, what the network sees; by default images are taken as they are.
        crop: where the window of ``size`` lies: ``center``, or ``random``, anew in each epoch (validation: always the centre).
        resize: bring the shorter side to ``size`` first; if false, the window is cut out at full resolution.
        value_range: ``(low, high)`` of the data's values; by default that of each image's integer type, needed for floating-point
            images.
        value_window: as ``value_range``, and values outside of it are cut off (for example Hounsfield units ``[-1000, 2000]``).
        axis: anatomical axis along which NIfTI volumes are cut: 0 sagittal, 1 coronal, 2 axial slices.
        on_error: a file of a folder that cannot be read is refused (``raise``), or named and left out (``skip``).
        streaming: read a table (Parquet, Arrow, Hub) from beginning to end, over and over, instead of opening it; an epoch never
            ends, so that ``trainer.max_steps`` is needed.
        shuffle_buffer: examples of a stream that are shuffled together, in each loader process.
        validation_images: examples of a stream that are held out, where there is no ``validation_split``.
        cache_images: decode and resize all images once, into one array on disk that later starts use again.
        cache_dir: folder of what is kept between runs; by default ``dpnp-imaging`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
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
        crop: Crop = "center",
        resize: bool = True,
        value_range: tuple[float, float] | None = None,
        value_window: tuple[float, float] | None = None,
        axis: int = 2,
        on_error: OnError = "raise",
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        validation_images: int = 1000,
        cache_images: bool = False,
        cache_dir: str | None = None,
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
        if value_range is not None and value_window is not None:
            raise ValueError(f"value_range = {value_range} and value_window = {value_window}; give one of them")
        for name_, limits in (("value_range", value_range), ("value_window", value_window)):
            if limits is not None and not limits[0] < limits[1]:
                raise ValueError(f"{name_} = {limits} must increase")
        size = (size, size) if isinstance(size, int) else size
        if size is not None and min(size) < 1:
            raise ValueError(f"size = {size} must be positive")
        for name_, value, allowed in (("crop", crop, get_args(Crop)), ("on_error", on_error, get_args(OnError))):
            if value not in allowed:
                raise ValueError(f"{name_} = {value!r}; it may be one of {allowed}")
        if axis not in (0, 1, 2):
            raise ValueError(f"axis = {axis}; it may be 0 (sagittal), 1 (coronal) or 2 (axial)")
        if cache_images and crop != "center":
            raise ValueError(f"cache_images keeps one crop of each image; crop = {crop!r} does not go with it")
        if size is None and (crop != "center" or not resize):
            raise ValueError(f"crop = {crop!r} and resize = {resize} need size")
        self.source, self.split, self.validation_split = source, split, validation_split
        self.validation_fraction = validation_fraction
        self.column, self.key, self.root, self.download = column, key, root, download
        self.channels, self.size, self.crop, self.resize = channels, size, crop, resize
        self.value_range, self.clip = value_window or value_range, value_window is not None
        self.axis, self.on_error = axis, on_error
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
        if shuffle_buffer < 1 or validation_images < 1:
            raise ValueError(
                f"shuffle_buffer = {shuffle_buffer} and validation_images = {validation_images} must be positive"
            )
        if streaming and cache_images:
            raise ValueError("streaming and cache_images exclude each other")
        if streaming and (source.startswith(("torchvision:", "dicom:")) or not may_stream(source)):
            raise ValueError(
                f"source = {source!r}: only Parquet and Arrow files and data sets of the Hub can be streamed"
            )
        if streaming and validation_split is not None:
            raise ValueError(
                f"validation_split = {validation_split!r}: a stream is validated on validation_images of its own"
            )
        self.streaming, self.shuffle_buffer, self.validation_images = streaming, shuffle_buffer, validation_images
        self._positions: dict[int, Position] = {}
        self._next_worker = 0
        self._resume: dict[str, Any] | None = None
        self.cache_images = cache_images
        self.batch_size, self.workers = batch_size, workers
        self.title = name if name is not None else f"prior of {source}"
        self.license, self.seed = license, seed
        self._opened: dict[str, Rows] = {}
        self._description: DataDescription | None = None

    def prepare_data(self) -> None:
        """Fetch on one process what would otherwise be fetched by all of them."""
        if self.streaming:
            return
        for split in filter(None, (self.split, self.validation_split)):
            rows = self._rows(split)
            if self.cache_images:
                self._images(rows, "center", split)

    def setup(self, stage: str) -> None:
        """Open the data and look at the first image."""
        if self.streaming:
            self._setup_stream()
            return
        rows = self._rows(self.split)
        train = self._images(rows, self.crop, self.split)
        if self.validation_split is not None:
            self.train_set: Dataset[Tensor] = train
            self.validation_set: Dataset[Tensor] = self._images(
                self._rows(self.validation_split), "center", self.validation_split
            )
        else:
            chosen, held_out = self._hold_out(rows)
            self.train_set = Subset(train, chosen)
            self.validation_set = Subset(
                train if self.crop == "center" else self._images(rows, "center", self.split), held_out
            )
        self._train_images = train

    def _setup_stream(self) -> None:
        if self.trainer is not None and self.trainer.max_steps == -1:
            raise ValueError("a stream never ends; give trainer.max_steps")
        self._table = StreamedTable(self.source, self.split, self.column, self.validation_images)
        held_out = HeldOut(self._table)
        self._train_images = self._images(held_out, self.crop, self.split)
        self.validation_set = self._images(held_out, "center", self.split)

    def _hold_out(self, rows: Rows) -> tuple[list[int], list[int]]:
        """Indices for training and for validation, at random; of files with several images, whole files where there are several."""
        if len(rows) < 2:
            raise ValueError(f"source = {self.source!r} holds {len(rows)} images; at least 2 are needed")
        group = rows.file if isinstance(rows, Files) and rows.file[-1] > 0 else np.arange(len(rows))
        groups = int(group[-1]) + 1
        order = torch.randperm(groups, generator=torch.Generator().manual_seed(derive_seed(self.seed))).numpy()
        counts = np.bincount(group)[order].cumsum()
        wanted = max(1, round(len(rows) * self.validation_fraction))
        first = min(int(np.searchsorted(counts, wanted)) + 1, groups - 1)  # so many groups are held out
        rank = np.argsort(order)[group]  # of each image, the place of its group in the order
        by_rank = np.argsort(rank, kind="stable")
        split = int(counts[first - 1])
        return by_rank[split:].tolist(), by_rank[:split].tolist()

    @property
    def description(self) -> DataDescription:
        """The data's figures; the spread is measured once, on up to 4,096 training images."""
        if self._description is None:
            images = self._train_images
            measured = self.validation_set if self.streaming else self.train_set
            data_std, spread = measure_spread(measured)
            count = "streamed" if self.streaming else f"{len(self.train_set)} training images"  # type: ignore[arg-type]
            self._description = DataDescription(
                name=self.title,
                image_shape=images.image_shape,
                value_range=(-1.0, 1.0),
                source_range=images.source_range,
                data_std=data_std,
                spread=spread,
                dataset=f"{self.source}, {count}",
                license=self.license,
            )
        return self._description

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches ``(B, C, H, W)`` in [-1, 1], shuffled anew each epoch; what does not fill an optimiser step is left out."""
        if self.streaming:
            return self._stream_loader()
        trainer = self.trainer
        world, rank, parts = (
            (trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches) if trainer else (1, 0, 1)
        )
        sampler = EpochSampler(
            self.train_set,
            num_replicas=world,
            rank=rank,
            seed=derive_seed(self.seed) % 2**31,
            images_per_step=self.batch_size * parts,
        )
        return ResumableLoader(self.train_set, sampler, self._start_epoch, drop_last=False, **self._loading)

    def _stream_loader(self) -> DataLoader[Any]:
        """Batches with the positions of their readers, which :meth:`on_before_batch_transfer` takes off."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        start = None
        if self._resume is not None:
            start = [Position(*p) for p in self._resume["positions"]]
            readers = world_size * max(1, self.workers)
            if len(start) != readers:
                raise ValueError(
                    f"the stream was read by {len(start)} readers (devices x workers) and is to be continued by {readers}; "
                    "keep the number of devices and workers"
                )
            self._next_worker = self._resume["next_worker"]
            own = max(1, self.workers)
            self._positions = dict(enumerate(start[rank * own : (rank + 1) * own]))
        if not isinstance(self._train_images, Images):
            raise TypeError("streamed images are not kept on disk")
        stream = Stream(
            self._table,
            self._train_images,
            self.shuffle_buffer,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            start=start,
            first_worker=self._next_worker,
        )
        return DataLoader(
            stream,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Take a stream's position off the batch that is about to be trained on; batches fetched ahead do not count."""
        if not isinstance(batch, StreamBatch):
            return batch
        self._positions[batch.worker] = batch.position
        self._next_worker = (batch.worker + 1) % max(1, self.workers)
        return batch.images

    def state_dict(self) -> dict[str, Any]:
        """A stream's position, of all ranks; empty for data that are not streamed."""
        if not self.streaming:
            return {}
        own = [tuple(self._positions.get(worker, Position())) for worker in range(max(1, self.workers))]
        every = [own]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            every = [own] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(every, own)
        return {"positions": [list(p) for rank in every for p in rank], "next_worker": self._next_worker}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader go on where the stream was left."""
        if self.streaming and state_dict:
            self._resume = state_dict

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Batches in order."""
        return DataLoader(self.validation_set, **self._loading)

    @property
    def _loading(self) -> dict[str, Any]:
        """What the loaders of images at hand have in common."""
        return {
            "batch_size": self.batch_size,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _start_epoch(self, epoch: int) -> None:
        """Random crops of the epoch that begins; validation's images have none."""
        if isinstance(self._train_images, Images):
            self._train_images.set_epoch(epoch)

    def _images(self, rows: Rows, crop: Crop, split: str) -> Images | CachedImages:
        if isinstance(rows, Files):
            rows.check(self.channels, self.size, self.resize)
        images = Images(
            rows,
            self.source,
            self.channels,
            self.size,
            self.value_range,
            crop=crop,
            resize=self.resize,
            clip=self.clip,
            seed=self.seed,
        )
        if not self.cache_images:
            return images
        return CachedImages(images, self._fingerprint(rows, split), self.cache_dir, self.workers)

    def _fingerprint(self, rows: Rows, split: str) -> str:
        """Of a source's content, by what can be known without reading it."""
        if isinstance(rows, Table):
            known = rows.fingerprint
        elif isinstance(rows, Files):
            known = f"{rows.fingerprint} {rows.reader.format}"
        else:
            known = fingerprint_files(Path(self.source).expanduser())
        return f"{self.source} {split} {self.column} {self.key} {known}"

    def _rows(self, split: str) -> Rows:
        """The raw images of a split, opened once."""
        if split not in self._opened:
            self._opened[split] = self._open(split)
        return self._opened[split]

    def _open(self, split: str) -> Rows:
        if self.source.startswith("torchvision:"):
            return torchvision_rows(self.source.removeprefix("torchvision:"), self.root, split, self.download)
        if self.source.startswith("dicom:"):
            path = Path(self.source.removeprefix("dicom:")).expanduser()
            if not path.is_dir():
                raise FileNotFoundError(f"source = {self.source!r}: there is no folder {str(path)!r}")
            return folder_rows(path, [Dicom(suffixes=())], split, self.cache_dir, self.on_error)
        path = Path(self.source).expanduser()
        if path.suffix in arrays.SUFFIXES:
            return arrays.array_rows(path, self.key)
        if path.exists() and is_table(path):
            return table_rows(self.source, path, split, self.column)
        if path.is_dir():
            return folder_rows(path, self._readers(path), split, self.cache_dir, self.on_error)
        if path.is_file():
            raise ValueError(f"source = {self.source!r}; files may be .parquet .arrow {' '.join(arrays.SUFFIXES)}")
        if path.is_absolute() or self.source.startswith((".", "~")) or self.source.count("/") > 1:
            raise FileNotFoundError(f"source = {self.source!r} does not exist")
        return table_rows(self.source, path, split, self.column)

    def _readers(self, path: Path) -> list[Reader]:
        """Readers of the formats that a folder may hold; those that need an extra only if there are such files."""
        readers: list[Reader] = [Pictures()]
        names = list_files(path)
        if with_suffix(names, DICOM_SUFFIXES):
            readers.append(Dicom())
        if with_suffix(names, NIFTI_SUFFIXES):
            readers.append(Nifti(self.axis))
        return readers


def may_stream(source: str) -> bool:
    """Whether a source is a table: files, or not a path at all and hence a data set of the Hub."""
    path = Path(source).expanduser()
    return is_table(path) if path.exists() else path.suffix not in arrays.SUFFIXES


def default_cache_dir() -> Path:
    """Where scans and cached images are kept if nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpnp-imaging"
