"""The mixture benchmark of Cardoso et al. (MCGdiff, ICLR 2024): how far posterior draws are from exact ones.

    python benchmarks/mixture.py

25 well separated components in d = 8, 80 or 800 dimensions, seen through m = 1, 2 or 4 random linear measurements with noise; 20 problems a
cell, whose seeds are 0 to 19. Shown is the sliced Wasserstein-1 distance (1,000 directions) of 1,000 draws to 1,000 exact ones, beside the
floor (two exact sets against each other) and draws from the prior; the error of the log evidence; and network calls for each of the 1,000
draws. Everything runs with its defaults, except that DPS takes ζ = 0.1 and that replica exchange makes its 1,000 draws by 50
chains. The last table is the population with fewer and with more network calls. Finished problems are kept in
``benchmarks/results/mixture.json``, from where an interrupted run goes on; tables and plot are written beside it. ``--cells 8,1 80,2`` and
``--methods`` select.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from problems import mixture_problem
from runner import parser, run_cells, write_table
from torch import Tensor

from dpnp_inference import DDSDDIM, DPnP, Population, Posterior, ReplicaExchange
from dpnp_inference.baselines import DPS
from dpnp_inference.metrics import sliced_wasserstein
from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.forward_model import ForwardModel

CELLS = tuple(f"{d},{m}" for d in (8, 80, 800) for m in (1, 2, 4))
DRAWS = 1000
Sampler = Callable[[GaussianMixturePrior, ForwardModel, Tensor, int], Posterior]


def dpnp(*, chains: int = DRAWS, draws: int = 1, thin: int = 1, **settings: Any) -> Sampler:
    """DPnP with these settings."""
    return lambda prior, model, y, seed: DPnP(prior, model, **settings).sample(
        y, chains=chains, draws=draws, thin=thin, seed=seed
    )


METHODS: dict[str, Sampler] = {
    "DPnP chains, ddim": dpnp(),
    "DPnP chains, ddpm": dpnp(dds="ddpm"),
    "DPnP population, ddim": dpnp(population=True),
    "DPnP population, ddpm": dpnp(population=True, dds="ddpm"),
    "DPnP replica exchange": dpnp(population=ReplicaExchange(), chains=50, draws=20, thin=2),
    "DPS": lambda prior, model, y, seed: DPS(prior, model, zeta=0.1).sample(y, chains=DRAWS, seed=seed),
}
BUDGETS: dict[str, Sampler] = {
    "start 1, ess .5, 4 calls": dpnp(population=Population(start=1, ess=0.5, final=1), dds=DDSDDIM(calls=4)),
    "start 1, ess .8, 6 calls": dpnp(population=Population(start=1, final=2), dds=DDSDDIM(calls=6)),
    "start 4, ess .8": dpnp(population=Population(start=4)),
    "start 16, ess .8": dpnp(population=Population(start=16)),
    "start 16, ess .9, 2 sweeps": dpnp(population=Population(start=16, ess=0.9, sweeps=2)),
}
CURVE = ("8,1", "8,2", "80,1")


def run_cell(cell: str, method: str, seed: int) -> dict[str, float]:
    """One problem: distance, calls and the error of the log evidence."""
    d, m = map(int, cell.split(","))
    prior, model, y = mixture_problem(d, m, seed)
    posterior = prior.posterior(model, y)

    def exact(stream: int) -> Tensor:
        return posterior.sample(
            DRAWS, generator=torch.Generator().manual_seed(100 * seed + stream), dtype=torch.float64
        )

    reference = exact(0)
    if method == "floor":
        return {"distance": sliced_wasserstein(exact(1), reference)}
    if method == "prior":
        draws = prior.sample(DRAWS, generator=torch.Generator().manual_seed(100 * seed + 1), dtype=torch.float64)
        return {"distance": sliced_wasserstein(draws, reference)}
    start = time.perf_counter()
    result = (METHODS | BUDGETS)[method](prior, model, y.float(), seed)
    figures = {
        "distance": sliced_wasserstein(result.flat, reference),
        "calls": calls_a_draw(result),
        "seconds": time.perf_counter() - start,
    }
    if result.log_evidence is not None:
        figures["log_evidence_error"] = result.log_evidence - posterior.log_evidence
    return figures


def calls_a_draw(result: Posterior, kind: str = "network_calls") -> float:
    """Images that the network has denoised, or another kind of calls that the record counts, over the number of draws."""
    record = result.diagnostics
    return record.get(kind, 0) * record["chains"] / record["batches"] / len(result.flat)


def column(results: dict[str, Any], cell: str, method: str, problems: int, figure: str = "distance") -> np.ndarray:
    """A figure of all problems of a cell, NaN where it is missing."""
    rows = (results.get(f"{cell}/{method}/{seed}", {}) for seed in range(problems))
    return np.array([row.get(figure, np.nan) for row in rows], dtype=float)


def mean_and_interval(values: np.ndarray) -> str:
    """Mean and half of the 95% interval of the mean."""
    n = np.isfinite(values).sum()
    return f"{np.nanmean(values):.2f} ± {1.96 * np.nanstd(values, ddof=1) / np.sqrt(n):.2f}" if n > 1 else ""


def tables(results: dict[str, Any], cells: list[str], problems: int) -> str:
    """Markdown."""
    methods = ["floor", "prior", *METHODS]
    lines = [
        f"Mean sliced Wasserstein-1 distance over {problems} problems ± half of its 95% interval; in brackets the mean over the mean "
        "floor.\n",
        f"| d, m | {' | '.join(methods)} |",
        "|---" * (len(methods) + 1) + "|",
    ]
    for cell in cells:
        floor = np.nanmean(column(results, cell, "floor", problems))
        values = {method: column(results, cell, method, problems) for method in methods}
        shown = [
            f"{mean_and_interval(v)} ({np.nanmean(v) / floor:.2f})" if np.isfinite(v).any() else ""
            for v in values.values()
        ]
        lines.append(f"| {cell.replace(',', ', ')} | {' | '.join(shown)} |")
    lines += [
        "\nRoot-mean-square error of the log evidence, and network calls a draw: mean (largest).\n",
        f"| d, m | log evidence, ddim | log evidence, ddpm | {' | '.join(f'calls, {method}' for method in METHODS)} |",
        "|---" * (len(METHODS) + 3) + "|",
    ]
    for cell in cells:
        shown = []
        for method in ("DPnP population, ddim", "DPnP population, ddpm"):
            error = column(results, cell, method, problems, "log_evidence_error")
            shown.append(f"{np.sqrt(np.nanmean(error**2)):.2f}" if np.isfinite(error).any() else "")
        for method in METHODS:
            calls = column(results, cell, method, problems, "calls")
            shown.append(f"{np.nanmean(calls):.0f} ({np.nanmax(calls):.0f})" if np.isfinite(calls).any() else "")
        lines.append(f"| {cell.replace(',', ', ')} | {' | '.join(shown)} |")
    lines += [
        "\nThe population with fewer and more network calls: distance over the floor, and calls a draw.\n",
        f"| settings | {' | '.join(cell.replace(',', ', ') for cell in CURVE)} |",
        "|---" * (len(CURVE) + 1) + "|",
    ]
    for method in curve_methods():
        shown = [
            f"{ratio:.2f} ({calls:.0f} calls)" for calls, ratio in (point(results, c, method, problems) for c in CURVE)
        ]
        lines.append(f"| {'default' if method in METHODS else method} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def curve_methods() -> list[str]:
    """Populations by the calls they make, the default among them."""
    budgets = list(BUDGETS)
    return [*budgets[:3], "DPnP population, ddim", *budgets[3:]]


def point(results: dict[str, Any], cell: str, method: str, problems: int) -> tuple[float, float]:
    """Calls a draw, and distance over the floor."""
    calls, distance, floor = (
        np.nanmean(v)
        for v in (
            column(results, cell, method, problems, "calls"),
            column(results, cell, method, problems),
            column(results, cell, "floor", problems),
        )
    )
    return float(calls), float(distance / floor)


def draw(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Distance over the floor by cell and method, and against the number of calls."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    n = arguments.problems
    methods = ["prior", *METHODS]
    for k, method in enumerate(methods):
        ratios = [
            np.nanmean(column(results, c, method, n)) / np.nanmean(column(results, c, "floor", n))
            for c in arguments.cells
        ]
        left.bar(
            np.arange(len(arguments.cells)) + (k - len(methods) / 2) / (len(methods) + 1),
            ratios,
            1 / (len(methods) + 1),
            label=method,
        )
    left.axhline(1, color="black", lw=1)
    left.set(yscale="log", xlabel="d, m", ylabel="distance over the floor")
    left.set_xticks(range(len(arguments.cells)), arguments.cells)
    left.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for cell in CURVE:
        points = sorted(point(results, cell, method, n) for method in curve_methods())
        right.plot(*zip(*points, strict=True), "o-", label=cell)
    right.axhline(1, color="black", lw=1)
    right.set(xlabel="network calls a draw", ylabel="distance over the floor", title="population")
    right.legend(fontsize=7)
    figure.savefig(arguments.output.with_suffix(".png"), dpi=110)


def main() -> None:
    options = parser(__doc__, "mixture")
    options.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS)
    options.add_argument("--methods", nargs="+", default=[*METHODS, *BUDGETS], choices=[*METHODS, *BUDGETS])
    options.add_argument("--problems", type=int, default=20, help="with seeds from 0 on")
    arguments = options.parse_args()
    cells = {
        f"{cell}/{method}/{seed}": (cell, method, seed)
        for cell in arguments.cells
        for method in ("floor", "prior", *arguments.methods)
        for seed in range(arguments.problems)
        if method not in BUDGETS or cell in CURVE
    }
    results = run_cells(run_cell, cells, arguments, header={"draws": DRAWS})
    write_table(arguments, tables(results, list(arguments.cells), arguments.problems))
    draw(results, arguments)


if __name__ == "__main__":
    main()
