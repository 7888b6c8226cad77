"""Images per second."""

from __future__ import annotations

import time
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.callbacks import Callback
from torch import Tensor


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
