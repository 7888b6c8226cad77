import math

import pytest
import torch

from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.preconditioning import ContinuousVP, DiscreteVP
from dpnp_training import DenoisingScoreMatching, LogNormal, LogUniform, UniformTime
from dpnp_training.losses import NoiseDistribution, squared_error


class Fixed(NoiseDistribution):
    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def sample(self, n, *, generator):
        return torch.full((n,), self.sigma)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(
    ("weighting", "weight"),
    [("edm", lambda s: (s**2 + 0.49) / (0.7 * s) ** 2), ("epsilon", lambda s: s**-2), ("x0", lambda s: 1.0)],
)
def test_the_best_denoiser_has_the_known_loss(sigma, weighting, weight):
    # for N(0, s²) the smallest mean squared error is s² σ²/(s² + σ²)
    s, generator = 0.8, torch.Generator().manual_seed(0)
    x_0 = s * torch.randn(4000, 1, 2, 2, generator=generator)
    loss = DenoisingScoreMatching(Fixed(sigma), weighting, sigma_data=0.7)
    found = loss(GaussianPrior(0.0, s**2, (1, 2, 2)), x_0, generator=generator)
    assert float(found) == pytest.approx(weight(sigma) * (s * sigma) ** 2 / (s**2 + sigma**2), rel=0.04)
    worse = loss(lambda x, sigma: 0.5 * x, x_0, generator=generator)
    assert float(worse) > float(found)


def test_noise_distributions():
    generator = torch.Generator().manual_seed(0)
    log = LogNormal(-0.5, 0.7).sample(20_000, generator=generator).log()
    assert float(log.mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(log.std()) == pytest.approx(0.7, abs=0.02)
    uniform = LogUniform(0.1, 10.0).sample(20_000, generator=generator)
    assert 0.1 <= float(uniform.min()) < 0.101 < 9.9 < float(uniform.max()) <= 10.0
    assert float((uniform < 1).float().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("schedule", [DiscreteVP(), ContinuousVP()], ids=["discrete", "continuous"])
def test_uniform_time_is_uniform_in_time(schedule):
    sigma = UniformTime(schedule).sample(20_000, generator=torch.Generator().manual_seed(0))
    time = schedule.time(sigma.double()) / 999
    for q in (0.1, 0.5, 0.9):
        assert float(time.quantile(q)) == pytest.approx(q, abs=0.02)


def test_each_image_gets_its_own_level():
    x_0 = torch.zeros(3, 1, 50, 50)
    error = squared_error(
        lambda x, sigma: x, x_0, torch.tensor([0.1, 1.0, 10.0]), generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(error, torch.tensor([0.01, 1.0, 100.0]), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LogNormal(std=0), "std"),
        (lambda: LogUniform(1.0, math.inf), "high"),
        (lambda: DenoisingScoreMatching(weighting="best"), "edm, epsilon, x0"),
        (lambda: DenoisingScoreMatching(sigma_data=0), "sigma_data"),
    ],
)
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
