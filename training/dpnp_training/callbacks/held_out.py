"""The images of a training's data module, for callbacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor

BATCH = 256


def batches(
    trainer: L.Trainer, which: Literal["train_set", "validation_set"], limit: int | None = None, *, share: bool = False
) -> Iterator[Tensor]:
    """Images of a data set; if they are limited, evenly spaced ones, or the first of a stream.

    Args:
        trainer: whose data module.
        which: its attribute.
        limit: how many images; all by default.
        share: this rank's share alone: every so-many-th of them.

    Yields:
        ``(at most 256, C, H, W)`` on the CPU, as the network sees them.

    Raises:
        ValueError: the data module has no such data set.
    """
    data: Any = getattr(getattr(trainer, "datamodule", None), which, None)
    if data is None:
        raise ValueError(f"the data module has no {which}, which a callback that looks at images needs")
    first, step = (trainer.global_rank, trainer.world_size) if share else (0, 1)
    if hasattr(data, "__len__"):
        count = len(data) if limit is None else min(limit, len(data))
        images: Iterator[Tensor] = (data[i * len(data) // count] for i in range(first, count, step))
    else:
        images = itertools.islice(iter(data), first, limit, step)
    while chunk := list(itertools.islice(images, BATCH)):
        yield torch.stack(chunk)


def held_out_images(trainer: L.Trainer, at_most: int, at_least: int = 1) -> Tensor:
    """Held-out images ``(n, C, H, W)`` on the CPU, as :func:`batches` chooses them.

    Raises:
        ValueError: there are too few.
    """
    found = list(batches(trainer, "validation_set", at_most))
    count = sum(map(len, found))
    if count < at_least:
        raise ValueError(f"the validation set holds {count} images; at least {at_least} are needed to watch by them")
    return torch.cat(found)
