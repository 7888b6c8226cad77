r"""Transmission tomography from few photons or few views: NonlinearCT and DPnP, with the exact likelihood and with the linearised one.

    python benchmarks/transmission_ct.py

Held-out images are read as maps of attenuation through ``PhysicalUnits``, and each ray counts
:math:`y \sim \mathrm{Poisson}(I_0 e^{-p} + b)` behind them. All methods get the same counts:

- ``NonlinearCT`` with its likelihoods ``poisson`` (exact), ``gaussian`` and ``linearised``; with ordered subsets, the jump start, and both;
- ``DPnP`` with the exact likelihood, by HMC, and with the linearised one: line integrals :math:`l = -\log((y - b)/I_0)` with Gaussian noise
  of the variance :math:`\max(y, 1)/(y - b)^2`, by perturb-and-solve draws; rays with no net count are left out there, as in ``linearised``.
  Both start at the coupling 1 and end at one that suits the scan. Beside them the exact likelihood with the default schedule, which begins
  at the prior's spread and ends at half of the noise that the prior's mean image leaves, or at twice the prior's least noise level; and
  the same with the last coupling doubled;
- filtered back-projection of :math:`l`, with the ramp filter as it is and under a Hann window.

Figures are of the posterior mean and of 80% order-statistic intervals; the bias is that of the mean attenuation of the pixels that are
not air, as a part of the true one. Calls are network calls on all chains together, gradients are vector-Jacobian products of the network,
likewise. Projections and back-projections are counted where they are made, as images that go
through the whole scan, per chain: a subset's is its share of the views, and one that all chains have in common is divided among them.
Filtered back-projections are not counted.

Then, to see how many steps are needed, NonlinearCT by its number of steps; and, in a process of its own with all cores, the time of a
step by the number of subsets, with a slow projector (many views of large images) and a Gaussian prior that costs next to nothing.

Other images and priors: ``benchmarks/ct_pictures.py`` makes slices of a head and phantoms, and has the commands.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from runner import parser, run_cells, write_table
from torch import Tensor

from dpnp_inference import HMC, Annealing, DPnP, Posterior
from dpnp_inference.baselines import NonlinearCT
from dpnp_inference.files import read_tensor, to_image_units
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, TransmissionNoise
from dpnp_shared.operators import ParallelBeamCT, PhysicalUnits
from dpnp_shared.operators.sparse import SparseMatrix
from dpnp_shared.prior import Prior, locate

CHAINS, LEVEL = 9, 0.8  # with 9 draws order statistics give 80% exactly


class Scan(NamedTuple):
    """A scan, and what DPnP's schedule of its own ends at.

    Attributes:
        views: all around.
        photons: a ray counts without an object.
        eta_min: last coupling, in image units, from a few trials by PSNR on the first bundled picture, which by default is none of
            those measured; 300 photons have that of 30, untried.
    """

    views: int
    photons: float
    eta_min: float


SCANS = {
    "60 views, 100,000 photons": Scan(60, 1e5, 0.01),
    "60 views, 300 photons": Scan(60, 300.0, 0.03),
    "60 views, 30 photons": Scan(60, 30.0, 0.03),
    "9 views, 3,000 photons": Scan(9, 3000.0, 0.03),
}
KERNEL = HMC(steps=3, leapfrogs=8, warmup=4)
SUBSETS, JUMP = 3, 1.0  # 9 and 60 are multiples of 3; the noise level of the jump start in image units
NONLINEAR: dict[str, dict[str, Any]] = {
    "poisson": {},
    "gaussian": {"likelihood": "gaussian"},
    "linearised": {"likelihood": "linearised"},
    "subsets": {"subsets": SUBSETS},
    "jump start": {"jump_start": JUMP},
    "subsets, jump start": {"subsets": SUBSETS, "jump_start": JUMP},
}
METHODS = {
    "poisson": "NonlinearCT, Poisson",
    "gaussian": "NonlinearCT, Gaussian",
    "linearised": "NonlinearCT, linearised",
    "subsets": f"NonlinearCT, Poisson, {SUBSETS} subsets",
    "jump start": "NonlinearCT, Poisson, jump start",
    "subsets, jump start": f"NonlinearCT, Poisson, {SUBSETS} subsets, jump start",
    "dpnp": "DPnP, exact (HMC)",
    "dpnp, linearised": "DPnP, linearised",
    "dpnp, default": "DPnP, exact (HMC), default schedule",
    "dpnp, doubled": "DPnP, exact (HMC), default schedule, last coupling doubled",
    "fbp": "filtered back-projection",
    "fbp, hann": "filtered back-projection, Hann window",
}
STUDY_SCANS, STUDY_STEPS = ("60 views, 100,000 photons", "60 views, 30 photons"), (25, 50, 200)
PICTURE, VIEWS, TIMED_SUBSETS, TIMED_CHAINS, TIMED_STEPS, REPEATS = 128, 360, (1, 2, 4, 8, 16), 4, 8, 3
PRIOR: Prior
IMAGES: Tensor
WIDTH: float
ATTENUATION: float
BACKGROUND: float


class Projections:
    """Counts the entries of sparse matrices that products touch, while it is entered."""

    def __init__(self) -> None:
        self.entries = 0
        self._product = SparseMatrix.product

    def __enter__(self) -> Projections:
        def counted(matrix: SparseMatrix, x: Tensor, transposed: bool) -> Tensor:
            self.entries += len(x) * matrix.weights.numel()
            return self._product(matrix, x, transposed)

        SparseMatrix.product = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        SparseMatrix.product = self._product  # type: ignore[method-assign]


def read_images(file: str, prior: Prior) -> Tensor:
    """Images ``(n, C, H, W)`` in the prior's units, from a file of ``(n, H, W)`` or ``(n, C, H, W)``.

    Raises:
        SystemExit: their shape is not the prior's.
    """
    images = to_image_units(read_tensor(file), prior.card)
    images = images[:, None] if images.ndim == 3 else images
    if tuple(images.shape[1:]) != tuple(prior.image_shape) or prior.image_shape[0] != 1:
        raise SystemExit(
            f"--images {file} gives {tuple(images.shape)}; allowed is (n, 1, H, W) with the prior's image shape {prior.image_shape}"
        )
    return images


def start(prior: str, images: str, width: float, attenuation: float, background: float) -> None:
    """Prepare a worker process."""
    global PRIOR, IMAGES, WIDTH, ATTENUATION, BACKGROUND
    PRIOR = Prior.from_pretrained(prior)
    IMAGES, WIDTH, ATTENUATION, BACKGROUND = read_images(images, PRIOR), width, attenuation, background


def line_integrals(views: int) -> PhysicalUnits:
    """From pixel values to line integrals of attenuation, parallel beams all around."""
    rays = ParallelBeamCT(PRIOR.image_shape, views, pixel_size=WIDTH / PRIOR.image_shape[-1])
    return PhysicalUnits(rays, value_range=PRIOR.card.value_range, physical_range=(0.0, ATTENUATION))


def linearised(lines: PhysicalUnits, noise: TransmissionNoise, y: Tensor) -> tuple[ForwardModel, Tensor]:
    """The linear Gaussian model of a scan, and its measurement ``(1, views, detectors)``; the noise of a ray without net count is 1,000."""
    net = y - noise.background
    weight = net.clamp(min=0) ** 2 / y.clamp(min=1)
    return ForwardModel(lines, GaussianNoise(weight.clamp(min=1e-6).rsqrt())), log_transmission(noise, y)


def log_transmission(noise: TransmissionNoise, y: Tensor) -> Tensor:
    """The logarithm of the net counts, of which half a photon is the least."""
    return -((y - noise.background).clamp(min=0.5) / noise.photons).log()


def figures(mean: Tensor, truth: Tensor) -> dict[str, float]:
    """What can be said of one image ``(1, H, W)`` in the prior's units."""
    low, high = value_range = PRIOR.card.value_range
    body = truth > low + 0.05 * (high - low)
    return {
        "psnr": psnr(mean, truth, value_range),
        "ssim": ssim(mean, truth, value_range),
        "bias": float((mean - truth)[body].mean() / (truth - low)[body].mean()),
    }


def run_cell(scan: str, method: str, index: int, steps: int) -> dict[str, float]:
    """Figures of one method on one image; the counts depend on scan and image only."""
    views, photons, eta_min = SCANS[scan]
    truth, lines = IMAGES[index], line_integrals(views)
    noise = TransmissionNoise(photons, BACKGROUND * photons)
    model = ForwardModel(lines, noise)
    y = model.simulate(truth[None], generator=torch.Generator().manual_seed(index))[0]
    if method.startswith("fbp"):
        rays = lines.operator
        assert isinstance(rays, ParallelBeamCT)
        image = rays.fbp(log_transmission(noise, y)[None].float(), "hann" if method.endswith("hann") else "ram-lak")[0]
        low, high = PRIOR.card.value_range
        return {
            **figures(low + (high - low) * image / ATTENUATION, truth),
            "unseen": float((y <= noise.background).float().mean()),
        }
    with Projections() as count:
        posterior = draw(model, y, method, steps, eta_min, seed=index)
    rays = lines.operator
    assert isinstance(rays, ParallelBeamCT)
    low, high = PRIOR.card.value_range
    return {
        **figures(posterior.mean, truth),
        "coverage": coverage(posterior, truth, LEVEL)[0],
        "coverage_not_air": coverage(posterior, truth, LEVEL, where=truth > low + 0.05 * (high - low))[0],
        "std": float(posterior.std.mean()),
        "calls": posterior.diagnostics["network_calls"],
        "gradients": posterior.diagnostics.get("network_gradients", 0),
        "projections": count.entries / rays.matrix.weights.numel() / CHAINS,
        "seconds": posterior.diagnostics["seconds"],
    }


def draw(model: ForwardModel, y: Tensor, method: str, steps: int, eta_min: float, seed: int) -> Posterior:
    """Draws by one method from the counts ``y`` ``(1, views, detectors)``."""
    if method in NONLINEAR:
        return NonlinearCT(PRIOR, model, steps=steps, **NONLINEAR[method]).sample(y, chains=CHAINS, seed=seed)
    if method == "dpnp, default":
        return DPnP(PRIOR, model, proximal=KERNEL).sample(y, chains=CHAINS, seed=seed)
    if method == "dpnp, doubled":
        doubled = Annealing(eta_min=2 * DPnP(PRIOR, model, proximal=KERNEL).schedule[-1])
        return DPnP(PRIOR, model, proximal=KERNEL, annealing=doubled).sample(y, chains=CHAINS, seed=seed)
    annealing = Annealing(eta_max=1.0, eta_min=eta_min, decay=40)
    if method == "dpnp":
        return DPnP(PRIOR, model, proximal=KERNEL, annealing=annealing).sample(y, chains=CHAINS, seed=seed)
    assert isinstance(model.operator, PhysicalUnits)
    assert isinstance(model.noise, TransmissionNoise)
    linear, logarithm = linearised(model.operator, model.noise, y)
    return DPnP(PRIOR, linear, annealing=annealing).sample(logarithm, chains=CHAINS, seed=seed)


def time_subsets() -> dict[str, dict[str, float]]:
    """Seconds of a step of NonlinearCT by the number of subsets, and of what comes before the first; the best of several runs, in turn."""
    shape = (1, PICTURE, PICTURE)
    lines = PhysicalUnits(ParallelBeamCT(shape, VIEWS, pixel_size=20 / PICTURE), physical_range=(0.0, 0.2))
    model = ForwardModel(lines, TransmissionNoise(1000.0)).float()
    prior = GaussianPrior(0.0, 0.25, shape)
    generator = torch.Generator().manual_seed(0)
    y = model.simulate(prior.sample(1, generator=generator), generator=generator)[0]
    steps: dict[int, list[float]] = {s: [] for s in TIMED_SUBSETS}
    before: dict[int, list[float]] = {s: [] for s in TIMED_SUBSETS}
    for _ in range(REPEATS):
        for s in TIMED_SUBSETS:
            sampler = NonlinearCT(prior, model, steps=TIMED_STEPS, subsets=s)
            (rows,) = sampler.sample(y, chains=TIMED_CHAINS, seed=0).diagnostics["iterations"]
            typical = statistics.median(row["seconds"] for row in rows[1:])
            steps[s].append(typical)
            before[s].append(rows[0]["seconds"] - typical)
    return {str(s): {"seconds": min(steps[s]), "before": {"seconds": max(min(before[s]), 0.0)}} for s in TIMED_SUBSETS}


def means(results: dict[str, Any], group: str) -> dict[str, float]:
    """Means over the images of a group of cells, with the standard error of the PSNR."""
    rows = [row for name, row in results.items() if name.rsplit("/", 1)[0] == group]
    if not rows:
        return {}
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    spread = np.std([row["psnr"] for row in rows], ddof=min(1, len(rows) - 1))
    return mean | {"images": len(rows), "error": float(spread / math.sqrt(len(rows)))}


def row(label: str, mean: dict[str, float]) -> str:
    """A line of the tables."""
    cells = [label, f"{mean['psnr']:.2f} ± {mean['error']:.2f}", f"{mean['ssim']:.3f}", f"{100 * mean['bias']:+.1f}"]
    if "coverage" in mean:
        cells += [f"{mean['coverage']:.3f}", f"{mean['coverage_not_air']:.3f}", f"{mean['std']:.3f}"]
        cells += [f"{mean[key]:.0f}" for key in ("calls", "gradients", "projections")] + [f"{mean['seconds']:.1f}"]
    else:
        cells += [""] * 7
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "| PSNR (dB) | SSIM | bias (%) | covered | covered, not air | std | calls | gradients | projections | seconds |\n"
    + "|---" * 11
    + "|"
)


def table(results: dict[str, Any], steps: int) -> str:
    """All results as Markdown."""
    parts = [
        f"Means over images of {CHAINS} chains each, ± the standard error of the PSNR; NonlinearCT with {steps} time steps, those of the "
        f"jump start from the noise level {JUMP:g} on. {100 * LEVEL:.0f}% intervals; std is the draws' mean standard deviation.\n"
    ]
    for scan in SCANS:
        found = {method: means(results, f"{scan}/{method}") for method in METHODS}
        if not any(found.values()):
            continue
        images = max(int(mean["images"]) for mean in found.values() if mean)
        unseen = found["fbp"].get("unseen")
        parts.append(
            f"**{scan}**, {images} images"
            + (f"; {100 * unseen:.1f}% of the rays have no net count" if unseen is not None else "")
            + "\n"
        )
        parts.append("| method " + COLUMNS)
        parts += [row(label, found[method]) for method, label in METHODS.items() if found[method]]
        parts.append("")
    for scan in STUDY_SCANS:
        study = {n: means(results, f"{scan}, {n} steps") for n in STUDY_STEPS}
        if any(study.values()):
            parts += [f"**How many time steps**: NonlinearCT, Poisson, one image, {scan}\n", "| time steps " + COLUMNS]
            parts += [row(str(n), mean) for n, mean in study.items() if mean] + [""]
    if "timing" in results:
        parts += [
            f"**Time of a step**: {PICTURE} x {PICTURE} pixels, {VIEWS} views, {TIMED_CHAINS} chains, a closed-form prior; best "
            f"of {REPEATS} runs in turn, each the median of its steps. Before the first step the subsets' matrices are built.\n",
            "| subsets | ms a step | relative | before the first step (s) |\n|---|---|---|---|",
        ]
        timing = results["timing"]
        for s, of in sorted(timing.items(), key=lambda item: int(item[0])):
            relative = of["seconds"] / timing["1"]["seconds"]
            parts.append(f"| {s} | {1e3 * of['seconds']:.0f} | {relative:.2f} | {of['before']['seconds']:.1f} |")
        parts.append("")
    return "\n".join(parts)


def plot(arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """PSNR, coverage and bias of each method and scan, and the time of a step by the number of subsets."""
    widths = [3, 3, 3, 2] if "timing" in results else [3, 3, 3]
    figure = Figure(figsize=(1.4 * sum(widths), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    scans = [scan for scan in SCANS if any(name.startswith(f"{scan}/") for name in results)]
    methods = [method for method in METHODS if any(f"/{method}/" in name for name in results)]
    for axis, key, factor, label in zip(
        axes,
        ("psnr", "coverage_not_air", "bias"),
        (1, 1, 100),
        ("PSNR (dB)", f"{100 * LEVEL:.0f}% intervals cover, not air", "bias of the mean attenuation (%)"),
        strict=False,
    ):
        for k, method in enumerate(methods):
            values = [means(results, f"{scan}/{method}").get(key, math.nan) for scan in scans]
            at = np.arange(len(scans)) + 0.07 * (k - len(methods) / 2)
            marker = "x" if method.startswith("fbp") else "s" if method.startswith("dpnp") else "o"
            axis.plot(at, factor * np.array(values), marker, color=f"C{k}", ms=5, label=METHODS[method])
        axis.set_xticks(
            range(len(scans)), [scan.replace(", ", "\n").replace(" photons", "\nphotons") for scan in scans], fontsize=7
        )
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    axes[1].axhline(LEVEL, color="0.4", lw=1, ls=":")
    axes[2].axhline(0, color="0.4", lw=1, ls=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    if "timing" in results:
        s = sorted(int(key) for key in results["timing"])
        ms = [1e3 * results["timing"][str(k)]["seconds"] for k in s]
        axes[3].plot(s, ms, "o-", label="measured")
        axes[3].plot(s, [ms[0] / k for k in s], ":", color="0.5", label="one over S")
        axes[3].set(xscale="log", yscale="log", xlabel="subsets S", ylabel="ms a step")
        axes[3].set_xticks(s, [str(k) for k in s])
        axes[3].minorticks_off()
        axes[3].legend(fontsize=7)
    figure.savefig(arguments.output.with_suffix(".png"), dpi=110)


def main() -> None:
    options = parser(__doc__, "transmission_ct")
    options.add_argument("--prior", default="fashion_mnist")
    options.add_argument("--images", help="file of pictures (n, H, W); by default the bundled test images")
    options.add_argument(
        "--pictures", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="their numbers, from 0"
    )
    options.add_argument("--width", type=float, default=20.0, help="of a picture, in cm")
    options.add_argument(
        "--attenuation", type=float, default=0.5, help="of a pixel of the largest value, in 1/cm; the smallest is air"
    )
    options.add_argument(
        "--background", type=float, default=0.002, help="counts without primary photons, as a part of I_0"
    )
    options.add_argument(
        "--steps",
        type=int,
        default=50,
        help="time steps of NonlinearCT, before those beyond the prior's noise levels are left out",
    )
    options.add_argument("--scans", nargs="+", default=list(SCANS), choices=list(SCANS))
    options.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options.add_argument("--skip", nargs="+", default=[], choices=["steps", "timing"], help="parts to leave out")
    arguments = options.parse_args()
    images = arguments.images or str(locate("fashion_mnist") / "test_images.npz")
    prior = Prior.from_pretrained(arguments.prior)
    held = len(read_images(images, prior))
    if not all(0 <= i < held for i in arguments.pictures):
        raise SystemExit(f"--pictures {arguments.pictures}: allowed are 0 to {held - 1}")
    cells: dict[str, tuple[Any, ...]] = {
        f"{scan}/{method}/{i}": (scan, method, i, arguments.steps)
        for i in arguments.pictures
        for scan in arguments.scans
        for method in arguments.methods
    }
    if "steps" not in arguments.skip:
        i = arguments.pictures[0]
        cells |= {
            f"{scan}, {n} steps/{i}": (scan, "poisson", i, n)
            for scan in STUDY_SCANS
            if scan in arguments.scans
            for n in STUDY_STEPS
        }
    physics = {"width": arguments.width, "attenuation": arguments.attenuation, "background": arguments.background}
    header = {
        "prior": prior.card.sha256,
        "images": Path(images).name,
        "chains": CHAINS,
        "steps": arguments.steps,
        **physics,
    }
    worker = (arguments.prior, images, *physics.values())
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=worker)
    if "timing" not in arguments.skip:
        alone = argparse.Namespace(**vars(arguments) | {"jobs": 1})
        results = run_cells(time_subsets, {"timing": ()}, alone, header=header)
    write_table(arguments, table(results, arguments.steps))
    plot(arguments, results)


if __name__ == "__main__":
    main()
