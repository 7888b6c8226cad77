"""What callbacks that look at the averaged network now and then have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.callbacks import Callback

from dpnp_training.module import ScoreMatching


class Periodic(Callback):
    """Looks at a training every so many optimiser steps and at its end, and leaves no trace in it.

    Random numbers that are drawn while looking (by libraries, from the global generators) do not move those of the training.

    Args:
        every_n_steps: optimiser steps from one look to the next.

    Raises:
        ValueError: ``every_n_steps`` is not positive.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps = {every_n_steps}; at least 1 is needed")
        self.every_n_steps = every_n_steps
        self._looked = -1

    @abstractmethod
    def look(self, trainer: L.Trainer, module: ScoreMatching) -> None:
        """Do it; called on every rank."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look when due."""
        if trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look a last time."""
        self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._looked == trainer.global_step or not isinstance(pl_module, ScoreMatching):
            return
        self._looked = trainer.global_step
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.look(trainer, pl_module)
