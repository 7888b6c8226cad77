"""Proximal samplers against exact laws: error in units of its Monte Carlo error, acceptance, effective sample size for its cost.

    python benchmarks/proximal.py

A bundled image of 14 x 14 pixels is measured through a blur with Gaussian noise, as Fourier magnitudes, and by dithered bits. At several
couplings η every kernel that the model allows draws from the law at one centre, which is η away from the image. Means and second moments
(about the centre) of the draws along pixels and random directions are compared with dense linear algebra (blur), quadrature (bits), and a
long run of HMC (magnitudes). An error of 1 is what the effective sample size of ArviZ lets expect. Finished cells are kept in
``benchmarks/results/proximal.json``, from where an interrupted run goes on; table and plot are written beside it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import arviz
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from runner import parser, run_cells, write_table
from torch import Tensor
from torch.nn import functional

from dpnp_inference import ChainGenerators
from dpnp_inference.files import read_tensor, to_image_units
from dpnp_inference.proximal import HMC, MALA, ClosedForm, EllipticalSlice, PerturbAndSolve, ProximalSampler
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise
from dpnp_shared.operators import DitheredQuantisation, GaussianBlur, PhaseRetrieval
from dpnp_shared.prior import Prior, locate

SHAPE, D = (1, 14, 14), 196
SIGMA = 0.05
ETAS = (0.03, 0.1, 0.3, 1.0)
CHAINS, DRAWS, BURN_IN = 12, 150, 30
KERNELS: dict[str, ProximalSampler] = {
    "closed form": ClosedForm(exact_splitting=False),
    "closed form, exact splitting": ClosedForm(),
    "conjugate gradients": PerturbAndSolve(exact_splitting=False, most_diagonalised=0),
    "conjugate gradients, exact splitting": PerturbAndSolve(most_diagonalised=0),
    "MALA": MALA(),
    "HMC": HMC(),
    "elliptical slice": EllipticalSlice(),
}
REFERENCE = HMC(steps=4, leapfrogs=20, warmup=40)
PROBLEMS = {
    "blur": tuple(KERNELS),
    "phase retrieval": ("MALA", "HMC", "elliptical slice"),
    "quantisation": ("MALA", "HMC", "elliptical slice"),
}
IMAGE: Tensor


def start(prior: str) -> None:
    """Prepare a worker process."""
    global IMAGE
    images = read_tensor(locate("fashion_mnist") / "test_images.npz")
    IMAGE = functional.avg_pool2d(to_image_units(images, Prior.from_pretrained(prior).card)[:1, None].double(), 2)


def setting(problem: str, eta: float) -> tuple[ForwardModel, Tensor, Tensor]:
    """Model, measurement, and the centre ``(1, 1, 14, 14)``, in float64."""
    if problem == "blur":
        model = ForwardModel(GaussianBlur(SHAPE, 0.8), GaussianNoise(SIGMA))
    elif problem == "phase retrieval":
        model = ForwardModel(PhaseRetrieval(SHAPE), GaussianNoise(SIGMA))
    elif problem == "quantisation":
        model = ForwardModel(DitheredQuantisation(SHAPE, looks=4, dither=0.5), DitheredLogisticNoise(0.2))
    else:
        raise ValueError(f"problem = {problem!r}; allowed are {', '.join(PROBLEMS)}")
    generator = torch.Generator().manual_seed(0)
    y = model.simulate(IMAGE, generator=generator)[0]
    return model, y, IMAGE + eta * torch.randn(IMAGE.shape, generator=generator, dtype=IMAGE.dtype)


def directions() -> Tensor:
    """Ten pixels and twenty random directions, ``(30, d)``, of unit length."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.eye(D, dtype=torch.float64)[torch.randperm(D, generator=generator)[:10]]
    random = torch.randn(20, D, generator=generator, dtype=torch.float64)
    return torch.cat([pixels, random / random.norm(dim=1, keepdim=True)])


def estimate(kernel: ProximalSampler, problem: str, eta: float, chains: int) -> dict[str, Any]:
    """First and second moments along the directions, with their Monte Carlo errors by ArviZ, and what they cost."""
    model, y, x = setting(problem, eta)
    centre, generator = x.expand(chains, -1, -1, -1), ChainGenerators(0, range(chains))
    state = kernel.init(model, y, centre)
    kept, calls, acceptance = [], 0, []
    for draw in range(BURN_IN + DRAWS):
        if draw == BURN_IN:
            begin = time.perf_counter()
        state, z, info = kernel.step(state, centre, eta, generator=generator)
        if draw >= BURN_IN:
            kept.append((z - x).flatten(1) @ directions().T / eta)
            calls += info.forward_calls
            acceptance.append(float("nan") if info.acceptance is None else float(info.acceptance.mean()))
    seconds = time.perf_counter() - begin
    first = torch.stack(kept, dim=1).numpy()  # (chains, draws, 30)
    moments = np.concatenate([first, first**2], axis=2)
    data = arviz.from_dict(posterior={"f": moments})
    ess = arviz.ess(data, method="mean")["f"].values
    return {
        "moments": moments.mean((0, 1)).tolist(),
        "errors": (moments.std((0, 1)) / np.sqrt(ess)).tolist(),
        "std": first.std((0, 1)).tolist(),
        "ess": float(np.median(ess)),
        "ess_min": float(ess.min()),
        "r_hat": float(arviz.rhat(data)["f"].values.max()),
        "evaluations": calls / DRAWS,
        "acceptance": float(np.mean(acceptance)),
        "seconds": seconds,
        "chains": chains,
        "split_variance": min(kernel.split_variance(state), eta**2),
    }


def exact_blur(eta: float, split_variance: float) -> list[float]:
    """Moments for noise covariance ``R - e A A^T``, by dense linear algebra."""
    model, y, x = setting("blur", eta)
    A, R = model.linear_gaussian_dense(SHAPE)
    gain = eta**2 * A.T @ torch.linalg.inv(R + (eta**2 - split_variance) * A @ A.T)
    mean, covariance = gain @ (y.flatten() - A @ x.flatten()), eta**2 * (torch.eye(D).double() - gain @ A)
    u = directions()
    first = u @ mean / eta
    return [*first.tolist(), *(((u @ covariance) * u).sum(1) / eta**2 + first**2).tolist()]


def exact_bits(eta: float) -> list[float]:
    """Moments of independent pixels, by quadrature."""
    model, y, x = setting("quantisation", eta)
    grid = eta * torch.linspace(-8, 8, 4001, dtype=torch.float64)  # z - x
    clean = x.reshape(1, D, 1) + grid - model.operator.thresholds.reshape(-1, D, 1)
    log_p = functional.logsigmoid(y.reshape(-1, D, 1) * clean / model.noise.scale).sum(0) - grid**2 / (2 * eta**2)
    p = log_p.softmax(1)  # (d, 4001)
    mean = p @ grid
    variance = p @ grid**2 - mean**2
    u = directions()
    first = u @ mean / eta
    return [*first.tolist(), *(u**2 @ variance / eta**2 + first**2).tolist()]


def run_cell(problem: str, kernel: str, eta: float) -> dict[str, Any]:
    """Estimates of a kernel; for the reference of the magnitudes those of a long run."""
    if kernel == "reference":
        return estimate(REFERENCE, problem, eta, 3 * CHAINS)
    result = estimate(KERNELS[kernel], problem, eta, CHAINS)
    if problem == "blur":
        result["exact"] = exact_blur(eta, result["split_variance"])
    elif problem == "quantisation":
        result["exact"] = exact_bits(eta)
    return result


def scores(result: dict[str, Any], reference: dict[str, Any] | None) -> tuple[float, float, float]:
    """Error of means and of second moments in units of its Monte Carlo error, and of means in standard deviations (all RMS)."""
    errors = np.array(result["errors"])
    if reference is None:
        difference = np.array(result["moments"]) - np.array(result["exact"])
    else:
        difference = np.array(result["moments"]) - np.array(reference["moments"])
        errors = np.hypot(errors, reference["errors"])
    n = len(errors) // 2
    z = difference / errors
    rms = lambda v: float(np.sqrt(np.mean(np.square(v))))  # noqa: E731
    return rms(z[:n]), rms(z[n:]), rms(difference[:n] / np.array(result["std"]))


def report(results: dict[str, Any], output: Path) -> str:
    """The table as Markdown, and the plot of the efficiency."""
    lines = [
        f"{CHAINS} chains of {DRAWS} draws after {BURN_IN} left out. Errors are root mean squares over 30 directions: in Monte Carlo "
        "errors (1 is expected), those of means in standard deviations of the law as well. ESS (median over means and second "
        "moments, of all draws) for each evaluation of the forward map or of a gradient; R-hat is the largest. Where it is far "
        "above 1 the chains have not mixed, and errors say little: a draw of DPnP needs no more than a step that leaves the law "
        "invariant. The magnitudes at the largest η have several modes, so that the long run has not mixed either.\n",
        "| problem | η | kernel | error of means | of second moments | of means (std) | acceptance | evaluations a draw | "
        "ESS | ESS / 1000 evaluations | R-hat | ms a draw |",
        "|---" * 12 + "|",
    ]
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, problem in zip(figure.subplots(1, len(PROBLEMS), sharey=True), PROBLEMS, strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for eta in ETAS:
            reference = results.get(f"{problem}/reference/{eta:g}")
            for kernel in (*PROBLEMS[problem], "reference"):
                result = results.get(f"{problem}/{kernel}/{eta:g}")
                if result is None:
                    continue
                efficiency = 1000 * result["ess"] / (result["evaluations"] * result["chains"])
                errors = ["", "", ""]
                if kernel != "reference":
                    curves.setdefault(kernel, []).append((eta, efficiency))
                    errors = [f"{v:.2g}" for v in scores(result, reference)]
                acceptance = "" if math.isnan(result["acceptance"]) else f"{result['acceptance']:.2f}"
                row = [
                    problem,
                    f"{eta:g}",
                    kernel,
                    *errors,
                    acceptance,
                    f"{result['evaluations']:.0f}",
                    f"{result['ess']:.0f}",
                    f"{efficiency:.3g}",
                    f"{result['r_hat']:.2f}",
                    f"{1000 * result['seconds'] / DRAWS:.1f}",
                ]
                lines.append(f"| {' | '.join(row)} |")
        for kernel, points in curves.items():
            axes.loglog(*zip(*points, strict=True), marker="o", color=f"C{list(KERNELS).index(kernel)}", label=kernel)
        axes.set(title=problem, xlabel="η")
        axes.grid(alpha=0.3)
        if problem == "blur":
            axes.axvline(SIGMA, color="gray", linestyle=":", label="σ/‖A‖")
            axes.set_ylabel("ESS / 1000 evaluations")
            axes.legend(fontsize=7)
    figure.savefig(output.with_suffix(".png"), dpi=120)
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, "proximal")
    options.add_argument("--prior", default="fashion_mnist", help="whose value range the image gets")
    options.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    arguments = options.parse_args()
    cells = {
        f"{problem}/{kernel}/{eta:g}": (problem, kernel, eta)
        for problem in arguments.problems
        for eta in ETAS
        for kernel in (*PROBLEMS[problem], *(["reference"] if problem == "phase retrieval" else []))
    }
    header = {"kernels": {k: repr(v) for k, v in KERNELS.items()}, "reference": repr(REFERENCE)}
    header |= {"chains": CHAINS, "draws": DRAWS, "burn_in": BURN_IN, "sigma": SIGMA}
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.prior,))
    write_table(arguments, report(results, arguments.output))


if __name__ == "__main__":
    main()
