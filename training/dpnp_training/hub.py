"""Priors on the Hugging Face Hub: pushing a folder, pulling one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from dpnp_shared.folders import staged_folder
from dpnp_shared.hub import HubError, download, endpoint, explained
from dpnp_shared.migrations import SIGNATURE
from dpnp_shared.prior import CONFIG, FILES, Prior, PriorError, check_target, keep_others
from dpnp_training.verify import check_folder

HUB = "hub.json"
"""Written beside a prior: which repository, revision and content it was pushed to or pulled from."""


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    trusted_modules: Sequence[str] = (),
) -> str:
    """Upload a prior in one commit: its configuration, weights, card and picture, and nothing else that the folder holds.

    The login is the Hub's own (``HF_TOKEN`` or ``hf auth login``); ``HF_ENDPOINT`` names another Hub. Which commit it became is written
    to ``hub.json`` in the folder.

    Args:
        folder: of the prior; it is checked first.
        repository: ``organisation/name``, made if it does not exist.
        private: make it private; an existing public repository is refused.
        revision: branch to commit to, made if it does not exist; the main branch by default.
        message: of the commit.
        trusted_modules: modules outside of this package whose classes may be imported.

    Returns:
        The commit's hash.

    Raises:
        PriorError: the folder is not in order.
        HubError: the Hub refused or could not be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    path = Path(folder).expanduser()
    if not path.is_dir():
        raise PriorError(f"folder {str(path)!r} does not exist")
    prior, _, failed = check_folder(str(path), trusted_modules=trusted_modules)
    signature = _signature(path)
    if signature is None:
        failed.append("the folder is of an older format; bring it to the present one by `dpnp-prior migrate`")
    if failed:
        raise PriorError(f"{path} was not pushed: " + "; ".join(failed))
    if repository.count("/") != 1:
        raise HubError(f"repository = {repository!r}; needed is 'organisation/name'")
    api = HfApi(endpoint=endpoint(), library_name="dpnp-imaging")
    with explained(repository, revision):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise HubError(f"{repository} at {endpoint()}: exists and is public; nothing was pushed")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        # one commit, so that weights and card never part; upload_folder may make several
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, str(path / name)) for name in FILES if (path / name).is_file()],
            commit_message=message or f"Prior {prior.card.name}, content {signature[:12] if signature else ''}",
            revision=revision,
        )
    _record(path, repository, commit.oid, signature)
    return commit.oid


def pull(
    repository: str, directory: str | Path, *, revision: str | None = None, trusted_modules: Sequence[str] = ()
) -> str:
    """Download a prior into a folder of its own, after all checks.

    Args:
        repository: ``organisation/name``.
        directory: the folder to make; one that was pulled from the same repository before is brought up to date.
        revision: branch, tag or (best) commit; the main branch by default.
        trusted_modules: modules outside of this package whose classes may be imported.

    Returns:
        The commit's hash, which is also written to ``hub.json`` in the folder.

    Raises:
        PriorError: what came is not a prior in order, or ``directory`` holds something else.
        HubError: the Hub refused or could not be reached.
    """
    target = Path(directory).expanduser()
    check_target(target)
    if (target / CONFIG).is_file() and pulled_from(target)[0] != repository:
        raise PriorError(f"{target} holds a prior that did not come from {repository}; choose another directory")
    source, commit = download(repository, revision, FILES)
    Prior.from_pretrained(source, trusted_modules=trusted_modules)
    with staged_folder(target) as staging:
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        _record(staging, repository, commit, _signature(source))
        keep_others(target, staging)
    return commit


def pulled_from(folder: Path) -> tuple[str, str]:
    """``(repository, commit)`` that the folder's content was pushed to or pulled from; two empty texts if it is on no Hub.

    Raises:
        PriorError: ``hub.json`` cannot be read.
    """
    file = folder / HUB
    if not file.is_file():
        return "", ""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        known: tuple[str, str, str | None] = (record["repository"], record["commit"], record[SIGNATURE])
    except (ValueError, KeyError, TypeError) as error:
        raise PriorError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    return known[:2] if known[2] == _signature(folder) else ("", "")  # what was changed since is not what is on the Hub


def _signature(folder: Path) -> str | None:
    signature: str | None = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(SIGNATURE)
    return signature


def _record(folder: Path, repository: str, commit: str, signature: str | None) -> None:
    record = {"repository": repository, "commit": commit, SIGNATURE: signature}
    (folder / HUB).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
