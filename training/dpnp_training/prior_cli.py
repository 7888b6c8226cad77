"""``dpnp-prior``: what is done with priors outside of training and inference."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli

from dpnp_shared.console import ends_with_its_reader
from dpnp_shared.hub import HubError
from dpnp_shared.model_card import noise_bands
from dpnp_shared.networks.presets import presets
from dpnp_shared.prior import (
    CONFIG,
    SAMPLES,
    WEIGHTS,
    Prior,
    PriorError,
    check_target,
    locate,
    read_config,
    release,
    write_folder,
)
from dpnp_training import hub, verify
from dpnp_training.ema_choice import choose
from dpnp_training.estimate import estimate
from dpnp_training.export import Precision, draw_samples, prior_from_checkpoint, round_weights, samples_of_run
from dpnp_training.foreign.cli import import_folder


def export(
    checkpoint: str,
    directory: str,
    name: str | None = None,
    license: str | None = None,
    precision: Precision = "float32",
    samples: int = 16,
    data_revision: str | None = None,
    trusted_modules: list[str] | None = None,
    ema: str = "main",
    ema_widths: list[float] | None = None,
    data: str | None = None,
    root: str = "data",
    device: str = "cpu",
) -> None:
    """Turn a training checkpoint into a portable prior.

    Args:
        checkpoint: a .ckpt file written by training.
        directory: the folder to write.
        name: title of the card; the data's name by default.
        license: licence of weights and data; the data's by default.
        precision: of the stored weights; what rounding them changes is measured, printed and written on the card.
        samples: images of the card's picture, if the run left none; 0 for no picture.
        data_revision: commit or version of the data, for the card.
        trusted_modules: modules outside of this package whose network classes may be imported.
        ema: which moving average: ``main``; a relative width such as ``0.07``, made from the profiles that training tracked; or ``best``,
            the one with the smallest loss on the training's own validation images.
        ema_widths: relative widths that ``best`` compares, besides the main average.
        data: for ``best``, where the training's data is now; by default where it was.
        root: for ``best``, folder of torchvision's data sets.
        device: for ``best``, where to compute.
    """
    if samples < 0:
        raise ValueError(f"samples = {samples}; it must be at least 0")
    if ema != "best" and (ema_widths is not None or data is not None):
        raise ValueError(f"ema_widths and data are for ema = 'best'; ema = {ema!r}")
    check_target(Path(directory))
    if ema == "best":
        prior = _best(checkpoint, ema_widths, data, root, device, trusted_modules or ())
    else:
        prior = prior_from_checkpoint(checkpoint, trusted_modules=trusted_modules or (), sigma_rel=_width(ema))
    prior.card.name = name or prior.card.name
    prior.card.license = license or prior.card.license
    prior.card.training |= {"checkpoint": Path(checkpoint).name, "exported by": f"dpnp-imaging {release()}"}
    if data_revision is not None:
        prior.card.training["revision of the data"] = data_revision
    main_average = prior.card.training.get("moving average", "main") == "main"  # the one the run drew samples of
    picture = ((main_average and samples_of_run(checkpoint)) or draw_samples(prior, samples)) if samples else None
    if precision != "float32":
        prior = round_weights(prior, precision)
        print(f"RMS change of D(x; σ) by weights in {precision}, on generated images:")
        for band, (to_d, to_error) in prior.card.precision["difference"].items():
            print(f"  σ {band}: {to_d:.2e} of D(x; σ), {to_error:.2e} of its error")
    folder = prior.save_pretrained(directory, files={} if picture is None else {SAMPLES: picture})
    print(f"prior written to {folder}")


def _width(ema: str) -> float | None:
    """The relative width that is named, none for the main average."""
    try:
        return None if ema == "main" else float(ema)
    except ValueError:
        raise ValueError(f"ema = {ema!r}; it may be main, best, or a relative width such as 0.07") from None


def _best(
    checkpoint: str,
    widths: list[float] | None,
    data: str | None,
    root: str,
    device: str,
    trusted_modules: Sequence[str],
) -> Prior:
    """The average with the smallest validation loss, after a table of all that were measured."""
    prior, candidates, left_out = choose(
        checkpoint, widths=widths, data=data, root=root, device=device, trusted_modules=trusted_modules
    )
    for reason in left_out:
        print(f"left out: {reason}")
    best = candidates[0]
    bands, images = best.losses.shape
    print(f"validation loss on {images} images in {bands} noise bands, the same noise for all:")
    print("  average         loss       above the best")
    for candidate in candidates:
        difference, error = candidate.above(best)
        name = "main" if candidate.sigma_rel is None else f"σ_rel = {candidate.name}"
        print(
            f"  {name:<14}  {candidate.loss:<9.6g}  "
            + ("(exported)" if candidate is best else f"{difference:.2g} ± {error:.1g}")
        )
    return prior.cpu()


def inspect(prior: str, revision: str | None = None, trusted_modules: list[str] | None = None) -> None:
    """Check a prior's folder (version, signature, hash, keys, shapes) and print its card.

    Args:
        prior: a folder, the name of a bundled prior, or a Hub id.
        revision: branch, tag or commit of a prior on the Hub.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    loaded = Prior.from_pretrained(prior, revision=revision, trusted_modules=trusted_modules or ())
    print(loaded.card.markdown())
    repository, commit = hub.pulled_from(locate(prior, revision))
    print(f"read from {loaded.origin}" + (f", which is {repository}@{commit} on the Hub" if repository else ""))


def verify_prior(
    prior: str,
    data: str | None = None,
    split: str | None = None,
    root: str = "data",
    tolerance: float = verify.EXACT_TOLERANCE,
    images: int = 1024,
    batch_size: int = 128,
    device: str = "cpu",
    revision: str | None = None,
    trusted_modules: list[str] | None = None,
) -> None:
    """Check a prior and measure its card's denoising errors again; exit with status 1 if anything does not hold.

    Args:
        prior: a folder, the name of a bundled prior, or a Hub id.
        data: the data of the card's figures, as training names it; without it only what needs no data is checked.
        split: split of the data to measure on; by default the card's, or else ``test``.
        root: folder of torchvision's data sets.
        tolerance: relative difference between mean squared errors that is allowed. Where the card's noise cannot be drawn again, five
            standard errors of the difference are allowed on top.
        images: how many to measure on, where the card does not say.
        batch_size: of these images, where the card does not say.
        device: where to compute.
        revision: branch, tag or commit of a prior on the Hub.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance = {tolerance}; it must be at least 0")
    loaded, passed, failed = verify.check_folder(prior, revision=revision, trusted_modules=trusted_modules or ())
    card = loaded.card
    bands = [band for band, figures in noise_bands(card.metrics).items() if "mse" in figures]
    if data is None:
        passed.append("figures: not measured, no data was given")
    elif not bands:
        failed.append("figures: the card has no denoising errors by noise band; `dpnp-prior measure` writes them")
    else:
        record = verify.record_on(card)
        chosen = verify.validation_images(card, record, data, split, root)
        same = record is not None and record.device == torch.device(device).type
        if record is None:
            record = _record(len(chosen), images, batch_size, seed=0)
            passed.append(
                f"data: the card does not say how it was measured; used are {record.batches} batches of {batch_size}"
            )
        elif record.images_sha256 and record.images_sha256 != verify.fingerprint(chosen):
            same = False
            failed.append("data: not the images that the card's figures were measured on")
        measured = verify.denoising_errors(loaded.to(device), chosen, bands, record, device=device)
        for found in verify.compare(card, measured, same_noise=same, tolerance=tolerance):
            low, high = found.band
            line = (
                f"denoising error, σ {low:g} to {high:g}: mean square {found.card:.4g} on the card, {found.measured:.4g} measured, "
                f"{found.measured / found.card - 1:+.2%} (allowed {found.allowed / found.card:.2%})"
            )
            (passed if found.agrees else failed).append(line)
    for line in passed:
        print(f"ok    {line}")
    for line in failed:
        print(f"WRONG {line}")
    print(f"{prior}: " + (f"{len(failed)} of {len(passed) + len(failed)} do not hold" if failed else "all of it holds"))
    if failed:
        sys.exit(1)


def measure(
    prior: str,
    data: str,
    split: str | None = None,
    root: str = "data",
    images: int = 1024,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "cpu",
    trusted_modules: list[str] | None = None,
) -> None:
    """Measure the denoising errors by noise band and write them on the card, with all that is needed to measure them again.

    Args:
        prior: a folder.
        data: validation images, as training names data; all of the split are candidates, the first ``images`` are taken.
        split: ``test`` by default.
        root: folder of torchvision's data sets.
        images: how many.
        batch_size: of these images.
        seed: of the noise.
        device: where to compute.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    folder = _folder(prior)
    loaded = Prior.from_pretrained(folder, trusted_modules=trusted_modules or ())
    card = loaded.card
    chosen = verify.validation_images(card, None, data, split, root)
    record = _record(len(chosen), images, batch_size, seed=seed)
    c, h, w = card.image_shape
    record.device, record.images_sha256 = torch.device(device).type, verify.fingerprint(chosen)
    record.data = {"source": data, "split": split or "test", "validation_split": split or "test", "size": [h, w]}
    record.data |= {"value_range": list(card.source_range)} | ({"channels": c} if c in (1, 3) else {})
    measured = verify.denoising_errors(loaded.to(device), chosen, verify.bands_of(card), record, device=device)
    config = read_config(folder, quiet=True)
    write_folder(folder, config, verify.with_figures(card, measured, record), folder / WEIGHTS, {})
    for (low, high), errors in measured.items():
        print(
            f"σ {low:g} to {high:g}: mean squared error {errors.mse:.4g} ± {errors.standard_error:.1g} on {errors.images} images"
        )
    print(f"written on the card of {folder}")


def migrate(prior: str, directory: str | None = None, trusted_modules: list[str] | None = None) -> None:
    """Write a prior of an older format in the present one; the weights' file is taken as it is.

    Args:
        prior: a folder.
        directory: the folder to write; the same one by default.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    folder = _folder(prior)
    card = Prior.from_pretrained(folder, trusted_modules=trusted_modules or ()).card
    target = folder if directory is None else Path(directory)
    picture = {SAMPLES: (folder / SAMPLES).read_bytes()} if (folder / SAMPLES).is_file() else {}
    write_folder(target, read_config(folder, quiet=True), card, folder / WEIGHTS, picture)
    print(f"prior written to {target}, in format version {read_config(target)['format_version']}")


def push(
    prior: str,
    repository: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    trusted_modules: list[str] | None = None,
) -> None:
    """Upload a prior to the Hub, after all checks that need no data.

    Args:
        prior: a folder.
        repository: ``organisation/name``; it is made if it does not exist.
        private: make it private.
        revision: branch to commit to; the main branch by default.
        message: of the commit.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    commit = hub.push(
        _folder(prior),
        repository,
        private=private,
        revision=revision,
        message=message,
        trusted_modules=trusted_modules or (),
    )
    print(f"pushed; load it with --prior {repository}@{commit}")


def pull(
    repository: str, directory: str, revision: str | None = None, trusted_modules: list[str] | None = None
) -> None:
    """Download a prior from the Hub into a folder, after all checks that need no data.

    Args:
        repository: ``organisation/name``.
        directory: the folder to write.
        revision: branch, tag or commit; the main branch by default.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    commit = hub.pull(repository, directory, revision=revision, trusted_modules=trusted_modules or ())
    print(f"{repository}@{commit} written to {directory}")


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / CONFIG).is_file():
        raise PriorError(f"prior = {name!r} is not the folder of a prior")
    return folder


def _record(available: int, images: int, batch_size: int, *, seed: int) -> verify.ValidationRecord:
    if images < 1 or batch_size < 1:
        raise ValueError(f"images = {images} and batch_size = {batch_size} must be positive")
    return verify.ValidationRecord(math.ceil(min(images, available) / batch_size), batch_size, seed=seed)


COMMANDS: dict[str, Any] = {
    "export": export,
    "inspect": inspect,
    "verify": verify_prior,
    "measure": measure,
    "migrate": migrate,
    "push": push,
    "pull": pull,
    "import": import_folder,
    "estimate": estimate,
    "presets": presets,
}
"""Subcommands by name; a further one is a function with typed arguments and a Google-style docstring."""


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dpnp-prior``.

    Args:
        args: command-line arguments; those of the process by default.

    Raises:
        SystemExit: with a non-zero status, for bad input, a prior that is not in order, or figures that do not hold.
    """
    logging.basicConfig(format="dpnp-prior: %(message)s")
    arguments = list(sys.argv[1:] if args is None else args)
    flags = ["--private=true" if a == "--private" and b not in ("true", "false") else a for a, b in _pairs(arguments)]
    try:
        with ends_with_its_reader():
            auto_cli(COMMANDS, as_positional=True, args=flags)
    except (PriorError, HubError, ValueError, FileNotFoundError) as error:
        sys.exit(f"dpnp-prior: {error}")


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """Each argument and the next one."""
    return list(zip(arguments, [*arguments[1:], ""], strict=True))
