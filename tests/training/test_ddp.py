"""How a batch is divided, between processes or into accumulated parts, does not change what is learned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dpnp_shared.prior import Prior
from dpnp_training.augment import Augmentation
from dpnp_training.cli import main
from dpnp_training.losses import DenoisingScoreMatching
from dpnp_training.share import Share

ROOT = Path(__file__).parents[2]
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "callbacks": [
            {"class_path": "dpnp_training.callbacks.Checkpoints"},
            {"class_path": "probe_ddp.Curve"},
            {"class_path": "dpnp_training.callbacks.ExportPrior"},
        ],
    },
    "model": {
        "network": {
            "class_path": "dpnp_shared.networks.UNet",
            "init_args": {"widths": [4, 4], "blocks": 1, "attention": [], "head_channels": 4, "embedding": 4},
        },
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "noise_bands": [0.1, 1.0],
        "ema": {"beta": 0.9},
    },
    "data": {"source": "x.npy", "batch_size": 8, "validation_fraction": 0.125},
}
PROBE = """
import json
from lightning.pytorch.callbacks import Callback

class Curve(Callback):
    losses, images = (), ()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.images = (*self.images, float(batch.double().sum()))
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses = (*self.losses, float(loss))

    def on_train_end(self, trainer, pl_module):
        weights = [float(value.double().sum()) for value in pl_module.state_dict().values()]
        with open(f"{trainer.default_root_dir}.{trainer.global_rank}.json", "w") as file:
            json.dump([self.losses, float(trainer.callback_metrics["val/loss"]), weights, self.images], file)
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge


@pytest.fixture
def _data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("probe_ddp.py").write_text(PROBE)


def result(root):
    losses, validation, _, _ = json.loads(Path(f"{root}.0.json").read_text())
    return np.array(losses), validation, torch.load(f"{root}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def close(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.slow
@pytest.mark.usefixtures("_data")
def test_two_processes_and_accumulation_equal_one_large_batch():
    options = ["fit", "--config", "config.yaml", "--trainer.default_root_dir"]
    parallel = subprocess.Popen(
        [sys.executable, str(ROOT / "training" / "train.py"), *options, "two", "--trainer.devices=2",
         "--trainer.strategy=ddp", "--data.batch_size=4"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    main([*options, "one"])
    main([*options, "parts", "--trainer.accumulate_grad_batches=2", "--data.batch_size=4"])
    said, _ = parallel.communicate(timeout=200)
    assert parallel.returncode == 0, said[-2000:]
    losses, validation, state = result("one")
    assert len(losses) == 14
    two_losses, two_validation, two_state = result("two")
    (*_, weights, images), (*_, other_weights, other_images) = (
        json.loads(Path(f"two.{rank}.json").read_text()) for rank in (0, 1)
    )
    assert weights == other_weights  # one network
    assert set(images).isdisjoint(other_images)  # but each process has images of its own
    assert Prior.from_pretrained("two/prior").card.training["images seen"] == 14 * 2 * 4
    np.testing.assert_allclose(two_losses, losses, rtol=1e-4)
    assert two_validation == pytest.approx(validation, rel=1e-3)
    close(state, two_state)
    part_losses, _, part_state = result("parts")  # Lightning has divided the parts' losses already
    np.testing.assert_allclose(part_losses.reshape(-1, 2).sum(1), losses, rtol=1e-4)
    close(state, part_state)


def test_shares_make_up_the_whole_batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(6, 1, 2, 3)
    numbers = torch.arange(6)
    whole = Share.all(6).normal_like(x, generator)
    assert whole.unique().numel() == 36
    for rank in (0, 1):
        share = Share(3, 6, rank, 2)
        assert torch.equal(share.normal_like(x[:3], generator), whole[rank::2])
        assert torch.equal(share.of(numbers), numbers[rank::2])
    last = Share(2, 8, 5, 2)  # second part of two, second process of two
    assert list(last.places) == [5, 7]
    assert torch.equal(last.of(torch.arange(8)), torch.tensor([5, 7]))
    assert not torch.equal(Share.all(6).normal_like(x, torch.Generator().manual_seed(4)), whole)


def test_the_loss_of_a_batch_is_the_mean_of_its_shares():
    loss = DenoisingScoreMatching(augmentation=Augmentation(probability=0.8))
    x_0 = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def seen(x_0, share):
        inputs = []

        def denoise(x, sigma, vector):
            inputs.append((x, sigma, vector))
            return 0.5 * x

        value = loss(denoise, x_0, generator=torch.Generator().manual_seed(1), share=share)
        return value, inputs[0]

    whole, inputs = seen(x_0, None)
    parts = [seen(x_0[rank::2], Share(3, 6, rank, 2)) for rank in (0, 1)]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole)
    for rank, (_, part) in enumerate(parts):
        for mine, all_of_them in zip(part, inputs, strict=True):
            assert torch.equal(mine, all_of_them[rank::2])
