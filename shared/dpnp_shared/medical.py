"""Images in DICOM files, by pydicom, and in NIfTI files, by nibabel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np

from dpnp_shared.optional import load

Shape = tuple[int, int, int]
Array = np.ndarray[Any, np.dtype[Any]]

DICOM_SUFFIXES = (".dcm", ".dicom")
NIFTI_SUFFIXES = (".nii", ".nii.gz")


class Dicom:
    """Reader of DICOM files; each frame is an image.

    Monochrome values are float32 after the modality's slope and intercept or table (Hounsfield units for CT). Of MONOCHROME1, in
    which high values are dark, the stored values are mirrored first, so that high is bright in all files. Colour stays RGB in the
    file's integer type; palettes and YBR become RGB. Files without pixel data (reports, structures) hold no image.

    Args:
        suffixes: of the files; none: every file.
    """

    format = "DICOM"

    def __init__(self, suffixes: tuple[str, ...] = DICOM_SUFFIXES) -> None:
        self.suffixes = suffixes
        self._pydicom = load("pydicom", "medical")
        self._pixels = load("pydicom.pixels", "medical")

    def probe(self, path: Path) -> list[Shape]:
        """Decode all frames."""
        header = self._header(path)
        if "PixelData" not in header:
            return []
        frames = int(header.get("NumberOfFrames") or 1)
        return [cast(Shape, self._frame(header, index).shape) for index in range(frames)]

    def read(self, path: Path, index: int) -> Array:
        """One frame ``(C, H, W)``."""
        return self._frame(self._header(path), index)

    def _frame(self, header: Any, index: int) -> Array:
        array = self._pixels.pixel_array(header, index=index)  # decodes this frame only; YBR becomes RGB
        photometric = header.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            array = self._pixels.apply_color_lut(array, header)
        elif photometric.startswith("MONOCHROME"):
            if photometric == "MONOCHROME1":
                # lowest + highest value that can be stored, minus the value
                array = (-1 if header.PixelRepresentation else 2 ** int(header.BitsStored) - 1) - array.astype(np.int64)
            array = self._pixels.apply_modality_lut(array, header).astype(np.float32)
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)

    def _header(self, path: Path) -> Any:
        return self._pydicom.dcmread(path)


class Nifti:
    """Reader of NIfTI files; each slice along an axis is an image, of four-dimensional files of each volume.

    Values are float32 after the header's slope and intercept. Slices lie as the affine says, whatever the order in the file: axis 0
    (sagittal) runs from left to right, 1 (coronal) from posterior to anterior, 2 (axial) from inferior to superior; in the image,
    the higher of the other two axes runs upwards, the lower one to the right.

    Args:
        axis: anatomical axis that is cut, 0, 1 or 2.
    """

    suffixes = NIFTI_SUFFIXES

    def __init__(self, axis: int = 2) -> None:
        self.axis = axis
        self.format = f"NIfTI, axis {axis}"
        self._nibabel = load("nibabel", "medical")

    def probe(self, path: Path) -> list[Shape]:
        """Read the whole file, as a compressed one may be cut off anywhere."""
        image = self._nibabel.load(path)
        values = np.asarray(image.dataobj)
        if values.dtype.kind not in "iuf":
            raise ValueError(f"{values.dtype} values; needed are real numbers")
        cut, right, up, _ = self._axes(image)
        shape = self._shape(image)
        count = shape[cut] * int(np.prod(shape[3:]))
        return [(1, shape[up], shape[right])] * count

    def read(self, path: Path, index: int) -> Array:
        """Slice ``index % n`` of volume ``index // n``, ``(1, H, W)``."""
        image = self._nibabel.load(path)
        _, right, up, flipped = self._axes(image)
        at = self._position(image, index)
        if len(image.shape) == 2:  # a single image is a volume of one slice
            plane = np.asarray(image.dataobj, dtype=np.float32)[..., None][tuple(at)]
        else:
            plane = np.asarray(image.dataobj[tuple(at)], dtype=np.float32)
        if right < up:
            plane = plane.T
        if not flipped[up]:
            plane = plane[::-1]
        if flipped[right]:
            plane = plane[:, ::-1]
        return np.ascontiguousarray(plane)[None]

    def place(self, path: Path, index: int, plane: Array) -> Any:
        """What :meth:`read` would read: an image of one slice that lies where slice ``index`` of a file lies.

        Args:
            path: the file, which gives the geometry.
            index: as for :meth:`read`.
            plane: ``(H, W)``, shaped like the slice.

        Returns:
            A ``nibabel.Nifti1Image`` of float32 values.

        Raises:
            ValueError: ``plane`` has another shape than the slice.
        """
        image = self._nibabel.load(path)
        cut, right, up, flipped = self._axes(image)
        shape = self._shape(image)
        if plane.shape != (shape[up], shape[right]):
            raise ValueError(
                f"{path} has slices of shape {(shape[up], shape[right])}, the image to place has {plane.shape}"
            )
        if flipped[right]:
            plane = plane[:, ::-1]
        if not flipped[up]:
            plane = plane[::-1]
        if right < up:
            plane = plane.T
        shift = np.eye(4)
        shift[cut, 3] = self._position(image, index)[cut]
        values = np.ascontiguousarray(np.expand_dims(plane, cut), dtype=np.float32)
        placed = self._nibabel.Nifti1Image(values, image.affine @ shift)
        placed.header.set_xyzt_units(xyz=image.header.get_xyzt_units()[0])
        return placed

    def _position(self, image: Any, index: int) -> list[Any]:
        """Where a slice lies in the file: an index for each axis, all of the two axes of its plane."""
        cut, _, _, flipped = self._axes(image)
        shape = self._shape(image)
        volume, position = divmod(index, shape[cut])
        at: list[Any] = [slice(None)] * 3
        at[cut] = shape[cut] - 1 - position if flipped[cut] else position
        return at + ([int(i) for i in np.unravel_index(volume, shape[3:])] if shape[3:] else [])

    def _axes(self, image: Any) -> tuple[int, int, int, list[bool]]:
        """The file's axes that are cut, run to the right and run up, and which of its axes run against the anatomical direction."""
        orientation = self._nibabel.io_orientation(image.affine)
        anatomical = orientation[:, 0].tolist()  # of each axis of the file
        right, up = (anatomical.index(axis) for axis in range(3) if axis != self.axis)
        return anatomical.index(self.axis), right, up, [bool(sign < 0) for sign in orientation[:, 1]]

    @staticmethod
    def _shape(image: Any) -> tuple[int, ...]:
        shape = tuple(int(n) for n in image.shape)
        if len(shape) < 2:
            raise ValueError(f"shape {shape}; needed are two axes or more")
        return (*shape, 1) if len(shape) == 2 else shape
