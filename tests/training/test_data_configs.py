"""The configs for data of one kind, laid over the config for image folders, train on such data."""

import shutil
from pathlib import Path

import datasets
import nibabel
import numpy as np
import pydicom.data
import pytest

from dpnp_shared.prior import Prior
from dpnp_training.cli import main
from dpnp_training.prior_cli import main as prior_main

CONFIGS = Path(__file__).parents[2] / "configs" / "training"
SAMPLES = Path(pydicom.data.__file__).parent / "test_files"


def dicom(folder: Path) -> str:
    for name in ("CT_small.dcm", "MR_small.dcm", "rtdose.dcm"):
        shutil.copy(SAMPLES / name, folder / name.removesuffix(".dcm"))
    shutil.copy(SAMPLES / "MR_truncated.dcm", folder / "broken")
    return f"dicom:{folder}"


def nifti(folder: Path) -> str:
    volume = np.random.default_rng(0).integers(-1000, 2000, (24, 20, 6)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "a.nii.gz")
    return str(folder)


def stream(folder: Path) -> str:
    datasets.disable_progress_bars()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": list(pixels)}, features=datasets.Features({"image": datasets.Image()}))
    for shard in (0, 1):
        rows.shard(2, shard).to_parquet(folder / f"{shard}.parquet")
    return str(folder)


@pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge
@pytest.mark.parametrize(
    ("make", "size", "source_range", "options"),
    [
        (dicom, 128, (-1000.0, 2000.0), []),
        (nifti, 128, (-1000.0, 2000.0), ["--data.size=16"]),
        (stream, 64, (0.0, 255.0), ["--data.validation_images=4", "--data.workers=0"]),
    ],
    ids=["dicom", "nifti", "stream"],
)
def test_a_data_config_trains(make, size, source_range, options, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    source = make(folder)
    small = [
        "--model.network.init_args.widths=[4, 4]", "--model.network.init_args.blocks=1", "--model.network.init_args.attention=[]",
        "--model.network.init_args.head_channels=4", "--model.network.init_args.embedding=4", "--data.batch_size=2",
        "--trainer.max_steps=1", "--trainer.val_check_interval=1",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.limit_val_batches=1",
        "--trainer.default_root_dir=run", '--trainer.callbacks=[{"class_path": "dpnp_training.callbacks.ExportPrior"}]',
        "--trainer.logger=false", f"--data.source={source}",
    ]  # fmt: skip
    configs = [f"--config={CONFIGS / name}" for name in ("image_folder.yaml", f"data/{make.__name__}.yaml")]
    main(["fit", *configs, *small, *options])
    prior_main(["verify", "run/prior", "--data", source])  # opens the same validation images again, in the same way
    card = Prior.from_pretrained("run/prior").card
    assert card.validation["images_sha256"]
    assert card.image_shape == ((3 if make is stream else 1), *([16 if "--data.size=16" in options else size] * 2))
    assert card.source_range == source_range
    if make is dicom:
        assert "broken" in caplog.text  # the corrupt file is named


def test_every_data_config_is_tried():
    assert {path.stem for path in (CONFIGS / "data").glob("*.yaml")} == {"dicom", "nifti", "stream"}
