"""Norms of the gradient, as the network gives it: before clipping."""

from __future__ import annotations

import math

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from dpnp_training.callbacks.pictures import publish_figures
from dpnp_training.module import ScoreMatching
from dpnp_training.sharding import FullySharded, local

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "module")  # what compilation and sharding add to parameters' names


class GradientNorms(Callback):
    """Logs the Euclidean norm of the gradient before clipping, of the whole network and of its parts.

    ``gradient_norm`` is the whole, ``gradient_norm/down`` that of the parameters whose names begin with ``down.``; mixed precision's loss
    scaling is taken out first. A group's square adds to the whole's square.

    Args:
        every_n_steps: optimiser steps from one figure of the whole to the next.
        groups_every_n_steps: optimiser steps from one set of the parts' figures to the next; a multiple of ``every_n_steps``.
        depth: how many components of a parameter's name make its group: 1 for ``down``, 2 for ``down.0``.

    Raises:
        ValueError: a number that is not positive, or intervals that do not divide.
    """

    def __init__(self, every_n_steps: int = 20, groups_every_n_steps: int = 200, depth: int = 1) -> None:
        if min(every_n_steps, groups_every_n_steps, depth) < 1 or groups_every_n_steps % every_n_steps:
            raise ValueError(
                f"every_n_steps = {every_n_steps}, groups_every_n_steps = {groups_every_n_steps}, depth = {depth}: all must be "
                "positive, and groups_every_n_steps a multiple of every_n_steps"
            )
        self.every_n_steps, self.groups_every_n_steps, self.depth = every_n_steps, groups_every_n_steps, depth

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure when due; Lightning clips after this."""
        step = trainer.global_step + 1  # the one that is about to be taken
        if step % self.every_n_steps or not isinstance(pl_module, ScoreMatching):
            return
        squares: dict[str, Tensor] = {}
        for name, parameter in pl_module.network.named_parameters():
            group = ".".join([part for part in name.split(".")[:-1] if part not in WRAPPERS][: self.depth]) or name
            gradient = parameter.grad
            square = torch.zeros((), device=pl_module.device) if gradient is None else _square(local(gradient))
            squares[group] = squares.get(group, torch.zeros_like(square)) + square
        values = torch.stack(list(squares.values()))
        if isinstance(trainer.strategy, FullySharded):  # each rank holds a part of each gradient
            values = trainer.strategy.reduce(values, reduce_op="sum")
        parts = values.tolist()
        figures = {"gradient_norm": math.sqrt(sum(parts))}
        if step % self.groups_every_n_steps == 0:
            figures |= {f"gradient_norm/{group}": math.sqrt(part) for group, part in zip(squares, parts, strict=True)}
        publish_figures(trainer, figures)


def _square(gradient: Tensor) -> Tensor:
    """Squared Euclidean norm, 0-d, in float32 at least."""
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norm.square()
