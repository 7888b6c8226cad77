"""Moving averages of the score network: the main one, and power-function profiles of which others are made after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from ema_pytorch import EMA
from ema_pytorch.post_hoc_ema import KarrasEMA
from torch import Tensor, nn

from dpnp_training.losses import DenoisingScoreMatching
from dpnp_training.post_hoc import WIDEST, Snapshot, snapshot_file, write_snapshot


@dataclass
class EMASettings:
    """How the averages are taken.

    The decay of the main average warms up as ``1 - (1 + step/inv_gamma)^-power`` until it reaches ``beta``; or, with
    ``half_life_images``, it is EDM's (Karras et al. 2022, arXiv 2206.00364, appendix F.2 and the authors' code), which does not depend
    on the batch: ``0.5^(images of the step / H)``, ``H = min(half_life_images, ramp_up * images before the step)``.

    Attributes:
        beta: final decay per update.
        power: exponent of the warm-up.
        inv_gamma: its inverse multiplicative factor, in updates.
        update_every: optimiser steps from one update to the next.
        update_after_step: optimiser steps before which the average is just a copy.
        half_life_images: training images after which older weights count by half; in place of ``beta``, ``power`` and ``inv_gamma``.
        ramp_up: largest half-life, in units of the images seen so far; none for the full half-life from the start.
        profiles: relative widths σ_rel of further averages, taken beside the main one, each with a power-function profile (Karras et
            al. 2024, arXiv 2312.02696, section 3.1); each takes the memory of one network. 0.05 and 0.1 serve for most others.
        snapshot_every_n_steps: optimiser steps from one snapshot of the profiles to the next, below ``ema/`` in the trainer's root
            folder; from snapshots a profile of another width is made after training.
    """

    beta: float = 0.9995
    power: float = 0.75
    inv_gamma: float = 1.0
    update_every: int = 1
    update_after_step: int = 0
    half_life_images: float | None = None
    ramp_up: float | None = 0.05
    profiles: list[float] = field(default_factory=list)
    snapshot_every_n_steps: int | None = None

    def __post_init__(self) -> None:
        if not (0 < self.beta < 1 and self.power > 0 and self.inv_gamma > 0):
            raise ValueError(f"beta = {self.beta} must be in (0, 1), power = {self.power} and inv_gamma positive")
        if self.update_every < 1 or self.update_after_step < 0:
            raise ValueError(
                f"update_every = {self.update_every} and update_after_step = {self.update_after_step}: too small"
            )
        if self.half_life_images is not None:
            if not 0 < self.half_life_images < float("inf"):
                raise ValueError(f"half_life_images = {self.half_life_images} must be positive and finite")
            for name in ("beta", "power", "inv_gamma"):
                if getattr(self, name) != getattr(EMASettings, name):
                    raise ValueError(
                        f"half_life_images = {self.half_life_images} and {name} = {getattr(self, name)}; give one of them "
                        f"(without {name} it is {getattr(EMASettings, name)}, which is not used then)"
                    )
        if self.ramp_up is not None and not self.ramp_up > 0:
            raise ValueError(f"ramp_up = {self.ramp_up} must be positive, or none")
        if any(not 0 < width < WIDEST for width in self.profiles) or len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"profiles = {self.profiles}; needed are different σ_rel in (0, {WIDEST:.3f})")
        if self.snapshot_every_n_steps is not None:
            if self.snapshot_every_n_steps < self.update_every:
                raise ValueError(
                    f"snapshot_every_n_steps = {self.snapshot_every_n_steps}; at least update_every = {self.update_every} is needed"
                )
            if not self.profiles:
                raise ValueError(
                    f"snapshot_every_n_steps = {self.snapshot_every_n_steps} needs profiles to take snapshots of"
                )


def make_ema(network: nn.Module, settings: EMASettings) -> EMA:
    """The main average of ``network``: frozen, always in evaluation mode, the online network not part of its state."""
    if settings.half_life_images is not None:
        ema = HalfLifeEMA(network, settings.half_life_images, settings)
    else:
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


class HalfLifeEMA(EMA):  # type: ignore[misc]
    """An average whose half-life is counted in training images, as :class:`EMASettings` says; the first update copies.

    Args:
        network: to average.
        half_life: in images.
        settings: the rest.

    Attributes:
        images_seen: by the network so far, to be set before each ``update``.
        images: seen at the last update.
    """

    def __init__(self, network: nn.Module, half_life: float, settings: EMASettings) -> None:
        super().__init__(
            network,
            update_every=settings.update_every,
            update_after_step=settings.update_after_step,
            include_online_model=False,
        )
        self.half_life, self.ramp_up = half_life, settings.ramp_up
        self.images_seen = 0
        self.register_buffer("images", torch.tensor(0))

    def get_current_decay(self) -> float:
        """The decay of the update that is due."""
        before = int(self.images)
        half_life = self.half_life if self.ramp_up is None else min(self.half_life, self.ramp_up * before)
        return float(0.5 ** ((self.images_seen - before) / max(half_life, 1e-8)))

    def update(self) -> None:
        """Count one optimiser step; copy or average if it is due."""
        due = int(self.step) % self.update_every == 0
        super().update()
        if due:
            self.images.fill_(self.images_seen)


class PowerFunctionEMA(KarrasEMA):  # type: ignore[misc]
    r"""The average :math:`\int_0^t \tau^\gamma \theta(\tau) d\tau \,/ \int_0^t \tau^\gamma d\tau` (Karras et al. 2024, equation 121).

    Time is counted in training images: the decay of an update is :math:`(t_{last}/t)^{\gamma + 1}` (equation 127), whatever the
    batches and however many steps lie between updates. The first update copies.

    Args:
        network: to average.
        sigma_rel: standard deviation of the profile relative to t (equation 123).
        update_every: optimiser steps from one update to the next.

    Attributes:
        images_seen: by the network so far, to be set before each ``update``.
        images: seen at the last update.
    """

    def __init__(self, network: nn.Module, sigma_rel: float, update_every: int = 1) -> None:
        super().__init__(network, sigma_rel=sigma_rel, update_every=update_every)
        self.sigma_rel = sigma_rel
        self.images_seen = 0
        self.register_buffer("images", torch.tensor(0))
        self.ema_model.requires_grad_(False).eval()

    @property
    def beta(self) -> float:
        """The decay of the update that is due."""
        return float((int(self.images) / self.images_seen) ** (1 + self.gamma))

    def update(self) -> None:
        """Count one optimiser step; average if it is due.

        Raises:
            ValueError: the network has seen no image since the last update.
        """
        due = int(self.step) % self.update_every == 0
        if due and self.images_seen <= int(self.images):
            raise ValueError(f"images_seen = {self.images_seen}; the last update was at {int(self.images)}")
        super().update()
        if due:
            self.images.fill_(self.images_seen)


class Profiles(nn.Module):
    """Several power-function averages and their snapshots, from which :mod:`~dpnp_training.post_hoc` makes averages of other widths.

    All processes hold the same averages; the first one writes the snapshots.

    Args:
        network: to average.
        settings: with ``profiles``.

    Attributes:
        snapshots: written so far, the oldest first; part of the training's checkpoint.
    """

    def __init__(self, network: nn.Module, settings: EMASettings) -> None:
        super().__init__()
        self.averages = nn.ModuleList(PowerFunctionEMA(network, s, settings.update_every) for s in settings.profiles)
        self.widths, self.every = list(settings.profiles), settings.snapshot_every_n_steps
        self.snapshots: list[Snapshot] = []

    def update(self, images_seen: int, folder: Path, *, write: bool) -> None:
        """Count one optimiser step, and take a snapshot if one is due; called on every process.

        Args:
            images_seen: by the network so far, of all processes.
            folder: of the snapshots.
            write: whether this process writes them.
        """
        averages = cast("list[PowerFunctionEMA]", list(self.averages))
        for average in averages:
            average.images_seen = images_seen
            average.update()
        step = int(averages[0].step)
        if self.every is None or step % self.every:
            return
        states = [
            {name: _whole(value) for name, value in average.ema_model.state_dict().items()} for average in averages
        ]
        if write:
            snapshot = write_snapshot(folder / snapshot_file(step), self.widths, states, int(averages[0].images))
            if snapshot is not None:
                self.snapshots.append(snapshot)


def make_profiles(network: nn.Module, settings: EMASettings) -> Profiles | None:
    """The further averages, if there are any."""
    return Profiles(network, settings) if settings.profiles else None


def saved(ema: EMA, profiles: Profiles | None, loss: DenoisingScoreMatching) -> dict[str, Any]:
    """What a checkpoint holds of the averages besides their weights, and the loss by which to compare them, as plain values."""
    known = type(loss).weight is DenoisingScoreMatching.weight
    return {
        "loss": {"weighting": loss.weighting, "sigma_data": loss.sigma_data} if known else None,
        "half_life": isinstance(ema, HalfLifeEMA),
        "profiles": [] if profiles is None else profiles.widths,
        "snapshots": [] if profiles is None else [s._asdict() for s in profiles.snapshots],
    }


def restore(state: Mapping[str, Any], ema: EMA, profiles: Profiles | None) -> None:
    """Take up what :func:`saved` gave, before the weights are loaded.

    Raises:
        ValueError: the checkpoint is of a training with other averages than are configured now.
    """
    widths = [] if profiles is None else profiles.widths
    if state.get("profiles", []) != widths:
        raise ValueError(f"model.ema.profiles = {widths}; the checkpoint's training has {state.get('profiles', [])}")
    if state.get("half_life", False) != isinstance(ema, HalfLifeEMA):
        has = "has" if state.get("half_life") else "does not have"
        raise ValueError(f"the checkpoint's training {has} model.ema.half_life_images; it cannot be changed on the way")
    if profiles is not None:
        profiles.snapshots = [Snapshot(**s) for s in state["snapshots"]]


def _whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded over the processes, as a whole."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
