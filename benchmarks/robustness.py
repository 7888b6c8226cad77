"""How DPnP's error grows with the score's error and with unfinished proximal steps (the paper's non-asymptotic theorem, drawn).

    python benchmarks/robustness.py

Priors are random Gaussian mixtures in 4 dimensions with 3 overlapping components, so that score and posterior are known exactly; two
entries of a random linear map are measured. Two things are made worse on purpose, one at a time:

- the score: a smooth field of length exactly ε is added to it, at every point and noise level, so that E|s_θ - s|² = ε² at every noise
  level whatever the law of x;
- the proximal step: MALA takes only so many proposals a draw, with its step size adapted (20 more proposals whenever η is new) or left at
  its first value.

Shown is the sliced Wasserstein-1 distance to exact draws, over several problems (mean ± standard error), beside the floor: exact draws
against exact draws. A run at fixed η is compared with the posterior that it should have, that of the noise covariance R + η² A Aᵀ; the
default schedule with the true posterior. Results are kept in ``benchmarks/results/robustness.json``; table and plot are written
beside it.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from runner import parser, run_cells, write_table
from torch import Tensor

from dpnp_inference import MALA, Annealing, ClosedForm, DPnP
from dpnp_inference.metrics import sliced_wasserstein
from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.denoiser import Denoiser, expand_sigma
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MatrixOperator

D, K, M = 4, 3, 2  # dimensions, components, measurements
SHAPE = (1, 1, D)
ETA, ITERATIONS = 0.7, 40  # of the runs at fixed η
DRAWS = 2000
EPSILONS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
STEPS = (1, 2, 5, 10, 20, 50)
SCHEDULES = ("fixed", "default")


class PerturbedPrior(Denoiser):
    r"""A prior whose score is off by exactly ε: :math:`\tilde s = s + \varepsilon\, e(x)`, :math:`|e(x)| = 1` for all x.

    That is :math:`\tilde D(x; \sigma) = D(x; \sigma) + \sigma^2 \varepsilon\, e(x)`. The field e has pairs of entries
    :math:`\sqrt{2/d}\,(\cos\theta_j, \sin\theta_j)` with :math:`\theta_j = \omega_j^T x / \ell + \varphi_j`, random but fixed, and varies
    over the prior's spread ℓ.

    Args:
        prior: the exact one, over an even number of dimensions.
        epsilon: ε, one over image units.
        seed: of the field.
    """

    def __init__(self, prior: GaussianMixturePrior, epsilon: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.prior, self.epsilon, d = prior, epsilon, prior.means.shape[1]
        self.omega = torch.randn(d // 2, d, generator=generator, dtype=torch.float64) / prior.spread
        self.phi = 2 * math.pi * torch.rand(d // 2, generator=generator, dtype=torch.float64)
        self.image_shape, self.spread = prior.image_shape, prior.spread
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max

    def field(self, x: Tensor) -> Tensor:
        """e(x), shaped like ``x``."""
        theta = x.flatten(1) @ self.omega.T.to(x.dtype) + self.phi.to(x.dtype)
        return (torch.cat([theta.cos(), theta.sin()], 1) / math.sqrt(theta.shape[1])).reshape(x.shape)

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """See the class."""
        return self.prior(x, sigma) + expand_sigma(sigma, x) ** 2 * self.epsilon * self.field(x)


def problem(seed: int) -> tuple[GaussianMixturePrior, ForwardModel, Tensor]:
    """A random prior, forward model and measurement."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.8 * torch.randn(K, D, generator=generator, dtype=torch.float64)
    weights = 0.2 + torch.rand(K, generator=generator, dtype=torch.float64)
    prior = GaussianMixturePrior(means, weights / weights.sum(), 0.25, SHAPE)
    A = torch.randn(M, D, generator=generator, dtype=torch.float64)
    model = ForwardModel(MatrixOperator(A / torch.linalg.matrix_norm(A, 2), SHAPE), GaussianNoise(0.1))
    x = prior.sample(1, generator=generator, dtype=torch.float64)
    return prior, model, model.simulate(x, generator=generator)[0]


def run_cell(schedule: str, epsilon: float, steps: int | None, warmup: int, seed: int) -> dict[str, float]:
    """Errors of one run; ``steps`` is None for the closed-form proximal step."""
    prior, model, y = problem(seed)
    fixed = schedule == "fixed"
    dpnp = DPnP(
        PerturbedPrior(prior, epsilon, 1000 + seed),
        model,
        proximal=ClosedForm(exact_splitting=not fixed) if steps is None else MALA(steps=steps, warmup=warmup),
        annealing=Annealing(eta_max=ETA, eta_min=ETA, constant=ITERATIONS, decay=1, final=0) if fixed else "auto",
        dtype=torch.float64,
    )
    exact = prior.posterior(model, y, extra_noise=ETA if fixed else 0.0)
    generator = torch.Generator().manual_seed(2000 + seed)
    a, b = (exact.sample(DRAWS, generator=generator, dtype=torch.float64) for _ in range(2))
    posterior = dpnp.sample(y, chains=DRAWS, seed=seed)
    return {
        "w1": sliced_wasserstein(posterior.flat, a),
        "w1_floor": sliced_wasserstein(b, a),
        "mean": float((posterior.mean - exact.mean).norm()),
        "mean_floor": float((b.mean(0) - exact.mean).norm()),
        "std": float(exact.covariance.diagonal().mean().sqrt()),
    }


def collect(results: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard error over problems, of each cell without its seed."""
    cells: dict[str, list[dict[str, float]]] = {}
    for key, figures in results.items():
        cells.setdefault(key.rsplit("/", 1)[0], []).append(figures)
    return {
        key: {
            name: (float(np.mean(values)), float(np.std(values, ddof=min(1, len(values) - 1)) / math.sqrt(len(values))))
            for name in rows[0]
            for values in [[row[name] for row in rows]]
        }
        for key, rows in cells.items()
    }


def slope(figures: dict[str, dict[str, tuple[float, float]]], schedule: str) -> float:
    """Exponent of ε in the growth of W1, between the two largest ε."""
    a, b = EPSILONS[-2:]
    ratio = figures[f"score/{schedule}/{b:g}"]["w1"][0] / figures[f"score/{schedule}/{a:g}"]["w1"][0]
    return math.log(ratio) / math.log(b / a)


def table(figures: dict[str, dict[str, tuple[float, float]]], problems: int) -> str:
    def cell(key: str, name: str) -> str:
        mean, error = figures[key][name]
        return f"{mean:.4f} ± {error:.4f}"

    floors = ", ".join(f"{cell(f'score/{s}/0', 'w1_floor')} ({s})" for s in SCHEDULES)
    mean_floors = ", ".join(f"{cell(f'score/{s}/0', 'mean_floor')} ({s})" for s in SCHEDULES)
    stds = ", ".join(f"{figures[f'score/{s}/0']['std'][0]:.2f} ({s})" for s in SCHEDULES)
    lines = [
        f"Sliced W1 to exact draws and error of the posterior mean, mean ± standard error over {problems} problems; {DRAWS} draws. "
        f"Floors: W1 {floors}; mean {mean_floors}. Standard deviation of the exact posterior: {stds}.\n",
        "| score error ε | W1, fixed η | W1, default schedule | mean, fixed η | mean, default schedule |",
        "|---|---|---|---|---|",
    ]
    for e in EPSILONS:
        shown = [cell(f"score/{s}/{e:g}", name) for name in ("w1", "mean") for s in SCHEDULES]
        lines.append(f"| {e:g} | {' | '.join(shown)} |")
    growth = ", ".join(f"{slope(figures, s):.2f} ({s})" for s in SCHEDULES)
    lines.append(f"\nExponent of ε in the growth of W1, from ε = {EPSILONS[-2]:g} to {EPSILONS[-1]:g}: {growth}.\n")
    lines += [
        "| MALA proposals a draw | W1, fixed η | W1, fixed η, not adapted | W1, default schedule | W1, default schedule, not adapted |",
        "|---|---|---|---|---|",
    ]
    for n in STEPS:
        shown = [cell(f"mala/{s}/{a}/{n}", "w1") for s in SCHEDULES for a in ("adapted", "not adapted")]
        lines.append(f"| {n} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def draw(arguments: argparse.Namespace, figures: dict[str, dict[str, tuple[float, float]]]) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = {"fixed": f"fixed η = {ETA}", "default": "default schedule"}
    for color, s in zip(("C0", "C3"), SCHEDULES, strict=True):
        w1 = np.array([figures[f"score/{s}/{e:g}"]["w1"] for e in EPSILONS])
        at = np.array([e if e > 0 else EPSILONS[1] / 3 for e in EPSILONS])  # ε = 0 stands at the left end
        left.errorbar(at, w1[:, 0], w1[:, 1], marker="o", capsize=3, color=color, label=names[s])
        floor = figures[f"score/{s}/0"]["w1_floor"][0]
        for axis in (left, right):
            axis.axhline(floor, color=color, ls=":", lw=1, label=f"floor, {names[s]}")
        for style, a in (("-", "adapted"), ("--", "not adapted")):
            w1 = np.array([figures[f"mala/{s}/{a}/{n}"]["w1"] for n in STEPS])
            right.errorbar(
                STEPS, w1[:, 0], w1[:, 1], marker="o", ls=style, capsize=3, color=color, label=f"{names[s]}, {a}"
            )
    guide = np.array([0.2, 3.0])
    left.plot(guide, figures["score/default/1"]["w1"][0] * guide, color="0.6", lw=1, label="proportional to ε")
    ticks = [EPSILONS[1] / 3, *EPSILONS[1:]]
    for axis, label in ((left, "score error ε (ε = 0 at the left end)"), (right, "MALA proposals a draw")):
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="sliced W1 to exact draws", ylim=(0.005, 1))
        axis.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5"])
    left.set_xticks(ticks, [f"{e:g}" for e in EPSILONS])
    right.set_xticks(STEPS, [str(n) for n in STEPS])
    for axis in (left, right):
        axis.minorticks_off()
        axis.legend(fontsize=7, loc="lower right" if axis is left else "lower left", ncols=1 if axis is left else 2)
    figure.savefig(arguments.output.with_suffix(".png"), dpi=110)


def main() -> None:
    options = parser(__doc__, "robustness")
    options.add_argument("--problems", type=int, default=8)
    arguments = options.parse_args()
    cells: dict[str, tuple[Any, ...]] = {}
    for seed in range(arguments.problems):
        for s in SCHEDULES:
            for e in EPSILONS:
                cells[f"score/{s}/{e:g}/{seed}"] = (s, e, None, 0, seed)
            for n in STEPS:
                cells[f"mala/{s}/adapted/{n}/{seed}"] = (s, 0.0, n, 20, seed)
                cells[f"mala/{s}/not adapted/{n}/{seed}"] = (s, 0.0, n, 0, seed)
    header = {"draws": DRAWS, "eta": ETA, "iterations": ITERATIONS, "dimensions": D}
    results = run_cells(run_cell, cells, arguments, header=header)
    figures = collect({key: results[key] for key in cells})
    draw(arguments, figures)
    write_table(arguments, table(figures, arguments.problems))


if __name__ == "__main__":
    main()
