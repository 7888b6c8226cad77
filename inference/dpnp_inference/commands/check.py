"""``dpnp-reconstruct check``: do the intervals of a reconstruction hold what they promise?"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpnp_inference.calibration import assess, draw_calibration
from dpnp_inference.check import PairProgress, PairStore, Truths, check_pairs
from dpnp_inference.configuration import Configuration, provenance, title_of
from dpnp_inference.files import MARKER
from dpnp_inference.userfile import hash_user_files

log = logging.getLogger(__name__)

# what a check's pairs do not depend on: these change speed only, and more pairs are more of the same
SAME_PAIRS = ("pairs", "batch_size", "device", "output", "overwrite", "trusted_modules")


@dataclass
class Check(Configuration):
    """Simulate pairs of truth and measurement, reconstruct each, and say whether the intervals cover what they should.

    Args:
        pairs: how many; finished ones are kept, so that an interrupted check goes on, and a later one with more pairs as well.
        draws_per_pair: draws of each reconstruction, each by a chain of its own; 39 is the least that has 95% intervals.
        particles: chains that are run for each pair, of which draws_per_pair are taken; as many by default. More make sense
            where chains work together.
        truths: where the truths come from: flow, the prior's own draws (of a trained prior by its probability flow); or sampler, this
            sampler's draws without a measurement. If only the latter are covered, the measurement enters rightly and the prior is off,
            by too few network calls or by a network that contradicts itself.
        output: folder to write; by default outputs/check_ and a number that is the same for the same configuration.
    """

    pairs: int = 100
    draws_per_pair: int = 39
    particles: int | None = None
    truths: Truths = "flow"


def check(settings: Check, config: dict[str, Any], arguments: list[str]) -> None:
    """One check, from the settings to the folder."""
    for name, least in (("pairs", 1), ("draws_per_pair", 1), ("seed", 0)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} = {getattr(settings, name)}; it must be at least {least}")
    dpnp, card = settings.sampler(demo=True)
    names = {field.name for field in dataclasses.fields(Check)} - {*SAME_PAIRS}
    same = {key: value for key, value in config.items() if key in names}
    same |= {"prior_sha256": card.sha256, "version": version("dpnp-imaging")}
    same |= {"user files": hash_user_files(same)}
    same |= {f"source of {name}": _source(getattr(settings, name)) for name in ("prior", "operator", "noise")}
    if settings.output is None:
        digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        settings.output = f"outputs/check_{digest[:8]}"
    output = Path(settings.output)
    store = PairStore(output, same, overwrite=settings.overwrite)
    log.info(
        "%d pairs, %d of them done before; %d draws each; %s",
        settings.pairs,
        len([pair for pair in store.done if pair < settings.pairs]),
        settings.draws_per_pair,
        dpnp.plan,
    )
    with PairProgress(settings.pairs) as progress:
        ranks = check_pairs(
            dpnp,
            pairs=settings.pairs,
            draws=settings.draws_per_pair,
            seed=settings.seed,
            chains=settings.particles,
            batch_size=settings.batch_size,
            truths=settings.truths,
            store=store,
            progress=progress,
        )
    calibration = assess(ranks)
    with store.finish() as folder:
        draw_calibration(folder / "picture.png", calibration, title=title_of(dpnp, card))
        record = {**provenance(settings, dpnp, card, config, arguments), "check": calibration.to_json()}
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    source, about = "prior", "the sampler in this configuration"
    if settings.truths == "sampler":
        source, about = (
            "sampler without a measurement",
            "how the measurement enters, not about the prior as the sampler draws it",
        )
    print(
        f"{calibration.pairs} truths drawn from the {source} and measured, {calibration.draws} posterior draws each.\n"
        f"What follows is about {about}, and not about whether the prior knows your images.\n"
    )
    print(calibration.describe())
    print(f"the same command with --pairs {2 * settings.pairs} --overwrite true goes on from here")
    print(f"picture: {output / 'picture.png'}")


def _source(part: object) -> str | None:
    """Hash of the file that defines a part of the configuration, None for a part given by a name or left out."""
    if part is None or isinstance(part, str):
        return None
    try:
        file = inspect.getsourcefile(part if inspect.isroutine(part) else type(part))
    except TypeError:  # it is not written in Python
        return None
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
