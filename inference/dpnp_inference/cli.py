"""``dpnp-reconstruct``: a prior, a forward model and a measurement go in, a posterior comes out.

Without arguments it runs the bundled demo.
"""

from __future__ import annotations

import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader
from rich.logging import RichHandler
from torch import Tensor

from dpnp_inference.annealing import Annealing
from dpnp_inference.dds import DenoisingSampler
from dpnp_inference.dpnp import DPnP, SamplingError, image_shape_of
from dpnp_inference.files import check_output, read_image, read_tensor, save_array, to_image_units
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_inference.posterior import Posterior
from dpnp_inference.progress import ProgressBar
from dpnp_inference.proximal import ProximalSampler
from dpnp_inference.report import draw_picture
from dpnp_inference.userfile import resolve_user_files
from dpnp_shared.folders import staged_folder
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import Operator, RandomInpainting
from dpnp_shared.prior import Prior, PriorError
from dpnp_shared.randomness import derive_seed

log = logging.getLogger(__name__)

BUNDLED = "fashion_mnist"
TEST_IMAGES = "test_images.npz"
Precision = Literal["float32", "float64", "bfloat16", "float16"]


def reconstruct(
    prior: str = BUNDLED,
    measurement: str | None = None,
    image: str | None = None,
    operator: Operator | Callable | None = None,  # type: ignore[type-arg] # jsonargparse wants it bare
    noise: Noise | None = None,
    dds: Literal["ddim", "ddpm"] | DenoisingSampler = "ddim",
    proximal: Literal["auto"] | ProximalSampler = "auto",
    annealing: Literal["auto"] | Annealing = "auto",
    chains: int = 39,
    draws: int = 1,
    thin: int = 1,
    seed: int = 0,
    batch_size: int | None = None,
    level: float = 0.9,
    index: int = 0,
    key: str | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    output: str | None = None,
    overwrite: bool = False,
    trusted_modules: list[str] | None = None,
) -> None:
    """Draw from the posterior of an image and write the run's folder.

    Args:
        prior: folder of a prior, the name of a bundled one, or a Hub id.
        measurement: the measurement, a .npy, .npz, .pt or image file. Give this or ``image``.
        image: a clean image (the same kinds of file) from which a measurement is simulated; its reconstruction is scored.
        operator: noiseless forward map, by class_path and init_args, or path/to/file.py:Name for your own.
        noise: noise model, by class_path and init_args, or path/to/file.py:Name for your own.
        dds: denoising sampler.
        proximal: proximal sampler; auto takes the most exact one that the forward model allows.
        annealing: coupling schedule; auto takes its ends from the prior and the noise.
        chains: independent chains.
        draws: draws of each chain.
        thin: iterations between two draws of a chain.
        seed: of all randomness, not negative.
        batch_size: chains that run together; all by default.
        level: of the intervals whose coverage is reported.
        index: which image of an image file that holds several.
        key: name of the array in a file that holds several.
        device: auto, cpu, cuda, cuda:1, mps, …
        precision: float32 and float64 for everything; bfloat16 and float16 for the network alone.
        output: folder to write; by default outputs/demo for the demo (replaced each time), else outputs/ and the time.
        overwrite: replace an earlier run in that folder.
        trusted_modules: modules outside of this package whose network classes a prior may name.
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dpnp-reconstruct``.

    Args:
        args: command-line arguments; those of the process by default.

    Raises:
        SystemExit: with a non-zero status and one message, for any bad input.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False, markup=False)]
    )
    for noisy in ("httpx", "huggingface_hub", "matplotlib", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    parser = _parser()
    try:
        settings = parser.parse_args([_resolve_argument(argument) for argument in arguments])
        built = parser.instantiate(settings)
        _run(built, json.loads(parser.dump(settings, format="json")), arguments)
    except (PriorError, SamplingError, ValueError, TypeError, OSError, RuntimeError) as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        sys.exit(f"dpnp-reconstruct: {error}")


def _parser() -> ArgumentParser:
    set_loader("dpnp_yaml", lambda text: resolve_user_files(yaml.safe_load(text)))
    parser = ArgumentParser(
        prog="dpnp-reconstruct",
        usage="dpnp-reconstruct [--config FILE] [options]; --help lists the options",
        parser_mode="dpnp_yaml",
        description="Draw from the posterior of an image. Without arguments: the bundled demo.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_function_arguments(reconstruct)
    return parser


def _resolve_argument(argument: str) -> str:
    """``--operator=file.py:Name`` and ``file.py:Name`` with the class path of the user's class."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{resolve_user_files(value)}"


def _run(settings: Namespace, config: dict[str, Any], arguments: list[str]) -> None:
    """One run, from the settings to the folder."""
    demo = settings.measurement is None and settings.image is None
    if settings.measurement is not None and settings.image is not None:
        raise ValueError(
            "measurement and image were both given; give a measurement, or a clean image to simulate one from"
        )
    if settings.output is None:
        settings.output = "outputs/demo" if demo else time.strftime("outputs/%Y-%m-%d_%H-%M-%S")
        settings.overwrite = settings.overwrite or demo
    check_output(settings.output, overwrite=settings.overwrite)
    device = _device(settings.device)
    prior = Prior.from_pretrained(settings.prior, trusted_modules=settings.trusted_modules or ())
    card = prior.card
    dtype = torch.float64 if settings.precision == "float64" else torch.float32
    prior.to(device=device, dtype=getattr(torch, settings.precision))
    operator, noise = settings.operator, settings.noise
    if demo:
        if (operator is None) != (noise is None):
            raise ValueError("operator and noise: give both or neither")
        settings.image = str(_bundled_images(settings.prior))
        if operator is None:
            operator, noise = RandomInpainting(card.image_shape, missing=0.5, seed=0), GaussianNoise(0.05)
    if operator is None or noise is None:
        raise ValueError("operator and noise are both needed with a measurement or an image of your own")
    forward_model = ForwardModel(operator, noise).to(device=device, dtype=dtype)

    truth = None
    if settings.image is not None:
        image = read_image(settings.image, settings.index, image_shape_of(prior, forward_model), card, settings.key)
        truth = image.to(device=device, dtype=dtype)
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, 2**32))  # no chain has this index
        y = forward_model.simulate(truth[None], generator=generator)[0]
    else:
        y = to_image_units(read_tensor(settings.measurement, settings.key), card)

    dpnp = DPnP(
        prior,
        forward_model,
        dds=settings.dds,
        proximal=settings.proximal,
        annealing=settings.annealing,
        dtype=dtype,
    )
    log.info(
        "%d iterations, eta from %.3g to %.3g, %d chains", len(dpnp.schedule), *_ends(dpnp.schedule), settings.chains
    )
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
    scores = {} if truth is None else score(posterior, truth.cpu(), card.value_range, operator, settings.level)
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
            title=f"{card.name}: {type(forward_model.operator).__name__}, {type(noise).__name__}",
        )
        record = {
            "command": shlex.join(["dpnp-reconstruct", *arguments]),
            "config": config,
            "operator": repr(forward_model.operator),
            "noise": repr(noise),
            "seed": settings.seed,
            "prior": {"name": card.name, "source": settings.prior, "sha256": card.sha256},
            "versions": {
                "dpnp-imaging": version("dpnp-imaging"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "device": str(device),
            "network_calls": posterior.diagnostics["network_calls"],
            "forward_calls": posterior.diagnostics["forward_calls"],
            "seconds": posterior.diagnostics["seconds"],
            "scores": scores,
        }
        (folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
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
    print(f"{record['chains']} chains, {record['draws']} draws each, {calls} network calls, {seconds:.1f} s")
    if "psnr" in scores:
        print(
            f"PSNR of the mean {scores['psnr']:.2f} dB" + (f", SSIM {scores['ssim']:.3f}" if "ssim" in scores else "")
        )
    if "coverage" in scores:
        unseen = f" (unseen pixels {scores['coverage_unseen']:.1%})" if "coverage_unseen" in scores else ""
        print(f"{scores['level']:.0%} intervals cover {scores['coverage']:.1%} of the pixels{unseen}")
    if record["convergence"] is not None:
        print(
            "R-hat {r_hat:.3f}, bulk ESS {ess_bulk:.0f}, tail ESS {ess_tail:.0f} (worst pixel)".format(
                **record["convergence"]
            )
        )
    print(f"picture: {output / 'picture.png'}")


def _device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes an accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def _bundled_images(prior: str) -> Path:
    """Held-out test images that lie beside a bundled prior."""
    from dpnp_shared.prior import locate

    file = locate(prior) / TEST_IMAGES
    if not file.is_file():
        raise ValueError(f"the prior {prior!r} has no test images of its own; give image or measurement")
    return file


def _ends(schedule: list[float]) -> tuple[float, float]:
    return schedule[0], schedule[-1]
