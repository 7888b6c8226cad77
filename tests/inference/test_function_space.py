"""Function-space Langevin and pCN against closed forms on three grids, and what they refuse.

A linear Gaussian problem in function space: five local averages of a field. Its posterior is worked out on each grid; a functional, the
average over a patch, stands for what one would report.
"""

import math
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor

from dpnp_inference import DPnP
from dpnp_inference.baselines import DPS
from dpnp_inference.function_space import FunctionSpaceLangevin, noise_level_of
from dpnp_inference.pcn import PCN
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.field_prior import FieldPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import CubicAverages, LocalAverages, Operator

GRIDS = (8, 16, 32)
POINTS = [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75], [0.5, 0.5]]
PATCH = [[0.4, 0.6]]
Y = torch.tensor([0.8, -0.5, 0.3, 1.2, 0.1], dtype=torch.float64)
SIGMA = 0.3
Q = GaussianField(std=1.0, length=0.2, smoothness=2.5)
C = GaussianField(std=1.0, length=0.25, smoothness=2.0)


def linear(n: int) -> ForwardModel:
    return ForwardModel(LocalAverages((1, n, n), POINTS, 0.1), GaussianNoise(SIGMA))


def patch(x: Tensor) -> Tensor:
    """The functional of images ``(…, 1, H, W)``, ``(…)``."""
    h, w = x.shape[-2:]
    return (x.double().flatten(-2) @ LocalAverages((1, h, w), PATCH, 0.12).matrix[0])[..., 0]


def closed_form(n: int, law: GaussianField | None = None, tau: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean ``(H, W)`` and functional's variance, for the prior of noise level ``tau``, e^-tau Q + (1 - e^-tau) C."""
    A = LocalAverages((1, n, n), POINTS, 0.1).matrix
    f = LocalAverages((1, n, n), PATCH, 0.12).matrix

    def covariance(rows: Tensor) -> Tensor:
        x = rows.reshape(-1, 1, n, n)
        return (math.exp(-tau) * (law or Q).covariance(x) - math.expm1(-tau) * C.covariance(x)).flatten(1)

    K = covariance(A)
    S = A @ K.T + SIGMA**2 * torch.eye(len(A), dtype=A.dtype)
    k = K @ f[0]
    variance = f[0] @ covariance(f)[0] - k @ torch.linalg.solve(S, k)
    return (torch.linalg.solve(S, Y) @ K).reshape(n, n), variance


@cache
def langevin(n: int, tau: float, averaged: bool = True, rate: float = 0.5) -> Tensor:
    """Draws ``(chains, draws, 1, H, W)``."""
    sampler = FunctionSpaceLangevin(
        FieldPrior(Q, C, (1, n, n)), linear(n), tau_max=1.0, tau_min=tau, annealing=40, burn_in=160, rate=rate,
        averaged=averaged,
    )  # fmt: skip
    return sampler.sample(Y, chains=64, seed=3, draws=30, thin=8).samples


@cache
def crank_nicolson(n: int) -> Tensor:
    return (
        PCN(FieldPrior(Q, C, (1, n, n)), linear(n), burn_in=200).sample(Y, chains=64, seed=4, draws=30, thin=15).samples
    )


def errors(samples: Tensor, mean: Tensor, variance: Tensor) -> tuple[float, float]:
    """Of the functional's mean in standard errors between chains, and of its variance in its own."""
    g = patch(samples)
    exact = float(patch(mean[None]))
    z = float(g.mean() - exact) / float(g.mean(1).std() / len(g) ** 0.5)
    second = (g - exact).square().mean(1)
    return z, float(second.mean() - variance) / float(second.std() / len(g) ** 0.5)


@pytest.mark.parametrize("n", [*GRIDS[:2], pytest.param(GRIDS[2], marks=pytest.mark.slow)])
def test_langevin_has_the_closed_form(n):
    """At a floor of 0.1 the law is the posterior of the prior at that noise level, which is not that of Q itself."""
    z = errors(langevin(n, 0.1), *closed_form(n, tau=0.1))
    assert max(map(abs, z)) < 3.5
    mean = closed_form(n, tau=0.1)[0]
    assert float((langevin(n, 0.1).mean((0, 1))[0] - mean).norm() / mean.norm()) < 0.1


@pytest.mark.parametrize("n", [*GRIDS[:2], pytest.param(GRIDS[2], marks=pytest.mark.slow)])
def test_crank_nicolson_has_the_closed_form(n):
    mean, variance = closed_form(n)
    assert max(map(abs, errors(crank_nicolson(n), mean, variance))) < 3.5
    assert float((crank_nicolson(n).mean((0, 1))[0] - mean).norm() / mean.norm()) < 0.1


@pytest.mark.slow
def test_neither_changes_with_the_grid():
    for draws in (lambda n: langevin(n, 0.1), crank_nicolson):
        values = {n: patch(draws(n)).mean(1) for n in GRIDS}
        means = {n: draws(n).double().mean(1)[:, 0] for n in GRIDS}
        for n in GRIDS[:-1]:
            difference = float(values[n].mean() - values[32].mean())
            error = math.sqrt(sum(float(values[m].var()) / 64 for m in (n, 32)))
            assert abs(difference) < 3 * error
            # the mean as a function: its change is what two runs of one grid would show
            fine = C.resample(means[32], (n, n))
            change = float((means[n].mean(0) - fine.mean(0)).square().mean())
            expected = float(sum(x.var(0).mean() for x in (means[n], fine))) / 64
            assert change < 2 * expected


def test_the_plain_step_widens_and_the_averaged_one_does_not():
    """One measured direction of slope h near the largest: its variance is off by 1/(1 - gamma h/2) and by nothing."""
    n, tau = 8, 0.5
    mean, _ = closed_form(n, tau=tau)
    A = LocalAverages((1, n, n), POINTS, 0.1).matrix
    K = math.exp(-tau) * Q.covariance(A.reshape(-1, 1, n, n)) - math.expm1(-tau) * C.covariance(A.reshape(-1, 1, n, n))
    K = K.flatten(1) @ A.T
    exact = float((K - K @ torch.linalg.solve(K + SIGMA**2 * torch.eye(5, dtype=K.dtype), K)).trace())

    def variance(averaged: bool) -> float:
        x = langevin(n, tau, averaged, 1.0).double().flatten(2) @ A.T
        return float((x - A @ mean.flatten()).square().mean((0, 1)).sum())

    plain, averaged = variance(False), variance(True)
    assert averaged == pytest.approx(exact, rel=0.08)
    assert plain > 1.15 * exact


def test_two_modes_are_both_found():
    """A mixture prior, its means apart; the measurement leaves both."""
    means = [[[1.0]], [[-1.0]]]
    field = GaussianField(std=0.5, length=0.2, smoothness=2.5)
    prior = FieldPrior(field, C, (1, 8, 8), means=means)
    model = ForwardModel(LocalAverages((1, 8, 8), [[0.5, 0.5]], 0.1), GaussianNoise(1.0))
    y = torch.zeros(1, dtype=torch.float64)
    sampler = FunctionSpaceLangevin(prior, model, tau_max=2.0, annealing=100, burn_in=20)
    g = sampler.sample(y, chains=100, seed=0).samples.mean((1, 2, 3, 4))
    assert 30 < int((g > 0.3).sum()) < 70
    assert 30 < int((g < -0.3).sum()) < 70


def test_a_nonlinear_problem_agrees_with_crank_nicolson():
    n = 8
    model = ForwardModel(CubicAverages((1, n, n), POINTS, 0.1, cubic=1.0), GaussianNoise(SIGMA))
    prior = FieldPrior(C, C, (1, n, n))  # no bias from the floor
    y = Y + Y**3
    reference = patch(PCN(prior, model, burn_in=1000).sample(y, chains=64, seed=0, draws=30, thin=30).samples)
    sampler = FunctionSpaceLangevin(prior, model, tau_max=1.0, annealing=50, burn_in=400, rate=0.3)
    ours = patch(sampler.sample(y, chains=64, seed=1, draws=30, thin=20).samples)
    error = math.sqrt(sum(float(g.mean(1).var()) / 64 for g in (reference, ours)))
    assert abs(float(ours.mean() - reference.mean())) < 3.5 * error
    assert float(ours.std()) == pytest.approx(float(reference.std()), rel=0.12)


def test_the_record_and_the_batches():
    prior = FieldPrior(Q, C, (1, 8, 8))
    sampler = FunctionSpaceLangevin(prior, linear(8), annealing=3, burn_in=2)
    seen = []
    posterior = sampler.sample(Y, chains=3, seed=0, draws=2, thin=2, on_sweep=seen.append)
    assert posterior.samples.shape == (3, 2, 1, 8, 8)
    assert len(seen) == 3 + 2 + 4 == seen[-1].iterations
    d = posterior.diagnostics
    assert d["network_calls"] == 9
    assert d["forward_calls"] == 2 * 9 + 4 * (15 + 4)  # gradients, and differences of them
    assert d["acceptance"] is None
    assert d["schedule"][-1] == pytest.approx(noise_level_of(0.05))
    assert sampler.alphas[0] == 2.0
    assert sampler.alphas[-1] == 1.0
    apart = sampler.sample(Y, chains=3, seed=0, draws=2, thin=2, batch_size=2)
    torch.testing.assert_close(apart.samples, posterior.samples, rtol=1e-4, atol=1e-4)
    chain = PCN(prior, linear(8), burn_in=5).sample(Y, chains=2, seed=0, draws=2, thin=3)
    assert chain.diagnostics["forward_calls"] == 5 + 6 + 1


def test_what_does_not_fit_is_refused():
    white, model = GaussianPrior(0.0, 1.0, (1, 8, 8)), linear(8)
    field = FieldPrior(Q, C, (1, 8, 8))
    with pytest.raises(TypeError, match="this GaussianPrior is for white noise"):
        FunctionSpaceLangevin(white, model)
    for sampler in (DPnP, DPS):
        with pytest.raises(TypeError, match="needs a prior for white noise"):
            sampler(field, model)
    with pytest.raises(TypeError, match="one component, got FieldPrior of 2"):
        PCN(FieldPrior(Q, C, (1, 8, 8), means=[[[1.0]], [[-1.0]]]), model)
    with pytest.raises(ValueError, match=r"rate = 2\.5"):
        FunctionSpaceLangevin(field, model, rate=2.5)
    with pytest.raises(ValueError, match=r"tau_max = 0\.01"):
        FunctionSpaceLangevin(field, model, tau_max=0.01)


@pytest.mark.parametrize("name", ["averages", "darcy"])
def test_the_configurations_describe_a_run(name):
    root = Path(__file__).parents[2]
    config = yaml.safe_load((root / f"configs/inference/function_space/{name}.yaml").read_text())
    parser = ArgumentParser()
    for key, kind in (("prior", Denoiser), ("operator", Operator), ("noise", Noise)):
        parser.add_argument(f"--{key}", type=kind)
    built = parser.instantiate(parser.parse_object({key: config[key] for key in ("prior", "operator", "noise")}))
    module, _, solver = config["solver"]["class_path"].rpartition(".")
    few = {name: 2 for name in config["solver"]["init_args"] if name != "rate"}
    sampler = getattr(import_module(module), solver)(built.prior, ForwardModel(built.operator, built.noise), **few)
    y = torch.from_numpy(np.load(root / config["measurement"]))
    posterior = sampler.sample(y, chains=2, seed=0, draws=2)
    assert posterior.samples.shape == (2, 2, *config["operator"]["init_args"]["image_shape"])
