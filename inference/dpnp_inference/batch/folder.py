"""The folder of a batch: one record an item, written by whoever has the item, and tables that are made of the records.

::

    batch.json            what the results depend on
    items/NAME/           the run of a finished item, with its record item.json: the folder comes into being as a whole
    failures/NAME.json    the record of a failed item; NAME.txt is the traceback
    claims/NAME.1         who is at it
    states/NAME/          from where an item goes on that was interrupted
    manifest.json, results.csv, results.parquet, merged.npz

Nothing is written by two processes but the last line's files, which any process can make again from the records at any time, and
which are replaced as a whole.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dpnp_inference.batch.claims import birth, has_ended, read_owner

BATCH, MANIFEST, RECORD = "batch.json", "manifest.json", "item.json"
TABLE, PARQUET, MERGED = "results.csv", "results.parquet", "merged.npz"
STATES = ("done", "failed", "running", "pending")
COLUMNS = ("item", "state", "attempts", "seconds", "network_calls", "chi_square")  # then scores, then
LAST_COLUMNS = ("verdict", "warnings", "worker", "device", "finished", "error")

Record = dict[str, Any]


class BatchFolder:
    """Records of a batch.

    Args:
        path: the folder; see :meth:`open` and :meth:`existing`.
        configuration: hash of what the results depend on; records of any other are not looked at.
    """

    def __init__(self, path: Path, configuration: str) -> None:
        self.path, self.configuration = path, configuration
        self.items, self.failures, self.claims = path / "items", path / "failures", path / "claims"
        self.unfinished = path / "states"

    @classmethod
    def open(cls, path: Path, same: Record, *, fresh: bool) -> BatchFolder:
        """Begin a batch or go on with it.

        Args:
            path: the folder.
            same: what the results depend on, as JSON.
            fresh: take results of anything else for not done.

        Raises:
            FileExistsError: ``path`` is something else, or the folder of a batch of another configuration; says which part differs.
        """
        same = json.loads(json.dumps(same))
        if (path / BATCH).is_file():
            found = json.loads((path / BATCH).read_text(encoding="utf-8"))
            differ = sorted(key for key in {*found, *same} if found.get(key) != same.get(key))
            if differ and not fresh:
                raise FileExistsError(
                    f"output = {str(path)!r} is the folder of a batch of another configuration ({', '.join(differ)}); "
                    "choose another, or pass --fresh true to do its items again"
                )
        elif path.exists() and (not path.is_dir() or any(not file.name.startswith(".") for file in path.iterdir())):
            raise FileExistsError(f"output = {str(path)!r} exists and is not the folder of a batch; choose another")
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, hash_of(same))
        for inner in (folder.items, folder.failures, folder.claims):
            inner.mkdir(exist_ok=True)
        if not (path / BATCH).is_file() or json.loads((path / BATCH).read_text(encoding="utf-8")) != same:
            with replaced(path / BATCH) as file:
                file.write_text(json.dumps(same, indent=1) + "\n", encoding="utf-8")
        return folder

    @classmethod
    def existing(cls, path: Path) -> BatchFolder:
        """Look at a batch.

        Raises:
            FileNotFoundError: ``path`` is not the folder of a batch.
        """
        if not (path / BATCH).is_file():
            raise FileNotFoundError(f"{str(path)!r} is not the folder of a batch: it has no {BATCH}")
        return cls(path, hash_of(json.loads((path / BATCH).read_text(encoding="utf-8"))))

    def done(self, name: str) -> Record | None:
        """The record of a finished item, of whatever configuration; None if it is not finished."""
        return read_json(self.items / name / RECORD)

    def failure(self, name: str) -> Record | None:
        """The record of a failed item of this configuration."""
        record = read_json(self.failures / f"{name}.json")
        return record if record and record["configuration"] == self.configuration else None

    def fail(self, name: str, record: Record, trace: str) -> None:
        """Keep the record of a failed item, and its traceback if there is one."""
        if trace:
            with replaced(self.failures / f"{name}.txt") as file:
                file.write_text(trace, encoding="utf-8")
            record = {**record, "traceback": f"failures/{name}.txt"}
        with replaced(self.failures / f"{name}.json") as file:
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def forgive(self, name: str) -> None:
        """Remove the record of a failure, of an item that is finished now."""
        for suffix in (".json", ".txt"):
            (self.failures / f"{name}{suffix}").unlink(missing_ok=True)

    def states_of(self, name: str) -> Path:
        """The folder for the state of an item that is not done."""
        return self.unfinished / name

    def forget(self, name: str) -> None:
        """Remove the state of an item that is done, has failed, or begins anew."""
        shutil.rmtree(self.states_of(name), ignore_errors=True)

    def states(self, names: Sequence[str]) -> dict[str, Record]:
        """State and figures of each item, by name."""
        claimed: dict[str, Path] = {}
        for file in sorted(self.claims.iterdir(), key=lambda file: int(file.suffix[1:])):
            claimed[file.stem] = file  # the highest number
        states: dict[str, Record] = {}
        for name in names:
            done = self.done(name)
            failure = self.failure(name)
            if done is not None and done["configuration"] == self.configuration:
                states[name] = {"state": "done", **done}
            elif failure is not None:
                states[name] = {"state": "failed", **failure}
            else:
                states[name] = {"state": "pending"}
            if states[name]["state"] != "done" and name in claimed:
                owner = read_owner(claimed[name])
                if owner and not has_ended(owner):
                    states[name] |= {"state": "running", "since": owner["started"], "worker": worker_name(owner)}
        return states

    def manifest(self, names: Sequence[str], about: Record) -> Record:
        """The state of the batch, made of the records."""
        states = self.states(names)
        known = {*names}
        return {
            **about,
            "configuration": self.configuration,
            "updated": now(),
            "counts": count_states(states),
            "items": states,
            "no longer in the source": sorted(
                folder.name for folder in self.items.iterdir() if folder.name not in known and folder.name[0] != "."
            ),
        }

    def write_manifest(self, names: Sequence[str], about: Record) -> Record:
        """Replace ``manifest.json``, and return it."""
        manifest = self.manifest(names, about)
        with replaced(self.path / MANIFEST) as file:
            file.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        return manifest

    def read_manifest(self) -> Record | None:
        """The manifest as it was written last."""
        return read_json(self.path / MANIFEST)

    def write_tables(self, states: dict[str, Record]) -> None:
        """Replace ``results.csv`` and ``results.parquet``."""
        import pyarrow  # type: ignore[import-untyped] # comes with datasets
        import pyarrow.parquet  # type: ignore[import-untyped]

        rows = [row_of(name, state) for name, state in states.items()]
        scores = sorted({key for row in rows for key in row} - {*COLUMNS, *LAST_COLUMNS})
        columns = [*COLUMNS, *scores, *LAST_COLUMNS]
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        with replaced(self.path / TABLE) as file:
            file.write_text(text.getvalue(), encoding="utf-8")
        with replaced(self.path / PARQUET) as file:
            full = [{column: row.get(column) for column in columns} for row in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(full), file)

    def tidy(self) -> None:
        """Remove what processes that died have left of items that are not at work."""
        claimed: dict[str, list[Path]] = {}
        for file in self.claims.iterdir():
            claimed.setdefault(file.stem, []).append(file)
        for name, files in list(claimed.items()):
            if all(has_ended(read_owner(file)) for file in files):
                del claimed[name]
                for file in files:
                    file.unlink(missing_ok=True)
        if self.unfinished.is_dir():
            for states in self.unfinished.iterdir():
                if states.name not in claimed:
                    self.forget(states.name)
            with suppress(OSError):  # not empty: somebody is at an item
                self.unfinished.rmdir()
        for staged in self.items.glob(".*"):
            if staged.name[1:].rpartition(".")[0].removesuffix(".old") not in claimed:
                shutil.rmtree(staged, ignore_errors=True)
        for staged in (*self.path.glob(".*"), *self.failures.glob(".*")):
            pid = staged.suffix[1:]
            if staged.name.endswith(f".{socket.gethostname()}.{pid}") and birth(int(pid)) is None:
                staged.unlink(missing_ok=True)

    def merge(self, states: dict[str, Record]) -> None:
        """Replace ``merged.npz``: names, means and standard deviations of the finished items, ``(items, C, H, W)``."""
        names = [name for name, state in states.items() if state["state"] == "done"]
        if not names:
            return
        arrays: dict[str, Any] = {"names": np.array(names)}
        for part in ("mean", "std"):
            files = [self.items / name / f"{part}.npy" for name in names]
            if all(file.is_file() for file in files):  # there is no standard deviation of one draw
                arrays[part] = np.stack([np.load(file, allow_pickle=False) for file in files])
        with replaced(self.path / MERGED) as file, file.open("wb") as stream:
            np.savez(stream, **arrays)


def row_of(name: str, state: Record) -> Record:
    """An item's line of the tables."""
    row = {column: state.get(column) for column in (*COLUMNS, *LAST_COLUMNS)}
    row |= state.get("scores", {})
    return row | {"item": name, "warnings": "; ".join(state.get("warnings", ())) or None}


def count_states(states: dict[str, Record]) -> dict[str, int]:
    """How many items are in each state."""
    found = Counter(state["state"] for state in states.values())
    return {state: found[state] for state in STATES}


def worker_name(owner: Record) -> str:
    """Host and process of a worker."""
    return f"{owner.get('host', socket.gethostname())}:{owner['pid']}"


def now() -> str:
    """Date and time with the offset from UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def hash_of(value: Any) -> str:
    """A hash of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_json(file: Path) -> Record | None:
    """What a file holds, None if there is none."""
    try:
        record: Record = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return record


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A path beside a file that takes its place when the block ends well; no reader ever finds half a file."""
    staged = file.with_name(f".{file.name[-100:]}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield staged
        os.replace(staged, file)
    finally:
        staged.unlink(missing_ok=True)
