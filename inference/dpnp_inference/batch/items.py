"""Where a batch's measurements or images come from: a folder, one file that holds many, or a table of ``datasets``.

Items are read one by one, when their turn comes. Each has a name, which is that of its result and seeds its randomness; a stamp, which is
cheap to get and the same only for the same content; and a digest of the content, which is asked for where the stamp has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.format import MAGIC_PREFIX
from PIL import Image
from torch import Tensor

from dpnp_inference.files import is_medical, picture_tensor, read_tensor

log = logging.getLogger(__name__)

ARRAYS = (".npy", ".npz", ".pt", ".pth")
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LONGEST_NAME = 200  # bytes of a file's name, of which most file systems allow 255


class Items(Protocol):
    """The items of a batch, all of one kind.

    Attributes:
        names: of the items, each once, in order.
    """

    names: list[str]

    def read(self, name: str) -> Tensor:
        """The item's numbers, as they are stored."""
        ...

    def stamp(self, name: str) -> str:
        """The same only for the same content."""
        ...

    def digest(self, name: str) -> str:
        """SHA-256 of the content."""
        ...

    def where(self, name: str) -> dict[str, Any]:
        """Where the item is: a ``file``, and its ``index`` there if it holds several; or the ``row`` of a table."""
        ...


def open_items(
    source: str,
    *,
    argument: str,
    pattern: str | None = None,
    recursive: bool = False,
    key: str | None = None,
    split: str = "train",
    column: str | None = None,
    name_column: str | None = None,
) -> Items:
    """Find the items of a batch, without reading them.

    Args:
        source: a folder of files; an array file, whose first dimension counts the items; or a table: a ``.parquet``, ``.arrow``,
            ``.csv``, ``.json`` or ``.jsonl`` file, a folder that ``save_to_disk`` wrote, or a Hub id.
        argument: what the source is called in errors.
        pattern: of the names of files, as ``*.npy``; by default all files of a kind that can be read.
        recursive: look into folders as well; an item's name then has ``__`` where its path has ``/``.
        key: name of the array in a file that holds several.
        split: of a table.
        column: of a table, the one that holds the items; needed where it has several.
        name_column: of a table, the one that holds the items' names; by default they are numbered.

    Raises:
        FileNotFoundError: there is no such source, or nothing in it.
        ValueError: two items have one name, or the table has no such column.
    """
    path = Path(source)
    if path.is_dir() and not _is_saved(path):
        items: Items = Files(path, pattern or "*", recursive, key, any_kind=pattern is not None)
    elif path.is_file() and path.suffix in ARRAYS:
        items = Stack(path, key)
    elif path.exists() and not path.is_dir() and path.suffix not in TABLES:
        raise ValueError(f"{argument} = {source!r}; allowed are a folder, {', '.join((*ARRAYS, *TABLES))} and a Hub id")
    elif path.exists() or HUB_ID.fullmatch(source):
        items = Table(source, argument, split, column, name_column)
    else:
        raise FileNotFoundError(f"{argument} = {source!r} is neither a file nor a folder")
    if not items.names:
        wanted = f" that matches {pattern!r}" if pattern else " that can be read"
        raise FileNotFoundError(f"{argument} = {source!r} holds nothing{wanted}")
    return items


class Files:
    """The files of a folder; hidden ones are left out.

    Args:
        folder: where they are.
        pattern: of their names.
        recursive: look into folders as well.
        key: name of the array in a file that holds several.
        any_kind: take also files that do not look as if they can be read.
    """

    def __init__(self, folder: Path, pattern: str, recursive: bool, key: str | None, *, any_kind: bool) -> None:
        self.key = key
        self.files: dict[str, Path] = {}
        readable = {*ARRAYS, *Image.registered_extensions()}
        others = 0
        for file in sorted(folder.rglob(pattern) if recursive else folder.glob(pattern)):
            inner = file.relative_to(folder)
            if not file.is_file() or any(part.startswith(".") for part in inner.parts):
                continue
            if not (any_kind or file.suffix.lower() in readable or is_medical(file)):
                others += 1
                continue
            bare = (
                inner.with_suffix("").with_suffix("")
                if inner.name.lower().endswith(".nii.gz")
                else inner.with_suffix("")
            )
            name = _file_name("__".join(bare.parts))
            if name in self.files:
                raise ValueError(f"{self.files[name]} and {file} would both be the item {name!r}; choose by pattern")
            self.files[name] = file
        if others:
            log.info("%d files of %s are of other kinds and left out", others, folder)
        self.names = list(self.files)

    def read(self, name: str) -> Tensor:
        """See :class:`Items`."""
        return read_tensor(self.files[name], self.key)

    def stamp(self, name: str) -> str:
        """Size and times of the file."""
        found = self.files[name].stat()
        return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

    def digest(self, name: str) -> str:
        """Of the file."""
        with self.files[name].open("rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def where(self, name: str) -> dict[str, Any]:
        """The file."""
        return {"file": str(self.files[name])}


class Numbered(ABC):
    """Items that have numbers."""

    names: list[str]

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.index = {name: i for i, name in enumerate(names)}

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """See :class:`Items`."""

    def digest(self, name: str) -> str:
        """Of type, shape and numbers."""
        x = np.ascontiguousarray(self.read(name).numpy())
        return hashlib.sha256(f"{x.dtype} {x.shape} ".encode() + x.tobytes()).hexdigest()


class Stack(Numbered):
    """One array file, whose first dimension counts the items."""

    def __init__(self, file: Path, key: str | None) -> None:
        # a .npy file stays on disk; the others are held in memory
        self.array = torch.from_numpy(np.load(file, mmap_mode="c")) if _is_npy(file) else read_tensor(file, key)
        if self.array.ndim < 2:
            raise ValueError(
                f"{file} has shape {tuple(self.array.shape)}; needed is one that begins with the number of items"
            )
        found = file.stat()
        self.version = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        self.file = file
        super().__init__(_numbers(len(self.array)))

    def read(self, name: str) -> Tensor:
        """See :class:`Items`."""
        return self.array[self.index[name]].clone()

    def stamp(self, name: str) -> str:
        """That of the file."""
        return self.version

    def where(self, name: str) -> dict[str, Any]:
        """Its place in the file."""
        return {"file": str(self.file), "index": self.index[name]}


class Table(Numbered):
    """A column of a ``datasets`` table, of which one row at a time is read.

    Args:
        source: file, folder or Hub id.
        argument: what the source is called in errors.
        split: of the table.
        column: that holds the items; the only one by default.
        name_column: that holds the items' names.
    """

    def __init__(self, source: str, argument: str, split: str, column: str | None, name_column: str | None) -> None:
        import datasets

        path = Path(source)
        datasets.disable_progress_bars()
        if path.is_dir():
            table = datasets.load_from_disk(source)
            if isinstance(table, datasets.DatasetDict):
                if split not in table:
                    raise ValueError(f"split = {split!r}; {argument} = {source!r} has {list(table)}")
                table = table[split]
        elif path.is_file():
            table = datasets.load_dataset(TABLES[path.suffix], data_files={split: source}, split=split)
        else:
            try:
                table = datasets.load_dataset(source, split=split)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"{argument} = {source!r} is neither a file nor a folder, and not found on the Hub: {error}"
                ) from error
        columns = list(table.features)
        rest = [name for name in columns if name != name_column]
        column = rest[0] if column is None and len(rest) == 1 else column
        for option, wanted in (("column", column), ("name_column", name_column)):
            if wanted not in columns and (option == "column" or wanted is not None):
                raise ValueError(f"{option} = {wanted!r}; {argument} = {source!r} has the columns {columns}")
        self.rows, self.column = table.select_columns([column]), column
        self.version = str(table._fingerprint)
        self.dtype = _numbers_of(table.features[column])
        if name_column is None:
            super().__init__(_numbers(len(table)))
        else:
            names = [_file_name(re.sub(r"[^\w.+-]", "_", str(name))) for name in table[name_column]]
            if len({*names}) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"name_column = {name_column!r}: the name {twice!r} is there more than once")
            super().__init__(names)

    def read(self, name: str) -> Tensor:
        """See :class:`Items`; text, as CSV files hold, must be a list in JSON."""
        value: Any = self.rows[self.index[name]][self.column]
        if isinstance(value, Image.Image):
            return picture_tensor(value)
        if isinstance(value, str):
            value = json.loads(value)
        if value is None:
            raise ValueError(f"the column {self.column!r} is empty")
        return torch.from_numpy(np.array(value, dtype=self.dtype))

    def stamp(self, name: str) -> str:
        """That of the table."""
        return self.version

    def where(self, name: str) -> dict[str, Any]:
        """Its row."""
        return {"row": self.index[name]}


def _is_npy(file: Path) -> bool:
    """Whether a file is a NumPy array, of which parts can be read."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC_PREFIX)) == MAGIC_PREFIX


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _numbers(count: int) -> list[str]:
    """As many numbers, as names that sort well."""
    return [f"{i:06d}" for i in range(count)]


def _numbers_of(feature: Any) -> str | None:
    """The type of the numbers that a column's lists are of, None where NumPy is to find out."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    name = str(getattr(feature, "dtype", ""))
    return name if re.fullmatch(r"bool|u?int\d+|float\d+", name) else None


def _file_name(name: str) -> str:
    """The name, hidden or empty ones made visible; of one that is too long for a file its beginning and a hash."""
    name = f"_{name[1:]}" if name[:1] in (".", "") else name
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME // 4]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
