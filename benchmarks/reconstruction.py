"""Reconstruction quality and honest intervals of the bundled prior, on held-out images, for five forward models.

    python benchmarks/reconstruction.py

For each problem and each denoising sampler: mean PSNR and SSIM of the posterior mean, coverage of the 90% order-statistic
intervals (all pixels; pixels that the measurement does not see; pixels that are not black in the truth), network calls and seconds.
Inpainting stands beside scikit-image's biharmonic inpainting of the same measurement. Every image is simulated with a seed of its
own. Finished cells are kept in ``benchmarks/results/reconstruction.json``, from where an interrupted run goes on; the table is written
beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from runner import parser, run_cells, write_table
from skimage.restoration import inpaint_biharmonic
from torch import Tensor

from dpnp_inference import DPnP
from dpnp_inference.files import read_tensor, to_image_units
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise
from dpnp_shared.operators import DitheredQuantisation, GaussianBlur, PhaseRetrieval, RandomInpainting, SuperResolution
from dpnp_shared.prior import Prior, locate

SHAPE = (1, 28, 28)
DDS = ("ddim", "ddpm")
CHAINS = {"inpainting": 39}  # 19 elsewhere; with 39 and with 19 draws order statistics give 90% exactly
PRIOR: Prior
IMAGES: Tensor


def forward_model(problem: str, seed: int) -> ForwardModel:
    """The forward model of a problem; the mask of an inpainting problem depends on the seed."""
    if problem == "inpainting":
        return ForwardModel(RandomInpainting(SHAPE, missing=0.5, seed=seed), GaussianNoise(0.05))
    if problem == "super-resolution":
        return ForwardModel(SuperResolution(SHAPE, 2), GaussianNoise(0.05))
    if problem == "blur":
        return ForwardModel(GaussianBlur(SHAPE, 1.5), GaussianNoise(0.05))
    if problem == "phase retrieval":
        return ForwardModel(PhaseRetrieval(SHAPE, oversampling=2.0), GaussianNoise(0.05))
    if problem == "quantisation":
        return ForwardModel(DitheredQuantisation(SHAPE, looks=4, dither=0.5), DitheredLogisticNoise(0.2))
    raise ValueError(f"problem = {problem!r}; allowed are {', '.join(PROBLEMS)}")


PROBLEMS = ("inpainting", "super-resolution", "blur", "phase retrieval", "quantisation")


def simulate(problem: str, truth: Tensor, seed: int) -> tuple[ForwardModel, Tensor]:
    """Model and measurement of one image ``(1, 28, 28)``."""
    model = forward_model(problem, seed)
    return model, model.simulate(truth[None], generator=torch.Generator().manual_seed(1000 + seed))[0]


def start(prior: str) -> None:
    """Prepare a worker process."""
    global PRIOR, IMAGES
    PRIOR = Prior.from_pretrained(prior)
    IMAGES = to_image_units(read_tensor(locate("fashion_mnist") / "test_images.npz"), PRIOR.card)[:, None]


def run_cell(problem: str, sampler: str, seed: int) -> dict[str, float]:
    """Figures of one bundled image, whose index is the seed."""
    truth, value_range = IMAGES[seed], PRIOR.card.value_range
    model, y = simulate(problem, truth, seed)
    if sampler == "biharmonic":
        filled = inpaint_biharmonic(y[0].numpy(), model.operator.unseen[0].numpy())
        x = torch.from_numpy(np.ascontiguousarray(filled)).float()[None]
        return {"psnr": psnr(x, truth, value_range), "ssim": ssim(x, truth, value_range)}
    posterior = DPnP(PRIOR, model, dds=sampler).sample(y, chains=CHAINS.get(problem, 19), seed=seed)
    figures = {
        "chains": len(posterior.flat),
        "psnr": psnr(posterior.mean, truth, value_range),
        "ssim": ssim(posterior.mean, truth, value_range),
        "coverage": coverage(posterior, truth)[0],
        "coverage_not_black": coverage(posterior, truth, where=truth > value_range[0])[0],
        "std": float(posterior.std.mean()),
        "calls": posterior.diagnostics["network_calls"],
        "seconds": posterior.diagnostics["seconds"],
    }
    if model.operator.unseen is not None:
        unseen = model.operator.unseen
        figures["coverage_unseen"] = coverage(posterior, truth, where=unseen)[0]
        figures["coverage_unseen_not_black"] = coverage(posterior, truth, where=unseen & (truth > value_range[0]))[0]
    return figures


def table(results: dict[str, dict[str, float]]) -> str:
    """Means over the images as Markdown, with the standard error of the PSNR."""
    cells: dict[str, list[dict[str, float]]] = {}
    for key, figures in results.items():
        cells.setdefault(key.rsplit("/", 1)[0], []).append(figures)
    columns = ("coverage", "coverage_not_black", "coverage_unseen", "coverage_unseen_not_black")
    lines = [
        "PSNR and SSIM of the posterior mean; then how many pixels the 90% intervals cover: of all, of those not black in the "
        "truth, and of each those that the measurement does not see.\n",
        "| problem | sampler | chains | images | PSNR (dB) | SSIM | all | not black | unseen | unseen, not black | calls | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, rows in sorted(cells.items(), key=lambda item: PROBLEMS.index(item[0].split("/")[0])):
        mean = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        error = np.std([row["psnr"] for row in rows], ddof=min(1, len(rows) - 1)) / np.sqrt(len(rows))
        shown = [f"{mean[c]:.3f}" if c in mean else "" for c in columns]
        cost = [f"{mean['calls']:.0f}", f"{mean['seconds']:.1f}"] if "calls" in mean else ["", ""]
        row = [
            *cell.split("/"),
            f"{mean['chains']:.0f}" if "chains" in mean else "",
            f"{len(rows)}",
            f"{mean['psnr']:.2f} ± {error:.2f}",
            f"{mean['ssim']:.3f}",
            *shown,
            *cost,
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, "reconstruction")
    options.add_argument("--prior", default="fashion_mnist")
    options.add_argument("--images", type=int, default=20, help="the first so many bundled test images")
    options.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    options.add_argument("--dds", nargs="+", default=DDS, choices=DDS)
    arguments = options.parse_args()
    cells = {
        f"{problem}/{sampler}/{seed}": (problem, sampler, seed)
        for seed in range(arguments.images)
        for problem in arguments.problems
        for sampler in (*arguments.dds, *(["biharmonic"] if problem == "inpainting" else []))
    }
    header = {"prior": Prior.from_pretrained(arguments.prior).card.sha256}
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.prior,))
    write_table(arguments, table(results))


if __name__ == "__main__":
    main()
