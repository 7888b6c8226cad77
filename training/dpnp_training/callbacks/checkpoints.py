"""Checkpoints that training resumes from."""

from __future__ import annotations

from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.callbacks import ModelCheckpoint


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
