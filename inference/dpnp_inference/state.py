"""A run's state: what of it has changed since it began, and files that hold it.

A state is made of dictionaries with names as keys, lists, tensors, numbers, strings and ``None``. In a file, tensors are kept by
safetensors, and the rest as JSON in its header with a hash of everything. Nothing that is loaded runs code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

State = dict[str, Any]

TENSOR, COMPLEX = "tensor:", "complex:"  # begin the string that stands for one in the JSON part
TEXT = "text:"  # begins a string that would otherwise look like one of these


class StateError(ValueError):
    """A file is not that of a state, or is damaged."""


def changes(value: Any, initial: Any) -> Any:
    """What of a kernel's state differs from the one that its ``init`` makes.

    Args:
        value: a NamedTuple, dataclass, tuple, list or dictionary of tensors, numbers and such structures. Modules and functions in it are
            what ``init`` gives again.
        initial: what ``init`` has given.

    Returns:
        A state for :func:`restored`: numbers, and the tensors that ``init`` has not made; ``{}`` where there are none.

    Raises:
        TypeError: a part is an object of another kind, which cannot be kept in a file.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if value is initial or isinstance(value, nn.Module) or (callable(value) and not isinstance(value, Tensor)):
        return {}
    if isinstance(value, Tensor):
        return value
    parts, before = _parts(value), _parts(initial)
    if parts is None or before is None or parts.keys() != before.keys() or type(value) is not type(initial):
        raise TypeError(
            f"a proximal sampler's state holds a {type(value).__name__}, which cannot be kept in a file; needed are NamedTuples, "
            "dataclasses, tuples and dictionaries, always of the same length, of tensors and numbers"
        )
    found = {name: changes(part, before[name]) for name, part in parts.items()}
    return {name: part for name, part in found.items() if not (isinstance(part, dict) and not part)}


def restored(initial: Any, changed: Any, device: torch.device) -> Any:
    """The state of which :func:`changes` was taken.

    Args:
        initial: what ``init`` gives.
        changed: what differs.
        device: of its tensors.
    """
    if isinstance(changed, Tensor):
        return changed.to(device)
    if not isinstance(changed, dict):
        return changed
    if not changed:
        return initial
    parts = _parts(initial)
    if parts is None or not changed.keys() <= parts.keys():
        raise StateError(f"the state has parts {sorted(changed)}, which a {type(initial).__name__} has not")
    new = {name: restored(parts[name], part, device) for name, part in changed.items()}
    if hasattr(initial, "_replace"):
        return initial._replace(**new)
    if dataclasses.is_dataclass(initial) and not isinstance(initial, type):
        return dataclasses.replace(initial, **new)
    parts |= new
    return parts if isinstance(initial, dict) else type(initial)(parts.values())


def _parts(value: Any) -> dict[str, Any] | None:
    if hasattr(value, "_asdict"):
        return dict(value._asdict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return {str(i): part for i, part in enumerate(value)}
    return dict(value) if isinstance(value, dict) and all(isinstance(key, str) for key in value) else None


def write_state(file: Path, state: State, about: State) -> None:
    """Write a state all or nothing: what lies there before stays if anything goes wrong.

    Args:
        file: where.
        state: it.
        about: what it is a state of, JSON-able.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps([about, _listed(state, "", tensors)])
    content = save(tensors, {"state": text, "sha256": _digest(text, tensors)})
    staged = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(staged, file)
        _sync_folder(file.parent)
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


def read_state(file: Path) -> tuple[State, State]:
    """The state in a file, and what it is a state of.

    Raises:
        StateError: it is not such a file, or what it holds is not what was written.
        FileNotFoundError: there is none.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 # it is no dictionary
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{file} is damaged: {error}") from error
    if "state" not in header or header.get("sha256") != _digest(header["state"], tensors):
        raise StateError(f"{file} is damaged: its content is not what its hash says")
    about, listed = json.loads(header["state"])
    return _unlisted(listed, tensors), about


def _listed(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON, with names in place of tensors, which are collected."""
    if isinstance(value, Tensor):
        kind, value = (COMPLEX, torch.view_as_real(value)) if value.is_complex() else (TENSOR, value)
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()  # safetensors takes no shared memory
        return f"{kind}{path}"
    if isinstance(value, Mapping):
        return {name: _listed(part, f"{path}.{name}" if path else name, tensors) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_listed(part, f"{path}.{i}", tensors) for i, part in enumerate(value)]
    return f"{TEXT}{value}" if isinstance(value, str) else value


def _unlisted(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return {name: _unlisted(part, tensors) for name, part in value.items()}
    if isinstance(value, list):
        return [_unlisted(part, tensors) for part in value]
    if not isinstance(value, str):
        return value
    if value.startswith(TEXT):
        return value.removeprefix(TEXT)
    if value.startswith(COMPLEX):
        return torch.view_as_complex(tensors[value.removeprefix(COMPLEX)])
    return tensors[value.removeprefix(TENSOR)]


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def bytes_of(x: Tensor) -> Any:
    """A tensor's numbers as bytes, for a hash."""
    return x.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8).numpy()


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power failure, where the system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
