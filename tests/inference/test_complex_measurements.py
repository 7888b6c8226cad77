"""Complex measurements, as of MRI: a complex entry is two real ones, each with noise of its own."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dpnp_inference import (
    Annealing,
    ChainGenerators,
    ClosedForm,
    DPnP,
    PerturbAndSolve,
    Population,
    Posterior,
)
from dpnp_inference.annealing import jacobian_norm
from dpnp_inference.cli import main
from dpnp_inference.proximal.likelihood import value_and_gradient
from dpnp_inference.targets import LanczosTargets, SpectralTargets, choose_targets
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MRI, FunctionOperator, LinearOperator, MatrixOperator, PhysicalUnits

SHAPE = (1, 4, 5)
D = 20


class ComplexMatrix(LinearOperator):
    """``y = A x`` with a complex matrix, and the default adjoint."""

    def __init__(self, rows: int, seed: int = 3) -> None:
        super().__init__(SHAPE)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("parts", torch.randn(rows, D, 2, generator=generator, dtype=torch.float64) / 5)

    def forward(self, x: Tensor) -> Tensor:
        A = torch.view_as_complex(self.parts.to(x.dtype))
        return x.flatten(1).to(A.dtype) @ A.T


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stacked(model: ForwardModel, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Real A, R and y, by putting all imaginary parts below all real ones; independent of the code under test."""
    columns = model.operator(torch.eye(D, dtype=torch.float64).reshape(D, *SHAPE))
    std = (torch.ones(columns.shape[1:], dtype=torch.float64) * model.noise.sigma).flatten()
    A = torch.cat([columns.real.flatten(1), columns.imag.flatten(1)], dim=1).T
    return A, torch.diag(torch.cat([std, std]) ** 2), torch.cat([y.real.flatten(), y.imag.flatten()])


def problem(operator: LinearOperator, sigma: float | Tensor = 0.3) -> tuple[ForwardModel, Tensor]:
    model = ForwardModel(operator, GaussianNoise(sigma))
    return model, model.simulate(normal(1, *SHAPE, seed=1), generator=torch.Generator().manual_seed(2))[0]


MODELS = {
    "matrix": lambda: problem(ComplexMatrix(7)),
    "coils": lambda: problem(MRI(SHAPE, "random", 2, coils=2), torch.tensor([[0.2], [0.4]])),
    "single": lambda: problem(MRI(SHAPE, "random", 2)),
}


@pytest.mark.parametrize(
    ("name", "sampler", "eta"),
    [
        ("matrix", PerturbAndSolve(exact_splitting=False, tolerance=1e-8), 0.7),
        ("coils", PerturbAndSolve(), 0.1),
        ("coils", PerturbAndSolve(tolerance=1e-8, most_diagonalised=0), 0.7),
        ("coils", PerturbAndSolve(), 0.7),
        ("single", ClosedForm(), 0.2),
        ("single", ClosedForm(), 0.7),
    ],
    ids=["solve", "split", "split-solve", "split-diagonalised", "closed-split", "closed"],
)
def test_proximal_draws_have_the_dense_mean_and_covariance(name, sampler, eta):
    model, y = MODELS[name]()
    n, x = 1000, normal(1, *SHAPE, seed=5)
    state = sampler.init(model, y, x)
    _, z, _ = sampler.step(state, x.expand(n, -1, -1, -1), eta, generator=ChainGenerators(0, range(n)))
    A, R, b = stacked(model, y)
    c = eta**2 - min(eta**2, sampler.split_variance(state))
    gain = eta**2 * A.T @ torch.linalg.inv(R + c * A @ A.T)
    mean, covariance = x.flatten() + gain @ (b - A @ x.flatten()), eta**2 * (torch.eye(D).double() - gain @ A)
    # 5 standard errors of each of the 20 means and 210 covariances, some of which are 0
    deviation, variance = z.flatten(1) - mean, covariance.diagonal().clamp(min=0)
    assert bool((deviation.mean(0).abs() <= 5 * (variance / n).sqrt() + 1e-8).all())
    error = deviation.T @ deviation / n - covariance
    assert bool((error.abs() <= 5 * ((torch.outer(variance, variance) + covariance**2) / n).sqrt() + 1e-8).all())


@pytest.mark.parametrize("name", MODELS)
def test_likelihood_and_its_gradient(name):
    model, y = MODELS[name]()
    A, R, b = stacked(model, y)
    z = normal(3, *SHAPE, seed=6)
    log_l, gradient = value_and_gradient(model, z, y)
    residual = b - z.flatten(1) @ A.T
    law = torch.distributions.MultivariateNormal(torch.zeros_like(b), R)
    torch.testing.assert_close(log_l, law.log_prob(residual), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient.flatten(1), residual @ torch.linalg.inv(R) @ A, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_marginal_targets(name):
    # 7 complex numbers in 20 unknowns have rank 14: as many Lanczos steps are needed
    model, y = MODELS[name]()
    split, x = 0.01, normal(5, *SHAPE, seed=7)
    targets, _ = choose_targets(model, y, split)
    assert isinstance(targets, SpectralTargets if name == "single" else LanczosTargets)
    A, R, b = stacked(model, y)
    r, at = b - x.flatten(1) @ A.T, targets.at(x, x)
    for eta in (0.05, 0.5, 5.0):
        dense = [-0.5 * (r @ torch.linalg.inv(R + max(e**2 - split, 0.0) * A @ A.T) * r).sum(1) for e in (eta, 0.3)]
        difference = at(eta) - at(0.3) - (dense[0] - dense[1])
        torch.testing.assert_close(difference - difference[0], torch.zeros(5).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_exact_posterior_is_that_of_the_stacked_reals(name):
    model, y = MODELS[name]()
    root = normal(D, D, seed=8) / 4
    prior = GaussianPrior(0.2, root @ root.T + 0.1 * torch.eye(D), SHAPE)
    A, R, b = stacked(model, y)
    reals = prior.posterior(ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(covariance=R)), b)
    exact = prior.posterior(model, y)
    torch.testing.assert_close(exact.mean, reals.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(exact.covariance, reals.covariance, rtol=0, atol=1e-10)
    assert exact.log_evidence == pytest.approx(reals.log_evidence, abs=1e-9)


def test_no_full_covariance():
    model = ForwardModel(ComplexMatrix(3), GaussianNoise(covariance=torch.eye(3)))
    with pytest.raises(ValueError, match="covariance is for real measurements"):
        model.linear_gaussian_dense(SHAPE)


@pytest.mark.parametrize(("coils", "physical"), [(1, True), (3, False)])
def test_reconstruction_has_the_exact_posterior(coils, physical, tmp_path):
    operator = MRI(SHAPE, "random", 2, coils=coils)
    model = ForwardModel(PhysicalUnits(operator) if physical else operator, GaussianNoise(0.2))
    prior = GaussianPrior(0.3, 0.5, SHAPE)
    y = model.simulate(normal(1, *SHAPE, seed=1), generator=torch.Generator().manual_seed(2))[0]
    dpnp = DPnP(prior, model, annealing=Annealing(constant=0, decay=6, final=20), dtype=torch.float64)
    assert isinstance(dpnp.proximal, ClosedForm if coils == 1 else PerturbAndSolve)
    posterior = dpnp.sample(y, chains=500, seed=0)
    exact = prior.posterior(model, y)
    std = exact.covariance.diagonal().sqrt().reshape(SHAPE)
    # five standard errors, and one per cent for the integration of the denoising sampler
    assert float(((posterior.mean - exact.mean).abs() / std).max()) < 5 / math.sqrt(500) + 0.01
    assert float((posterior.std / std - 1).abs().max()) < 5 / math.sqrt(1000) + 0.01
    posterior.save(tmp_path / "run")
    torch.testing.assert_close(Posterior.load(tmp_path / "run").mean, posterior.mean, rtol=0, atol=0)


@pytest.mark.parametrize("coils", [1, 2])
def test_population_gives_the_evidence(coils):
    model, y = problem(MRI(SHAPE, "random", 2, coils=coils))
    prior = GaussianPrior(0.3, 0.5, SHAPE)
    dpnp = DPnP(prior, model, population=Population(populations=4), dtype=torch.float64)
    posterior = dpnp.sample(y, chains=200, seed=0)
    assert posterior.log_evidence_se is not None
    assert posterior.log_evidence_se < 0.15
    # five standard errors; with two coils there are more numbers than pixels, and their misfit to any image counts as well
    assert posterior.log_evidence == pytest.approx(prior.posterior(model, y).log_evidence, abs=0.75)


def test_jacobian_norm_of_complex_measurements():
    operator, prior = ComplexMatrix(7), GaussianPrior(0.0, 1.0, SHAPE)
    blank = torch.zeros(1, *SHAPE, dtype=torch.float64)
    assert jacobian_norm(FunctionOperator(operator), prior, blank) == pytest.approx(operator.norm(), rel=0.02)
    # without gradients, the least that the norm can be: the mean square of the 14 singular values
    A, _, _ = stacked(*problem(operator))
    least = float((A**2).sum() / 14) ** 0.5
    black_box = FunctionOperator(operator, differentiable=False)
    assert jacobian_norm(black_box, prior, blank, iterations=2000) == pytest.approx(least, rel=0.02)


def test_zero_filled_kspace_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = (1, 28, 28)
    operator = MRI(shape, "poisson_disc", 3, coils=2)
    y = ForwardModel(operator, GaussianNoise(0.05)).simulate(
        normal(1, *shape), generator=torch.Generator().manual_seed(0)
    )
    np.save("kspace.npy", operator.zero_filled(y[0]).numpy())
    few = ["--annealing", "dpnp_inference.Annealing", "--annealing.constant=0", "--annealing.decay=1"]
    mri = ["--operator", "dpnp_shared.operators.MRI", "--operator.image_shape", "[1,28,28]", "--operator.coils", "2"]
    arguments = ["--measurement", "kspace.npy", *mri, "--noise", "GaussianNoise", "--noise.sigma", "0.05", *few]
    main([*arguments, "--operator.mask", "kspace.npy", "--chains", "2", "--output", "run", "--device", "cpu"])
    np.testing.assert_allclose(np.load("run/measurement.npy"), y[0].numpy(), rtol=1e-6)
    assert np.load("run/mean.npy").shape == shape
    with pytest.raises(SystemExit, match=r"exactly 0 in all coils.*as mask"):
        main([*arguments, "--operator.mask", "random", "--chains", "2", "--output", "other", "--device", "cpu"])
