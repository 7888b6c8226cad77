"""Random fields: transforms, trace, the same function on several grids; closed-form denoisers; white-noise samplers refuse them."""

import math

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from dpnp_shared.denoiser import check_white
from dpnp_shared.field_prior import FieldPrior
from dpnp_shared.gaussian_field import GaussianField, forward_transform, inverse_transform, positions
from dpnp_shared.networks import FNO
from dpnp_shared.preconditioning import EDM, FieldEDM
from dpnp_shared.prior import Prior, PriorCard, denoise

BASES = ("neumann", "periodic")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("grid", [(7, 8), (8, 8), (1, 5), (129, 130)])
def test_transforms_are_orthogonal(basis, grid):
    x = torch.randn(2, 3, *grid, dtype=torch.float64, generator=generator())
    c = forward_transform(x, basis)
    torch.testing.assert_close(inverse_transform(c, basis), x)
    torch.testing.assert_close(c.square().sum(), x.square().sum())
    if basis == "neumann":
        np.testing.assert_allclose(c, dctn(x.numpy(), axes=(-2, -1), norm="ortho"), atol=1e-12)


@pytest.mark.parametrize("basis", BASES)
def test_the_trace_is_that_of_the_continuum(basis):
    field = GaussianField(std=1.7, length=0.2, smoothness=1.6, basis=basis)
    sums = [float(field.eigenvalues((n, n)).sum()) / 1.7**2 for n in (16, 64, 256, 512)]
    assert sums == sorted(sums)
    assert 1 - 2e-3 < sums[-1] < 1
    # what is missing falls as n^(2 - 2s), so that the limit is 1
    assert math.log((1 - sums[2]) / (1 - sums[3])) / math.log(2) == pytest.approx(1.2, abs=0.1)


@pytest.mark.parametrize("basis", BASES)
def test_covariance_is_that_of_the_draws(basis):
    field = GaussianField(std=1.3, length=0.3, basis=basis)
    eye = torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)
    covariance = field.covariance(eye).reshape(64, 64)
    root = field.colour(eye).reshape(64, 64)  # linear in the white noise
    torch.testing.assert_close(root.T @ root, covariance)
    x = field.sample(20_000, (8, 8), generator=generator(), dtype=torch.float64).flatten(1)
    error = (x.T @ x / len(x) - covariance).abs() / (covariance.diagonal()[:, None] * covariance.diagonal()).sqrt()
    assert float(error.max()) < 5 / math.sqrt(len(x))


@pytest.mark.parametrize("basis", BASES)
def test_one_seed_is_one_function_on_three_grids(basis):
    field = GaussianField(basis=basis)
    draws = {n: field.sample(3, (n, n), generator=generator(1), dtype=torch.float64) for n in (16, 32, 64)}
    for n in (16, 32):
        torch.testing.assert_close(field.resample(draws[64], (n, n)), draws[n])
    rough = float((draws[64] - field.resample(draws[16], (64, 64))).square().mean())
    missing = float(field.eigenvalues((64, 64)).sum() - field.eigenvalues((16, 16)).sum())
    assert 0.5 < rough / missing < 2  # the rest is the fine modes, of known variance
    # coefficients are those of the function: cos(2 pi u) has one of them, of size 1/sqrt(2), on each grid
    u = positions(16, basis)
    c = field.coefficients(torch.cos(2 * math.pi * u)[:, None].expand(16, 16))
    assert float(c.square().sum()) == pytest.approx(0.5)
    assert float(c.abs().max()) == pytest.approx(1 / math.sqrt(2) if basis == "neumann" else 0.5)


def test_bad_arguments_are_named():
    for arguments, message in (
        ({"std": 0.0}, "std = 0"),
        ({"smoothness": 1.0}, "smoothness = 1"),
        ({"basis": "sines"}, "basis = 'sines'"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianField(**arguments)
    with pytest.raises(ValueError, match="weights"):
        FieldPrior(GaussianField(), GaussianField(), (1, 8, 8), means=[[[1.0]]], weights=[0.5])
    with pytest.raises(ValueError, match="same basis"):
        FieldPrior(GaussianField(basis="periodic"), GaussianField(), (1, 8, 8))


Q = GaussianField(std=0.8, length=0.2, smoothness=2.5)
C = GaussianField(std=1.0, length=0.3, smoothness=2.0)
MEANS = [[[1.0, 0.5], [0.0, 0.0]], [[-1.0, 0.0], [0.0, 0.4]]]


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_field_prior_is_the_conditional_mean(grid):
    """Against dense matrices: D is the posterior mean of a mixture given x_0 + sigma w."""
    prior = FieldPrior(Q, C, (1, *grid), means=MEANS, weights=[0.3, 0.7])
    d, sigma = math.prod(grid), 0.7
    eye = torch.eye(d, dtype=torch.float64).reshape(d, 1, *grid)
    q, c = (f.covariance(eye).reshape(d, d) for f in (Q, C))
    means = Q.function(prior.mean_coefficients(grid)).flatten(1)
    x = prior.sample(5, generator=generator(), dtype=torch.float64)
    x = x + sigma * C.sample(5, grid, generator=generator(1), dtype=torch.float64)
    total = q + sigma**2 * c
    expected = []
    for image in x.flatten(1):
        laws = [torch.distributions.MultivariateNormal(m, total) for m in means]
        r = torch.softmax(torch.stack([law.log_prob(image) for law in laws]) + torch.tensor([0.3, 0.7]).log(), 0)
        expected.append(sum(w * (m + q @ torch.linalg.solve(total, image - m)) for w, m in zip(r, means, strict=True)))
    torch.testing.assert_close(prior(x, sigma).flatten(1), torch.stack(expected))
    # the score is C times the gradient of log p_sigma
    y = x[:1].clone().requires_grad_(True)
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64)),
        torch.distributions.MultivariateNormal(means, total.expand(2, d, d)),
    ).log_prob(y.flatten())
    (gradient,) = torch.autograd.grad(density, y)
    torch.testing.assert_close(prior.score(x[:1], sigma), C.covariance(gradient))


def test_a_trained_prior_keeps_its_field(tmp_path):
    torch.manual_seed(0)
    card = PriorCard("fields", (1, 8, 8), sigma_range=(0.1, 10.0))
    network = FNO(width=4, modes=3, layers=1, embedding=8)
    prior = Prior(network, FieldEDM(C, sigma_data=1.0, sigma_min=0.1, sigma_max=10.0), card).eval()
    loaded = Prior.from_pretrained(prior.save_pretrained(tmp_path / "prior"))
    assert loaded.noise_field is not None
    assert loaded.noise_field.hyperparameters == C.hyperparameters
    x = torch.randn(2, 1, 12, 12, generator=generator())
    torch.testing.assert_close(loaded(x, 0.5), prior(x, 0.5))
    w = torch.randn(2, 1, 12, 12, generator=generator())
    torch.testing.assert_close(loaded.colour(w), C.colour(w))
    with pytest.raises(TypeError, match="DPnP needs a prior for white noise"):
        check_white(loaded, "DPnP")


def test_preconditioning_counts_noise_in_its_own_units():
    field, sigma = GaussianField(std=3.0), torch.tensor([0.2, 1.0])
    for ours, plain in zip(FieldEDM(field).coefficients(sigma), EDM().coefficients(3 * sigma), strict=True):
        torch.testing.assert_close(ours, plain)
    network, x = FNO(width=4, modes=2, layers=1, embedding=8), torch.randn(2, 1, 8, 8)
    total = (0.6**2 + 0.5**2) ** 0.5  # of noise 3 * 0.2 and data 0.5
    torch.testing.assert_close(denoise(network, FieldEDM(field), x, 0.2), x * 0.25 / total**2)  # a new network gives 0


def test_the_bundled_prior_is_that_of_its_field_on_grids_it_never_saw():
    """It was trained on 16 x 16; how much worse than the exact denoiser is it?"""
    prior = Prior.from_pretrained("gaussian_fields")
    unknown, noise = GaussianField(std=1.0, length=0.2, smoothness=2.5), prior.noise_field
    assert noise is not None
    for n in (16, 32, 64):
        x_0 = unknown.sample(32, (n, n), generator=generator(9), dtype=torch.float32)
        w = noise.sample(32, (n, n), generator=generator(8), dtype=torch.float32)
        exact = FieldPrior(unknown, noise, (1, n, n))
        for sigma in (0.25, 1.0, 3.0):
            learned, best = ((d(x_0 + sigma * w, sigma) - x_0).square().mean() for d in (prior, exact))
            assert float(learned) < 1.02 * float(best)
