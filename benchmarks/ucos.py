"""What UCoS gains by leaving the forward map out: time with a map that is made a hundred times slower, beside DPnP and DPS; and quality.

    python benchmarks/ucos.py --jobs 1
    python benchmarks/ucos.py --jobs 1 --ct runs/ucos_ct/prior --deblur runs/ucos_deblur/prior --images 20

The first measures time alone, with an untrained network of the same size if there is no trained one, since time does not depend on the
weights. The map is eight-view tomography of 28 x 28 pixels. Since that is quick, it and its adjoint do their work ten times, and to be slow
a thousand times. In each round every solver runs with both maps on one core, one directly after the other and in alternating order; the
ratio is taken within a round.
The second adds, for the trained tasks and the first so many bundled test images, PSNR and SSIM of the posterior mean and how many pixels
the 90% intervals cover. Finished cells are kept in ``benchmarks/results/ucos.json``; the table is written beside it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from runner import parser, run_cells, write_table
from torch import Tensor

from dpnp_inference import Annealing, DPnP
from dpnp_inference.baselines import DPS, Baseline, UCoS
from dpnp_inference.files import read_tensor, to_image_units
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.networks import UNet
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import GaussianBlur, LinearOperator, Operator, ParallelBeamCT, PhysicalUnits
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import Prior, locate
from dpnp_shared.task import Gram, Task, TaskCard, TaskDenoiser, TrainedTaskDenoiser

SHAPE, NOISE = (1, 28, 28), 0.05
CHAINS = 19
WORK, SLOWER = 10, 100
SOLVERS = ("UCoS", "DPnP", "DPS")
PRIOR: Prior
IMAGES: Tensor
DENOISERS: dict[str, TaskDenoiser]


class Slowed(LinearOperator):
    """A linear operator that does its work several times.

    Args:
        operator: what it does.
        times: how often.
    """

    def __init__(self, operator: LinearOperator, times: int) -> None:
        super().__init__(operator.image_shape)
        self.operator, self.times = operator, times

    def forward(self, x: Tensor) -> Tensor:
        """``A x``; the gradient, too, takes as many times as long, since each pass takes part in it."""
        return sum((self.operator(x) for _ in range(self.times - 1)), self.operator(x)) / self.times

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``."""
        return sum((self.operator.adjoint(y) for _ in range(self.times - 1)), self.operator.adjoint(y)) / self.times


def forward_model(task: str, slower: int = 0) -> ForwardModel:
    """The forward models of ``configs/training/ucos_*.yaml``."""
    inner: LinearOperator = ParallelBeamCT(SHAPE, 8, pixel_size=0.5) if task == "ct" else GaussianBlur(SHAPE, 1.5)
    if slower:
        inner = Slowed(inner, WORK * slower)
    operator: Operator = PhysicalUnits(inner, physical_range=(0.0, 0.4)) if task == "ct" else inner
    return ForwardModel(operator, GaussianNoise(NOISE)).float()


def untrained(task: str) -> TrainedTaskDenoiser:
    """A denoiser of the size of the trained ones."""
    measurement = Task(forward_model(task), SHAPE)
    gram = Gram.of(Task(forward_model(task).double(), SHAPE, dtype=torch.float64))
    network = UNet(widths=[16, 32, 64], blocks=[1, 2, 2], attention=[2], head_channels=32, embedding=64)
    card = TaskCard("untrained", SHAPE, sigma_range=(0.005, 90.0), spread=8.8)
    edm = EDM(sigma_data=0.7, sigma_min=0.005, sigma_max=90.0)
    parts = measurement.offset_entries, measurement.probe
    return TrainedTaskDenoiser(network, edm, gram, *parts, card).eval().requires_grad_(False)


def start(prior: str, folders: dict[str, str]) -> None:
    """Prepare a worker process."""
    global PRIOR, IMAGES, DENOISERS
    PRIOR = Prior.from_pretrained(prior)
    IMAGES = to_image_units(read_tensor(locate("fashion_mnist") / "test_images.npz"), PRIOR.card)[:, None]
    DENOISERS = {task: TrainedTaskDenoiser.from_pretrained(folder) for task, folder in folders.items()}


def sampler(name: str, model: ForwardModel, task: str, *, short: bool = False) -> DPnP | Baseline:
    """A solver.

    Args:
        name: of it.
        model: forward model.
        task: that the model is of.
        short: fewer iterations of the other solvers, for timing: the ratio is hardly theirs.
    """
    if name == "UCoS":
        return UCoS(PRIOR, model, denoiser=DENOISERS.get(task) or untrained(task))
    if name == "DPS":
        return DPS(PRIOR, model, steps=20 if short else 1000)
    return DPnP(PRIOR, model, annealing=Annealing(constant=0, decay=3, final=0) if short else "auto")


def measure(task: str, image: int) -> tuple[ForwardModel, Tensor]:
    """Forward model and measurement of a bundled image."""
    model = forward_model(task)
    return model, model.simulate(IMAGES[image][None], generator=torch.Generator().manual_seed(1000 + image))[0]


def run_cell(kind: str, task: str, name: str, number: int) -> dict[str, Any]:
    """Time with both maps in one round, or the quality for one image."""
    if kind == "quality":
        model, y = measure(task, number)
        truth, value_range = IMAGES[number], PRIOR.card.value_range
        posterior = sampler(name, model, task).sample(y, chains=CHAINS, seed=number)
        return {
            "psnr": psnr(posterior.mean, truth, value_range),
            "ssim": ssim(posterior.mean, truth, value_range),
            "coverage": coverage(posterior, truth)[0],
            "coverage_not_black": coverage(posterior, truth, where=truth > value_range[0])[0],
            "calls": posterior.diagnostics["network_calls"],
            "seconds": posterior.diagnostics["seconds"],
        }
    torch.set_num_threads(1)
    _, y = measure(task, 0)
    samplers = {slower: sampler(name, forward_model(task, slower), task, short=True) for slower in (1, SLOWER)}
    PRIOR(torch.zeros(CHAINS, *SHAPE), 1.0)  # warm-up
    figures: dict[str, Any] = {}
    for slower in sorted(samplers, reverse=bool(number % 2)):
        wall, processor = time.perf_counter(), time.process_time()
        posterior = samplers[slower].sample(y, chains=CHAINS, seed=number)
        figures[f"{slower}"] = {
            "seconds": {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor},
            "network_calls": posterior.diagnostics["network_calls"],
            "forward_calls": posterior.diagnostics["forward_calls"],
        }
    return figures


def table(results: dict[str, dict[str, Any]]) -> str:
    """Both parts as Markdown."""
    cells: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, figures in results.items():
        cells.setdefault(tuple(key.split("/")[:3]), []).append(figures)
    lines = [
        f"Time of {CHAINS} draws with the map and with one that is {SLOWER} times slower, on one core, in processor seconds, "
        "medians over rounds; the ratio within a round, median (smallest to largest), of processor and of wall time. Calls of the map "
        "(adjoints count as one) and of the network, each for all chains at once. DPnP and DPS take fewer steps here than by default.\n",
        "| solver | rounds | network calls | map calls | seconds | with the slow map | ratio | ratio of wall times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kind, _, name), rows in sorted(cells.items(), key=lambda item: SOLVERS.index(item[0][2])):
        if kind != "time":
            continue
        seconds = {s: [row[s]["seconds"]["processor"] for row in rows] for s in ("1", f"{SLOWER}")}
        ratios = {
            clock: [row[f"{SLOWER}"]["seconds"][clock] / row["1"]["seconds"][clock] for row in rows]
            for clock in ("processor", "wall")
        }
        shown = [f"{statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for r in ratios.values()]
        calls = rows[0]["1"]
        medians = [f"{statistics.median(values):.2f}" for values in seconds.values()]
        row = [name, len(rows), calls["network_calls"], calls["forward_calls"], *medians, *shown]
        lines.append(f"| {' | '.join(map(str, row))} |")
    quality = {cell: rows for cell, rows in cells.items() if cell[0] == "quality"}
    if quality:
        lines += [
            f"\nPSNR and SSIM of the posterior mean of {CHAINS} draws, and how many pixels the 90% intervals cover: of all, and of those "
            "not black in the truth; means over images, with the standard error of the PSNR.\n",
            "| task | solver | images | PSNR (dB) | SSIM | all | not black | network calls | seconds |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for (_, task, name), rows in sorted(quality.items()):
        mean = {k: float(np.mean([row[k] for row in rows])) for k in rows[0]}
        error = np.std([row["psnr"] for row in rows], ddof=min(1, len(rows) - 1)) / np.sqrt(len(rows))
        lines.append(
            f"| {task} | {name} | {len(rows)} | {mean['psnr']:.2f} ± {error:.2f} | {mean['ssim']:.3f} | {mean['coverage']:.3f} | "
            f"{mean['coverage_not_black']:.3f} | {mean['calls']:.0f} | {mean['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, "ucos")
    options.add_argument("--prior", default="fashion_mnist", help="of DPnP and DPS")
    options.add_argument("--ct", help="folder of the denoiser of configs/training/ucos_ct.yaml")
    options.add_argument("--deblur", help="folder of the denoiser of configs/training/ucos_deblur.yaml")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument(
        "--images", type=int, default=10, help="the first so many bundled test images, for the trained tasks"
    )
    options.add_argument("--solvers", nargs="+", default=SOLVERS, choices=SOLVERS)
    arguments = options.parse_args()
    folders = {task: folder for task in ("ct", "deblur") if (folder := getattr(arguments, task)) is not None}
    cells = {
        f"time/ct/{name}/{number}": ("time", "ct", name, number)
        for number in range(arguments.rounds)
        for name in arguments.solvers
    }
    for task, folder in folders.items():
        sha256 = TrainedTaskDenoiser.from_pretrained(folder).card.sha256[:8]  # of this denoiser, and no other
        cells |= {
            f"quality/{task}/{name}/{image}" + (f"/{sha256}" if name == "UCoS" else ""): ("quality", task, name, image)
            for image in range(arguments.images)
            for name in arguments.solvers
        }
    header = {
        "prior": Prior.from_pretrained(arguments.prior).card.sha256,
        "slower": SLOWER,
        "chains": CHAINS,
    }
    results = run_cells(
        run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.prior, folders)
    )
    write_table(arguments, table(results))


if __name__ == "__main__":
    main()
