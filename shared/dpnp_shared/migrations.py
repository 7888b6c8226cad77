"""Versions of a prior's ``config.json``, and how an older one becomes the present one.

1. network, preconditioning and card; the weights' SHA-256 on the card.
2. adds ``written_by``, ``readme_sha256`` and ``content_sha256`` (see :func:`signature`), and on the card how its figures were measured
   (``validation``) and what rounding the weights cost (``precision``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

FORMAT_VERSION = 2
SIGNED_SINCE = 2  # the first version that must carry a signature
SIGNATURE = "content_sha256"


def _from_1(config: Config) -> Config:
    """Version 1 named no release; what it lacks on the card has defaults that say 'not known'."""
    return {**config, "written_by": "dpnp-imaging 0.1.0 or earlier"}


MIGRATIONS: dict[int, Callable[[Config], Config]] = {1: _from_1}
"""From a version to the next one."""


class VersionError(ValueError):
    """A format version that this release does not read."""


def migrate(config: Config) -> Config:
    """The configuration in the present format version; the argument is left as it is.

    Args:
        config: of any version.

    Raises:
        VersionError: the version is newer than this release, or none that ever was.
    """
    version = config.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise VersionError(
            f"format_version is {version}, written by {config.get('written_by', 'a newer release')}; "
            f"this release reads up to {FORMAT_VERSION}: upgrade dpnp-imaging"
        )
    known = [*sorted(MIGRATIONS), FORMAT_VERSION]
    if isinstance(version, bool) or version not in known:
        raise VersionError(f"format_version is {version!r}; this release reads {', '.join(map(str, known))}")
    while version < FORMAT_VERSION:
        config = MIGRATIONS[version](config)
        version += 1
    return {**config, "format_version": FORMAT_VERSION}


def signature(config: Config) -> str:
    """SHA-256 of everything in ``config.json`` but the signature itself, as JSON with sorted keys.

    The configuration holds the hashes of the weights and of the README, so that it stands for the whole content. It shows that something
    was changed after it was written, not who wrote it.
    """
    content = {key: value for key, value in config.items() if key != SIGNATURE}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
