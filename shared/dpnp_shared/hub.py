"""Fetching files from the Hugging Face Hub (or from the mirror that ``HF_ENDPOINT`` names), with errors that say what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

HOST = "https://huggingface.co"


class HubError(RuntimeError):
    """The Hub could not do what was asked."""


def endpoint() -> str:
    """Address of the Hub: ``HF_ENDPOINT``, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or HOST).rstrip("/")


def split_revision(name: str) -> tuple[str, str | None]:
    """``organisation/name@revision`` as ``(organisation/name, revision)``."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def download(repository: str, revision: str | None, files: Sequence[str]) -> tuple[Path, str]:
    """Some files of a model repository, by the Hub's own cache.

    Args:
        repository: ``organisation/name``.
        revision: branch, tag or commit; the main branch by default.
        files: names to fetch, where they exist.

    Returns:
        The cached folder, and the commit it holds.

    Raises:
        HubError: says whether the repository, the revision, the login or the network is missing.
    """
    from huggingface_hub import snapshot_download

    with explained(repository, revision):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(files), endpoint=endpoint()))
    if not folder.is_dir():  # nothing was fetched
        raise HubError(
            f"{repository} at {endpoint()}: revision {revision or 'main'!r} holds none of {', '.join(files)}"
        )
    return folder, folder.name  # the cache names a snapshot by its commit


@contextmanager
def explained(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises into one :class:`HubError` that names the cause; tokens are never part of it."""
    from huggingface_hub.errors import HfHubHTTPError

    # the base class of the HTTP client in use, which differs between releases
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        yield
    except HubError:
        raise
    except (ValueError, RuntimeError, http_error, OSError) as error:
        reason = re.sub(r"hf_\w{6,}", "hf_…", _reason(error, revision))
        raise HubError(f"{repository} at {endpoint()}: {reason}") from None


def _reason(error: BaseException, revision: str | None) -> str:
    from huggingface_hub import errors

    login = "log in by `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"not logged in; {login}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE)"
    if isinstance(error, errors.GatedRepoError):
        return f"access is granted on request, on the repository's page; then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one; for a private one {login}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"cannot be reached, and revision {revision or 'main'!r} is not in the local cache"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"not logged in, or the token is no longer valid; {login}"
        if status == 403:
            return "this login may not do that; it needs a token with write access to the repository"
        return f"the Hub answered with status {status}: {error.server_message or 'no message'}"
    if isinstance(error, ValueError):  # an invalid name or card, found before or after asking
        return f"refused: {error}"
    if isinstance(error, RuntimeError):  # the transfer of a large file
        return f"{error} {error.__cause__ or ''}".strip()
    return f"cannot be reached: {type(error).__name__}: {error}"
