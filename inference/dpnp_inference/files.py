"""Reading measurements and images from files, and writing a run's folder all or nothing."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.medical import DICOM_SUFFIXES, NIFTI_SUFFIXES, Dicom, Nifti
from dpnp_shared.noise import JointNoise, Noise
from dpnp_shared.operators import Operator
from dpnp_shared.operators.combine import stack_of
from dpnp_shared.prior import PriorCard

MARKER = "run.json"
TIFF_SUFFIXES = (".tif", ".tiff")
PLAIN_COMPRESSIONS = (1, 8, 32946)  # none and deflate
INTEGER_TOPS = {torch.bool: 1.0, torch.uint8: 255.0, torch.uint16: 65535.0}


UNREADABLE = (
    OSError,
    EOFError,
    UnidentifiedImageError,
    RuntimeError,
    BadZipFile,
    UnpicklingError,
)  # what the readers of files raise


def read_tensor(file: str | Path, key: str | None = None) -> Tensor:
    """Numbers from a ``.npy``, ``.npz``, ``.pt``, TIFF, DICOM, NIfTI or other image file, as they are stored.

    Args:
        file: the file.
        key: name of the array in a ``.npz`` or ``.pt`` file that holds several.

    Returns:
        The tensor; images come as ``(C, H, W)`` integers, those of a TIFF file in its own type. DICOM and NIfTI files give float32
        values of their modality (colour: integers), upright as :mod:`dpnp_shared.medical` says; ``(n, C, H, W)`` if they hold several.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or holds several arrays and no ``key`` was given.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(_load(path))
        if path.suffix == ".npz":
            with _load(path) as arrays:
                return torch.from_numpy(arrays[_only(path, arrays.files, key)])
        if path.suffix in (".pt", ".pth"):
            found = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(found, dict):
                found = found[_only(path, list(found), key)]
            if not isinstance(found, Tensor):
                raise ValueError(f"{path} holds a {type(found).__name__}, not a tensor")
            return found
        if is_medical(path):
            return _read_medical(path)
        if path.name.lower().endswith(TIFF_SUFFIXES):
            tiff = _read_tiff(path)
            if tiff is not None:
                return tiff
        with Image.open(path) as image:
            return picture_tensor(image)
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _load(path: Path) -> Any:
    """NumPy's arrays, and no objects, which could run code."""
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:  # whose message recommends to allow them
        raise ValueError(f"{path} cannot be read: it is not a {path.suffix} file of numbers") from error


def picture_tensor(image: Image.Image) -> Tensor:
    """The pixels of a picture, ``(C, H, W)`` integers."""
    array = np.asarray(image.convert("RGB") if image.mode == "P" else image)
    if array.dtype == np.int32:  # PIL's mode of 16-bit files
        array = array.astype(np.uint16)
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)))


def is_medical(file: str | Path) -> bool:
    """Whether a file's name says DICOM or NIfTI, which hold values in units of their own."""
    return Path(file).name.lower().endswith((*DICOM_SUFFIXES, *NIFTI_SUFFIXES))


def medical_reader(file: str | Path) -> Dicom | Nifti:
    """The reader of such a file; of NIfTI volumes it takes the axial slices.

    Raises:
        ImportError: pydicom or nibabel is not installed; says how to install it.
    """
    return Dicom() if Path(file).name.lower().endswith(DICOM_SUFFIXES) else Nifti()


def _read_medical(path: Path) -> Tensor:
    reader = medical_reader(path)
    try:
        count = len(reader.probe(path))
        images = [reader.read(path, i) for i in range(count)]
    except (ImportError, OSError):
        raise
    except Exception as error:  # damaged files make the readers raise anything
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not images:
        raise ValueError(f"{path} holds no image")
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{path} holds images of different shapes")
    return torch.from_numpy(np.stack(images) if count > 1 else images[0].copy())


def _read_tiff(path: Path) -> Tensor | None:
    """``(C, H, W)``, or ``(n, H, W)`` or ``(n, C, H, W)`` of a file of several pages; None for compressions that Pillow is better at."""
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            if series.keyframe.compression not in PLAIN_COMPRESSIONS:
                return None
            array, axes = series.asarray(), series.axes
    except OSError:
        raise
    except Exception as error:  # damaged files make the reader raise anything
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "S" in axes:  # samples of a pixel: colours
        array = np.moveaxis(array, axes.index("S"), -3)
    return torch.from_numpy(np.array(array[None] if array.ndim == 2 else array, dtype=array.dtype.newbyteorder("=")))


def _only(path: Path, names: list[str], key: str | None) -> str:
    """The name of the wanted array."""
    if key is None and len(names) == 1:
        return names[0]
    if key not in names:
        raise ValueError(f"key = {key!r}; {path} holds {names}")
    return str(key)


def to_image_units(x: Tensor, card: PriorCard, *, own_units: bool = False) -> Tensor:
    """Stored pixel values in the prior's value range, float32.

    Integers are mapped as the prior's training data were, from their type's full range; floating-point numbers are taken
    as they are, in the prior's own units.

    Args:
        x: of any shape.
        card: of the prior.
        own_units: floating-point numbers are in the units of the training data, such as Hounsfield's, and are mapped from the card's
            ``source_range``.
    """
    low, high = card.value_range
    if x.dtype not in INTEGER_TOPS:
        if own_units:
            first, last = card.source_range
            return low + (high - low) * (x.float() - first) / (last - first)
        return x.float() if not x.is_complex() else x
    return low + (high - low) * x.to(torch.float32) / INTEGER_TOPS[x.dtype]


def read_measurement(
    files: str | list[str], key: str | None, forward_model: ForwardModel, card: PriorCard, index: int = 0
) -> Tensor:
    """A measurement as the forward model's likelihood takes it.

    Counts and complex numbers are taken as they are, whatever their type; other integers are pixel values. DICOM and NIfTI files hold
    pixel values in the units of the training data.

    Args:
        files: one file, or one for each operator of a :class:`~dpnp_shared.operators.Stack`.
        key: as for :func:`read_tensor`.
        forward_model: says what the numbers are.
        card: of the prior, whose units pixel values have.
        index: which image of a DICOM or NIfTI file that holds several.

    Returns:
        ``(*y_shape)``, floating point or complex.

    Raises:
        ValueError: a list of files for an operator that is no Stack, or of another length than it has operators; or ``index`` is too large.
    """
    noise, stack = forward_model.noise, stack_of(forward_model.operator)
    if isinstance(files, str):
        return as_measurement(read_tensor(files, key), forward_model, card, files, index)
    parts = 1 if stack is None else len(stack.operators)
    if stack is None or len(files) != parts:
        raise ValueError(
            f"measurement lists {len(files)} files; {type(forward_model.operator).__name__} has {parts} parts"
        )
    noises = noise.parts if isinstance(noise, JointNoise) else [noise] * parts
    stored = [_in_units(read_tensor(file, key), n, card, file, index) for file, n in zip(files, noises, strict=True)]
    operators = [A for A in stack.operators if isinstance(A, Operator)]
    return stack.join([A.as_measurement(y) for A, y in zip(operators, stored, strict=True)])


def as_measurement(
    stored: Tensor, forward_model: ForwardModel, card: PriorCard, name: str | Path, index: int = 0
) -> Tensor:
    """Stored numbers as the forward model's likelihood takes them; see :func:`read_measurement`.

    Args:
        stored: as :func:`read_tensor` gives them.
        forward_model: says what the numbers are.
        card: of the prior.
        name: of what they were read from, whose ending tells DICOM and NIfTI files.
        index: which image of such a file.
    """
    return forward_model.operator.as_measurement(_in_units(stored, forward_model.noise, card, name, index))


def _in_units(y: Tensor, noise: Noise, card: PriorCard, name: str | Path, index: int) -> Tensor:
    medical = is_medical(name)
    if medical and y.ndim == 4:
        y = y[_check_index(index, len(y), name)]
    counts = noise.counts and not y.is_complex()
    return y.to(torch.float64) if counts else to_image_units(y, card, own_units=medical)


def _check_index(index: int, count: int, file: str | Path) -> int:
    if not 0 <= index < count:
        raise ValueError(f"index = {index}; {file} holds {count} images")
    return index


def read_image(
    file: str | Path, index: int, image_shape: tuple[int, int, int], card: PriorCard, key: str | None
) -> Tensor:
    """One clean image in the prior's units.

    Args:
        file: as for :func:`read_tensor`; ``(H, W)``, ``(C, H, W)``, or a stack of them. Values of DICOM and NIfTI files are cut off where
            the training data's range ends.
        index: which image of a stack.
        image_shape: ``(C, H, W)`` that is needed.
        card: of the prior.
        key: as for :func:`read_tensor`.

    Returns:
        ``(C, H, W)`` float32.

    Raises:
        ValueError: it has another shape, ``index`` is too large, or a value is not finite.
    """
    return as_image(read_tensor(file, key), index, image_shape, card, str(file))


def as_image(x: Tensor, index: int, image_shape: tuple[int, int, int], card: PriorCard, name: str) -> Tensor:
    """One clean image out of stored numbers; see :func:`read_image`.

    Args:
        x: as stored.
        index: which image of a stack.
        image_shape: ``(C, H, W)`` that is needed.
        card: of the prior.
        name: of what it was read from, for errors; its ending tells DICOM and NIfTI files.
    """
    for shape in (image_shape, image_shape[1:]) if image_shape[0] == 1 else (image_shape,):
        if x.shape[x.ndim - len(shape) :] == shape and x.ndim - len(shape) in (0, 1):
            stack = x.reshape(-1, *image_shape)
            break
    else:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; needed is {image_shape} (C, H, W) or a stack of them")
    medical = is_medical(name)
    image = to_image_units(stack[_check_index(index, len(stack), name)], card, own_units=medical)
    if medical:  # as training does with a window
        image = image.clamp(*card.value_range)
    if not bool(torch.isfinite(image).all()):
        raise ValueError(f"{name}: image {index} contains values that are not finite")
    return image


def check_output(output: str | Path, *, overwrite: bool) -> None:
    """Find out before a long run whether its folder can be written after it.

    Args:
        output: the folder to make.
        overwrite: replace an earlier run there.

    Raises:
        FileExistsError: ``output`` exists, and is not an earlier run or ``overwrite`` is off.
        PermissionError: the folder it would be made in is not writable.
    """
    target = Path(output)
    if target.exists():
        if not (target / MARKER).is_file():
            raise FileExistsError(f"output = {str(target)!r} exists and is not the folder of a run; choose another")
        if not overwrite:
            raise FileExistsError(
                f"output = {str(target)!r} holds a run already; choose another folder or pass --overwrite true"
            )
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(f"output = {str(target)!r}: {above} is not a folder that can be written to")


def save_array(file: Path, x: Tensor) -> Any:
    """Write a tensor as ``.npy``."""
    np.save(file, x.detach().cpu().numpy(), allow_pickle=False)
