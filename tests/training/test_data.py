import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dpnp_training.data import ImageData, measure_spread

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 6, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (10, 6, 8, 3), dtype=np.uint8)


def fit_on(source, **kwargs) -> ImageData:
    data = ImageData(str(source), **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def every_image(data: ImageData) -> torch.Tensor:
    """All images, whatever the split and order, sorted by their content."""
    images = [*data.train_set, *data.validation_set]
    return torch.stack(sorted(images, key=lambda x: x.flatten().tolist()))


def expected(pixels: np.ndarray, top: float = 255.0) -> torch.Tensor:
    images = [torch.from_numpy(p).float() * 2 / top - 1 for p in pixels]
    images = [x[None] if x.ndim == 2 else x.movedim(-1, 0) for x in images]
    return torch.stack(sorted(images, key=lambda x: x.flatten().tolist()))


@pytest.fixture
def sources(tmp_path):
    """The same gray images in every kind of place."""
    np.save(tmp_path / "x.npy", PIXELS)
    np.savez(tmp_path / "x.npz", x=PIXELS, labels=np.arange(10))
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i, p in enumerate(PIXELS):
        Image.fromarray(p).save(tmp_path / "folder" / ("sub" if i % 2 else ".") / f"{i}.png")
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"picture": [Image.fromarray(p) for p in PIXELS], "label": range(10)}, features)
    table.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "part-0.parquet")
    table.save_to_disk(tmp_path / "disk")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "dict")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, *PIXELS.shape) + PIXELS.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, 10) + bytes(10))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("x.npy", {}),
        ("x.npz", {"key": "x"}),
        ("folder", {}),
        ("x.parquet", {}),
        ("parquet", {}),
        ("disk", {"column": "picture"}),
        ("dict", {"split": "test"}),
    ],
)
def test_every_source_gives_the_same_images(sources, source, options, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(sources / "cache"))
    data = fit_on(sources / source, **options)
    torch.testing.assert_close(every_image(data), expected(PIXELS))
    assert data.description.image_shape == (1, 6, 8)
    assert data.description.source_range == (0.0, 255.0)
    assert len(data.validation_set) == 1


def test_torchvision(sources):
    data = fit_on("torchvision:FashionMNIST", root=str(sources), validation_split="test")
    assert len(data.train_set) == len(data.validation_set) == 10
    torch.testing.assert_close(
        torch.stack(list(data.train_set)), torch.from_numpy(PIXELS)[:, None].float() * 2 / 255 - 1
    )


def test_colour_channels_and_ranges(tmp_path):
    np.save(tmp_path / "last.npy", COLOUR)
    np.save(tmp_path / "first.npy", np.moveaxis(COLOUR, -1, 1))
    for name in ("last.npy", "first.npy"):
        torch.testing.assert_close(every_image(fit_on(tmp_path / name)), expected(COLOUR))
    five = np.random.default_rng(0).normal(size=(4, 5, 6, 8)).astype(np.float32)
    np.save(tmp_path / "five.npy", five)
    data = fit_on(tmp_path / "five.npy", value_range=(-4.0, 4.0))
    assert data.description.image_shape == (5, 6, 8)
    assert data.description.source_range == (-4.0, 4.0)
    np.save(tmp_path / "deep.npy", PIXELS.astype(np.uint16) * 257)
    torch.testing.assert_close(every_image(fit_on(tmp_path / "deep.npy")), expected(PIXELS))


def test_conversion_and_resizing(tmp_path):
    Image.fromarray(COLOUR[0]).save(tmp_path / "a.png")
    Image.fromarray(PIXELS[0].repeat(2, 0)).save(tmp_path / "b.png")  # 12 x 8
    Image.fromarray(PIXELS[0].astype(np.uint16)).save(tmp_path / "c.png")
    data = fit_on(tmp_path, channels=3, size=(4, 4), value_range=(0.0, 255.0))
    assert {tuple(x.shape) for x in (*data.train_set, *data.validation_set)} == {(3, 4, 4)}
    with pytest.raises(ValueError, match="give size"):
        every_image(fit_on(tmp_path, channels=3, value_range=(0.0, 255.0)))
    data = fit_on(tmp_path, channels=3, size=4)  # without value_range, each image's own integer type gives its range
    darkest = min((*data.train_set, *data.validation_set), key=torch.mean)
    assert float(darkest.max()) < -0.99
    flat = np.full((3, 10, 30), 51, np.uint8)
    np.save(tmp_path / "flat.npy", flat)
    x = fit_on(tmp_path / "flat.npy", size=5).train_set[0]
    torch.testing.assert_close(x, torch.full((1, 5, 5), 51 / 127.5 - 1))


def test_batches_and_their_order(tmp_path):
    np.save(tmp_path / "x.npy", PIXELS)
    data = fit_on(tmp_path / "x.npy", batch_size=4)
    loader = data.train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat(list(loader)))
    assert orders[0].shape == (8, 1, 6, 8)
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


def test_spread():
    generator = torch.Generator().manual_seed(0)
    wide = 3.0 * torch.randn(500, 1, generator=generator) * torch.ones(1, 16) / 4  # std 3 along (1, …, 1)/4
    data = (wide + 0.1 * torch.randn(500, 16, generator=generator)).reshape(500, 1, 4, 4) + 5.0
    data_std, spread = measure_spread(list(data))
    assert spread == pytest.approx(3.0, rel=0.1)
    assert data_std == pytest.approx(float(data.std()), rel=1e-4)
    assert measure_spread(list(data[:5]))[1] > 0
    with pytest.raises(ValueError, match="all images are equal"):
        measure_spread(list(torch.zeros(4, 1, 2, 2)))


def test_errors_name_what_is_wrong(tmp_path, sources):
    np.save(tmp_path / "float.npy", PIXELS.astype(np.float32))
    np.save(tmp_path / "nan.npy", np.full((3, 4, 4), np.nan, np.float32))
    np.save(tmp_path / "flat.npy", PIXELS[0, 0])
    np.save(tmp_path / "none.npy", PIXELS[:0])
    for source, options, word in [
        ("float.npy", {}, "give value_range"),
        ("nan.npy", {"value_range": (0.0, 1.0)}, "image 0"),
        ("flat.npy", {}, r"\(8,\)"),
        ("none.npy", {}, "holds no image"),
        ("x.npz", {}, "'x', 'labels'"),
        ("x.npz", {"key": "y"}, "'y'"),
        ("disk", {"column": "label2"}, "label2"),
        ("dict", {"split": "validation"}, "validation"),
        ("x.npy", {"channels": 2}, "channels = 2"),
        ("x.npy", {"batch_size": 0}, "batch_size"),
        ("x.npy", {"validation_fraction": 1.0}, "validation_fraction"),
        ("x.npy", {"value_range": (1.0, 1.0)}, "value_range"),
    ]:
        with pytest.raises(ValueError, match=word):
            fit_on(tmp_path / source, **options)
    for source in ("nothing.npy", "/nowhere/at/all"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            fit_on(tmp_path / source if "." in source else source)
    with pytest.raises(FileNotFoundError, match="FashionMNIST"):
        fit_on("torchvision:FashionMNIST", root=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="has no Nothing"):
        fit_on("torchvision:Nothing")
