"""Picture files: JPEG, PNG, TIFF, BMP, WebP and the like, by Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from dpnp_training.data.files import Shape
from dpnp_training.data.pixels import native_channels

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".gif", ".pgm", ".ppm", ".pnm")
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
ORIENTATION = 0x0112


class Pictures:
    """Reader of picture files.

    Every page of a multi-page TIFF is an image; of animations the first frame is taken. 16-bit gray keeps all its bits; 16-bit
    colour is refused, as Pillow would reduce it to 8 bits without a word.
    """

    format = "pictures"
    suffixes = SUFFIXES

    def probe(self, path: Path) -> list[Shape]:
        """Decode all pages."""
        shapes = []
        with Image.open(path) as picture:
            for page in range(_pages(picture)):
                picture.seek(page)
                if _deep_colour(picture):
                    raise ValueError("16-bit colour is not read at full precision; 16-bit gray, or arrays in .npy, are")
                orientation = picture.getexif().get(ORIENTATION, 1)
                h, w = picture.height, picture.width
                channels = native_channels(picture.mode)
                picture.load()
                shapes.append((channels, w, h) if orientation in TURNED else (channels, h, w))
        return shapes

    def read(self, path: Path, index: int) -> Any:
        """One page."""
        with Image.open(path) as picture:
            picture.seek(index)
            picture.load()
            return picture


def _pages(picture: Image.Image) -> int:
    return getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1


def _deep_colour(picture: Image.Image) -> bool:
    """Whether the file holds more bits a channel than Pillow would keep; its raw mode tells, before it is loaded."""
    if picture.mode.startswith(("I", "F")):
        return False
    return any(";16" in str(tile[3]) for tile in getattr(picture, "tile", []))
