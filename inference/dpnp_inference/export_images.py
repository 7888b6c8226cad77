"""Images of a finished run for other programs: PNG, TIFF, NIfTI and DICOM.

PNG holds whole numbers, the prior's value range from black to white. TIFF holds the prior's own units as float32. NIfTI and DICOM hold the
units of the training data (``source_range`` of the prior's card, Hounsfield's for a CT prior), and lie where the file that the run was made
from lies, or another one that is given.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, PngImagePlugin
from torch import Tensor

from dpnp_inference.files import is_medical, medical_reader
from dpnp_inference.finished_run import Run
from dpnp_shared.folders import staged_folder
from dpnp_shared.medical import Dicom, Nifti
from dpnp_shared.optional import load

log = logging.getLogger(__name__)

Format = Literal["png", "tiff", "nifti", "dicom"]
What = Literal["mean", "std", "samples", "quantiles"]
SUFFIX: dict[Format, str] = {"png": ".png", "tiff": ".tif", "nifti": ".nii.gz", "dicom": ".dcm"}
INDEX = "export.json"
NO_FILE = "none"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# of a DICOM file's geometry and units; nothing among them names a patient, a person or a place
GEOMETRY = (
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceLocation",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Modality",
    "RescaleType",
    "Units",
    "PatientPosition",
)
NOT_COPIED = (  # from a file that is copied with its patient: what describes its pixels, or the image as an original one
    "NumberOfFrames",
    "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence",
    "DimensionIndexSequence",
    "DimensionOrganizationSequence",
    "FrameIncrementPointer",
    "SmallestImagePixelValue",
    "LargestImagePixelValue",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "PresentationLUTShape",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
    "IconImageSequence",
    "PlanarConfiguration",
    "ContentDate",
    "ContentTime",
    "RescaleSlope",
    "RescaleIntercept",
    "WindowCenter",
    "WindowWidth",
    "WindowCenterWidthExplanation",
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Exported:
    """One image to write.

    Attributes:
        name: of the file, without suffix.
        title: what it is, in words.
        image: ``(C, H, W)`` in the prior's units.
        spread: whether it is a difference of values, such as a standard deviation, which starts at 0 in all units.
    """

    name: str
    title: str
    image: Tensor
    spread: bool = False


def export_run(
    run: Run,
    form: Format,
    what: Sequence[str],
    output: str | Path,
    *,
    quantiles: Sequence[float] = (0.05, 0.5, 0.95),
    bits: int = 8,
    like: str | None = None,
) -> list[Path]:
    """Write images of a run into a folder of their own, all or none, with ``export.json`` that says what each is.

    Args:
        run: the finished run.
        form: ``png``, ``tiff``, ``nifti`` or ``dicom``.
        what: of ``mean``, ``std``, ``samples``, ``quantiles``.
        output: the folder to make.
        quantiles: which ones, each in [0, 1].
        bits: 8 or 16, of PNG.
        like: file whose geometry NIfTI and DICOM take, and of DICOM the patient as well; by default the geometry of the run's own input if
            it was such a file. ``none`` for no geometry.

    Returns:
        The files.

    Raises:
        ValueError: an argument is not allowed, the run has one draw and no standard deviation, its record does not have what the format
            needs, or ``like`` does not fit.
        FileExistsError: ``output`` exists.
        FileNotFoundError: the file that gives the geometry is not there.
        ImportError: nibabel or pydicom is not installed.
    """
    if form not in get_args(Format):
        raise ValueError(f"format = {form!r}; allowed are {', '.join(get_args(Format))}")
    if bits not in (8, 16):
        raise ValueError(f"bits = {bits}; allowed are 8 and 16")
    if like is not None and form in ("png", "tiff"):
        raise ValueError(f"like = {like!r}; a {form.upper()} file has no geometry, leave it out")
    target = Path(output)
    if target.exists():
        raise FileExistsError(f"output = {str(target)!r} exists; choose another folder")
    images = _chosen(run, what, quantiles)
    if (form != "tiff" and run.value_range is None) or (form in ("nifti", "dicom") and run.source_range is None):
        raise ValueError(f"{run.folder} has no value range of the prior in its record; format = 'tiff' needs none")
    geometry = _geometry(run, like) if form in ("nifti", "dicom") else None
    records: dict[str, dict[str, Any]] = {}
    with staged_folder(target) as folder:
        if form == "dicom":
            _write_dicom(run, images, geometry, folder, records)
        else:
            for item in images:
                for name, image in _parts(item, form):
                    file = folder / (name + SUFFIX[form])
                    about = {"what": item.title}
                    if form == "png":
                        about |= _write_png(file, run, item, image, bits)
                    elif form == "tiff":
                        about |= _write_tiff(file, item, image)
                    else:
                        about |= _write_nifti(file, run, item, image, geometry)
                    records[file.name] = about
        record = {"run": str(run.folder), "prior": run.record["prior"], "files": records}
        (folder / INDEX).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return [target / name for name in records]


def _chosen(run: Run, what: Sequence[str], quantiles: Sequence[float]) -> list[Exported]:
    unknown = [name for name in what if name not in get_args(What)]
    if unknown or not what:
        raise ValueError(f"what = {','.join(what)!r}; allowed are {', '.join(get_args(What))}")
    posterior = run.posterior
    found = []
    if "mean" in what:
        found.append(Exported("mean", "posterior mean", posterior.mean))
    if "std" in what:
        found.append(Exported("std", "posterior standard deviation", posterior.std, spread=True))
    if "quantiles" in what:
        for q in quantiles:
            found.append(Exported(f"quantile_{q:g}", f"posterior quantile {q:g}", posterior.quantile(q)))
    if "samples" in what:
        chains, draws = posterior.samples.shape[:2]
        for c in range(chains):
            for d in range(draws):
                name = f"sample_chain{c:0{len(str(chains - 1))}d}_draw{d:0{len(str(draws - 1))}d}"
                found.append(Exported(name, f"posterior draw {d} of chain {c}", posterior.samples[c, d]))
    return found


def _parts(item: Exported, form: Format) -> list[tuple[str, Array]]:
    """Name and ``(H, W)`` or ``(H, W, 3)`` values: colour in one file where the format has it, else a file for each channel."""
    x = item.image.detach().double().cpu().numpy()
    if len(x) == 1:
        return [(item.name, x[0])]
    if len(x) == 3 and form != "nifti":
        return [(item.name, np.moveaxis(x, 0, -1))]
    return [(f"{item.name}_channel{c}", plane) for c, plane in enumerate(x)]


def _write_png(file: Path, run: Run, item: Exported, image: Array, bits: int) -> dict[str, Any]:
    assert run.value_range is not None
    low, high = run.value_range
    first = 0.0 if item.spread else low
    top = 2**bits - 1
    if bits == 16 and image.ndim == 3:
        raise ValueError("bits = 16; a PNG file of colours is written with 8, or take format = 'tiff'")
    stored = np.round(top * np.clip((image - first) / (high - low), 0, 1)).astype(np.uint8 if bits == 8 else np.uint16)
    about = {"slope": (high - low) / top, "intercept": first}
    text = PngImagePlugin.PngInfo()
    text.add_text("Description", f"{item.title}; value = {about['intercept']:.9g} + {about['slope']:.9g} * stored")
    Image.fromarray(stored).save(file, pnginfo=text)
    return about


def _write_tiff(file: Path, item: Exported, image: Array) -> dict[str, Any]:
    photometric = "rgb" if image.ndim == 3 else "minisblack"
    tifffile.imwrite(file, image.astype(np.float32), photometric=photometric, description=item.title)
    return {}


def _in_source_units(run: Run, item: Exported, image: Array) -> Array:
    assert run.value_range is not None
    assert run.source_range is not None
    (low, high), (first, last) = run.value_range, run.source_range
    scale = (last - first) / (high - low)
    return image * scale if item.spread else first + (image - low) * scale


def _geometry(run: Run, like: str | None) -> tuple[Path, int, bool] | None:
    """The file that images lie like, which of its images, and whether its patient is copied as well."""
    index = int(run.record["config"].get("index") or 0)
    if like == NO_FILE:
        return None
    if like is not None:
        if not is_medical(like):
            raise ValueError(f"like = {like!r}; it must be a DICOM or NIfTI file, or {NO_FILE!r}")
        if not Path(like).is_file():
            raise FileNotFoundError(f"like = {like!r} does not exist")
        count = len(medical_reader(like).probe(Path(like)))
        return Path(like), index if index < count else 0, True
    given = run.record["config"].get("image") or run.record["config"].get("measurement")
    if not isinstance(given, str) or not is_medical(given):
        log.info(
            "the run was not made from a DICOM or NIfTI file: the images have no geometry; give it with --like FILE"
        )
        return None
    if not Path(given).is_file():
        raise FileNotFoundError(
            f"{given}, from which the run was made, is not there to give the geometry; give another by --like FILE, or --like {NO_FILE}"
        )
    return Path(given), index, False


def _write_nifti(
    file: Path, run: Run, item: Exported, image: Array, geometry: tuple[Path, int, bool] | None
) -> dict[str, Any]:
    nibabel = load("nibabel", "medical")
    values = _in_source_units(run, item, image).astype(np.float32)
    if geometry is None:  # upright, pixels of size 1
        placed = nibabel.Nifti1Image(np.ascontiguousarray(values[::-1].T[..., None]), np.eye(4))
    else:
        source, index, _ = geometry
        if not isinstance(medical_reader(source), Nifti):
            raise ValueError(
                f"{source} is no NIfTI file; its geometry is for format = 'dicom', or give --like {NO_FILE}"
            )
        placed = Nifti().place(source, index, values)
    placed.header["descrip"] = item.title.encode()[:79]
    nibabel.save(placed, file)
    return {} if geometry is None else {"geometry of": str(geometry[0])}


def _write_dicom(
    run: Run,
    images: list[Exported],
    geometry: tuple[Path, int, bool] | None,
    folder: Path,
    records: dict[str, dict[str, Any]],
) -> None:
    """A series for each kind of image, all in one study."""
    uid = load("pydicom.uid", "medical")
    study = uid.generate_uid()
    series: dict[str, str] = {}
    for item in images:
        kind = item.name.partition("_")[0]
        first = kind not in series
        series.setdefault(kind, uid.generate_uid())
        for number, (name, image) in enumerate(_parts(item, "dicom")):
            dataset = _dicom(run, item, image, geometry, study)
            dataset.SeriesInstanceUID = series[kind]
            dataset.SeriesNumber = 9000 + list(series).index(kind)
            dataset.SeriesDescription = f"DPnP posterior {kind}, derived"
            dataset.InstanceNumber = 1 + number if first else 1 + len(records)
            file = folder / (name + SUFFIX["dicom"])
            dataset.save_as(file, enforce_file_format=True)
            records[file.name] = {"what": item.title} | ({} if geometry is None else {"geometry of": str(geometry[0])})


def _dicom(run: Run, item: Exported, image: Array, geometry: tuple[Path, int, bool] | None, study: str) -> Any:
    pydicom, uid = load("pydicom", "medical"), load("pydicom.uid", "medical")
    values = _in_source_units(run, item, image)
    source: Any = None
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = SECONDARY_CAPTURE
    dataset.StudyInstanceUID = study
    dataset.PatientName, dataset.PatientID = "", ""
    if geometry is not None:
        file, index, patient = geometry
        if not isinstance(medical_reader(file), Dicom):
            raise ValueError(f"{file} is no DICOM file; its geometry is for format = 'nifti', or give --like {NO_FILE}")
        source = pydicom.dcmread(file, stop_before_pixels=True)
        shape = (int(source.Rows), int(source.Columns))
        if shape != values.shape[:2]:
            raise ValueError(
                f"{file} has images of shape {shape}, the run's have {values.shape[:2]}; give another by --like FILE, or --like {NO_FILE}"
            )
        if patient:
            dataset.update(source)
            dataset.remove_private_tags()
            for keyword in NOT_COPIED:
                if keyword in dataset:
                    delattr(dataset, keyword)
        dataset.SOPClassUID = SECONDARY_CAPTURE
        for keyword, value in _geometry_of(source, index).items():
            setattr(dataset, keyword, value)
        reference = pydicom.Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
        dataset.SourceImageSequence = [reference]
    dataset.SOPInstanceUID = uid.generate_uid()
    dataset.ImageType = ["DERIVED", "SECONDARY", "POSTERIOR"]
    dataset.DerivationDescription = (
        f"{item.title}, by diffusion plug-and-play with the prior {run.record['prior'].get('name')}"[:1024]
    )
    dataset.ImageComments = f"Not an original image: {item.title}"
    dataset.BurnedInAnnotation = "NO"
    dataset.ConversionType = "WSD"
    dataset.Manufacturer = "dpnp-imaging"
    dataset.SoftwareVersions = version("dpnp-imaging")
    dataset.setdefault("Modality", "OT")
    for keyword in ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
        dataset.setdefault(keyword, "")  # must be there and may be empty
    dataset.setdefault("PatientBirthDate", "")
    dataset.setdefault("PatientSex", "")
    _set_pixels(dataset, values, run, item)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _set_pixels(dataset: Any, values: Array, run: Run, item: Exported) -> None:
    """16 bits with slope and intercept for gray, so that values come back within half a step; 8 bits for colour."""
    dataset.Rows, dataset.Columns = values.shape[:2]
    dataset.PixelRepresentation = 0
    if values.ndim == 3:
        assert run.source_range is not None
        first, last = run.source_range
        start = 0.0 if item.spread else first
        stored = np.round(255 * np.clip((values - start) / (last - first), 0, 1)).astype(np.uint8)
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        bits = 8
    else:
        low, high = float(values.min()), float(values.max())
        slope = float(f"{max((high - low) / 65535, 1e-12) * (1 + 1e-6):.9e}")  # as the file holds it: 16 characters
        intercept = float(f"{low:.8e}")
        stored = np.round((values - intercept) / slope).clip(0, 65535).astype("<u2")
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.9e}", f"{intercept:.8e}"
        dataset.setdefault("RescaleType", "US")
        dataset.WindowCenter, dataset.WindowWidth = f"{(low + high) / 2:.6g}", f"{max(high - low, 1e-6):.6g}"
        bits = 16
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OB" if bits == 8 else "OW"


def _geometry_of(source: Any, index: int) -> dict[str, Any]:
    """Geometry and units of one frame, from the plain tags or from an enhanced file's functional groups."""
    found = {}
    groups = [source]
    for name, at in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", index)):
        for sequence in source[name].value[at] if name in source else ():
            if sequence.VR == "SQ" and sequence.value:
                groups.append(sequence.value[0])
    for group in groups:
        found.update({keyword: group[keyword].value for keyword in GEOMETRY if keyword in group})
    return found
