"""What is watched during training, and the export at its end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.utils import make_grid, save_image

from dpnp_shared.solvers import sample_unconditional
from dpnp_training.module import ScoreMatching


class Throughput(Callback):
    """Logs images per second over all devices, averaged over a window, validation excluded.

    Args:
        window: training batches of one average.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"window = {window}; at least 1 is needed")
        self.window = window
        self._images, self._seconds, self._start = 0, 0.0, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        """Start the clock of a batch."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Stop it."""
        self._images += batch.shape[0] * trainer.world_size
        self._seconds += time.perf_counter() - self._start
        if (batch_idx + 1) % self.window == 0:
            pl_module.log("images/s", self._images / self._seconds, prog_bar=True)
            self._images, self._seconds = 0, 0.0


class Checkpoints(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt`` below the trainer's root folder, from which training resumes (``--ckpt_path``).

    Args:
        every_n_train_steps: optimiser steps from one checkpoint to the next; one is also written at each epoch's end.
    """

    def __init__(self, every_n_train_steps: int = 1000) -> None:
        super().__init__(
            save_top_k=0, save_last=True, every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Settle the folder."""
        self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the very last state as well."""
        super().on_train_end(trainer, pl_module)
        trainer.save_checkpoint(Path(self.dirpath or trainer.default_root_dir) / "last.ckpt")


class SampleGrid(Callback):
    """Draws unconditional samples of the averaged network from the same noise each time.

    Writes ``samples/step_00001000.png`` below the trainer's root folder and to TensorBoard.

    Args:
        every_n_steps: optimiser steps from one grid to the next; a last one is drawn at the end of training.
        images: how many.
        calls: network calls a sample.
        seed: of the initial noise.
    """

    def __init__(self, every_n_steps: int = 2000, images: int = 64, calls: int = 30, seed: int = 0) -> None:
        if every_n_steps < 1 or images < 1 or calls < 1:
            raise ValueError(
                f"every_n_steps = {every_n_steps}, images = {images}, calls = {calls}: all must be positive"
            )
        self.every_n_steps, self.images, self.calls, self.seed = every_n_steps, images, calls, seed
        self._drawn = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Draw when due."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last grid."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or self._drawn == trainer.global_step or not isinstance(pl_module, ScoreMatching):
            return
        self._drawn = trainer.global_step
        x = sample_unconditional(
            pl_module.to_prior(),
            self.images,
            generator=torch.Generator().manual_seed(self.seed),
            steps=self.calls,
            device=pl_module.device,
        )
        grid = image_grid(x, pl_module.card().value_range)
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        save_image(grid, folder / f"step_{trainer.global_step:08d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", grid, trainer.global_step)


def image_grid(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Images ``(n, C, H, W)`` as one picture ``(3, H', W')`` in [0, 1]; of images that are neither gray nor RGB the first channel."""
    low, high = value_range
    x = ((x.detach().float().cpu() - low) / (high - low)).clamp(0, 1)
    if x.shape[1] not in (1, 3):
        x = x[:, :1]
    grid: Tensor = make_grid(x, nrow=max(1, round(len(x) ** 0.5)), padding=1)
    return grid


class ExportPrior(Callback):
    """Writes the portable prior when training ends, interrupted training included.

    Args:
        directory: the prior's folder, ``prior`` below the trainer's root folder by default.
        name: title of the card; the data's name by default.
    """

    def __init__(self, directory: str | None = None, name: str | None = None) -> None:
        self.directory, self.name = directory, name

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export on the first rank."""
        self._export(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Export what an interrupted training has reached."""
        if isinstance(exception, KeyboardInterrupt):
            self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, ScoreMatching) and trainer.global_step:
            prior = pl_module.to_prior()
            if self.name is not None:
                prior.card.name = self.name
            folder = prior.save_pretrained(self.directory or Path(trainer.default_root_dir) / "prior")
            print(f"prior written to {folder}")
