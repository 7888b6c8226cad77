"""DICOM and NIfTI folders: values in the modality's units, orientation, frames and slices."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pydicom.data
import pytest
import torch

from dpnp_shared.medical import Dicom, Nifti
from dpnp_training.data import ImageData

SAMPLES = Path(pydicom.data.__file__).parent / "test_files"

pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture
def ct(tmp_path) -> Path:
    """Two copies of the package's CT slice, one of them in MONOCHROME1."""
    folder = tmp_path / "ct"
    folder.mkdir()
    shutil.copy(SAMPLES / "CT_small.dcm", folder / "a.dcm")
    inverted = pydicom.dcmread(SAMPLES / "CT_small.dcm")
    inverted.PhotometricInterpretation = "MONOCHROME1"
    inverted.PixelData = (-1 - inverted.pixel_array).astype("<i2").tobytes()
    inverted.save_as(folder / "b.dcm")
    return folder


def test_hounsfield_units_and_monochrome1(ct, open_data):
    stored = pydicom.dcmread(ct / "a.dcm").pixel_array.astype(np.float32)
    data = open_data(ct, value_window=(-800.0, 400.0))
    expected = torch.from_numpy(((stored - 1024).clip(-800, 400) + 800) / 600 - 1)[None]
    assert expected.min() == -1.0
    assert expected.max() == 1.0
    for x in (data._train_images[0], data._train_images[1]):
        torch.testing.assert_close(x, expected)
    assert data._train_images.source_range == (-800.0, 400.0)
    with pytest.raises(ValueError, match=r"a\.dcm holds float32 values.*value_window.*\[-896, 1167\]"):
        open_data(ct)


def test_frames_colours_and_what_is_no_image(tmp_path, open_data):
    rgb = Dicom().read(SAMPLES / "examples_rgb_color.dcm", 0)
    assert (rgb.shape, rgb.dtype) == ((3, 240, 320), np.uint8)
    assert np.array_equal(np.moveaxis(rgb, 0, -1), pydicom.dcmread(SAMPLES / "examples_rgb_color.dcm").pixel_array)
    assert Dicom().read(SAMPLES / "examples_palette.dcm", 0).shape == (3, 350, 800)
    assert Dicom().probe(SAMPLES / "test-SR.dcm") == []
    shutil.copy(SAMPLES / "rtdose.dcm", tmp_path / "dose")  # 15 frames, no suffix
    shutil.copy(SAMPLES / "test-SR.dcm", tmp_path / "report")
    data = open_data(f"dicom:{tmp_path}", value_range=(0.0, 10.0))
    assert len(data._train_images) == 15
    dose = pydicom.dcmread(tmp_path / "dose").pixel_array
    torch.testing.assert_close(data._train_images[7][0], torch.from_numpy(dose[7] / 5 - 1).float())
    assert data._train_images.name(7).endswith("dose, image 7")


def test_damaged_dicom_is_named(ct, open_data):
    shutil.copy(SAMPLES / "MR_truncated.dcm", ct / "c.dcm")
    with pytest.raises(ValueError, match=r"1 of 3 files.*c\.dcm \("):
        open_data(ct, value_window=(-800.0, 400.0))
    data = open_data(ct, value_window=(-1000.0, 400.0), on_error="skip")
    assert len(data._train_images) == 2


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nifti_slices_lie_as_the_affine_says(tmp_path, suffix, axis, open_data):
    volume = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)  # left-right, posterior-anterior, …
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    image = nibabel.Nifti1Image(volume, affine)
    nibabel.save(image, tmp_path / f"a{suffix}")
    turned = nibabel.orientations.axcodes2ornt(("P", "S", "L"))  # the same volume in another order of storage
    transform = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), turned)
    nibabel.save(image.as_reoriented(transform), tmp_path / f"b{suffix}")
    data = open_data(tmp_path, axis=axis, value_range=(-5.0, 5.0), validation_fraction=0.1)
    n = volume.shape[axis]
    assert len(data._train_images) == 2 * n
    for i in range(n):
        expected = torch.from_numpy(volume.take(i, axis).T[::-1] / 5)[None]
        torch.testing.assert_close(data._train_images[i], expected)
        torch.testing.assert_close(data._train_images[n + i], expected)
    # a volume is either trained on or validated on
    assert sorted(data.validation_set.indices) in (list(range(n)), list(range(n, 2 * n)))
    assert sorted([*data.train_set.indices, *data.validation_set.indices]) == list(range(2 * n))


def test_nifti_scaling_four_dimensions_and_single_images(tmp_path):
    stored = np.random.default_rng(0).integers(0, 100, (4, 5, 3, 2)).astype(np.int16)
    image = nibabel.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(stored[:, :, 0, 0], np.eye(4)), tmp_path / "b.nii")
    reader = Nifti()
    values = nibabel.load(tmp_path / "a.nii.gz").get_fdata()
    assert reader.probe(tmp_path / "a.nii.gz") == [(1, 5, 4)] * 6
    np.testing.assert_allclose(reader.read(tmp_path / "a.nii.gz", 4)[0], values[:, :, 1, 1].T[::-1])
    assert reader.probe(tmp_path / "b.nii") == [(1, 5, 4)]
    np.testing.assert_allclose(reader.read(tmp_path / "b.nii", 0)[0], stored[:, :, 0, 0].T[::-1])
    assert Nifti(0).read(tmp_path / "b.nii", 2).shape == (1, 1, 5)


def test_cut_off_nifti_and_mixed_folders(tmp_path, open_data):
    volume = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "a.nii.gz")
    whole = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"1 of 2 files.*b\.nii\.gz \("):
        open_data(tmp_path, value_range=(-5.0, 5.0))
    shutil.copy(SAMPLES / "CT_small.dcm", tmp_path / "c.dcm")
    with pytest.raises(ValueError, match=r"1 of DICOM \(first: c\.dcm\), 2 of NIfTI, axis 2"):
        open_data(tmp_path, value_range=(-5.0, 5.0))
    with pytest.raises(ValueError, match="axis = 3"):
        ImageData(str(tmp_path), axis=3)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        open_data("dicom:nowhere")


def test_hdf5(tmp_path, open_data):
    import h5py

    values = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["group/images"] = values
        file["labels"] = np.arange(6)
    data = open_data(tmp_path / "x.h5", key="group/images", workers=1, batch_size=2)
    torch.testing.assert_close(data._train_images[3], torch.from_numpy(values[3:4] / 127.5 - 1).float())
    assert next(iter(data.train_dataloader())).shape == (2, 1, 5, 4)
    with pytest.raises(ValueError, match="group/images"):
        open_data(tmp_path / "x.h5")
