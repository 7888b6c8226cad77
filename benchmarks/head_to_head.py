"""Head to head: DPnP and the solvers that people compare with, each tuned by the same small budget, on the same problems.

    python benchmarks/head_to_head.py --jobs 2

**Solvers**: DPnP as single chains, as a population and with replica exchange (both on the mixture only), PnP-DM, PiGDM, DDRM, DiffPIR,
DPS, DAPS, LGD-MC. A solver that a problem is not for is shown as such. UCoS (needs a denoiser trained for the operator), NonlinearCT
(needs a scan) and the function-space samplers have benchmarks of their own: ucos.py, transmission_ct.py, function_space.py.

**Problems**: (a) mixtures of 25 separated modes whose posterior is known exactly (mixture.py), with d = 8 and 80 entries, m = 1 and 2
measurements: sliced Wasserstein-1 distance of 1,000 draws to 1,000 exact ones; total variation between the modes' exact weights and
their frequencies among the draws; beside both the floor, as many exact draws. (b) the bundled prior on held-out images
(reconstruction.py): half of the pixels missing, 2 x 2 pooling and blur, with noise 0.05, and dithered quantisation, which is nonlinear
(phase retrieval by ``--image-problems``).

**Tuning**: the search spaces are the table ``SOLVERS`` below, six settings for each solver, the published ones always the first. Each is
run on other problems and images than those shown, and the one with the fewest failures, then the least mean sliced W1 (mixture, for
d = 8 and d = 80 apart) or CRPS (images, for each problem apart) is taken. DPnP is tuned likewise.

**Budget**: on the mixture steps are cheap, and are those of the search space. On images each draw may cost at most ``--budget`` calls of
the network, one that is differentiated (in the image alone, not in the weights) counting as 2; where published steps do not fit (PnP-DM
has 100 iterations of up to 100, DPS and LGD-MC 1,000 with gradient, DAPS 1,000) there are as many as fit. ``--budget published`` takes
the published ones, at several times the cost. A population and replica exchange decide their steps themselves, and are not run on
images: tables say so.

All seeds are fixed here. A run that raises an error (a chain that diverges) or gives numbers that are not finite is a failure: it is
counted and shown, and means are over the others. Finished cells are kept in ``benchmarks/results/head_to_head.json``, from where an
interrupted run goes on; tables and plot are written beside it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import reconstruction
import torch
from matplotlib.figure import Figure
from mixture import calls_a_draw
from problems import mixture_problem
from reconstruction import simulate
from runner import parser, run_cells, write_table
from streaming_memory import memory, reset_peak
from torch import Tensor

from dpnp_inference import DDSDDIM, DDSDDPM, Annealing, DPnP, Population, Posterior, ReplicaExchange
from dpnp_inference.annealing import noise_through
from dpnp_inference.baselines import DAPS, DDRM, DPS, LGDMC, DiffPIR, PiGDM, PnPDM, UnadjustedLangevin
from dpnp_inference.gibbs import START_CALLS
from dpnp_inference.metrics import coverage, psnr, sliced_wasserstein, ssim
from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.features import FashionMNISTFeatures
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.prior import Prior

Settings = dict[str, Any]
Draw = Callable[[Tensor, int, int], Posterior]  # of a measurement, a number of draws and a seed

# Problems, draws and seeds, fixed beforehand.
CELLS = ("8,1", "8,2", "80,1", "80,2")
DRAWS, TUNING_DRAWS = 1000, 250
MIXTURE_TUNING = {"8": ((8, 1, 1000), (8, 2, 1001)), "80": ((80, 1, 1000), (80, 2, 1001))}  # evaluated: seeds from 0 on
PROBLEMS = ("inpainting", "super-resolution", "blur", "quantisation")
CHAINS, TUNING_CHAINS = 9, 3
LEVEL = 0.8  # of the intervals; nine draws have it exactly
IMAGE_TUNING = (18, 19)  # bundled test images; those evaluated are the first ones
GRADIENT = 2  # calls that one which is differentiated counts as: measured 1.9 for the bundled prior and 9 images


# How solvers are made. Settings are the solver's own, and ones in terms of the noise in image units, u = sigma/|A|:
# step_in_noise of Langevin steps in u^2 over the likelihood's power, rho_min_in_noise in u. steps = "most" takes what the budget allows.


def steps_within(settings: Settings, published: int, cost: int, budget: int | None) -> int:
    """Steps of ``cost`` network calls each: those of the settings, or the published ones, as far as they fit."""
    steps = settings.pop("steps", published)
    most = 1000 if budget is None else min(1000, budget // cost)
    return most if steps == "most" else min(steps, most)


def chains_of(sampler: Any) -> Draw:
    return lambda y, draws, seed: sampler.sample(y, chains=draws, seed=seed)


def make_dpnp(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    """Single chains; the schedule is made shorter, or with decay = "most" longer, until the planned calls fit the budget."""
    kind = {"ddim": DDSDDIM, "ddpm": DDSDDPM}[settings.pop("dds", "ddim")]
    dds = kind(**{key: settings.pop(key) for key in ("calls", "tolerance") if key in settings})
    decay = settings.pop("decay", Annealing.decay)
    sampler = DPnP(prior, model, dds=dds)
    low, high = sampler.schedule[-1] * settings.pop("eta_min_times", 1), sampler.schedule[0]

    def annealing(decay: int) -> Annealing:
        return Annealing(eta_max=high, eta_min=low, decay=decay, **settings)

    def calls(decay: int) -> int:
        schedule = annealing(decay).schedule(prior, sampler.kernel_model, sampler.blank())
        return START_CALLS + sum(dds.calls_for(prior, eta) for eta in schedule)

    if decay == "most":
        decay = Annealing.decay if budget is None else 200
    while budget is not None and decay > 1 and calls(decay) > budget:
        decay -= 1
    return chains_of(DPnP(prior, model, dds=dds, annealing=annealing(decay)))


def make_population(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    dds = {"ddim": DDSDDIM, "ddpm": DDSDDPM}[settings.pop("dds", "ddim")]()
    return chains_of(DPnP(prior, model, dds=dds, population=Population(**settings)))


def make_replicas(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    """50 chains; more ladders than that gain less than longer ones."""
    dds, thin = settings.pop("dds", "ddim"), settings.pop("thin", 2)
    sampler = DPnP(prior, model, dds=dds, population=ReplicaExchange(**settings))
    return lambda y, draws, seed: sampler.sample(y, chains=50, draws=draws // 50, thin=thin, seed=seed)


def make_pnpdm(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    """With fewer iterations the coupling falls faster, to the same least one; the grid has as many levels as fit."""
    u = unit(prior, model)
    iterations = settings.pop("iterations", 25) if budget is not None else 100
    settings["decay"] = settings.get("decay", 0.9) ** (100 / iterations)
    if "rho_min_in_noise" in settings:
        settings["rho_min"] = max(settings.pop("rho_min_in_noise") * u, 2 * prior.sigma_min)
    step = settings.pop("step_in_noise", None)
    if step is not None and not model.linear_gaussian:
        settings["likelihood"] = UnadjustedLangevin(step_size=step * u**2)

    def sampler(steps: int) -> PnPDM:
        return PnPDM(prior, model, iterations=iterations, steps=steps, **settings)

    def calls(sampler: PnPDM) -> int:
        return sum(1 + len(sampler.process.levels_below(rho)) for rho in sampler.schedule)

    steps = 100
    while budget is not None and steps > 2 and calls(sampler(steps)) > budget:
        steps -= 1
    return chains_of(sampler(steps))


def make_pigdm(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    return chains_of(PiGDM(prior, model, steps=steps_within(settings, 100, GRADIENT, budget), **settings))


def make_ddrm(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    return chains_of(DDRM(prior, model, steps=steps_within(settings, 20, 1, budget), **settings))


def make_diffpir(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    return chains_of(DiffPIR(prior, model, steps=steps_within(settings, 100, 1, budget), **settings))


def make_dps(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    return chains_of(DPS(prior, model, steps=steps_within(settings, 1000, GRADIENT, budget), **settings))


def make_lgdmc(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    return chains_of(LGDMC(prior, model, steps=steps_within(settings, 1000, GRADIENT, budget), **settings))


def make_daps(prior: Denoiser, model: ForwardModel, settings: Settings, budget: int | None) -> Draw:
    steps = steps_within(settings, 200, settings.get("ode_steps", 5), budget)
    if "step_in_noise" in settings:
        settings["step_size"] = settings.pop("step_in_noise") * unit(prior, model) ** 2 / settings.get("power", 25.0)
    return chains_of(DAPS(prior, model, steps=steps, **settings))


def unit(prior: Denoiser, model: ForwardModel) -> float:
    """The noise in image units."""
    return noise_through(model.homogeneous, prior, torch.zeros(1, *prior.image_shape))


@dataclass(frozen=True)
class Contender:
    """A solver and its search spaces.

    Attributes:
        make: the solver of a prior, a forward model, settings and a budget.
        mixture: settings tried there, the published ones first.
        images: likewise; or why the solver is not run there.
    """

    make: Callable[[Denoiser, ForwardModel, Settings, int | None], Draw]
    mixture: tuple[Settings, ...]
    images: tuple[Settings, ...] | str

    def space(self, part: str) -> tuple[Settings, ...]:
        """Settings tried on the mixture or on images."""
        if part == "mixture":
            return self.mixture
        return () if isinstance(self.images, str) else self.images


# fmt: off
SOLVERS: dict[str, Contender] = {
    "DPnP chains": Contender(
        make_dpnp,
        ({}, {"dds": "ddpm"}, {"decay": 60}, {"decay": 200}, {"calls": 32}, {"eta_min_times": 0.5}),
        ({}, {"dds": "ddpm"}, {"decay": "most"}, {"tolerance": 0.1, "decay": "most"}, {"dds": "ddpm", "tolerance": 0.1, "decay": "most"},
         {"eta_min_times": 0.5}),
    ),
    "DPnP population": Contender(
        make_population,
        ({}, {"dds": "ddpm"}, {"start": 16}, {"ess": 0.9}, {"sweeps": 2}, {"start": 16, "ess": 0.9}),
        "a handful of particles cannot carry weights, and the weights decide the steps: nonlinear problems take several times the budget",
    ),
    "DPnP replica exchange": Contender(
        make_replicas,
        ({}, {"dds": "ddpm"}, {"burn_in": 100}, {"thin": 4}, {"step": 1.3}, {"burn_in": 100, "thin": 4}),
        "50 sweeps of burn-in at each of its couplings are many times the budget",
    ),
    "PnPDM": Contender(
        make_pnpdm,
        ({}, {"rho": 50.0}, {"rho_min_in_noise": 0.5}, {"rho": 50.0, "rho_min_in_noise": 0.5}, {"rho": 200.0, "rho_min_in_noise": 0.5},
         {"rho": 200.0, "decay": 0.95, "rho_min_in_noise": 0.5}),
        ({}, {"rho_min": 0.1}, {"rho_min_in_noise": 0.5, "step_in_noise": 0.3}, {"rho_min_in_noise": 0.25, "step_in_noise": 0.3},
         {"rho_min_in_noise": 0.5, "iterations": 40, "step_in_noise": 0.3},
         {"rho_min_in_noise": 0.5, "process": "vp", "step_in_noise": 0.3}),
    ),
    "PiGDM": Contender(
        make_pigdm,
        ({}, {"guidance": "score"}, {"guidance": "score", "prior_std": 11.0}, {"prior_std": 11.0},
         {"guidance": "score", "steps": 1000}, {"guidance": "score", "steps": 1000, "prior_std": 11.0}),
        ({}, {"steps": "most", "guidance": "score"}, {"steps": "most", "prior_std": 0.5}, {"steps": "most", "prior_std": 0.3},
         {"steps": "most", "guidance": "score", "prior_std": 0.5}, {"steps": "most", "guidance": "score", "prior_std": 0.3}),
    ),
    "DDRM": Contender(
        make_ddrm,
        ({}, {"steps": 100}, {"steps": 1000}, {"steps": 100, "eta": 1.0}, {"steps": 100, "eta": 0.5}, {"steps": 1000, "eta": 1.0}),
        ({}, {"steps": 100}, {"steps": "most"}, {"steps": 100, "eta": 1.0}, {"steps": 100, "eta": 0.5}, {"steps": "most", "eta": 1.0}),
    ),
    "DiffPIR": Contender(
        make_diffpir,
        ({}, {"zeta": 1.0}, {"lambda_": 0.5}, {"lambda_": 0.5, "zeta": 1.0}, {"lambda_": 7.0, "zeta": 1.0}, {"steps": 1000, "zeta": 1.0}),
        ({}, {"zeta": 1.0}, {"lambda_": 0.5, "zeta": 1.0}, {"lambda_": 7.0, "zeta": 1.0}, {"steps": "most", "zeta": 1.0},
         {"steps": "most", "lambda_": 7.0, "zeta": 1.0}),
    ),
    "DPS": Contender(
        make_dps,
        tuple({"zeta": zeta} for zeta in (0.15, 0.05, 0.1, 0.3, 0.6, 1.2)),
        tuple({"zeta": zeta} for zeta in (0.15, 0.3, 0.6, 1.2, 2.4, 4.8)),
    ),
    "DAPS": Contender(
        make_daps,
        ({}, {"steps": 50, "step_in_noise": 0.3}, {"steps": 50, "power": 1.0, "step_in_noise": 0.1},
         {"steps": 50, "power": 1.0, "step_in_noise": 0.3}, {"steps": 50, "power": 1.0, "step_in_noise": 0.3, "sigma_max": 300.0},
         {"steps": 50, "power": 5.0, "step_in_noise": 0.3}),
        ({}, {"step_in_noise": 0.3}, {"power": 1.0, "step_in_noise": 0.1}, {"power": 1.0, "step_in_noise": 0.3},
         {"power": 5.0, "step_in_noise": 0.3}, {"power": 1.0, "step_in_noise": 0.1, "ode_steps": 2}),
    ),
    "LGDMC": Contender(
        make_lgdmc,
        ({}, *({"zeta": zeta} for zeta in (0.05, 0.1, 0.3, 0.6)), {"guidance": "score"}),
        ({}, *({"zeta": zeta} for zeta in (0.3, 0.6, 1.2, 2.4)), {"guidance": "score", "prior_std": 0.3}),
    ),
}
# fmt: on
FAMILY = "DPnP"  # names of its solvers begin so


# One run, and what is measured of it.


def attempt(
    solver: str,
    prior: Denoiser,
    model: ForwardModel,
    y: Tensor,
    settings: Settings,
    *,
    draws: int,
    seed: int,
    budget: int | None,
) -> tuple[Posterior | None, dict[str, Any]]:
    """Run a solver.

    Returns:
        Its draws and what they cost; or None and the reason: ``inapplicable``, where the solver refuses the forward model, or
        ``failed``, where it raises an error on its way or its draws are not finite.
    """
    try:
        draw = SOLVERS[solver].make(prior, model, dict(settings), budget)
    except TypeError as error:
        return None, {"inapplicable": str(error)}
    before, start = forget(), time.perf_counter()
    try:
        result = draw(y, draws, seed)
    except (RuntimeError, ArithmeticError) as error:
        return None, {"failed": f"{type(error).__name__}: {error}"[:300]}
    seconds = time.perf_counter() - start
    if not bool(result.samples.isfinite().all()):
        return None, {"failed": "draws that are not finite"}
    kinds = ("network_calls", "network_gradients", "forward_calls")
    cost = {kind: calls_a_draw(result, kind) for kind in kinds}
    return result, cost | {"seconds": seconds, "memory": peak_above(before)}


def forget() -> int | None:
    """Give freed memory back to the system, and let the peak start anew: what the process holds, in KiB."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    reset_peak()
    return memory("VmRSS")


def peak_above(before: int | None) -> float:
    """Peak memory in MiB above what :func:`forget` found."""
    return math.nan if before is None else (memory("VmHWM") - before) / 2**10


def mode_weight_error(prior: GaussianMixturePrior, weights: Tensor, draws: Tensor) -> float:
    """Total variation between ``weights`` ``(K,)`` and how often each component is the most responsible one for a draw."""
    square = torch.cdist(draws.flatten(1).to(torch.float64), prior.means).square()
    modes = (prior.log_weights - square / (2 * prior.variance)).argmax(1)
    frequencies = torch.bincount(modes, minlength=len(weights)) / len(draws)
    return 0.5 * float((frequencies - weights).abs().sum())


def energy_score(draws: Tensor, truth: Tensor) -> float:
    r"""Mean over k of :math:`E|X - y| - \tfrac12 E|X - X'|`, unbiased also for few draws; for d = 1 the CRPS.

    Args:
        draws: ``(n, k, d)``, n at least 2.
        truth: ``(k, d)``.
    """
    x, n = draws.transpose(0, 1).double(), len(draws)
    to_truth = (x - truth[:, None].double()).norm(dim=2).mean(1)
    return float((to_truth - torch.cdist(x, x).sum((1, 2)) / (2 * n * (n - 1))).mean())


def features_of(x: Tensor) -> Tensor:
    """Features ``(B, 64)`` of images, in units of the mean distance between two of the held-out images."""
    low, high = reconstruction.PRIOR.card.value_range
    return FEATURES(((x - low) / (high - low)).clamp(0, 1)) / FEATURE_UNIT


def image_figures(result: Posterior, truth: Tensor, model: ForwardModel, y: Tensor) -> dict[str, float]:
    """How good the draws of an image are."""
    value_range = reconstruction.PRIOR.card.value_range
    draws, bright = result.flat, truth > value_range[0]
    log_l = model.log_likelihood(torch.cat([truth[None], draws]), y).double()
    figures = {
        "psnr": psnr(result.mean, truth, value_range),
        "ssim": ssim(result.mean, truth, value_range),
        "feature_distance": 2 * energy_score(features_of(draws)[:, None], features_of(truth[None])),
        "crps": energy_score(draws.flatten(1)[..., None], truth.flatten()[:, None]),
        "misfit": float(2 * (log_l[0] - log_l[1:].mean())) / (y.numel() * (2 if y.is_complex() else 1)),
    }
    if len(draws) >= CHAINS:
        figures["coverage"] = coverage(result, truth, LEVEL)[0]
        figures["coverage_not_black"] = coverage(result, truth, LEVEL, bright)[0]
    return figures


def run_mixture(solver: str, settings: Settings, problem: tuple[int, int, int], draws: int) -> dict[str, Any]:
    """One problem ``(d, m, seed)`` of the mixture; the solver ``floor`` is as many exact draws."""
    prior, model, y = mixture_problem(*problem)
    posterior, seed = prior.posterior(model, y), problem[2]

    def exact(stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * seed + stream)
        return posterior.sample(draws, generator=generator, dtype=torch.float64)

    if solver == "floor":
        x, cost = exact(1), {}
    else:
        result, cost = attempt(solver, prior, model, y.float(), settings, draws=draws, seed=seed, budget=None)
        if result is None:
            return cost
        x = result.flat
    quality = {
        "distance": sliced_wasserstein(x, exact(0)),
        "weight_error": mode_weight_error(prior, posterior.weights, x),
    }
    return quality | cost


def run_image(
    solver: str, settings: Settings, problem: str, seed: int, chains: int, budget: int | None
) -> dict[str, Any]:
    """One bundled image, whose index is the seed."""
    truth = reconstruction.IMAGES[seed]
    model, y = simulate(problem, truth, seed)
    result, cost = attempt(solver, reconstruction.PRIOR, model, y, settings, draws=chains, seed=seed, budget=budget)
    return cost if result is None else image_figures(result, truth, model, y) | cost


def start(prior: str) -> None:
    """Prepare a worker process."""
    global FEATURES, FEATURE_UNIT
    reconstruction.start(prior)
    FEATURES, FEATURE_UNIT = FashionMNISTFeatures(), 1.0
    FEATURE_UNIT = float(torch.pdist(features_of(reconstruction.IMAGES)).mean())
    with torch.no_grad():
        reconstruction.PRIOR(reconstruction.IMAGES[:CHAINS], 1.0)  # buffers that are made once


FEATURES: FashionMNISTFeatures
FEATURE_UNIT: float
CRITERION = {"mixture": "distance", "images": "crps"}


# Tuning.


def tuning_cells(arguments: argparse.Namespace, budget: int | None) -> dict[str, tuple[Any, ...]]:
    """Arguments of :func:`run_cell` by name ``tuning/part/group/solver/trial/number``."""
    cells: dict[str, tuple[Any, ...]] = {}
    for solver in arguments.solvers:
        for trial, settings in enumerate(SOLVERS[solver].mixture):
            for group in dict.fromkeys(cell.split(",")[0] for cell in arguments.cells):
                for number, problem in enumerate(MIXTURE_TUNING[group]):
                    name = f"tuning/mixture/{group}/{solver}/{trial}/{number}"
                    cells[name] = ("mixture", solver, settings, problem, TUNING_DRAWS)
        for trial, settings in enumerate(SOLVERS[solver].space("images")):
            for problem in arguments.image_problems:
                for number, seed in enumerate(IMAGE_TUNING):
                    name = f"tuning/images/{problem}/{solver}/{trial}/{number}"
                    cells[name] = ("images", solver, settings, problem, seed, TUNING_CHAINS, budget)
    return cells


def run_cell(part: str, *rest: Any) -> dict[str, Any]:
    return run_mixture(*rest) if part == "mixture" else run_image(*rest)


def trials(results: dict[str, Any], part: str, group: str, solver: str) -> list[tuple[int, float]]:
    """Of each setting: problems without a result, and the mean criterion of the other tuning problems (infinite if there is none)."""
    numbers = len(MIXTURE_TUNING[group]) if part == "mixture" else len(IMAGE_TUNING)
    found = []
    for trial in range(len(SOLVERS[solver].space(part))):
        names = (f"tuning/{part}/{group}/{solver}/{trial}/{number}" for number in range(numbers))
        rows = [results[name] for name in names if name in results]
        values = [row[CRITERION[part]] for row in rows if CRITERION[part] in row]
        found.append((numbers - len(values), float(np.mean(values)) if values else math.inf))
    return found


def best(results: dict[str, Any], part: str, group: str, solver: str) -> int:
    """The setting with the fewest failures, then the least criterion; the published one if all are equally bad."""
    found = trials(results, part, group, solver)
    return min(range(len(found)), key=lambda trial: found[trial])


def evaluation_cells(
    results: dict[str, Any], arguments: argparse.Namespace, budget: int | None
) -> dict[str, tuple[Any, ...]]:
    """Arguments of :func:`run_cell` with the settings that were found, by name ``part/problem/solver/seed``."""
    cells: dict[str, tuple[Any, ...]] = {}
    for seed in range(arguments.problems):
        for cell in arguments.cells:
            d, m = map(int, cell.split(","))
            for solver in ("floor", *arguments.solvers):
                if solver == "floor":
                    settings: Settings = {}
                else:
                    settings = SOLVERS[solver].mixture[best(results, "mixture", str(d), solver)]
                cells[f"mixture/{cell}/{solver}/{seed}"] = ("mixture", solver, settings, (d, m, seed), DRAWS)
    for seed in range(arguments.images):
        for problem in arguments.image_problems:
            for solver in arguments.solvers:
                if space := SOLVERS[solver].space("images"):
                    settings = space[best(results, "images", problem, solver)]
                    name = f"images/{problem}/{solver}/{seed}"
                    cells[name] = ("images", solver, settings, problem, seed, CHAINS, budget)
    return cells


# Tables.


@dataclass(frozen=True)
class Rows:
    """The runs of a solver on a problem.

    Attributes:
        finished: figures of those that ended, by seed.
        failed: reasons of the others.
        inapplicable: why the solver is not for this problem; empty if it is.
    """

    finished: dict[int, dict[str, float]]
    failed: list[str]
    inapplicable: str

    def values(self, figure: str) -> np.ndarray:
        """A figure of each run that ended."""
        return np.array([row.get(figure, np.nan) for row in self.finished.values()])

    def mean(self, figure: str) -> float:
        """NaN if no run ended."""
        return float(self.values(figure).mean()) if self.finished else math.nan

    def shown(self, figure: str, digits: int) -> str:
        """Mean ± its standard error."""
        v = self.values(figure)
        if len(v) < 2:
            return f"{v[0]:.{digits}f}" if len(v) else ""
        return f"{v.mean():.{digits}f} ± {v.std(ddof=1) / math.sqrt(len(v)):.{digits}f}"


def rows_of(results: dict[str, Any], part: str, problem: str, solver: str) -> Rows:
    prefix = f"{part}/{problem}/{solver}/"
    found = {int(name.removeprefix(prefix)): row for name, row in sorted(results.items()) if name.startswith(prefix)}
    return Rows(
        {seed: row for seed, row in sorted(found.items()) if not {"failed", "inapplicable"} & set(row)},
        [row["failed"] for row in found.values() if "failed" in row],
        next((row["inapplicable"] for row in found.values() if "inapplicable" in row), ""),
    )


COSTS = ("network_calls", "network_gradients", "forward_calls", "seconds", "memory")
COST_HEADER = "network calls | of them differentiated | forward-map calls | seconds | memory (MiB) | failed"


def costs(rows: Rows) -> str:
    return " | ".join(f"{rows.mean(figure):.{1 if figure == 'seconds' else 0}f}" for figure in COSTS)


def table_of(
    results: dict[str, Any], part: str, problem: str, solvers: list[str], figures: dict[str, tuple[str, int]]
) -> list[str]:
    """One problem: a line for each solver."""
    lines = [
        f"\n| solver | {' | '.join(title for title, _ in figures.values())} | {COST_HEADER} |",
        "|---" * (len(figures) + 7) + "|",
    ]
    for solver in solvers:
        rows = rows_of(results, part, problem, solver)
        runs = len(rows.finished) + len(rows.failed)
        why = rows.inapplicable and f"not applicable: {rows.inapplicable}"
        if part == "images" and isinstance(reason := SOLVERS[solver].images, str):
            why = f"not run: {reason}"
        if why:
            lines.append(f"| {solver} | {why} {'| ' * (len(figures) + 6)}|")
        elif runs:
            shown = " | ".join(rows.shown(figure, digits) for figure, (_, digits) in figures.items())
            cost = costs(rows) if rows.finished and solver != "floor" else " | " * (len(COSTS) - 1)
            lines.append(f"| {solver} | {shown} | {cost} | {len(rows.failed)} of {runs} |")
    return lines


MIXTURE_FIGURES = {"distance": ("sliced W1", 3), "weight_error": ("mode-weight error", 3)}
IMAGE_FIGURES = {
    "psnr": ("PSNR of the mean (dB)", 2),
    "ssim": ("SSIM of the mean", 3),
    "feature_distance": ("feature distance", 3),
    "crps": ("CRPS", 4),
    "coverage": (f"{LEVEL:.0%} coverage", 3),
    "coverage_not_black": ("of pixels not black", 3),
    "misfit": ("misfit", 3),
}
AIMS: dict[str, Callable[[float], float]] = {  # the smaller the better
    "distance": float,
    "weight_error": float,
    "psnr": lambda v: -v,
    "ssim": lambda v: -v,
    "feature_distance": float,
    "crps": float,
    "coverage_not_black": lambda v: abs(v - LEVEL),
    "misfit": abs,
}


def losses(results: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Where the best solver is not one of DPnP's."""
    lines = [
        "\n## Where DPnP is not the best\n",
        "By the mean, among solvers of which no run failed. The difference is that of the runs they share, the other's figure less "
        "that of the best DPnP solver, ± its standard error; with so few problems, one below twice that error says "
        "little. Coverage counts by its distance to the level, misfit by its distance to 0.\n",
        "| problem | figure | best | DPnP's best | difference |",
        "|---|---|---|---|---|",
    ]
    parts = [("mixture", cell, MIXTURE_FIGURES) for cell in arguments.cells]
    parts += [("images", problem, IMAGE_FIGURES) for problem in arguments.image_problems]
    for part, problem, figures in parts:
        rows = {solver: rows_of(results, part, problem, solver) for solver in arguments.solvers}
        rows = {solver: r for solver, r in rows.items() if r.finished and not r.failed}
        for figure, (title, digits) in figures.items():
            ours = [s for s in rows if s.startswith(FAMILY)]
            if figure not in AIMS or not ours:
                continue
            aim = {solver: AIMS[figure](r.mean(figure)) for solver, r in rows.items()}
            winner, own = min(aim, key=aim.__getitem__), min(ours, key=aim.__getitem__)
            if winner.startswith(FAMILY):
                continue
            shared = sorted(set(rows[winner].finished) & set(rows[own].finished))
            gap = np.array([rows[winner].finished[s][figure] - rows[own].finished[s][figure] for s in shared])
            error = gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else math.nan
            lines.append(
                f"| {problem} | {title} | {winner} {rows[winner].mean(figure):.{digits}f} | {own} {rows[own].mean(figure):.{digits}f} | "
                f"{gap.mean():.{digits}f} ± {error:.{digits}f} |"
            )
    return lines if len(lines) > 4 else [*lines[:1], "Nowhere among these runs."]


def tuning_table(results: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """Settings that were found, and what they gained."""
    lines = [
        "\n## Tuning\n",
        "The search spaces, published settings first, are the table `SOLVERS` of `benchmarks/head_to_head.py`. Criterion: mean sliced "
        f"W1 of {TUNING_DRAWS} draws over {len(MIXTURE_TUNING['8'])} mixtures, or CRPS of {TUNING_CHAINS} draws of {len(IMAGE_TUNING)} "
        "images, none of them among those shown above. `{}` are the published settings, as far as they fit the budget; failures are those "
        "of all settings tried.\n",
        "| problem | solver | chosen | criterion, published | criterion, chosen | failures |",
        "|---|---|---|---|---|---|",
    ]
    groups = [("mixture", d) for d in dict.fromkeys(cell.split(",")[0] for cell in arguments.cells)]
    groups += [("images", problem) for problem in arguments.image_problems]
    for part, group in groups:
        for solver in arguments.solvers:
            space, found = SOLVERS[solver].space(part), trials(results, part, group, solver)
            prefix = f"tuning/{part}/{group}/{solver}/"
            rows = [row for name, row in results.items() if name.startswith(prefix)]
            if not rows or any("inapplicable" in row for row in rows):
                continue
            chosen, failures = best(results, part, group, solver), sum("failed" in row for row in rows)
            name = f"mixture, d = {group}" if part == "mixture" else group
            values = " | ".join(
                f"{found[trial][1]:.4f}" if math.isfinite(found[trial][1]) else "failed" for trial in (0, chosen)
            )
            lines.append(
                f"| {name} | {solver} | `{json.dumps(space[chosen])}` | {values} | {failures} of {len(rows)} |"
            )
    return lines


def failure_list(results: dict[str, Any]) -> list[str]:
    """Each reason, and how often."""
    reasons: dict[str, int] = {}
    for name, row in sorted(results.items()):
        if "failed" in row and not name.startswith("tuning/"):
            _, problem, solver, _ = name.split("/")
            key = f"{solver}, {problem}: {row['failed'].split(';')[0]}"
            reasons[key] = reasons.get(key, 0) + 1
    return ["\n## Failures\n", *(f"- {count} x {reason}" for reason, count in reasons.items())] if reasons else []


def tables(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Markdown."""
    lines = [
        "# Head to head\n",
        "Made by `python benchmarks/head_to_head.py`, whose first lines say what is run. Solvers were tuned on other problems; means ± "
        "standard error over the problems. Calls are for each draw, also those that are differentiated, which cost about two; seconds "
        "and memory are those of a run of all draws on its share of the cores, memory the peak above what the process held before "
        "(resident set, Linux).\n",
        "## (a) Mixtures of 25 modes, exact posterior\n",
        f"{DRAWS:,} draws, {arguments.problems} problems a cell. `floor`: as many exact draws; nothing can be better but by chance.",
    ]
    for cell in arguments.cells:
        d, m = cell.split(",")
        lines.append(f"\n### d = {d}, m = {m}")
        lines += table_of(results, "mixture", cell, ["floor", *arguments.solvers], MIXTURE_FIGURES)
    if arguments.budget == "published":
        budget = "published numbers of steps"
    else:
        budget = f"at most {arguments.budget} network calls a draw, one that is differentiated counting as {GRADIENT}"
    lines += [
        "\n## (b) Bundled prior, held-out images\n",
        f"{CHAINS} draws of each of {arguments.images} images, {budget}.\n",
        f"- PSNR, SSIM: of the mean of the {CHAINS} draws. Draws of the right spread have a mean whose squared error is {CHAINS + 1}/"
        f"{CHAINS} that of the posterior's ({10 * math.log10(1 + 1 / CHAINS):.2f} dB); draws that are too narrow lose less.",
        "- feature distance: energy distance between draws and truth in the last hidden layer of the shipped classifier "
        "(`dpnp_shared.features.FashionMNISTFeatures`), in units of the mean distance of two held-out images. Like CRPS it is a proper "
        "score, unbiased for few draws: least, in the mean, for draws from the posterior.",
        "- CRPS: continuous ranked probability score, mean over pixels, in image units ([-1, 1]).",
        f"- coverage: how many pixels the intervals from least to largest draw contain; draws from the posterior have {LEVEL:.0%}.",
        "- misfit: consistency with y, twice the log-likelihood of the truth less that of the draws, for each entry of y: for Gaussian "
        "noise the draws' reduced chi-square less the truth's. For draws from the posterior it is 0 in the mean. Above, draws do not "
        "explain y; below, they explain its noise.",
    ]
    for problem in arguments.image_problems:
        lines.append(f"\n### {problem}")
        lines += table_of(results, "images", problem, arguments.solvers, IMAGE_FIGURES)
    lines += losses(results, arguments)
    lines += failure_list(results)
    lines += tuning_table(results, arguments)
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Each figure by problem and solver: dots are runs, dashes means."""
    panels = [
        ("mixture", "distance", "sliced W1 over the floor's mean", None, "log"),
        ("mixture", "weight_error", "mode-weight error", None, "linear"),
        ("images", "psnr", "PSNR of the mean (dB)", None, "linear"),
        ("images", "crps", "CRPS", None, "log"),
        ("images", "coverage_not_black", f"{LEVEL:.0%} coverage, pixels not black", LEVEL, "linear"),
        ("images", "misfit", "misfit", 0.0, "symlog"),
    ]
    figure = Figure(figsize=(15, 8), layout="constrained")
    handles = {}
    for axis, (part, name, title, line, scale) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        problems = arguments.cells if part == "mixture" else arguments.image_problems
        solvers = ["floor"] * (part == "mixture") + [s for s in arguments.solvers if SOLVERS[s].space(part)]
        for j, problem in enumerate(problems):
            floor = rows_of(results, part, problem, "floor").mean(name) if name == "distance" else 1.0
            for k, solver in enumerate(solvers):
                rows = rows_of(results, part, problem, solver)
                place = j + 0.8 * ((k + 0.5) / len(solvers) - 0.5)
                colour = "black" if solver == "floor" else f"C{list(SOLVERS).index(solver)}"
                if not rows.finished:
                    if rows.failed:
                        axis.annotate("x", (place, 0.02), xycoords=("data", "axes fraction"), color=colour, ha="center")
                    continue
                v = rows.values(name) / floor
                axis.plot(np.full(len(v), place), v, "o", ms=2.5, color=colour, alpha=0.5)
                (handles[solver],) = axis.plot(place, v.mean(), "_", ms=9, mew=2.5, color=colour)
        if line is not None:
            axis.axhline(line, color="black", lw=0.8)
        axis.set_yscale(scale, **({"linthresh": 0.1} if scale == "symlog" else {}))
        names = [p.replace(",", ", ") for p in problems]
        axis.set_xticks(range(len(problems)), [f"d, m = {n}" if part == "mixture" else n for n in names], fontsize=8)
        axis.set(xlim=(-0.5, max(len(problems), 1) - 0.5))
        axis.set_title(title, fontsize=10)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=11, fontsize=8)
    figure.savefig(arguments.output.with_suffix(".png"), dpi=110)


def main() -> None:
    options = parser(__doc__, "head_to_head")
    options.add_argument("--prior", default="fashion_mnist")
    options.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    options.add_argument("--cells", nargs="*", default=CELLS, choices=CELLS, help="of the mixture, d,m")
    options.add_argument("--problems", type=int, default=8, help="mixtures a cell")
    options.add_argument("--image-problems", nargs="*", default=PROBLEMS, choices=reconstruction.PROBLEMS)
    options.add_argument("--images", type=int, default=3, help="the first so many bundled test images")
    options.add_argument("--budget", default="400", help="network calls a draw on images, or published")
    arguments = options.parse_args()
    if not (arguments.budget == "published" or (arguments.budget.isdecimal() and int(arguments.budget) >= 150)):
        options.error(f"argument --budget: {arguments.budget!r}; allowed are numbers of at least 150 and 'published'")
    if not 1 <= arguments.images <= min(IMAGE_TUNING):
        options.error(f"argument --images: {arguments.images}; allowed are 1 to {min(IMAGE_TUNING)}")
    budget = None if arguments.budget == "published" else int(arguments.budget)
    spaces = {solver: (contender.mixture, contender.images) for solver, contender in SOLVERS.items()}
    header = {
        "budget": arguments.budget,
        "draws": DRAWS,
        "chains": CHAINS,
        "gradient": GRADIENT,
        "prior": Prior.from_pretrained(arguments.prior).card.sha256,
        "search spaces": hashlib.sha256(json.dumps(spaces).encode()).hexdigest()[:16],
    }

    def run(cells: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        return run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.prior,))

    tuning = tuning_cells(arguments, budget)
    kept = arguments.verify and arguments.output.is_file()  # then nothing new is to be run
    results = json.loads(arguments.output.read_text())["results"] if kept else run(tuning)
    results = run(tuning | evaluation_cells(results, arguments, budget))
    write_table(arguments, tables(results, arguments))
    plot(results, arguments)


if __name__ == "__main__":
    main()
