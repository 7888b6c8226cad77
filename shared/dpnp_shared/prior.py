"""The portable prior: a folder that any team can load, check and trust.

``config.json`` says what the prior is, ``model.safetensors`` holds the weights of the exponential moving average, ``README.md`` is
the card people read. Nothing in the folder is ever executed: the network and the preconditioning are named by class path, and a class
from outside of this package is imported only if the caller lists its module as trusted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpnp_shared import model_card
from dpnp_shared.denoiser import Denoiser, expand_sigma
from dpnp_shared.folders import staged_folder
from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.hub import HubError, download, split_revision
from dpnp_shared.migrations import FORMAT_VERSION, SIGNATURE, SIGNED_SINCE, VersionError, migrate, signature
from dpnp_shared.preconditioning import Preconditioning

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, README, SAMPLES = "config.json", "model.safetensors", "README.md", "samples.png"
FILES = (CONFIG, WEIGHTS, README, SAMPLES)
TRUSTED = ("dpnp_shared.networks", "dpnp_shared.preconditioning", "dpnp_shared.gaussian_field")


class PriorError(RuntimeError):
    """A prior's folder is missing, damaged, or not what it says it is."""


@dataclass
class PriorCard:
    """What a user must know before trusting a prior.

    Attributes:
        name: short name, also the card's title.
        image_shape: ``(C, H, W)`` it was trained at.
        value_range: ``(low, high)`` of a pixel, the range the network was trained in.
        source_range: ``(low, high)`` of the data's own values, which were mapped linearly onto ``value_range``.
        sigma_range: ``(low, high)`` noise levels the prior may be used at, in image units.
        data_std: standard deviation of all pixel values of the data, in image units.
        spread: standard deviation of the data along its widest direction, in image units.
        dataset: which data, and how much of it.
        license: licence of weights and data.
        training: how it was trained: command, images seen, versions.
        metrics: measured figures, by name.
        validation: how the figures by noise band were measured (data, number of images, noise seed), so that they can be measured again.
        precision: what the weights were rounded to, and how much ``D(x; sigma)`` changed by it.
        notes: free text (Markdown) that the card shows below its figures.
        sha256: hash of the weights file, set on saving and checked on loading.
    """

    name: str
    image_shape: tuple[int, int, int]
    value_range: tuple[float, float] = (-1.0, 1.0)
    source_range: tuple[float, float] = (0.0, 255.0)
    sigma_range: tuple[float, float] = (0.002, 80.0)
    data_std: float = 0.5
    spread: float = 1.0
    dataset: str = "not stated"
    license: str = "not stated"
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        self.image_shape = (int(self.image_shape[0]), int(self.image_shape[1]), int(self.image_shape[2]))
        self.value_range = (float(self.value_range[0]), float(self.value_range[1]))
        self.source_range = (float(self.source_range[0]), float(self.source_range[1]))
        self.sigma_range = (float(self.sigma_range[0]), float(self.sigma_range[1]))
        problems = []
        if min(self.image_shape) < 1:
            problems.append(f"image_shape = {self.image_shape} must be three positive numbers")
        for key, (low, high) in (("value_range", self.value_range), ("source_range", self.source_range)):
            if not low < high:
                problems.append(f"{key} = {(low, high)} must increase")
        if not 0 < self.sigma_range[0] < self.sigma_range[1] < math.inf:
            problems.append(f"sigma_range = {self.sigma_range} must be positive and increase")
        if not (0 < self.data_std < math.inf and 0 < self.spread < math.inf):
            problems.append(f"data_std = {self.data_std} and spread = {self.spread} must be positive and finite")
        if problems:
            raise ValueError("prior card: " + "; ".join(problems))

    def markdown(self, picture: str | None = None) -> str:
        """The card as the README that a model hub shows.

        Args:
            picture: name of a picture of samples in the prior's folder.
        """
        return model_card.markdown(self, weights=WEIGHTS, picture=picture)


class Prior(Denoiser):
    """A trained score network, seen as a denoiser.

    Args:
        network: maps ``(c_in x, c_noise)`` to a tensor shaped like ``x`` and names its constructor's arguments
            in ``hyperparameters``.
        preconditioning: turns the network's output into ``D(x; sigma)``.
        card: what the prior is.

    Attributes:
        origin: where it was loaded from: a folder, or ``organisation/name@commit``; empty if it was not loaded.

    Raises:
        ValueError: the card's noise levels exceed those of the preconditioning.
    """

    def __init__(self, network: nn.Module, preconditioning: Preconditioning, card: PriorCard) -> None:
        super().__init__()
        low, high = card.sigma_range
        if low < preconditioning.sigma_min * (1 - 1e-6) or high > preconditioning.sigma_max * (1 + 1e-6):
            raise ValueError(
                f"the card's sigma_range {card.sigma_range} exceeds that of the preconditioning, "
                f"[{preconditioning.sigma_min:g}, {preconditioning.sigma_max:g}]"
            )
        self.network = network
        self.preconditioning = preconditioning
        self.card = card
        self.image_shape = card.image_shape
        self.sigma_min, self.sigma_max = card.sigma_range
        self.spread = card.spread
        self.origin = ""

    @property
    def noise_field(self) -> GaussianField | None:
        """See :class:`~dpnp_shared.denoiser.Denoiser`."""
        return self.preconditioning.noise_field

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """``D(x; sigma)``; see :class:`~dpnp_shared.denoiser.Denoiser`.

        Raises:
            ValueError: σ is outside of the card's range, or ``x`` is not ``(B, C, H, W)`` with the card's C.
        """
        if x.ndim != 4 or x.shape[1] != self.image_shape[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}; this prior takes (B, {self.image_shape[0]}, H, W)")
        self.check_sigma(sigma)
        return denoise(self.network, self.preconditioning, x, sigma)

    def save_pretrained(self, directory: str | Path, *, files: Mapping[str, bytes] | None = None) -> Path:
        """Write the portable folder, all of it or nothing.

        Args:
            directory: folder to create; one that holds a prior already is replaced, what else it holds is kept.
            files: contents of further files by name, such as ``samples.png``.

        Returns:
            The folder.

        Raises:
            PriorError: ``directory`` exists and is not a prior's folder, or a weight is not finite.
        """
        weights = to_weights(self.network)
        description = {"network": describe(self.network), "preconditioning": describe(self.preconditioning)}
        self.card = write_folder(Path(directory), description, self.card, weights, files or {})
        return Path(directory)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trusted_modules: Sequence[str] = (),
    ) -> Prior:
        """Load a prior from a folder, the name of a bundled prior, or a Hub id.

        Args:
            path_or_hub_id: a folder; ``fashion_mnist`` for the bundled prior; or ``organisation/name`` on the Hub, also with a revision
                as ``organisation/name@revision``.
            revision: branch, tag or (best) commit on the Hub.
            device: where to put it, the CPU by default.
            dtype: precision to compute in; float32 by default, or float64 if the weights are stored so.
            trusted_modules: modules outside of this package whose network or preconditioning classes may be imported.

        Returns:
            The prior in evaluation mode, its parameters frozen.

        Raises:
            PriorError: the folder is missing, damaged or was edited; says which file, key or shape is wrong.
        """
        folder, origin = _locate(str(path_or_hub_id), revision)
        config = read_config(folder)
        if "task" in config.get("card", {}):
            raise PriorError(
                f"{folder} holds a task-dependent denoiser, which is no prior; dpnp_shared.task.TrainedTaskDenoiser loads it, for UCoS"
            )
        try:
            card = PriorCard(**config["card"])
            network = build(config["network"], trusted_modules)
            preconditioning = build(config["preconditioning"], trusted_modules)
        except (KeyError, TypeError, ValueError) as error:
            raise PriorError(f"{folder / CONFIG}: {type(error).__name__}: {error}") from error
        if not isinstance(preconditioning, Preconditioning):
            raise PriorError(f"{folder / CONFIG}: {config['preconditioning']['class_path']} is not a Preconditioning")
        stored = load_weights(network, folder / WEIGHTS, card.sha256)
        network.to(dtype if dtype is not None else torch.promote_types(stored, torch.float32))
        prior = cls(network, preconditioning, card).eval().requires_grad_(False)
        prior.origin = origin
        prior.to(memory_format=torch.channels_last)  # faster convolutions
        return prior if device is None else prior.to(device)


def denoise(network: nn.Module, preconditioning: Preconditioning, x: Tensor, sigma: float | Tensor) -> Tensor:
    """``D(x; σ)`` of a raw network (Karras et al. 2022, equation 7); the one place where it is written.

    Args:
        network: ``F``.
        preconditioning: the four coefficients.
        x: ``(B, C, H, W)``.
        sigma: float, 0-d or ``(B,)``.

    Returns:
        ``(B, C, H, W)``, in the dtype of ``x`` whatever the network computes in.
    """
    level = expand_sigma(sigma, x)
    c = preconditioning.coefficients(level)
    dtype = next(network.parameters()).dtype
    output: Tensor = network((c.c_in * x).to(dtype), c.c_noise.flatten().expand(x.shape[0]))
    return c.c_skip * x + c.c_out * output.to(x.dtype)


def describe(module: nn.Module) -> dict[str, Any]:
    """Class path and arguments of a module that names its ``hyperparameters``, nested modules included."""
    arguments = getattr(module, "hyperparameters", None)
    if not isinstance(arguments, dict):
        raise PriorError(
            f"{type(module).__name__} has no dictionary 'hyperparameters' of its constructor's arguments, "
            "which a portable prior must store"
        )
    init_args = {key: describe(value) if isinstance(value, nn.Module) else value for key, value in arguments.items()}
    return {"class_path": f"{type(module).__module__}.{type(module).__qualname__}", "init_args": init_args}


def build(description: dict[str, Any], trusted_modules: Sequence[str]) -> nn.Module:
    """The inverse of :func:`describe`, for trusted modules only."""
    module_name, _, class_name = description["class_path"].rpartition(".")
    trusted = (*TRUSTED, *trusted_modules)
    if not any(module_name == name or module_name.startswith(f"{name}.") for name in trusted):
        raise PriorError(
            f"the prior names the class {description['class_path']}, which would be imported from outside of the trusted "
            f"modules {', '.join(trusted)}; pass trusted_modules=({module_name!r},) if you trust it"
        )
    built = getattr(importlib.import_module(module_name), class_name, None)
    if not (isinstance(built, type) and issubclass(built, nn.Module)):
        raise PriorError(f"{description['class_path']} is not a torch.nn.Module")
    arguments = {
        key: build(value, trusted_modules) if isinstance(value, dict) and "class_path" in value else value
        for key, value in description["init_args"].items()
    }
    return built(**arguments)


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a prior: a path, then a bundled prior, then a Hub id (``organisation/name`` or ``organisation/name@revision``).

    Raises:
        PriorError: it is none of them, or the Hub could not give it; or a revision is asked of what is not on the Hub.
    """
    return _locate(name, revision)[0]


def _locate(name: str, revision: str | None) -> tuple[Path, str]:
    """Folder and origin."""
    path = Path(name).expanduser()
    here = Path(__file__).resolve()
    for folder, found in (
        (path, path.is_dir()),
        *(
            (root / name, (root / name / CONFIG).is_file())
            for root in (here.parents[2] / "priors", here.parent / "priors")
        ),
    ):
        if found:
            if revision is not None:
                raise PriorError(
                    f"revision = {revision!r}: only priors on the Hub have revisions, {folder} is a folder"
                )
            return folder, str(folder)
    repository, named = split_revision(name)
    if path.is_absolute() or name.startswith(".") or repository.count("/") != 1:
        raise PriorError(
            f"prior {name!r}: no such folder, no bundled prior of that name, and not a Hub id 'organisation/name'"
        )
    if named is not None and revision not in (None, named):
        raise PriorError(f"prior {name!r} names a revision, and revision = {revision!r} another one")
    try:
        folder, commit = download(repository, named or revision, (CONFIG, WEIGHTS, README))
    except HubError as error:
        raise PriorError(f"prior {name!r}: no such folder, and the Hub could not give it: {error}") from error
    return folder, f"{repository}@{commit}"


def read_config(folder: Path, *, quiet: bool = False) -> dict[str, Any]:
    """``config.json`` in the present format, its version and signature checked.

    Args:
        folder: of the prior.
        quiet: do not say in the log that the format is old or unsigned.

    Raises:
        PriorError: the file is missing or damaged, of a version that this release does not read, or was edited.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise PriorError(f"{file} is missing; a prior's folder holds {CONFIG}, {WEIGHTS} and {README}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PriorError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise PriorError(f"{file} holds a JSON {type(config).__name__}, not an object")
    try:
        present = migrate(config)
    except VersionError as error:
        raise PriorError(f"{file}: {error}") from error
    version = config["format_version"]
    if version >= SIGNED_SINCE and config.get(SIGNATURE) != (found := signature(config)):
        raise PriorError(
            f"{file}: its {SIGNATURE} is {config.get(SIGNATURE)!r}, its content's is {found}; the card or the network's "
            "description was changed after it was written"
        )
    if version < FORMAT_VERSION and not quiet:
        log.warning(
            "%s is of format version %d and was read as version %d%s; `dpnp-prior migrate` writes it so",
            folder, version, FORMAT_VERSION, "" if SIGNATURE in config else ", without a signature of its content",
        )  # fmt: skip
    return present


def write_folder(
    target: Path,
    description: dict[str, Any],
    card: PriorCard,
    weights: Mapping[str, Tensor] | Path,
    files: Mapping[str, bytes],
) -> PriorCard:
    """Write a prior's folder in the present format, all of it or nothing; what else ``target`` holds is kept.

    Args:
        target: a new folder, an empty one, or one that holds a prior.
        description: ``network`` and ``preconditioning``, by :func:`describe`.
        card: its hash is set anew.
        weights: tensors by name, or a safetensors file to copy as it is.
        files: contents of further files by name.

    Returns:
        The card with the weights' hash.

    Raises:
        PriorError: ``target`` exists and is not a prior's folder.
    """
    check_target(target)
    with staged_folder(target) as staging:
        if isinstance(weights, Path):
            shutil.copyfile(weights, staging / WEIGHTS)
        else:
            save_file(dict(weights), staging / WEIGHTS)
        (staging / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner can read
        card = dataclasses.replace(card, sha256=sha256(staging / WEIGHTS))
        same_weights = (target / WEIGHTS).is_file() and sha256(target / WEIGHTS) == card.sha256
        for name, content in files.items():
            (staging / name).write_bytes(content)
        keep_others(target, staging)
        # a picture that is left over from other weights is not shown
        picture = SAMPLES if SAMPLES in files or (same_weights and (staging / SAMPLES).is_file()) else None
        (staging / README).write_text(card.markdown(picture), encoding="utf-8")
        config = {
            "format_version": FORMAT_VERSION,
            "written_by": f"dpnp-imaging {release()}",
            "network": description["network"],
            "preconditioning": description["preconditioning"],
            "card": dataclasses.asdict(card),
            "readme_sha256": sha256(staging / README),
        }
        # what is signed is what will be read: tuples become lists
        config = json.loads(json.dumps(config))
        config[SIGNATURE] = signature(config)
        (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return card


def check_target(target: Path) -> None:
    """Refuse to write over anything but a prior.

    Raises:
        PriorError: ``target`` exists, is not empty, and holds no prior.
    """
    if target.exists() and not (target / CONFIG).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise PriorError(f"{target} exists and is not a prior's folder; nothing was written")


def keep_others(target: Path, staging: Path) -> None:
    """Copy what ``target`` holds and ``staging`` does not (pictures, test images), the prior's own files left out."""
    for item in target.iterdir() if target.exists() else ():
        if item.name not in (CONFIG, WEIGHTS, README) and not (staging / item.name).exists():
            (shutil.copytree if item.is_dir() else shutil.copy2)(item, staging / item.name)


def release() -> str:
    """The version of the installed distribution."""
    try:
        return metadata.version("dpnp-imaging")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def to_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as a folder holds them.

    Raises:
        PriorError: a value is not finite.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise PriorError(f"{len(broken)} weights are not finite, the first is {broken[0]}; nothing was written")
    return weights


def load_weights(network: nn.Module, file: Path, expected_sha256: str) -> torch.dtype:
    """Load the weights after checking hash, keys, shapes and values; returns the precision they are stored in."""
    if not file.is_file():
        raise PriorError(f"{file} is missing; a prior is never used with random weights")
    found = sha256(file)
    if found != expected_sha256:
        raise PriorError(
            f"{file}: its SHA-256 is {found}, the card says {expected_sha256!r}; the file was changed or damaged"
        )
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise PriorError(f"{file} is not a safetensors file: {error}") from error
    expected = network.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise PriorError(f"{file}: missing weights {missing[:3]}, unknown weights {unknown[:3]}")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise PriorError(
                f"{file}: {name} has shape {tuple(value.shape)}, the network takes {tuple(expected[name].shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise PriorError(f"{file}: {name} contains values that are not finite")
    stored = next((value.dtype for value in weights.values() if value.is_floating_point()), torch.float32)
    network.to(stored).load_state_dict(weights)
    return stored


def sha256(file: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
