"""Checkpoints that survive being killed, a full disk and a damaged file.

A checkpoint is written under another name, flushed to the disk and then renamed; the one before it is kept. ``checksums.json`` lists
the SHA-256 of the checkpoints that were written to the end, before any of them gets its name: a file that is not listed is not
a good one, whatever its name, and at every moment at least one listed file exists.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dpnp_training.data.order import ResumableLoader

LAST, PREVIOUS, CHECKSUMS = "last.ckpt", "previous.ckpt", "checksums.json"


class CheckpointError(RuntimeError):
    """No checkpoint of a run can be used, or it belongs to another configuration."""


class _Stream(Protocol):
    def write(self, data: Any, /) -> int: ...


class _Hashing:
    """A stream that hashes what passes and remembers its error, which torch.save replaces by one of its own."""

    def __init__(self, stream: _Stream) -> None:
        self.stream, self.digest = stream, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.stream.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        """All is flushed at the end."""


def write_checkpoint(checkpoint: dict[str, Any], path: Path, *, opener: Callable[[Path, str], Any] = open) -> None:
    """Write a checkpoint, all of it or nothing, and keep the one before it as ``previous.ckpt``.

    Args:
        checkpoint: what to write.
        path: the file; its folder is made.
        opener: opens the file that is written.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there before is untouched.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{path.name}.part"
    try:
        with opener(staged, "wb") as file:
            stream = _Hashing(file)
            try:
                torch.save(checkpoint, stream)  # type: ignore[arg-type]
            except RuntimeError as error:
                if stream.error is not None:
                    raise stream.error from error
                raise
            file.flush()
            os.fsync(file.fileno())
        _list(folder, stream.digest.hexdigest(), opener)
        if path.exists():
            os.replace(path, folder / PREVIOUS)
        os.replace(staged, path)
        _flush_folder(folder)
    finally:
        staged.unlink(missing_ok=True)


def _list(folder: Path, digest: str, opener: Callable[[Path, str], Any]) -> None:
    """Add a checksum to the list of those that were written to the end (the last eight are kept)."""
    known = [*(_checksums(folder) or []), digest][-8:]
    staged = folder / f".{CHECKSUMS}.part"
    try:
        with opener(staged, "wb") as file:
            file.write(json.dumps(known, indent=1).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, folder / CHECKSUMS)
    finally:
        staged.unlink(missing_ok=True)


def _checksums(folder: Path) -> list[str] | None:
    """The list, or None if there is none that can be read."""
    try:
        known = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError):
        return None
    return [str(digest) for digest in known] if isinstance(known, list) else None


def _flush_folder(folder: Path) -> None:
    """Bring the names to the disk as well, where the system can do so."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if it can."""
    known = _checksums(path.parent)
    if known is not None:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() not in known:
            return f"its SHA-256 is not in {CHECKSUMS}: it is damaged or was not written by this run"
        return None
    try:  # of an older version, or the list is lost
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many types for damaged files
        return f"it cannot be read: {type(error).__name__}"
    return None


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint of a run.

    Args:
        folder: of the run's checkpoints.

    Returns:
        The file, or None if the run has none; and what was found to be wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, but none is good.
    """
    complaints: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if path.is_file():
            wrong = problem(path)
            if wrong is None:
                return path, complaints
            complaints.append(f"checkpoint {path} is not used: {wrong}")
    if complaints:
        raise CheckpointError("; ".join(complaints) + "; no good checkpoint is left. To begin anew, give --fresh")
    return None, complaints


def set_aside(path: Path) -> Path | None:
    """Give a file or folder, if it exists, a name that is out of the way, and return that name."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    path.rename(target)
    return target


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's plug for :func:`write_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """See :func:`write_checkpoint`."""
        write_checkpoint(checkpoint, Path(path))


class Checkpoints(Checkpoint):
    """Keeps ``checkpoints/last.ckpt`` and the one before it below the trainer's root folder; training resumes from there by itself.

    A checkpoint that cannot be written (a full disk) is reported and tried again at the next optimiser step of its turn; only at the end of
    training it is an error.

    Args:
        every_n_train_steps: optimiser steps from one checkpoint to the next; one is also written at the end.

    Raises:
        ValueError: ``every_n_train_steps`` is not positive.
    """

    def __init__(self, every_n_train_steps: int = 1000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps = {every_n_train_steps}; at least 1 is needed")
        self.every_n_train_steps = every_n_train_steps
        self._handled_step, self._saved_step, self._waits_for_validation = 0, -1, False
        self._positions: list[dict[str, int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write checkpoints safely."""
        if stage == "fit":
            trainer.strategy.checkpoint_io = VerifiedCheckpointIO()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember where in the data to go on."""
        self._positions = (
            checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader", [])
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go to that place, and note that the present step has its checkpoint already.

        Lightning would do the former by itself if the loader had not been made before the checkpoint is read, which is the case whenever
        the optimiser asks for the number of steps.
        """
        self._handled_step = trainer.global_step
        if self._positions and isinstance(trainer.train_dataloader, ResumableLoader):
            trainer.train_dataloader.load_state_dict(self._positions[0])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Save when due, and before training stops in the middle of an epoch, which Lightning would then take for a whole one.

        Where a validation follows, after it, or else it would be left out on resuming.
        """
        step = trainer.global_step
        if step == self._handled_step:  # gradients are being accumulated
            return
        self._handled_step = step
        if step % self.every_n_train_steps == 0 or step == trainer.max_steps or trainer.should_stop:
            loop = trainer.fit_loop
            self._waits_for_validation = bool(
                loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            )
            if not self._waits_for_validation:
                self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what had to wait."""
        if self._waits_for_validation and not trainer.sanity_checking:
            self._waits_for_validation = False
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the very last state as well."""
        if self._saved_step != trainer.global_step:
            error = self._save(trainer)
            if error is not None:
                raise error

    def _save(self, trainer: L.Trainer) -> OSError | None:
        file = self.folder(trainer) / LAST
        try:
            trainer.save_checkpoint(file, weights_only=False)
        except OSError as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait
            rank_zero_warn(
                f"checkpoint of step {trainer.global_step} was not written ({error}); the one before it is kept "
                f"and training goes on"
            )
            return error
        self._saved_step = trainer.global_step
        return None

    @staticmethod
    def folder(trainer: L.Trainer) -> Path:
        """The folder of the checkpoints."""
        return Path(trainer.default_root_dir) / "checkpoints"


def resume_from(trainer: L.Trainer, configuration: dict[str, Any], *, fresh: bool) -> Path | None:
    """The checkpoint that training goes on from, said aloud, or None for a new run.

    Args:
        trainer: whose root folder is searched.
        configuration: what a resumed run must share with the one before it, flat and of plain values.
        fresh: begin anew; checkpoints that exist are set aside.

    Raises:
        CheckpointError: no checkpoint is good, or the configuration has changed.
    """
    folder = Checkpoints.folder(trainer)
    if fresh:
        if trainer.is_global_zero and (moved := set_aside(folder)) is not None:
            rank_zero_info(f"begins anew; the checkpoints of the run before it are now in {moved}")
        return None
    path, complaints = find_checkpoint(folder)
    for complaint in complaints:
        rank_zero_info(complaint)
    if path is None:
        return None
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    before = json.loads(checkpoint.get("configuration", "null"))
    if before is not None:
        now = json.loads(json.dumps(configuration))
        changed = [
            f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise CheckpointError(
                f"{path} was written with another configuration ({'; '.join(changed)}). Give --fresh to begin anew (the old "
                f"checkpoints are set aside), --ckpt_path={path} to go on from it all the same, or another --trainer.default_root_dir"
            )
    if complaints and trainer.is_global_zero:
        set_aside(folder / LAST)  # or it would displace the good one at the next save
    rank_zero_info(f"resumes from {path}, step {checkpoint['global_step']}")
    return path
