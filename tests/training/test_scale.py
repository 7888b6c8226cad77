"""What makes a training faster or larger does not change what it learns."""

import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from dpnp_shared.acceleration import check_compile, use_channels_last
from dpnp_shared.prior import Prior
from dpnp_training.cli import main
from dpnp_training.export import prior_from_checkpoint
from dpnp_training.sharding import FullySharded, check_strategy, shard

ROOT = Path(__file__).parents[2]
SCALE = ROOT / "configs" / "training" / "scale"
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "precision": "32-true",
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
DIT = {"width": 8, "depth": 1, "head_channels": 4, "mlp_ratio": 1.0, "embedding": 4}
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
import torch
from lightning.pytorch.callbacks import Callback

class Curve(Callback):
    losses = ()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        self.losses = (*self.losses, float(loss))

    def on_train_end(self, trainer, pl_module):
        shards = sum(getattr(p, "_local_tensor", p).numel() for p in pl_module.parameters())
        weight = pl_module.network.down[0].conv_out.weight if hasattr(pl_module.network, "down") else None
        tensors = [weight] if weight is None else [
            weight, pl_module.ema.ema_model.down[0].conv_out.weight, trainer.optimizers[0].state[weight]["exp_avg"]
        ]
        formats = [t is not None and t.is_contiguous(memory_format=torch.channels_last) for t in tensors]
        numbers = [self.losses, float(trainer.callback_metrics.get("val/loss", "nan")), shards, formats]
        with open(f"{trainer.default_root_dir}.{trainer.global_rank}.json", "w") as file:
            json.dump(numbers, file)

class Sampler:
    def __call__(self, prior, x):
        return {"rmse": (prior(x[None], 0.5) - x).square().mean().sqrt()}, x.clamp(0, 1)
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge


def write_files() -> None:
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "."}}
    watched = {"trainer": {"callbacks": CONFIG["trainer"]["callbacks"] + WATCH, "logger": logger}}
    Path("watch.yaml").write_text(yaml.safe_dump(watched))
    Path("probe.py").write_text(PROBE)


@pytest.fixture(autouse=True)
def _files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Losses and checkpoint of the training without any option."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        write_files()
        return fit("plain")


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


def distance(checkpoint: dict, other: dict) -> float:
    """Of all weights and averages as one vector, relative.

    Single ones may differ by the length of some steps: Adam's first have the sign of the gradient, which rounding may turn.
    """
    pairs = [
        (value, other["state_dict"][key])
        for key, value in checkpoint["state_dict"].items()
        if value.is_floating_point()
    ]
    return math.sqrt(
        sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
    )


def equal(checkpoint: dict, other: dict) -> None:
    close(checkpoint, other, rtol=0, atol=0)


def slurm(rank: int, port: int) -> dict[str, str]:
    """Environment of one of two tasks, each on a node of its own."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "dpnp", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2",
        "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


@pytest.mark.slow
def test_two_slurm_nodes_share_a_network_by_shards_and_one_process_takes_it_over():
    fit("handed", "--model.channels_last=true")  # the files do not show it
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
    for row in rows:
        del row["train/loss"]  # that of the first process alone
        del row["quality/kid"], row["quality/kid_train"]  # subsets of four samples, which depend on their order
    assert rows[0].keys() == rows[1].keys()
    assert {
        "gradient_norm",
        "gradient_norm/down",
        "quality/fid",
        "memorisation/too_close",
        "reconstruction/rmse",
    } <= rows[0].keys()
    for name, value in rows[0].items():
        assert value == pytest.approx(rows[1][name], rel=2e-3, abs=1e-3), name

    # the prior, and the next epoch on a single process
    x = torch.randn(2, 1, 8, 8)
    prior = Prior.from_pretrained("handed/prior")
    exported = prior_from_checkpoint("handed/checkpoints/last.ckpt")
    torch.testing.assert_close(exported(x, 1.0), prior(x, 1.0))
    losses, straight = fit("straight", "--trainer.max_epochs=3")
    handed_losses, handed = fit("handed", "--trainer.max_epochs=3")
    np.testing.assert_allclose(handed_losses, losses, rtol=1e-3)
    close(straight, handed)


def watched(version: int) -> dict[str, float]:
    """Last values of a run's figures."""
    figures: dict[str, float] = {}
    lines = Path(f"lightning_logs/version_{version}/metrics.csv").read_text().splitlines()
    for row in csv.DictReader(lines):
        figures |= {key: float(value) for key, value in row.items() if value and key not in ("step", "epoch")}
    return figures


def test_compiled_training_is_the_eager_one_and_leaves_no_trace_in_its_files():
    network = {"class_path": "dpnp_shared.networks.DiT", "init_args": DIT}
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": CONFIG["model"] | {"network": network}}))
    losses, checkpoint = fit("run", "--model.compile=eager")  # the backend that calls the traced graph as it is
    eager_losses, eager = fit("eager")
    np.testing.assert_allclose(losses, eager_losses, rtol=1e-5)
    close(eager, checkpoint)
    assert checkpoint["prior"]["network"] == eager["prior"]["network"]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["calls_captured"] > 50  # it was compiled
    assert not counters["graph_break"]
    resumed = fit("run", "--trainer.max_epochs=2")[1]  # the user may switch it off on the way
    assert resumed["global_step"] == 14
    prior_from_checkpoint("run/checkpoints/last.ckpt")


def test_channels_last_is_the_same_training_and_stays_when_resumed(plain):
    # a fused step goes through the memory: a loaded state must have taken the format of the weights
    fused, option = "--model.fused=true", "--model.channels_last=true"
    losses, checkpoint = fit("run", fused, option)
    assert innermost("run") == (3, 0)  # the network's, its average's, the optimiser's
    assert all(value.is_contiguous() for value in checkpoint["state_dict"].values())  # the files are as without
    np.testing.assert_allclose(losses, plain[0], rtol=1e-4)
    close(plain[1], checkpoint)
    prior_from_checkpoint("run/checkpoints/last.ckpt")
    straight, last = fit("straight", fused, option, "--trainer.max_epochs=3")
    assert np.array_equal(fit("run", fused, option, "--trainer.max_epochs=2")[0], straight[7:14])
    switched = fit("run", fused, "--trainer.max_epochs=3")[1]
    assert innermost("run") == (0, 3)
    close(last, switched)


def innermost(root: str) -> tuple[int, int]:
    """How many of three tensors of one weight were channels last, and how many were not, when training ended."""
    *_, formats = json.loads(Path(f"{root}.0.json").read_text())
    return formats.count(True), formats.count(False)


def test_fused_optimiser_takes_the_same_steps(plain):
    losses, checkpoint = fit("run", "--model.fused=true")
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["fused"] is True
    assert not plain[1]["optimizer_states"][0]["param_groups"][0]["fused"]  # auto, on a CPU
    np.testing.assert_allclose(losses, plain[0], rtol=1e-4)
    close(plain[1], checkpoint)


def test_all_options_together_in_mixed_precision(plain):
    options = [
        "--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2", "--data.batch_size=4",
        "--model.channels_last=true", "--model.fused=true", "--model.network.checkpoint_activations=true",
    ]  # fmt: skip
    losses, checkpoint = fit("run", *options)
    # parts of a batch; Lightning has divided their losses already
    np.testing.assert_allclose(losses.reshape(-1, 2).sum(1), plain[0], rtol=0.05)
    assert distance(plain[1], checkpoint) < 0.05
    assert all(value.dtype in (torch.float32, torch.int64, torch.bool) for value in checkpoint["state_dict"].values())


def test_float16_scales_its_losses(plain):
    # Lightning itself turns trainer.precision = 16-mixed into bf16-mixed on a CPU, and warns
    plugin = "lightning.pytorch.plugins.MixedPrecision"
    options = [f"--trainer.plugins={plugin}", "--trainer.plugins.precision=16-mixed", "--trainer.plugins.device=cpu"]
    losses, checkpoint = fit("run", "--trainer.precision=null", *options)
    assert checkpoint["MixedPrecision"]["scale"] > 1
    np.testing.assert_allclose(losses, plain[0], rtol=0.02)
    assert distance(plain[1], checkpoint) < 0.05
    fused, other = fit("fused", "--trainer.precision=null", *options, "--model.fused=true")
    np.testing.assert_allclose(fused, losses, rtol=1e-3)
    close(checkpoint, other)


def test_deterministic_runs_are_equal_bit_by_bit():
    overlay = f"--config={SCALE / 'deterministic.yaml'}"
    try:
        runs = [fit(root, overlay, "--model.network.dropout=0.1") for root in ("one", "two")]
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert np.array_equal(runs[0][0], runs[1][0])
    equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("overlay", ["ddp", "fast"])
def test_overlay_takes_a_step_on_one_cpu(overlay):
    try:
        _, checkpoint = fit(
            "run", "--config", str(SCALE / f"{overlay}.yaml"), "--trainer.max_steps=1", "--trainer.devices=1",
            "--model.compile=false",  # is tested above, without a minute's wait
        )  # fmt: skip
    finally:
        torch.backends.cudnn.benchmark = False
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert checkpoint["global_step"] == 1


def test_every_overlay_is_tried():
    tried = {"ddp", "fast", "deterministic", "fsdp", "slurm"}
    assert {path.stem for path in SCALE.glob("*.yaml")} == tried
    assert all(f"{name}.yaml" in (ROOT / "docs" / "training.md").read_text() for name in tried)


def test_slurm_script_gives_its_arguments_to_training_and_requeues(monkeypatch):
    """With stand-ins for srun and scontrol: a signal on the way requeues the job and the script waits for the end of training."""
    Path("srun").write_text('#!/bin/bash\necho "srun $*"\nsleep 0.6\nexit 3\n')
    Path("scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    for file in ("srun", "scontrol"):
        Path(file).chmod(0o755)
    environment = {
        "PATH": os.pathsep.join([str(Path.cwd()), os.environ["PATH"]]), "SLURM_JOB_ID": "17", "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
    }  # fmt: skip
    script = subprocess.Popen(
        ["bash", str(SCALE / "slurm.sh"), "--config", "a b.yaml"], env=environment, stdout=subprocess.PIPE, text=True
    )
    first = script.stdout.readline()
    script.send_signal(signal.SIGUSR1)
    rest, _ = script.communicate(timeout=20)
    assert "training/train.py fit --config a b.yaml --config configs/training/scale/slurm.yaml" in first
    assert first.endswith("--trainer.num_nodes=2 --trainer.devices=8\n")
    assert "scontrol requeue 17" in rest
    assert script.returncode == 3  # that of training


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"compile = 'fastest'; allowed are true, false, a mode \(default.*inductor"):
        check_compile("fastest")
    with pytest.raises(ValueError, match=r"FSDPStrategy cannot keep .* --trainer\.strategy=sharded"):
        check_strategy(FSDPStrategy())
    with pytest.raises(ValueError, match="ModelParallelStrategy cannot keep"):
        check_strategy(ModelParallelStrategy())
    check_strategy(FullySharded())
    network = torch.nn.Conv2d(2, 2, 3)
    use_channels_last(network)
    with pytest.raises(ValueError, match=r"channels_last = true does not go with trainer\.strategy = sharded"):
        shard(network, None)
