"""A folder of 1,000 measurements, 3 of them corrupt, over 2 processes, of which one is killed (kill -9) at a quarter and all at half.

    python benchmarks/many_measurements.py

The same command is then given again. What must come out: 997 results, 3 named failures, no item finished twice, and results that are,
bit for bit, those of a process that does a sample of the items alone. The exit status is 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import runner
import torch
import yaml

from dpnp_inference.posterior import Posterior

SIZE = 4  # pixels along a side
CORRUPT = ("y0123", "y0456", "y0789")
CONFIG = {
    "prior": {
        "class_path": "dpnp_shared.analytic.GaussianPrior",
        "init_args": {"mean": 0.0, "covariance": 1.0, "image_shape": [1, SIZE, SIZE]},
    },
    "operator": {
        "class_path": "dpnp_shared.operators.RandomInpainting",
        "init_args": {"image_shape": [1, SIZE, SIZE], "missing": 0.5, "seed": 0},
    },
    "noise": {"class_path": "dpnp_shared.noise.GaussianNoise", "init_args": {"sigma": 0.5}},
    "annealing": {
        "class_path": "dpnp_inference.Annealing",
        "init_args": {"constant": 0, "decay": 2, "final": 0},
    },
    "chains": 19,
    "picture": False,
}


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """The command, in a session of its own, writing to ``log``."""
    command = [sys.executable, "-m", "dpnp_inference.cli", "batch", "--config", "config.yaml", *options]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(folder: Path, items: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many items are done."""
    while len(done_of(folder)) < items:
        if process.poll() is not None:
            sys.exit((folder / "log").read_text()[-3000:])
        time.sleep(0.01)


def kill_one(folder: Path, draw: random.Random) -> str:
    """Kill a random one of the processes that are at an item, and name the item."""
    while True:
        for file in draw.sample(files := sorted((folder / "out" / "claims").glob("y*")), len(files)):
            try:
                owner = json.loads(file.read_text())
            except (FileNotFoundError, json.JSONDecodeError):  # given up, or made, this moment
                continue
            os.kill(owner["pid"], signal.SIGKILL)
            return file.stem


def run(folder: Path, items: int, alone: int, seed: int) -> dict[str, Any]:
    """The whole course of events, and what came of it."""
    draw = random.Random(seed)
    numbers = np.random.default_rng(seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "y").mkdir()
    names = [f"y{i:04d}" for i in range(items)]
    for name in names:
        np.save(folder / "y" / f"{name}.npy", numbers.normal(size=(1, SIZE, SIZE)))
    for name in CORRUPT:
        (folder / "y" / f"{name}.npy").write_bytes(numbers.bytes(100))
    options = ("--measurements", "y", "--output", "out", "--processes", "2")

    begun = time.monotonic()
    process = start(folder, *options)
    wait_for(folder, items // 4, process)
    victim = kill_one(folder, draw)
    wait_for(folder, items // 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = {name: (folder / "out/items" / name / "item.json").stat().st_mtime_ns for name in done_of(folder)}
    process = start(folder, *options)
    status = process.wait()
    seconds = time.monotonic() - begun

    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    log = (folder / "log").read_text()
    failed = {name: state["error"] for name, state in manifest["items"].items() if state["state"] == "failed"}
    lines = Counter(line.split()[1] for line in log.splitlines() if line.startswith("done y"))
    touched = [
        name for name, when in first.items() if (folder / "out/items" / name / "item.json").stat().st_mtime_ns != when
    ]
    (folder / "some").mkdir()
    chosen = draw.sample(sorted({*names} - {*CORRUPT}), alone)
    for name in chosen:
        (folder / "some" / f"{name}.npy").write_bytes((folder / "y" / f"{name}.npy").read_bytes())
    start(folder, "--measurements", "some", "--output", "alone").wait()
    differ = [
        name
        for name in chosen
        if not torch.equal(*(Posterior.load(folder / output / "items" / name).samples for output in ("out", "alone")))
    ]
    return {
        "items": items,
        "exit status": status,
        "counts": manifest["counts"],
        "failed": failed,
        "killed at": victim,
        "died and replaced": log.count("another takes its place"),
        "done before all were killed": len(first),
        "finished twice": sorted({*touched} | {name for name, count in lines.items() if count > 1}),
        "attempts of done items": dict(Counter(manifest["items"][name]["attempts"] for name in done_of(folder))),
        "compared": len(chosen),
        "differ": differ,
        "left behind": [str(file) for file in (folder / "out").rglob(".*")] + os.listdir(folder / "out" / "claims"),
        "seconds": seconds,
    }


def done_of(folder: Path) -> list[str]:
    """The items that are done."""
    return [file.name for file in (folder / "out" / "items").glob("y*")]


def table(result: dict[str, Any]) -> str:
    """The result in words."""
    counts = result["counts"]
    rows = {
        "measurements, corrupt ones among them": f"{result['items']}, {len(CORRUPT)}",
        "results": counts["done"],
        "failures": ", ".join(f"`{name}`" for name in result["failed"]),
        "neither": counts["running"] + counts["pending"],
        "done when all processes were killed": result["done before all were killed"],
        "processes that died and were replaced before": result["died and replaced"],
        "finished twice": len(result["finished twice"]),
        "samples compared with those of one process, different": f"{result['compared']}, {len(result['differ'])}",
        "files left behind": len(result["left behind"]),
        "exit status of the last command": result["exit status"],
        "seconds, on 2 cores": f"{result['seconds']:.0f}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| what | |", "|---|---|", *lines]) + "\n"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=50, help="items that one process does again, for comparison")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=runner.RESULTS / "many_measurements.json", help="the table lies beside it"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = run(Path(name), arguments.items, arguments.alone, arguments.seed)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    runner.write_table(arguments, table(result))
    right = (
        sorted(result["failed"]) == [*CORRUPT]
        and result["counts"]["done"] == arguments.items - len(CORRUPT)
        and not (result["finished twice"] or result["differ"] or result["left behind"])
    )
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
