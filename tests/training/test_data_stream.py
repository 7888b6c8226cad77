"""Streams: every example once a pass, whoever reads it; validation apart; continued exactly."""

import itertools

import datasets
import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from dpnp_training.data import ImageData, Images
from dpnp_training.data.stream import HeldOut, Position, Stream, StreamedTable

FILES, ROWS = 3, 12  # values 0, 1, …, 35


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "table").mkdir()
    features = datasets.Features({"image": datasets.Image()})
    for f in range(FILES):
        rows = [Image.fromarray(np.full((4, 4), f * ROWS + i, np.uint8)) for i in range(ROWS)]
        datasets.Dataset.from_dict({"image": rows}, features).to_parquet(tmp_path / "table" / f"{f}.parquet")
    return tmp_path / "table"


def value(x: torch.Tensor) -> int:
    return round(float(x.flatten()[0] + 1) * 127.5)


def streams(source, readers, **kwargs):
    opened = StreamedTable(str(source), "train", None, held_out=5)
    images = Images(HeldOut(opened), "x", None, None, None)
    held_out = [value(images[i]) for i in range(len(images))]
    return held_out, [Stream(opened, images, 4, rank=r, world_size=readers, seed=0, **kwargs) for r in range(readers)]


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_each_example_once_a_pass_and_none_that_is_held_out(table, readers):
    held_out, every = streams(table, readers)
    assert held_out == [0, 1, 12, 13, 24]
    turns = {0: [], 1: []}
    for stream in every:
        for x, _, position in stream:
            if position.turn == 2:
                break
            turns[position.turn].append(value(x))
    expected = sorted(set(range(FILES * ROWS)) - set(held_out))
    assert sorted(turns[0]) == sorted(turns[1]) == expected
    assert turns[0] != expected
    assert turns[0] != turns[1]


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_continued_from_any_position(table, readers):
    _, every = streams(table, readers)
    stream = every[-1]
    seen = [(value(x), position) for x, _, position in itertools.islice(stream, 50)]
    for n in range(1, 45, 3):
        stream.start = [Position()] * (readers - 1) + [seen[n - 1][1]]
        again = [(value(x), position) for x, _, position in itertools.islice(stream, 5)]
        assert again == seen[n : n + 5], n


class _Seen(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append([value(x) for x in batch])
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        assert batch.shape[1:] == (1, 4, 4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_goes_on_where_it_was_left(table, tmp_path, workers):
    def train(steps, checkpoint=None):
        data = ImageData(
            str(table), streaming=True, shuffle_buffer=4, validation_images=5, batch_size=3, workers=workers
        )
        model = _Seen()
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=4, check_val_every_n_epoch=None,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert data.description.image_shape == (1, 4, 4)
        return model.batches

    straight = train(14)
    first = train(5)
    second = train(14, tmp_path / "last.ckpt")
    assert first + second == straight
    assert len(straight) == 14
    assert len({v for batch in straight[:10] for v in batch}) >= 25


def test_errors_name_what_is_wrong(table, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 4, 4), np.uint8))
    for source, options, word in [
        (tmp_path / "x.npy", {}, "can be streamed"),
        (table, {"cache_images": True}, "exclude each other"),
        (table, {"validation_split": "test"}, "validation_split = 'test'"),
        (table, {"shuffle_buffer": 0}, "shuffle_buffer = 0"),
        (table, {"validation_images": 100}, "validation_images = 100: .* 36 were found"),
    ]:
        with pytest.raises(ValueError, match=word):
            ImageData(str(source), streaming=True, **options).setup("fit")
    data = ImageData(str(table), streaming=True, validation_images=5, workers=2)
    data.setup("fit")
    data.load_state_dict({"positions": [[0, 0, 0, 0]], "next_worker": 0})
    with pytest.raises(ValueError, match="read by 1 readers"):
        data.train_dataloader()
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        trainer.fit(_Seen(), ImageData(str(table), streaming=True, validation_images=5))
