"""How far the denoising samplers are from the exact denoising posterior, against the network calls they make.

    python benchmarks/denoising_samplers.py

Every solver of DDS-DDPM and DDS-DDIM on three priors: an 8-dimensional mixture (25 components with standard deviation 1, 8 apart in each
dimension), a mixture centred on 2,000 images of Fashion-MNIST (28 x 28, variance 0.02), and the bundled trained prior. Three figures:

- law: sliced Wasserstein-1 distance to exact draws of ``p(x_0 | x_0 + η w = z)`` over the distance of two exact sets (the floor), so that
  1 is the best there is; mean over two z, one of which lies between two components. Analytic priors only.
- endpoint: root-mean-square distance of DDS-DDIM's draw from the one of 100 calls with the same noise, over the posterior's standard
  deviation. Solvers without noise only.
- tolerance: the same for the default solver, with the number of calls that follows from each tolerance.

Finished cells are kept in ``benchmarks/results/denoising_samplers.json``, from where an interrupted run goes on; the table and the plot are
written beside it. Fashion-MNIST is downloaded to ``--data`` if it is not there.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from runner import parser, run_cells, write_table
from torch import Tensor
from torchvision.datasets import FashionMNIST

from dpnp_inference.dds import DDSDDIM, DDSDDPM
from dpnp_inference.files import read_tensor, to_image_units
from dpnp_inference.metrics import sliced_wasserstein
from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.prior import Prior, locate

KINDS = {"ddpm": DDSDDPM, "ddim": DDSDDIM}
DETERMINISTIC = ("euler", "heun", "adams-bashforth", "dpm++2m")
FIXED = {"ddpm": 10, "ddim": 8}  # what "auto" is compared with
POWERS = (1.0, 1.5, 1.75, 2.0, 3.0)
LAW = {"mixture": (0.5, 1.0, 2.0, 4.0, 16.0), "images": (0.1, 1.0, 3.0)}
LAW_CALLS = {"mixture": (5, 10, 20, 50), "images": (5, 10, 20)}
LAW_DRAWS = {"mixture": 20_000, "images": 200}
ENDPOINT = {
    "mixture": (0.1, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0),
    "images": (0.02, 0.1, 0.3, 1.0, 9.0),
    "trained": (0.02, 0.1, 0.3, 1.0, 3.0, 9.0),
}
ENDPOINT_CALLS = (5, 8, 12, 20)
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01)
ENDPOINT_IMAGES = {"mixture": (8, 100), "images": (4, 8), "trained": (2, 4)}  # values of z, draws for each
REFERENCE_CALLS = 100
SEED = 0
DATA = "data"


class OneStream:
    """Noise for all chains from one generator: quicker than a stream a chain, and reproducible at a fixed number of chains."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise shaped like ``x``."""
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)


def start(data: str) -> None:
    """Prepare a worker process."""
    global DATA
    DATA = data


@functools.cache
def prior_of(name: str) -> Denoiser:
    if name == "trained":
        return Prior.from_pretrained("fashion_mnist")
    if name == "images":
        images = FashionMNIST(DATA, train=True, download=True).data[:2000]
        return GaussianMixturePrior(images.flatten(1).double() / 127.5 - 1, "equal", 0.02, (1, 28, 28))
    i, j = torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing="ij")
    means = 8.0 * torch.stack([i.flatten(), j.flatten()], 1).repeat(1, 4)
    weights = np.random.default_rng(SEED).dirichlet(np.ones(25))
    return GaussianMixturePrior(means, torch.from_numpy(weights), 1.0, (1, 1, 8))


def dtype_of(name: str) -> torch.dtype:
    return torch.float64 if name == "mixture" else torch.float32


def noisy(name: str, eta: float, n: int) -> Tensor:
    """``z`` of ``n`` clean images: the prior's draws, for the trained prior held-out images."""
    prior = prior_of(name)
    if isinstance(prior, GaussianMixturePrior):
        x = prior.sample(n, generator=torch.Generator().manual_seed(SEED + 1), dtype=dtype_of(name))
    else:
        x = to_image_units(read_tensor(locate("fashion_mnist") / "test_images.npz"), prior.card)[:n, None]
    return x + eta * OneStream(SEED + 2).normal_like(x)


def between(prior: GaussianMixturePrior, eta: float, dtype: torch.dtype) -> Tensor:
    """A ``z`` on the line between two close components, noise across it included."""
    centre = prior.means[len(prior.means) // 2]
    near = prior.means[(prior.means - centre).square().sum(1).argsort()[1]]
    z = (0.55 * centre + 0.45 * near).reshape(1, *prior.image_shape).to(dtype)
    return z + 0.3 * min(eta, 1.0) * OneStream(SEED + 3).normal_like(z)


def exact(prior: GaussianMixturePrior, z: Tensor, eta: float, n: int, seed: int) -> Tensor:
    """``n`` draws of the denoising posterior of one ``z``, ``(n, d)``."""
    generator, total, flat = torch.Generator().manual_seed(seed), prior.variance + eta**2, z.flatten().double()
    weights = (prior.log_weights - (flat - prior.means).square().sum(1) / (2 * total)).softmax(0)
    means = prior.means[torch.multinomial(weights, n, replacement=True, generator=generator)]
    w = torch.randn(means.shape, generator=generator, dtype=means.dtype)
    return (prior.variance * flat + eta**2 * means) / total + eta * math.sqrt(prior.variance / total) * w


@torch.no_grad()
def law(name: str, eta: float, kind: str, solver: str) -> list[dict[str, Any]]:
    """A row for each number of calls, and for each spacing with the default solver and number."""
    prior, n = prior_of(name), LAW_DRAWS[name]
    assert isinstance(prior, GaussianMixturePrior)
    make = KINDS[kind]
    samplers = [make(calls, solver) for calls in LAW_CALLS[name]]
    if solver == make().solver:
        samplers += [make(FIXED[kind], solver), make()] + [make(power=power) for power in POWERS]
    rows = [{"calls": s.calls, "power": s.power, "over_floor": 0.0, "floor": 0.0} for s in samplers]
    for z in (noisy(name, eta, 1), between(prior, eta, dtype_of(name))):
        reference, *others = (exact(prior, z, eta, n, SEED + 10 + k) for k in range(4))
        floor = float(np.mean([sliced_wasserstein(other, reference, projections=100) for other in others]))
        for sampler, row in zip(samplers, rows, strict=True):
            x, info = sampler(prior, z.expand(n, -1, -1, -1), eta, generator=OneStream(SEED + 4))
            distance = sliced_wasserstein(x.flatten(1), reference, projections=100)
            row["network_calls"] = info.network_calls
            row["floor"] += floor / 2
            row["over_floor"] += distance / floor / 2
    return rows


def endpoint(name: str, eta: float) -> list[dict[str, Any]]:
    """A row for each deterministic solver and number of calls of DDS-DDIM."""
    samplers = [DDSDDIM(calls, solver) for solver in DETERMINISTIC for calls in ENDPOINT_CALLS]
    return distances(name, eta, samplers + [DDSDDIM()] + [DDSDDIM(power=power) for power in POWERS])


def tolerance(name: str, eta: float) -> list[dict[str, Any]]:
    """A row for each tolerance, with the number of calls that follows from it."""
    rows = distances(name, eta, [DDSDDIM(tolerance=tolerance) for tolerance in TOLERANCES])
    return [{"tolerance": tolerance, **row} for tolerance, row in zip(TOLERANCES, rows, strict=True)]


@torch.no_grad()
def distances(name: str, eta: float, samplers: list[DDSDDIM]) -> list[dict[str, Any]]:
    """A row for each sampler: how far its draws are from those of many calls with the same noise."""
    prior, (images, draws) = prior_of(name), ENDPOINT_IMAGES[name]
    z = noisy(name, eta, images).repeat_interleave(draws, 0)

    def draw(sampler: DDSDDIM) -> tuple[Tensor, int]:
        x, info = sampler(prior, z, eta, generator=OneStream(SEED + 4))
        return x.reshape(images, draws, -1), info.network_calls

    reference = draw(DDSDDIM(REFERENCE_CALLS))[0]
    std = reference.var(1).sum(-1).sqrt()
    rows = []
    for sampler in samplers:
        x, calls = draw(sampler)
        error = ((x - reference).square().sum(-1).mean(1).sqrt() / std).mean()
        rows.append(
            {
                "solver": sampler.solver,
                "calls": sampler.calls,
                "power": sampler.power,
                "network_calls": calls,
                "error": float(error),
            }
        )
    return rows


def run_cell(figure: str, *cell: Any) -> list[dict[str, Any]]:
    return {"law": law, "endpoint": endpoint, "tolerance": tolerance}[figure](*cell)


def find(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables(results: dict[str, list[dict[str, Any]]], spreads: dict[str, float]) -> str:
    """All figures as Markdown."""
    text = ""
    for name, etas in LAW.items():
        calls = LAW_CALLS[name]
        text += f"\n## Law, {name}: sliced W1 over its floor, {LAW_DRAWS[name]:,} draws\n\n"
        text += markdown(
            ["η", "floor", "kind", "solver", *(f"{n} calls" for n in calls)],
            (
                [f"{eta:g}", f"{rows[0]['floor']:.4f}", kind, solver]
                + [f"{find(rows, calls=n, power=make().power)['over_floor']:.2f}" for n in calls]
                for eta in etas
                for kind, make in KINDS.items()
                for solver in make.solvers
                for rows in [results[f"law/{name}/{eta:g}/{kind}/{solver}"]]
            ),
        )
    text += "\n## Endpoint: error of DDS-DDIM over the posterior's standard deviation\n\n"
    text += markdown(
        ["prior", "η", "solver", *(f"{n} calls" for n in ENDPOINT_CALLS)],
        (
            [name, f"{eta:g}", solver]
            + [
                f"{find(results[f'endpoint/{name}/{eta:g}'], solver=solver, calls=n)['error']:.3f}"
                for n in ENDPOINT_CALLS
            ]
            for name, etas in ENDPOINT.items()
            for eta in etas
            for solver in DETERMINISTIC
        ),
    )
    text += "\n## Tolerance: network calls, and error of DDS-DDIM over the posterior's standard deviation\n\n"
    text += markdown(
        ["prior", "η", "η/spread", *(f"tolerance {t:g}" for t in TOLERANCES)],
        (
            [name, f"{eta:g}", f"{eta / spreads[name]:.4f}"]
            + [
                f"{row['network_calls']}: {row['error']:.3f}"
                for t in TOLERANCES
                for row in [find(results[f"tolerance/{name}/{eta:g}"], tolerance=t)]
            ]
            for name, etas in ENDPOINT.items()
            for eta in etas
        ),
    )
    text += "\n## Default number of calls, beside a fixed one, and the spacing of its noise levels\n\n"
    text += f"Fixed are {FIXED['ddim']} (ddim) and {FIXED['ddpm']} (ddpm) calls; the last columns have the default number.\n\n"
    lines = []
    for key, rows in results.items():
        figure, name, value, *rest = key.split("/")
        if figure == "tolerance":
            continue
        kind, solver = rest or ("ddim", "adams-bashforth")
        make, column = KINDS[kind], "over_floor" if figure == "law" else "error"
        if solver != make().solver:
            continue
        ours = [row for row in rows if row.get("solver", solver) == solver]
        auto = find(ours, calls="auto", power=make().power)
        fixed = find(ours, calls=FIXED[kind], power=make().power)
        shown = [f"{find(ours, calls='auto', power=power)[column]:.3f}" for power in POWERS]
        relative = float(value) / spreads[name]
        line = [figure, name, kind, value, f"{relative:.4f}", f"{auto['network_calls']}", f"{auto[column]:.3f}"]
        lines.append((figure, kind, name, relative, [*line, f"{fixed[column]:.3f}", *shown]))
    text += markdown(
        [
            "figure",
            "prior",
            "kind",
            "η",
            "η/spread",
            "calls",
            "auto",
            "fixed",
            *(f"power {power:g}" for power in POWERS),
        ],
        (line[-1] for line in sorted(lines, key=lambda line: line[:-1])),
    )
    return text.lstrip()


def plot(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    """Figures against network calls."""
    panels = {"mixture": (0.5, 1.0, 2.0), "images": (0.1, 1.0, 3.0), "trained": (0.3, 1.0, 3.0)}
    figure = Figure(figsize=(12, 10), layout="constrained")
    axes = figure.subplots(3, 3, sharex=True)
    colours = {solver: f"C{i}" for i, solver in enumerate(DDSDDIM.solvers)}
    for row, (name, etas) in zip(axes, panels.items(), strict=True):
        for axis, eta in zip(row, etas, strict=True):
            if name == "trained":
                for solver in DETERMINISTIC:
                    points = [r for r in results[f"endpoint/{name}/{eta:g}"] if r["solver"] == solver]
                    points = [find(points, calls=n) for n in ENDPOINT_CALLS]
                    xy = [(r["network_calls"], r["error"]) for r in points]
                    axis.plot(*zip(*xy, strict=True), "o--", color=colours[solver], label=f"ddim {solver}")
            else:
                for kind, make in KINDS.items():
                    for solver in make.solvers:
                        rows = results[f"law/{name}/{eta:g}/{kind}/{solver}"]
                        points = [find(rows, calls=n, power=make().power) for n in LAW_CALLS[name]]
                        xy = [(r["network_calls"], r["over_floor"]) for r in points]
                        style = "o-" if kind == "ddpm" else "s--"
                        axis.plot(*zip(*xy, strict=True), style, color=colours[solver], ms=4, label=f"{kind} {solver}")
                axis.axhline(1, color="grey", lw=1)
            axis.set(xscale="log", yscale="log", title=f"{name}, η = {eta:g}")
        row[0].set_ylabel("endpoint error / posterior std" if name == "trained" else "sliced W1 / floor")
    for axis in axes[-1]:
        axis.set(xlabel="network calls", xticks=[5, 10, 20, 50], xticklabels=["5", "10", "20", "50"])
        axis.minorticks_off()
    axes[0, -1].legend(fontsize=7)
    axes[-1, -1].legend(fontsize=7)
    figure.savefig(arguments.output.with_suffix(".png"), dpi=110)


def main() -> None:
    options = parser(__doc__, "denoising_samplers")
    options.add_argument("--data", default=DATA, help="folder of torchvision's data sets")
    arguments = options.parse_args()
    start(arguments.data)
    cells: dict[str, tuple[Any, ...]] = {
        f"{figure}/{name}/{eta:g}": (figure, name, eta)
        for figure in ("endpoint", "tolerance")
        for name in ("trained", "images", "mixture")
        for eta in ENDPOINT[name]
    }
    cells |= {
        f"law/{name}/{eta:g}/{kind}/{solver}": ("law", name, eta, kind, solver)
        for name, etas in LAW.items()
        for eta in etas
        for kind, make in KINDS.items()
        for solver in make.solvers
    }
    priors = {name: prior_of(name) for name in ENDPOINT}
    header = {"prior": priors["trained"].card.sha256, "ddpm": repr(DDSDDPM()), "ddim": repr(DDSDDIM())}
    header |= {"growth": [DDSDDPM.growth, DDSDDIM.growth], "seed": SEED}
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.data,))
    write_table(arguments, tables(results, {name: prior.spread for name, prior in priors.items()}))
    plot(results, arguments)


if __name__ == "__main__":
    main()
