"""Which of two forward models made a measurement? Populations estimate the evidence of each.

    python benchmarks/evidence.py

Images are blurred by a Gaussian of standard deviation 1.5 pixels, with noise 0.1. The model of that width and one of 1.0 pixels are
compared by their log evidence, each estimated by a population of 64 particles in two independent halves, whose spread is the standard
error. Under the image mixture (see ``image_mixture.py``) the evidence is known exactly; under the bundled trained prior, with held-out
images, it is not, and what counts is which model wins, and by how much. Finished cells are kept in ``benchmarks/results/evidence.json``,
the table is written beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from problems import IMAGE_SHAPE, image_mixture
from runner import parser, run_cells, write_table

from dpnp_inference import DPnP, Population
from dpnp_inference.files import read_tensor, to_image_units
from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import GaussianBlur
from dpnp_shared.prior import Prior, locate

TRUE, OTHER, SIGMA = 1.5, 1.0, 0.1
PRIORS = ("image mixture", "trained")
SETTINGS = Population(start=4, ess=0.5, populations=2)
DATA = "data"


def start(data: str) -> None:
    """Prepare a worker process."""
    global DATA
    DATA = data


def model_of(width: float) -> ForwardModel:
    """The blur."""
    return ForwardModel(GaussianBlur(IMAGE_SHAPE, width), GaussianNoise(SIGMA))


def run_cell(name: str, seed: int) -> dict[str, Any]:
    """Log evidence of both models for one image."""
    generator = torch.Generator().manual_seed(seed)
    prior: Denoiser
    if name == "trained":
        prior = Prior.from_pretrained("fashion_mnist")
        x = to_image_units(read_tensor(locate("fashion_mnist") / "test_images.npz"), prior.card)[seed][None, None]
    else:
        prior = image_mixture(DATA)
        x = prior.sample(1, generator=generator, dtype=torch.float32)
    y = model_of(TRUE).simulate(x, generator=generator)[0]
    figures = {}
    for width in (TRUE, OTHER):
        posterior = DPnP(prior, model_of(width), population=SETTINGS).sample(y, chains=64, seed=seed)
        figures[str(width)] = {
            "log_evidence": posterior.log_evidence,
            "se": posterior.log_evidence_se,
            "calls": posterior.diagnostics["network_calls"] / 2,
        }
        if isinstance(prior, GaussianMixturePrior):
            figures[str(width)]["exact"] = prior.posterior(model_of(width), y).log_evidence
    return figures


def table(results: dict[str, Any], images: int) -> str:
    """Markdown."""
    lines = [
        f"Log evidence of the blur that made the measurement (width {TRUE}) over that of another (width {OTHER}), ± standard error.\n",
        "| prior | image | difference | exact difference | calls a particle |",
        "|---|---|---|---|---|",
    ]
    for name in PRIORS:
        for seed in range(images):
            if f"{name}/{seed}" not in results:
                continue
            true, other = (results[f"{name}/{seed}"][str(width)] for width in (TRUE, OTHER))
            difference = true["log_evidence"] - other["log_evidence"]
            error = (true["se"] ** 2 + other["se"] ** 2) ** 0.5
            exact = f"{true['exact'] - other['exact']:.1f}" if "exact" in true else ""
            lines.append(
                f"| {name} | {seed} | {difference:.1f} ± {error:.1f} | {exact} | {true['calls']:.0f}, {other['calls']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__, "evidence")
    options.add_argument("--images", type=int, default=3)
    options.add_argument("--priors", nargs="+", default=PRIORS, choices=PRIORS)
    options.add_argument("--data", default="data", help="where Fashion-MNIST is, or is downloaded to")
    arguments = options.parse_args()
    cells = {f"{name}/{seed}": (name, seed) for seed in range(arguments.images) for name in arguments.priors}
    header = {"settings": repr(SETTINGS), "prior": Prior.from_pretrained("fashion_mnist").card.sha256}
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.data,))
    write_table(arguments, table(results, arguments.images))


if __name__ == "__main__":
    main()
