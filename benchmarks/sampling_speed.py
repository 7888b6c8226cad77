"""What a reconstruction costs: its overhead beside network and forward model, and what each option for speed gains or loses.

    python benchmarks/sampling_speed.py
    python benchmarks/sampling_speed.py --compile     # torch.compile as well, which takes minutes before its first call

**Overhead**: wall time of a run over (network calls x time of a call), for proximal samplers that evaluate the likelihood over
(that + likelihood evaluations x time of one). Machines drift, so the two take turns: after each iteration of the run, as many calls are
made and timed by themselves, and their time does not count for the run.

**Options**: the same images are reconstructed with each option, by turns, with the same seeds. Ratios are to the run of the same image
without options; PSNR and coverage show whether the draws are as good, and the last column how far they are from those without options.

**Precision**: root-mean-square error of the denoiser with the network in half precision against the one in float32.

The schedule is shorter than the default one (``--decay``), the bundled prior's. All figures are kept in
``benchmarks/results/sampling_speed.json``; the tables are written beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reconstruction import simulate
from runner import RESULTS, write_table

from dpnp_inference import Annealing, DPnP
from dpnp_inference.acceleration import accelerate
from dpnp_inference.dds import DDSDDIM
from dpnp_inference.dpnp import Sweep
from dpnp_inference.files import read_tensor, to_image_units
from dpnp_inference.gibbs import START_CALLS
from dpnp_inference.metrics import coverage, psnr
from dpnp_inference.proximal import MALA
from dpnp_inference.proximal.likelihood import value_and_gradient
from dpnp_shared.prior import Prior, locate

PRIOR = "fashion_mnist"
OVERHEAD: dict[
    str, tuple[str, dict[str, Any], int | None]
] = {  # problem, arguments of DPnP, chains (None: as many as given; those of few chains are short and noisy, and run three times a round)
    "inpainting, ddim": ("inpainting", {"dds": "ddim"}, None),
    "inpainting, ddpm": ("inpainting", {"dds": "ddpm"}, None),
    "super-resolution, ddim": ("super-resolution", {"dds": "ddim"}, None),
    "blur, ddim": ("blur", {"dds": "ddim"}, None),
    "blur, ddim, 8 chains": ("blur", {"dds": "ddim"}, 8),
    "blur, MALA": ("blur", {"proximal": MALA()}, None),
    "blur, MALA, 8 chains": ("blur", {"proximal": MALA()}, 8),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "channels_last: false": {"channels_last": False},
    "precision: bfloat16": {"dtype": torch.bfloat16},
    "batch_size: 8": {"batch_size": 8},
    "dds.tolerance: 0.1": {"tolerance": 0.1},
    "dds.tolerance: 0.2": {"tolerance": 0.2},
}
COMPILED = {"compile: true": {"compile": True}}
LEVEL = 0.9
SIGMAS = (0.02, 0.1, 0.3, 1.0, 3.0, 9.0)
HALF = (torch.bfloat16, torch.float16)


class Turns:
    """After each iteration, what it called is called again and timed by itself."""

    def __init__(self, sampler: DPnP, y: torch.Tensor, chains: int) -> None:
        self.sampler, self.y = sampler, y
        self.x = torch.randn(chains, *sampler.image_shape, generator=torch.Generator().manual_seed(0))
        self.calls = 0
        self.network = self.likelihood = 0.0  # seconds

    def __call__(self, sweep: Sweep) -> None:
        """Take a turn."""
        self.network += seconds(sweep.network_calls - self.calls, lambda: self.sampler.prior(self.x, 1.0))
        self.calls = sweep.network_calls
        if isinstance(self.sampler.proximal, MALA):
            model = self.sampler.kernel_model
            self.likelihood += seconds(sweep.info.forward_calls, lambda: value_and_gradient(model, self.x, self.y))


def seconds(times: int, call: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(times):
            call()
    return time.perf_counter() - start


def overhead(row: str, prior: Prior, truth: torch.Tensor, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run whose calls are timed by themselves between its iterations."""
    problem, settings, chains = OVERHEAD[row]
    chains = chains or arguments.chains
    model, y = simulate(problem, truth, seed)
    sampler = DPnP(prior, model, annealing=annealing(arguments), **settings)
    turns = Turns(sampler, y, chains)
    posterior = sampler.sample(y, chains=chains, seed=seed, on_sweep=turns)
    wall = posterior.diagnostics["seconds"] - turns.network - turns.likelihood
    calls = posterior.diagnostics["network_calls"]
    return {
        "network_calls": calls,
        "wall": wall,
        "a_call": turns.network / calls,
        "likelihood": turns.likelihood,
        "ratio": wall / (turns.network + turns.likelihood),
    }


def annealing(arguments: argparse.Namespace) -> Annealing:
    return Annealing(constant=0, decay=arguments.decay, final=0)


class Option:
    """A prior as an option has it, and the draws that it leads to."""

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
        channels_last: bool = True,
        batch_size: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        self.prior = Prior.from_pretrained(PRIOR).to(dtype)
        accelerate(self.prior, compile=compile, channels_last=channels_last)
        self.batch_size = batch_size
        self.dds = DDSDDIM() if tolerance is None else DDSDDIM(tolerance=tolerance)

    def run(self, truth: torch.Tensor, seed: int, arguments: argparse.Namespace) -> tuple[torch.Tensor, dict[str, Any]]:
        """Draws of one image, and the figures."""
        model, y = simulate("inpainting", truth, seed)
        sampler = DPnP(self.prior, model, dds=self.dds, annealing=annealing(arguments))
        posterior = sampler.sample(y, chains=arguments.chains, seed=seed, batch_size=self.batch_size)
        record = posterior.diagnostics
        covered, _ = coverage(posterior, truth, LEVEL, model.operator.unseen)
        return posterior.flat, {
            "wall": record["seconds"],
            "network_calls": record["network_calls"],
            "psnr": psnr(posterior.mean, truth, self.prior.card.value_range),
            "coverage": covered,
        }


@torch.no_grad()
def precision(prior: Prior, truths: torch.Tensor) -> dict[str, list[float]]:
    """Error of the denoiser at each noise level, by precision."""
    w = torch.randn(truths.shape, generator=torch.Generator().manual_seed(0))
    exact = [prior(truths + sigma * w, sigma) for sigma in SIGMAS]
    errors = {}
    for dtype in HALF:
        half = Prior.from_pretrained(PRIOR, dtype=dtype)
        errors[str(dtype).removeprefix("torch.")] = [
            float((half(truths + sigma * w, sigma) - D).square().mean().sqrt())
            for sigma, D in zip(SIGMAS, exact, strict=True)
        ]
    return errors


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=RESULTS / "sampling_speed.json")
    options.add_argument("--chains", type=int, default=39)
    options.add_argument("--decay", type=int, default=6, help="iterations of the schedule less one")
    options.add_argument("--rounds", type=int, default=3, help="of each overhead row")
    options.add_argument("--images", type=int, default=3, help="that are reconstructed with each option")
    options.add_argument("--compile", action="store_true", help="torch.compile as well")
    arguments = options.parse_args()
    prior = Prior.from_pretrained(PRIOR)
    truths = to_image_units(read_tensor(locate(PRIOR) / "test_images.npz"), prior.card)[:, None]
    with torch.no_grad():
        for _ in range(START_CALLS):  # the processor's clock settles
            prior(truths[: arguments.chains], 1.0)

    rows: dict[str, list[dict[str, Any]]] = {row: [] for row in OVERHEAD}
    for i in range(arguments.rounds):
        for row in list(rows)[:: 1 if i % 2 == 0 else -1]:
            for _ in range(3 if OVERHEAD[row][2] else 1):
                rows[row].append(overhead(row, prior, truths[i], i, arguments))
                print(f"{row}: {rows[row][-1]['ratio']:.3f}", flush=True)

    contenders = {name: Option(**settings) for name, settings in OPTIONS.items()}
    first_call = {}
    for name, settings in COMPILED.items() if arguments.compile else ():
        contenders[name] = Option(**settings)
        start = time.perf_counter()
        contenders[name].run(truths[0], 0, argparse.Namespace(chains=arguments.chains, decay=1))
        first_call[name] = time.perf_counter() - start
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for i in range(arguments.images):
        draws = {}
        for name in list(contenders)[:: 1 if i % 2 == 0 else -1]:
            draws[name], figure = contenders[name].run(truths[i], i, arguments)
            figures[name].append(figure)
            print(f"{name}: {figure['wall']:.2f} s", flush=True)
        for name, figure in ((name, rows[-1]) for name, rows in figures.items()):
            figure["difference"] = float((draws[name] - draws["none"]).square().mean().sqrt())
            figure["ratio"] = figure["wall"] / figures["none"][-1]["wall"]

    header = {"torch": torch.__version__, "threads": torch.get_num_threads(), "prior": prior.card.sha256}
    header |= {"chains": arguments.chains, "decay": arguments.decay}
    record = {"header": header, "overhead": rows, "options": figures, "first_call": first_call}
    record["precision"] = precision(prior, truths[:8])
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    write_table(arguments, tables(record))


def tables(record: dict[str, Any]) -> str:
    """All figures as Markdown: medians, and all ratios."""
    header = record["header"]
    lines = [
        f"PyTorch {header['torch']}, {header['threads']} threads, {header['chains']} chains of 28 x 28 images where nothing else is "
        "said. Medians; all ratios in parentheses.\n",
        "## Overhead\n",
        "| forward model, sampler | network calls | s a call | likelihood (s) | wall time (s) | ratio, median (all) |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in record["overhead"].items():
        likelihood = median(runs, "likelihood")
        lines.append(
            f"| {name} | {runs[0]['network_calls']} | {median(runs, 'a_call'):.4f} | {f'{likelihood:.2f}' if likelihood else ''} | "
            f"{median(runs, 'wall'):.2f} | {ratios(runs, 3)} |"
        )
    lines += [
        "\n## Options\n",
        f"Inpainting, {len(record['options']['none'])} images. Coverage of {LEVEL:.0%} intervals of the pixels that are not measured; "
        "difference: root mean square, of draws of the same seed, in units of images in [-1, 1].\n",
        "| option | network calls | wall time (s) | ratio, median (all) | PSNR (dB) | coverage (%) | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in record["options"].items():
        lines.append(
            f"| {name} | {median(runs, 'network_calls'):.0f} | {median(runs, 'wall'):.2f} | {ratios(runs, 2)} | "
            f"{mean(runs, 'psnr'):.2f} | {100 * mean(runs, 'coverage'):.1f} | {mean(runs, 'difference'):.2g} |"
        )
    for name, time_ in record["first_call"].items():
        lines.append(f"\n{name}: {time_:.0f} s until the first two iterations were done.")
    lines += [
        "\n## Precision\n",
        "Root-mean-square error of the denoiser against float32, 8 images in [-1, 1].\n",
        f"| network in | {' | '.join(f'σ = {sigma:g}' for sigma in SIGMAS)} |",
        f"|---|{'---|' * len(SIGMAS)}",
    ]
    for name, errors in record["precision"].items():
        lines.append(f"| {name} | {' | '.join(f'{error:.2g}' for error in errors)} |")
    return "\n".join(lines) + "\n"


def median(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def ratios(runs: list[dict[str, Any]], digits: int) -> str:
    every = ", ".join(f"{run['ratio']:.{digits}f}" for run in runs)
    return f"{median(runs, 'ratio'):.{digits}f} ({every})"


if __name__ == "__main__":
    main()
