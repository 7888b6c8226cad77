"""Images for other programs come back as they were, where they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pydicom.data
import pytest
import tifffile
import torch
from PIL import Image

from dpnp_inference.cli import main
from dpnp_inference.export_images import export_run
from dpnp_inference.files import read_image, read_measurement, read_tensor
from dpnp_inference.finished_run import Run, read_run
from dpnp_inference.posterior import Posterior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.medical import Dicom, Nifti
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import SuperResolution
from dpnp_shared.prior import PriorCard

CT = Path(pydicom.data.__file__).parent / "test_files" / "CT_small.dcm"  # 128 x 128
HU = (-1000.0, 2000.0)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(shape=(1, 6, 5), *, chains=5, image=None, index=0, value_range=(-1.0, 1.0)) -> Run:
    generator = torch.Generator().manual_seed(0)
    low, high = value_range
    samples = low + (high - low) * torch.rand((chains, 1, *shape), generator=generator)
    Posterior(samples, {"chains": chains}).save("run")
    np.save("run/measurement.npy", samples[0, 0].numpy())
    prior = {"name": "test", "source": "p", "value_range": value_range, "source_range": HU}
    Path("run/run.json").write_text(json.dumps({"config": {"image": image, "index": index}, "prior": prior}))
    return read_run("run")


def hounsfield(x: torch.Tensor, value_range=(-1.0, 1.0)) -> np.ndarray:
    low, high = value_range
    return HU[0] + (HU[1] - HU[0]) * (x.double().numpy() - low) / (high - low)


@pytest.mark.parametrize(("bits", "shape"), [(8, (1, 6, 5)), (16, (1, 6, 5)), (8, (3, 6, 5))])
def test_png_within_half_a_step_in_the_priors_range(bits, shape):
    run = make_run(shape, value_range=(0.0, 3.0))
    files = export_run(run, "png", ["mean", "std", "quantiles", "samples"], "out", quantiles=[0.1, 0.9], bits=bits)
    assert [file.name for file in files] == [
        "mean.png",
        "std.png",
        "quantile_0.1.png",
        "quantile_0.9.png",
        *(f"sample_chain{c}_draw0.png" for c in range(5)),
    ]
    about = json.loads(Path("out/export.json").read_text())["files"]
    x = {"mean": run.posterior.mean, "std": run.posterior.std, "quantile_0.9": run.posterior.quantile(0.9)}
    for name, wanted in {**x, "sample_chain3_draw0": run.posterior.samples[3, 0]}.items():
        with Image.open(f"out/{name}.png") as picture:
            stored = np.asarray(picture).astype(np.float64)
            assert "value = 0 + " in picture.text["Description"]
        scale = about[f"{name}.png"]
        assert scale["slope"] == pytest.approx(3 / (2**bits - 1))
        stored = stored[None] if stored.ndim == 2 else np.moveaxis(stored, -1, 0)
        error = np.abs(scale["intercept"] + scale["slope"] * stored - wanted.numpy())
        assert error.max() <= scale["slope"] / 2 * (1 + 1e-6)
    if bits == 8:
        card = PriorCard("test", shape, value_range=(0.0, 3.0))
        torch.testing.assert_close(
            read_image("out/mean.png", 0, shape, card, None), x["mean"], atol=3 / 510 * 1.001, rtol=0
        )


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 6, 5), (2, 6, 5)])
def test_tiff_comes_back_exactly(shape):
    run = make_run(shape)
    files = export_run(run, "tiff", ["mean", "std"], "out")
    assert len(files) == (4 if shape[0] == 2 else 2)
    x = torch.cat([read_tensor(file) for file in files]).reshape(2, *shape)
    assert torch.equal(x[0], run.posterior.mean)
    assert torch.equal(x[1], run.posterior.std)


def test_tiff_files_of_other_programs():
    colour, stack = (np.random.default_rng(0).integers(0, 65536, s).astype(">u2") for s in ((4, 5, 3), (7, 4, 5)))
    tifffile.imwrite("colour.tif", colour, photometric="rgb", byteorder=">")
    tifffile.imwrite("stack.tif", stack, photometric="minisblack")
    assert torch.equal(read_tensor("colour.tif").int(), torch.from_numpy(np.moveaxis(colour, -1, 0).astype(np.int32)))
    card = PriorCard("test", (1, 4, 5))
    expected = torch.from_numpy(stack[3].astype(np.float32)) / 65535 * 2 - 1
    torch.testing.assert_close(read_image("stack.tif", 3, (1, 4, 5), card, None)[0], expected)
    Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5)).save("compressed.tif", compression="tiff_lzw")
    assert torch.equal(read_tensor("compressed.tif").flatten(), torch.arange(20, dtype=torch.uint8))
    Path("broken.tif").write_bytes(b"II*\0\1")
    with pytest.raises(ValueError, match=r"broken\.tif cannot be read"):
        read_tensor("broken.tif")


def oblique(orientation: str) -> Path:
    """A volume of three slices, stored along other axes than it is shown."""
    values = np.arange(5 * 6 * 3, dtype=np.float32).reshape(5, 6, 3)
    affine = np.array([[0.8, 0, 0, -11], [0, 0.9, 0, 7], [0, 0, 2.5, 30], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(values, affine)
    codes = nibabel.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), codes))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, "volume.nii")
    return Path("volume.nii")


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "AIR", "SLP"])
def test_nifti_keeps_geometry_and_units_of_the_slice(orientation):
    file = oblique(orientation)
    run = make_run(image=str(file), index=1)
    (mean, std) = export_run(run, "nifti", ["mean", "std"], "out")
    np.testing.assert_allclose(Nifti().read(mean, 0), hounsfield(run.posterior.mean), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(Nifti().read(std, 0), 1500 * run.posterior.std.numpy(), rtol=1e-5)
    # where a voxel of the slice lies, in millimetres: that of the value it replaces
    Nifti_ = Nifti()
    placed = Nifti_.place(file, 1, Nifti_.read(file, 1)[0])
    values, original = np.asarray(placed.dataobj), nibabel.load(file)
    inverse = np.linalg.inv(original.affine)
    for voxel in np.ndindex(values.shape):
        at = inverse @ placed.affine @ [*voxel, 1]
        assert original.dataobj[tuple(np.round(at[:3]).astype(int))] == values[voxel]
    np.testing.assert_allclose(nibabel.load(mean).affine, placed.affine)
    assert nibabel.load(mean).header.get_xyzt_units()[0] == "mm"


def test_nifti_and_dicom_without_a_geometry_are_upright():
    run = make_run()
    (mean,) = export_run(run, "nifti", ["mean"], "nifti")
    np.testing.assert_allclose(Nifti().read(mean, 0), hounsfield(run.posterior.mean), rtol=1e-5, atol=1e-3)
    (mean,) = export_run(run, "dicom", ["mean"], "dicom")
    np.testing.assert_allclose(Dicom().read(mean, 0), hounsfield(run.posterior.mean), atol=0.03)
    assert "PixelSpacing" not in pydicom.dcmread(mean)


def test_dicom_is_a_derived_image_in_place_without_the_patient():
    shutil.copy(CT, "ct.dcm")
    original = pydicom.dcmread("ct.dcm")
    run = make_run((1, 128, 128), image="ct.dcm")
    mean, std, *samples = export_run(run, "dicom", ["mean", "std", "samples"], "out")
    found = pydicom.dcmread(mean)
    for keyword in (
        "PixelSpacing",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "FrameOfReferenceUID",
        "Modality",
    ):
        assert found[keyword].value == original[keyword].value
    assert str(original.PatientName) not in found.to_json()
    assert (found.PatientName, found.PatientID) == ("", "")
    assert found.ImageType[:2] == ["DERIVED", "SECONDARY"]
    assert found.SeriesDescription == "DPnP posterior mean, derived"
    assert pydicom.dcmread(std).SeriesDescription == "DPnP posterior std, derived"
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == original.SOPInstanceUID
    headers = [pydicom.dcmread(file) for file in (mean, std, *samples)]
    assert len({header.SOPInstanceUID for header in headers} | {original.SOPInstanceUID}) == 8
    assert len({header.SeriesInstanceUID for header in headers} | {original.SeriesInstanceUID}) == 4
    assert len({(header.SeriesInstanceUID, header.InstanceNumber) for header in headers}) == 7
    assert {header.StudyInstanceUID for header in headers} & {original.StudyInstanceUID} == set()
    expected = {mean: hounsfield(run.posterior.mean), std: 1500 * run.posterior.std.double().numpy()}
    for file, values in expected.items():
        step = float(pydicom.dcmread(file).RescaleSlope)
        assert step < 0.05
        assert np.abs(Dicom().read(file, 0) - values).max() <= step / 2 + 1e-3  # and float32's own rounding
        plain = pydicom.dcmread(file)
        stored = plain.pixel_array.astype(np.float64)
        back = stored * float(plain.RescaleSlope) + float(plain.RescaleIntercept)
        assert np.abs(back - values).max() <= step / 2 * (1 + 1e-4)


def test_the_patient_comes_with_like_only():
    run = make_run((1, 128, 128))
    (mean,) = export_run(run, "dicom", ["mean"], "out", like=str(CT))
    original, found = pydicom.dcmread(CT), pydicom.dcmread(mean)
    assert (found.PatientID, found.StudyInstanceUID) == (original.PatientID, original.StudyInstanceUID)
    assert found.SOPInstanceUID != original.SOPInstanceUID
    assert found.SeriesInstanceUID != original.SeriesInstanceUID
    assert "DERIVED" in found.ImageType
    assert not any(element.tag.is_private for element in found)
    np.testing.assert_allclose(Dicom().read(mean, 0), hounsfield(run.posterior.mean), atol=0.03)


def test_dicom_colour():
    run = make_run((3, 6, 5))
    (mean,) = export_run(run, "dicom", ["mean"], "out")
    back = Dicom().read(mean, 0).astype(np.float64) / 255 * 2 - 1
    np.testing.assert_allclose(back, run.posterior.mean.numpy(), atol=1.001 / 255)


def test_medical_files_are_read_in_the_units_of_the_training_data():
    card = PriorCard("test", (1, 128, 128), source_range=(-800.0, 400.0))
    stored = pydicom.dcmread(CT).pixel_array.astype(np.float32) - 1024
    expected = torch.from_numpy((stored + 800) / 600 - 1)[None]
    torch.testing.assert_close(read_image(CT, 0, (1, 128, 128), card, None), expected.clamp(-1, 1))
    model = ForwardModel(SuperResolution((1, 128, 128), 1), GaussianNoise(0.1))
    y = read_measurement(str(CT), None, model, card)
    torch.testing.assert_close(y, expected)
    assert y.max() > 1
    volume = str(oblique("RAS"))
    model = ForwardModel(SuperResolution((1, 6, 5), 1), GaussianNoise(0.1))
    y = read_measurement(volume, None, model, PriorCard("test", (1, 6, 5), source_range=(0.0, 90.0)), 2)
    torch.testing.assert_close(y, torch.from_numpy(Nifti().read(Path(volume), 2)) / 45 - 1)
    with pytest.raises(ValueError, match=r"index = 3; volume\.nii holds 3 images"):
        read_image(volume, 3, (1, 6, 5), card, None)
    Path("broken.dcm").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.dcm cannot be read"):
        read_tensor("broken.dcm")


def test_the_command(capsys):
    make_run()
    main(["export", "run", "--format", "tiff", "--what", "mean,quantiles", "--quantiles", "0.5", "--output", "out"])
    assert capsys.readouterr().out == "2 files in out\n"
    assert sorted(path.name for path in Path("out").iterdir()) == ["export.json", "mean.tif", "quantile_0.5.tif"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "png", "--what", "median"], "what = 'median'; allowed are mean, std, samples, quantiles"),
        (["--format", "png", "--bits", "12"], "bits = 12; allowed are 8 and 16"),
        (["--format", "png", "--like", "a.dcm"], "like = 'a.dcm'; a PNG file has no geometry"),
        (["--format", "dicom", "--like", "a.dcm"], "like = 'a.dcm' does not exist"),
        (["--format", "dicom", "--like", "a.png"], "it must be a DICOM or NIfTI file"),
        (["--format", "dicom", "--like", str(CT)], r"has images of shape \(128, 128\), the run's have \(6, 5\)"),
        (["--format", "nifti", "--like", str(CT)], "is no NIfTI file"),
        (["--format", "nifti", "--like", "volume.nii"], r"slices of shape \(5, 6\)"),
        (["--format", "png", "--what", "quantiles", "--quantiles", "2"], r"q = 2.0; it must be in \[0, 1\]"),
        (["--format", "png", "--what", "quantiles", "--quantiles", "x"], "quantiles = 'x'"),
    ],
)
def test_bad_requests_leave_nothing_behind(arguments, message):
    make_run()
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5, 2), np.float32), np.eye(4)), "volume.nii")
    with pytest.raises(SystemExit, match=message):
        main(["export", "run", *arguments, "--output", "out"])
    assert sorted(path.name for path in Path().iterdir()) == ["run", "volume.nii"]


def test_an_input_that_is_gone_is_not_passed_over():
    run = make_run((1, 128, 128), image="gone.dcm")
    with pytest.raises(FileNotFoundError, match=r"gone\.dcm, from which the run was made, is not there"):
        export_run(run, "dicom", ["mean"], "out")
    assert export_run(run, "dicom", ["mean"], "out", like="none")
    with pytest.raises(FileExistsError, match="output = 'out' exists"):
        export_run(run, "dicom", ["mean"], "out", like="none")


def test_a_single_draw_has_no_standard_deviation():
    with pytest.raises(ValueError, match="at least 2 draws"):
        export_run(make_run(chains=1), "tiff", ["mean", "std"], "out")
    assert not Path("out").exists()
    assert export_run(make_run(chains=1), "tiff", ["samples"], "out")[0].name == "sample_chain0_draw0.tif"
