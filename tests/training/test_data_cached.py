"""Decoded images kept on disk: equal to what is decoded each time, made once, whole or not at all."""

import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dpnp_training.data import ImageData, Images

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 12, 8), dtype=np.uint8)

pytestmark = pytest.mark.usefixtures("caches")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    for i, p in enumerate(PIXELS):
        Image.fromarray(p).save(tmp_path / "folder" / f"{i}.png")
    return tmp_path / "folder"


@pytest.mark.parametrize("kind", ["folder", "npy", "float", "table"])
def test_kept_images_are_those_that_are_decoded(folder, tmp_path, kind, open_data):
    source, options = tmp_path / "x.npy", {"size": (5, 4)}
    if kind == "folder":
        source = folder
    elif kind == "npy":
        np.save(source, PIXELS)
    elif kind == "float":
        np.save(source, PIXELS.astype(np.float32))
        options["value_range"] = (0.0, 200.0)  # values above it stay above 1
    else:
        source = tmp_path / "x.parquet"
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": [Image.fromarray(p) for p in PIXELS]}, features).to_parquet(source)
    decoded, kept = open_data(source, **options), open_data(source, **options, cache_images=True)
    for a, b in zip(decoded.train_set, kept.train_set, strict=True):
        torch.testing.assert_close(a, b, atol=1.6e-5 if kind != "float" else 0, rtol=0)
    assert kept.description == decoded.description or kept.description.data_std == pytest.approx(
        decoded.description.data_std, rel=1e-4
    )
    exact = {**options, "size": None}
    for a, b in zip(
        open_data(source, **exact).train_set, open_data(source, **exact, cache_images=True).train_set, strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_made_once_and_anew_if_anything_changed(folder, tmp_path, monkeypatch, open_data):
    decoded = []
    array = Images._array
    monkeypatch.setattr(Images, "_array", lambda self, i: (decoded.append(i), array(self, i))[1])
    options = {"cache_images": True, "cache_dir": str(tmp_path / "kept")}

    def files():
        return {file.name for file in (tmp_path / "kept" / "images").iterdir()}

    open_data(folder, size=4, **options)
    assert len(decoded) >= 10
    first = files()
    decoded.clear()
    open_data(folder, size=4, **options)
    assert set(decoded) <= {0}  # the first image alone is looked at
    assert files() == first
    open_data(folder, size=5, **options)
    second = files()
    assert len(second) == 2
    Image.fromarray(PIXELS[0] // 2).save(folder / "3.png")
    data = open_data(folder, size=5, **options)
    assert len(files()) == 3
    darker = open_data(folder, size=5)._train_images[3]
    torch.testing.assert_close(data._train_images[3], darker, atol=1.6e-5, rtol=0)


def test_interrupted_or_without_space_leaves_nothing(folder, tmp_path, monkeypatch, open_data):
    options = {"size": 4, "cache_images": True, "cache_dir": str(tmp_path / "kept")}
    with monkeypatch.context() as patch:
        array = Images._array

        def broken(self, index):
            if index == 7:
                raise KeyboardInterrupt
            return array(self, index)

        patch.setattr(Images, "_array", broken)
        with pytest.raises(KeyboardInterrupt):
            open_data(folder, **options)
    assert list((tmp_path / "kept" / "images").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(OSError, match="are needed"):
            open_data(folder, **options)
    assert list((tmp_path / "kept" / "images").iterdir()) == []
    with pytest.raises(ValueError, match="crop = 'random'"):
        ImageData(str(folder), crop="random", **options)


def test_what_a_killed_process_left_is_cleared_away(open_data, folder, tmp_path):
    options = {"size": (5, 4), "cache_images": True, "cache_dir": str(tmp_path / "kept")}
    path = open_data(folder, **options)._train_images.path
    abandoned, at_work = path.with_name(f"{path.name}.1.part"), path.with_name(f"{path.name}.2.part")
    for part in (abandoned, at_work):
        part.write_bytes(b"half an array")
    os.utime(abandoned, (0, 0))
    path.unlink()
    open_data(folder, **options)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, at_work.name]
