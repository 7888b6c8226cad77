import math

import pytest
import torch

from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.preconditioning import VE, ContinuousVP, DiscreteVP, FlowMatching, VPEpsilon, VPrediction
from dpnp_shared.prior import denoise
from dpnp_training import DenoisingScoreMatching, LogNormal, LogUniform, UniformTime
from dpnp_training.losses import AdaptiveBands, NoiseDistribution, UniformFlowTime, squared_error


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
    error = squared_error(lambda x, s: denoise(network, preconditioning, x, s), x_0, sigma, w)
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
    w = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    error = squared_error(lambda x, sigma: x, x_0, torch.tensor([0.1, 1.0, 10.0]), w)
    torch.testing.assert_close(error, torch.tensor([0.01, 1.0, 100.0]), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "distribution",
    [LogNormal(-0.5, 0.7), LogUniform(0.1, 10.0), UniformFlowTime(0.1, 0.8)],
    ids=lambda d: type(d).__name__,
)
def test_densities_are_those_of_the_draws(distribution):
    drawn = distribution.sample(40_000, generator=torch.Generator().manual_seed(0)).log()
    edges = torch.linspace(-3, 3, 13)
    fine = torch.linspace(-3, 3, 12 * 500 + 1)
    middles = (fine[1:] + fine[:-1]) / 2
    expected = distribution.density(middles.exp()).view(12, 500).mean(1) * 0.5
    found = torch.histogram(drawn, edges).hist / len(drawn)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * (0.25 / 40_000) ** 0.5)


def peaked(sigma):
    """A loss that is large around σ = 0.5."""
    return 0.1 + 20 * torch.exp(-8 * (sigma / 0.5).log() ** 2)


def test_adaptive_levels_follow_the_loss_and_keep_the_objective():
    target = LogNormal(-1.2, 1.2)
    noise = AdaptiveBands(target, low=1e-4, high=1e3, bands=64, half_life=300.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        sigma = noise.sample(256, generator=generator)
        assert 1e-4 <= float(sigma.min()) < float(sigma.max()) <= 1e3
        noise.observe(sigma, peaked(sigma))
    sigma, plain = noise.sample(100_000, generator=generator), target.sample(100_000, generator=generator)
    weighted = noise.importance(sigma) * peaked(sigma)
    assert float(weighted.mean()) == pytest.approx(float(peaked(plain).mean()), rel=0.02)
    assert float(noise.importance(sigma).mean()) == pytest.approx(1.0, abs=0.02)
    assert float(noise.importance(sigma).max()) < 1.5 / noise.floor
    assert float(weighted.std()) < 0.4 * float(peaked(plain).std())
    near = ((sigma / 0.5).log().abs() < 0.5).float().mean()
    assert float(near) > 1.5 * float(((plain / 0.5).log().abs() < 0.5).float().mean())


def test_a_new_adaptive_distribution_is_its_target():
    noise = AdaptiveBands(UniformFlowTime(0.2, 0.7), low=0.01, high=100.0, bands=8)
    assert float(noise.probabilities().sum()) == pytest.approx(1.0)
    sigma = noise.sample(50_000, generator=torch.Generator().manual_seed(0))
    weight = noise.importance(sigma)
    t = sigma / (1 + sigma)
    # bands reach over the ends of the target: what is drawn there counts for nothing
    assert torch.equal(weight > 0, (t > 0.2) & (t < 0.7))
    assert float((weight * t).mean()) == pytest.approx(0.45, abs=0.01)
    assert float(weight.mean()) == pytest.approx(1.0, abs=0.02)


def test_the_adaptive_state_is_kept_and_undamaged():
    loss = DenoisingScoreMatching(AdaptiveBands(bands=8, half_life=4.0))
    x_0, generator = torch.ones(64, 1, 4, 4), torch.Generator().manual_seed(0)
    start = loss.noise.probabilities()
    loss.eval()(lambda x, sigma: 0 * x, x_0, generator=generator)
    assert torch.equal(loss.noise.probabilities(), start)  # nothing is learned from evaluation
    loss.train()(lambda x, sigma: 0 * x, x_0, generator=generator)
    state = loss.noise.probabilities()
    assert not torch.equal(state, start)
    loss.noise.observe(torch.tensor([0.5, 0.5]), torch.tensor([math.nan, math.inf]))
    assert torch.equal(loss.noise.probabilities(), state)
    loss.bfloat16()
    assert torch.equal(loss.noise.probabilities(), state)

    twin = DenoisingScoreMatching(AdaptiveBands(bands=8))
    twin.load_state_dict(loss.state_dict())
    assert torch.equal(twin.noise.probabilities(), state)
    draws = [n.sample(5, generator=torch.Generator().manual_seed(1)) for n in (loss.noise, twin.noise)]
    assert torch.equal(*draws)
    with pytest.raises(ValueError, match="has 8 bands, this one 9"):
        DenoisingScoreMatching(AdaptiveBands(bands=9)).load_state_dict(loss.state_dict())


RANK = """
import torch
import torch.distributed as dist
from dpnp_training.losses import AdaptiveBands

sigma = torch.logspace(-2, 1, 24)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
noise = AdaptiveBands(bands=6, half_life=3.0)
mine = sigma[rank::2]
noise.observe(mine, 1 + mine**2)
torch.save(noise.get_extra_state(), f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_the_adaptive_state_is_that_of_all_processes(tmp_path, fork_server):
    processes = [
        fork_server.Process(target=exec, args=(RANK, {"folder": str(tmp_path), "rank": rank})) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*ranks)
    alone, sigma = AdaptiveBands(bands=6, half_life=3.0), torch.logspace(-2, 1, 24)
    alone.observe(sigma, 1 + sigma**2)
    torch.testing.assert_close(ranks[0], alone.get_extra_state())


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: LogNormal(std=0), "std"),
        (lambda: LogUniform(1.0, math.inf), "high"),
        (lambda: UniformFlowTime(high=1.0), "high"),
        (lambda: AdaptiveBands(low=1.0, high=0.5), "low"),
        (lambda: AdaptiveBands(LogUniform(0.1, 1.0), low=2.0, high=3.0), "LogUniform has no mass"),
        (lambda: AdaptiveBands(bands=0), "bands"),
        (lambda: AdaptiveBands(half_life=0.0), "half_life"),
        (lambda: AdaptiveBands(floor=0.0), "floor"),
        (lambda: DenoisingScoreMatching(weighting="best"), "edm, epsilon, v, flow, x0"),
        (lambda: DenoisingScoreMatching(sigma_data=0), "sigma_data"),
    ],
)
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
