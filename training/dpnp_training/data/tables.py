"""Tables of ``datasets``, and torchvision's data sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpnp_training.data.images import Rows

SUFFIXES = (".parquet", ".arrow")


def torchvision_rows(name: str, root: str, split: str, download: bool) -> Rows:
    """Images of a torchvision data set, labels left out."""
    import torchvision.datasets

    kind = getattr(torchvision.datasets, name, None)
    if kind is None:
        raise ValueError(f"source = 'torchvision:{name}': torchvision.datasets has no {name}")
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}; torchvision data sets have 'train' and 'test'")
    try:
        data = kind(root, train=split == "train", download=download)
    except RuntimeError as error:
        raise FileNotFoundError(f"source = 'torchvision:{name}' below root = {root!r}: {error}") from error
    fingerprint = f"{name} {Path(root).resolve()} {split} {len(data)}"
    return Table(data, 0, fingerprint)


def is_table(path: Path) -> bool:
    """Whether a path holds a table: a ``.parquet`` or ``.arrow`` file, a folder of them, or a data set saved to disk."""
    if path.is_file():
        return path.suffix in SUFFIXES
    return _saved(path) or any(True for suffix in SUFFIXES for _ in path.rglob(f"*{suffix}"))


def table_rows(source: str, path: Path, split: str, column: str | None) -> Rows:
    """Images of a ``datasets`` table: files, or a data set of the Hub.

    The table is Arrow, mapped into memory from disk: the loader's processes share its pages.
    """
    import datasets

    if path.is_dir() and _saved(path):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"split = {split!r}; {source!r} has {list(table)}")
            table = table[split]
    elif path.exists():
        files = table_files(path)
        table = datasets.load_dataset(Path(files[0]).suffix[1:], data_files={split: files}, split=split)
    else:
        table = datasets.load_dataset(source, split=split)
    column = choose_column(table.features, column)
    return Table(table.select_columns([column]), column, table._fingerprint)


def table_files(path: Path) -> list[str]:
    """A table's files."""
    return [str(path)] if path.is_file() else sorted(str(p) for suffix in SUFFIXES for p in path.rglob(f"*{suffix}"))


def choose_column(features: Any, column: str | None) -> str:
    """The column that is asked for; by default the one that holds images, or failing that the one that holds arrays."""
    if column is None:
        return _image_column(features)
    if column not in features:
        raise ValueError(f"column = {column!r}; the table has {list(features)}")
    return column


def _saved(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


def _image_column(features: Any) -> str:
    import datasets

    kinds: Sequence[Any] = (datasets.Image, (datasets.Array2D, datasets.Array3D))
    for kind in kinds:
        found: list[str] = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"several columns hold images, {found}; name one by column")
    raise ValueError(f"no column holds images; the table has {dict(features)}")


class Table:
    """One column of a table.

    Args:
        rows: the table.
        column: name or number of the column.
        fingerprint: of the table's content.
    """

    def __init__(self, rows: Any, column: str | int, fingerprint: str) -> None:
        self.rows, self.column, self.fingerprint = rows, column, fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index][self.column]
