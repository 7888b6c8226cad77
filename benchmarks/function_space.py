"""Does the accuracy of function-space Langevin sampling depend on the resolution? Two problems on three grids, against pCN.

    python benchmarks/function_space.py

The unknown is a function on the unit square, a draw from a Gaussian random field. It is measured once; the same measurement is explained
on grids of 16, 32 and 64 pixels a side:

- cubic: local averages u at 9 points, seen as u + 0.3 u^3 with noise 0.3;
- darcy: the pressure of Darcy flow at 16 sensors, the function being the logarithm of the permeability, with noise 0.005 (pressures are
  of size 0.1).

Preconditioned Crank-Nicolson (pCN) with the field's own law is exact up to Monte Carlo error. Langevin sampling has the exact score of
the field, or the one of a Fourier neural operator that was trained on 16 x 16 pixels only (``priors/gaussian_fields``). Reported are a
functional, the average over a patch away from the sensors, and the posterior mean as a function, both with their standard errors between
chains. Finished cells are kept in ``benchmarks/results/function_space.json``; table and picture are written beside it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from runner import parser, run_cells, write_table
from torch import Tensor

from dpnp_inference.function_space import FunctionSpaceLangevin
from dpnp_inference.pcn import PCN
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.field_prior import FieldPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import CubicAverages, DarcyFlow, LocalAverages
from dpnp_shared.prior import Prior, PriorError

GRIDS = (16, 32, 64)
SMALL = 16  # grid on which posterior means are compared
PROBLEMS = ("cubic", "darcy")
SAMPLERS = ("pCN", "exact score", "trained score")
FIELD = GaussianField(
    std=1.0, length=0.2, smoothness=2.5
)  # the unknown's law, as dpnp_training.function_space writes it
NOISE = GaussianField(
    std=1.0, length=0.25, smoothness=2.0
)  # of the forward process, as in the training's configuration
POINTS = {"cubic": [0.2, 0.5, 0.8], "darcy": [0.2, 0.4, 0.6, 0.8]}
PATCH = ([[0.35, 0.65]], 0.1)  # centre and width
PRIOR = "gaussian_fields"


def start(prior: str) -> None:
    """Prepare a worker process."""
    global PRIOR
    PRIOR = prior


def model_of(problem: str, n: int) -> ForwardModel:
    """The forward model on a grid."""
    points = [[u, v] for u in POINTS[problem] for v in POINTS[problem]]
    if problem == "cubic":
        return ForwardModel(CubicAverages((1, n, n), points, 0.06, cubic=0.3), GaussianNoise(0.3))
    return ForwardModel(DarcyFlow((1, n, n), points, tolerance=1e-5), GaussianNoise(0.005))


def truth_and_measurement(problem: str) -> tuple[Tensor, Tensor]:
    """One function on the finest grid, and what is measured of it."""
    n, generator = GRIDS[-1], torch.Generator().manual_seed(PROBLEMS.index(problem))
    x = FIELD.sample(1, (n, n), generator=generator, dtype=torch.float64)
    return x[0], model_of(problem, n).simulate(x, generator=generator)[0]


def run_cell(problem: str, n: int, sampler: str, chains: int, draws: int, effort: float) -> dict[str, Any]:
    """One sampler on one grid."""
    _, y = truth_and_measurement(problem)
    model, exact = model_of(problem, n), FieldPrior(FIELD, NOISE, (1, n, n))
    solver: PCN | FunctionSpaceLangevin
    if sampler == "pCN":
        solver, thin = PCN(exact, model, burn_in=round(1500 * effort)), max(1, round(100 * effort))
    else:
        prior: Denoiser = exact if sampler == "exact score" else Prior.from_pretrained(PRIOR)
        solver = FunctionSpaceLangevin(
            prior, model, annealing=round(100 * effort), burn_in=round(400 * effort), rate=1.0
        )
        thin = max(1, round(25 * effort))
    posterior = solver.sample(y, chains=chains, seed=0, draws=draws, thin=thin)
    x = posterior.samples.double()
    g = x.flatten(2) @ LocalAverages((1, n, n), *PATCH).matrix[0]  # (chains, draws)
    means = FIELD.resample(x.mean(1)[:, 0], (SMALL, SMALL))  # of each chain
    return {
        "functional": float(g.mean()),
        "functional_se": float(g.mean(1).std()) / math.sqrt(chains),
        "functional_std": float(g.std()),
        "mean": means.mean(0).tolist(),
        "mean_se": float(means.var(0).mean()) ** 0.5 / math.sqrt(chains),
        "std": float(x.flatten(0, 1).std(0).mean()),
        "forward_calls": posterior.diagnostics["forward_calls"],
        "network_calls": posterior.diagnostics["network_calls"],
        "seconds": posterior.diagnostics["seconds"],
    }


def change(a: dict[str, Any], b: dict[str, Any]) -> tuple[float, float]:
    """Root-mean-square difference of two posterior means, and what Monte Carlo error alone would show."""
    difference = torch.tensor(a["mean"]) - torch.tensor(b["mean"])
    return float(difference.square().mean().sqrt()), math.hypot(a["mean_se"], b["mean_se"])


def finest_of(results: dict[str, Any], problem: str, sampler: str) -> dict[str, Any] | None:
    """The result on the finest grid that is finished."""
    return next((r for n in reversed(GRIDS) if (r := results.get(f"{problem}/{n}/{sampler}")) is not None), None)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "The average over a patch ± standard error, and how far the posterior mean is from pCN's on the finest grid and from its own "
        "there (root mean square); in brackets what Monte Carlo error alone would show.\n",
        "| problem | sampler | grid | patch | posterior std | mean, from pCN | from its own | forward calls | network calls | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for problem in PROBLEMS:
        for sampler in SAMPLERS:
            for n in GRIDS:
                r = results.get(f"{problem}/{n}/{sampler}")
                reference, finest = (finest_of(results, problem, s) for s in ("pCN", sampler))
                if r is None or reference is None or finest is None:
                    continue
                away = "" if r is reference else "{:.3f} ({:.3f})".format(*change(r, reference))
                moved = "" if r is finest else "{:.3f} ({:.3f})".format(*change(r, finest))
                lines.append(
                    f"| {problem} | {sampler} | {n} | {r['functional']:.3f} ± {r['functional_se']:.3f} | {r['functional_std']:.3f} | "
                    f"{away} | {moved} | {r['forward_calls']} | {r['network_calls']} | {r['seconds']:.0f} |"
                )
    return "\n".join([*lines, "", *summary(results)]) + "\n"


def summary(results: dict[str, Any]) -> list[str]:
    """A table of the largest changes between grids, and of the largest distances from pCN, in units of Monte Carlo error."""
    lines = [
        "The largest of all pairs of grids, and from pCN of all grids, as a multiple of Monte Carlo error: of the patch in standard errors "
        "of the difference, of the posterior mean in root mean squares.\n",
        "| problem | sampler | patch between grids | mean between grids | patch from pCN | mean from pCN |",
        "|---|---|---|---|---|---|",
    ]
    for problem in PROBLEMS:
        for sampler in SAMPLERS:
            found = {n: r for n in GRIDS if (r := results.get(f"{problem}/{n}/{sampler}")) is not None}
            grids = list(itertools.combinations(found.values(), 2))
            exact = [(r, e) for n, r in found.items() if (e := results.get(f"{problem}/{n}/pCN")) not in (None, r)]
            cells = [
                f"{max(map(of, pairs)):.2f}" if pairs else "" for pairs in (grids, exact) for of in (patches, means)
            ]
            lines.append(f"| {problem} | {sampler} | {' | '.join(cells)} |")
    return lines


def patches(pair: tuple[dict[str, Any], dict[str, Any]]) -> float:
    """How far two functionals are apart, in standard errors."""
    a, b = pair
    return float(abs(a["functional"] - b["functional"]) / math.hypot(a["functional_se"], b["functional_se"]))


def means(pair: tuple[dict[str, Any], dict[str, Any]]) -> float:
    """How far two posterior means are apart, as a multiple of what Monte Carlo error alone would show."""
    difference, expected = change(*pair)
    return difference / expected


def draw(results: dict[str, Any], path: Any) -> None:
    """The truth, and posterior means on each grid by each sampler; the functional with its error."""
    figure, axes = plt.subplots(2 * len(SAMPLERS), len(GRIDS) + 2, figsize=(11, 12), constrained_layout=True)
    for i, problem in enumerate(PROBLEMS):
        truth, _ = truth_and_measurement(problem)
        for j, sampler in enumerate(SAMPLERS):
            row = axes[len(SAMPLERS) * i + j]
            row[0].imshow(truth[0], vmin=-2.5, vmax=2.5, cmap="RdBu_r")
            row[0].set_ylabel(f"{problem}\n{sampler}")
            row[0].set_title("truth", fontsize=9)
            for column, n in zip(row[1:-1], GRIDS, strict=True):
                if (r := results.get(f"{problem}/{n}/{sampler}")) is not None:
                    column.imshow(r["mean"], vmin=-2.5, vmax=2.5, cmap="RdBu_r")
                    row[-1].errorbar(n, r["functional"], 2 * r["functional_se"], fmt="o", color="black")
                column.set_title(f"mean, grid {n}", fontsize=9)
            for axis in row[:-1]:
                axis.set_xticks([])
                axis.set_yticks([])
            row[-1].set_xscale("log", base=2)
            row[-1].set_xticks(GRIDS, [str(n) for n in GRIDS])
            row[-1].set_title("patch ± 2 s.e.", fontsize=9)
        lasts = [axes[len(SAMPLERS) * i + j][-1] for j in range(len(SAMPLERS))]
        limits = [limit for axis in lasts for limit in axis.get_ylim()]
        for axis in lasts:
            axis.set_ylim(min(limits), max(limits))
    figure.savefig(path, dpi=80)


def main() -> None:
    options = parser(__doc__, "function_space")
    options.add_argument("--prior", default=PRIOR, help="the trained prior")
    options.add_argument("--chains", type=int, default=16)
    options.add_argument("--draws", type=int, default=20)
    options.add_argument("--effort", type=float, default=1.0, help="factor of all numbers of steps")
    options.add_argument("--grids", type=int, nargs="+", default=GRIDS, choices=GRIDS)
    arguments = options.parse_args()
    try:
        weights = Prior.from_pretrained(arguments.prior).card.sha256
    except PriorError as error:
        raise SystemExit(str(error)) from error
    header = {"chains": arguments.chains, "draws": arguments.draws, "effort": arguments.effort, "prior": weights}
    size = (arguments.chains, arguments.draws, arguments.effort)
    cells = {f"{p}/{n}/{s}": (p, n, s, *size) for n in arguments.grids for p in PROBLEMS for s in SAMPLERS}
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.prior,))
    write_table(arguments, table(results))
    draw(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
