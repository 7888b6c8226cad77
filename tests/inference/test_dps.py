import math

import pytest
import torch

from dpnp_inference.baselines import DPS
from dpnp_inference.baselines.dps import alpha_bars, noise_level
from dpnp_inference.dpnp import SamplingError
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise
from dpnp_shared.operators import DitheredQuantisation, MatrixOperator, Operator, PhaseRetrieval
from dpnp_shared.prior import Prior

SHAPE = (1, 1, 3)
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.6, -0.8]], dtype=torch.float64)
Y = torch.tensor([0.9, -0.3], dtype=torch.float64)
MIXTURE = GaussianMixturePrior(
    torch.tensor([[2.0, -1.0, 1.0], [-2.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([0.3, 0.7]), 0.15, SHAPE
)


def model(sigma: float = 0.5) -> ForwardModel:
    return ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(sigma))


def test_the_schedule_is_the_published_one():
    levels = alpha_bars(1000)
    assert len(levels) == 1000
    assert levels[-1] == pytest.approx(1 - 1e-4)
    assert levels[0] == pytest.approx(4.036e-5, rel=1e-3)  # Ho et al. 2020
    assert noise_level(levels[0]) == pytest.approx(157.4, rel=1e-3)
    assert alpha_bars(10)[0] == levels[0]
    assert alpha_bars(10)[-1] == levels[-1]
    assert alpha_bars(1) == levels[:1]


def test_without_the_measurement_it_samples_the_prior():
    n = 4000
    x = DPS(MIXTURE, model(), zeta=0, dtype=torch.float64).sample(Y, chains=n, seed=0).flat.reshape(n, 3)
    right = x[:, 0] > 0  # the modes are 10 standard deviations apart
    assert float(right.double().mean()) == pytest.approx(0.3, abs=4.5 * math.sqrt(0.21 / n))
    for mode, mean in ((right, MIXTURE.means[0]), (~right, MIXTURE.means[1])):
        inside = x[mode]
        assert bool(((inside.mean(0) - mean).abs() < 4.5 * math.sqrt(0.15 / len(inside)) + 0.01).all())
        # the relative error of a variance is sqrt(2/n); 1000 ancestral steps lose 1 to 2% of it themselves
        assert bool(((inside.var(0) / 0.15 - 1).abs() < 4.5 * math.sqrt(2 / len(inside)) + 0.03).all())


def test_one_step_is_the_papers_formula():
    zeta, prior = 0.2, GaussianPrior(1.0, 100.0**2, SHAPE)  # as wide as the noise of that step
    x = DPS(prior, model(), steps=1, zeta=zeta, dtype=torch.float64).sample(Y, chains=5, seed=3).flat
    x_1 = ChainGenerators(3, range(5)).normal_like(torch.zeros(5, *SHAPE, dtype=torch.float64)).requires_grad_(True)
    alpha_bar = alpha_bars(1)[0]
    x_0 = prior(x_1 / math.sqrt(alpha_bar), noise_level(alpha_bar))
    square = (Y - x_0.flatten(1) @ A.T).square().sum(1)
    (gradient,) = torch.autograd.grad(square.sum(), x_1)
    step = zeta / square.detach().sqrt().reshape(-1, 1, 1, 1) * gradient
    assert float(step.abs().max()) > 1.0
    torch.testing.assert_close(x, x_0.detach() - step)


def test_the_step_of_isotropic_noise_does_not_depend_on_its_size():
    a, b = (
        DPS(MIXTURE, model(s), steps=20, dtype=torch.float64).sample(Y, chains=4, seed=0).samples for s in (0.1, 3.0)
    )
    torch.testing.assert_close(a, b)


def test_draws_agree_with_a_measurement_that_determines_the_image():
    y = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    full = ForwardModel(MatrixOperator(torch.eye(3, dtype=torch.float64), SHAPE), GaussianNoise(0.05))
    prior = GaussianPrior(0.0, 1.0, SHAPE)
    posterior = DPS(prior, full, zeta=0.05, dtype=torch.float64).sample(y, chains=200, seed=0)
    error = posterior.flat.reshape(-1, 3) - y
    # a step has the length 2 ζ = 0.1 whatever the residual, so that draws end this far from y and not at the noise
    assert float(error.norm(dim=1).max()) < 0.25
    assert float(error.mean(0).abs().max()) < 0.03
    prior_only = DPS(prior, full, zeta=0, dtype=torch.float64).sample(y, chains=200, seed=0)
    assert float((prior_only.flat.reshape(-1, 3) - y).norm(dim=1).mean()) > 1.0


def test_a_chain_depends_on_its_seed_and_index_only():
    sampler = DPS(MIXTURE, model(), steps=50, dtype=torch.float64)
    together = sampler.sample(Y, chains=7, seed=1).samples
    assert together.shape == (7, 1, *SHAPE)
    torch.testing.assert_close(sampler.sample(Y, chains=7, seed=1, batch_size=3).samples, together, rtol=0, atol=1e-9)
    torch.testing.assert_close(sampler.sample(Y, chains=4, seed=1).samples, together[:4], rtol=0, atol=1e-9)
    assert not torch.allclose(sampler.sample(Y, chains=7, seed=2).samples, together)


@pytest.mark.parametrize(
    "forward_model",
    [
        ForwardModel(PhaseRetrieval((1, 8, 8), oversampling=2.0), GaussianNoise(0.05)),
        ForwardModel(DitheredQuantisation((1, 8, 8), looks=2, dither=0.5), DitheredLogisticNoise(0.2)),
        ForwardModel(lambda x: torch.fft.fft2(x), GaussianNoise(0.3)),
    ],
    ids=["phase", "bits", "complex"],
)
def test_any_differentiable_model_pulls_towards_its_measurement(forward_model):
    prior = GaussianPrior(0.0, 0.25, (1, 8, 8))
    truth = prior.sample(1, generator=torch.Generator().manual_seed(0))
    y = forward_model.simulate(truth, generator=torch.Generator().manual_seed(1))[0]

    def fit(zeta: float) -> float:
        posterior = DPS(prior, forward_model, steps=200, zeta=zeta).sample(y, chains=8, seed=0)
        assert posterior.samples.dtype == torch.float32
        return float(forward_model.log_likelihood(posterior.flat, y).mean())

    assert fit(0.15) > fit(0.0) + 10


def test_diagnostics_say_what_was_done():
    seen = []
    posterior = DPS(MIXTURE, model(), steps=10).sample(Y, chains=5, seed=0, batch_size=3, on_sweep=seen.append)
    record = posterior.diagnostics
    assert record["network_calls"] == record["network_gradients"] == 20
    assert record["batches"] == 2
    assert record["zeta"] == 0.15
    assert [s.iteration for s in seen] == [*range(1, 11), *range(1, 11)]
    assert seen[0].eta == record["schedule"][0] > seen[1].eta
    assert posterior.diagnostics["convergence"] is None


def test_noise_levels_stay_within_the_priors_range():
    prior = Prior.from_pretrained("fashion_mnist")
    forward_model = ForwardModel(PhaseRetrieval((1, 28, 28), oversampling=2.0), GaussianNoise(0.05))
    levels = [noise_level(a) for a in DPS(prior, forward_model).alpha_bars]
    assert max(levels) <= prior.sigma_max
    assert min(levels) >= prior.sigma_min
    assert len(levels) > 900


def test_bad_arguments_are_named():
    class Black(Operator):
        differentiable = False

        def forward(self, x):
            return x.round()

    for arguments, words in [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 1001}, "1 to 1000"),
        ({"zeta": -0.1}, "zeta = -0.1"),
        ({"zeta": math.nan}, "zeta = nan"),
    ]:
        with pytest.raises(ValueError, match=words):
            DPS(MIXTURE, model(), **arguments)
    with pytest.raises(TypeError, match=r"of Black and \w+ one says it is not"):
        DPS(MIXTURE, ForwardModel(Black(), GaussianNoise(1.0)))
    narrow = GaussianPrior(0.0, 1.0, SHAPE)
    narrow.sigma_min, narrow.sigma_max = 0.001, 0.002
    with pytest.raises(ValueError, match="none of their noise levels"):
        DPS(narrow, model())
    sampler = DPS(MIXTURE, model(), steps=2)
    for arguments, words in [
        ({"chains": 0, "seed": 0}, "chains = 0"),
        ({"chains": 1, "seed": -1}, "seed = -1"),
        ({"chains": 1, "seed": 0, "batch_size": 0}, "batch_size = 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            sampler.sample(Y, **arguments)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        sampler.sample(torch.zeros(3), chains=1, seed=0)


def test_a_chain_that_diverges_is_an_error():
    steep = ForwardModel(lambda x: (50 * x.flatten(1)).exp(), GaussianNoise(1.0))
    with pytest.raises(SamplingError, match=r"chains .* no longer finite"):
        DPS(GaussianPrior(0.0, 100.0, SHAPE), steep, steps=50, zeta=10.0).sample(torch.ones(3), chains=3, seed=0)
