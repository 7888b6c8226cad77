"""Exponential moving average of the score network, by ema-pytorch."""

from __future__ import annotations

from dataclasses import dataclass

from ema_pytorch import EMA
from torch import nn


@dataclass
class EMASettings:
    """How the average is taken; the decay warms up as ``1 - (1 + step/inv_gamma)^-power`` until it reaches ``beta``.

    Attributes:
        beta: final decay per update.
        power: exponent of the warm-up.
        inv_gamma: its inverse multiplicative factor, in updates.
        update_every: optimiser steps from one update to the next.
        update_after_step: optimiser steps before which the average is just a copy.
    """

    beta: float = 0.9995
    power: float = 0.75
    inv_gamma: float = 1.0
    update_every: int = 1
    update_after_step: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.beta < 1 and self.power > 0 and self.inv_gamma > 0):
            raise ValueError(f"beta = {self.beta} must be in (0, 1), power = {self.power} and inv_gamma positive")
        if self.update_every < 1 or self.update_after_step < 0:
            raise ValueError(
                f"update_every = {self.update_every} and update_after_step = {self.update_after_step}: too small"
            )


def make_ema(network: nn.Module, settings: EMASettings) -> EMA:
    """The average of ``network``: frozen, always in evaluation mode, the online network not part of its state."""
    ema = EMA(
        network,
        beta=settings.beta,
        power=settings.power,
        inv_gamma=settings.inv_gamma,
        update_every=settings.update_every,
        update_after_step=settings.update_after_step,
        include_online_model=False,
    )
    ema.ema_model.requires_grad_(False).eval()
    return ema
