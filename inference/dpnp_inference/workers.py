"""Chains of one measurement shared out over processes of this machine, with the draws that one process would make.

Each worker reads the same command line, samples its own batches of chains, and keeps its state in a folder of its own. One that dies is
started again from there, and the others go on meanwhile. Workers end when their parent does, however that ends.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from dpnp_inference.checkpoint import Checkpoints, FolderLock, RunError
from dpnp_inference.gibbs import OnSweep, SamplingError, Sweep
from dpnp_inference.proximal import ProximalInfo
from dpnp_inference.runs import Run, Task, batches_of, make_run
from dpnp_inference.streaming import DrawStore

log = logging.getLogger(__name__)

RESTARTS = 3  # of one worker, without an iteration in between
PATIENCE = 60.0  # seconds that a worker waits for one before it to end
NAME = "worker_{}"


@dataclass(frozen=True)
class Share:
    """What a worker is told, beside the command line.

    Attributes:
        folder: for the states of all workers.
        number: of the worker, from 0.
        chains: first and last + 1 of its chains.
        batch_size: of the run.
        threads: that it may compute with.
        every: seconds from one state to the next.
    """

    folder: str
    number: int
    chains: tuple[int, int]
    batch_size: int
    threads: int
    every: float


def shared_out(chains: int, batch_size: int, processes: int) -> list[range]:
    """Chains of each process: neighbouring batches, as evenly as they go; of fewer processes if there are fewer batches."""
    batches = batches_of(range(chains), batch_size)
    number = min(processes, len(batches))
    edges = [len(batches) * i // number for i in range(number + 1)]
    return [range(batches[a].start, batches[b - 1].stop) for a, b in itertools.pairwise(edges)]


def sample_in_processes(
    task: Task, arguments: Sequence[str], folder: Path, *, processes: int, every: float, on_sweep: OnSweep | None = None
) -> Run:
    """Do a task of independent chains in several processes.

    Args:
        task: what is to be drawn.
        arguments: command line of ``dpnp-reconstruct`` that says the same.
        folder: for states; those of an interrupted run of as many processes are gone on with.
        processes: how many.
        every: seconds from one state to the next.
        on_sweep: called after each iteration of any of them.

    Returns:
        The run, done.

    Raises:
        RunError: the folder holds the state of another run.
        SamplingError: a worker's sampling has broken down.
        RuntimeError: a worker has died too often, or met another error.
    """
    parts = shared_out(len(task.chains), task.batch_size, processes)
    log.info("%d processes, chains %s", len(parts), ", ".join(f"{part.start}-{part.stop - 1}" for part in parts))
    saved = [_checkpoints(task, part, folder, i, every) for i, part in enumerate(parts)]
    for checkpoints in saved:
        checkpoints.load()  # of another run, it is refused before any process starts
    threads = max(1, torch.get_num_threads() // len(parts))
    shares = [
        Share(str(folder), i, (part.start, part.stop), task.batch_size, threads, every) for i, part in enumerate(parts)
    ]
    Supervisor(shares, arguments, on_sweep).run()
    run, batches = make_run(task), []
    for part, checkpoints in zip(parts, saved, strict=True):
        state = checkpoints.load()
        if state is None:
            raise RuntimeError(f"the worker of chains {part.start}-{part.stop - 1} has left no state in {folder}")
        store = _store(task, part)
        store.load_state_dict(state["store"])
        task.store.take(store.samples, store.statistics, part, task.draws)
        batches += state["run"]["batches"]
        run.seconds = max(run.seconds, state["seconds"])
    run.load_state_dict({"batches": batches})
    return run


def _store(task: Task, part: range) -> DrawStore:
    whole = task.store
    shape, dtype = task.sampler.image_shape, task.sampler.dtype
    return DrawStore(whole.keep, shape, chains=part, draws=task.draws, dtype=dtype, of=len(task.chains))


def _checkpoints(task: Task, part: range, folder: Path, number: int, every: float) -> Checkpoints:
    about = {**task.sampler.settings(task), "chains": [part.start, part.stop]}
    return Checkpoints(folder / NAME.format(number), about, every=every)


class Supervisor:
    """Starts workers, listens to them, and starts those again that die.

    Args:
        shares: what each is to do.
        arguments: command line of the run.
        on_sweep: called after each iteration of any of them.
    """

    def __init__(self, shares: list[Share], arguments: Sequence[str], on_sweep: OnSweep | None) -> None:
        self.shares, self.arguments, self.on_sweep = shares, arguments, on_sweep
        self.heard: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.restarts = dict.fromkeys(range(len(shares)), 0)

    def run(self) -> None:
        """Until all are done.

        Raises:
            SamplingError, RuntimeError: as above; the others are ended.
        """
        try:
            for i in range(len(self.shares)):
                self._start(i)
            while self.processes:
                i, message = self.heard.get()
                if message is None:
                    self._ended(i)
                elif "error" in message:
                    kind = SamplingError if message["kind"] == SamplingError.__name__ else RuntimeError
                    raise kind(f"process {i}: {message['error']}")
                else:
                    self.restarts[i] = 0
                    if self.on_sweep is not None:
                        self.on_sweep(_sweep(message))
        finally:
            for process in self.processes.values():
                process.terminate()
            for process in self.processes.values():
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()

    def _start(self, i: int) -> None:
        told = json.dumps({**vars(self.shares[i]), "arguments": list(self.arguments)})
        command = [sys.executable, "-m", "dpnp_inference.workers", told]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes[i] = process
        assert process.stdout is not None
        threading.Thread(target=self._listen, args=(i, process.stdout), daemon=True).start()

    def _listen(self, i: int, stream: IO[bytes]) -> None:
        with stream:
            for line in stream:
                if line.startswith(b"{") and line.endswith(b"}\n"):  # else it is cut off, or not the worker's own
                    self.heard.put((i, json.loads(line)))
        self.heard.put((i, None))

    def _ended(self, i: int) -> None:
        process = self.processes.pop(i)
        assert process.stdin is not None
        process.stdin.close()
        status = process.wait()
        if status == 0:
            return
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        self.restarts[i] += 1
        if self.restarts[i] > RESTARTS:
            raise RuntimeError(
                f"process {i} {how}, {self.restarts[i]} times without an iteration in between; its state is kept, to go on with"
            )
        log.warning("process %d %s; it is started again from its last state", i, how)
        self._start(i)


def _sweep(message: dict[str, Any]) -> Sweep:
    figures = {name: torch.tensor([message[name]]) for name in ("acceptance", "residual") if message[name] is not None}
    return Sweep(
        range(*message["chains"]),
        message["iteration"],
        message["iterations"],
        message["eta"],
        message["network_calls"],
        ProximalInfo(0, **figures),
    )


def tell(sweep: Sweep) -> None:
    """One iteration of a worker, for its parent."""
    info = sweep.info
    message = {
        "chains": [sweep.chains.start, sweep.chains.stop],
        "iteration": sweep.iteration,
        "iterations": sweep.iterations,
        "eta": sweep.eta,
        "network_calls": sweep.network_calls,
        "acceptance": None if info.acceptance is None else float(info.acceptance.mean()),
        "residual": None if info.residual is None else float(info.residual.max()),
    }
    print(json.dumps(message), flush=True)


def work(whole: Task, share: Share) -> None:
    """Sample a worker's share of the chains, and leave the final state for the parent.

    Args:
        whole: the task of all processes.
        share: which chains are this one's.
    """
    torch.set_num_threads(share.threads)
    part = range(*share.chains)
    task = replace(whole, chains=part, store=_store(whole, part), on_sweep=tell)
    checkpoints = _checkpoints(whole, part, Path(share.folder), share.number, share.every)
    with FolderLock(checkpoints.folder, patience=PATIENCE):
        whole.sampler.advance(task, checkpoints)


def main() -> None:
    """Run a worker, with what it is told as the only argument."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    told = json.loads(sys.argv[1])
    arguments: list[str] = told.pop("arguments")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from dpnp_inference.cli import RECONSTRUCT, read_options
    from dpnp_inference.commands.reconstruct import Reconstruction, prepare

    try:
        options, _ = read_options(RECONSTRUCT, arguments[arguments[:1] == [RECONSTRUCT] :])
        assert isinstance(options, Reconstruction)
        share = Share(**told)
        options.device, options.batch_size = _device(options.device, share.number), share.batch_size
        work(prepare(options).task(options), share)
    except (RunError, SamplingError, ImportError, ValueError, TypeError, OSError, RuntimeError) as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), flush=True)
        sys.exit(1)


def _device(name: str, number: int) -> str:
    """A worker's own one of several alike."""
    several = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return f"cuda:{number % torch.cuda.device_count()}" if several else name


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # the pipe is closed when the parent is gone
    os._exit(3)


if __name__ == "__main__":
    main()
