"""Training that is killed at any moment and started again with the same command goes on as if nothing had happened."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dpnp_training import checkpoints
from dpnp_training.checkpoints import CheckpointError, find_checkpoint, write_checkpoint
from dpnp_training.data.order import EpochSampler

CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "limit_val_batches": 1,
        "callbacks": [
            {"class_path": "dpnp_training.callbacks.Checkpoints", "init_args": {"every_n_train_steps": 2}},
            {"class_path": "probe.Probe"},
        ],
    },
    "model": {
        "network": {
            "class_path": "dpnp_shared.networks.UNet",
            "init_args": {
                "widths": [4, 4], "blocks": 1, "attention": [], "head_channels": 4, "embedding": 4, "dropout": 0.2,
            },
        },
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "noise_bands": [0.1, 1.0],
        "ema": {"beta": 0.9},
    },
    "data": {"source": "x.npy", "batch_size": 8},
}  # fmt: skip

# Kills its own process, without warning, at a batch or in the middle of writing the n-th checkpoint.
PROBE = """
import json, os, signal
from lightning.pytorch.callbacks import Callback
from dpnp_training import checkpoints

kind, _, number = os.environ.get("KILL", "").partition(":")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

writes = 0
original = checkpoints._Hashing.write
def write(self, data):
    global writes
    writes += 1
    if kind == "write" and writes == int(number):
        self.stream.write(bytes(data)[: len(data) // 2])
        self.stream.flush()
        die()
    return original(self, data)
checkpoints._Hashing.write = write

replaces = 0
replace = os.replace
def counted(source, target):
    global replaces
    replaces += 1
    if kind == "replace" and replaces == int(number):
        die()
    replace(source, target)
checkpoints.os.replace = counted

class Probe(Callback):
    batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        with open(os.environ["CURVE"], "a") as file:
            record = [trainer.current_epoch, batch_idx, float(outputs["loss"]), float(batch.double().sum())]
            file.write(json.dumps(record) + "\\n")
        if kind == "batch" and self.batches == int(number):
            die()

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            with open(os.environ["CURVE"], "a") as file:
                step = trainer.global_step
                file.write(json.dumps(["val", step, float(trainer.callback_metrics["val/loss"]), 0.0]) + "\\n")
"""

# One process that has everything imported and makes a copy of itself for each start of training.
STARTER = """
import json, os, sys
sys.path.insert(0, os.getcwd())
import dpnp_training.cli, dpnp_training.callbacks

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ.update(order["environment"])
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            dpnp_training.cli.main(order["args"])
            code = 0
        except SystemExit as exit:
            print(exit, file=sys.stderr)
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Starter:
    def __init__(self, folder: Path):
        self.folder = folder
        x = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
        np.save(folder / "x.npy", x)
        (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        (folder / "probe.py").write_text(PROBE)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def fit(self, root: str, *options: str, kill: str = "") -> tuple[int, str]:
        """Exit code (negative: killed by a signal) and everything that was said."""
        args = ["fit", "--config", "config.yaml", f"--trainer.default_root_dir={root}", *options]
        order = {"args": args, "environment": {"KILL": kill, "CURVE": f"{root}.jsonl"}, "log": f"{root}.log"}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, (self.folder / f"{root}.log").read_text()

    def curve(self, root: str) -> dict:
        """All figures of the run; a batch that ran twice must have given the same twice."""
        curve = {}
        for line in (self.folder / f"{root}.jsonl").read_text().splitlines():
            a, b, *figures = json.loads(line)
            assert curve.setdefault((a, b), figures) == figures, (a, b)
        return curve

    def checkpoint(self, root: str, name: str = "last.ckpt") -> dict:
        return torch.load(self.folder / root / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def starter(tmp_path_factory):
    starter = Starter(tmp_path_factory.mktemp("resume"))
    yield starter
    starter.process.stdin.close()
    starter.process.wait(timeout=30)
    starter.process.stdout.close()


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "images_seen", "metrics")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"),
    [
        # 7 batches an epoch, 21 in all, validation at the end of each epoch
        ((), ("batch:5", "write:900", "batch:9")),
        (("--trainer.val_check_interval=2", "--data.workers=1"), ("batch:6", "replace:8")),
        (("--trainer.accumulate_grad_batches=2", "--trainer.check_val_every_n_epoch=2"), ("batch:7", "replace:6")),
    ],
    ids=["epochs", "mid-epoch validation, a worker", "accumulation"],
)
def test_killed_training_equals_uninterrupted_training(starter, options, kills, request):
    name = request.node.callspec.id.replace(" ", "_").replace(",", "")
    code, said = starter.fit(f"straight_{name}", *options)
    assert code == 0, said[-3000:]
    root = f"killed_{name}"
    for kill in kills:
        code, said = starter.fit(root, *options, kill=kill)
        assert code == -9, said[-3000:]
    code, said = starter.fit(root, *options)
    assert code == 0, said[-3000:]
    assert f"resumes from {root}/checkpoints/" in said
    assert starter.curve(f"straight_{name}") == starter.curve(root)
    straight, killed = starter.checkpoint(f"straight_{name}"), starter.checkpoint(root)
    for key in KEYS:
        assert_same(straight[key], killed[key], key)
    assert not list((starter.folder / root / "checkpoints").glob(".*"))


def test_damaged_checkpoints_and_changed_configurations(starter):
    options = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=4")
    assert starter.fit("run", *options)[0] == 0
    folder = starter.folder / "run" / "checkpoints"
    data = bytearray((folder / "last.ckpt").read_bytes())
    data[len(data) // 2] ^= 1  # one bit, inside of a tensor: torch.load would not notice
    (folder / "last.ckpt").write_bytes(data)

    code, said = starter.fit("run", *options, "--model.weight_decay=0.1")
    assert code == 1
    assert "model.weight_decay: 0.0 -> 0.1" in said
    assert "--fresh" in said

    code, said = starter.fit("run", *options)  # the damage is found, the one before it goes on
    assert code == 0
    assert "last.ckpt is not used: its SHA-256" in said
    assert "resumes from run/checkpoints/previous.ckpt, step 2" in said

    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    code, said = starter.fit("run", *options)
    assert code == 1
    assert "no good checkpoint is left" in said

    code, said = starter.fit("run", *options, "--fresh", "--model.weight_decay=0.1")
    assert code == 0, said[-2000:]
    assert "are now in run/checkpoints.old1" in said
    assert starter.checkpoint("run")["global_step"] == 4


class FullDisk(io.FileIO):
    """Holds two kilobytes."""

    def write(self, data):
        if self.tell() + len(data) > 2048:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    file = tmp_path / "last.ckpt"
    write_checkpoint({"weights": torch.ones(1000)}, file)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="No space left") as error:
        write_checkpoint({"weights": torch.zeros(1000)}, file, opener=FullDisk)
    assert error.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert find_checkpoint(tmp_path) == (file, [])


def test_training_goes_on_with_a_full_disk_and_says_so(tmp_path, monkeypatch):
    from dpnp_training.checkpoints import Checkpoints

    class Trainer:  # what the callback needs of it
        default_root_dir = tmp_path
        global_step = 7
        barriers = 0

        @property
        def strategy(self):
            return self

        def barrier(self, name):
            self.barriers += 1

        def save_checkpoint(self, path, weights_only):
            write_checkpoint({"weights": torch.zeros(1000)}, path, opener=FullDisk)

    trainer, callback = Trainer(), Checkpoints()
    with pytest.warns(UserWarning, match="step 7 was not written"):
        assert callback._save(trainer).errno == errno.ENOSPC
    assert trainer.barriers == 1  # the other processes are not left waiting
    with pytest.warns(UserWarning, match="not written"), pytest.raises(OSError, match="No space left"):
        callback.on_train_end(trainer, None)
    with pytest.raises(ValueError, match="every_n_train_steps = 0"):
        Checkpoints(0)


def test_the_previous_checkpoint_is_found(tmp_path):
    assert find_checkpoint(tmp_path) == (None, [])
    file, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    write_checkpoint({"step": 1}, file)
    write_checkpoint({"step": 2}, file)
    assert torch.load(previous, weights_only=True) == {"step": 1}
    file.unlink()  # killed between the two renames
    assert find_checkpoint(tmp_path) == (previous, [])
    (tmp_path / "checksums.json").unlink()  # written by an older version
    assert find_checkpoint(tmp_path) == (previous, [])
    previous.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        find_checkpoint(tmp_path)
    assert checkpoints.set_aside(previous).name == "previous.ckpt.old1"
    assert checkpoints.set_aside(previous) is None


def test_the_sampler_enters_an_epoch_anywhere():
    data = torch.zeros(61, 1)
    whole = EpochSampler(data, seed=3, images_per_step=8)
    assert len(whole) == 56
    whole.set_epoch(1)
    order = list(whole)
    assert len(set(order)) == 56
    entered = EpochSampler(data, seed=3, images_per_step=8)
    entered.start_at(1, 16)
    assert list(entered) == order[16:]
    assert list(entered) == order[16:]
    entered.set_epoch(2)
    assert len(list(entered)) == 56
    # the images of a batch are the same however many processes share it
    shares = [EpochSampler(data, num_replicas=2, rank=rank, seed=3, images_per_step=4) for rank in (0, 1)]
    for share in shares:
        share.set_epoch(1)
    assert [i for pair in zip(*shares, strict=True) for i in pair] == order
    assert len(EpochSampler(data, images_per_step=100)) == 61
    with pytest.raises(ValueError, match="images_per_step = 0"):
        EpochSampler(data, images_per_step=0)
