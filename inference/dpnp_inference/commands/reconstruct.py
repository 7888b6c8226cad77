"""``dpnp-reconstruct``: one reconstruction, from its settings to the folder of the run."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline
from dpnp_inference.configuration import Configuration, bundled_images, provenance, title_of
from dpnp_inference.diagnostics import Diagnosis
from dpnp_inference.dpnp import DPnP
from dpnp_inference.files import MARKER, check_output, read_image, read_measurement, save_array
from dpnp_inference.finished_run import DISPLAY
from dpnp_inference.html_report import REPORT, write_report
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_inference.posterior import Posterior
from dpnp_inference.progress import ProgressBar
from dpnp_inference.report import draw_picture
from dpnp_shared.folders import staged_folder
from dpnp_shared.operators import Operator
from dpnp_shared.prior import PriorCard
from dpnp_shared.randomness import derive_seed

log = logging.getLogger(__name__)


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


def reconstruct(settings: Reconstruction, config: dict[str, Any], arguments: list[str]) -> None:
    """One reconstruction, from the settings to the folder."""
    config = {name: value for name, value in config.items() if name != "json"}  # which is about this call only
    demo = settings.measurement is None and settings.image is None
    if settings.measurement is not None and settings.image is not None:
        raise ValueError(
            "measurement and image were both given; give a measurement, or a clean image to simulate one from"
        )
    if settings.output is None:
        settings.output = "outputs/demo" if demo else time.strftime("outputs/%Y-%m-%d_%H-%M-%S")
        settings.overwrite = settings.overwrite or demo
    check_output(settings.output, overwrite=settings.overwrite)
    dpnp, card = settings.sampler(demo=demo)
    forward_model = dpnp.forward_model
    if demo:
        settings.image = str(bundled_images(settings.prior))
    truth = None
    if settings.image is not None:
        image = read_image(settings.image, settings.index, dpnp.image_shape, card, settings.key)
        truth = image.to(device=dpnp.device, dtype=dpnp.dtype)
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, 2**32))  # no chain has this index
        y = forward_model.simulate(truth[None], generator=generator)[0]
    else:
        assert settings.measurement is not None
        y = read_measurement(settings.measurement, settings.key, forward_model, card, settings.index)
    log.info("%s; %d chains", dpnp.plan, settings.chains)
    with ProgressBar(chains=settings.chains) as progress:
        posterior = dpnp.sample(
            y,
            chains=settings.chains,
            seed=settings.seed,
            draws=settings.draws,
            thin=settings.thin,
            batch_size=settings.batch_size,
            on_sweep=progress,
        )
    scores = (
        {} if truth is None else score(posterior, truth.cpu(), card.value_range, forward_model.operator, settings.level)
    )
    check_output(settings.output, overwrite=settings.overwrite)
    with staged_folder(Path(settings.output)) as folder:
        record = provenance(settings, dpnp, card, config, arguments)
        write_run(folder, posterior, y, truth, dpnp=dpnp, card=card, record={**record, "scores": scores})
        if settings.report:
            write_report(folder)
    _print_summary(posterior, scores, Path(settings.output), report=settings.report)


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
) -> None:
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
    (folder / MARKER).write_text(json.dumps({**record, **figures}, indent=2) + "\n", encoding="utf-8")


def judge(posterior: Posterior, output: Path, *, report: bool) -> Diagnosis | None:
    """Diagnose draws that are written already, and write their report.

    Args:
        posterior: the draws.
        output: folder of the run.
        report: whether it gets one.

    Returns:
        The diagnosis; None, and a warning, if it cannot be had.
    """
    diagnosis = None
    try:
        diagnosis = posterior.diagnose()
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
