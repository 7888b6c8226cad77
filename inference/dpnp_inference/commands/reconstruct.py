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

from dpnp_inference.configuration import Configuration, bundled_images, provenance, title_of
from dpnp_inference.files import MARKER, check_output, read_image, read_measurement, save_array
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_inference.posterior import Posterior
from dpnp_inference.progress import ProgressBar
from dpnp_inference.report import draw_picture
from dpnp_shared.folders import staged_folder
from dpnp_shared.operators import Operator
from dpnp_shared.randomness import derive_seed

log = logging.getLogger(__name__)


@dataclass
class Reconstruction(Configuration):
    """Draw from the posterior of an image and write the run's folder.

    Args:
        measurement: the measurement, a .npy, .npz, .pt or image file; or a list of files, one for each operator of a Stack. Give this
            or ``image``.
        image: a clean image (the same kinds of file) from which a measurement is simulated; its reconstruction is scored.
        chains: independent chains.
        draws: draws of each chain.
        thin: iterations between two draws of a chain.
        level: of the intervals whose coverage is reported.
        index: which image of an image file that holds several.
        key: name of the array in a file that holds several.
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


def reconstruct(settings: Reconstruction, config: dict[str, Any], arguments: list[str]) -> None:
    """One reconstruction, from the settings to the folder."""
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
        y = read_measurement(settings.measurement, settings.key, forward_model, card)
    log.info("%s; %d chains", dpnp.plan, settings.chains)
    with ProgressBar() as progress:
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
        posterior.save(folder)
        save_array(folder / "mean.npy", posterior.mean)
        if len(posterior.flat) > 1:
            save_array(folder / "std.npy", posterior.std)
        save_array(folder / "measurement.npy", y)
        if truth is not None:
            save_array(folder / "truth.npy", truth)
        draw_picture(
            folder / "picture.png",
            posterior,
            value_range=card.value_range,
            measurement=forward_model.operator.display(y),
            truth=None if truth is None else truth.cpu(),
            title=title_of(dpnp, card),
        )
        record = {
            **provenance(settings, dpnp, card, config, arguments),
            "network_calls": posterior.diagnostics["network_calls"],
            "forward_calls": posterior.diagnostics["forward_calls"],
            "seconds": posterior.diagnostics["seconds"],
            "scores": scores,
        }
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _print_summary(posterior, scores, Path(settings.output))


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


def _print_summary(posterior: Posterior, scores: dict[str, float], output: Path) -> None:
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
    print(f"picture: {output / 'picture.png'}")
