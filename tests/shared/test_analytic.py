"""Closed-form priors against quadrature, autograd and dense Bayes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise
from dpnp_shared.operators import MatrixOperator, RandomInpainting

SHAPE, D = (1, 2, 3), 6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance() -> Tensor:
    root = normal(D, D, seed=5)
    return root @ root.T / D + 0.1 * torch.eye(D, dtype=torch.float64)


def mixture() -> GaussianMixturePrior:
    return GaussianMixturePrior(2 * normal(4, D, seed=7), [0.1, 0.2, 0.3, 0.4], 0.3, SHAPE)


PRIORS = {
    "isotropic": lambda: GaussianPrior(0.5, 2.0, SHAPE),
    "diagonal": lambda: GaussianPrior(normal(*SHAPE), torch.linspace(0.1, 3, D), SHAPE),
    "full": lambda: GaussianPrior(normal(D), covariance(), SHAPE),
    "mixture": mixture,
}


def components(prior: GaussianPrior | GaussianMixturePrior) -> list[tuple[float, Tensor, Tensor]]:
    """(weight, mean, covariance) of each component, from the constructor's side of things."""
    if isinstance(prior, GaussianMixturePrior):
        cov = prior.variance * torch.eye(D, dtype=torch.float64)
        return [(float(w), m, cov) for w, m in zip(prior.log_weights.exp(), prior.means, strict=True)]
    vectors = torch.eye(D, dtype=torch.float64) if prior.eigenvectors is None else prior.eigenvectors
    return [(1.0, prior.mean, vectors @ torch.diag(prior.eigenvalues) @ vectors.T)]


@pytest.fixture(params=PRIORS)
def prior(request: pytest.FixtureRequest) -> GaussianPrior | GaussianMixturePrior:
    return PRIORS[request.param]()


def test_full_covariance_is_kept():
    (_, _, C) = components(PRIORS["full"]())[0]
    torch.testing.assert_close(C, covariance())


@pytest.mark.parametrize("sigma", [0.0, 0.1, 3.0])
def test_log_density_is_exact(prior, sigma):
    x = normal(3, *SHAPE, seed=1)
    noise = sigma**2 * np.eye(D)
    expected = [
        np.logaddexp.reduce(
            [
                np.log(w)
                + scipy.stats.multivariate_normal(m.numpy(), C.numpy() + noise).logpdf(point.flatten().numpy())
                for w, m, C in components(prior)
            ]
        )
        for point in x
    ]
    np.testing.assert_allclose(prior.log_prob(x, sigma).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_score_is_the_gradient_of_the_log_density(prior, sigma):
    x = (2 * normal(4, *SHAPE, seed=2)).requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(x, sigma).sum(), x)
    torch.testing.assert_close(prior.score(x, sigma), gradient, rtol=1e-9, atol=1e-10)
    # Tweedie: score = (D - x) / sigma^2
    torch.testing.assert_close(Denoiser.score(prior, x, sigma), gradient, rtol=1e-7, atol=1e-8)


def test_denoiser_is_the_posterior_mean_by_quadrature():
    # one pixel, two components: E[x0 | x0 + sigma w = x] by a fine sum over x0
    prior = GaussianMixturePrior([[-1.0], [0.8]], [0.3, 0.7], 0.05, (1, 1, 1))
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    density = 0.3 * scipy.stats.norm(-1.0, 0.05**0.5).pdf(grid) + 0.7 * scipy.stats.norm(0.8, 0.05**0.5).pdf(grid)
    for sigma in (0.1, 0.5, 2.0):
        for x in (-1.3, -0.2, 0.9):
            posterior = density * scipy.stats.norm(x, sigma).pdf(grid)
            exact = float((posterior * grid.numpy()).sum() / posterior.sum())
            ours = prior(torch.full((1, 1, 1, 1), x, dtype=torch.float64), sigma)
            assert float(ours) == pytest.approx(exact, rel=1e-8)


def test_noise_levels_one_an_image_and_dtypes(prior):
    x, sigma = normal(3, *SHAPE), torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    batch = prior(x, sigma)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], prior(x[i : i + 1], float(sigma[i])))
        torch.testing.assert_close(prior.score(x, sigma)[i : i + 1], prior.score(x[i : i + 1], float(sigma[i])))
    single = prior(x.float(), sigma.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), batch, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prior(x, 0.0), x)
    torch.testing.assert_close(prior(x, 1e6), prior.mean.reshape(1, *SHAPE).expand_as(x), rtol=1e-4, atol=1e-4)


def test_degenerate_directions_are_known():
    prior = GaussianPrior(0.5, torch.tensor([0.0, 1.0]), (1, 1, 2))
    x = torch.full((1, 1, 1, 2), 2.5, dtype=torch.float64)
    assert prior(x, 1.0).flatten().tolist() == [0.5, 1.5]
    assert prior(x, 0.0).flatten().tolist() == [2.5, 2.5]


def test_spread_and_samples_match_the_moments(prior):
    parts = components(prior)
    mean = sum(w * m for w, m, _ in parts)
    cov = sum(w * (C + torch.outer(m - mean, m - mean)) for w, m, C in parts)
    assert prior.spread == pytest.approx(math.sqrt(float(torch.linalg.eigvalsh(cov)[-1])))
    n = 20_000
    x = prior.sample(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert x.shape == (n, *SHAPE)
    scale = cov.diagonal().sqrt()
    # standard errors at most about 1/sqrt(n) = 0.007 and sqrt(2/n) = 0.01 in units of the standard deviations
    assert float(((x.flatten(1).mean(0) - mean) / scale).abs().max()) < 0.035
    assert float(((x.flatten(1).T.cov() - cov) / torch.outer(scale, scale)).abs().max()) < 0.05
    assert prior.sample(2, generator=None).dtype == torch.get_default_dtype()


def test_spread_takes_the_smaller_gram():
    few, many = normal(3, D), normal(40, D)
    for means in (few, many):
        prior = GaussianMixturePrior(means, "equal", 0.2, SHAPE)
        cov = means.T.cov(correction=0) + 0.2 * torch.eye(D, dtype=torch.float64)
        assert prior.spread == pytest.approx(math.sqrt(float(torch.linalg.eigvalsh(cov)[-1])))


MODELS = {
    "matrix": lambda: ForwardModel(MatrixOperator(normal(3, D, seed=3), SHAPE), GaussianNoise([0.2, 0.4, 0.8])),
    "tall": lambda: ForwardModel(MatrixOperator(normal(8, D, seed=3), SHAPE), GaussianNoise(0.5)),
    "inpainting": lambda: ForwardModel(RandomInpainting(SHAPE, 0.5), GaussianNoise(0.3)),
    "covariance": lambda: ForwardModel(
        MatrixOperator(normal(D, D, seed=3), SHAPE), GaussianNoise(covariance=covariance())
    ),
}


@pytest.mark.parametrize("extra_noise", [0.0, 0.9])
@pytest.mark.parametrize("name", MODELS)
def test_posterior_is_dense_bayes(prior, name, extra_noise):
    model = MODELS[name]()
    y = model.simulate(normal(1, *SHAPE, seed=4), generator=torch.Generator().manual_seed(1))[0]
    A, R = model.linear_gaussian_dense(SHAPE)
    R = R + extra_noise**2 * A @ A.T
    # information form, component by component: independent of the gain form under test
    log_joint, means, covs = [], [], []
    for w, m, C in components(prior):
        precision = torch.linalg.inv(C) + A.T @ torch.linalg.solve(R, A)
        covs.append(torch.linalg.inv(precision))
        means.append(covs[-1] @ (torch.linalg.solve(C, m) + A.T @ torch.linalg.solve(R, y.flatten())))
        evidence = scipy.stats.multivariate_normal((A @ m).numpy(), (A @ C @ A.T + R).numpy())
        log_joint.append(math.log(w) + float(evidence.logpdf(y.flatten().numpy())))
    weights = torch.tensor(log_joint, dtype=torch.float64).softmax(0)
    mean = sum(w * m for w, m in zip(weights, means, strict=True))
    cov = sum(w * (C + torch.outer(m - mean, m - mean)) for w, m, C in zip(weights, means, covs, strict=True))

    posterior = prior.posterior(model, y, extra_noise=extra_noise)
    torch.testing.assert_close(posterior.weights, weights)
    torch.testing.assert_close(posterior.mean, mean.reshape(SHAPE), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.covariance, cov, rtol=1e-8, atol=1e-8)
    assert posterior.log_evidence == pytest.approx(float(np.logaddexp.reduce(log_joint)), rel=1e-9)

    n = 10_000
    x = posterior.sample(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = cov.diagonal().sqrt()
    # standard errors in units of the standard deviations: 0.01 and at most about 0.014
    assert float(((x.flatten(1).mean(0) - mean) / scale).abs().max()) < 0.05
    assert float(((x.flatten(1).T.cov() - cov) / torch.outer(scale, scale)).abs().max()) < 0.08


def test_evidence_and_mean_by_quadrature():
    prior = GaussianMixturePrior([[-1.0], [0.8]], [0.3, 0.7], 0.05, (1, 1, 1))
    model = ForwardModel(MatrixOperator([[1.5], [-0.5]], (1, 1, 1)), GaussianNoise(0.4))
    y = torch.tensor([0.3, 0.1], dtype=torch.float64)
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64).reshape(-1, 1, 1, 1)
    joint = (prior.log_prob(grid) + model.log_likelihood(grid, y)).exp()
    evidence = float(joint.sum() * 8 / 20_000)
    posterior = prior.posterior(model, y)
    assert posterior.log_evidence == pytest.approx(math.log(evidence), rel=1e-8)
    assert float(posterior.mean) == pytest.approx(float((joint * grid.flatten()).sum() / joint.sum()), rel=1e-8)


def test_mixture_survives_float32_with_many_far_components():
    # 300 pixels, components many standard deviations apart, all far from the origin
    means = 10 + normal(50, 300)
    prior = GaussianMixturePrior(means, "equal", 0.02, (1, 15, 20))
    x = prior.sample(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x + 0.3 * normal(*x.shape, seed=8)
    torch.testing.assert_close(prior(x.float(), 0.3).double(), prior(x, 0.3), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GaussianPrior(0.0, torch.ones(4), SHAPE), ValueError, r"covariance has shape \(4,\)"),
        (lambda: GaussianPrior(0.0, -1.0, SHAPE), ValueError, "eigenvalue -1"),
        (lambda: GaussianPrior(0.0, torch.diag(torch.arange(D) - 1.0), SHAPE), ValueError, "eigenvalue -1"),
        (lambda: GaussianPrior(0.0, torch.ones(D, D).tril(), SHAPE), ValueError, "not symmetric"),
        (lambda: GaussianPrior(torch.ones(5), 1.0, SHAPE), ValueError, r"mean has shape \(5,\)"),
        (lambda: GaussianPrior(0.0, 1.0, SHAPE)(normal(1, 1, 3, 2), 1.0), ValueError, r"\(1, 1, 3, 2\)"),
        (lambda: GaussianPrior(0.0, 1.0, SHAPE)(normal(1, *SHAPE), -1.0), ValueError, "sigma"),
        (
            lambda: GaussianMixturePrior(normal(2, 5), "equal", 1.0, SHAPE),
            ValueError,
            r"means has shape \(2, 5\)",
        ),
        (lambda: GaussianMixturePrior(normal(2, D), [0.5, 0.6], 1.0, SHAPE), ValueError, "sum 1.1"),
        (lambda: GaussianMixturePrior(normal(2, D), [-0.5, 1.5], 1.0, SHAPE), ValueError, "minimum -0.5"),
        (
            lambda: GaussianMixturePrior(normal(2, D), [1.0], 1.0, SHAPE),
            ValueError,
            r"weights has shape \(1,\)",
        ),
        (lambda: GaussianMixturePrior(normal(2, D), "equal", 0.0, SHAPE), ValueError, "variance = 0.0"),
        (
            lambda: mixture().posterior(ForwardModel(torch.abs, GaussianNoise(1.0)), normal(*SHAPE)),
            TypeError,
            "FunctionOperator",
        ),
        (
            lambda: mixture().posterior(
                ForwardModel(RandomInpainting(SHAPE), DitheredLogisticNoise(1.0)), normal(*SHAPE)
            ),
            TypeError,
            "DitheredLogisticNoise",
        ),
        (lambda: mixture().posterior(MODELS["matrix"](), normal(4)), ValueError, r"y has shape \(4,\)"),
        (
            lambda: mixture().posterior(MODELS["matrix"](), normal(3), extra_noise=-1),
            ValueError,
            "extra_noise = -1",
        ),
    ],
)
def test_errors_name_argument_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("GaussianPrior", {"mean": 0.0, "covariance": 1.0}),
        ("GaussianPrior", {"mean": [0.0, 1.0], "covariance": [1.0, 2.0]}),
        ("GaussianPrior", {"mean": 0.0, "covariance": [[1.0, 0.0], [0.0, 2.0]]}),
        ("GaussianMixturePrior", {"means": [[0.0, 1.0], [2.0, 3.0]], "weights": [0.5, 0.5], "variance": 1.0}),
        ("GaussianMixturePrior", {"means": [[0.0, 1.0], [2.0, 3.0]], "weights": "equal", "variance": 1.0}),
    ],
)
def test_priors_are_built_from_plain_values(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--prior", type=Denoiser)
    init_args = {**arguments, "image_shape": [1, 1, 2]}
    config = {"prior": {"class_path": f"dpnp_shared.analytic.{name}", "init_args": init_args}}
    prior = parser.instantiate(parser.parse_object(config)).prior
    assert prior(torch.zeros(3, 1, 1, 2), 0.5).shape == (3, 1, 1, 2)
