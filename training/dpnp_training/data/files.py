"""Folders of files that hold one or several images each, looked through once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only

Shape = tuple[int, int, int]
OnError = Literal["raise", "skip"]

log = logging.getLogger(__name__)
SCAN_VERSION = 1


class Reader(Protocol):
    """One format of files."""

    @property
    def format(self) -> str:
        """Its name, with the options on which the shapes depend: a scan is kept for each."""
        ...

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files' names, in lower case; none: every file is taken."""
        ...

    def probe(self, path: Path) -> list[Shape]:
        """Shapes ``(C, H, W)`` of the file's images, all of which must be readable.

        An empty list says that the file is sound but holds no image. Any exception says that it cannot be read.
        """
        ...

    def read(self, path: Path, index: int) -> Any:
        """The file's image number ``index``, as an array or a PIL image."""
        ...


class Files:
    """The images of a folder's files, in the order of their paths.

    A file is decoded once to see whether it is sound. What was found is kept in ``cache_dir``, so that the next start only compares
    sizes and times of change.

    Args:
        root: the folder, or one file.
        paths: of the files, relative to ``root``.
        reader: of their format.
        cache_dir: where what was found is kept.
        on_error: ``raise``: refuse a file that cannot be read; ``skip``: name it and go on without it.

    Attributes:
        file: number of the file that each image is in, ``(N,)``.
        shapes: ``(C, H, W)`` of each image, ``(N, 3)``.
        skipped: files that were left out because they cannot be read, and why.

    Raises:
        ValueError: a file that cannot be read (all are counted, the first are named), or no image at all.
    """

    def __init__(
        self, root: Path, paths: list[str], reader: Reader, cache_dir: Path, on_error: OnError = "raise"
    ) -> None:
        self.root, self.reader = root, reader
        found = scan(root, paths, reader, cache_dir)
        self.skipped = {path: entry["error"] for path, entry in found.items() if entry["error"] is not None}
        if self.skipped:
            named = "; ".join(f"{path} ({why})" for path, why in list(self.skipped.items())[:10])
            more = f"; and {len(self.skipped) - 10} more" if len(self.skipped) > 10 else ""
            what = f"{len(self.skipped)} of {len(paths)} files of {str(root)!r} cannot be read"
            if on_error == "raise":
                raise ValueError(f"{what}: {named}{more}. Remove them, or give on_error: skip")
            for path, why in self.skipped.items():
                _warn(f"skipped, as it cannot be read: {root / path} ({why})")
            _warn(f"{what} and were skipped")
        good = [(path, entry) for path, entry in found.items() if entry["shapes"]]
        if len(good) + len(self.skipped) < len(found):
            _warn(f"{len(found) - len(good) - len(self.skipped)} of {len(paths)} files of {str(root)!r} hold no image")
        if not good:
            raise ValueError(f"source = {str(root)!r} holds no image that can be read, in {len(paths)} files")
        # arrays, not lists: what the loader's processes read, they do not copy
        self.paths = np.array([os.fsencode(path) for path, _ in good])
        runs = [(i, page, run) for i, (_, entry) in enumerate(good) for page, run in _numbered(entry["shapes"])]
        self.file = np.concatenate([np.full(run[0], i) for i, _, run in runs])
        self.page = np.concatenate([np.arange(start, start + run[0]) for _, start, run in runs])
        self.shapes = np.concatenate([np.tile(run[1:], (run[0], 1)) for _, _, run in runs])
        described = [(path, entry["size"], entry["mtime"], reader.format) for path, entry in good]
        self.fingerprint = hashlib.sha256(json.dumps([str(root), described]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, index: int) -> Any:
        path = self.root / os.fsdecode(self.paths[self.file[index]])
        try:
            return self.reader.read(path, int(self.page[index]))
        except Exception as error:  # any decoder's, named and raised again
            raise ValueError(f"{path} was readable when it was looked at and is not any more: {error}") from error

    def name(self, index: int) -> str:
        """The file's path, with the number of the image where the file holds several."""
        path = self.root / os.fsdecode(self.paths[self.file[index]])
        several = np.count_nonzero(self.file == self.file[index]) > 1
        return f"{path}, image {self.page[index]}" if several else str(path)

    def check(self, channels: int | None, size: tuple[int, int] | None, resize: bool) -> None:
        """See whether the images come to one shape.

        Raises:
            ValueError: mixed numbers of channels without ``channels``, mixed sizes without ``size``, an image smaller than a window
                that is cut out at full resolution.
        """
        if channels is None:
            self._one_kind(self.shapes[:, :1], "channels", "give channels: 1 (gray) or 3 (RGB) to convert all to one")
        if size is None:
            self._one_kind(self.shapes[:, 1:], "height x width", "give size to bring all to one")
        elif not resize:
            small = np.flatnonzero((self.shapes[:, 1:] < np.array(size)).any(1))
            if len(small):
                h, w = self.shapes[small[0], 1:]
                raise ValueError(
                    f"{len(small)} images are smaller than size = {size}, the first is {self.name(int(small[0]))} ({h} x {w}); "
                    "give resize: true or a smaller size"
                )

    def _one_kind(self, values: np.ndarray[Any, Any], what: str, advice: str) -> None:
        kinds, first, counts = np.unique(values, axis=0, return_index=True, return_counts=True)
        if len(kinds) > 1:
            examples = ", ".join(
                f"{' x '.join(map(str, kinds[i].tolist()))} in {counts[i]} (first: {self.name(int(first[i]))})"
                for i in np.argsort(-counts)[:3]
            )
            raise ValueError(f"the images of {str(self.root)!r} have different {what}: {examples}; {advice}")


def scan(root: Path, paths: list[str], reader: Reader, cache_dir: Path) -> dict[str, dict[str, Any]]:
    """What is known of each file: its size and time of change, runs ``[count, C, H, W]`` of its images' shapes, or an error.

    Files whose size and time of change are those of the last scan are not opened again.
    """
    name = hashlib.sha256(f"{SCAN_VERSION} {root.resolve()} {reader.format}".encode()).hexdigest()[:24]
    file = cache_dir / "scans" / f"{name}.json"
    known: dict[str, dict[str, Any]] = {}
    if file.is_file():
        try:
            known = json.loads(file.read_text())["files"]
        except (ValueError, KeyError) as error:
            _warn(f"the kept scan {file} is damaged ({error}); the files are looked through again")

    def look(path: str) -> dict[str, Any]:
        status = (root / path).stat()
        old = known.get(path)
        if old is not None and (old["size"], old["mtime"]) == (status.st_size, status.st_mtime_ns):
            return old
        try:
            shapes, error = reader.probe(root / path), None
        except Exception as problem:  # decoders raise all kinds of errors for damaged files
            shapes, error = [], f"{type(problem).__name__}: {problem}"
        runs: list[list[int]] = []
        for shape in shapes:
            if runs and runs[-1][1:] == list(shape):
                runs[-1][0] += 1
            else:
                runs.append([1, *shape])
        return {"size": status.st_size, "mtime": status.st_mtime_ns, "shapes": runs, "error": error}

    with ThreadPoolExecutor() as pool:  # decoders release the interpreter's lock
        found = dict(zip(paths, pool.map(look, paths), strict=True))
    if found != known:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps({"root": str(root.resolve()), "files": found}))
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    return found


def list_files(root: Path) -> list[str]:
    """Paths below a folder, relative to it, sorted, hidden ones left out; of a file, its name."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def with_suffix(paths: Iterable[str], suffixes: tuple[str, ...]) -> list[str]:
    """The paths that end in one of the suffixes, in whichever case."""
    return [path for path in paths if path.lower().endswith(suffixes)]


def _numbered(runs: list[list[int]]) -> list[tuple[int, list[int]]]:
    """Each run of equal shapes with the number of its first image."""
    starts = np.cumsum([0, *(run[0] for run in runs)])
    return [(int(start), run) for start, run in zip(starts, runs, strict=False)]


@rank_zero_only
def _warn(message: str) -> None:
    log.warning(message)
