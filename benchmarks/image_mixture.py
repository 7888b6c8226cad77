"""Posteriors of images that are known exactly: is what the samplers draw right, down to the weights of the modes?

    python benchmarks/image_mixture.py

The prior is a mixture around 2,000 real images (Fashion-MNIST, 28 x 28, component variance 0.02), which has the geometry of images and,
for linear measurements, a closed-form posterior. Lower half missing, a 14 x 14 box missing, 4 x 4 average pooling, and 3 per cent of the
pixels seen; noise 0.05 and 0.3; problems with seeds from 0 on; 256 draws by each sampler (64 by DPS; 16 of each of 16 chains by replica
exchange), all with their defaults, and a population with more draws from the prior where little is seen and one with more network calls
where much is. Shown are, in the mean over the problems and beside the floor (as many exact draws):

- TV: total variation between the components' weights among the draws and in the exact posterior;
- W1: sliced Wasserstein-1 distance to exact draws;
- mean, std: root-mean-square error over the pixels of the draws' mean and standard deviation;
- 90%: how much of the exact posterior the pixels' 90% intervals contain.

Where a posterior has two modes of at least a fifth each (4 x 4 pooling, noise 0.3, first such seed) they are drawn with the weights that
each sampler gives them. Finished cells are kept in ``benchmarks/results/image_mixture.json``; tables and plots are written beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from mixture import calls_a_draw, column
from problems import IMAGE_OPERATORS, image_mixture, image_operator
from runner import parser, run_cells, write_table
from torch import Tensor

from dpnp_inference import DDSDDIM, DPnP, Population, Posterior, ReplicaExchange
from dpnp_inference.baselines import DPS
from dpnp_inference.metrics import sliced_wasserstein
from dpnp_shared.analytic import GaussianMixturePrior, LinearGaussianPosterior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise

SIGMAS = (0.05, 0.3)
DRAWS = 256
FIGURES = ("TV", "W1", "mean", "std", "90%")
METHODS: dict[str, Callable[[GaussianMixturePrior, ForwardModel, Tensor, int], Posterior]] = {
    "population, ddim": lambda prior, model, y, seed: DPnP(prior, model, population=True).sample(
        y, chains=DRAWS, seed=seed
    ),
    "population, ddpm": lambda prior, model, y, seed: DPnP(prior, model, population=True, dds="ddpm").sample(
        y, chains=DRAWS, seed=seed
    ),
    "population, start 32": lambda prior, model, y, seed: DPnP(prior, model, population=Population(start=32)).sample(
        y, chains=DRAWS, seed=seed
    ),
    "population, 32 calls": lambda prior, model, y, seed: DPnP(
        prior, model, population=True, dds=DDSDDIM(calls=32)
    ).sample(y, chains=DRAWS, seed=seed),
    "replica exchange": lambda prior, model, y, seed: DPnP(prior, model, population=ReplicaExchange()).sample(
        y, chains=16, draws=DRAWS // 16, seed=seed
    ),
    "chains, ddim": lambda prior, model, y, seed: DPnP(prior, model).sample(y, chains=DRAWS, seed=seed),
    "chains, ddpm": lambda prior, model, y, seed: DPnP(prior, model, dds="ddpm").sample(y, chains=DRAWS, seed=seed),
    "DPS": lambda prior, model, y, seed: DPS(prior, model).sample(y, chains=64, seed=seed),
}
ONLY = {"population, start 32": "sparse", "population, 32 calls": "lower half"}
FEW = tuple(method for method in METHODS if method != "population, ddim")
DATA = "data"


def start(data: str) -> None:
    """Prepare a worker process."""
    global DATA
    DATA = data


def problem(
    operator: str, sigma: float, seed: int
) -> tuple[GaussianMixturePrior, ForwardModel, Tensor, LinearGaussianPosterior]:
    """Prior, forward model, measurement and exact posterior."""
    prior = image_mixture(DATA)
    model = ForwardModel(image_operator(operator, seed), GaussianNoise(sigma))
    generator = torch.Generator().manual_seed(seed)
    y = model.simulate(prior.sample(1, generator=generator, dtype=torch.float64), generator=generator)[0]
    return prior, model, y, prior.posterior(model, y)


def component_weights(prior: GaussianMixturePrior, x: Tensor) -> Tensor:
    """Mean responsibility of each component for the draws, ``(K,)``."""
    square = torch.cdist(x.flatten(1).to(torch.float64), prior.means).square()
    return (prior.log_weights - square / (2 * prior.variance)).softmax(1).mean(0)


def figures(
    prior: GaussianMixturePrior, exact: LinearGaussianPosterior, draws: Tensor, reference: Tensor
) -> dict[str, float]:
    """How far draws ``(n, 1, 28, 28)`` are from the exact posterior, of which as many reference draws are given."""
    x = draws.to(torch.float64)
    low, high, level, _ = Posterior(x[None]).interval(0.9)
    std = exact.covariance.diagonal().sqrt().reshape(exact.mean.shape)
    return {
        "TV": 0.5 * float((component_weights(prior, x) - exact.weights).abs().sum()),
        "W1": sliced_wasserstein(x, reference[: len(x)]),
        "mean": float((x.mean(0) - exact.mean).square().mean().sqrt()),
        "std": float((x.std(0) - std).square().mean().sqrt()),
        "90%": float(((low <= reference) & (reference <= high)).double().mean()) + 0.9 - level,
    }


def run_cell(operator: str, sigma: float, method: str, seed: int) -> dict[str, float]:
    """One problem."""
    prior, model, y, exact = problem(operator, sigma, seed)
    reference, more = (
        exact.sample(DRAWS, generator=torch.Generator().manual_seed(100 * seed + stream), dtype=torch.float64)
        for stream in (0, 1)
    )
    if method == "floor":
        return figures(prior, exact, more, reference)
    begin = time.perf_counter()
    result = METHODS[method](prior, model, y.float(), seed)
    cost = {"calls": calls_a_draw(result), "seconds": time.perf_counter() - begin}
    if result.log_evidence is not None:
        cost["log_evidence_error"] = result.log_evidence - exact.log_evidence
    return figures(prior, exact, result.flat, reference) | cost


def table(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Markdown."""
    lines = [
        "| operator | noise | sampler | problems | TV | W1 | mean | std | 90% | log evidence (rms error) | calls a draw | seconds |",
        "|---" * 12 + "|",
    ]
    for operator in arguments.operators:
        for sigma in SIGMAS:
            for method in ("floor", *METHODS):
                values = {
                    f: column(results, f"{operator}/{sigma}", method, arguments.problems, f)
                    for f in (*FIGURES, "log_evidence_error", "calls", "seconds")
                }
                count = int(np.isfinite(values["TV"]).sum())
                if count == 0:
                    continue
                shown = [f"{np.nanmean(values[f]):.3f}" for f in FIGURES]
                error = values["log_evidence_error"]
                shown.append(f"{np.sqrt(np.nanmean(error**2)):.2f}" if np.isfinite(error).any() else "")
                shown += [
                    f"{np.nanmean(values[f]):.0f}" if np.isfinite(values[f]).any() else "" for f in ("calls", "seconds")
                ]
                lines.append(f"| {operator} | {sigma} | {method} | {count} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Total variation by problem."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    methods = ["floor", *METHODS]
    pairs = [(operator, sigma) for operator in arguments.operators for sigma in SIGMAS]
    axis = figure.subplots()
    for k, method in enumerate(methods):
        for j, (operator, sigma) in enumerate(pairs):
            v = column(results, f"{operator}/{sigma}", method, arguments.problems, "TV")
            v = v[np.isfinite(v)]
            place = j + (k - len(methods) / 2) / (len(methods) + 2)
            axis.plot(np.full(len(v), place), v, "o", ms=3, color=f"C{k}", alpha=0.5, label=method if j == 0 else None)
            if len(v):
                axis.plot(place, v.mean(), "_", ms=10, mew=2, color=f"C{k}")
    axis.set_xticks(range(len(pairs)), [f"{operator}\nnoise {sigma}" for operator, sigma in pairs], fontsize=8)
    axis.set(ylabel="total variation of the modes")
    axis.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(arguments.output.with_suffix(".png"), dpi=110)


def draw_bimodal(arguments: argparse.Namespace) -> str:
    """Two modes, and the weights they get."""
    for seed in range(1000):
        prior, model, y, exact = problem("super-resolution", 0.3, seed)
        weights, modes = exact.weights.topk(2)
        if float(weights[1]) >= 0.2:
            break
    names = ("population, ddim", "chains, ddim")
    draws = {name: METHODS[name](prior, model, y.float(), seed).flat for name in names}
    found = {"exact": weights} | {name: component_weights(prior, x)[modes] for name, x in draws.items()}
    figure = Figure(figsize=(13, 2.6), layout="constrained")
    axes = figure.subplots(1, 3 + 2 * len(names))
    panels = [("measurement", model.operator.display(y))]
    panels += [(f"mode {i + 1}", prior.means[k].reshape(1, 28, 28)) for i, k in enumerate(modes)]
    for name in names:
        panels += [(f"{name}\nmean", draws[name].mean(0)), (f"{name}\nstd", draws[name].std(0))]
    for axis, (title, image) in zip(axes, panels, strict=True):
        axis.imshow(image[0], cmap="magma" if "std" in title else "gray")
        axis.set_title(title, fontsize=8)
        axis.axis("off")
    figure.savefig(arguments.output.with_name("bimodal.png"), dpi=110)
    rows = [f"| {name} | {w[0]:.3f} | {w[1]:.3f} | {1 - w.sum():.3f} |" for name, w in found.items()]
    return (
        f"\nTwo modes (4 x 4 pooling, noise 0.3, seed {seed}), their weights and that of all other images:\n\n"
        "| sampler | mode 1 | mode 2 | others |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    options = parser(__doc__, "image_mixture")
    options.add_argument("--operators", nargs="+", default=IMAGE_OPERATORS, choices=IMAGE_OPERATORS)
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options.add_argument("--problems", type=int, default=10, help="with seeds from 0 on")
    options.add_argument(
        "--few", type=int, default=3, help=f"problems for the samplers that cost most ({', '.join(FEW)})"
    )
    options.add_argument("--data", default="data", help="where Fashion-MNIST is, or is downloaded to")
    arguments = options.parse_args()
    cells = {
        f"{operator}/{sigma}/{method}/{seed}": (operator, sigma, method, seed)
        for seed in range(arguments.problems)
        for operator in arguments.operators
        for sigma in SIGMAS
        for method in ("floor", *arguments.methods)
        if (seed < arguments.few or method not in FEW) and ONLY.get(method, operator) == operator
    }
    results = run_cells(
        run_cell, cells, arguments, header={"draws": DRAWS}, start=start, start_arguments=(arguments.data,)
    )
    start(arguments.data)
    write_table(arguments, table(results, arguments) + draw_bimodal(arguments))
    plot(results, arguments)


if __name__ == "__main__":
    main()
