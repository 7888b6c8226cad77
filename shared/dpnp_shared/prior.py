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
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpnp_shared.denoiser import Denoiser, expand_sigma
from dpnp_shared.folders import staged_folder
from dpnp_shared.preconditioning import Preconditioning

FORMAT_VERSION = 1
CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
TRUSTED = ("dpnp_shared.networks", "dpnp_shared.preconditioning")


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

    def markdown(self) -> str:
        """The card as the README that a model hub shows."""
        c, h, w = self.image_shape
        rows = [
            ("images", f"{c} x {h} x {w} (C x H x W), values in [{self.value_range[0]:g}, {self.value_range[1]:g}]"),
            ("mapped from", f"[{self.source_range[0]:g}, {self.source_range[1]:g}] in the data"),
            ("noise levels", f"{self.sigma_range[0]:g} to {self.sigma_range[1]:g}, in the same units"),
            ("spread", f"{self.spread:.4g} along the widest direction, {self.data_std:.4g} a pixel"),
            ("data", self.dataset),
            ("licence", self.license),
            *((f"training: {key}", f"`{value}`") for key, value in self.training.items()),
            *((f"measured: {key}", f"{value:.4g}") for key, value in self.metrics.items()),
            ("weights", f"`{WEIGHTS}`, SHA-256 `{self.sha256}`"),
        ]
        table = "\n".join(f"| {key} | {value} |" for key, value in rows)
        header = "---\nlibrary_name: dpnp-imaging\ntags: [diffusion, score-based, inverse-problems, prior]\n---\n\n"
        text = f"{header}# {self.name}\n\nAn unconditional score network for posterior sampling with DPnP.\n\n| | |\n|---|---|\n{table}\n"
        usage = (
            '\n```python\nfrom dpnp_shared import Prior\n\nprior = Prior.from_pretrained("path/to/this/folder")\n```\n'
        )
        return text + usage + (f"\n{self.notes.strip()}\n" if self.notes else "")


class Prior(Denoiser):
    """A trained score network, seen as a denoiser.

    Args:
        network: maps ``(c_in x, c_noise)`` to a tensor shaped like ``x`` and names its constructor's arguments
            in ``hyperparameters``.
        preconditioning: turns the network's output into ``D(x; sigma)``.
        card: what the prior is.

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

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """``D(x; sigma)``; see :class:`~dpnp_shared.denoiser.Denoiser`.

        Raises:
            ValueError: σ is outside of the card's range, or ``x`` is not ``(B, C, H, W)`` with the card's C.
        """
        if x.ndim != 4 or x.shape[1] != self.image_shape[0]:
            raise ValueError(f"x has shape {tuple(x.shape)}; this prior takes (B, {self.image_shape[0]}, H, W)")
        self.check_sigma(sigma)
        return denoise(self.network, self.preconditioning, x, sigma)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the portable folder, all of it or nothing.

        Args:
            directory: folder to create; one that holds a prior already is replaced.

        Returns:
            The folder.

        Raises:
            PriorError: ``directory`` exists and is not a prior's folder, or a weight is not finite.
        """
        target = Path(directory)
        if target.exists() and not (target / CONFIG).is_file() and (not target.is_dir() or any(target.iterdir())):
            raise PriorError(f"{target} exists and is not a prior's folder; nothing was written")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise PriorError(f"{len(broken)} weights are not finite, the first is {broken[0]}; nothing was written")
        with staged_folder(target) as staging:
            save_file(weights, staging / WEIGHTS)
            (staging / WEIGHTS).chmod(0o644)  # safetensors makes files that only their owner can read
            card = dataclasses.replace(self.card, sha256=_sha256(staging / WEIGHTS))
            config = {
                "format_version": FORMAT_VERSION,
                "network": describe(self.network),
                "preconditioning": describe(self.preconditioning),
                "card": dataclasses.asdict(card),
            }
            (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            (staging / README).write_text(card.markdown(), encoding="utf-8")
            if target.exists():  # what else the folder holds (pictures, test images) is kept
                for item in target.iterdir():
                    if item.name not in (CONFIG, WEIGHTS, README):
                        (shutil.copytree if item.is_dir() else shutil.copy2)(item, staging / item.name)
        self.card = card
        return target

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        device: str | torch.device | None = None,
        trusted_modules: Sequence[str] = (),
    ) -> Prior:
        """Load a prior from a folder, the name of a bundled prior, or a Hub id.

        Args:
            path_or_hub_id: a folder; ``fashion_mnist`` for the bundled prior; or ``organisation/name`` on the Hub.
            device: where to put it, the CPU by default.
            trusted_modules: modules outside of this package whose network or preconditioning classes may be imported.

        Returns:
            The prior in evaluation mode, its parameters frozen.

        Raises:
            PriorError: the folder is missing or damaged; says which file, key or shape is wrong.
        """
        folder = locate(str(path_or_hub_id))
        config = _read_config(folder)
        try:
            card = PriorCard(**config["card"])
            network = build(config["network"], trusted_modules)
            preconditioning = build(config["preconditioning"], trusted_modules)
        except (KeyError, TypeError, ValueError) as error:
            raise PriorError(f"{folder / CONFIG}: {type(error).__name__}: {error}") from error
        if not isinstance(preconditioning, Preconditioning):
            raise PriorError(f"{folder / CONFIG}: {config['preconditioning']['class_path']} is not a Preconditioning")
        _load_weights(network, folder / WEIGHTS, card.sha256)
        prior = cls(network, preconditioning, card).eval().requires_grad_(False)
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


def locate(name: str) -> Path:
    """The folder of a prior: a path, then a bundled prior, then a Hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    here = Path(__file__).resolve()
    for root in (here.parents[2] / "priors", here.parent / "priors"):
        if (root / name / CONFIG).is_file():
            return root / name
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise PriorError(
            f"prior {name!r}: no such folder, no bundled prior of that name, and not a Hub id 'organisation/name'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, README]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise PriorError(f"prior {name!r}: no such folder, and the Hub could not give it: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, its version checked."""
    file = folder / CONFIG
    if not file.is_file():
        raise PriorError(f"{file} is missing; a prior's folder holds {CONFIG}, {WEIGHTS} and {README}")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PriorError(f"{file} is not valid JSON: {error}") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise PriorError(f"{file}: format_version is {version!r}; this release reads {FORMAT_VERSION}")
    return config


def _load_weights(network: nn.Module, file: Path, sha256: str) -> None:
    """Load the weights after checking hash, keys, shapes and values."""
    if not file.is_file():
        raise PriorError(f"{file} is missing; a prior is never used with random weights")
    found = _sha256(file)
    if found != sha256:
        raise PriorError(f"{file}: its SHA-256 is {found}, the card says {sha256!r}; the file was changed or damaged")
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
    network.to(dtype=next(iter(weights.values())).dtype).load_state_dict(weights)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
