"""Kill -9 a short training at random moments, start it again each time with the same command, and compare with one that was left alone.

    python benchmarks/training_resume.py                          # ten kills of one process
    python benchmarks/training_resume.py --processes 2            # ten kills of a random process of two (DDP); the other must end too

The moments come from the seed: a step, and a part of the time between two checkpoints behind it, so that kills hit batches, validations
and half-written checkpoints alike. Weights, averages, optimiser state and every step's loss must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dpnp_shared.phantoms import Ellipses

ROOT = Path(__file__).parents[1]
EVERY = 4  # optimiser steps from one checkpoint to the next
PATIENCE = 120.0  # seconds that the process beside a killed one has to notice
KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "images_seen", "metrics")
OBSERVER = """
import json, os, time
from lightning.pytorch.callbacks import Callback

class Observer(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        record = {"rank": trainer.global_rank, "step": trainer.global_step, "pid": os.getpid(), "loss": float(outputs["loss"])}
        with open(trainer.default_root_dir + ".jsonl", "a") as file:
            file.write(json.dumps(record) + "\\n")
"""


def configuration(steps: int, processes: int) -> dict[str, Any]:
    """A small U-Net with dropout and a moving average on 16 x 16 ellipses; validation in every epoch."""
    network = {"widths": [8, 16], "blocks": 1, "attention": [1], "head_channels": 8, "embedding": 16, "dropout": 0.1}
    return {
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "max_steps": steps,
            "limit_val_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "dpnp_training.callbacks.Checkpoints", "init_args": {"every_n_train_steps": EVERY}},
                {"class_path": "dpnp_training.callbacks.ExportPrior"},
                {"class_path": "observer.Observer"},
            ],
        },
        "model": {
            "network": {"class_path": "dpnp_shared.networks.UNet", "init_args": network},
            "warmup_steps": 10,
            "ema": {"beta": 0.99},
            "loss": {
                "class_path": "dpnp_training.losses.DenoisingScoreMatching",
                "init_args": {"noise": {"class_path": "dpnp_training.losses.AdaptiveBands"}},
            },
        },
        "data": {"source": "images.npy", "batch_size": 16 // processes, "workers": 1},
    }


def images(count: int, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One ellipse each, ``(count, size, size)``."""
    draw = np.random.default_rng(0)
    rows = zip(
        draw.uniform(-0.3, 0.3, (count, 2)),
        draw.uniform(0.1, 0.6, (count, 2)),
        draw.uniform(0, 180, count),
        strict=True,
    )
    pictures = [Ellipses(((255.0, *middle, *axes, angle),)).image(size, size, 2 / size) for middle, axes, angle in rows]
    return torch.cat(pictures).round().to(torch.uint8).numpy()


def start(folder: Path, root: str) -> subprocess.Popen[bytes]:
    """The training's command, the same each time."""
    command = [sys.executable, str(ROOT / "training" / "train.py"), "fit", "--config", "config.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    with (folder / f"{root}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, f"--trainer.default_root_dir={root}"], cwd=folder, env=environment, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def rows(folder: Path, root: str) -> list[dict[str, Any]]:
    """What the observer has written so far, a half-written line left out."""
    file = folder / f"{root}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def curve(folder: Path, root: str) -> dict[tuple[int, int], set[float]]:
    """All losses that were seen at each rank and step; one each, if a step that ran twice gave the same twice."""
    losses: dict[tuple[int, int], set[float]] = {}
    for row in rows(folder, root):
        losses.setdefault((row["rank"], row["step"]), set()).add(row["loss"])
    return losses


def kill_once(folder: Path, step: int, delay: float, rank: int) -> tuple[int, float, bool] | None:
    """Start the training, kill one process, wait for the end of the others.

    Returns:
        The step that was reached, seconds until all processes had ended, and whether they ended by themselves; None if the training
        ended before it could be killed.
    """
    before = len(rows(folder, "killed"))
    process = start(folder, "killed")
    while True:
        mine = [row for row in rows(folder, "killed")[before:] if row["rank"] == rank and row["step"] >= step]
        if mine:
            break
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    time.sleep(delay)
    reached = max(row["step"] for row in rows(folder, "killed")[before:])
    os.kill(mine[0]["pid"], signal.SIGKILL)
    begun = time.monotonic()
    while any_left(process) and time.monotonic() - begun < PATIENCE:
        time.sleep(0.05)
    seconds, alone = time.monotonic() - begun, not any_left(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return reached, seconds, alone


def any_left(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process of the training is running still, loader processes included."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Names of everything that is not the same."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        return [x for key in a.keys() | b.keys() for x in differences(a.get(key), b.get(key), f"{where}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [x for i, (u, v) in enumerate(zip(a, b, strict=True)) for x in differences(u, v, f"{where}[{i}]")]
    return [] if a == b else [where]


def main() -> None:
    """Run it; the exit status is 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps of the training")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "images.npy", images(320, 16))
        (folder / "observer.py").write_text(OBSERVER)
        (folder / "config.yaml").write_text(yaml.safe_dump(configuration(arguments.steps, arguments.processes)))
        begun = time.monotonic()
        if start(folder, "straight").wait() != 0:
            sys.exit((folder / "straight.log").read_text()[-3000:])
        seconds = time.monotonic() - begun
        print(f"uninterrupted: {arguments.steps} steps in {seconds:.0f} s on {arguments.processes} processes")
        moments = sorted(draw.randrange(1, arguments.steps) for _ in range(arguments.kills))
        kills = 0
        for step in moments:
            rank = draw.randrange(arguments.processes)
            killed = kill_once(folder, step, draw.uniform(0, 0.3), rank)
            if killed is None:
                break
            kills += 1
            reached, wait, alone = killed
            ended = f"all processes ended after {wait:.1f} s" if alone else f"the others hung for {wait:.0f} s"
            print(f"kill {kills}: process {rank} at step {reached} of {arguments.steps}; {ended}", flush=True)
        process = start(folder, "killed")
        if process.wait() != 0:
            sys.exit((folder / "killed.log").read_text()[-3000:])
        a, b = (
            torch.load(folder / root / "checkpoints" / "last.ckpt", weights_only=True)
            for root in ("straight", "killed")
        )
        wrong = differences({key: a[key] for key in KEYS}, {key: b[key] for key in KEYS})
        curves = curve(folder, "straight"), curve(folder, "killed")
        wrong += [f"loss at rank, step {key}" for key in sorted(curves[0]) if curves[0][key] != curves[1].get(key)]
        wrong += [
            file.name
            for file in sorted((folder / "straight" / "prior").glob("*.safetensors"))
            if file.read_bytes() != (folder / "killed" / "prior" / file.name).read_bytes()
        ]
        print(f"{kills} kills of {arguments.kills}; {len(curves[0])} losses, {len(a['state_dict'])} tensors compared")
        print("identical" if not wrong else f"DIFFERENT: {', '.join(wrong[:20])}")
    sys.exit(1 if wrong or kills < arguments.kills else 0)


if __name__ == "__main__":
    main()
