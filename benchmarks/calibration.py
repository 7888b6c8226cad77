"""Calibration of the bundled prior: do the intervals hold what they promise, on truths that the prior itself draws?

    python benchmarks/calibration.py

For each problem, ``--pairs`` times: x from the prior, y from the forward model, ``--draws`` posterior draws by the default sampler; then
the ranks of each truth among its draws (simulation-based calibration, Talts et al. 2018; TARP, Lemos et al. 2023), see
``dpnp_inference/calibration.py``. Truths come from the prior's probability flow, so that this measures the sampler, not how well the
prior knows images. The prior as the sampler draws it may differ from the flow's, by its discretisation or since the network's noise levels
contradict each other: ``--own`` pairs of the first problem have truths that the sampler itself draws without a measurement.
Every pair has an inpainting mask of its own. The ranks are kept in ``benchmarks/results/calibration.json``, from where an interrupted run
goes on; the table and one plot a problem are written beside it.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from reconstruction import DDS, PROBLEMS, forward_model
from runner import parser, run_cells, write_table

from dpnp_inference import DPnP
from dpnp_inference.calibration import (
    INTENSITY,
    PROJECTED,
    UNCERTAIN_PIXELS,
    Ranks,
    assess,
    draw_calibration,
    rank_pair,
)
from dpnp_inference.check import CHAINS, RANKS, pair_seed, simulate_pair
from dpnp_shared.prior import Prior

DEFAULT = ("inpainting", "super-resolution", "quantisation")
CHUNK = 4
SEED = 0
OWN = ", own truths"
PRIOR: Prior


def start(prior: str) -> None:
    """Prepare a worker process."""
    global PRIOR
    PRIOR = Prior.from_pretrained(prior)


def run_cell(problem: str, dds: str, draws: int, first: int) -> dict[str, Any]:
    """Ranks of the four pairs from ``first`` on."""
    ranks, calls, seconds = [], 0, 0.0
    for pair in range(first, first + CHUNK):
        model = forward_model(problem.removesuffix(OWN), pair)
        sampler = DPnP(PRIOR, model, dds=dds)
        x, y = simulate_pair(PRIOR, model, seed=SEED, pair=pair, sampler=sampler if problem.endswith(OWN) else None)
        posterior = sampler.sample(y, chains=draws, seed=pair_seed(SEED, pair, CHAINS))
        ranks.append(rank_pair(x, posterior.flat, seed=pair_seed(SEED, pair, RANKS)))
        calls += posterior.diagnostics["network_calls"]
        seconds += posterior.diagnostics["seconds"]
    return {"ranks": Ranks.join(ranks).to_json(), "network_calls": calls, "seconds": seconds}


def report(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Plots, and the table as Markdown."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for key, result in results.items():
        cells.setdefault(key.rsplit("/", 1)[0], []).append(result)
    names = (UNCERTAIN_PIXELS, INTENSITY, PROJECTED)
    lines, details = [], []
    for cell, rows in sorted(cells.items(), key=lambda item: PROBLEMS.index(item[0].split("/")[0].removesuffix(OWN))):
        result = assess(Ranks.join(Ranks.from_json(row["ranks"]) for row in rows))
        name = re.sub(r"\W+", "_", cell)
        file = arguments.output.with_name(f"{arguments.output.stem}_{name}.png")
        draw_calibration(file, result, title=cell)
        quantities = {q.name: q for q in result.quantities}
        if not lines:
            levels = [f"{c.level:.0%}" for c in result.quantities[0].coverages]
            heads = [f"{level}, {name}" for name in names for level in levels]
            lines += [
                f"Truths inside the intervals of {result.draws} draws, in per cent ± standard error over pairs; TARP: largest distance "
                "of the expected coverage from the diagonal, ± its 99.9% band.\n",
                f"| problem | sampler | pairs | {' | '.join(heads)} | TARP | verdict | calls | seconds a pair |",
                "|---" * (len(heads) + 7) + "|",
            ]
        shown = [f"{100 * c.covered:.1f} ± {100 * c.error:.1f}" for name in names for c in quantities[name].coverages]
        calls, seconds = (sum(row[key] for row in rows) / result.pairs for key in ("network_calls", "seconds"))
        tarp = f"{result.tarp_deviation:+.3f} ± {result.coverage_band:.3f}"
        row = [*cell.split("/"), f"{result.pairs}", *shown, tarp, result.verdict, f"{calls:.0f}", f"{seconds:.1f}"]
        lines.append(f"| {' | '.join(row)} |")
        details.append(f"\n{cell}:\n\n" + "\n".join(f"- {line}" for line in result.describe().split("\n")))
    return "\n".join([*lines, *details]) + "\n"


def main() -> None:
    options = parser(__doc__, "calibration")
    options.add_argument("--prior", default="fashion_mnist")
    options.add_argument("--pairs", type=int, default=200, help="rounded up to fours")
    options.add_argument(
        "--draws", type=int, default=9, help="9 have an interval of 80 per cent, 19 one of 90, 39 one of 95"
    )
    options.add_argument("--problems", nargs="+", default=DEFAULT, choices=PROBLEMS)
    options.add_argument("--dds", nargs="+", default=["ddim"], choices=DDS)
    options.add_argument("--own", type=int, default=60, help="pairs with truths of the sampler's own")
    arguments = options.parse_args()
    cells = {
        f"{problem}/{dds}/{first}": (problem, dds, arguments.draws, first)
        for first in range(0, arguments.pairs, CHUNK)
        for problem in arguments.problems
        for dds in arguments.dds
    }
    first_problem = arguments.problems[0]
    cells |= {
        f"{first_problem}{OWN}/{dds}/{first}": (first_problem + OWN, dds, arguments.draws, first)
        for first in range(0, arguments.own, CHUNK)
        for dds in arguments.dds
    }
    header = {"prior": Prior.from_pretrained(arguments.prior).card.sha256, "draws": arguments.draws, "seed": SEED}
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.prior,))
    write_table(arguments, report(results, arguments))


if __name__ == "__main__":
    main()
