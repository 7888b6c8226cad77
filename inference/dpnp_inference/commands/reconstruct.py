"""``dpnp-reconstruct``: one reconstruction, from its settings to the folder of the run."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline
from dpnp_inference.checkpoint import LATEST, PREVIOUS, Checkpoints, FolderLock, RunError, remove_half_written
from dpnp_inference.configuration import Configuration, bundled_images, provenance, title_of
from dpnp_inference.diagnostics import Diagnosis
from dpnp_inference.dpnp import CHECKPOINT_EVERY, DPnP, SamplingError
from dpnp_inference.files import MARKER, check_output, read_image, read_measurement, save_array
from dpnp_inference.fingerprint import differences
from dpnp_inference.finished_run import DISPLAY
from dpnp_inference.fit import Fit
from dpnp_inference.html_report import REPORT, write_report
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_inference.posterior import Posterior
from dpnp_inference.progress import ProgressBar
from dpnp_inference.report import draw_picture
from dpnp_inference.runs import Task
from dpnp_inference.state import StateError, read_state
from dpnp_inference.workers import NAME, sample_in_processes
from dpnp_shared.folders import staged_folder
from dpnp_shared.operators import Operator
from dpnp_shared.prior import PriorCard
from dpnp_shared.randomness import derive_seed

log = logging.getLogger(__name__)

ABOUT_THIS_CALL = ("json", "fresh", "extend")  # options that do not belong to a run
STATES = ".state"  # ends the name of the folder that a run's state is in


@dataclass
class Reconstruction(Configuration):
    """Draw from the posterior of an image and write the run's folder.

    Args:
        measurement: the measurement, a .npy, .npz, .pt, TIFF, DICOM, NIfTI or image file; or a list of files, one for each operator of a
            Stack. Give this or ``image``.
        image: a clean image (the same kinds of file) from which a measurement is simulated; its reconstruction is scored.
        chains: independent chains.
        draws: draws of each chain.
        thin: iterations between two draws of a chain.
        level: of the intervals whose coverage is reported.
        index: which image of an image file that holds several.
        key: name of the array in a file that holds several.
        report: write report.html into the folder, a page to look at.
        json: print one JSON object with record, scores, verdict and files, and nothing else.
        output: folder to write; by default outputs/demo for the demo (replaced each time), else outputs/ and the time.
        keep: all draws; statistics of all of them and each chain's last one; or statistics and so many draws of each chain.
        checkpoint_every: seconds from one state of the run to the next; the same command goes on from the last one if the run was
            interrupted. 0 for one after each iteration.
        fresh: throw away the state of an interrupted run, and begin anew.
        extend: add draws or chains to the run that output holds; draws and chains are those of both together.
        keep_state: keep what the run can be extended with.
        processes: of this machine that independent chains are shared out to; on CUDA each has a device of its own, as far as they go.
    """

    measurement: str | list[str] | None = None
    image: str | None = None
    chains: int = 39
    draws: int = 1
    thin: int = 1
    level: float = 0.9
    index: int = 0
    key: str | None = None
    report: bool = True
    json: bool = False
    keep: Literal["all", "statistics"] | int = "all"
    checkpoint_every: float = CHECKPOINT_EVERY
    fresh: bool = False
    extend: bool = False
    keep_state: bool = True
    processes: int = 1


class Prepared(NamedTuple):
    """What a reconstruction starts from.

    Attributes:
        dpnp: the sampler.
        card: of its prior.
        y: the measurement.
        truth: the clean image ``(C, H, W)`` that it was simulated from, if it was.
    """

    dpnp: DPnP | Baseline
    card: PriorCard
    y: Tensor
    truth: Tensor | None

    def task(self, settings: Reconstruction) -> Task:
        """What DPnP is to draw.

        Raises:
            TypeError: it is another solver.
        """
        if not isinstance(self.dpnp, DPnP):
            raise TypeError(f"{type(self.dpnp).__name__} has no state that a run could go on from")
        return self.dpnp.task(
            self.y,
            settings.chains,
            settings.seed,
            settings.draws,
            settings.thin,
            settings.batch_size,
            settings.keep,
        )


def prepare(settings: Reconstruction) -> Prepared:
    """Sampler and measurement.

    Raises:
        ValueError: settings that do not go together, or files that do not fit them.
    """
    demo = settings.measurement is None and settings.image is None
    if settings.measurement is not None and settings.image is not None:
        raise ValueError(
            "measurement and image were both given; give a measurement, or a clean image to simulate one from"
        )
    dpnp, card = settings.sampler(demo=demo)
    if settings.measurement is not None:
        return Prepared(
            dpnp,
            card,
            read_measurement(settings.measurement, settings.key, dpnp.forward_model, card, settings.index),
            None,
        )
    file = str(bundled_images(settings.prior)) if demo else settings.image
    assert file is not None
    image = read_image(file, settings.index, dpnp.image_shape, card, settings.key)
    truth = image.to(device=dpnp.device, dtype=dpnp.dtype)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, 2**32))  # no chain has this index
    return Prepared(dpnp, card, dpnp.forward_model.simulate(truth[None], generator=generator)[0], truth)


def reconstruct(settings: Reconstruction, config: dict[str, Any], arguments: list[str]) -> None:
    """One reconstruction, from the settings to the folder; or what is left of one that was interrupted."""
    config = {name: value for name, value in config.items() if name not in ABOUT_THIS_CALL}
    demo, named = settings.measurement is None and settings.image is None, settings.output is not None
    if settings.output is None:
        settings.output = "outputs/demo" if demo else time.strftime("outputs/%Y-%m-%d_%H-%M-%S")
        settings.overwrite = settings.overwrite or demo
    replaces = settings.overwrite or settings.extend
    check_output(settings.output, overwrite=replaces)
    before = earlier_run(Path(settings.output)) if settings.extend else None
    share_out(settings)
    prepared = prepare(settings)
    dpnp, card, y, truth = prepared
    task = None
    if isinstance(dpnp, DPnP):
        task = prepared.task(settings)
        if not (named or demo or settings.fresh):
            settings.output = str(interrupted(task, Path(settings.output)))
    else:
        check_stateless(dpnp, extend=settings.extend, processes=settings.processes, keep=settings.keep)
    log.info("%s; %d chains", dpnp.plan, settings.chains)
    output = Path(settings.output)
    with FolderLock(state_folder(output)) as lock:
        if settings.fresh:
            throw_away(lock.folder)
        try:
            with ProgressBar(chains=settings.chains) as progress:
                posterior = (
                    dpnp.sample(
                        y,
                        chains=settings.chains,
                        seed=settings.seed,
                        draws=settings.draws,
                        thin=settings.thin,
                        batch_size=settings.batch_size,
                        on_sweep=progress,
                    )
                    if task is None
                    else sample(settings, task, arguments, lock.folder, before, progress)
                )
        except SamplingError:  # which would come again
            throw_away(lock.folder)
            raise
        scores = (
            {}
            if truth is None
            else score(posterior, truth.cpu(), card.value_range, dpnp.forward_model.operator, settings.level)
        )
        check_output(output, overwrite=replaces)
        record = {**provenance(settings, dpnp, card, config, arguments), "scores": scores}
        with staged_folder(output) as folder:
            record = write_run(folder, posterior, y, truth, dpnp=dpnp, card=card, record=record)
        throw_away(lock.folder)
        diagnosis = judge(posterior, output, report=settings.report)
    if settings.json:
        print(describe_as_json(record, diagnosis, output))
    else:
        _print_summary(posterior, scores, output, diagnosis)


def check_stateless(solver: Baseline, **options: Any) -> None:
    """Refuse what only DPnP's runs can do.

    Args:
        solver: another one.
        options: of the command line, by name.

    Raises:
        ValueError: names the option.
    """
    for name, default in (("extend", False), ("processes", 1), ("keep", "all")):
        if options.get(name, default) != default:
            raise ValueError(
                f"{name} = {options[name]!r} is for DPnP; with {type(solver).__name__} it must be {default!r}"
            )


def sample(
    settings: Reconstruction,
    task: Task,
    arguments: list[str],
    folder: Path,
    before: Posterior | None,
    progress: ProgressBar,
) -> Posterior:
    """The draws, by one process or several.

    Args:
        settings: of the run.
        task: what is to be drawn.
        arguments: command line, for other processes.
        folder: for the state of the run.
        before: a run that this one extends.
        progress: is told of each iteration.

    Raises:
        RunError: ``folder`` holds the state of a run of other settings.
        SamplingError: sampling broke down.
        RuntimeError: a process has died too often.
    """
    dpnp = task.sampler
    checkpoints = Checkpoints(folder, dpnp.settings(task), every=settings.checkpoint_every)
    if (folder / LATEST).exists() if settings.processes > 1 else any(folder.glob(NAME.format("*"))):
        raise RunError(
            f"{folder} holds the state of a run by {'one process' if settings.processes > 1 else 'several processes'}; give its number of "
            "--processes to go on with it, or throw it away by --fresh true"
        )
    if settings.processes == 1:
        run = dpnp.advance(dataclasses.replace(task, on_sweep=progress), checkpoints, before)
    else:
        run = sample_in_processes(
            task,
            arguments,
            folder,
            processes=settings.processes,
            every=settings.checkpoint_every,
            on_sweep=progress,
        )
    return dpnp.finish(run, keep_state=settings.keep_state, judge=False)


def share_out(settings: Reconstruction) -> None:
    """Find out whether several processes can share the run, and choose batches for them.

    Raises:
        ValueError: they cannot; says why.
    """
    if settings.processes < 1:
        raise ValueError(f"processes = {settings.processes}; it must be at least 1")
    if settings.processes == 1:
        return
    if settings.population:
        raise ValueError(
            f"processes = {settings.processes}: particles of a population and chains with replicas depend on each other, and run in one "
            "process"
        )
    if settings.batch_size == "auto":
        raise ValueError(
            f"processes = {settings.processes} share out batches of chains; batch_size = 'auto' does not say their size"
        )
    if settings.extend:
        raise ValueError(f"processes = {settings.processes}: a run is extended by one process")
    settings.batch_size = settings.batch_size or max(1, math.ceil(settings.chains / settings.processes))


def write_run(
    folder: Path,
    posterior: Posterior,
    y: Tensor,
    truth: Tensor | None,
    *,
    dpnp: DPnP | Baseline,
    card: PriorCard,
    record: dict[str, Any],
    picture: bool = True,
) -> dict[str, Any]:
    """The files of a run.

    Args:
        folder: where to write them; a staged one, so that they come all or none.
        posterior: the draws.
        y: the measurement.
        truth: ``(C, H, W)`` if it is known.
        dpnp: what drew them.
        card: of the prior.
        record: where they come from, and their scores; the run's own figures are added.
        picture: whether to draw the picture.

    Returns:
        The record as it was written.
    """
    posterior.save(folder)
    save_array(folder / "mean.npy", posterior.mean)
    if len(posterior.flat) > 1:
        save_array(folder / "std.npy", posterior.std)
    save_array(folder / "measurement.npy", y)
    if truth is not None:
        save_array(folder / "truth.npy", truth)
    display = dpnp.forward_model.operator.display(y)
    if display is not None:
        save_array(folder / DISPLAY, display)
    if picture:
        draw_picture(
            folder / "picture.png",
            posterior,
            value_range=card.value_range,
            measurement=display,
            truth=None if truth is None else truth.cpu(),
            title=title_of(dpnp, card),
        )
    figures = {name: posterior.diagnostics[name] for name in ("network_calls", "forward_calls", "seconds")}
    whole = {**record, **figures}
    (folder / MARKER).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    return whole


def state_folder(output: Path) -> Path:
    """Where a run's state is while it is not done: beside the folder that it will be, and hidden."""
    return output.absolute().parent / f".{output.name}{STATES}"


def throw_away(folder: Path) -> None:
    """Remove the states in a folder, but not its lock."""
    for name in (LATEST, PREVIOUS):
        (folder / name).unlink(missing_ok=True)
    remove_half_written(folder)
    for worker in folder.glob(NAME.format("*")):
        shutil.rmtree(worker)


def interrupted(task: Task, output: Path) -> Path:
    """Of a run without a name: the folder that a run of the same settings was to write when it was interrupted, else ``output``."""
    settings = task.sampler.settings(task)
    for folder in sorted(output.absolute().parent.glob(f".*{STATES}")):
        for file in sorted(folder.rglob(LATEST)):
            try:
                _, about = read_state(file)
            except (StateError, OSError):
                continue
            if not differences({**about, "chains": settings["chains"]}, settings):
                return output.with_name(folder.name.removeprefix(".").removesuffix(STATES))
    return output


def earlier_run(output: Path) -> Posterior:
    """The run that is to be extended.

    Raises:
        ValueError: there is none.
    """
    if not (output / MARKER).is_file():
        raise ValueError(f"extend: output = {str(output)!r} holds no finished run")
    return Posterior.load(output)


def judge(posterior: Posterior, output: Path, *, report: bool) -> Diagnosis | None:
    """Diagnose draws that are written already, add what was found to their record, and write their report.

    Args:
        posterior: the draws; its record is added to.
        output: folder of the run.
        report: whether it gets one.

    Returns:
        The diagnosis; None, and a warning, if it cannot be had.
    """
    diagnosis = None
    try:
        posterior.diagnostics["convergence"] = posterior.convergence()
        diagnosis = posterior.diagnose()
        found = {"verdict": diagnosis.verdict, "reasons": diagnosis.reasons, "notes": diagnosis.notes}
        posterior.diagnostics["diagnosis"] = found
        posterior.save_record(output)
        if report:
            write_report(output, diagnosis=diagnosis)
    except Exception as error:  # whatever goes wrong here, the draws are there
        what = "diagnosed" if diagnosis is None else "shown in a report"
        log.warning("the draws are written, but could not be %s: %s: %s", what, type(error).__name__, error)
    return diagnosis


def describe_as_json(record: dict[str, Any], diagnosis: Diagnosis | None, output: Path) -> str:
    """A run for machines: its record, verdict, diagnosis and files."""
    found = {
        "verdict": None if diagnosis is None else diagnosis.verdict,
        "diagnosis": None if diagnosis is None else diagnosis.to_json(),
        "output": str(output),
        "files": sorted(str(file) for file in output.iterdir()),
    }
    return json.dumps({**record, **found}, indent=2)


def score(
    posterior: Posterior, truth: Tensor, value_range: tuple[float, float], operator: object, level: float
) -> dict[str, float]:
    """Figures of a reconstruction whose truth is known.

    Args:
        posterior: the draws.
        truth: ``(C, H, W)``.
        value_range: of a pixel.
        operator: the forward map; pixels that it says it does not see are scored separately.
        level: of the intervals.

    Returns:
        ``psnr`` (dB) and ``ssim`` of the mean, ``coverage`` of the order-statistic intervals and, where the operator knows
        which pixels it does not see, ``coverage_unseen``; a figure that cannot be had is left out and the log says why.
    """
    truth = truth.to(posterior.samples.dtype)
    scores = {"psnr": psnr(posterior.mean, truth, value_range)}
    try:
        scores["ssim"] = ssim(posterior.mean, truth, value_range)
    except ValueError as error:
        log.info("no SSIM: %s", error)
    try:
        scores["coverage"], scores["level"] = coverage(posterior, truth, level)
        unseen = operator.unseen if isinstance(operator, Operator) else None
        if unseen is not None and bool(unseen.any()):
            scores["coverage_unseen"], _ = coverage(posterior, truth, level, unseen.cpu())
    except ValueError as error:
        log.info("no coverage: %s", error)
    return scores


def _print_summary(posterior: Posterior, scores: dict[str, float], output: Path, diagnosis: Diagnosis | None) -> None:
    record = posterior.diagnostics
    calls, seconds = record["network_calls"], record["seconds"]
    print(
        f"{record['sampler']}: {record['chains']} chains, {record['draws']} draws each, {calls} network calls, {seconds:.1f} s"
    )
    if "psnr" in scores:
        print(
            f"PSNR of the mean {scores['psnr']:.2f} dB" + (f", SSIM {scores['ssim']:.3f}" if "ssim" in scores else "")
        )
    if "coverage" in scores:
        unseen = f" (unseen pixels {scores['coverage_unseen']:.1%})" if "coverage_unseen" in scores else ""
        print(f"{scores['level']:.0%} intervals cover {scores['coverage']:.1%} of the pixels{unseen}")
    if posterior.log_evidence is not None:
        error = "" if posterior.log_evidence_se is None else f" ± {posterior.log_evidence_se:.2f}"
        bias = {population["bias"] for population in record["populations"]}
        print(f"log evidence {posterior.log_evidence:.2f}{error} (bias of the splitting: {', '.join(sorted(bias))})")
    if (fit := Fit.of(record)) is not None and fit.chi_square is not None:
        print(fit.describe())
    for warning in record["warnings"]:
        print(f"warning: {warning}")
    if record["convergence"] is not None:
        print(
            "R-hat {r_hat:.3f}, bulk ESS {ess_bulk:.0f}, tail ESS {ess_tail:.0f} (worst pixel)".format(
                **record["convergence"]
            )
        )
    if diagnosis is not None:
        print(f"verdict: {diagnosis.sentence}")
    print(f"picture: {output / 'picture.png'}")
    if (output / REPORT).is_file():
        print(f"report: {output / REPORT}")
