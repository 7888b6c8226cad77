"""``dpnp-reconstruct batch``: many measurements, on as many processes, devices and hosts as there are.

Nothing is agreed on between the processes but files: an item is claimed (:mod:`dpnp_inference.batch.claims`), reconstructed, and its
folder put in place as a whole. So a process that dies stops nobody, and the same command goes on where all of them died.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError
from torch import Tensor

from dpnp_inference.baselines.common import Baseline
from dpnp_inference.batch.claims import Claim, Claims
from dpnp_inference.batch.folder import RECORD, BatchFolder, Record, count_states, hash_of, now, worker_name
from dpnp_inference.batch.items import Items, open_items
from dpnp_inference.batch.overview import Overview, describe, status_table
from dpnp_inference.batch.workers import Team, Worker, count_processes, device_of, ends_by_signal, find_worker
from dpnp_inference.checkpoint import Checkpoints, RunError
from dpnp_inference.commands.reconstruct import Reconstruction, check_stateless, judge, score, write_run
from dpnp_inference.configuration import Configuration, bundled_images, identity, provenance
from dpnp_inference.dpnp import CHECKPOINT_EVERY, DPnP
from dpnp_inference.files import as_image, as_measurement
from dpnp_inference.fit import Fit
from dpnp_inference.gibbs import OnSweep
from dpnp_inference.posterior import Posterior
from dpnp_inference.runs import Run
from dpnp_shared.folders import staged_folder
from dpnp_shared.prior import PriorCard
from dpnp_shared.randomness import derive_seed

log = logging.getLogger(__name__)

SOME_FAILED = 3  # exit status
MOST_DEATHS = 2  # of processes at one item in a row, after which the item has failed
POLL = 0.5  # seconds between two looks at items that others have
FINISH = ".finish"  # claimed by the process that makes the tables
LEAST_INTERVAL, SHARE = 10.0, 50  # the manifest is made every 10 s, or so seldom that it takes 1/50 of the time
# what the results do not depend on
SAME_RESULTS = (
    "measurements", "images", "pattern", "recursive", "split", "column", "name_column", "batch_size", "compile", "channels_last", "device",
    "output", "overwrite", "trusted_modules", "processes", "retries", "stale", "picture", "report", "merge", "fresh", "status", "json",
    "checkpoint_every",
)  # fmt: skip


class OutputError(RuntimeError):
    """The folder of a batch cannot be written to, which concerns all its items."""


@dataclass
class Batch(Configuration):
    """Reconstruct many measurements, each as a single reconstruction would be, and keep account of them.

    Args:
        measurements: a folder of measurements (.npy, .npz, .pt or image files); one array file whose first dimension counts them; or a
            table: a .parquet, .arrow, .csv or .json file, a folder written by save_to_disk, or a Hub id. Give this or ``images``.
        images: the same of clean images, from which measurements are simulated; their reconstructions are scored.
        pattern: names of the files that count, as *.npy; by default all that can be read.
        recursive: look into folders as well.
        key: name of the array in a file that holds several.
        split: of a table.
        column: of a table, that holds the measurements or images; needed where it has several.
        name_column: of a table, that holds the items' names; by default they are numbered.
        chains: independent chains of each item.
        draws: draws of each chain.
        thin: iterations between two draws of a chain.
        level: of the intervals whose coverage is reported.
        picture: draw a picture of each item.
        report: diagnose each item, and write report.html into its folder.
        keep: of each item all draws; statistics of all of them and each chain's last one; or statistics and so many draws of each chain.
        checkpoint_every: seconds from one state of an item to the next, from which it goes on if it was interrupted; 0 for one after each
            iteration.
        processes: started on this host, each with a device of its own or its share of the cores; auto starts one for each accelerator.
        retries: how often an item that has failed is tried again in this run; in the next run of the same command it is in any case.
        stale: seconds without a sign of life after which a process of another host counts as dead; of this host that is known at once.
        merge: put means and standard deviations of all items into one file, merged.npz.
        fresh: where output holds results of another configuration, do them again.
        status: print the state of the batch in this folder, and do nothing.
        json: print the state as JSON.
        output: folder to write; by default outputs/batch_ and a number that is the same for the same configuration and source.
        overwrite: is for a single reconstruction; see fresh.
    """

    measurements: str | None = None
    images: str | None = None
    pattern: str | None = None
    recursive: bool = False
    key: str | None = None
    split: str = "train"
    column: str | None = None
    name_column: str | None = None
    chains: int = 39
    draws: int = 1
    thin: int = 1
    level: float = 0.9
    picture: bool = True
    report: bool = False
    keep: Literal["all", "statistics"] | int = "all"
    checkpoint_every: float = CHECKPOINT_EVERY
    processes: int | Literal["auto"] = 1
    retries: int = 0
    stale: float = 120.0
    merge: bool = False
    fresh: bool = False
    status: str | None = None
    json: bool = False


def batch(settings: Batch, config: dict[str, Any], arguments: list[str]) -> None:
    """Do all items of a batch, or those that other processes leave.

    Raises:
        SystemExit: with status 3 if items have failed.
        RuntimeError: the processes that were started have ended before all items were done or had failed.
    """
    if settings.status is not None:
        print_status(Path(settings.status), as_json=settings.json)
        return
    _check_options(settings)
    worker = find_worker()
    processes = 1 if worker.parent else count_processes(settings.processes)
    if worker.parent:
        logging.getLogger().setLevel(logging.WARNING)  # that process has said the rest
    settings = dataclasses.replace(settings, device="cpu" if processes > 1 else device_of(worker, settings.device))
    demo = settings.measurements is None and settings.images is None
    if demo:
        settings = dataclasses.replace(settings, images=str(bundled_images(settings.prior)))
    argument = "images" if settings.measurements is None else "measurements"
    source = str(getattr(settings, argument))
    items = open_items(
        source,
        argument=argument,
        pattern=settings.pattern,
        recursive=settings.recursive,
        key=settings.key,
        split=settings.split,
        column=settings.column,
        name_column=settings.name_column,
    )
    dpnp, card = settings.sampler(demo=demo)
    if isinstance(dpnp, Baseline):
        check_stateless(dpnp, keep=settings.keep)
    same = identity(settings, card, config, unlike=SAME_RESULTS) | {"items are": argument}
    if settings.output is None:
        settings.output = f"outputs/batch_{hash_of([same, source])[:8]}"
    folder = BatchFolder.open(Path(settings.output), same, fresh=settings.fresh)
    before = count_states(folder.states(items.names))["done"]
    log.info(
        "%d items, %d of them done before; %d chains each; %s", len(items.names), before, settings.chains, dpnp.plan
    )
    about = {"run": worker.run, "source": source, "finished": False}
    job = Job(settings, config, arguments, items, folder, worker, about, dpnp, card)
    with ends_by_signal():
        if processes == 1:
            job.work()
        else:
            del dpnp
            job.dpnp = None
            job.supervise(processes)
    states = folder.states(items.names)
    if not worker.parent:
        _print_summary(states, folder)
    if count_states(states)["failed"]:
        sys.exit(SOME_FAILED)


def print_status(path: Path, *, as_json: bool) -> None:
    """Print the state of a batch, as it is now.

    Raises:
        FileNotFoundError: ``path`` is not the folder of a batch.
    """
    folder = BatchFolder.existing(path)
    last = folder.read_manifest() or {"items": {}}
    about = {key: value for key, value in last.items() if key in ("run", "source", "finished")}
    manifest = folder.manifest(list(last["items"]), about)
    if as_json:
        print(json.dumps(manifest, indent=1))
    else:
        print(", ".join(f"{count} {state}" for state, count in manifest["counts"].items()))
        table = status_table(manifest["items"])
        if table.rows:
            Console().print(table)


@dataclass
class Job:
    """One process' part in a batch.

    Attributes:
        settings: the options, the device being this process'.
        config: the options as JSON.
        arguments: the command line.
        items: all of the batch.
        folder: of the batch.
        worker: this process.
        about: what the manifest says of the run.
        dpnp: the sampler; None in a process that only starts others.
        card: of its prior.
    """

    settings: Batch
    config: dict[str, Any]
    arguments: list[str]
    items: Items
    folder: BatchFolder
    worker: Worker
    about: Record
    dpnp: DPnP | Baseline | None
    card: PriorCard

    def work(self) -> None:
        """Do items until none is left, and wait for those that others are at: they may die."""
        names = self.items.names
        first = self.worker.rank * len(names) // self.worker.size  # so that processes seldom want the same item
        left = dict.fromkeys(names[first:] + names[:first])
        settled: Counter[str] = Counter()
        due = time.monotonic()
        claims = Claims(self.folder.claims, stale=self.settings.stale)
        with Overview(len(names)) as overview, claims, quiet():
            while left:
                idle = True
                for name in tuple(left):
                    if self.worker.parent and os.getppid() != self.worker.parent:
                        raise RuntimeError("the process that started this one has ended")
                    state = self.settled(name)
                    if state is not None:
                        del left[name]
                        settled[state] += 1
                        overview.counts(settled.total(), f"{settled['failed']} failed")
                        continue
                    claim = claims.take(name)
                    if claim is None:
                        continue
                    try:
                        if self.settled(name) is None:  # by the one who had it until now
                            self.attempt(claim, claims, overview)
                            idle = False
                    finally:
                        claims.release(claim)
                    if time.monotonic() > due:
                        begun = time.monotonic()
                        self.folder.write_manifest(names, self.about)
                        due = time.monotonic() + max(LEAST_INTERVAL, SHARE * (time.monotonic() - begun))
                if left and idle:
                    time.sleep(POLL)
            self.finish(claims)

    def settled(self, name: str) -> str | None:
        """Whether an item is ``done``, or has ``failed`` for this run; None if there is something to do."""
        done = self.folder.done(name)
        if done is not None and done["configuration"] == self.folder.configuration:
            return None if self.has_changed(name, done) else "done"
        failure = self.folder.failure(name)
        if failure is None or failure["run"] != self.worker.run or failure["tries"] <= self.settings.retries:
            return None
        return "failed"

    def has_changed(self, name: str, done: Record) -> bool:
        """Whether an item is another than the one that was done."""
        try:
            return self.items.stamp(name) != done["stamp"] and self.items.digest(name) != str(done["sha256"])
        except OSError as error:  # it was there when the batch began; its result is kept
            log.warning("%s cannot be compared with what was done: %s", name, error)
            return False

    def attempt(self, claim: Claim, claims: Claims, overview: Overview) -> None:
        """Reconstruct one item, and record what became of it.

        Raises:
            OutputError: the result cannot be written, which is not the item's fault.
        """
        name, folder = claim.name, self.folder
        done, failure = folder.done(name), folder.failure(name)
        if done is not None:
            if done["configuration"] == folder.configuration:
                overview.line(
                    f"changed {name}: it is not what was done at {done['finished']}; it is done again", always=True
                )
            shutil.rmtree(folder.items / name)
        in_this_run = failure is not None and failure["run"] == self.worker.run
        record = {
            "item": name,
            "configuration": folder.configuration,
            "run": self.worker.run,
            "attempts": 1 if failure is None else failure["attempts"] + 1,
            "tries": failure["tries"] + 1 if failure is not None and in_this_run else 1,
            "worker": worker_name({"pid": os.getpid()}),
            "rank": self.worker.rank,
            "processes": self.worker.size,
            "device": self.settings.device,
        }
        overview.begin(name)
        started = time.perf_counter()
        try:
            if claim.number > MOST_DEATHS:
                raise RuntimeError(f"processes died at it {claim.number - 1} times in a row (killed, or out of memory)")
            result = self.reconstruct(name, overview)
            record |= result.figures | {"seconds": time.perf_counter() - started, "finished": now()}
            if not claims.holds(claim):
                overview.line(f"lost {name}: this process was taken for dead, and another has the item", always=True)
                return
            self.keep(result, record)
            folder.forget(name)
        except OutputError:
            raise
        except Exception as error:  # whatever is wrong with an item is recorded, and the others go on
            record |= {"seconds": time.perf_counter() - started, "finished": now(), "error": _one_line(error)}
            if claims.holds(claim):
                folder.fail(name, record, traceback.format_exc())
                folder.forget(name)
                overview.line(describe(name, {"state": "failed", **record}), always=True)
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) and torch.cuda.is_available():
                torch.cuda.empty_cache()
            return
        overview.line(describe(name, {"state": "done", **record}), always=False)

    def keep(self, result: Result, record: Record) -> None:
        """Put the folder of an item in its place.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            with staged_folder(self.folder.items / result.name) as staging:
                result.write(staging)
                if self.settings.report:
                    diagnosis = judge(result.posterior, staging, report=True)
                    record["verdict"] = None if diagnosis is None else diagnosis.verdict
                (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            self.folder.forgive(result.name)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"output = {str(self.folder.path)!r} cannot be written to: {error}") from error

    def reconstruct(self, name: str, overview: Overview) -> Result:
        """What a single reconstruction gives with the seed of this item.

        Raises:
            Exception: whatever can be wrong with an item.
        """
        assert self.dpnp is not None
        dpnp, card, settings = self.dpnp, self.card, self.settings
        stamp, digest = self.items.stamp(name), self.items.digest(name)
        stored = self.items.read(name)
        source = str(self.items.where(name).get("file", name))
        if self.items.stamp(name) != stamp:
            raise ValueError("it changed while it was read")
        seed = item_seed(settings.seed, name)
        truth = None
        if settings.measurements is None:
            truth = as_image(stored, 0, dpnp.image_shape, card, source).to(device=dpnp.device, dtype=dpnp.dtype)
            generator = torch.Generator().manual_seed(derive_seed(seed, 2**32))  # as for a single reconstruction
            y = dpnp.forward_model.simulate(truth[None], generator=generator)[0]
        else:
            y = as_measurement(stored, dpnp.forward_model, card, source)
        posterior = self.draw(name, y, seed, overview.sweep)
        scores = {}
        if truth is not None:
            scores = score(posterior, truth.cpu(), card.value_range, dpnp.forward_model.operator, settings.level)
        fit = Fit.of(posterior.diagnostics)
        misfit = [] if fit is None or fit.objection is None else [fit.objection]
        figures = {
            "sha256": digest,
            "stamp": stamp,
            "seed": seed,
            "scores": scores,
            "network_calls": posterior.diagnostics["network_calls"],
            "chi_square": None if fit is None else fit.chi_square,
            "warnings": posterior.diagnostics["warnings"] + misfit,
        }
        return Result(self, name, y, truth, posterior, figures)

    def draw(self, name: str, y: Tensor, seed: int, on_sweep: OnSweep) -> Posterior:
        """The draws of an item; DPnP's go on from the item's last state if it was interrupted.

        Raises:
            ValueError: the measurement or an option does not fit the sampler.
            SamplingError: sampling broke down.
        """
        dpnp, settings = self.dpnp, self.settings
        assert dpnp is not None
        sizes = {"chains": settings.chains, "seed": seed, "draws": settings.draws, "thin": settings.thin}
        if isinstance(dpnp, Baseline):
            return dpnp.sample(y, **sizes, batch_size=settings.batch_size, on_sweep=on_sweep)

        def advance() -> Run:
            task = dpnp.task(y, **sizes, batch_size=settings.batch_size, keep=settings.keep, on_sweep=on_sweep)
            states = Checkpoints(self.folder.states_of(name), dpnp.settings(task), every=settings.checkpoint_every)
            return dpnp.advance(task, states)

        try:
            run = advance()
        except RunError as error:  # of another device or batch size, or of what the item was before
            log.warning("%s begins anew: %s", name, error)
            self.folder.forget(name)
            run = advance()
        return dpnp.finish(run)

    def finish(self, claims: Claims) -> None:
        """Make the tables, or wait until another process of this run has."""
        while not self.is_finished():
            claim = claims.take(FINISH)
            if claim is None:
                time.sleep(POLL)
                continue
            try:
                if not self.is_finished():
                    self.tabulate()
            finally:
                claims.release(claim)

    def is_finished(self) -> bool:
        """Whether a process of this run has made the tables."""
        manifest = self.folder.read_manifest()
        return manifest is not None and manifest["run"] == self.worker.run and manifest["finished"] is True

    def tabulate(self) -> None:
        """Make everything that is made of the records; the manifest last."""
        self.folder.tidy()
        states = self.folder.states(self.items.names)
        self.folder.write_tables(states)
        if self.settings.merge:
            self.folder.merge(states)
        self.folder.write_manifest(self.items.names, {**self.about, "finished": True})

    def supervise(self, processes: int) -> None:
        """Start processes that do the items, and wait for them.

        Raises:
            RuntimeError: all of them have ended before the last item was done or had failed.
        """
        names, folder = self.items.names, self.folder
        folder.write_manifest(names, self.about)
        told: set[str] = set()
        due = time.monotonic()

        with Overview(len(names)) as overview:

            def look() -> None:
                nonlocal due
                if overview.is_live and time.monotonic() > due:
                    done = sum(1 for _ in folder.items.iterdir())
                    failed = [file.stem for file in folder.failures.glob("*.json")]
                    for name in {*failed} - told:
                        record = folder.failure(name)
                        if record is not None and record["run"] == self.worker.run:
                            overview.line(describe(name, {"state": "failed", **record}), always=True)
                            told.add(name)
                    overview.counts(done + len(told), f"{len(told)} failed")
                    due = time.monotonic() + 1

            on_line = (lambda text: overview.line(text, always=True)) if overview.is_live else None
            team = Team(processes, self.arguments, self.worker, folder, on_line)
            try:
                statuses = team.wait(look)
            finally:
                team.stop()
        if not self.is_finished():
            folder.write_manifest(names, self.about)
            raise RuntimeError(f"all processes ended early, with exit status {statuses}; the same command goes on")


@dataclass(frozen=True)
class Result:
    """An item that has been reconstructed.

    Attributes:
        job: that did it.
        name: of the item.
        y: the measurement.
        truth: ``(C, H, W)`` if it is known.
        posterior: the draws.
        figures: for its record.
    """

    job: Job
    name: str
    y: Tensor
    truth: Tensor | None
    posterior: Posterior
    figures: Record

    def write(self, staging: Path) -> None:
        """The files of a single reconstruction, with the configuration that would repeat it."""
        job, settings = self.job, self.job.settings
        assert job.dpnp is not None
        place, final = job.items.where(self.name), job.folder.items / self.name
        if self.truth is not None:
            single = {"image": place.get("file", str(final / "truth.npy")), "index": place.get("index", 0)}
        else:
            single = {"measurement": place["file"] if {*place} == {"file"} else str(final / "measurement.npy")}
        wanted = {field.name for field in dataclasses.fields(Reconstruction)} - {*SAME_RESULTS} | {
            "batch_size",
            "device",
        }
        config = {key: value for key, value in job.config.items() if key in wanted}
        config |= single | {"seed": self.figures["seed"]}
        record = provenance(settings, job.dpnp, job.card, config, job.arguments)
        record |= {"seed": self.figures["seed"], "item": place, "scores": self.figures["scores"]}
        write_run(
            staging,
            self.posterior,
            self.y,
            self.truth,
            dpnp=job.dpnp,
            card=job.card,
            record=record,
            picture=settings.picture,
        )


def item_seed(seed: int, name: str) -> int:
    """The seed of an item, which depends on the batch's seed and the item's name only.

    Args:
        seed: of the batch.
        name: of the item.
    """
    return derive_seed(seed, int(hash_of(name), 16))


@contextmanager
def quiet() -> Iterator[None]:
    """What single reconstructions log is in the items' records, not in the log of the batch."""
    loggers = [logging.getLogger(f"dpnp_inference.{name}") for name in ("dpnp", "commands.reconstruct")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_options(settings: Batch) -> None:
    if settings.measurements is not None and settings.images is not None:
        raise ValueError(
            "measurements and images were both given; give measurements, or clean images to simulate them from"
        )
    for name, least in (("chains", 1), ("draws", 1), ("thin", 1), ("seed", 0), ("retries", 0), ("checkpoint_every", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} = {getattr(settings, name)}; it must be at least {least}")
    if not settings.stale > 0:
        raise ValueError(f"stale = {settings.stale}; it must be positive")


def _one_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _print_summary(states: dict[str, Record], folder: BatchFolder) -> None:
    counts = count_states(states)
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    scores: dict[str, list[float]] = {}
    for state in states.values():
        for key, value in state.get("scores", {}).items():
            scores.setdefault(key, []).append(value)
    if "psnr" in scores:
        print(
            f"PSNR of the mean {sum(scores['psnr']) / len(scores['psnr']):.2f} dB on average of {len(scores['psnr'])} items"
        )
    warned = sum(bool(state.get("warnings")) for state in states.values())
    if warned:
        print(f"warnings about {warned} items; see results.csv")
    for name, state in states.items():
        if state["state"] == "failed":
            print(describe(name, state))
    print(f"manifest: {folder.path / 'manifest.json'}")
