r"""Averages of any width after training (Karras et al. 2024, arXiv 2312.02696, section 3 and appendix C).

A power-function average of relative width σ_rel at time t has the profile :math:`p(\tau) \propto \tau^\gamma` on
:math:`[0, t]`. Averages of a few widths, kept at many times, are combined so that their profiles come closest to the one that is
wanted, in the sense of least squares (algorithm 3). Time is counted in training images.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ema_pytorch.post_hoc_ema import p_dot_p, sigma_rel_to_gamma, solve_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpnp_shared.prior import PriorError, sha256

log = logging.getLogger(__name__)

FOLDER = "ema"
"""Of the snapshots, below the trainer's root folder."""
WIDEST = 12**-0.5
"""Relative width of the flat profile, γ = 0."""
LARGEST_ERROR = 0.1
"""Of a profile, relative to the wanted one; a worse approximation is refused."""


class Snapshot(NamedTuple):
    """A file with all profiles at one time."""

    file: str
    images: int
    sha256: str


def snapshot_file(step: int) -> str:
    """Name of the snapshot taken after so many optimiser steps."""
    return f"step_{step:08d}.safetensors"


def write_snapshot(
    file: Path, widths: Sequence[float], states: Sequence[Mapping[str, Tensor]], images: int
) -> Snapshot | None:
    """Write a snapshot, all of it or nothing, in place of one of that name.

    Args:
        file: where.
        widths: σ_rel of each average.
        states: weights of each average.
        images: seen by the averages.

    Returns:
        What was written; nothing if the file system refuses, which is said in the log: training need not end for that.
    """
    tensors = {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, state in enumerate(states)
        for name, value in state.items()
    }
    about = json.dumps({"profiles": list(widths), "images": images})
    part = file.with_name(f"{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"averages": about})  # one entry: the order of several is random
        part.chmod(0o644)  # safetensors makes files that only their owner can read
        _to_disk(part)
        digest = sha256(part)
        os.replace(part, file)
        _to_disk(file.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink()
        log.warning("snapshot %s of the moving averages could not be written, training goes on: %s", file, error)
        return None
    return Snapshot(file.name, images, digest)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def coefficients(
    images: Sequence[int], widths: Sequence[float], at: int, sigma_rel: float
) -> tuple[list[float], float]:
    """How averages are combined to come closest to one that was not taken.

    Args:
        images: t of each average, no two with the same t and width.
        widths: σ_rel of each average.
        at: t of the wanted one, at least the largest of ``images``.
        sigma_rel: its width, in (0, 0.289).

    Returns:
        The factors, of sum 1, and the distance of the combined profile from the wanted one, relative to the norm of that.

    Raises:
        ValueError: ``sigma_rel`` is out of range.
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"σ_rel = {sigma_rel}; it must be in (0, {WIDEST:.3f})")
    t = torch.tensor(images, dtype=torch.float64)
    gamma = torch.tensor([sigma_rel_to_gamma(width) for width in widths], dtype=torch.float64)
    t_r, gamma_r = torch.tensor([[at], [sigma_rel_to_gamma(sigma_rel)]], dtype=torch.float64)
    x = solve_weights(t, gamma, t_r, gamma_r).flatten()
    x = x / x.sum()  # as the authors' code does: weights that never changed are not changed by averaging either
    gram = p_dot_p(t[:, None], gamma[:, None], t, gamma)
    projection = p_dot_p(t, gamma, t_r, gamma_r)
    norm = p_dot_p(t_r, gamma_r, t_r, gamma_r)
    squared = float((norm - 2 * x @ projection + x @ gram @ x) / norm)
    return x.tolist(), math.sqrt(max(squared, 0.0))


class Averages:
    """The averages that a checkpoint and the snapshots of its training hold.

    Args:
        checkpoint: as training wrote it.
        file: where it was read from; snapshots are looked for in ``ema/`` beside its folder.

    Attributes:
        widths: σ_rel that were tracked.
        images: seen at the checkpoint, the t of what is synthesised.
        left_out: snapshots that cannot be used, and why; also said in the log.

    Raises:
        PriorError: the training tracked no profiles.
    """

    def __init__(self, checkpoint: Mapping[str, Any], file: Path) -> None:
        recorded = checkpoint.get("ema", {})
        self.widths: list[float] = recorded.get("profiles", [])
        if not self.widths:
            raise PriorError(
                f"checkpoint {file}: its training tracked no profiles (model.ema.profiles), so that it has the main average only"
            )
        self._state: Mapping[str, Tensor] = checkpoint["state_dict"]
        self.images = int(self._state["profiles.averages.0.images"])
        self.left_out: list[str] = []
        self._files: list[Path] = []
        times: list[int] = []
        for snapshot in (Snapshot(**s) for s in recorded["snapshots"]):
            path = file.resolve().parent.parent / FOLDER / snapshot.file
            if snapshot.images >= self.images:
                continue  # the checkpoint itself holds these averages
            if not path.is_file():
                self.left_out.append(f"{path} is missing")
            elif sha256(path) != snapshot.sha256:
                self.left_out.append(f"{path} is not the file that this checkpoint's training wrote")
            else:
                self._files.append(path)
                times.append(snapshot.images)
        for reason in self.left_out:
            log.warning("snapshot left out: %s", reason)
        self._times = [t for t in (*times, self.images) for _ in self.widths]

    def __len__(self) -> int:
        """How many averages there are."""
        return len(self._times)

    def error(self, sigma_rel: float) -> float:
        """How far a synthesised profile is from the wanted one, relative to its norm.

        Raises:
            ValueError: ``sigma_rel`` is out of range.
        """
        return self._coefficients(sigma_rel)[1]

    def _coefficients(self, sigma_rel: float) -> tuple[list[float], float]:
        widths = self.widths * (len(self._files) + 1)
        return coefficients(self._times, widths, self.images, sigma_rel)

    def synthesise(self, sigma_rel: float) -> dict[str, Tensor]:
        """Weights of the network averaged with the relative width ``sigma_rel`` up to the checkpoint.

        Raises:
            ValueError: ``sigma_rel`` is out of range.
            PriorError: the averages at hand do not come close to it; says what would.
        """
        factors, error = self._coefficients(sigma_rel)
        if error > LARGEST_ERROR:
            raise PriorError(
                f"σ_rel = {sigma_rel:g}: the {len(self)} averages at hand (σ_rel = {', '.join(map(str, self.widths))}; "
                f"{len(self._files)} snapshots and the checkpoint) give its profile to {error:.0%} only, at most {LARGEST_ERROR:.0%} "
                "are allowed; choose a width closer to theirs, or take more snapshots in training"
            )
        prefixes = [f"profiles.averages.{i}.ema_model." for i in range(len(self.widths))]
        names = [key.removeprefix(prefixes[0]) for key in self._state if key.startswith(prefixes[0])]
        with ExitStack() as stack:
            files = [stack.enter_context(safe_open(path, "pt")) for path in self._files]
            weights = {}
            for name in names:
                own = [self._state[prefix + name] for prefix in prefixes]
                if not own[0].is_floating_point():
                    weights[name] = own[0]
                    continue
                kept = (file.get_tensor(f"{i}.{name}") for file in files for i in range(len(self.widths)))
                total = torch.zeros(own[0].shape, dtype=torch.float64)
                for factor, value in zip(factors, itertools.chain(kept, own), strict=True):
                    total.add_(value.double(), alpha=factor)
                weights[name] = total.to(own[0].dtype)
        return weights
