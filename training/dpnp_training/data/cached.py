"""Decoded, resized images, made once and kept on disk as one array that all processes map into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpnp_training.data.arrays import OnDisk
from dpnp_training.data.images import INTEGER_RANGES, Images

log = logging.getLogger(__name__)
CACHE_VERSION = 1
ABANDONED = 3600.0  # seconds without a sign of life


class CachedImages(Dataset[Tensor]):
    """The images of :class:`Images`, read from a ``.npy`` file.

    Images of integer data are kept in 16 bits (an error of at most 1/65535 of the range, none where nothing was resized), others in
    float32. The file's name is a fingerprint of the source and of all options that change an image; it appears under that name when
    it is complete.

    Args:
        images: what to keep; its random crops must be off.
        fingerprint: of the source's content.
        cache_dir: folder of the file.
        workers: processes that decode.

    Raises:
        OSError: not enough space on the disk.
    """

    def __init__(self, images: Images, fingerprint: str, cache_dir: Path, workers: int = 0) -> None:
        self.image_shape, self.source_range = images.image_shape, images.source_range
        integers = images.value_range is None and images.dtype in INTEGER_RANGES
        self.dtype = np.dtype(np.uint16 if integers else np.float32)
        options = [
            CACHE_VERSION, fingerprint, images.channels, images.size, images.value_range, images.resize, images.clip,
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:24]
        self.path = cache_dir / "images" / f"{name}.npy"
        if not self.path.is_file():
            self._write(images, workers)
        self.rows = OnDisk(self.path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        x = torch.from_numpy(np.array(self.rows[index], dtype=np.float32))
        return x / 32767.5 - 1 if self.dtype == np.uint16 else x

    def _write(self, images: Images, workers: int) -> None:
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        shape = (len(images), *self.image_shape)
        needed, free = int(np.prod(shape)) * self.dtype.itemsize, shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                f"cache_images: {needed / 1e9:.2f} GB are needed in {folder}, {free / 1e9:.2f} GB are free; choose another cache_dir"
            )
        _say(f"{len(images)} images are decoded once into {self.path} ({needed / 1e6:.0f} MB)")
        for left in folder.glob(f"{self.path.name}.*.part"):  # of a process that was killed
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink(missing_ok=True)
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            array = np.lib.format.open_memmap(part, mode="w+", dtype=self.dtype, shape=shape)
            start = 0
            for x in DataLoader(images, batch_size=32, num_workers=workers):
                values = ((x + 1) * 32767.5).round() if self.dtype == np.uint16 else x
                array[start : start + len(x)] = values.numpy()
                start += len(x)
                os.utime(part)  # at work still
            array.flush()
            del array
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


def fingerprint_files(*paths: Path) -> str:
    """Of files that need not be read: names, sizes and times of change."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


@rank_zero_only
def _say(message: str) -> None:
    log.warning(message)
