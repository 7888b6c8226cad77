"""Training from the command line: it learns, resumes, runs on two processes, and exports what it averaged."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dpnp_shared.prior import Prior, PriorError
from dpnp_training.cli import main
from dpnp_training.export import prior_from_checkpoint
from dpnp_training.prior_cli import main as prior_main

ROOT = Path(__file__).parents[2]
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "dpnp_training.callbacks.Checkpoints", "init_args": {"every_n_train_steps": 100}},
            {"class_path": "dpnp_training.callbacks.Throughput", "init_args": {"window": 1}},
            {"class_path": "dpnp_training.callbacks.SampleGrid", "init_args": {"images": 4, "calls": 3}},
            {"class_path": "dpnp_training.callbacks.ExportPrior"},
        ],
    },
    "model": {
        "network": {
            "class_path": "dpnp_shared.networks.UNet",
            "init_args": {"widths": [8, 8], "blocks": 1, "attention": [1], "head_channels": 4, "embedding": 8},
        },
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "decay": "constant",
        "ema": {"beta": 0.9},
    },
    "data": {"source": "x.npy", "batch_size": 8, "name": "test images"},
}

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge


@pytest.fixture(autouse=True)
def _data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.linspace(0, 255, 64 * 64).reshape(64, 8, 8)
    np.save("x.npy", np.random.default_rng(0).permutation(x).astype(np.uint8))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))


def fit(root: str, *options: str) -> dict:
    main(["fit", "--config", "config.yaml", f"--trainer.default_root_dir={root}", *options])
    return torch.load(f"{root}/checkpoints/last.ckpt", weights_only=True)


def networks(checkpoint: dict) -> dict[str, torch.Tensor]:
    return {k: v for k, v in checkpoint["state_dict"].items() if k.startswith(("network.", "ema."))}


def test_fit_learns_logs_and_exports(capsys):
    checkpoint = fit("run", "--trainer.max_epochs=20")
    # 61 training images, 8 a batch: 7 steps an epoch
    assert checkpoint["global_step"] == 140
    assert checkpoint["images_seen"] == 1120
    assert "prior written to run/prior" in capsys.readouterr().out
    assert Path("run/samples/step_00000140.png").stat().st_size > 100
    assert Path("run/prior/samples.png").read_bytes() == Path("run/samples/step_00000140.png").read_bytes()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run/lightning_logs/version_0").Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "images/s", "val/loss/0.2-0.6", "val/mse/6-20"} <= tags
    assert events.Tags()["images"] == ["samples"]
    losses = [event.value for event in events.Scalars("val/loss")]
    assert losses[-1] < 0.8 * losses[0]

    prior = Prior.from_pretrained("run/prior")
    assert prior.card.name == "test images"
    assert prior.card.image_shape == (1, 8, 8)
    assert prior.card.training["images seen"] == 1120
    assert prior.card.metrics["val/loss"] == pytest.approx(losses[-1], rel=1e-5)
    # it is the average that is exported, not the last iterate
    averaged = {k.removeprefix("ema.ema_model."): v for k, v in checkpoint["state_dict"].items() if "ema_model" in k}
    for key, value in prior.network.state_dict().items():
        assert torch.equal(value, averaged[key])
    assert any(not torch.equal(v, checkpoint["state_dict"][f"network.{k}"]) for k, v in averaged.items())

    prior_main(["export", "run/checkpoints/last.ckpt", "again", "--name", "renamed"])
    again = Prior.from_pretrained("again")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x, 1.0), prior(x, 1.0))
    assert again.card.name == "renamed"
    prior_main(["inspect", "again"])
    assert "# renamed" in capsys.readouterr().out


@pytest.mark.parametrize("first", ["max_epochs=2", "max_steps=14", "max_steps=9"])
@pytest.mark.slow
def test_resumed_training_equals_uninterrupted_training(first):
    straight = fit("straight", "--trainer.max_epochs=4", "--model.decay=constant")
    fit("resumed", f"--trainer.{first}", "--model.decay=constant")
    resumed = fit("resumed", "--trainer.max_epochs=4", "--model.decay=constant")
    assert resumed["global_step"] == straight["global_step"]
    assert resumed["images_seen"] == straight["images_seen"]
    for key, value in networks(straight).items():
        assert torch.equal(resumed["state_dict"][key], value), key


def test_the_average_warms_up_and_is_frozen():
    from dpnp_training.ema import EMASettings, make_ema

    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    ema = make_ema(network, EMASettings(beta=0.9, power=0.75))
    assert not ema.ema_model.training
    assert not any(p.requires_grad for p in ema.ema_model.parameters())
    assert not any(key.startswith("online_model") for key in ema.state_dict())
    expected = 0.0
    for step in range(25):
        network.weight.data.fill_(float(step))
        ema.update()
        decay = min(0.9, 1 - (1 + step) ** -0.75)  # 0 at first: the average starts as a copy
        expected = decay * expected + (1 - decay) * step
        assert float(ema.ema_model.weight) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_and_accumulation():
    checkpoint = fit(
        "run", "--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=3", "--trainer.max_epochs=1"
    )
    assert checkpoint["global_step"] == 2  # 7 batches: 3 + 3, the last is left out
    assert int(checkpoint["state_dict"]["ema.step"]) == 2  # the average counts optimiser steps, not batches
    assert all(torch.isfinite(v.float()).all() for v in networks(checkpoint).values())


def test_errors_name_what_is_wrong(capsys):
    with pytest.raises(ValueError, match="channels = 3, but the images have 1"):
        fit("run", "--model.network.channels=3")
    with pytest.raises(FileNotFoundError, match=r"nothing\.npy"):
        fit("run", "--data.source=nothing.npy")
    with pytest.raises(SystemExit):
        fit("run", "--model.colour=red")
    assert "colour" in capsys.readouterr().err
    assert not Path("run/prior").exists()
    Path("broken.ckpt").write_bytes(b"not a checkpoint")
    for file, word in (("nothing.ckpt", "does not exist"), ("broken.ckpt", "cannot be read")):
        with pytest.raises(PriorError, match=word):
            prior_from_checkpoint(file)
        with pytest.raises(SystemExit, match=word):
            prior_main(["export", file, "out"])
    torch.save({"state_dict": {}}, "other.ckpt")
    with pytest.raises(PriorError, match="dpnp-train"):
        prior_from_checkpoint("other.ckpt")
    assert not Path("out").exists()


def test_loading_a_checkpoint_runs_no_code():
    class Evil:
        def __reduce__(self):
            return (os.mkdir, ("hacked",))

    torch.save({"prior": Evil()}, "evil.ckpt")
    with pytest.raises(PriorError, match="cannot be read safely"):
        prior_from_checkpoint("evil.ckpt")
    assert not Path("hacked").exists()
