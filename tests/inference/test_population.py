import math

import pytest
import torch

from dpnp_inference import (
    DDSDDIM,
    Annealing,
    ClosedForm,
    DPnP,
    EllipticalSlice,
    PerturbAndSolve,
    Population,
    Posterior,
    ReplicaExchange,
    SamplingError,
)
from dpnp_inference.metrics import sliced_wasserstein
from dpnp_inference.population import conditional_ess, ess, systematic_resampling
from dpnp_inference.proximal import TemperedForwardModel
from dpnp_inference.targets import JointTargets, LanczosTargets, SpectralTargets, choose_targets
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import GaussianBlur, LinearOperator, MatrixOperator, Operator, RandomInpainting

SHAPE = (1, 1, 2)
# four modes far apart, of unequal weights; the measurement of the first coordinate leaves two of them
FAR = GaussianMixturePrior(
    torch.tensor([[8.0, 8.0], [8.0, -8.0], [-8.0, 8.0], [-8.0, -8.0]]),
    torch.tensor([0.1, 0.3, 0.2, 0.4]),
    1.0,
    SHAPE,
)
FIRST = ForwardModel(MatrixOperator(torch.tensor([[1.0, 0.1]]), SHAPE), GaussianNoise(0.5))
Y = torch.tensor([7.5])


class Absolute(Operator):
    """``|A x|``, seen as a black box."""

    differentiable = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return torch.stack([x[:, 0].abs(), (x[:, 0] * x[:, 1]).abs().sqrt()], dim=1)


def quadrature(prior, model, y, draws: int, extent: float = 13.0, n: int = 1000):
    """Draws (draws, 2) from a two-dimensional posterior on a grid, and its log evidence."""
    axis = torch.linspace(-extent, extent, n, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).reshape(-1, *SHAPE)
    log_p = prior.log_prob(grid) + model.log_likelihood(grid, y.double())
    cell = (2 * extent / (n - 1)) ** 2
    index = torch.multinomial(log_p.softmax(0), draws, replacement=True, generator=torch.Generator().manual_seed(0))
    jitter = (torch.rand(draws, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) * cell**0.5
    return grid[index].flatten(1) + jitter, float(log_p.logsumexp(0)) + math.log(cell)


def upper(x: torch.Tensor) -> float:
    """Weight of the modes with a positive second coordinate."""
    return float((x.flatten(1)[:, 1] > 0).double().mean())


def exact_upper() -> float:
    posterior = FAR.posterior(FIRST, Y)
    return float(posterior.weights[[0, 2]].sum())


def test_population_gives_separated_modes_their_weights_and_the_evidence():
    posterior = DPnP(FAR, FIRST, population=True).sample(Y, chains=1000, seed=0)
    exact = FAR.posterior(FIRST, Y)
    p = exact_upper()
    # 1,000 independent draws have a standard error of 0.014; single chains end with 0.5 where 0.25 is right
    assert upper(posterior.flat) == pytest.approx(p, abs=0.06)
    assert posterior.log_evidence == pytest.approx(exact.log_evidence, abs=0.25)
    assert 0 < posterior.log_evidence_se < 0.25
    reference = [exact.sample(1000, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    assert sliced_wasserstein(posterior.flat, reference[0]) < 0.2 + 2 * sliced_wasserstein(*reference)


def test_single_chains_do_not():
    posterior = DPnP(FAR, FIRST).sample(Y, chains=1000, seed=0)
    assert abs(upper(posterior.flat) - exact_upper()) > 0.06
    assert posterior.log_evidence is None
    assert posterior.log_evidence_se is None


def test_any_linear_gaussian_model_without_a_spectrum():
    class Projection(LinearOperator):
        def forward(self, x):
            return (x.flatten(1) * torch.tensor([1.0, 0.1], dtype=x.dtype)).sum(1, keepdim=True)

    model = ForwardModel(Projection(SHAPE), GaussianNoise(0.5))
    sampler = DPnP(FAR, model, population=Population(populations=1))
    assert isinstance(sampler.proximal, PerturbAndSolve)
    posterior = sampler.sample(Y, chains=600, seed=0)
    assert upper(posterior.flat) == pytest.approx(exact_upper(), abs=0.08)
    assert posterior.log_evidence == pytest.approx(FAR.posterior(FIRST, Y).log_evidence, abs=0.3)
    assert posterior.log_evidence_se is None


@pytest.mark.slow
def test_a_nonlinear_black_box_with_a_twofold_ambiguity_against_quadrature():
    prior = GaussianMixturePrior(
        torch.tensor([[3.0, 3.0], [3.0, -2.5], [-3.0, 2.5], [-2.5, -3.0]]),
        torch.tensor([0.1, 0.3, 0.2, 0.4]),
        0.4,
        SHAPE,
    )
    model = ForwardModel(Absolute(), GaussianNoise(0.3))
    y = torch.tensor([2.8, 2.7])
    sampler = DPnP(prior, model, population=True)
    assert isinstance(sampler.proximal, EllipticalSlice)
    posterior = sampler.sample(y, chains=1000, seed=0)
    exact, log_evidence = quadrature(prior, model, y, 2000, extent=8.0)
    distance = sliced_wasserstein(posterior.flat.double().flatten(1), exact[:1000])
    # all four quadrants are modes, 6 apart
    assert distance < 0.08 + 1.5 * sliced_wasserstein(exact[:1000], exact[1000:])
    assert posterior.log_evidence == pytest.approx(log_evidence, abs=0.3)
    powers = [level["power"] for level in posterior.diagnostics["populations"][0]["levels"]]
    assert powers == sorted(powers)
    assert powers[0] < 1
    assert posterior.diagnostics["populations"][0]["bias"] == "none: corrected by weights"


def test_bias_of_the_last_coupling_is_removed_by_weights():
    prior = GaussianPrior(0.0, 1.0, SHAPE)
    model = ForwardModel(MatrixOperator(torch.eye(2), SHAPE), GaussianNoise(0.5))
    y = torch.tensor([1.0, -0.5])
    settings = {"proximal": ClosedForm(exact_splitting=False), "annealing": Annealing(eta_min=0.4)}
    exact = prior.posterior(model, y)
    for correct, target in ((True, exact), (False, prior.posterior(model, y, extra_noise=0.4))):
        population = Population(populations=1, correct=correct)
        posterior = DPnP(prior, model, population=population, **settings).sample(y, chains=3000, seed=0)
        std = target.covariance.diagonal().sqrt()
        torch.testing.assert_close(posterior.std.flatten().double(), std, rtol=0.05, atol=0)
        assert posterior.log_evidence == pytest.approx(exact.log_evidence, abs=0.15)


def test_an_impossible_measurement_is_named():
    class Uniform(Noise):
        def sample(self, clean, generator=None):
            return clean

        def log_prob(self, y, clean):
            return torch.where((y - clean).abs() < 0.1, 0.0, -math.inf).sum(1)

    model = ForwardModel(Absolute(), Uniform())
    sampler = DPnP(FAR, model, population=True, annealing=Annealing(eta_min=0.1))
    with pytest.raises(SamplingError, match="none of the 20 particles"):
        sampler.sample(torch.tensor([-500.0, 1.0]), chains=20, seed=0)


def test_the_history_is_kept():
    posterior = DPnP(FAR, FIRST, population=Population(start=3, populations=2)).sample(Y, chains=41, seed=1, draws=2)
    assert posterior.samples.shape == (41, 2, *SHAPE)
    first, second = posterior.diagnostics["populations"]
    etas = [level["eta"] for level in first["levels"]]
    assert etas == sorted(etas, reverse=True)
    assert etas[-1] == pytest.approx(DPnP(FAR, FIRST).schedule[-1])
    assert all(0 < level["ess"] <= 1 for level in first["levels"])
    assert len(first["levels"][0]["ancestors"]) == 20
    assert max(first["levels"][0]["ancestors"]) > 20  # of three times as many draws from the prior
    assert len(second["levels"][-1]["ancestors"]) == 21
    founders = [level["founders"] for level in first["levels"]]
    assert founders == sorted(founders, reverse=True)


def test_a_seed_gives_the_same_population_and_survives_a_folder(tmp_path):
    sampler = DPnP(FAR, FIRST, population=Population(start=2))
    one, two = (sampler.sample(Y, chains=30, seed=5) for _ in range(2))
    assert torch.equal(one.samples, two.samples)
    assert one.log_evidence == two.log_evidence
    assert not torch.equal(one.samples, sampler.sample(Y, chains=30, seed=6).samples)
    assert Posterior.load(one.save(tmp_path)).log_evidence == one.log_evidence


def test_batch_size_limits_the_images_of_a_network_call():
    seen = []

    class Watched(GaussianMixturePrior):
        def forward(self, x, sigma):
            seen.append(len(x))
            return super().forward(x, sigma)

    prior = Watched(FAR.means, FAR.log_weights.exp(), 1.0, SHAPE)
    # in float64, where rounding does not change a decision
    arguments = {"chains": 30, "seed": 0}
    sampler = DPnP(prior, FIRST, population=Population(start=2), dtype=torch.float64)
    whole = sampler.sample(Y.double(), **arguments)
    assert max(seen) == 30
    seen.clear()
    parts = sampler.sample(Y.double(), batch_size=8, **arguments)
    assert max(seen) == 8
    torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("black_box", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replica_exchange_gives_separated_modes_their_weights(black_box):
    if black_box:
        model = ForwardModel(lambda x: x.flatten(1)[:, :1] + 0.1 * x.flatten(1)[:, 1:], GaussianNoise(0.5))
        proximal = EllipticalSlice(steps=3)
    else:
        model, proximal = FIRST, "auto"
    exchange = ReplicaExchange(burn_in=60)
    sampler = DPnP(FAR, model, population=exchange, proximal=proximal, dds=DDSDDIM(8))
    # few chains, so that the right weights can only come from hopping
    posterior = sampler.sample(Y, chains=20, seed=0, draws=100)
    assert upper(posterior.flat) == pytest.approx(exact_upper(), abs=0.08)
    hops = (posterior.samples[:, 1:, 0, 0, 1] * posterior.samples[:, :-1, 0, 0, 1] < 0).sum()
    assert hops > 30
    record = posterior.diagnostics["replica_exchange"]
    assert record["etas"][0] == pytest.approx(sampler.schedule[0])
    assert record["sweeps"] == 160
    assert all(rate > 0.1 for rate in record["exchange_rates"])


def test_targets_agree_with_dense_linear_algebra():
    shape = (1, 6, 7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    blur = GaussianBlur(shape, 1.0)
    y = torch.randn(shape, generator=generator, dtype=torch.float64)
    split = 0.01
    cases = [
        (SpectralTargets(blur, 0.3, y, split), ForwardModel(blur, GaussianNoise(0.3))),
        (LanczosTargets(blur, GaussianNoise(0.3), y, split), ForwardModel(blur, GaussianNoise(0.3))),
    ]
    std = 0.2 + torch.rand(shape, generator=generator, dtype=torch.float64)
    coloured = ForwardModel(blur, GaussianNoise(std))
    targets, reason = choose_targets(coloured, y, split)
    assert "Lanczos" in reason
    for form, model in [*cases, (targets, coloured)]:
        A, R = model.linear_gaussian_dense(shape)
        at = form.at(x, x)
        r = y.flatten() - x.flatten(1) @ A.T

        def dense(eta, A=A, R=R, r=r):
            S = R + max(eta**2 - split, 0.0) * A @ A.T
            return -0.5 * (r @ torch.linalg.inv(S) * r).sum(1)

        for eta in (0.05, 0.5, 5.0, 50.0):
            difference = at(eta) - at(0.3) - (dense(eta) - dense(0.3))
            # what does not depend on x is left out
            torch.testing.assert_close(difference - difference[0], torch.zeros(5).double(), rtol=0, atol=1e-3)
        far = at(math.inf) - at(1e6)
        torch.testing.assert_close(far - far[0], torch.zeros(5).double(), rtol=0, atol=1e-3)


def test_joint_targets():
    x = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    z = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(1))
    expected = torch.distributions.Normal(x.double(), 0.7).log_prob(z.double()).flatten(1).sum(1)
    at = JointTargets().at(x, z)
    torch.testing.assert_close(at(0.7), expected + 3 * math.log(2 * math.pi), rtol=1e-6, atol=1e-6)
    model = ForwardModel(RandomInpainting((1, 2, 3)), GaussianNoise(0.1))
    assert not choose_targets(model, x[0], 0.0)[0].joint
    assert choose_targets(ForwardModel(Absolute(), GaussianNoise(0.1)), torch.zeros(2), 0.0)[0].joint


def test_a_tempered_likelihood():
    tempered = TemperedForwardModel(FIRST, 0.25)
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tempered.log_likelihood(x, Y), 0.25 * FIRST.log_likelihood(x, Y))


def test_effective_sample_sizes():
    assert ess(torch.zeros(7)) == pytest.approx(7)
    assert ess(torch.tensor([0.0, -math.inf])) == pytest.approx(1)
    increment = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    log_w = torch.tensor([0.3, -0.2, 0.0], dtype=torch.float64)
    w, u = log_w.softmax(0), increment.exp()
    assert conditional_ess(log_w, increment) == pytest.approx(float((w * u).sum() ** 2 / (w * u**2).sum()))
    assert conditional_ess(log_w, torch.full((3,), 5.0, dtype=torch.float64)) == pytest.approx(1)
    assert conditional_ess(log_w, torch.full((3,), -math.inf, dtype=torch.float64)) == 0


@pytest.mark.parametrize("u", [0.01, 0.5, 0.999])
def test_systematic_resampling(u):
    w = torch.tensor([0.05, 0.0, 0.55, 0.4], dtype=torch.float64)
    index = systematic_resampling(w.log(), 10, u)
    counts = torch.bincount(index, minlength=4)
    assert bool(((counts - 10 * w).abs() < 1).all())
    assert counts[1] == 0


def test_bad_settings_are_named():
    for name, value in [("start", 0), ("sweeps", 0), ("final", 0), ("ess", 1.0), ("resample", 0.0), ("populations", 0)]:
        with pytest.raises(ValueError, match=name):
            Population(**{name: value})
    with pytest.raises(ValueError, match="burn_in"):
        ReplicaExchange(burn_in=-1)
    with pytest.raises(ValueError, match="step"):
        ReplicaExchange(step=1.0)
    with pytest.raises(ValueError, match="chains = 3"):
        DPnP(FAR, FIRST, population=Population(populations=2)).sample(Y, chains=3, seed=0)
