"""What a training will need, from small runs of it: the largest batch, memory, and time for a million images."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from dpnp_training.data import DataDescription, ImageData
from dpnp_training.module import ScoreMatching

GIB = 2**30
FILL = 0.9  # of the memory; the rest is for fragmentation
WARMUP = 2  # steps that are not timed: they allocate


@dataclass(frozen=True)
class Run:
    """One small run.

    Attributes:
        batch_size: images a step and device.
        memory: peak, in bytes: of the device where it keeps count, else of the process.
        seconds: of a step, the median.
    """

    batch_size: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What follows from the runs.

    Attributes:
        runs: the runs, by batch size.
        fixed: memory that does not depend on the batch, in bytes.
        an_image: memory of an image of the batch, in bytes.
    """

    runs: tuple[Run, ...]
    fixed: float
    an_image: float

    def largest_batch(self, memory: float) -> int:
        """Images a device of so many bytes holds, 0 if not even one; a tenth of the memory is left free."""
        return max(0, int((FILL * memory - self.fixed) / self.an_image))

    def hours_a_million(self, devices: int = 1) -> float:
        """Hours for a million images at the fastest of the batches measured; what devices tell each other is not in it."""
        return min(run.seconds / run.batch_size for run in self.runs) * 1e6 / devices / 3600


def forecast(runs: Sequence[Run]) -> Forecast:
    """Fit memory as a straight line in the batch size, by least squares.

    Raises:
        ValueError: there are runs of fewer than two batch sizes, or memory does not grow with the batch.
    """
    sizes = [run.batch_size for run in runs]
    if len(set(sizes)) < 2:
        raise ValueError(f"batch_sizes = {sizes}; two different ones are needed to tell what an image takes")
    an_image, fixed = np.polyfit(sizes, [run.memory for run in runs], 1)
    if not an_image > 0:
        peaks = ", ".join(f"{run.memory / GIB:.2f}" for run in runs)
        raise ValueError(
            f"batch_sizes = {sizes} took {peaks} GiB, which does not grow with the batch; measure larger ones"
        )
    return Forecast(tuple(sorted(runs, key=lambda run: run.batch_size)), float(fixed), float(an_image))


class _Clock(Callback):
    """Times steps, and starts the device's memory count."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.times.append(time.perf_counter() - self._start)


class _Data(L.LightningDataModule):
    """Images of noise, of one batch, again and again."""

    def __init__(self, image_shape: tuple[int, int, int], batch_size: int, steps: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.images = torch.rand(1, *image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.length = batch_size * steps
        self.description = DataDescription("noise", image_shape, (-1.0, 1.0), (-1.0, 1.0), 0.5, 1.0, "noise", "none")

    def train_dataloader(self) -> DataLoader[torch.Tensor]:
        images = [self.images[0]] * self.length
        return DataLoader(images, batch_size=self.batch_size)  # type: ignore[arg-type]


def parse(config: str, overrides: Sequence[str] = ()) -> LightningCLI:
    """The model, the data module and the trainer's settings of a training config, none of them run."""
    if not Path(config).is_file():
        raise ValueError(f"config = {config!r} is no file")
    return LightningCLI(
        ScoreMatching, ImageData, run=False, auto_configure_optimizers=False, seed_everything_default=0,
        save_config_callback=None, args=["--config", config, "--trainer.logger=false", *overrides],
    )  # fmt: skip


def measure(
    config: str, image_shape: tuple[int, int, int], batch_size: int, steps: int, overrides: Sequence[str] = ()
) -> Run:
    """Train a few steps on noise, in a process of its own, since memory that was used once is not given back.

    Args:
        config: a training config; its network, precision, accumulation and clipping are taken.
        image_shape: ``(C, H, W)``.
        batch_size: images a step.
        steps: timed steps.
        overrides: further arguments, as ``dpnp-train`` takes them.
    """
    cli = parse(config, overrides)
    settings, clock = cli.config.trainer, _Clock()
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip_val,
        max_steps=-1,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(cli.model, datamodule=_Data(image_shape, batch_size, WARMUP + steps))
    device = trainer.strategy.root_device
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    return Run(batch_size, memory, statistics.median(clock.times[WARMUP:]))


def peak_memory() -> int:
    """Peak memory of this process, in bytes.

    Linux's own count: that of ``getrusage`` starts with what the parent process held.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        kilobytes = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def estimate(
    config: str,
    image_shape: tuple[int, int, int] | None = None,
    memory: float | None = None,
    devices: int = 1,
    batch_sizes: list[int] | None = None,
    steps: int = 5,
    overrides: list[str] | None = None,
) -> None:
    """Measure what a training config needs on this machine: memory and time by batch size, and the largest batch.

    Args:
        config: a training config, as ``dpnp-train fit --config`` takes it.
        image_shape: ``C H W``; by default that of the config's data, which is then opened.
        memory: GiB of each device that the training is meant for; the largest batch is that which fills nine tenths of it.
        devices: how many are meant to share the images.
        batch_sizes: batches a device to measure; by default an eighth, a quarter and a half of the config's.
        steps: timed steps a run.
        overrides: changes to the config, such as ``--trainer.precision=bf16-mixed``.

    Raises:
        ValueError: an argument is out of range.
    """
    cli = parse(config, overrides or ())
    if image_shape is None:
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        image_shape = cli.datamodule.description.image_shape
    n = cli.datamodule.batch_size
    sizes = sorted(set(batch_sizes or (max(1, n // 8), max(2, n // 4), max(3, n // 2))))
    if min(sizes) < 1 or steps < 1 or devices < 1 or (memory is not None and not memory > 0):
        raise ValueError(
            f"batch_sizes = {sizes}, steps = {steps}, devices = {devices} and memory = {memory} must be positive"
        )
    runs = []
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            runs.append(pool.submit(measure, config, image_shape, size, steps, tuple(overrides or ())).result())
    print_forecast(forecast(runs), memory=memory, devices=devices, configured=n)


def print_forecast(found: Forecast, *, memory: float | None, devices: int, configured: int) -> None:
    """A table of the runs, and what follows from them."""
    table = Table("batch", "memory (GiB)", "step (s)", "images/s", title="measured, one device")
    for run in found.runs:
        table.add_row(
            f"{run.batch_size}", f"{run.memory / GIB:.2f}", f"{run.seconds:.3f}", f"{run.batch_size / run.seconds:.1f}"
        )
    console = Console()
    console.print(table)
    console.print(f"memory: {found.fixed / GIB:.2f} GiB and {found.an_image / 2**20:.2f} MiB an image of the batch")
    needed = (found.fixed + configured * found.an_image) / GIB
    console.print(
        f"the config's batch of {configured} needs {needed:.2f} GiB a device (a straight line through the runs)"
    )
    if memory is not None:
        largest = found.largest_batch(memory * GIB)
        console.print(
            f"largest batch in {memory:g} GiB: {largest} a device, {largest * devices} in all"
            if largest
            else f"not even one image fits in {memory:g} GiB"
        )
    shared = "" if devices == 1 else f" on {devices} devices, without what they tell each other"
    console.print(f"a million images: {found.hours_a_million(devices):.2f} h{shared}")
