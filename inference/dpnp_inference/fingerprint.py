"""What a run's draws depend on, as names and values that can be compared, so that a state is never continued under other settings."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpnp_inference.state import bytes_of

OWN = ("dpnp_", "torch.", "builtins", "functools")  # modules whose version says what their code is
SHOWN = 4  # differences that a message lists
MODULE_PARTS = ("training", "call_super_init", "dump_patches")


def describe(value: Any) -> Any:
    """A JSON-able description of a value, the same for equal ones in any process.

    Tensors are described by their hash; modules and other objects by their class, parameters, buffers and public attributes; classes and
    functions that are not of this package by their source as well.

    Args:
        value: anything that a prior, a forward model or a sampler is made of.
    """
    return _describe(value, ())


def _describe(value: Any, inside: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # JSON has no infinity
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            value = value.to_dense()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bytes_of(value)).hexdigest()[:16]}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]}"
    if id(value) in inside:
        return "itself"
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return {str(key): _describe(item, inside) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {"class": _source_of(type(value)), **_describe(value._asdict(), inside)}
    if isinstance(value, list | tuple):
        return [_describe(item, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_describe(item, inside)) for item in value)
    if isinstance(value, functools.partial):
        return {"function": _describe([value.func, value.args, value.keywords], inside)}
    if isinstance(value, types.MethodType):
        return {"method": value.__name__, "of": _describe(value.__self__, inside)}
    if isinstance(value, type) or inspect.isroutine(value):
        return _source_of(value)
    if dataclasses.is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, nn.Module):
        parts = {**value._parameters, **value._buffers, **value._modules, **_public(value)}
    elif hasattr(value, "__dict__"):
        parts = _public(value)
    else:
        return str(value)
    return {"class": _source_of(type(value)), **{name: _describe(part, inside) for name, part in sorted(parts.items())}}


def _public(value: Any) -> dict[str, Any]:
    """Attributes of an instance, without what is private or computed once it is asked for."""
    cached = {
        name
        for owner in type(value).__mro__
        for name, part in vars(owner).items()
        if isinstance(part, functools.cached_property)
    }
    return {
        name: part
        for name, part in vars(value).items()
        if not name.startswith("_") and name not in cached and name not in MODULE_PARTS
    }


def _source_of(thing: Any) -> str:
    """Name of a class or function, with a hash of its source where no version stands for it."""
    module, name = getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", str(thing))
    if module.startswith(OWN):
        return f"{module}.{name}"
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):  # it was typed in, or is not written in Python
        return f"{module}.{name}"
    return f"{module}.{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}"


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in words such as ``seed: 0 there, 1 here``."""
    a, b = _flat(there), _flat(here)
    names = [name for name in {**a, **b} if a.get(name, "nothing") != b.get(name, "nothing")]
    found = [f"{name}: {a.get(name, 'nothing')} there, {b.get(name, 'nothing')} here" for name in names[:SHOWN]]
    return found + ([f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else [])


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {path: value}
    found: dict[str, Any] = {}
    for name, item in items:
        found |= _flat(item, f"{path}.{name}" if path else name)
    return found
