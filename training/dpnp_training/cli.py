"""Command line of the training side, by LightningCLI: ``fit``, ``validate`` and their options; ``--help`` lists them."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

from dpnp_training.data import ImageData
from dpnp_training.module import ScoreMatching


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dpnp-train``.

    Args:
        args: command-line arguments; those of the process by default.
    """
    LightningCLI(
        ScoreMatching,
        ImageData,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        args=None if args is None else list(args),
    )
