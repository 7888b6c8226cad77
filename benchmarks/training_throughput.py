"""Training throughput against a bare PyTorch loop and against denoising-diffusion-pytorch, with peak memory.

    python benchmarks/training_throughput.py                       # ours and the bare loop
    pip install denoising-diffusion-pytorch && python benchmarks/training_throughput.py --peer

Each contender trains in a process of its own. In a round all of them take turns of some seconds, while the others are stopped, so that a
machine whose speed drifts slows all of them alike; the ratio is taken within a round, of median seconds a step. Timed are the steps after
the first ten, with loading of the data, augmentation, gradient clipping, the optimiser and the moving average; ours has the callbacks of
the config besides (throughput, learning rate, TensorBoard). The bare loop is written below: the same network, loss, batch, precision and
data set, and nothing else. The peer has a U-Net of its own of as many parameters (957,289 against 963,273), its own loss, and its own
loader of picture files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from runner import RESULTS, write_table
from torch import Tensor

from dpnp_training.estimate import peak_memory

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "training" / "fashion_mnist.yaml"
SHAPE, IMAGES, WARMUP = (28, 28), 4096, 10
TURN = 8.0  # seconds


class Clock(Callback):
    """Looks at the clock after each step; by class path, as any user's callback."""

    ticks: ClassVar[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look."""
        self.ticks.append(time.perf_counter())


def ours(folder: Path, batch: int, steps: int, precision: str) -> list[float]:
    """Times of the ends of the steps of ``dpnp-train fit``."""
    import training_throughput  # as the command line imports it

    from dpnp_training import cli

    callbacks = [
        {"class_path": "dpnp_training.callbacks.Throughput"},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
        {"class_path": "training_throughput.Clock"},
    ]
    cli.main(
        [
            "fit", "--config", str(CONFIG), "--data.source", str(folder / "train.npy"), "--data.validation_split", "null",
            "--data.batch_size", str(batch), "--data.download", "false", "--trainer.max_steps", str(WARMUP + steps),
            "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0", "--trainer.precision", precision,
            "--trainer.default_root_dir", str(folder / "run"), "--trainer.callbacks", json.dumps(callbacks),
            "--trainer.enable_checkpointing", "false",
        ]
    )  # fmt: skip
    return training_throughput.Clock.ticks


def bare(folder: Path, batch: int, steps: int, precision: str) -> list[float]:
    """Times of the ends of the steps of a loop without anything that is not needed."""
    import yaml

    from dpnp_shared.networks import UNet
    from dpnp_shared.preconditioning import EDM

    config = yaml.safe_load(CONFIG.read_text())["model"]
    network, preconditioning = UNet(**config["network"]["init_args"]), EDM(**config["preconditioning"]["init_args"])
    average = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=config["learning_rate"], weight_decay=config["weight_decay"])
    data = torch.from_numpy(np.load(folder / "train.npy"))

    def load(index: list[int]) -> Tensor:
        return data[index, None].float() / 127.5 - 1

    loader = torch.utils.data.DataLoader(range(IMAGES), batch_size=batch, shuffle=True, drop_last=True, collate_fn=load)  # type: ignore[var-annotated,arg-type]
    log_sigma = config["loss"]["init_args"]["noise"]["init_args"]
    sigma_data = config["loss"]["init_args"]["sigma_data"]
    ticks: list[float] = []
    for x_0 in itertools.islice(forever(loader), WARMUP + steps):
        sigma = (log_sigma["mean"] + log_sigma["std"] * torch.randn(batch, 1, 1, 1)).exp()
        x = x_0 + sigma * torch.randn_like(x_0)
        c = preconditioning.coefficients(sigma)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
            D = c.c_skip * x + c.c_out * network(c.c_in * x, c.c_noise.flatten())
            weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
            loss = (weight * (D - x_0) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1 - config["ema"]["beta"])
        ticks.append(time.perf_counter())
    return ticks


def peer(folder: Path, batch: int, steps: int, precision: str) -> list[float]:
    """Times of the ends of the steps of denoising-diffusion-pytorch's trainer."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
    from PIL import Image

    pictures = folder / "pictures"
    if not pictures.is_dir():
        pictures.mkdir()
        for i, image in enumerate(np.load(folder / "train.npy")):
            Image.fromarray(image).save(pictures / f"{i}.png")
    network = Unet(dim=20, dim_mults=(1, 2, 4), channels=1, attn_heads=2, attn_dim_head=14, flash_attn=False)
    print(f"peer: {sum(p.numel() for p in network.parameters()):,} parameters", file=sys.stderr)
    trainer = Trainer(
        GaussianDiffusion(network, image_size=SHAPE[0]), pictures, train_batch_size=batch, train_num_steps=WARMUP + steps,
        save_and_sample_every=10**9, results_folder=str(folder / "peer"), amp=precision != "32-true",
        calculate_fid=False, augment_horizontal_flip=False,
    )  # fmt: skip
    ticks: list[float] = []
    trainer.ema.update = followed_by(
        trainer.ema.update, lambda: ticks.append(time.perf_counter())
    )  # its last act in a step
    trainer.train()
    return ticks


def followed_by(function: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        function()
        then()

    return both


def forever(loader: torch.utils.data.DataLoader[Tensor]) -> Iterator[Tensor]:
    while True:
        yield from loader


CONTENDERS: dict[str, Callable[[Path, int, int, str], list[float]]] = {"ours": ours, "bare": bare, "peer": peer}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=RESULTS / "training_throughput.json")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=60, help="timed steps of a contender in a round")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    options.add_argument("--peer", action="store_true", help="denoising-diffusion-pytorch as well")
    options.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.contender:
        ticks = CONTENDERS[arguments.contender](arguments.folder, arguments.batch, arguments.steps, arguments.precision)
        seconds = statistics.median(b - a for a, b in itertools.pairwise(ticks[WARMUP - 1 :]))
        print(f"RESULT {json.dumps({'images_per_second': arguments.batch / seconds, 'peak_memory': peak_memory()})}")
        return
    names = [name for name in CONTENDERS if name != "peer" or arguments.peer]
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        np.save(Path(folder) / "train.npy", rng.integers(0, 256, (IMAGES, *SHAPE), dtype=np.uint8))
        for r in range(arguments.rounds):
            rounds.append(contend(names if r % 2 == 0 else names[::-1], Path(folder), arguments))
            print({name: round(figures["images_per_second"], 1) for name, figures in rounds[-1].items()}, flush=True)
    header = {k: getattr(arguments, k) for k in ("batch", "steps", "precision")}
    arguments.output.write_text(json.dumps({"header": header, "rounds": rounds}, indent=1) + "\n")
    write_table(arguments, table(rounds, names, arguments))


def contend(names: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """All contenders, each in a process of its own that runs when it is its turn."""
    running: dict[str, subprocess.Popen[str]] = {}
    for name in names:
        command = [sys.executable, __file__, "--contender", name, "--folder", str(folder)]
        for option in ("batch", "steps", "precision"):
            command += [f"--{option}", str(getattr(arguments, option))]
        log = (folder / f"{name}.log").open("w")
        running[name] = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        running[name].send_signal(signal.SIGSTOP)
    waiting = dict(running)
    while waiting:
        for name, process in list(waiting.items()):
            process.send_signal(signal.SIGCONT)
            try:
                process.wait(TURN)
                del waiting[name]
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGSTOP)
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        printed = (folder / f"{name}.log").read_text()
        lines = [line for line in printed.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"{name} failed:\n{printed}")
        figures[name] = json.loads(lines[-1].removeprefix("RESULT "))
    return figures


def table(rounds: list[dict[str, dict[str, float]]], names: list[str], arguments: argparse.Namespace) -> str:
    """Medians over the rounds as Markdown; ratios are taken within a round."""
    lines = [
        f"{len(rounds)} rounds of {arguments.steps} steps of {arguments.batch} images, {arguments.precision}. Images a "
        "second (by the median step) and peak memory of the process, medians; the ratio to the bare loop of the same round, median "
        "(smallest to largest).\n",
        "| training | images/s | ratio to the bare loop | peak memory (MiB) |",
        "|---|---|---|---|",
    ]
    label = {"ours": "`dpnp-train`", "bare": "bare loop", "peer": "denoising-diffusion-pytorch"}
    for name in names:
        rates = [r[name]["images_per_second"] for r in rounds]
        ratios = [r[name]["images_per_second"] / r["bare"]["images_per_second"] for r in rounds]
        memory = statistics.median(r[name]["peak_memory"] for r in rounds) / 2**20
        lines.append(
            f"| {label[name]} | {statistics.median(rates):.1f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) | {memory:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
