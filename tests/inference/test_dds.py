import itertools
import math

import pytest
import torch

from dpnp_inference import DDSDDIM, DDSDDPM, ChainGenerators
from dpnp_inference.dds import angles, make_dds
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MatrixOperator

D = 4
PRIOR = GaussianMixturePrior(
    torch.tensor([[3.0, 0.0, 0.0, 1.0], [-3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 3.0, -1.0]]),
    torch.tensor([0.5, 0.3, 0.2]),
    0.5,
    (1, 1, D),
)


def identity_model(eta: float) -> ForwardModel:
    return ForwardModel(MatrixOperator(torch.eye(D), (1, 1, D)), GaussianNoise(eta))


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    directions = torch.randn(a.shape[1], 100, generator=torch.Generator().manual_seed(5), dtype=a.dtype)
    directions /= directions.norm(dim=0)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean())


def draw(dds, eta: float, n: int = 6000) -> torch.Tensor:
    z = torch.tensor([0.5, 0.5, 0.8, 0.0], dtype=torch.float64).expand(n, 1, 1, D)
    x, info = dds(PRIOR, z, eta, generator=ChainGenerators(0, range(n)))
    assert info.network_calls == dds.calls
    return x.reshape(n, D)


@pytest.fixture(scope="module")
def exact():
    """Exact draws of p(x_0 | x_0 + η w = z), and the distance of two such sets."""

    def sets(eta: float) -> tuple[torch.Tensor, float]:
        posterior = PRIOR.posterior(identity_model(eta), torch.tensor([0.5, 0.5, 0.8, 0.0], dtype=torch.float64))
        draws = [
            posterior.sample(6000, generator=torch.Generator().manual_seed(s), dtype=torch.float64).reshape(-1, D)
            for s in (1, 2)
        ]
        return draws[0], sliced_wasserstein(*draws)

    return sets


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("dds", "factor"),
    [(DDSDDPM(24), 2.0), (DDSDDIM(20), 2.0), (DDSDDPM(100, order=1), 2.0), (DDSDDIM(60, order=1), 2.0)],
    ids=["ddpm-2", "ddim-2", "ddpm-1", "ddim-1"],
)
def test_law_is_the_exact_denoising_posterior(dds, factor, eta, exact):
    reference, floor = exact(eta)
    assert sliced_wasserstein(draw(dds, eta), reference) < factor * floor


def test_second_order_ddim_needs_fewer_calls(exact):
    reference, floor = exact(1.0)
    first, second = (sliced_wasserstein(draw(DDSDDIM(8, order), 1.0), reference) for order in (1, 2))
    assert second < 1.3 * floor < 1.5 * floor < first


@pytest.mark.parametrize("order", [1, 2])
def test_ddim_converges_at_its_order(order):
    # for N(0, s²) the map v ↦ x is linear, x = μ + (η s/√(η² + s²)) v
    s, eta = 0.7, 1.3
    prior, z = GaussianPrior(0.0, s**2, (1, 1, 1)), torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    v = float(ChainGenerators(0, range(1)).normal_like(z))
    exact = 0.4 * s**2 / (s**2 + eta**2) + eta * s / math.hypot(eta, s) * v

    def error(calls: int) -> float:
        x, _ = DDSDDIM(calls, order, power=1.0)(prior, z, eta, generator=ChainGenerators(0, range(1)))
        return abs(float(x) - exact)

    ratio = error(50) / error(100)
    assert 2**order * 0.8 < ratio < 2**order * 1.25


@pytest.mark.parametrize("dds", [DDSDDPM(8), DDSDDPM(8, 1), DDSDDIM(8), DDSDDIM(8, 1)], ids=repr)
def test_a_chain_does_not_depend_on_its_batch(dds):
    z = torch.randn(5, 1, 1, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, _ = dds(PRIOR, z, 1.0, generator=ChainGenerators(7, range(5)))
    alone, _ = dds(PRIOR, z[3:4], 1.0, generator=ChainGenerators(7, [3]))
    torch.testing.assert_close(alone[0], x[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dds", [DDSDDPM(), DDSDDIM()])
def test_the_denoiser_is_never_asked_beyond_its_range(dds):
    prior = GaussianPrior(0.0, 1.0, (1, 1, 2))
    prior.sigma_min, prior.sigma_max = 0.2, 3.0
    z = torch.zeros(2, 1, 1, 2)
    for eta in (0.2, 0.25, 3.0):
        dds(prior, z, eta, generator=ChainGenerators(0, range(2)))
    with pytest.raises(ValueError, match=r"\[0.2, 3\]"):
        dds(prior, z, 4.0, generator=ChainGenerators(0, range(2)))


def test_angles():
    assert angles(4, 1.0) == pytest.approx([math.pi / 2 * f for f in (1, 0.75, 0.5, 0.25, 0)])
    cut = angles(50, 2.0, 0.1)
    assert math.sin(cut[-2]) == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(cut))
    assert angles(3, 2.0, 1.0) == pytest.approx([math.pi / 2, 0.0])


@pytest.mark.parametrize("make", [DDSDDPM, DDSDDIM])
def test_bad_arguments_are_named(make):
    with pytest.raises(ValueError, match="calls = 0"):
        make(calls=0)
    with pytest.raises(ValueError, match="order = 3"):
        make(order=3)
    with pytest.raises(ValueError, match="power"):
        make(power=0.0)
    with pytest.raises(ValueError, match="ddim"):
        make_dds("euler")
