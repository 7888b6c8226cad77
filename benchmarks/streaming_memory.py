"""Peak memory of posterior statistics against the number of draws: all draws kept, or statistics of draws that go by.

    python benchmarks/streaming_memory.py

Each cell is a process of its own. It makes draws of an autocorrelated Gaussian law (no network, so that nothing hides what the statistics
cost), a draw of every chain at a time as a sampler does, and asks for mean, standard deviation, a 90% interval, the median and R-hat. Peak
memory is that above what the process held before its first draw.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from runner import RESULTS

from dpnp_inference import Posterior
from dpnp_inference.streaming import RunningPosterior

KINDS = ("kept", "statistics")


def measure(kind: str, draws: int, chains: int, side: int) -> dict[str, float]:
    """One cell: peak memory in MiB, seconds for each draw of all chains, and what the statistics came to."""
    generator = torch.Generator().manual_seed(0)
    shape, every = (1, side, side), range(chains)
    start, before = time.perf_counter(), memory("VmRSS")
    reset_peak()
    running = RunningPosterior(shape, draws=draws)
    kept = []
    x = torch.randn((chains, *shape), generator=generator)
    for _ in range(draws):
        x = 0.8 * x + 0.6 * torch.randn((chains, *shape), generator=generator)
        if kind == "kept":
            kept.append(x)
        else:
            running.update(x, every)
    if kind == "kept":
        posterior = Posterior(torch.stack(kept, dim=1))
        r_hat = plain_split_r_hat(posterior.samples)
    else:
        posterior, r_hat = Posterior(x[:, None], {}, running), running.r_hat
    interval = posterior.interval(0.9)
    figures = {
        "mean": float(posterior.mean.mean()),
        "std": float(posterior.std.mean()),
        "median": float(posterior.quantile(0.5).mean()),
        "width": float((interval.high - interval.low).mean()),
        "r_hat": float(r_hat.max()),
    }
    peak = (memory("VmHWM") - before) / 2**10
    return {"peak_mib": peak, "seconds_a_draw": (time.perf_counter() - start) / draws, **figures}


def plain_split_r_hat(x: torch.Tensor) -> torch.Tensor:
    """Split R-hat without ranks of ``(chains, draws, …)``, for comparison."""
    n = x.shape[1] // 2
    halves = torch.cat([x[:, :n], x[:, -n:]])
    return (halves.mean(1).var(0) / halves.var(1).mean(0) + (n - 1) / n).sqrt()


def memory(name: str) -> int:
    """A count of Linux about this process, in KiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:"))


def reset_peak() -> None:
    """Let the peak start from what is held now, not from what imports took."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="of the square image")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "streaming_memory.json", help="the table lies beside it"
    )
    parser.add_argument("--cell", nargs=2, metavar=("KIND", "DRAWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("peak memory is read from Linux's /proc, which is not there")
    if arguments.cell:
        print(json.dumps(measure(arguments.cell[0], int(arguments.cell[1]), arguments.chains, arguments.side)))
        return
    rows, lines = [], []
    for draws in arguments.draws:
        row: dict[str, object] = {"draws": draws}
        for kind in KINDS:
            options = ["--chains", str(arguments.chains), "--side", str(arguments.side)]
            command = [sys.executable, __file__, "--cell", kind, str(draws), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{kind}, {draws} draws: {done.stderr}")
            row[kind] = json.loads(done.stdout)
        rows.append(row)
        kept, statistics = row["kept"], row["statistics"]
        lines.append(
            f"| {draws} | {kept['peak_mib']:.0f} | {statistics['peak_mib']:.0f} | {1e3 * statistics['seconds_a_draw']:.0f} | "
            + " | ".join(
                f"{kept[name]:.4f} / {statistics[name]:.4f}" for name in ("mean", "std", "median", "width", "r_hat")
            )
            + " |"
        )
    text = (
        f"{arguments.chains} chains, images of {arguments.side} x {arguments.side} pixels; figures are averages over pixels (R-hat: the "
        "worst), of the kept draws / of the statistics.\n\n"
        "| draws a chain | peak, all kept (MiB) | peak, statistics (MiB) | ms for a draw of all chains | mean | std | median | "
        "width of 90% intervals | R-hat |\n|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    header = {"chains": arguments.chains, "side": arguments.side, "torch": torch.__version__}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    staged = arguments.output.with_suffix(".tmp")
    staged.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")
    os.replace(staged, arguments.output)
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
