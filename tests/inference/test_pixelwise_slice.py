"""Slice sampling of every pixel by itself draws the law that quadrature gives, each chain from its own stream."""

import pytest
import torch
from scipy.stats import kstest

from dpnp_inference import Annealing, ChainGenerators, DPnP, PixelwiseSlice
from dpnp_inference.proximal import TemperedForwardModel
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise, LaplaceNoise, Noise, PoissonNoise, StudentTNoise
from dpnp_shared.operators import DitheredQuantisation, HighDynamicRange, Identity, PhysicalUnits, Quantisation

SHAPE = (2, 2, 3)
CHAINS = 2000
MODELS = {
    "levels": lambda: ForwardModel(Quantisation(8), GaussianNoise(0.05)),
    "clipped": lambda: ForwardModel(HighDynamicRange(), GaussianNoise(0.02)),
    "bits": lambda: ForwardModel(DitheredQuantisation(SHAPE, looks=3, dither=0.5), DitheredLogisticNoise(0.1)),
    "laplace": lambda: ForwardModel(Identity(), LaplaceNoise(0.05)),
    "outliers": lambda: ForwardModel(Identity(), StudentTNoise(0.02, dof=2.0)),
    "photons": lambda: ForwardModel(PhysicalUnits(physical_range=(0.0, 50.0)), PoissonNoise()),  # impossible below 0
    "each its own": lambda: ForwardModel(Identity(), GaussianNoise(torch.linspace(0.01, 1, 6).reshape(2, 3))),
}


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
    """Every slice has new streams, and few of a block's 4096 numbers a chain would be used."""
    monkeypatch.setattr("dpnp_inference.randomness.BLOCK", 128)


def problem(name, eta=0.3):
    """A forward model, a measurement, and the centre of the Gaussian."""
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(3)
    truth = 2 * torch.rand(1, *SHAPE, generator=generator, dtype=torch.float64) - 1
    centre = truth + eta * torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    return model, model.simulate(truth, generator=generator)[0], centre


def smallest_p_value(z, model, y, centre, eta):
    """Of Kolmogorov-Smirnov tests of independent draws (n, C, H, W), pixel by pixel, against quadrature."""
    grid = torch.linspace(-6, 6, 40001, dtype=torch.float64)
    x = centre + eta * grid[:, None, None, None]
    log_p = model.pixel_log_likelihood(x, y) - 0.5 * grid[:, None, None, None] ** 2
    density = (log_p - log_p.amax(0)).exp()
    cdf = density.cumsum(0) / density.sum(0)
    values = []
    for c, i, j in torch.ones(SHAPE).nonzero().tolist():
        at = ((z[:, c, i, j] - centre[0, c, i, j]) / eta + 6) / 12 * 40000
        values.append(float(kstest(cdf[at.round().long(), c, i, j].numpy(), "uniform").pvalue))
    return min(values)


def draw(kernel, model, y, centre, eta, draws=1):
    x = centre.expand(CHAINS, -1, -1, -1)
    state, generator = kernel.init(model, y, x), ChainGenerators(0, range(CHAINS))
    for _ in range(draws):
        state, z, info = kernel.step(state, x, eta, generator=generator)
    return z, info


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eta", [pytest.param(0.05, marks=pytest.mark.slow), 0.5])
def test_draws_have_the_law_that_quadrature_gives(name, eta):
    model, y, centre = problem(name, eta)
    z, info = draw(PixelwiseSlice(), model, y, centre, eta, draws=4)
    assert smallest_p_value(z, model, y, centre, eta) > 1e-3 / (2 * len(MODELS) * z[0].numel())
    assert bool(info.non_finite.any()) == (name == "photons")
    assert 1 < info.forward_calls < 500


@pytest.mark.slow
def test_the_test_can_fail():
    for name in ("levels", "photons"):
        model, y, centre = problem(name)
        z, _ = draw(PixelwiseSlice(), model, y, centre, 0.5, draws=4)
        tempered = TemperedForwardModel(model, 0.5)
        assert smallest_p_value(z, tempered, y, centre, 0.5) < 1e-6
        state = PixelwiseSlice().retarget(PixelwiseSlice().init(model, y, centre.expand(CHAINS, -1, -1, -1)), tempered)
        for seed in range(1, 5):
            state, z, _ = PixelwiseSlice().step(
                state, centre.expand(CHAINS, -1, -1, -1), 0.5, generator=ChainGenerators(seed, range(CHAINS))
            )
        assert smallest_p_value(z, tempered, y, centre, 0.5) > 1e-6


def test_a_chain_does_not_depend_on_the_others():
    model, y, centre = problem("levels")
    kernel, eta = PixelwiseSlice(), 0.3
    starts = centre + torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None, None, None]
    state, together, generator = kernel.init(model, y, starts), [], ChainGenerators(5, range(4))
    for _ in range(3):
        state, z, _ = kernel.step(state, starts, eta, generator=generator)
        together.append(z[2])
    alone, generator = kernel.init(model, y, starts[2:3]), ChainGenerators(5, [2])
    for z_together in together:
        alone, z, _ = kernel.step(alone, starts[2:3], eta, generator=generator)
        assert torch.equal(z[0], z_together)
    assert torch.equal(kernel.select(state, torch.tensor([2])).z[0], together[-1])


def test_a_pixel_of_zero_likelihood_finds_its_way():
    model, y, centre = problem("photons")
    below = centre.clone()
    below[0, 0, 0, 0] = -1.5  # a rate of less than none
    x = below.expand(100, -1, -1, -1)
    kernel = PixelwiseSlice(steps=1)
    _, z, _ = kernel.step(kernel.init(model, y, x), x, 0.5, generator=ChainGenerators(0, range(100)))
    assert bool(model.pixel_log_likelihood(z, y).isfinite().all())


def test_a_claim_that_does_not_hold_is_refused():
    class Mean(HighDynamicRange):
        def forward(self, x):
            return x.mean((1, 2, 3))

    model = ForwardModel(Mean(), GaussianNoise(0.1))
    x = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match=r"is pixelwise and gave \(1,\) for images \(1, 2, 2, 3\)"):
        PixelwiseSlice().step(
            PixelwiseSlice().init(model, torch.zeros(()), x), x, 0.1, generator=ChainGenerators(0, range(1))
        )


class Halves(Noise):
    """Uniform noise: y says that the pixel is within a half of it, and nothing else."""

    resolution = 0.5

    def sample(self, clean, generator=None):
        return clean + torch.rand(clean.shape, generator=generator, dtype=clean.dtype) - 0.5

    def entry_log_prob(self, y, clean):
        return torch.where((y - clean).abs() <= 0.5, 0.0, -torch.inf).double()


def test_hard_constraints_give_the_posterior_at_the_last_coupling():
    prior, eta = GaussianPrior(0.0, 1.0, SHAPE), 0.3
    y = torch.tensor([0.0, 0.6, 1.2]).expand(SHAPE).double()
    annealing = Annealing(eta_min=eta, constant=0, decay=6, final=30)
    dpnp = DPnP(prior, ForwardModel(Identity(), Halves()), annealing=annealing, dtype=torch.float64)
    assert isinstance(dpnp.proximal, PixelwiseSlice)
    draws = dpnp.sample(y, chains=CHAINS // 4, seed=0).flat.flatten(0, 2)  # four independent pixels of each y a chain
    x = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    for i, centre in enumerate((0.0, 0.6, 1.2)):
        widened = torch.special.ndtr((x - centre + 0.5) / eta) - torch.special.ndtr((x - centre - 0.5) / eta)
        cdf = (widened * (-0.5 * x**2).exp()).cumsum(0)
        at = ((draws[:, i] + 4) * 1000).round().long()
        assert kstest((cdf / cdf[-1])[at].numpy(), "uniform").pvalue > 1e-4


def test_a_uniform_number_of_zero_does_not_lose_a_pixel(monkeypatch):
    # log 0 is the lowest of thresholds and not a start of zero likelihood: the law is that of the Gaussian along the ellipse
    model, y, centre = problem("laplace")
    x = centre.expand(CHAINS, -1, -1, -1)
    draws = ChainGenerators.uniform_like
    count = iter(range(10**6))
    monkeypatch.setattr(
        ChainGenerators, "uniform_like", lambda self, z: draws(self, z) * (0.0 if next(count) == 0 else 1.0)
    )
    kernel, eta = PixelwiseSlice(steps=1), 0.3
    start = x + 2 * eta
    _, z, _ = kernel.step(kernel.init(model, y, start), x, eta, generator=ChainGenerators(0, range(CHAINS)))
    # z = x + 2η cos θ + ν sin θ, θ uniform: of variance (4 η² + η²)/2 a pixel
    assert float((z - x).square().mean()) == pytest.approx(2.5 * eta**2, rel=0.05)
