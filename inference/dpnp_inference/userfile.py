"""``path/to/file.py:Name``: the user's own operator or noise, without packaging anything."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

USER_FILE = re.compile(r"^(?P<file>[^\n]+\.py):(?P<name>[A-Za-z_]\w*)$")


def resolve_user_files(value: Any) -> Any:
    """Replace every ``path/to/file.py:Name`` by an importable class path.

    The file is executed once, as a module of its own; a relative path is relative to the working directory.

    Args:
        value: a string, or a structure of lists and dictionaries of them.

    Returns:
        The same structure.

    Raises:
        ValueError: the file does not exist, or has no such name.
    """
    if isinstance(value, dict):
        return {key: resolve_user_files(item) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve_user_files(item) for item in value]
    match = USER_FILE.match(value) if isinstance(value, str) else None
    if match is None:
        return value
    path = Path(match["file"]).expanduser().resolve()
    if not path.is_file():
        raise ValueError(f"{value!r}: the file {path} does not exist")
    module_name = f"user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{value!r}: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    if not hasattr(sys.modules[module_name], match["name"]):
        raise ValueError(f"{value!r}: {path} defines no {match['name']}")
    return f"{module_name}.{match['name']}"
