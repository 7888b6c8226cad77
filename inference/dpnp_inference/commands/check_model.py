"""``dpnp-reconstruct check-model``: is the forward model what a sampler takes it for?"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from dpnp_inference import check_model as checks
from dpnp_inference.configuration import Configuration
from dpnp_inference.dpnp import image_shape_of
from dpnp_inference.files import read_image, read_measurement
from dpnp_inference.proximal import ProximalSampler

log = logging.getLogger(__name__)


@dataclass
class CheckModel(Configuration):
    """Try a forward model on draws from the prior: what it promises, what it lacks, and how long a reconstruction takes.

    Args:
        measurement: the measurement that it is for; one that fits and resembles simulated ones is well described.
        image: a clean image, which is tried as well.
        index: which image of an image file that holds several.
        key: name of the array in a file that holds several.
        chains: of the reconstruction, for an estimate of its time.
        json: file to write the findings to.
        output: is for a reconstruction; nothing else is written here.
    """

    measurement: str | list[str] | None = None
    image: str | None = None
    index: int = 0
    key: str | None = None
    chains: int = 39
    json: str | None = None


def check_model(settings: CheckModel, config: dict[str, Any], arguments: list[str]) -> None:
    """Findings about a forward model, printed and kept."""
    if not isinstance(settings.solver, str):
        log.info("solver: what is said below of sampling, and of its time, is about DPnP")
    given = settings.measurement is not None or settings.image is not None
    prior, card, forward_model = settings.models(demo=not given)
    y = images = None
    if settings.image is not None:
        shape = image_shape_of(prior, forward_model)
        images = read_image(settings.image, settings.index, shape, card, settings.key)[None]
    if settings.measurement is not None:
        y = read_measurement(settings.measurement, settings.key, forward_model, card)
    findings = checks.check_model(
        prior,
        forward_model,
        y,
        images=images,
        proximal=cast('Literal["auto"] | ProximalSampler', settings.proximal),
        annealing=settings.annealing,
        dds=settings.dds,
        chains=settings.chains,
        seed=settings.seed,
        dtype=settings.image_dtype,
    )
    checks.print_findings(findings)
    if settings.json is not None:
        record = {"command": shlex.join(["dpnp-reconstruct", *arguments]), "problem": checks.has_problem(findings)}
        listed = [dataclasses.asdict(finding) for finding in findings]
        Path(settings.json).write_text(json.dumps({**record, "findings": listed}, indent=2) + "\n", encoding="utf-8")
    if checks.has_problem(findings):
        sys.exit(1)
