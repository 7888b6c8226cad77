"""The tutorial notebooks, executed.

    pip install -e ".[docs]"
    python benchmarks/notebooks.py

runs every notebook of ``docs/notebooks`` in a process of its own, keeps the outputs in it and prints how long it took. A cell that fails is
named, and the exit status is 1. ``--check`` keeps nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"


def main(arguments: Sequence[str] | None = None) -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("notebooks", nargs="*", type=Path, help=f"by default all of {FOLDER.relative_to(ROOT)}")
    command.add_argument("--check", action="store_true", help="keep no outputs")
    command.add_argument("--timeout", type=float, default=600, help="seconds that one cell may take")
    settings = command.parse_args(arguments)
    failures = 0
    for path in settings.notebooks or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        try:
            notebook = execute(path, settings.timeout)
        except (CellExecutionError, CellTimeoutError, RuntimeError) as error:  # the last one if the process ends
            failures += 1
            print(f"{path.name}: failed after {time.perf_counter() - start:.0f} s\n{error}")
            continue
        if not settings.check:
            staged = path.with_suffix(".tmp")
            nbformat.write(notebook, staged)
            os.replace(staged, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")
    if failures:
        raise SystemExit(1)


def execute(path: Path, timeout: float) -> nbformat.NotebookNode:
    """A notebook with the outputs of all its cells.

    Args:
        path: its file; nothing is written there.
        timeout: seconds that one cell may take.

    Raises:
        CellExecutionError: a cell fails.
        CellTimeoutError: a cell takes longer.
        RuntimeError: the process ends, for want of memory perhaps.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as folder:
        if os.name == "posix":  # sockets that nobody else on the machine can read
            manager = client.create_kernel_manager()
            manager.transport, manager.ip = "ipc", f"{folder}/kernel"
        client.execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version, which differs between machines
    return notebook


if __name__ == "__main__":
    main()
