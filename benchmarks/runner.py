"""Cells of a benchmark, run in parallel processes and kept as they finish, so that an interrupted run goes on.

``--verify N`` of any benchmark runs N of the finished cells again, to see whether the kept figures are those of the present code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """Arguments that all benchmarks have: how many cells run at a time, and where the results go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time, each on its share of the cores"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS / f"{name}.json", help="results; table and plot lie beside it"
    )
    parser.add_argument(
        "--verify", type=int, default=0, metavar="N", help="run N finished cells again and compare, keeping nothing"
    )
    return parser


def run_cells(
    work: Callable[..., Any],
    cells: Mapping[str, tuple[Any, ...]],
    arguments: argparse.Namespace,
    *,
    header: Mapping[str, Any],
    start: Callable[..., None] | None = None,
    start_arguments: tuple[Any, ...] = (),
) -> dict[str, Any]:
    """Do the cells that are not done yet.

    Args:
        work: module-level function of a cell; gives JSON.
        cells: arguments of ``work`` for each cell, by the cell's name.
        arguments: those of :func:`parser`.
        header: what all results of a file have in common; a file with another header is refused.
        start: prepares a worker process, which has its share of the cores.
        start_arguments: arguments of ``start``.

    Returns:
        Results of all cells that the file holds, by name: those asked for and those of earlier runs.

    Raises:
        SystemExit: the file is of other settings; or, with ``--verify``, always: with status 0 if all cells came out as they are kept.
    """
    output: Path = arguments.output
    record = json.loads(output.read_text()) if output.is_file() else {}
    header = json.loads(json.dumps(header))
    if record.get("header", header) != header:
        raise SystemExit(f"{output} holds results of {record['header']}, not of {header}; remove it or choose --output")
    results: dict[str, Any] = record.get("results", {})
    output.parent.mkdir(parents=True, exist_ok=True)
    missing = {name: cell for name, cell in cells.items() if name not in results}
    if arguments.verify:
        finished = [name for name in cells if name in results]
        chosen = random.Random(0).sample(finished, min(arguments.verify, len(finished)))
        missing = {name: cells[name] for name in chosen}
    initializer = (arguments.jobs, start, start_arguments)
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), _start, initializer) as pool:
        if arguments.verify:
            again = {name: pool.submit(work, *cell) for name, cell in missing.items()}
            raise SystemExit(_differences({name: (results[name], new.result()) for name, new in again.items()}))
        futures = {pool.submit(work, *cell): name for name, cell in missing.items()}
        for future in track(as_completed(futures), description=output.stem, total=len(futures)):
            results[futures[future]] = future.result()
            staged = output.with_suffix(".tmp")
            staged.write_text(json.dumps({"header": header, "results": results}, indent=1, sort_keys=True) + "\n")
            os.replace(staged, output)
    return results


def _differences(pairs: Mapping[str, tuple[Any, Any]]) -> int:
    """Print whether each pair of a kept and a new result is the same, and return how many are not."""
    differ = 0
    for name, (kept, new) in pairs.items():
        rows = list(_compare(kept, json.loads(json.dumps(new)), ""))
        differ += bool(rows)
        print(f"{name}: {'; '.join(rows[:5]) or 'as kept'}")
    return differ


def _compare(kept: Any, new: Any, path: str) -> Iterator[str]:
    """Where two results differ by more than a thousandth; times and memory do not count."""
    if isinstance(kept, dict) and isinstance(new, dict):
        for key in sorted({*kept, *new} - {"seconds", "seconds_a_call", "memory"}):
            yield from _compare(kept.get(key), new.get(key), f"{path}/{key}")
    elif isinstance(kept, list) and isinstance(new, list) and len(kept) == len(new):
        for i, (a, b) in enumerate(zip(kept, new, strict=True)):
            yield from _compare(a, b, f"{path}/{i}")
    elif isinstance(kept, int | float) and isinstance(new, int | float):
        if not math.isclose(kept, new, rel_tol=1e-3, abs_tol=1e-9) and not (math.isnan(kept) and math.isnan(new)):
            yield f"{path} {kept:.6g} -> {new:.6g}"
    elif kept != new:
        yield f"{path} {kept!r:.40} -> {new!r:.40}"


def write_table(arguments: argparse.Namespace, text: str) -> None:
    """Print the table and keep it beside the results."""
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


def _start(jobs: int, start: Callable[..., None] | None, start_arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    if start is not None:
        start(*start_arguments)
