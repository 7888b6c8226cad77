"""``dpnp-reconstruct``: a prior, a forward model and a measurement go in, a posterior comes out.

Without arguments it runs the bundled demo. ``dpnp-reconstruct check`` asks, with the same options, whether the intervals of such a
reconstruction hold what they promise, ``dpnp-reconstruct check-model`` whether the forward model does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import platform
import shlex
import sys
import time
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader
from rich.logging import RichHandler
from torch import Tensor

from dpnp_inference.annealing import Annealing
from dpnp_inference.calibration import assess, draw_calibration
from dpnp_inference.check import PairProgress, PairStore, Truths, check_pairs
from dpnp_inference.check_model import check_model, has_problem, print_findings
from dpnp_inference.dds import DenoisingSampler
from dpnp_inference.dpnp import DPnP, SamplingError, image_shape_of
from dpnp_inference.files import MARKER, check_output, read_image, read_measurement, save_array
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_inference.population import Population
from dpnp_inference.posterior import Posterior
from dpnp_inference.progress import ProgressBar
from dpnp_inference.proximal import ProximalSampler
from dpnp_inference.replica_exchange import ReplicaExchange
from dpnp_inference.report import draw_picture
from dpnp_inference.userfile import hash_user_files, name_user_files, resolve_user_files
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.folders import staged_folder
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import Operator, RandomInpainting, as_operator
from dpnp_shared.prior import Prior, PriorCard, PriorError, locate
from dpnp_shared.randomness import derive_seed

log = logging.getLogger(__name__)

BUNDLED = "fashion_mnist"
TEST_IMAGES = "test_images.npz"
Precision = Literal["float32", "float64", "bfloat16", "float16"]
# what a check's pairs do not depend on: these change speed only, and more pairs are more of the same
SAME_PAIRS = ("pairs", "batch_size", "device", "output", "overwrite", "trusted_modules")


class NamedProximal(Protocol):
    """A proximal sampler as a class path names it: the parser compares types one by one, and each sampler has a state of its own."""

    def init(self, forward_model: Any, y: Any, x: Any) -> Any:
        """See :class:`~dpnp_inference.proximal.ProximalSampler`, also for what follows."""
        ...

    def step(self, state: Any, x: Any, eta: Any, *, generator: Any) -> Any: ...  # noqa: D102

    def select(self, state: Any, index: Any) -> Any: ...  # noqa: D102


@dataclass
class Configuration:
    """A prior, a forward model and a way to sample: what a reconstruction and its check have in common.

    Args:
        prior: folder of a prior, the name of a bundled one, or a Hub id; or an analytic prior by class_path and init_args.
        operator: noiseless forward map, by class_path and init_args, or path/to/file.py:Name for your own.
        noise: noise model, by class_path and init_args, or path/to/file.py:Name for your own.
        dds: denoising sampler.
        proximal: proximal sampler; auto takes the most exact one that the forward model allows.
        annealing: coupling schedule; auto takes its ends from the prior and the noise.
        population: true for particles that are weighted and resampled, which gives separated modes their right weights;
            dpnp_inference.population.Population or dpnp_inference.replica_exchange.ReplicaExchange for settings of one's own.
        seed: of all randomness, not negative.
        batch_size: chains that run together; all by default.
        device: auto, cpu, cuda, cuda:1, mps, …
        precision: float32 and float64 for everything; bfloat16 and float16 for the network alone.
        output: folder to write.
        overwrite: replace an earlier run in that folder.
        trusted_modules: modules outside of this package whose network classes a prior may name.
    """

    prior: Denoiser | str = BUNDLED
    operator: Operator | Callable | None = None  # type: ignore[type-arg] # jsonargparse wants it bare
    noise: Noise | None = None
    dds: Literal["ddim", "ddpm"] | DenoisingSampler = "ddim"
    proximal: Literal["auto"] | NamedProximal = "auto"
    annealing: Literal["auto"] | Annealing = "auto"
    population: bool | Population | ReplicaExchange = False
    seed: int = 0
    batch_size: int | None = None
    device: str = "auto"
    precision: Precision = "float32"
    output: str | None = None
    overwrite: bool = False
    trusted_modules: list[str] | None = None

    def models(self, *, demo: bool) -> tuple[Denoiser, PriorCard, ForwardModel]:
        """Prior and forward model on their device, and the prior's card.

        Args:
            demo: whether the demo's forward model stands in where none is given.

        Raises:
            ValueError: there is no forward model, or half of one.
            PriorError: the prior cannot be loaded.
        """
        device = _device(self.device)
        prior = self.prior
        if isinstance(prior, str):
            prior = Prior.from_pretrained(prior, trusted_modules=self.trusted_modules or ())
        prior.to(device=device)
        if next(prior.parameters(), None) is not None:  # closed forms keep their own precision
            prior.to(dtype=getattr(torch, self.precision))
        card = prior.card if isinstance(prior, Prior) else PriorCard(type(prior).__name__, prior.image_shape)
        operator, noise = self.operator, self.noise
        if demo and (operator is None) != (noise is None):
            raise ValueError("operator and noise: give both or neither")
        if demo and operator is None:
            operator, noise = RandomInpainting(card.image_shape, missing=0.5, seed=0), GaussianNoise(0.05)
        if operator is None or noise is None:
            raise ValueError("operator and noise are both needed with a measurement or an image of your own")
        forward_model = ForwardModel(as_operator(operator, card.image_shape), noise)
        return prior, card, forward_model.to(device=device, dtype=self.image_dtype)

    def sampler(self, *, demo: bool) -> tuple[DPnP, PriorCard]:
        """The sampler on its device, and its prior's card; see :meth:`models`."""
        prior, card, forward_model = self.models(demo=demo)
        dpnp = DPnP(
            prior,
            forward_model,
            dds=self.dds,
            proximal=cast('Literal["auto"] | ProximalSampler', self.proximal),
            annealing=self.annealing,
            population=self.population,
            dtype=self.image_dtype,
        )
        return dpnp, card

    @property
    def image_dtype(self) -> torch.dtype:
        """Of images and kernels."""
        return torch.float64 if self.precision == "float64" else torch.float32


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


KINDS: dict[str, type[Check | CheckModel]] = {"check": Check, "check-model": CheckModel}
DESCRIPTIONS: dict[type[Configuration], str] = {
    Reconstruction: "Draw from the posterior of an image. Without arguments: the bundled demo. 'dpnp-reconstruct check-model' finds out "
    "whether a forward model keeps what it promises, 'dpnp-reconstruct check' whether the intervals do.",
    Check: "Do the intervals of a reconstruction hold what they promise? Truths are drawn from the prior, measured, and reconstructed. "
    "Without arguments: the bundled demo's configuration.",
    CheckModel: "Is the forward model what a sampler takes it for? It is tried on draws from the prior. The exit status is 1 if there is a "
    "problem. Without arguments: the bundled demo's.",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dpnp-reconstruct``.

    Args:
        args: command-line arguments; those of the process by default.

    Raises:
        SystemExit: with a non-zero status and one message, for any bad input; and with status 1 where a forward model that is checked
            has a problem.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_time=False, show_path=False, markup=False)]
    )
    for noisy in ("httpx", "huggingface_hub", "matplotlib", "filelock", "arviz.preview"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    kind: type[Check | CheckModel | Reconstruction] = KINDS.get("".join(arguments[:1]), Reconstruction)
    given = arguments if kind is Reconstruction else arguments[1:]
    parser = _parser(kind)
    try:
        settings = parser.parse_args([_resolve_argument(argument) for argument in given])
        built = parser.instantiate(settings)
        configuration = kind(**{field.name: built[field.name] for field in dataclasses.fields(kind)})
        config = name_user_files(json.loads(parser.dump(settings, format="json")))
        if isinstance(configuration, Check):
            _name_unused(kind, settings)
            _check(configuration, config, arguments)
        elif isinstance(configuration, CheckModel):
            _name_unused(kind, settings)
            _check_model(configuration, arguments)
        else:
            _reconstruct(configuration, config, arguments)
    except (PriorError, SamplingError, ImportError, ValueError, TypeError, OSError, RuntimeError) as error:
        if log.isEnabledFor(logging.DEBUG):
            raise
        sys.exit(f"dpnp-reconstruct: {error}")


def _parser(kind: type[Configuration]) -> ArgumentParser:
    here = Path.cwd()  # the parser goes to the folder of a configuration file while it reads it
    set_loader("dpnp_yaml", lambda text: resolve_user_files(yaml.safe_load(text), here))
    command = " ".join(["dpnp-reconstruct", *(name for name, other in KINDS.items() if other is kind)])
    parser = ArgumentParser(
        prog=command,
        usage=f"{command} [--config FILE] [options]; --help lists the options",
        parser_mode="dpnp_yaml",
        description=DESCRIPTIONS[kind],
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(kind)
    if kind is not Reconstruction:  # a reconstruction's config file is taken as it is
        for field in _unused(kind):
            parser.add_argument(f"--{field.name}", type=Any, default=field.default, help=SUPPRESS)
    return parser


def _unused(kind: type[Configuration]) -> list[dataclasses.Field[Any]]:
    """A reconstruction's options that a check has no use for."""
    known = {field.name for field in dataclasses.fields(kind)}
    return [field for field in dataclasses.fields(Reconstruction) if field.name not in known]


def _name_unused(kind: type[Configuration], settings: Namespace) -> None:
    names = [field.name for field in _unused(kind) if settings[field.name] != field.default]
    if names:
        log.info("%s: for a reconstruction, a check has no use for it", ", ".join(names))


def _resolve_argument(argument: str) -> str:
    """``--operator=file.py:Name`` and ``file.py:Name`` with the class path of the user's class."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{resolve_user_files(value)}"


def _reconstruct(settings: Reconstruction, config: dict[str, Any], arguments: list[str]) -> None:
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
        settings.image = str(_bundled_images(settings.prior))
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
            title=_title(dpnp, card),
        )
        record = {
            **_provenance(settings, dpnp, card, config, arguments),
            "network_calls": posterior.diagnostics["network_calls"],
            "forward_calls": posterior.diagnostics["forward_calls"],
            "seconds": posterior.diagnostics["seconds"],
            "scores": scores,
        }
        (folder / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _print_summary(posterior, scores, Path(settings.output))


def _check(settings: Check, config: dict[str, Any], arguments: list[str]) -> None:
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
        draw_calibration(folder / "picture.png", calibration, title=_title(dpnp, card))
        record = {**_provenance(settings, dpnp, card, config, arguments), "check": calibration.to_json()}
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


def _check_model(settings: CheckModel, arguments: list[str]) -> None:
    """Findings about a forward model, printed and kept."""
    given = settings.measurement is not None or settings.image is not None
    prior, card, forward_model = settings.models(demo=not given)
    y = images = None
    if settings.image is not None:
        shape = image_shape_of(prior, forward_model)
        images = read_image(settings.image, settings.index, shape, card, settings.key)[None]
    if settings.measurement is not None:
        y = read_measurement(settings.measurement, settings.key, forward_model, card)
    findings = check_model(
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
    print_findings(findings)
    if settings.json is not None:
        record = {"command": shlex.join(["dpnp-reconstruct", *arguments]), "problem": has_problem(findings)}
        listed = [dataclasses.asdict(finding) for finding in findings]
        Path(settings.json).write_text(json.dumps({**record, "findings": listed}, indent=2) + "\n", encoding="utf-8")
    if has_problem(findings):
        sys.exit(1)


def _title(dpnp: DPnP, card: PriorCard) -> str:
    return f"{card.name}: {type(dpnp.forward_model.operator).__name__}, {type(dpnp.forward_model.noise).__name__}"


def _provenance(
    settings: Configuration, dpnp: DPnP, card: PriorCard, config: dict[str, Any], arguments: list[str]
) -> dict[str, Any]:
    """Where a result comes from."""
    source = settings.prior if isinstance(settings.prior, str) else type(settings.prior).__name__
    return {
        "command": shlex.join(["dpnp-reconstruct", *arguments]),
        "config": config,
        "operator": repr(dpnp.forward_model.operator),
        "noise": repr(dpnp.forward_model.noise),
        "seed": settings.seed,
        "prior": {"name": card.name, "source": source, "sha256": card.sha256},
        "versions": {
            "dpnp-imaging": version("dpnp-imaging"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": str(dpnp.device),
    }


def _source(part: object) -> str | None:
    """Hash of the file that defines a part of the configuration, None for a part given by a name or left out."""
    if part is None or isinstance(part, str):
        return None
    try:
        file = inspect.getsourcefile(part if inspect.isroutine(part) else type(part))
    except TypeError:  # it is not written in Python
        return None
    return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()


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


def _device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes an accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def _bundled_images(prior: Denoiser | str) -> Path:
    """Held-out test images that lie beside a bundled prior."""
    file = locate(prior) / TEST_IMAGES if isinstance(prior, str) else None
    if file is None or not file.is_file():
        name = prior if isinstance(prior, str) else type(prior).__name__
        raise ValueError(f"the prior {name!r} has no test images of its own; give image or measurement")
    return file
