"""Learning rates that follow the global batch."""

from __future__ import annotations

from typing import Literal, get_args

import lightning as L  # noqa: N812 - Lightning's own convention
from lightning.pytorch.utilities import rank_zero_info

Rule = Literal["none", "linear", "sqrt"]


def check_rule(rule: Rule, reference_batch: int | None) -> None:
    """Refuse a rule that is unknown or lacks its reference.

    Raises:
        ValueError: so.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"scale_learning_rate = {rule!r}; allowed are {', '.join(get_args(Rule))}")
    if reference_batch is not None and reference_batch < 1:
        raise ValueError(f"reference_batch = {reference_batch}; it must be positive")
    if rule != "none" and reference_batch is None:
        raise ValueError(
            f"scale_learning_rate = {rule!r} needs reference_batch, the images a step that the rate is meant for"
        )


def scaled_learning_rate(base: float, rule: Rule, reference_batch: int | None, trainer: L.Trainer) -> float:
    """The learning rate for a training's global batch, said in its log.

    With Adam the square root keeps the size of the noise in the weights (Malladi et al. 2022, arXiv 2205.10287); the linear rule is that of
    plain gradient descent (Goyal et al. 2017, arXiv 1706.02677).

    Args:
        base: learning rate at ``reference_batch`` images an optimiser step.
        rule: in proportion to the global batch, to its square root, or not at all.
        reference_batch: images.
        trainer: whose global batch is batch x processes x accumulated batches.

    Raises:
        ValueError: the data module does not tell its ``batch_size``.
    """
    if rule == "none" or reference_batch is None:
        return base
    batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    if not isinstance(batch, int):
        raise ValueError(f"scale_learning_rate = {rule!r} needs a data module with a batch_size, which is {batch!r}")
    images = batch * trainer.world_size * trainer.accumulate_grad_batches
    rate: float = base * (images / reference_batch) ** (1.0 if rule == "linear" else 0.5)
    rank_zero_info(
        f"learning rate {rate:.6g}: {base:g} for {reference_batch} images a step, scaled ({rule}) to {images} = {batch} x "
        f"{trainer.world_size} processes x {trainer.accumulate_grad_batches} accumulated batches"
    )
    return rate
