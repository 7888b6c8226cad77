"""The prior that training leaves behind."""

from __future__ import annotations

from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dpnp_shared.prior import SAMPLES
from dpnp_training.callbacks.pictures import newest_picture
from dpnp_training.module import ScoreMatching
from dpnp_training.sharding import FullySharded


class ExportPrior(Callback):
    """Writes the portable prior when training ends, interrupted training included, with the newest picture of samples.

    A training for a measurement task leaves its denoiser in the prior's place.

    An interrupted sharded training leaves none: its processes can no longer put their shards together.

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
        if not isinstance(exception, KeyboardInterrupt):
            return
        if isinstance(trainer.strategy, FullySharded):
            rank_zero_info("no prior was written; `dpnp-prior export` makes one of the last checkpoint")
        else:
            self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, ScoreMatching) or not trainer.global_step:
            return
        prior = pl_module.to_portable()
        if trainer.is_global_zero:
            if self.name is not None:
                prior.card.name = self.name
            root = Path(trainer.default_root_dir)
            picture = newest_picture(root, "samples")
            files = {} if picture is None else {SAMPLES: picture}
            folder = prior.save_pretrained(self.directory or root / "prior", files=files)
            print(f"prior written to {folder}")
