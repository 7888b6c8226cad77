"""Foreign weight files, read without running anything that they hold, and put into a network without leaving a key over."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dpnp_shared.preconditioning import Preconditioning
from dpnp_shared.prior import PriorError


class Converted(NamedTuple):
    """What a foreign format says of a prior.

    Attributes:
        network: the network, its weights loaded.
        preconditioning: from the network's output to the denoiser.
        image_shape: ``(C, H, W)`` as far as the file tells; H = W = 0 if it does not.
        provenance: entries of the card's training section.
    """

    network: nn.Module
    preconditioning: Preconditioning
    image_shape: tuple[int, int, int]
    provenance: dict[str, Any]


def read_weights(file: Path, entry: str | None = None, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a ``.safetensors`` file or of a pickle (``.pt``, ``.pth``, ``.bin``, …), which may hold plain values only.

    Args:
        file: the file.
        entry: key of the state dict in a checkpoint that holds several things, with dots between levels.
        prefix: what each key of the state dict begins with; it is removed.

    Raises:
        PriorError: the file is missing or damaged, holds code, or is not a state dict.
    """
    if not file.is_file():
        raise PriorError(f"weights {file} do not exist")
    content: Any
    try:
        safe = file.suffix == ".safetensors"
        content = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise PriorError(f"{file} is not a safetensors file: {error}") from error
    except Exception as error:  # torch raises many types for damaged files; none may pass
        raise PriorError(
            f"{file} cannot be read safely: {error}. Only tensors and plain values are read; "
            "save the network's state dict (torch.save(network.state_dict(), file)) where the network came from"
        ) from error
    for name in entry.split(".") if entry else ():
        if not isinstance(content, dict) or name not in content:
            found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise PriorError(f"entry = {entry!r}: {file} has no {name!r}; it holds {_few(found)}")
        content = content[name]
    if not isinstance(content, dict) or not content:
        raise PriorError(f"{file} holds a {type(content).__name__}, not a state dict")
    strange = [
        f"{key} ({type(value).__name__})"
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if strange:
        raise PriorError(f"{file} is not a state dict, it holds {_few(strange)}; name the state dict in it by 'entry'")
    other = [key for key in content if not key.startswith(prefix)]
    if other:
        raise PriorError(f"prefix = {prefix!r}: {file} has keys that do not begin with it, {_few(other)}")
    return {key.removeprefix(prefix): value for key, value in content.items()}


def shape_of(weights: dict[str, Tensor], key: str, axes: int, file: Path) -> torch.Size:
    """Shape of an entry from which an architecture is read.

    Raises:
        PriorError: the entry is missing or does not have so many axes.
    """
    if key not in weights:
        raise PriorError(f"{file} is not a network of this format: the key {key} is missing")
    if weights[key].ndim != axes:
        raise PriorError(f"{file}: {key} has shape {tuple(weights[key].shape)}; {axes} axes are needed")
    return weights[key].shape


def fill(network: nn.Module, weights: dict[str, Tensor], file: Path) -> nn.Module:
    """Load weights into a network made on the meta device, in single precision.

    Args:
        network: the network.
        weights: its state dict, every key of it.
        file: for messages.

    Returns:
        The network, on the CPU.

    Raises:
        PriorError: names the keys that are missing or unknown, or the one whose shape or values are wrong.
    """
    expected = network.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        raise PriorError(
            f"{file} does not hold the weights of {type(network).__name__} with the given arguments; "
            f"missing keys: {_few(missing)}; unknown keys: {_few(unknown)}"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise PriorError(
                f"{file}: {key} has shape {tuple(value.shape)}, the network takes {tuple(expected[key].shape)}"
            )
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise PriorError(f"{file}: {key} holds {value.dtype} values that are not all finite real numbers")
    copies = {key: value.detach().to(torch.float32, copy=True).contiguous() for key, value in weights.items()}
    network.load_state_dict(copies, assign=True)
    return network


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _few(names: list[str] | str) -> str:
    """The first of many names, and how many there are."""
    if isinstance(names, str):
        return names
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
