"""``path/to/file.py:Name``: the user's own operator or noise, without packaging anything."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import aslinearoperator

USER_FILE = re.compile(r"^(?P<file>[^\n]+\.py):(?P<name>[A-Za-z_]\w*)$")
AS_OPERATOR = "_as_operator"  # ends the name of what a matrix was made into

_files: dict[str, Path] = {}  # which file a module was made of, by the module's name


def resolve_user_files(value: Any, folder: Path | None = None) -> Any:
    """Replace every ``path/to/file.py:Name`` by an importable class path.

    The file is executed once, as a module of its own, and may import its neighbours. The name may be that of a class, a
    function, or an object that the file has made; a sparse matrix or an array ``(m, n)`` becomes a linear operator of SciPy.

    Args:
        value: a string, or a structure of lists and dictionaries of them.
        folder: where relative paths are looked for before the working directory, which is the configuration's own folder
            while one is read.

    Returns:
        The same structure.

    Raises:
        ValueError: the file does not exist, or has no such name.
    """
    if isinstance(value, dict):
        return {key: resolve_user_files(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_user_files(item, folder) for item in value]
    match = USER_FILE.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    candidates = [(start / Path(match["file"]).expanduser()).resolve() for start in (folder or Path(), Path())]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ValueError(f"{value!r}: the file {' or '.join(dict.fromkeys(map(str, candidates)))} does not exist")
    module_name = f"user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{value!r}: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    _files[module_name] = path
    module, name = sys.modules[module_name], match["name"]
    if not hasattr(module, name):
        raise ValueError(f"{value!r}: {path} defines no {name}")
    found = getattr(module, name)
    if sparse.issparse(found) or (isinstance(found, np.ndarray) and found.ndim == 2):
        name += AS_OPERATOR
        setattr(module, name, aslinearoperator(found))
    return f"{module_name}.{name}"


def name_user_files(value: Any) -> Any:
    """The inverse of :func:`resolve_user_files`, so that a configuration that is kept can be read by another process.

    Files in the working directory and below are named relative to it.
    """
    if isinstance(value, dict):
        return {key: name_user_files(item) for key, item in value.items()}
    if isinstance(value, list):
        return [name_user_files(item) for item in value]
    if isinstance(value, str):
        module_name, _, name = value.partition(".")
        if module_name in _files:
            path, here = _files[module_name], Path.cwd()
            file = path.relative_to(here) if path.is_relative_to(here) else path
            return f"{file}:{name.removesuffix(AS_OPERATOR)}"
    return value


def hash_user_files(value: Any) -> dict[str, str]:
    """SHA-256 of every file that a structure names as ``path/to/file.py:Name``, by its path."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return {path: digest for item in items for path, digest in hash_user_files(item).items()}
    match = USER_FILE.match(value) if isinstance(value, str) else None
    if match is None:
        return {}
    return {match["file"]: hashlib.sha256(Path(match["file"]).expanduser().read_bytes()).hexdigest()}
