"""Kill -9 a reconstruction at random moments, give the same command again each time, and compare with one that was left alone.

    python benchmarks/sampling_resume.py

Once with one process and once with two, where a kill hits the command itself or one of its workers. The moments come from a seed: a number
of iterations after the last one, and a part of a second behind it, so that kills hit network calls, half-written states, and processes
that are just starting again. Draws, statistics and the count of network calls must be the same, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from runner import parser, run_cells, write_table

from dpnp_inference.posterior import Posterior

COMMAND = [
    "--chains=4",
    "--batch_size=2",
    "--draws=3",
    "--thin=20",
    "--proximal=dpnp_inference.MALA",
    "--proximal.steps=3",
    "--proximal.warmup=3",
    "--annealing=dpnp_inference.Annealing",
    "--annealing.constant=2",
    "--annealing.decay=8",
    "--annealing.final=2",
    "--checkpoint_every=0",
]
RUN = "import sys; from dpnp_inference.cli import main; main(sys.argv[1:])"


def start(folder: Path, name: str, processes: int) -> subprocess.Popen[bytes]:
    """The command, the same each time."""
    arguments = [*COMMAND, f"--processes={processes}", f"--output={name}"]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *arguments],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )


def written(folder: Path) -> dict[Path, int]:
    """When each state of the killed run was last written."""
    when = {}
    for file in (folder / ".killed.state").rglob("latest.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # it is replaced this moment
            when[file] = file.stat().st_mtime_ns
    return when


def process_of(folder: Path, process: subprocess.Popen[bytes], who: int) -> int | None:
    """Id of the command itself (0) or of a worker (1, 2); None if that is not running yet."""
    if who == 0:
        return process.pid
    try:
        return int(json.loads((folder / ".killed.state" / f"worker_{who - 1}" / "owner.json").read_text())["pid"])
    except (OSError, ValueError):
        return None


def kill_at_random(folder: Path, processes: int, kills: int, seed: int) -> list[str]:
    """Run the command to its end, in spite of so many kills.

    Returns:
        What was killed, for each kill that came before the end.
    """
    draw, hit = random.Random(seed), list[str]()
    process = start(folder, "killed", processes)
    while len(hit) < kills and process.poll() is None:
        states, iterations = written(folder), draw.randint(1, 3)
        who, delay = draw.randrange(processes + 1 if processes > 1 else 1), draw.uniform(0, 0.3)
        while iterations and process.poll() is None:
            now = written(folder)
            iterations -= now != states
            states = now
            time.sleep(0.005)
        time.sleep(delay)
        target = process_of(folder, process, who)
        if process.poll() is not None or target is None:  # it is at its end, or a worker is only starting
            continue
        try:
            os.kill(target, signal.SIGKILL)
        except ProcessLookupError:  # a worker that has ended by itself
            continue
        hit.append("command" if who == 0 else f"worker {who - 1}")
        if who == 0:
            process.wait()
            process = start(folder, "killed", processes)
    if process.wait() != 0:
        raise RuntimeError((folder / "killed.log").read_text()[-3000:])
    return hit


def measure(processes: int, kills: int, seed: int) -> dict[str, Any]:
    """One run that is left alone and one that is killed again and again."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.monotonic()
        if start(folder, "alone", 1).wait() != 0:
            raise RuntimeError((folder / "alone.log").read_text()[-3000:])
        seconds = time.monotonic() - begun
        begun = time.monotonic()
        hit = kill_at_random(folder, processes, kills, seed)
        a, b = Posterior.load(folder / "alone"), Posterior.load(folder / "killed")
        size = (folder / "alone" / "state.safetensors").stat().st_size
        return {
            "kills": len(hit),
            "hit": hit,
            "iterations": sum(len(batch) for batch in a.diagnostics["iterations"]),
            "same draws": bool(torch.equal(a.samples, b.samples)),
            "same network calls": a.diagnostics["network_calls"] == b.diagnostics["network_calls"],
            "left behind": sorted(path.name for path in folder.iterdir() if path.name.startswith(".")),
            "state bytes": size,
            "seconds": [round(seconds, 1), round(time.monotonic() - begun, 1)],
        }


def main() -> None:
    """Run it; the exit status is 1 if anything differs or is left behind."""
    arguments = parser(__doc__, "sampling_resume")
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0, help="of the moments")
    given = arguments.parse_args()
    header = {"kills": given.kills, "seed": given.seed, "command": COMMAND}
    cells = {str(n): (n, given.kills, given.seed) for n in (1, 2)}
    results = run_cells(measure, cells, given, header=header)
    rows = ["| processes | kills | of the command / of workers | iterations | draws | network calls | left behind |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name in cells:
        row = results[name]
        own = row["hit"].count("command")
        same = ["the same" if row[f"same {what}"] else "DIFFERENT" for what in ("draws", "network calls")]
        rows.append(
            f"| {name} | {row['kills']} | {own} / {row['kills'] - own} | {row['iterations']} | {' | '.join(same)} | "
            f"{', '.join(row['left behind']) or 'nothing'} |"
        )
    table = "\n".join(rows)
    write_table(
        given,
        f"# A reconstruction that is killed again and again\n\n`python benchmarks/sampling_resume.py` on {platform.machine()}, "
        f"torch {torch.__version__}. Four chains of the bundled prior with MALA, in batches of two, compared bit for bit with one "
        f"process that was left alone.\n\n{table}\n",
    )
    good = all(
        r["same draws"] and r["same network calls"] and not r["left behind"] and r["kills"] >= given.kills
        for r in results.values()
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
