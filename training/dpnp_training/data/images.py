"""Raw images of any source as tensors of one shape and range."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF  # noqa: N812 - torchvision's own convention

from dpnp_shared.randomness import derive_seed
from dpnp_training.data.pixels import Array, pixels

INTEGER_RANGES = {np.dtype(bool): 1.0, np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}

Crop = Literal["center", "random"]


class Rows(Protocol):
    """Random access to raw images."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> Any:
        """A PIL image or an array."""
        ...


class Images(Dataset[Tensor]):
    """Raw images as float32 tensors in [-1, 1], all of one shape.

    Args:
        rows: the raw images; where they have a method ``name(index)``, messages name an image by it.
        source: name of the data, for messages.
        channels: convert to so many channels.
        size: bring to ``(H, W)``.
        value_range: of the raw values, if the dtype does not tell.
        crop: where the window of ``size`` lies: in the centre, or anywhere, anew in each epoch.
        resize: shrink or enlarge until the window just fits; otherwise it is cut out at full resolution.
        clip: cut raw values off at the ends of ``value_range``.
        seed: of random crops, which depend on nothing but seed, epoch and index.

    Raises:
        ValueError: no image, or values whose range is not known.
    """

    def __init__(
        self,
        rows: Rows,
        source: str,
        channels: int | None,
        size: tuple[int, int] | None,
        value_range: tuple[float, float] | None,
        *,
        crop: Crop = "center",
        resize: bool = True,
        clip: bool = False,
        seed: int = 0,
    ) -> None:
        if len(rows) == 0:
            raise ValueError(f"source = {source!r} holds no image")
        self.rows, self.source, self.channels, self.size = rows, source, channels, size
        self.crop, self.resize, self.clip, self.seed = crop, resize, clip, seed
        self.value_range = value_range
        # shared, so that the loader's processes see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        first = self._array(0)
        self.dtype = first.dtype
        self.source_range = self._range(first, 0)
        self._shape: tuple[int, ...] | None = None
        c, h, w = self[0].shape
        self.image_shape = (c, h, w)
        self._shape = (c, h, w)

    def __len__(self) -> int:
        return len(self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose random crops are taken, in the loader's processes as well."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self._array(index), index)

    def transform(self, array: Array, index: int) -> Tensor:
        """Raw values ``(C, H, W)`` of image ``index`` as the network sees them."""
        low, high = self._range(array, index)
        x = torch.from_numpy(array.astype(np.float32))
        if self.clip:
            x = x.clamp(low, high)
        x = 2 * (x - low) / (high - low) - 1
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{self.name(index)} contains values that are not finite")
        if self.size is not None:
            x = self._fit(x, self.size, index)
        if self._shape is not None and x.shape != self._shape:
            raise ValueError(
                f"{self.name(index)} has shape {tuple(x.shape)}, the first has {tuple(self._shape)} (C, H, W); "
                "give size (and channels) to bring all to one shape"
            )
        return x

    def name(self, index: int) -> str:
        """How messages call an image."""
        named = getattr(self.rows, "name", None)
        return str(named(index)) if named is not None else f"image {index} of {self.source!r}"

    def _range(self, array: Array, index: int) -> tuple[float, float]:
        """Of an image's values: as given, or that of its integer type."""
        if self.value_range is not None:
            return self.value_range
        if array.dtype not in INTEGER_RANGES:
            raise ValueError(
                f"{self.name(index)} holds {array.dtype} values, whose range is not known; give value_range (or value_window), "
                f"for example [{float(array.min()):g}, {float(array.max()):g}] (this image's)"
            )
        return 0.0, INTEGER_RANGES[array.dtype]

    def _fit(self, x: Tensor, size: tuple[int, int], index: int) -> Tensor:
        if self.resize:
            # the shorter side (relative to the wanted shape) is matched, the rest cropped
            scale = max(size[0] / x.shape[1], size[1] / x.shape[2])
            shape = [max(s, round(n * scale)) for s, n in zip(size, x.shape[1:], strict=True)]
            x = TF.resize(x, shape, antialias=True)
        elif x.shape[1] < size[0] or x.shape[2] < size[1]:
            raise ValueError(
                f"{self.name(index)} is {x.shape[1]} x {x.shape[2]}, smaller than size = {size}; give resize: true or a smaller size"
            )
        if self.crop == "center":
            cropped: Tensor = TF.center_crop(x, list(size))
            return cropped
        generator = torch.Generator().manual_seed(derive_seed(self.seed, int(self._epoch), index))
        top, left = (
            int(torch.randint(n - s + 1, (), generator=generator)) for s, n in zip(size, x.shape[1:], strict=True)
        )
        return x[:, top : top + size[0], left : left + size[1]].contiguous()

    def _array(self, index: int) -> Array:
        """The raw image as ``(C, H, W)``."""
        return self.array(self.rows[index], index)

    def array(self, row: Any, index: int) -> Array:
        """A row, whichever form it has, as ``(C, H, W)``."""
        if isinstance(row, Image.Image):
            array = pixels(row, self.channels)
        else:
            array = np.asarray(row)
            if array.ndim == 2:
                array = array[None]
            elif array.ndim == 3 and array.shape[-1] <= 4 < array.shape[0]:
                array = np.moveaxis(array, -1, 0)
        if array.ndim != 3:
            raise ValueError(f"{self.name(index)} has shape {array.shape}; needed is (H, W) or three axes")
        if self.channels is not None and array.shape[0] != self.channels:
            if array.shape[0] == 1:
                array = np.repeat(array, self.channels, axis=0)
            else:
                raise ValueError(f"{self.name(index)} has {array.shape[0]} channels, channels = {self.channels}")
        return np.ascontiguousarray(array)
