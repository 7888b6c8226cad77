"""Who works at a batch: one process, several that it starts, or those of torchrun or SLURM."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Literal
from uuid import uuid4

import torch

from dpnp_inference.batch.claims import birth, place, read_owner
from dpnp_inference.batch.folder import BatchFolder

log = logging.getLogger(__name__)

VARIABLE = "DPNP_BATCH_WORKER"  # tells a process that another batch has started it
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LSB_JOBID")  # variables of torchrun, SLURM and LSF
MOST_STATUS = 3  # exit status of a process that has ended by itself
PATIENCE = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True)
class Worker:
    """One process of those that work at a batch.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local: its number among those of its host.
        run: name of what was started together, for which a failed item has failed.
        launcher: what started them.
        parent: process that it belongs to, without which it stops; 0 for none.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    run: str = ""
    launcher: str = "none"
    parent: int = 0


def find_worker() -> Worker:
    """This process' place among those that were started together, from the variables that their launcher has set.

    Raises:
        RuntimeError: the launcher has set only some of its variables; says which.
    """
    if VARIABLE in os.environ:
        return Worker(**json.loads(os.environ[VARIABLE]))
    if not any(variable in os.environ for variable in LAUNCHERS):
        return Worker(run=uuid4().hex)
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.lsf import LSFEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    kinds: tuple[type[ClusterEnvironment], ...] = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment)
    kind = next((kind for kind in kinds if kind.detect()), LightningEnvironment)
    found = kind()
    step = ("SLURM_ARRAY_JOB_ID",) if "SLURM_ARRAY_JOB_ID" in os.environ else ("SLURM_JOB_ID", "SLURM_STEP_ID")
    if kind is SLURMEnvironment and step[-1] in os.environ:  # a job is requeued under its own number
        run = " ".join(f"{name}={os.environ.get(name, '')}" for name in (*step, "SLURM_RESTART_COUNT"))
    elif (
        kind is TorchElasticEnvironment
    ):  # whose agent starts all of a host; its own run id may be that of the next run as well
        run = f"{place()} {os.getppid()} {birth(os.getppid())}"
    else:
        run = uuid4().hex
    launcher = kind.__name__.removesuffix("Environment")
    return Worker(found.global_rank(), found.world_size(), found.local_rank(), run, launcher)


def accelerators() -> list[torch.device]:
    """The accelerators of this host that this process may use, by Lightning Fabric; none on a machine without."""
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return []
    from lightning.fabric.accelerators.cuda import CUDAAccelerator
    from lightning.fabric.accelerators.mps import MPSAccelerator

    if CUDAAccelerator.is_available():
        return CUDAAccelerator.get_parallel_devices(list(range(CUDAAccelerator.auto_device_count())))
    return MPSAccelerator.get_parallel_devices(1) if MPSAccelerator.is_available() else []


def device_of(worker: Worker, name: str) -> str:
    """The device of a worker: of ``auto`` and ``cuda`` the one of its number on the host, else the one that is named."""
    found = accelerators() if name in ("auto", "cuda") else []
    if name == "cuda":
        found = [device for device in found if device.type == "cuda"]
    if found:
        return str(found[worker.local % len(found)])
    return "cpu" if name == "auto" else name


def count_processes(processes: int | Literal["auto"]) -> int:
    """How many processes to start: as many as asked for, or ``auto``: one for each accelerator.

    Raises:
        ValueError: fewer than one.
    """
    if processes == "auto":
        return max(1, len(accelerators()))
    if processes < 1:
        raise ValueError(f"processes = {processes}; it must be at least 1, or auto for one for each accelerator")
    return processes


class Team:
    """Processes that work at a batch beside each other, each with its share of the cores; none waits for another.

    Args:
        count: how many.
        arguments: command line of ``dpnp-reconstruct`` that each is given.
        worker: the process that starts them.
        folder: of the batch.
        on_line: is told what the processes write; by default they write where this one does.
    """

    def __init__(
        self,
        count: int,
        arguments: Sequence[str],
        worker: Worker,
        folder: BatchFolder,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.arguments, self.worker, self.folder, self.on_line = list(arguments), worker, folder, on_line
        self.count = count
        self.settled = [0] * count  # how many items were, when a process was started
        self.members = [self._start(i) for i in range(count)]

    def _start(self, i: int) -> subprocess.Popen[str]:
        self.settled[i] = self._count_settled()
        first = self.worker.rank * self.count
        member = Worker(first + i, self.worker.size * self.count, i, self.worker.run, "batch", os.getpid())
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // self.count)), **os.environ}
        environment[VARIABLE] = json.dumps(asdict(member))
        process = subprocess.Popen(
            [sys.executable, "-m", "dpnp_inference.cli", *self.arguments],
            env=environment,
            text=True,
            stdout=None if self.on_line is None else subprocess.DEVNULL,
            stderr=None if self.on_line is None else subprocess.PIPE,
        )
        if self.on_line is not None:
            threading.Thread(target=self._listen, args=(process,), daemon=True).start()
        return process

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        assert self.on_line is not None
        for line in process.stderr:
            self.on_line(line.rstrip("\n"))

    def wait(self, meanwhile: Callable[[], None]) -> list[int]:
        """Wait for all of them; one that dies is replaced if it had an item, or if items were finished since it was started.

        An item at which processes die is not tried for ever, and there are not more items than there are, so that this ends.

        Args:
            meanwhile: is called again and again.

        Returns:
            The exit status of each, negative for a signal.
        """
        waiting = set(range(self.count))
        while waiting:
            for i in tuple(waiting):
                status = self.members[i].poll()
                if status is None:
                    continue
                died = status < 0 or status > MOST_STATUS
                item = self._item_of(self.members[i].pid) if died else None
                if died and (item is not None or self._count_settled() > self.settled[i]):
                    where = "" if item is None else f" at {item}"
                    log.warning("process %d died%s (exit status %d); another takes its place", i, where, status)
                    self.members[i] = self._start(i)
                else:
                    waiting.discard(i)
            meanwhile()
            threading.Event().wait(PATIENCE)
        return [member.returncode for member in self.members]

    def stop(self) -> None:
        """End them all; each gives up its item."""
        for member in self.members:
            if member.poll() is None:
                member.terminate()
        for member in self.members:
            member.wait()

    def _count_settled(self) -> int:
        return sum(1 for inner in (self.folder.items, self.folder.failures) for _ in inner.iterdir())

    def _item_of(self, pid: int) -> str | None:
        """The item that a process had."""
        for file in self.folder.claims.iterdir():
            owner = read_owner(file)
            if owner.get("place") == place() and owner["pid"] == pid:
                return file.stem
        return None


@contextmanager
def ends_by_signal() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, and SIGINT end the block as an exception does: an item is given up, with no traceback."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
