"""What makes a training faster or larger does not change what it learns."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dpnp_shared.prior import Prior
from dpnp_training.acceleration import check_compile, use_fused
from dpnp_training.cli import main
from dpnp_training.export import prior_from_checkpoint

ROOT = Path(__file__).parents[2]
SCALE = ROOT / "configs" / "training" / "scale"
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        "limit_val_batches": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "callbacks": [{"class_path": "dpnp_training.callbacks.Checkpoints"}, {"class_path": "probe.Curve"}],
    },
    "model": {
        "network": {
            "class_path": "dpnp_shared.networks.UNet",
            "init_args": {"widths": [4, 8], "blocks": 1, "attention": [1], "head_channels": 4, "embedding": 4},
        },
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "decay": "constant",
        "noise_bands": [0.1, 1.0],
        "ema": {"beta": 0.9},
    },
    "data": {"source": "x.npy", "batch_size": 8, "validation_fraction": 0.125},
}
WATCH = [
    {
        "class_path": "dpnp_training.callbacks.GradientNorms",
        "init_args": {"every_n_steps": 1, "groups_every_n_steps": 7},
    },
    {"class_path": "dpnp_training.callbacks.SampleGrid", "init_args": {"images": 4, "calls": 2}},
    {"class_path": "dpnp_training.callbacks.DenoisingStrips", "init_args": {"images": 2}},
    {
        "class_path": "dpnp_training.callbacks.SampleQuality",
        "init_args": {"extractor": {"class_path": "torch.nn.Flatten"}, "samples": 4, "calls": 2},
    },
    {"class_path": "dpnp_training.callbacks.Memorisation", "init_args": {"samples": 4, "calls": 2}},
    {
        "class_path": "dpnp_training.callbacks.Reconstruction",
        "init_args": {"sampler": {"class_path": "probe.Sampler"}, "images": 1},
    },
    {"class_path": "dpnp_training.callbacks.ExportPrior"},
]
PROBE = """
import json
from lightning.pytorch.callbacks import Callback

class Curve(Callback):
    losses = ()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses = (*self.losses, float(loss))

    def on_train_end(self, trainer, pl_module):
        shards = sum(getattr(p, "_local_tensor", p).numel() for p in pl_module.parameters())
        numbers = [self.losses, float(trainer.callback_metrics["val/loss"]), shards]
        with open(f"{trainer.default_root_dir}.{trainer.global_rank}.json", "w") as file:
            json.dump(numbers, file)

class Sampler:
    def __call__(self, prior, x):
        return {"rmse": (prior(x[None], 0.5) - x).square().mean().sqrt()}, x.clamp(0, 1)
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge


@pytest.fixture(autouse=True)
def _data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    watched = {"trainer": {"callbacks": CONFIG["trainer"]["callbacks"] + WATCH, "logger": True}}
    watched["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    Path("watch.yaml").write_text(yaml.safe_dump(watched))
    Path("probe.py").write_text(PROBE)


def fit(root: str, *options: str) -> tuple[np.ndarray, dict]:
    """Losses of the steps taken, and the checkpoint."""
    main(["fit", "--config", "config.yaml", f"--trainer.default_root_dir={root}", *options])
    return result(root)


def result(root: str) -> tuple[np.ndarray, dict]:
    losses, *_ = json.loads(Path(f"{root}.0.json").read_text())
    return np.array(losses), torch.load(f"{root}/checkpoints/last.ckpt", weights_only=True)


def close(checkpoint: dict, other: dict, rtol: float = 1e-3, atol: float = 2e-4) -> None:
    assert checkpoint["state_dict"].keys() == other["state_dict"].keys()
    for key, value in checkpoint["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][key], value, rtol=rtol, atol=atol, msg=key)


def equal(checkpoint: dict, other: dict) -> None:
    close(checkpoint, other, rtol=0, atol=0)


def slurm(rank: int, port: int) -> dict[str, str]:
    """Environment of one of two tasks, each on a node of its own."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "dpnp", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2",
        "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def test_two_slurm_nodes_share_a_network_by_shards_and_one_process_takes_it_over():
    fit("handed")
    shutil.copytree("handed", "straight")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "training" / "train.py"), "fit", "--config", "config.yaml", "--config", "watch.yaml",
             "--config", str(SCALE / "fsdp.yaml"), "--config", str(SCALE / "slurm.yaml"), "--trainer.precision=32-true",
             "--trainer.devices=1", "--trainer.num_nodes=2", "--trainer.default_root_dir=handed", "--trainer.max_epochs=2",
             "--data.batch_size=4"],
            env={**os.environ, **slurm(rank, port), "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) for rank in (0, 1)
    ]  # fmt: skip
    losses, straight = fit("straight", "--trainer.max_epochs=2", "--config", "watch.yaml")
    for node in nodes:
        said, _ = node.communicate(timeout=200)
        assert node.returncode == 0, said[-3000:]
    sharded_losses, sharded = result("handed")
    assert len(losses) == 7
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
    close(straight, sharded)
    figures = [
        json.loads(Path(f"{root}.{rank}.json").read_text())
        for root, rank in (("straight", 0), ("handed", 0), ("handed", 1))
    ]
    assert figures[1][1] == pytest.approx(figures[0][1], rel=1e-3)  # the validation's loss
    assert (
        max(figures[1][2], figures[2][2]) < 0.7 * figures[0][2]
    )  # each holds about half of the weights and of their average
    assert figures[1][2] + figures[2][2] == figures[0][2]

    # what was watched is what one process saw
    for folder in ("samples", "denoising", "memorisation", "reconstruction"):
        assert Path(f"handed/{folder}/step_00000014.png").is_file()
    rows = [watched(version) for version in (0, 1)]
    assert rows[0].keys() == rows[1].keys()
    assert {
        "gradient_norm",
        "gradient_norm/down",
        "quality/fid",
        "memorisation/too_close",
        "reconstruction/rmse",
    } <= rows[0].keys()
    for name, values in rows[0].items():
        assert values == pytest.approx(rows[1][name], rel=2e-3, abs=1e-3), name

    # the prior, and the next epoch on a single process
    x = torch.randn(2, 1, 8, 8)
    prior = Prior.from_pretrained("handed/prior")
    assert torch.equal(prior(x, 1.0), prior_from_checkpoint("handed/checkpoints/last.ckpt")(x, 1.0))
    losses, straight = fit("straight", "--trainer.max_epochs=3")
    handed_losses, handed = fit("handed", "--trainer.max_epochs=3")
    np.testing.assert_allclose(handed_losses, losses, rtol=1e-3)
    close(straight, handed)


def watched(version: int) -> dict[str, list[float]]:
    """Last values of a run's figures."""
    import csv

    figures: dict[str, float] = {}
    for row in csv.DictReader(Path(f"lightning_logs/version_{version}/metrics.csv").open()):
        figures |= {key: float(value) for key, value in row.items() if value and key not in ("step", "epoch")}
    return figures
