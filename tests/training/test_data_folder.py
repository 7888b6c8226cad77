"""A folder of somebody's own pictures: all kinds, sizes and depths, a corrupt one among them."""

import logging
import struct
import zlib
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from dpnp_training.cli import main
from dpnp_training.data import ImageData
from dpnp_training.data.pictures import Pictures
from dpnp_training.data.pixels import pixels

GRAY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (24, 18, 3), dtype=np.uint8)
DEEP = np.random.default_rng(2).integers(0, 65536, (16, 17), dtype=np.uint16)
DEEP_RGB = np.random.default_rng(3).integers(0, 65536, (16, 17, 3), dtype=np.uint16)

pytestmark = pytest.mark.usefixtures("caches")


def raw(data: ImageData, index: int = 0) -> np.ndarray:
    return data._train_images._array(index)


def png16(values: np.ndarray) -> bytes:
    """A 16-bit colour PNG, written by its specification (Pillow does not write such)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    h, w, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Ten images in nine sound files, two corrupt ones, and two that are no pictures."""
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(GRAY).save(folder / "gray.png")
    Image.fromarray(RGB).save(folder / "colour.JPG", quality=95)
    Image.fromarray(DEEP).save(folder / "deep.png")
    Image.fromarray(DEEP).save(folder / "sub" / "deep.tif")
    Image.fromarray(RGB).quantize(16).save(folder / "palette.png")
    Image.fromarray(np.dstack([RGB, RGB[..., :1]])).save(folder / "sub" / "alpha.png")
    Image.fromarray(GRAY > 100).save(folder / "sub" / "bits.tiff")
    Image.fromarray(GRAY).save(folder / "pages.tif", save_all=True, append_images=[Image.fromarray(RGB)])
    Image.fromarray(RGB).convert("CMYK").save(folder / "cmyk.jpg")
    whole = (folder / "colour.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "sub" / "text.png").write_text("no picture")
    (folder / "readme.txt").write_text("pictures of mine")
    (folder / ".hidden.png").write_text("thumbnail")
    return folder


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("channels", [1, 3])
def test_a_mixed_folder_trains_with_one_command(mixed, tmp_path, channels, caplog):
    network = {"channels": channels, "widths": [8], "blocks": 1, "head_channels": 4, "embedding": 8, "attention": []}
    command = [
        "fit", f"--data.source={mixed}", "--data.size=[12, 16]", f"--data.channels={channels}", "--data.on_error=skip",
        "--data.batch_size=4", "--data.crop=random", "--model.network=dpnp_shared.networks.UNet",
        "--trainer.max_steps=3", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false",
        f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=dpnp_training.callbacks.Checkpoints", "--trainer.num_sanity_val_steps=0",
        *(f"--model.network.{key}={value}" for key, value in network.items()),
    ]  # fmt: skip
    main(command)
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["prior"]["card"]["image_shape"] == (channels, 12, 16)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("dpnp")]
    assert any("cut.jpg" in text for text in messages)
    assert any("text.png" in text for text in messages)
    assert any("2 of 11 files" in text and "skipped" in text for text in messages)


def test_corrupt_files_are_named_and_refused(mixed, open_data):
    with pytest.raises(ValueError, match=r"2 of 11 files.*cut\.jpg \(.*text\.png \(.*on_error: skip"):
        open_data(mixed, channels=3, size=8)
    with pytest.raises(ValueError, match="on_error = 'ignore'"):
        open_data(mixed, channels=3, size=8, on_error="ignore")
    for name in ("cut.jpg", "sub/text.png"):
        (mixed / name).unlink()
    assert len(open_data(mixed, channels=3, size=8)._train_images) == 10


def test_order_is_that_of_the_paths(mixed, open_data):
    rows = open_data(mixed, channels=3, size=8, on_error="skip")._train_images.rows
    names = [Path(rows.name(i)).relative_to(mixed).as_posix() for i in range(len(rows))]
    assert names == [
        "cmyk.jpg", "colour.JPG", "deep.png", "gray.png", "pages.tif, image 0", "pages.tif, image 1", "palette.png",
        "sub/alpha.png", "sub/bits.tiff", "sub/deep.tif",
    ]  # fmt: skip


def test_what_does_not_fit_together_is_said(mixed, tmp_path, open_data):
    skip = {"on_error": "skip"}
    with pytest.raises(ValueError, match=r"different channels: 1 in 5 \(first: .*deep\.png\), 3 in 4 .*give channels"):
        open_data(mixed, size=8, **skip)
    with pytest.raises(ValueError, match=r"different height x width: .*give size"):
        open_data(mixed, channels=3, **skip)
    with pytest.raises(ValueError, match=r"2 images are smaller than size = \(20, 12\).*deep\.png \(16 x 17\)"):
        open_data(mixed, channels=3, size=(20, 12), resize=False, **skip)
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("")
    for folder, options, word in [
        ("empty", {}, "the folder is empty"),
        ("texts", {}, r"none of its 1 files \(the first is a\.txt\)"),
        ("broken", skip, "no image that can be read"),
        ("texts", {"split": "test"}, "split = 'test'"),
        ("texts", {"crop": "corner", "size": 8}, "corner"),
        ("texts", {"crop": "random"}, "need size"),
        ("texts", {"size": 0}, "size"),
        ("texts", {"value_range": (0.0, 1.0), "value_window": (0.0, 1.0)}, "give one of them"),
        ("texts", {"value_window": (1.0, 0.0)}, "value_window"),
    ]:
        with pytest.raises(ValueError, match=word):
            open_data(tmp_path / folder, **options)


def test_sub_folders_may_be_splits(tmp_path, open_data):
    for split, n in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        for i in range(n):
            Image.fromarray(GRAY).save(tmp_path / split / f"{i}.png")
    data = open_data(tmp_path, validation_split="test")
    assert (len(data.train_set), len(data.validation_set)) == (3, 2)


def test_16_bits_are_kept(tmp_path, open_data):
    Image.fromarray(DEEP).save(tmp_path / "a.png")
    Image.fromarray(DEEP).save(tmp_path / "b.tif")
    data = open_data(tmp_path)
    assert all(np.array_equal(raw(data, i), DEEP[None]) for i in (0, 1))
    torch.testing.assert_close(data._train_images[0], torch.from_numpy(DEEP[None] / 32767.5 - 1).float())


def test_16_bit_colour_that_would_be_cut_to_8_bits_is_refused(tmp_path, open_data):
    h, w, _ = DEEP_RGB.shape  # a minimal little-endian TIFF; entries: tag, type (3: short, 4: long), count, value
    entries = [
        (256, 3, 1, w), (257, 3, 1, h), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140),
        (277, 3, 1, 3), (278, 3, 1, h), (279, 4, 1, DEEP_RGB.nbytes), (284, 3, 1, 1),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = (struct.pack("<2sHI", b"II", 42, 8) + directory + struct.pack("<I", 0)).ljust(134, b"\0")
    (tmp_path / "a.tif").write_bytes(head + struct.pack("<3H", 16, 16, 16) + DEEP_RGB.astype("<u2").tobytes())
    (tmp_path / "b.png").write_bytes(png16(DEEP_RGB))
    with pytest.raises(ValueError, match=r"a\.tif \(ValueError: 16-bit colour.*b\.png \(ValueError: 16-bit colour"):
        open_data(tmp_path)


def test_exif_orientation(tmp_path, open_data):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    Image.fromarray(GRAY).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.rot90(GRAY, -1)).save(tmp_path / "b.png")
    data = open_data(tmp_path)
    assert np.array_equal(raw(data, 0), np.rot90(GRAY, -1)[None])
    assert np.array_equal(raw(data, 0), raw(data, 1))


def test_colour_conversions():
    picture = Image.fromarray(RGB)
    assert np.array_equal(pixels(picture, None), np.moveaxis(RGB, -1, 0))
    np.testing.assert_allclose(pixels(picture, 1)[0], RGB @ [0.299, 0.587, 0.114], atol=1)
    assert np.array_equal(pixels(Image.fromarray(GRAY), 3), np.repeat(GRAY[None], 3, 0))
    alpha = np.zeros((24, 18, 4), np.uint8)
    alpha[..., :3] = RGB
    alpha[:12, :, 3] = 255  # the lower half is transparent
    half = pixels(Image.fromarray(alpha), 3)
    assert np.array_equal(half[:, :12], np.moveaxis(RGB[:12], -1, 0))
    assert (half[:, 12:] == 255).all()
    assert np.array_equal(pixels(Image.fromarray(alpha), None), np.moveaxis(alpha, -1, 0))
    assert set(np.unique(pixels(Image.fromarray(GRAY > 100), None))) == {0, 255}


def test_a_second_start_opens_no_file_again(mixed, monkeypatch, open_data):
    options = {"channels": 3, "size": 8, "on_error": "skip"}
    first = open_data(mixed, **options)
    looked = []
    probe = Pictures.probe
    monkeypatch.setattr(Pictures, "probe", lambda self, path: (looked.append(path.name), probe(self, path))[1])
    second = open_data(mixed, **options)
    assert looked == []
    assert second._train_images.rows.skipped == first._train_images.rows.skipped
    assert np.array_equal(second._train_images.rows.shapes, first._train_images.rows.shapes)
    Image.fromarray(RGB).save(mixed / "cut.jpg")
    (mixed / "gray.png").unlink()
    third = open_data(mixed, **options)
    assert looked == ["cut.jpg"]
    assert list(third._train_images.rows.skipped) == ["sub/text.png"]
    assert third._train_images.rows.fingerprint != first._train_images.rows.fingerprint


def test_a_damaged_scan_is_made_again(mixed, caplog, tmp_path, open_data):
    options = {"channels": 3, "size": 8, "on_error": "skip", "cache_dir": str(tmp_path / "kept")}
    open_data(mixed, **options)
    (file,) = (tmp_path / "kept" / "scans").iterdir()
    good = file.read_text()
    file.write_text(good[:100])
    with caplog.at_level(logging.WARNING):
        open_data(mixed, **options)
    assert "is damaged" in caplog.text
    assert file.read_text() == good


def test_crops(tmp_path, open_data):
    ramp = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)
    for i in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    options = {"size": (8, 6), "value_range": (0.0, 599.0)}
    centre = open_data(tmp_path, resize=False, **options)
    torch.testing.assert_close(centre._train_images[0], torch.from_numpy(ramp[None, 6:14, 12:18] / 299.5 - 1).float())
    data = open_data(tmp_path, resize=False, crop="random", **options)
    images = data._train_images
    corners = set()
    for epoch in range(40):
        images.set_epoch(epoch)
        x = images[0]
        assert x.shape == (1, 8, 6)
        corner = round(float(x[0, 0, 0] + 1) * 299.5)
        top, left = divmod(corner, 30)
        torch.testing.assert_close(x, torch.from_numpy(ramp[None, top : top + 8, left : left + 6] / 299.5 - 1).float())
        corners.add((top, left))
        assert torch.equal(images[0], x)
    assert len(corners) > 30
    assert not torch.equal(images[1], images[0])
    torch.testing.assert_close(data.validation_set[0], centre.validation_set[0])
    resized = open_data(tmp_path, crop="random", **options)._train_images[0]
    assert resized.shape == (1, 8, 6)


class _Seen(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch.clone())

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore")
def test_each_epoch_has_crops_of_its_own_in_loader_processes_too(tmp_path):
    Image.fromarray(GRAY).save(tmp_path / "a.png")
    Image.fromarray(GRAY).save(tmp_path / "b.png")

    def epochs(workers):
        data = ImageData(str(tmp_path), size=4, crop="random", resize=False, batch_size=1, workers=workers)
        model = _Seen()
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data)
        return model.batches

    without, with_worker = epochs(0), epochs(1)
    assert len(without) == 3
    assert all(torch.equal(a, b) for a, b in zip(without, with_worker, strict=True))
    assert not torch.equal(without[0], without[1])
    assert not torch.equal(without[1], without[2])
