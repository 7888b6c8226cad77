"""Packages that come with an extra."""

from __future__ import annotations

import importlib
from typing import Any


def load(module: str, extra: str) -> Any:
    """Import a module that only some data need.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"these data need {module}: pip install 'dpnp-imaging[{extra}]' ({error})") from error
