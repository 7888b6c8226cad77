"""The two latest states of a run, in a folder that one process at a time may use."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from dpnp_inference.fingerprint import differences
from dpnp_inference.state import State, StateError, read_state, write_state

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

log = logging.getLogger(__name__)

LATEST, PREVIOUS = "latest.safetensors", "previous.safetensors"
STAGED = f"new_{LATEST}"  # and what it is written through
LOCK, OWNER = "lock", "owner.json"
SHARE = 20  # writing takes no more than one part in so many of the time


class RunError(ValueError):
    """A run cannot be gone on with: its state is of something else, or another process is at it."""


class FolderLock:
    """A folder that belongs to one process; the system gives it back when that process ends, however it ends.

    Args:
        folder: made if need be, and removed again, with what was made above it, if nothing else is in it.
        patience: seconds to wait for another process.

    Raises:
        RunError: another process has it; says which.
    """

    def __init__(self, folder: Path, *, patience: float = 0.0) -> None:
        self.folder, self.patience = folder, patience
        self._lock = FileLock(folder / LOCK)
        self._made: list[Path] = []

    def __enter__(self) -> Self:
        self._made = [above for above in self.folder.absolute().parents if not above.exists()]
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=self.patience)
                (self.folder / OWNER).write_text(json.dumps(owner) + "\n", encoding="utf-8")
            except Timeout as error:
                raise RunError(
                    f"{self.folder} is in use by {self._owner()}; wait for it, or choose another output"
                ) from error
            except (FileNotFoundError, FileExistsError):  # whoever had the folder has just removed it
                self._lock.release()
                if self.folder.exists() and not self.folder.is_dir():
                    raise
            else:
                return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder.is_dir() and {file.name for file in self.folder.iterdir()} <= {LOCK, OWNER}:
            for name in (OWNER, LOCK):
                (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: another process has begun there
                for folder in (self.folder, *self._made):
                    folder.rmdir()
        self._lock.release()

    def _owner(self) -> str:
        try:
            owner = json.loads((self.folder / OWNER).read_text(encoding="utf-8"))
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"


def remove_half_written(folder: Path) -> None:
    """Remove what a process that was killed has left of a state that it was writing.

    Args:
        folder: of states, which no other process writes to.
    """
    for file in folder.glob(f"{STAGED}*"):
        file.unlink(missing_ok=True)


class Checkpoints:
    """Writes a run's state now and then, and finds the latest that is whole.

    Args:
        folder: where.
        about: all that the draws depend on; see :func:`~dpnp_inference.fingerprint.describe`.
        every: seconds from one state to the next; 0 for one after each iteration. It is made longer where writing would take more than
            a twentieth of the time.

    Raises:
        ValueError: ``every`` is negative.
    """

    def __init__(self, folder: Path, about: State, *, every: float) -> None:
        if not every >= 0:
            raise ValueError(f"checkpoint_every = {every}; it must be at least 0 seconds")
        self.folder, self.about, self.every = folder, json.loads(json.dumps(about)), every
        self._next = time.monotonic() + every

    @property
    def due(self) -> bool:
        """Whether it is time for a state."""
        return time.monotonic() >= self._next

    def save(self, state: State) -> bool:
        """Write a state, and keep the one before; a folder that cannot be written to is a warning, and the run goes on.

        Returns:
            Whether it was written.
        """
        start = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            latest, staged = self.folder / LATEST, self.folder / STAGED
            remove_half_written(self.folder)
            write_state(staged, state, self.about)
            if latest.exists():
                os.replace(latest, self.folder / PREVIOUS)
            os.replace(staged, latest)
        except OSError as error:
            log.warning("the state of the run could not be written to %s: %s; the run goes on", self.folder, error)
            return False
        finally:
            end = time.monotonic()
            self._next = end + (max(self.every, SHARE * (end - start)) if self.every else 0.0)
        return True

    def load(self) -> State | None:
        """The latest state that is whole; None if there is none.

        Raises:
            RunError: it is of a run of other settings; says which.
        """
        for name in (LATEST, PREVIOUS):
            file = self.folder / name
            if not file.exists():
                continue
            try:
                state, about = read_state(file)
            except StateError as error:
                log.warning("%s; trying the state before", error)
                continue
            if found := differences(about, self.about):
                raise RunError(
                    f"{self.folder} holds the state of an interrupted run of other settings ({'; '.join(found)}); give the settings of "
                    "that run to go on with it, choose another output, or throw its state away by --fresh true"
                )
            return state
        return None
