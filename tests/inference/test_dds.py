import itertools
import math

import pytest
import torch

from dpnp_inference import DDSDDIM, DDSDDPM, ChainGenerators
from dpnp_inference.dds import angles, make_dds
from dpnp_inference.metrics import sliced_wasserstein
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MatrixOperator

D, N = 4, 4000
PRIOR = GaussianMixturePrior(
    torch.tensor([[3.0, 0.0, 0.0, 1.0], [-3.0, 1.0, 0.0, 0.0], [0.0, 2.0, 3.0, -1.0]]),
    torch.tensor([0.5, 0.3, 0.2]),
    0.5,
    (1, 1, D),
)
Z = torch.tensor([0.5, 0.5, 0.8, 0.0], dtype=torch.float64)
SOLVERS = [(make, solver) for make in (DDSDDPM, DDSDDIM) for solver in make.solvers]
IDS = [f"{make.__name__}-{solver}" for make, solver in SOLVERS]


def identity_model(eta: float) -> ForwardModel:
    return ForwardModel(MatrixOperator(torch.eye(D), (1, 1, D)), GaussianNoise(eta))


def draw(dds, eta: float, seed: int = 0) -> torch.Tensor:
    x, info = dds(PRIOR, Z.expand(N, 1, 1, D), eta, generator=ChainGenerators(seed, range(N)))
    assert info.network_calls <= dds.calls_for(PRIOR, eta)
    return x.reshape(N, D)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return sliced_wasserstein(a, b, projections=100)


@pytest.fixture(scope="module")
def exact():
    """Exact draws of p(x_0 | x_0 + η w = z), and the distance of two such sets: mean over three pairs."""

    def sets(eta: float) -> tuple[torch.Tensor, float]:
        posterior = PRIOR.posterior(identity_model(eta), Z)
        reference, *others = (
            posterior.sample(N, generator=torch.Generator().manual_seed(s), dtype=torch.float64).reshape(-1, D)
            for s in range(1, 5)
        )
        return reference, sum(distance(other, reference) for other in others) / 3

    return sets


@pytest.mark.parametrize("eta", [pytest.param(0.5, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize(("make", "solver"), SOLVERS, ids=IDS)
def test_law_is_the_exact_denoising_posterior(make, solver, eta, exact):
    calls = {"adams-bashforth": 24, "heun": 60}.get(solver, 100)
    reference, floor = exact(eta)
    assert distance(draw(make(calls, solver), eta), reference) < 2 * floor


@pytest.mark.parametrize("make", [DDSDDPM, DDSDDIM])
def test_law_is_exact_in_narrow_and_in_wide_directions(make):
    # the prior's standard deviation from a hundredth of η to a hundred times η: noise must go in narrow directions and stay in wide ones
    s = torch.logspace(-2, 2, 9, dtype=torch.float64)
    prior, eta = GaussianPrior(torch.zeros(1, 1, 9), s**2, (1, 1, 9)), 1.0
    x, _ = make(16)(prior, torch.zeros(N, 1, 1, 9, dtype=torch.float64), eta, generator=ChainGenerators(0, range(N)))
    expected = eta * s / (s**2 + eta**2).sqrt()
    assert (x.flatten(1).std(0) - expected).abs().max() < 0.05 * eta


@pytest.mark.parametrize(
    ("make", "solver"), [(DDSDDPM, "heun"), (DDSDDPM, "adams-bashforth"), (DDSDDIM, "adams-bashforth")]
)
def test_second_order_is_closer_than_the_papers_solver(make, solver, exact):
    reference, floor = exact(1.0)
    first, second = (distance(draw(make(12, name), 1.0), reference) for name in ("euler", solver))
    assert second < 0.7 * first
    assert second < 3 * floor


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0, 8.0])
@pytest.mark.parametrize("make", [DDSDDPM, DDSDDIM])
def test_default_number_of_calls_is_accurate_and_grows_with_eta(make, eta, exact):
    dds = make()
    reference, floor = exact(eta)
    assert distance(draw(dds, eta), reference) < 3 * floor
    calls = [dds.calls_for(PRIOR, level) for level in (0.01, 0.1, 0.5, 2.0, 8.0, 800.0)]
    assert calls == sorted(calls)
    assert calls[0] < {DDSDDPM: 10, DDSDDIM: 8}[make] < calls[-1] <= 20


@pytest.mark.parametrize("eta", [0.1, 0.5, 2.0])
def test_a_tolerance_is_kept_and_saves_calls(eta):
    z = Z.expand(200, 1, 1, D)

    def ends(dds):
        return dds(PRIOR, z, eta, generator=ChainGenerators(0, range(200)))[0].reshape(200, D)

    reference = ends(DDSDDIM(calls=200))
    std = reference.var(0).sum().sqrt()
    calls = []
    for tolerance in (0.2, 0.1, 0.05, 0.01):
        dds = DDSDDIM(tolerance=tolerance)
        assert (ends(dds) - reference).square().sum(1).mean().sqrt() < 1.6 * tolerance * std
        calls.append(dds.calls_for(PRIOR, eta))
    assert calls == sorted(calls)
    assert 2 * calls[0] < calls[2] + 2 < calls[3]
    assert calls[2] == DDSDDIM().calls_for(PRIOR, eta)


@pytest.mark.parametrize("make", [DDSDDPM, DDSDDIM])
@pytest.mark.parametrize("scale", [0.03, 50.0])
def test_default_does_not_depend_on_the_units(make, scale):
    prior = GaussianMixturePrior(scale * PRIOR.means, PRIOR.log_weights.exp(), scale**2 * 0.5, (1, 1, D))
    assert make().calls_for(prior, scale * 1.5) == make().calls_for(PRIOR, 1.5)
    z = Z.expand(3, 1, 1, D)
    x, _ = make()(PRIOR, z, 1.5, generator=ChainGenerators(0, range(3)))
    scaled, _ = make()(prior, scale * z, scale * 1.5, generator=ChainGenerators(0, range(3)))
    torch.testing.assert_close(scaled / scale, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("adams-bashforth", 2)])
def test_ddim_converges_at_its_order(solver, order):
    # for N(0, s²) the map v ↦ x is linear, x = μ + (η s/√(η² + s²)) v
    s, eta = 0.7, 1.3
    prior, z = GaussianPrior(0.0, s**2, (1, 1, 1)), torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    v = float(ChainGenerators(0, range(1)).normal_like(z))
    exact = 0.4 * s**2 / (s**2 + eta**2) + eta * s / math.hypot(eta, s) * v

    def error(calls: int) -> float:
        x, _ = DDSDDIM(calls, solver, power=1.0)(prior, z, eta, generator=ChainGenerators(0, range(1)))
        return abs(float(x) - exact)

    ratio = error(101) / error(201)
    assert 2**order * 0.8 < ratio < 2**order * 1.25


def test_dpm_solver_is_exact_for_a_point_and_converges_otherwise():
    z = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)

    def end(variance: float, calls: int) -> float:
        prior = GaussianPrior(0.0, variance, (1, 1, 1))
        return float(DDSDDIM(calls, "dpm++2m")(prior, z, 1.3, generator=ChainGenerators(0, range(1)))[0])

    assert end(0.0, 3) == pytest.approx(0.0, abs=1e-12)
    v = float(ChainGenerators(0, range(1)).normal_like(z))
    exact = 0.4 * 0.49 / (0.49 + 1.69) + 1.3 * 0.7 / math.hypot(1.3, 0.7) * v
    coarse, fine = abs(end(0.49, 100) - exact), abs(end(0.49, 200) - exact)
    assert fine < 0.6 * coarse
    assert fine < 2e-3


@pytest.mark.parametrize("calls", [1, 2, 7, 8])
@pytest.mark.parametrize(("make", "solver"), SOLVERS, ids=IDS)
def test_network_calls_are_counted_and_bounded(make, solver, calls):
    class Counting(GaussianPrior):
        count = 0

        def forward(self, x, sigma):
            self.count += 1
            return super().forward(x, sigma)

    prior = Counting(0.0, 1.0, (1, 1, 2))
    x, info = make(calls, solver)(prior, torch.zeros(2, 1, 1, 2), 1.0, generator=ChainGenerators(0, range(2)))
    assert torch.isfinite(x).all()
    assert prior.count == info.network_calls <= calls
    assert info.network_calls == (calls if solver != "heun" or calls % 2 else calls - 1)


@pytest.mark.parametrize(("make", "solver"), SOLVERS, ids=IDS)
def test_a_chain_does_not_depend_on_its_batch(make, solver):
    z = torch.randn(5, 1, 1, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dds = make(8, solver)
    x, _ = dds(PRIOR, z, 1.0, generator=ChainGenerators(7, range(5)))
    alone, _ = dds(PRIOR, z[3:4], 1.0, generator=ChainGenerators(7, [3]))
    torch.testing.assert_close(alone[0], x[3], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("make", "solver"), SOLVERS, ids=IDS)
def test_the_denoiser_is_never_asked_beyond_its_range(make, solver):
    prior = GaussianPrior(0.0, 1.0, (1, 1, 2))  # refuses levels outside of these
    prior.sigma_min, prior.sigma_max = 0.2, 3.0
    z = torch.zeros(2, 1, 1, 2)
    for eta, calls in itertools.product((0.2, 0.25, 3.0), ("auto", 30)):
        dds = make(calls, solver)
        _, info = dds(prior, z, eta, generator=ChainGenerators(0, range(2)))
        assert info.network_calls <= dds.calls_for(prior, eta)
    with pytest.raises(ValueError, match=r"\[0.2, 3\]"):
        make(solver=solver)(prior, z, 4.0, generator=ChainGenerators(0, range(2)))


def test_angles():
    assert angles(4, 1.0) == pytest.approx([math.pi / 2 * f for f in (1, 0.75, 0.5, 0.25, 0)])
    cut = angles(50, 2.0, 0.1)
    assert math.sin(cut[-2]) == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(cut))
    assert angles(3, 2.0, 1.0) == pytest.approx([math.pi / 2, 0.0])


@pytest.mark.parametrize("make", [DDSDDPM, DDSDDIM])
def test_bad_arguments_are_named(make):
    for calls in (0, "many", 2.5):
        with pytest.raises(ValueError, match=f"calls = {calls!r}"):
            make(calls=calls)
    with pytest.raises(ValueError, match=r"solver = 'rk45'; .* euler, heun, adams-bashforth, .*sde-dpm\+\+2m"):
        make(solver="rk45")
    with pytest.raises(ValueError, match="power"):
        make(power=0.0)
    with pytest.raises(ValueError, match="tolerance = 0"):
        make(tolerance=0.0)
    with pytest.raises(ValueError, match="ddim"):
        make_dds("euler")


def test_a_flow_without_noise_from_z_is_refused():
    with pytest.raises(ValueError, match=r"solver = 'dpm\+\+2m'"):
        DDSDDPM(solver="dpm++2m")
