import math

import pytest
import torch

from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.preconditioning import VE, ContinuousVP, DiscreteVP, FlowMatching, VPEpsilon, VPrediction
from dpnp_shared.prior import denoise
from dpnp_training import DenoisingScoreMatching, LogNormal, LogUniform, UniformTime
from dpnp_training.losses import NoiseDistribution, UniformFlowTime, squared_error


class Fixed(NoiseDistribution):
    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def sample(self, n, *, generator):
        return torch.full((n,), self.sigma)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        ("edm", lambda s: (s**2 + 0.49) / (0.7 * s) ** 2),
        ("epsilon", lambda s: s**-2),
        ("v", lambda s: 1 + s**-2),
        ("flow", lambda s: ((1 + s) / s) ** 2),
        ("x0", lambda s: 1.0),
    ],
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


def test_a_table_is_drawn_by_its_entries():
    schedule = DiscreteVP(steps=7, beta_start=0.01, beta_end=0.3)
    time = schedule.time(UniformTime(schedule).sample(1000, generator=torch.Generator().manual_seed(0)).double())
    torch.testing.assert_close(time, time.round(), rtol=0, atol=1e-4)
    assert torch.bincount(time.round().long()).tolist() == pytest.approx([1000 / 7] * 7, rel=0.25)


@pytest.mark.parametrize(
    ("distribution", "mean", "std"),
    [
        (UniformFlowTime(), 0.5, 12**-0.5),
        (LogNormal(0.0, 1.0), 0.5, 0.2083),
        (LogNormal(math.log(3), 1.0), 0.7140, 0.1778),
    ],
)
def test_times_of_flow_matching(distribution, mean, std):
    # the moments of the logit-normal distribution have no closed form; theirs are by quadrature
    sigma = distribution.sample(40_000, generator=torch.Generator().manual_seed(0))
    t = sigma / (1 + sigma)
    assert float(t.mean()) == pytest.approx(mean, abs=0.005)
    assert float(t.std()) == pytest.approx(std, abs=0.005)


class Raw(torch.nn.Conv2d):
    """A network that is no denoiser of anything."""

    def forward(self, x, noise):
        self.seen, self.time = x, noise
        self.output = super().forward(x)
        return self.output


@pytest.mark.parametrize(
    ("preconditioning", "weighting", "sees", "learns"),
    [
        (VPEpsilon(), "epsilon", lambda x, w, s: (x + s * w) / (1 + s**2).sqrt(), lambda x, w, s: w),
        (VE(), "epsilon", lambda x, w, s: x + s * w, lambda x, w, s: -w),
        (
            VPrediction(),
            "v",
            lambda x, w, s: (x + s * w) / (1 + s**2).sqrt(),
            lambda x, w, s: (w - s * x) / (1 + s**2).sqrt(),
        ),
        (FlowMatching(), "flow", lambda x, w, s: x / (1 + s) + s / (1 + s) * w, lambda x, w, s: w - x),
    ],
    ids=["epsilon", "score", "v", "flow"],
)
def test_every_weighting_is_the_loss_of_its_own_parametrisation(preconditioning, weighting, sees, learns):
    """As each paper writes it, on the network's raw output: value and gradient."""
    torch.manual_seed(0)
    network = Raw(3, 3, 3, padding=1).double()
    x_0, sigma = torch.randn(4, 3, 5, 6).double(), torch.tensor([0.05, 0.4, 3.0, 40.0]).double()
    w = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = squared_error(
        lambda x, s: denoise(network, preconditioning, x, s), x_0, sigma, generator=torch.Generator().manual_seed(1)
    )
    ours = (DenoisingScoreMatching(weighting=weighting).weight(sigma) * error).mean()
    level = sigma.reshape(4, 1, 1, 1)
    torch.testing.assert_close(network.seen, sees(x_0, w, level))
    theirs = (network.output - learns(x_0, w, level)).square().mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, network.weight, retain_graph=True), torch.autograd.grad(theirs, network.weight)
    )


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
        (lambda: UniformFlowTime(high=1.0), "high"),
        (lambda: DenoisingScoreMatching(weighting="best"), "edm, epsilon, v, flow, x0"),
        (lambda: DenoisingScoreMatching(sigma_data=0), "sigma_data"),
    ],
)
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
