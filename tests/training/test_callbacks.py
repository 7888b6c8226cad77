"""What is watched during a training: figures and pictures in files and loggers, and no trace left in the training."""

import math
import os
import subprocess
import sys
from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpnp_shared.features import PixelFeatures
from dpnp_shared.networks import UNet
from dpnp_shared.prior import Prior
from dpnp_training import ImageData, ScoreMatching, callbacks
from dpnp_training.callbacks import memorisation, sample_quality
from dpnp_training.ema import EMASettings

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(watch, *, logger=False, channels=1, steps=4, images=40, precision="32-true", clip=None):
    """A few steps on non-square images; returns the trainer and the module."""
    L.seed_everything(0)
    shape = (images, 8, 6) if channels == 1 else (images, 8, 6, channels)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    network = UNet(channels=channels, widths=[8, 8], blocks=1, attention=[], embedding=8)
    module = ScoreMatching(network, ema=EMASettings(beta=0.9), learning_rate=1e-2, warmup_steps=0, decay="constant")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=logger, callbacks=watch, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir="run", log_every_n_steps=1,
        limit_val_batches=1, precision=precision, gradient_clip_val=clip,
    )  # fmt: skip
    trainer.fit(module, ImageData("x.npy", validation_fraction=0.2, batch_size=4))
    return trainer, module


def every_callback(sampler):
    features = PixelFeatures((2, 2))
    return [
        callbacks.Throughput(1),
        callbacks.GradientNorms(1, 2),
        callbacks.SampleGrid(2, images=4, calls=2),
        callbacks.DenoisingStrips(2, images=2),
        callbacks.SampleQuality(features, 2, samples=5, calls=2),
        callbacks.Memorisation(2, samples=3, calls=2, pairs=2),
        callbacks.Reconstruction(sampler, 2, images=2),
    ]


class Recording:
    """A posterior sampler that keeps what it is given, and moves the global random numbers."""

    def __init__(self):
        self.calls = []

    def __call__(self, prior, truth):
        torch.rand(3)
        self.calls.append((prior, truth))
        return {"psnr": 10.0 * len(self.calls)}, torch.full((1, 2, 3), 0.5)


class ImageLogger(CSVLogger):
    """Like the logger of Weights & Biases: pictures through ``log_image``."""

    def __init__(self, folder):
        super().__init__(folder)
        self.pictures = []

    def log_image(self, key, images, step=None, **kwargs):
        self.pictures.append((key, images[0].size, step))


def figures_of(folder) -> dict[str, list]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]} | {
        tag: events.Images(tag) for tag in events.Tags()["images"]
    }


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_reaches_tensorboard_and_files(channels):
    train(every_callback(sampler := Recording()), logger=TensorBoardLogger("."), channels=channels)
    found = figures_of("lightning_logs/version_0")
    for name in ("samples", "denoising", "memorisation", "reconstruction"):
        assert sorted(p.name for p in Path("run", name).iterdir()) == ["step_00000002.png", "step_00000004.png"]
        assert [event.step for event in found[name]] == [2, 4]
    for name in ("fid", "kid", "fid_train", "kid_train"):
        assert [event.step for event in found[f"quality/{name}"]] == [2, 4]
    assert [event.step for event in found["gradient_norm"]] == [0, 1, 2, 3]
    assert [event.step for event in found["gradient_norm/down"]] == [1, 3]
    assert [event.value for event in found["reconstruction/psnr"]] == [15.0, 35.0]  # the mean over two images
    prior, truth = sampler.calls[0]
    assert isinstance(prior, Prior)
    assert tuple(truth.shape) == (channels, 8, 6)
    # two images, two rows each of the clean one and six levels, one pixel between them
    assert Image.open("run/denoising/step_00000002.png").size == (7 * 7 + 1, 4 * 9 + 1)
    assert Image.open("run/reconstruction/step_00000002.png").size == (3, 4)


@pytest.mark.parametrize("kind", ["none", "csv", "images"])
def test_other_loggers_serve_as_well(kind):
    logger = {"none": lambda: False, "csv": lambda: CSVLogger("."), "images": lambda: ImageLogger(".")}[kind]()
    train([callbacks.SampleGrid(2, images=4, calls=2), callbacks.GradientNorms(1, 1)], logger=logger, steps=2)
    assert Path("run/samples/step_00000002.png").is_file()
    if logger:
        assert "gradient_norm/head" in Path("lightning_logs/version_0/metrics.csv").read_text()
    if kind == "images":
        assert logger.pictures == [("samples", (2 * 7 + 1, 2 * 9 + 1), 2)]


def test_watching_leaves_no_trace_in_the_training():
    _, alone = train([])
    state = torch.get_rng_state()
    _, watched = train(every_callback(Recording()))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in alone.state_dict().items():
        if key.startswith(("network.", "ema.")):
            assert torch.equal(watched.state_dict()[key], value), key


class Gradients(L.Callback):
    """The norm of the gradient as the optimiser sees it."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.norm = math.sqrt(sum(float(p.grad.square().sum()) for p in pl_module.network.parameters()))


def test_gradient_norms_are_those_before_clipping():
    train([callbacks.GradientNorms(1, 1), unclipped := Gradients()], logger=TensorBoardLogger("."), steps=1)
    train([callbacks.GradientNorms(1, 1), clipped := Gradients()], logger=TensorBoardLogger("."), steps=1, clip=1e-3)
    found = figures_of("lightning_logs/version_1")
    assert clipped.norm == pytest.approx(1e-3, rel=1e-2)
    assert found["gradient_norm"][0].value == pytest.approx(unclipped.norm, rel=1e-5)
    assert found["gradient_norm"][0].value > 0.1
    parts = {tag: events[0].value for tag, events in found.items() if tag.startswith("gradient_norm/")}
    assert set(parts) == {f"gradient_norm/{part}" for part in ("embed", "stem", "down", "middle", "up", "head")}
    assert math.hypot(*parts.values()) == pytest.approx(found["gradient_norm"][0].value, rel=1e-5)


def test_sample_grids_start_from_the_same_noise():
    def frozen():
        grid = callbacks.SampleGrid(1, images=4, calls=2)
        train([grid, Freeze()], steps=2)
        return [Path(f"run/samples/step_0000000{step}.png").read_bytes() for step in (1, 2)]

    first, second = frozen()
    assert first == second
    assert len(np.unique(np.asarray(Image.open("run/samples/step_00000001.png")))) > 10


class Freeze(L.Callback):
    """Keeps the average from moving, so that only the noise could change a picture."""

    def on_train_start(self, trainer, pl_module):
        pl_module.ema.update = lambda: None


def test_fid_of_gaussian_features_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)

    def standard(n):  # mean and covariance are exactly 0 and 1
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        x = x - x.mean(0)
        return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T

    real, other = standard(1000), standard(800)
    found = sample_quality.compare(real, 2 * other + torch.tensor([1.0, 0.0, -1.0]))
    assert found["fid"] == pytest.approx(2 + 3, rel=1e-6)  # |Δμ|² + Σ (1 - 2)²
    assert found["kid"] > 0.1
    same = sample_quality.compare(real, other)
    assert same["fid"] == pytest.approx(0.0, abs=1e-6)
    assert same["kid"] == pytest.approx(0.0, abs=0.03)


def test_quality_is_kept_for_the_card():
    watch = [callbacks.SampleQuality(PixelFeatures((2, 2)), 3, samples=100, calls=2), callbacks.ExportPrior()]
    train(watch, logger=CSVLogger("."), steps=20)  # with validations between
    card = Prior.from_pretrained("run/prior").card
    # as many samples as there are held-out images
    (fid,) = (value for key, value in card.metrics.items() if key == "FID, 8 samples, 8 held-out images, PixelFeatures")
    rows = np.genfromtxt("lightning_logs/version_0/metrics.csv", delimiter=",", names=True, deletechars="")
    assert fid == pytest.approx(rows["quality/fid"][np.isfinite(rows["quality/fid"])][-1])
    assert "val/loss" in card.metrics


def test_distances_tell_memorised_samples_from_fresh_ones():
    generator = torch.Generator().manual_seed(0)

    def fresh(n):
        return torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64).flatten(1)

    train_set, references, unseen = fresh(600), fresh(200), fresh(300)
    honest, memorised = fresh(2000), train_set[:300] + 0.01 * fresh(300)

    def figures(samples):
        distances = [torch.cdist(x, y).min(1).values for x in (samples, unseen) for y in (train_set, references)]
        return memorisation.compare(*distances)

    found = figures(honest)
    assert found["closer_to_train"] == pytest.approx(600 / 800, abs=0.05)
    assert found["too_close"] == pytest.approx(0.05, abs=0.04)
    assert found["distance_ratio"] == pytest.approx(found["distance_ratio_held_out"], rel=0.1)
    found = figures(memorised)
    assert found["closer_to_train"] > 0.95
    assert found["too_close"] > 0.95
    assert found["distance_ratio"] < 0.2


class Parrot(L.Callback):
    """Makes the averaged network's samples the training images themselves."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def on_train_start(self, trainer, pl_module):
        images = torch.stack([trainer.datamodule.train_set[i] for i in range(3)])
        self.monkeypatch.setattr(memorisation, "draw_share", lambda *args, **kwargs: images)


def test_memorisation_finds_the_training_image(monkeypatch):
    check = callbacks.Memorisation(10, samples=3, pairs=2)
    train([Parrot(monkeypatch), check], logger=TensorBoardLogger("."), steps=1)
    found = {name: events[0] for name, events in figures_of("lightning_logs/version_0").items()}
    assert found["memorisation/closer_to_train"].value == 1.0
    assert found["memorisation/closer_to_train_expected"].value == pytest.approx(32 / 36)
    assert found["memorisation/too_close"].value == 1.0
    assert found["memorisation/distance_ratio"].value == pytest.approx(0.0, abs=1e-6)
    picture = np.asarray(Image.open("run/memorisation/step_00000001.png"))
    samples, nearest, references = picture[1:9, 1:], picture[10:18, 1:], picture[19:27, 1:]
    assert np.array_equal(samples, nearest)
    assert not np.array_equal(samples, references)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: callbacks.SampleGrid(0), "every_n_steps = 0"),
        (lambda: callbacks.SampleGrid(images=0), "images = 0"),
        (lambda: callbacks.GradientNorms(20, 30), "groups_every_n_steps = 30"),
        (lambda: callbacks.DenoisingStrips(sigmas=[0.1, 0.0]), r"sigmas = \[0.1, 0.0\]"),
        (lambda: callbacks.SampleQuality(PixelFeatures(), samples=1), "samples = 1"),
        (lambda: callbacks.Memorisation(train_images=0), "train_images = 0"),
        (lambda: callbacks.Reconstruction(Recording(), images=0), "images = 0"),
    ],
)
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_what_cannot_work_is_refused_at_the_start():
    for watch in (callbacks.SampleQuality(torch.nn.Identity()), callbacks.Memorisation(extractor=torch.nn.Identity())):
        with pytest.raises(ValueError, match=r"extractor = Identity maps images \(2, 1, 8, 6\)"):
            train([watch])
    with pytest.raises(ValueError, match="holds 1 images; at least 2"):
        train([callbacks.Memorisation()], images=6)
    for result, word in ((1.0, "float"), (({}, torch.zeros(2, 2)), r"shape \(2, 2\)"), (({"a": "b"}, None), "tuple")):
        with pytest.raises(ValueError, match=word):
            train([callbacks.Reconstruction(lambda prior, truth, result=result: result)], steps=1)


DISTRIBUTED = """
import lightning as L
import torch
from dpnp_shared.features import PixelFeatures
from dpnp_shared.networks import UNet
from dpnp_training import ImageData, ScoreMatching, callbacks
from lightning.pytorch.loggers import CSVLogger

torch.set_num_threads(1)
for devices, strategy in ((2, "ddp_fork"), (1, "auto")):
    L.seed_everything(0)
    network = UNet(channels=1, widths=[8, 8], blocks=1, attention=[], embedding=8)
    watch = [callbacks.SampleQuality(PixelFeatures((2, 2)), 100, samples=7, calls=2),
             callbacks.Memorisation(100, samples=3, calls=2, pairs=2),
             callbacks.SampleGrid(100, images=4, calls=2)]
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=1, callbacks=watch,
                        logger=CSVLogger(f"logs{devices}"), enable_checkpointing=False, enable_progress_bar=False,
                        enable_model_summary=False, default_root_dir=f"run{devices}")
    module = ScoreMatching(network, learning_rate=1e-30, warmup_steps=0)  # the same network for any number of ranks
    trainer.fit(module, ImageData("x.npy", validation_fraction=0.2, batch_size=4))
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_does():
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (41, 8, 6), dtype=np.uint8))
    Path("distributed.py").write_text(DISTRIBUTED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "distributed.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (
        np.genfromtxt(f"logs{n}/lightning_logs/version_0/metrics.csv", delimiter=",", names=True, deletechars="")
        for n in (1, 2)
    )
    names = [name for name in one.dtype.names if name.startswith(("quality/fid", "memorisation/"))]
    assert len(names) == 7
    for name in names:
        assert float(np.nanmax(two[name])) == pytest.approx(float(np.nanmax(one[name])), rel=1e-4), name
    for name in ("memorisation", "samples"):
        pictures = [np.asarray(Image.open(f"run{n}/{name}/step_00000001.png")).astype(int) for n in (1, 2)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1, name
