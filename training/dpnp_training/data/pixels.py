"""From a decoded picture to an array ``(C, H, W)``: orientation, colour spaces, transparency."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageOps

Array = np.ndarray[Any, np.dtype[Any]]


def native_channels(mode: str) -> int:
    """Channels of a picture of this Pillow mode that is taken as it is: a palette, CMYK and the like count as RGB."""
    return {"1": 1, "L": 1, "I": 1, "F": 1, "LA": 2, "La": 2, "RGBA": 4, "RGBa": 4}.get(mode.partition(";")[0], 3)


def pixels(picture: Image.Image, channels: int | None) -> Array:
    """A picture's values.

    The orientation that EXIF states is applied. Palettes, CMYK, YCbCr, LAB and HSV become RGB, black and white becomes gray.
    Transparency stays a channel if ``channels`` is None, otherwise the picture is laid on white. Colour becomes gray by the luma of
    ITU-R BT.601.

    Args:
        picture: as Pillow opens it.
        channels: 1 (gray), 3 (RGB) or None, as it is.

    Returns:
        ``(C, H, W)``; uint8, uint16 for 16-bit gray, int32 or float32 for files that hold such values.
    """
    png = picture.format == "PNG"
    picture = ImageOps.exif_transpose(picture)
    mode = picture.mode
    if mode.startswith(("I", "F")):
        array = np.asarray(picture)
        if mode == "I" and png:  # older versions of Pillow open 16-bit files so
            array = array.astype(np.uint16)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    else:
        if mode in ("LA", "La", "PA", "RGBA", "RGBa") or (mode == "P" and "transparency" in picture.info):
            if channels is not None or mode in ("P", "PA"):
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                picture = picture.convert("RGB")
        elif mode == "1":
            picture = picture.convert("L")
        elif mode not in ("L", "RGB"):
            picture = picture.convert("RGB")
        if channels is not None:
            picture = picture.convert("L" if channels == 1 else "RGB")
        array = np.asarray(picture)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
