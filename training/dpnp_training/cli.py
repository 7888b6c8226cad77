"""Command line of the training side, by LightningCLI: ``fit``, ``validate`` and their options; ``--help`` lists them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from dpnp_training.checkpoints import CheckpointError, Checkpoints, resume_from
from dpnp_training.data import ImageData
from dpnp_training.module import ScoreMatching

# what may differ between an interrupted run and the one that goes on from it
FREE = {
    "data": ("root", "download", "workers", "name", "license", "batch_size"),
    "model": ("compile", "channels_last", "fused"),
}
FREE_ANYWHERE = "checkpoint_activations"  # argument of networks
FIXED_TRAINER = (
    "precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches",
)  # fmt: skip


class TrainingCLI(LightningCLI):
    """LightningCLI whose ``fit`` goes on from the run's last good checkpoint by itself."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--fresh``."""
        parser.add_argument(
            "--fresh", action="store_true", help="begin anew although the run's folder holds checkpoints (fit only)"
        )

    def fit(self, model: ScoreMatching, datamodule: ImageData, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train; without ``ckpt_path`` from the newest good checkpoint below the trainer's root folder, if there is one."""
        configuration = self._configuration(datamodule)
        model.configuration = json.dumps(configuration)
        if ckpt_path is None and any(isinstance(callback, Checkpoints) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            found = resume_from(self.trainer, configuration, fresh=bool(self.config["fit"]["fresh"]))
            ckpt_path = None if found is None else str(found)
        self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)

    def _configuration(self, datamodule: L.LightningDataModule) -> dict[str, Any]:
        """What the numbers of a run depend on, by the names of the command line."""
        config = self.config["fit"].as_dict()
        trainer, model = self.trainer, config["model"]
        flat: dict[str, Any] = {"seed_everything": config["seed_everything"]}
        for part, free in FREE.items():
            flat.update(_flatten(part, {key: value for key, value in config[part].items() if key not in free}))
        flat = {key: value for key, value in flat.items() if not key.endswith(f".{FREE_ANYWHERE}")}
        flat.update({f"trainer.{key}": config["trainer"][key] for key in FIXED_TRAINER})
        flat["images of a batch over all devices"] = getattr(datamodule, "batch_size", 1) * trainer.world_size
        if model["decay"] != "constant":  # the learning rate of every step depends on the last
            flat.update({f"trainer.{key}": config["trainer"][key] for key in ("max_steps", "max_epochs")})
        return flat


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    """Nested dictionaries as one, the keys joined by dots."""
    if not isinstance(value, dict):
        return {
            prefix: value if isinstance(value, int | float | str | None) else json.loads(json.dumps(value, default=str))
        }
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(f"{prefix}.{key}", item))
    return flat


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dpnp-train``.

    Args:
        args: command-line arguments; those of the process by default.
    """
    try:
        TrainingCLI(
            ScoreMatching,
            ImageData,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"default_root_dir": "runs/training"},  # not the working folder, which is the user's
            args=None if args is None else list(args),
        )
    except CheckpointError as error:
        sys.exit(f"dpnp-train: {error}")
