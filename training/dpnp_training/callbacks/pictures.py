"""Pictures and figures, to files and to whichever loggers there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid, save_image


def unit_range(x: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Images ``(B, C, H, W)`` of a value range, clipped to it and mapped onto [0, 1]."""
    low, high = value_range
    return ((x.detach().float() - low) / (high - low)).clamp(0, 1)


def image_grid(x: Tensor, value_range: tuple[float, float], columns: int | None = None) -> Tensor:
    """Images as one picture.

    Args:
        x: ``(n, C, H, W)``; of images that are neither gray nor RGB the first channel is shown.
        value_range: of a pixel, shown as black and white.
        columns: images side by side; about the square root of ``n`` by default.

    Returns:
        ``(3, H', W')`` in [0, 1], on the CPU.
    """
    x = unit_range(x, value_range).cpu()
    if x.shape[1] not in (1, 3):
        x = x[:, :1]
    grid: Tensor = make_grid(x, nrow=columns or max(1, round(len(x) ** 0.5)), padding=1)
    return grid


def publish_picture(trainer: L.Trainer, name: str, picture: Tensor) -> None:
    """Write ``NAME/step_00001000.png`` below the trainer's root folder and hand it to every logger that takes images, on the first rank.

    These are TensorBoard and loggers with Lightning's ``log_image`` (Weights & Biases); others, or none, get the file alone.

    Args:
        trainer: whose step and loggers.
        name: of the folder and of the logger's series.
        picture: ``(1 or 3, H, W)`` in [0, 1].
    """
    if not trainer.is_global_zero:
        return
    picture = picture.detach().float().cpu().clamp(0, 1)
    step = trainer.global_step
    folder = Path(trainer.default_root_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    save_image(picture, folder / f"step_{step:08d}.png")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step)
        elif callable(log_image := getattr(logger, "log_image", None)):
            log_image(key=name, images=[to_pil_image(picture)], step=step)


def newest_picture(root: Path, name: str) -> bytes | None:
    """The PNG of the latest step that :func:`publish_picture` wrote below a run's root folder, if there is one."""
    pictures = sorted((root / name).glob("step_*.png"))
    return pictures[-1].read_bytes() if pictures else None


def publish_figures(trainer: L.Trainer, figures: Mapping[str, float]) -> None:
    """Hand figures to every logger, at the trainer's step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=trainer.global_step)
