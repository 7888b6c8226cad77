"""UCoS: the score identity, draws against closed forms, and what it asks of the forward model."""

import math

import pytest
import torch

from dpnp_inference.baselines import UCoS
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MatrixOperator, PhysicalUnits
from dpnp_shared.operators.base import LinearOperator
from dpnp_shared.task import AnalyticTaskDenoiser

SHAPE, D, STD = (1, 2, 3), 6, 0.3
GENERATOR = torch.Generator().manual_seed(3)
A = torch.randn(3, D, generator=GENERATOR, dtype=torch.float64)
MEANS = 2 * torch.randn(4, D, generator=GENERATOR, dtype=torch.float64)
MIXTURE = GaussianMixturePrior(MEANS, torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.2, SHAPE)


class Counting(LinearOperator):
    """A matrix that counts its calls."""

    def __init__(self):
        super().__init__(SHAPE)
        self.inner, self.forwards, self.adjoints = MatrixOperator(A, SHAPE), 0, 0

    def forward(self, x):
        self.forwards += 1
        return self.inner(x)

    def adjoint(self, y):
        self.adjoints += 1
        return self.inner.adjoint(y)


def sampler(prior=MIXTURE, operator=None, **settings):
    model = ForwardModel(operator if operator is not None else MatrixOperator(A, SHAPE), GaussianNoise(STD))
    return UCoS(prior, model, denoiser=AnalyticTaskDenoiser(prior, model), dtype=torch.float64, **settings)


def measure(model, prior=MIXTURE):
    generator = torch.Generator().manual_seed(0)
    return model.simulate(prior.sample(1, generator=generator, dtype=torch.float64), generator=generator)[0]


@pytest.mark.parametrize("t", [0.01, 0.7, 6.0])
def test_the_score_is_that_of_the_noised_posterior(t):
    """Against autograd through the density of the joint law of x_t and y, to 1e-6."""
    ucos = sampler()
    y = measure(ucos.forward_model)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    a = math.exp(-t / 2)
    M = torch.cat([a * torch.eye(D, dtype=torch.float64), A])
    noise = torch.cat([torch.full((D,), 1 - a**2), torch.full((3,), STD**2)]).double()
    S = MIXTURE.variance * M @ M.T + torch.diag(noise)
    z = torch.cat([x.flatten(1), y.expand(5, -1)], 1)
    logs = [
        weight + torch.distributions.MultivariateNormal(M @ mean, S).log_prob(z)
        for mean, weight in zip(MIXTURE.means, MIXTURE.log_weights, strict=True)
    ]
    (exact,) = torch.autograd.grad(torch.stack(logs).logsumexp(0).sum(), x)
    back = A.T @ y / STD**2
    score = ucos.score(x.detach(), t, back.reshape(SHAPE))
    assert float((score - exact).abs().max()) < 1e-6 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("kind", ["mixture", "gaussian", "large", "affine"])
def test_draws_are_from_the_posterior(kind, stochastic):
    """Mean within four standard errors of 4,000 draws, and covariance within four of a normal law's, plus 2% for the steps.

    A prior of standard deviation 40 around 100 has the same accuracy: T follows the prior's spread.
    """
    prior, operator = MIXTURE, MatrixOperator(A, SHAPE)
    if kind == "gaussian":
        prior = GaussianPrior(0.5, torch.linspace(0.1, 1, D), SHAPE)
    elif kind == "large":
        prior = GaussianPrior(100.0, 1600.0, SHAPE)
    elif kind == "affine":
        operator = PhysicalUnits(operator, physical_range=(3.0, 7.0))
    ucos = sampler(prior, operator, stochastic=stochastic, steps=100)
    y = measure(ucos.forward_model, prior)
    exact = prior.posterior(ucos.forward_model, y)
    x = ucos.sample(y, chains=4000, seed=0).flat.flatten(1).double()
    variance = exact.covariance.diag()
    assert ((x.mean(0) - exact.mean.flatten()).abs() < (4 / math.sqrt(4000) + 0.02) * variance.sqrt() + 1e-9).all()
    scale = variance[:, None].sqrt() * variance.sqrt()
    assert ((torch.cov(x.T) - exact.covariance).abs() < (4 * math.sqrt(2 / 4000) + 0.02) * scale + 1e-9).all()


def test_the_operator_is_not_called_and_its_adjoint_once():
    operator = Counting()
    ucos = sampler(operator=operator, steps=7)
    y = torch.ones(3, dtype=torch.float64)
    operator.forwards = operator.adjoints = 0
    posterior = ucos.sample(y, chains=5, seed=0, batch_size=2)
    assert (operator.forwards, operator.adjoints) == (0, 1)
    assert posterior.diagnostics["forward_calls"] == 1
    assert "fit" not in posterior.diagnostics
    assert posterior.diagnostics["network_calls"] == 3 * 8
    # a chain's draw does not depend on the others of its batch
    torch.testing.assert_close(ucos.sample(y, chains=5, seed=0).samples, posterior.samples)
    assert not torch.equal(ucos.sample(y, chains=5, seed=1).samples, posterior.samples)


def test_the_start_is_where_the_prior_is_forgotten():
    ucos = sampler()
    assert ucos.horizon == pytest.approx(math.log1p((10 * MIXTURE.spread) ** 2))
    assert math.exp(-ucos.horizon / 2) * MIXTURE.spread == pytest.approx(0.1, rel=0.01)
    assert sampler(horizon=9.0).horizon == pytest.approx(9.0)
    with pytest.raises(ValueError, match="horizon = 2; the prior's spread"):  # the released code's
        sampler(horizon=2.0)
    with pytest.raises(ValueError, match=r"horizon = 0.0"):
        sampler(horizon=0.0)
    with pytest.raises(ValueError, match="steps = 0"):
        sampler(steps=0)


def test_another_task_and_measurements_that_do_not_fit_are_refused():
    ucos = sampler()
    other = ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(2 * STD))
    with pytest.raises(ValueError, match="not the one this denoiser was made for"):
        UCoS(MIXTURE, other, denoiser=ucos.denoiser, dtype=torch.float64)
    elsewhere = GaussianPrior(0.0, 1.0, (1, 3, 2))
    with pytest.raises(ValueError, match=r"denoiser is for images \(1, 2, 3\)"):
        UCoS(elsewhere, ForwardModel(MatrixOperator(A, (1, 3, 2)), GaussianNoise(STD)), denoiser=ucos.denoiser)
    for y, error, match in (
        (torch.zeros(4), ValueError, r"y has shape \(4,\)"),
        (torch.zeros(1, 3), ValueError, "without a batch dimension"),
        (torch.zeros(3, dtype=torch.complex64), TypeError, "complex"),
        (torch.full((3,), float("nan")), ValueError, "3 entries of 3"),
        ([0, 0, 0], TypeError, "y is a list"),
    ):
        with pytest.raises(error, match=match):
            ucos.sample(y, chains=1, seed=0)
