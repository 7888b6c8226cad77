"""Claims on items, as files: whoever makes the file first has the item, on any file system that the workers share.

The n-th claim on an item is the file ``NAME.n``, made by exclusive creation, which one process alone can win. A claim is never taken away
from anybody: whoever finds that its owner is gone makes ``NAME.(n+1)``, and the highest number owns the item. An owner that was only
slow sees so before it writes, and leaves the item to the other.

An owner is gone if its process has ended, which is known at once on the same host; elsewhere, if it has not touched its claim for a
stated time. That time is measured by the observer's own clock, from when it first saw the claim as it is, so that clocks of hosts and
file servers need not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

BEATS = 8  # touches of a claim in the time after which it would be stale


@dataclass(frozen=True)
class Claim:
    """An item that is one's own.

    Attributes:
        file: the claim.
        name: of the item.
        number: how many have had the item, this one included, since it was last given up; all before died or seemed to.
    """

    file: Path
    name: str
    number: int


class Claims:
    """The claims of one process; a context manager that keeps them fresh.

    Args:
        folder: where all workers' claims are; made if it does not exist.
        stale: seconds without a sign of life after which a claim of another host is nobody's.
    """

    def __init__(self, folder: Path, *, stale: float) -> None:
        self.folder, self.stale = folder, stale
        self.owner = {"host": socket.gethostname(), "place": place(), "pid": os.getpid(), "born": birth(os.getpid())}
        self._held: set[Path] = set()
        self._seen: dict[Path, tuple[int, float]] = {}  # when a claim was last touched, and since when this is known
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="claims")

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()

    def take(self, name: str) -> Claim | None:
        """The item's claim if nobody has the item, None if somebody has.

        Whether the item is still to be done must be asked after it: its last owner may just have finished it.
        """
        number = 1
        while (file := self.folder / f"{name}.{number}").exists():
            number += 1
        if number > 1 and not self._is_abandoned(self.folder / f"{name}.{number - 1}"):
            return None
        try:
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump({**self.owner, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, stream)
        self._held.add(file)
        return Claim(file, name, number)

    def holds(self, claim: Claim) -> bool:
        """Whether the item still is the claim's: nobody has taken its owner for gone meanwhile."""
        return claim.file.exists() and not claim.file.with_name(f"{claim.name}.{claim.number + 1}").exists()

    def release(self, claim: Claim) -> None:
        """Give the item up, finished or not; one that another has taken over is left to it."""
        self._held.discard(claim.file)
        if self.holds(claim):
            for number in range(1, claim.number + 1):  # the highest goes last: until then the item is taken
                claim.file.with_name(f"{claim.name}.{number}").unlink(missing_ok=True)

    def _is_abandoned(self, file: Path) -> bool:
        """Whether the owner of a claim is gone."""
        try:
            touched = file.stat().st_mtime_ns
        except FileNotFoundError:  # released this moment
            return False
        if has_ended(read_owner(file)):
            return True
        known, since = self._seen.get(file, (None, 0.0))
        if known != touched:
            self._seen[file] = (touched, time.monotonic())
            return False
        return time.monotonic() - since > self.stale

    def _beat(self) -> None:
        while not self._stop.wait(self.stale / BEATS):
            for file in tuple(self._held):
                with contextlib.suppress(
                    OSError
                ):  # a claim that is gone, or a file server: the owner asks before it writes
                    os.utime(file)


def read_owner(file: Path) -> dict[str, Any]:
    """Whose a claim is: ``host``, ``place``, ``pid``, ``born``, ``started``; empty while it is being written or if it is gone."""
    try:
        owner: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner


def has_ended(owner: dict[str, Any]) -> bool:
    """Whether an owner's process is known to have ended, which can be known of this host only."""
    return bool(owner.get("place") == place() and birth(owner["pid"]) != owner["born"])


def place() -> str:
    """Where process numbers mean the same: the host and, on Linux, its boot and the container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return " ".join(parts)


def birth(pid: int) -> str | None:
    """When a process began, in units of its own; None if there is none of that number, or only its remains."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
