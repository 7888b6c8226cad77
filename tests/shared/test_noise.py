"""Noise densities against scipy and torch.distributions, samples against their moments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise, Noise


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_covariance() -> Tensor:
    root = normal(6, 6, seed=9)
    return root @ root.T + 0.5 * torch.eye(6, dtype=torch.float64)


GAUSSIAN = {
    "scalar": lambda: GaussianNoise(0.3),
    "per_entry": lambda: GaussianNoise(torch.linspace(0.1, 2.0, 6).reshape(2, 3)),
    "per_column": lambda: GaussianNoise([0.2, 0.5, 1.5]),
    "covariance": lambda: GaussianNoise(covariance=full_covariance()),
}


@pytest.fixture(params=GAUSSIAN)
def noise(request: pytest.FixtureRequest) -> GaussianNoise:
    """Gaussian noise on measurements of shape (2, 3)."""
    return GAUSSIAN[request.param]()


def test_gaussian_log_density_is_exact(noise):
    clean, y = normal(4, 2, 3), normal(2, 3, seed=1)
    R = noise.covariance_matrix((2, 3)).numpy()
    expected = [scipy.stats.multivariate_normal(c.flatten().numpy(), R).logpdf(y.flatten().numpy()) for c in clean]
    np.testing.assert_allclose(noise.log_prob(y, clean).numpy(), expected, rtol=1e-10)
    each = noise.log_prob(y.expand(4, 2, 3), clean)
    torch.testing.assert_close(each, noise.log_prob(y, clean), rtol=0, atol=0)


def test_scalar_density_agrees_with_torch():
    clean, y = normal(3, 5), normal(5, seed=1)
    expected = torch.distributions.Normal(clean, 0.7).log_prob(y).sum(1)
    torch.testing.assert_close(GaussianNoise(0.7).log_prob(y, clean), expected)


def test_gaussian_algebra(noise):
    R, r = noise.covariance_matrix((2, 3)), normal(4, 2, 3)
    flat = r.flatten(1)
    torch.testing.assert_close(noise.precision_mul(r).flatten(1), torch.linalg.solve(R, flat.T).T)
    torch.testing.assert_close(noise.sqrt_mul(noise.whiten(r)), r)
    torch.testing.assert_close(
        noise.whiten(r).flatten(1).square().sum(1), (flat * torch.linalg.solve(R, flat.T).T).sum(1)
    )
    assert noise.resolution == pytest.approx(math.sqrt(float(torch.linalg.eigvalsh(R)[0])))


def test_gaussian_samples_have_the_covariance(noise):
    n = 20_000
    clean = normal(1, 2, 3).expand(n, 2, 3)
    y = noise.sample(clean, torch.Generator().manual_seed(0))
    r = (y - clean).flatten(1)
    R = noise.covariance_matrix((2, 3))
    scale = R.diagonal().sqrt()
    # standard errors in units of the standard deviations: 0.007 (mean) and at most 0.01 (covariance)
    assert float((r.mean(0) / scale).abs().max()) < 0.035
    assert float(((r.T @ r / n - R) / torch.outer(scale, scale)).abs().max()) < 0.05


def test_sample_depends_on_its_generator_only():
    noise, clean = GaussianNoise(0.1), torch.zeros(2, 3)
    first = noise.sample(clean, torch.Generator().manual_seed(1))
    torch.manual_seed(123)
    assert torch.equal(first, noise.sample(clean, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, noise.sample(clean, torch.Generator().manual_seed(2)))


def test_float32_log_density_keeps_small_differences():
    # 200,000 entries: a float32 sum could not tell 0.01 in 10^6
    clean = normal(1, 200_000).float()
    y = clean[0] + 0.01 * normal(200_000, seed=1).float()
    noise = GaussianNoise(0.01)
    exact = noise.log_prob(y.double(), clean.double())
    assert float((noise.log_prob(y, clean) - exact).abs()) < 1e-2


def test_complex_measurements_are_pairs_of_reals():
    noise = GaussianNoise(0.5)
    clean, y = (
        torch.complex(normal(2, 3), normal(2, 3, seed=1)),
        torch.complex(normal(3, seed=2), normal(3, seed=3)),
    )
    expected = noise.log_prob(torch.view_as_real(y), torch.view_as_real(clean))
    torch.testing.assert_close(noise.log_prob(y, clean), expected)
    sample = noise.sample(torch.zeros(20_000, 1, dtype=torch.complex128), torch.Generator().manual_seed(0))
    assert float(sample.real.std()) == pytest.approx(0.5, abs=0.0125)  # 5 standard errors
    with pytest.raises(TypeError, match="complex"):
        noise.log_prob(normal(3), clean)


def test_bits_have_their_logistic_probability():
    noise = DitheredLogisticNoise(0.3)
    clean = torch.tensor([-0.4, 0.0, 0.2], dtype=torch.float64).expand(20_000, 3)
    y = noise.sample(clean, torch.Generator().manual_seed(0))
    assert sorted(set(y.flatten().tolist())) == [-1.0, 1.0]
    # the definition: sign(clean + scale * logistic)
    exact = scipy.stats.logistic.sf(-clean[0].numpy() / 0.3)
    np.testing.assert_allclose((y == 1).double().mean(0).numpy(), exact, atol=0.018)  # 5 standard errors
    plus = noise.log_prob(torch.ones(3), clean[:1])
    assert float(plus) == pytest.approx(float(np.log(exact).sum()))


def test_bit_probabilities_sum_to_one():
    noise, clean = DitheredLogisticNoise(0.3), normal(1, 3)
    outcomes = torch.cartesian_prod(*[torch.tensor([-1, 1])] * 3)
    total = noise.log_prob(outcomes, clean.expand(8, 3)).exp().sum()
    assert float(total) == pytest.approx(1)


def test_resolution_of_bits_is_their_fisher_information():
    # E[(d/dc log p)^2] over both outcomes, at the most informative point c = 0
    noise, clean = DitheredLogisticNoise(0.3), torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    log_prob = noise.log_prob(torch.tensor([[-1.0], [1.0]]), clean)
    (score,) = torch.autograd.grad(log_prob.sum(), clean)
    information = float((log_prob.detach().exp() * score[:, 0] ** 2).sum())
    assert noise.resolution == pytest.approx(information**-0.5)


def test_gradient_of_bits_is_exact_far_out():
    clean = torch.tensor([[-200.0]], requires_grad=True)
    DitheredLogisticNoise(1.0).log_prob(torch.ones(1), clean).sum().backward()
    assert float(clean.grad) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GaussianNoise(0.0), ValueError, "sigma = 0.0"),
        (lambda: GaussianNoise(-1.0), ValueError, "sigma = -1.0"),
        (lambda: GaussianNoise(float("nan")), ValueError, "sigma holds 1"),
        (lambda: GaussianNoise([1.0, 0.0]), ValueError, "sigma = 0.0"),
        (lambda: GaussianNoise(), TypeError, "either sigma or covariance"),
        (lambda: GaussianNoise(1.0, covariance=torch.eye(2)), TypeError, "either sigma or covariance"),
        (lambda: GaussianNoise(covariance=-torch.eye(2)), ValueError, "eigenvalue -1"),
        (lambda: GaussianNoise(covariance=[[1.0, 0.5], [0.0, 1.0]]), ValueError, "symmetric"),
        (
            lambda: GaussianNoise([1.0, 2.0]).log_prob(normal(3), normal(2, 3)),
            ValueError,
            r"sigma has shape \(2,\)",
        ),
        (
            lambda: GaussianNoise(torch.ones(4, 3)).sample(normal(4, 3)),
            ValueError,
            r"sigma has shape \(4, 3\)",
        ),
        (
            lambda: GaussianNoise(covariance=torch.eye(2)).sample(normal(1, 3)),
            ValueError,
            r"for 2 real.*\(3,\)",
        ),
        (lambda: GaussianNoise(1.0).log_prob(normal(1), normal(2, 3)), ValueError, r"y has shape \(1,\)"),
        (lambda: DitheredLogisticNoise(0.0), ValueError, "scale = 0.0"),
        (
            lambda: DitheredLogisticNoise(1.0).log_prob(torch.tensor([1.0, 0.0]), normal(1, 2)),
            ValueError,
            "1 entries",
        ),
    ],
)
def test_errors_name_argument_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GaussianNoise", {"sigma": 0.1}),
        ("GaussianNoise", {"sigma": [0.1, 0.2]}),
        ("GaussianNoise", {"covariance": [[1.0, 0.0], [0.0, 1.0]]}),
        ("DitheredLogisticNoise", {"scale": 0.1}),
    ],
)
def test_noise_is_built_from_plain_values(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--noise", type=Noise)
    config = {"noise": {"class_path": f"dpnp_shared.noise.{name}", "init_args": arguments}}
    noise = parser.instantiate(parser.parse_object(config)).noise
    assert noise.sample(torch.zeros(3, 2)).shape == (3, 2)
