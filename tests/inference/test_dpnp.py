import math

import pytest
import torch

from dpnp_inference import DDSDDIM, DDSDDPM, MALA, Annealing, ClosedForm, DPnP, PerturbAndSolve, SamplingError
from dpnp_inference.gibbs import START_CALLS
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.networks import UNet
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MatrixOperator, PhaseRetrieval, RandomInpainting
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import Prior, PriorCard

SHAPE = (1, 1, 3)
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.6, -0.8]], dtype=torch.float64)
Y = torch.tensor([0.9, -0.3], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.4, 0.1], [0.4, 0.8, -0.2], [0.1, -0.2, 0.5]], dtype=torch.float64)
GAUSSIAN = GaussianPrior(torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64), COVARIANCE, SHAPE)
# two modes that overlap enough for chains at fixed η to hop between them
MIXTURE = GaussianMixturePrior(
    torch.tensor([[0.8, -0.5, 0.6], [-0.8, 0.6, -0.2]], dtype=torch.float64), torch.tensor([0.3, 0.7]), 0.15, SHAPE
)


def model(sigma: float = 0.5) -> ForwardModel:
    return ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(sigma))


def fixed(eta: float, iterations: int) -> Annealing:
    return Annealing(eta_max=eta, eta_min=eta, constant=iterations, decay=1, final=0)


def check_moments(samples: torch.Tensor, posterior) -> None:
    """Mean and covariance of independent draws (n, d) within 4.5 standard errors of the closed form."""
    x, n = samples.reshape(-1, 3), len(samples)
    mean, covariance = posterior.mean.flatten(), posterior.covariance
    standard_error = (covariance.diagonal() / n).sqrt()
    assert bool(((x.mean(0) - mean).abs() < 4.5 * standard_error).all())
    products = torch.einsum("ni,nj->nij", x - mean, x - mean)
    error = products.std(0) / math.sqrt(n)
    assert bool(((products.mean(0) - covariance).abs() < 4.5 * error).all())


@pytest.mark.parametrize("dds", [DDSDDPM(20), DDSDDIM(12)], ids=["ddpm", "ddim"])
@pytest.mark.parametrize(
    "proximal",
    [ClosedForm(exact_splitting=False), PerturbAndSolve(exact_splitting=False), MALA(steps=6, warmup=30)],
    ids=["closed", "cg", "mala"],
)
@pytest.mark.parametrize("prior", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_fixed_eta_gives_the_posterior_of_the_widened_noise(prior, proximal, dds):
    eta = 0.6
    dpnp = DPnP(prior, model(), dds=dds, proximal=proximal, annealing=fixed(eta, 8), dtype=torch.float64)
    posterior = dpnp.sample(Y, chains=1200, seed=0)
    check_moments(posterior.flat, prior.posterior(model(), Y, extra_noise=eta))


@pytest.mark.parametrize("dds", [DDSDDPM(20), DDSDDIM(12)], ids=["ddpm", "ddim"])
def test_exact_splitting_gives_the_posterior_itself(dds):
    # ‖A‖ is 1.2: at η = 0.4 the noise of 0.5 is just above η ‖A‖, where splitting without correction is far off
    dpnp = DPnP(MIXTURE, model(), dds=dds, proximal=ClosedForm(), annealing=fixed(0.4, 15), dtype=torch.float64)
    posterior = dpnp.sample(Y, chains=3000, seed=0)
    check_moments(posterior.flat, MIXTURE.posterior(model(), Y))
    # the correction is visible: without it the law differs by more than the test allows
    biased = DPnP(
        MIXTURE,
        model(),
        dds=dds,
        proximal=ClosedForm(exact_splitting=False),
        annealing=fixed(0.4, 15),
        dtype=torch.float64,
    ).sample(Y, chains=3000, seed=0)
    with pytest.raises(AssertionError):
        check_moments(biased.flat, MIXTURE.posterior(model(), Y))


@pytest.mark.parametrize("proximal", [ClosedForm(), PerturbAndSolve(tolerance=1e-8)], ids=["closed", "cg"])
def test_what_cannot_be_split_off_is_all_that_widens_the_noise(proximal):
    eta = 0.8
    dpnp = DPnP(MIXTURE, model(), dds=DDSDDIM(12), proximal=proximal, annealing=fixed(eta, 10), dtype=torch.float64)
    posterior = dpnp.sample(Y, chains=1500, seed=0)
    e = proximal.split_variance(proximal.init(model(), Y, torch.zeros(1, *SHAPE, dtype=torch.float64)))
    norm = float(torch.linalg.svdvals(A)[0])
    assert 0.8 * (0.5 / norm) ** 2 < e <= (0.5 / norm) ** 2 * (1 + 1e-6)
    check_moments(posterior.flat, MIXTURE.posterior(model(), Y, extra_noise=math.sqrt(eta**2 - e)))


@pytest.mark.parametrize("scale", [0.05, 1.0, 100.0])
def test_the_default_call_needs_no_tuning_at_any_scale(scale):
    prior = GaussianPrior(3 * scale, scale**2 * COVARIANCE, SHAPE)
    sharp = ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(0.1 * scale))
    y = A @ torch.tensor([3.2, 2.5, 3.4]).double() * scale
    posterior = DPnP(prior, sharp, dtype=torch.float64).sample(y, chains=1000, seed=1)
    exact = prior.posterior(sharp, y)
    std = exact.covariance.diagonal().sqrt()
    assert bool(((posterior.mean.flatten() - exact.mean.flatten()).abs() < 0.15 * std).all())
    torch.testing.assert_close(posterior.std.flatten(), std, rtol=0.1, atol=0)


@pytest.mark.parametrize("proximal", ["auto", MALA(steps=3, warmup=3)])
def test_a_chain_depends_on_its_index_only(proximal):
    dpnp = DPnP(MIXTURE, model(), proximal=proximal, annealing=Annealing(decay=5, final=1), dtype=torch.float64)
    together = dpnp.sample(Y, chains=5, seed=3, draws=2)
    batched = dpnp.sample(Y, chains=5, seed=3, draws=2, batch_size=2)
    fewer = dpnp.sample(Y, chains=2, seed=3, draws=2)
    torch.testing.assert_close(batched.samples, together.samples, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fewer.samples, together.samples[:2], rtol=1e-9, atol=1e-9)
    assert torch.equal(dpnp.sample(Y, chains=5, seed=3, draws=2).samples, together.samples)
    assert not torch.equal(dpnp.sample(Y, chains=5, seed=4, draws=2).samples, together.samples)
    assert not torch.equal(together.samples[0], together.samples[1])


def test_draws_thin_and_the_record():
    dpnp = DPnP(GAUSSIAN, model(), dds=DDSDDIM(calls=8), annealing=Annealing(constant=1, decay=3, final=1))
    seen = []
    posterior = dpnp.sample(Y.float(), chains=3, seed=0, draws=4, thin=2, on_sweep=seen.append)
    assert posterior.samples.shape == (3, 4, *SHAPE)
    assert posterior.samples.dtype == torch.float32
    iterations = 5 + 2 * 3
    assert [sweep.iteration for sweep in seen] == list(range(1, iterations + 1))
    assert posterior.diagnostics["network_calls"] == START_CALLS + 8 * iterations == seen[-1].network_calls
    assert posterior.diagnostics["forward_calls"] == 2 * iterations
    assert set(posterior.diagnostics["convergence"]) == {"r_hat", "ess_bulk", "ess_tail"}
    # the first draw is the one that a single-draw run gives
    torch.testing.assert_close(dpnp.sample(Y.float(), chains=3, seed=0).samples[:, 0], posterior.samples[:, 0])


def test_the_log_says_which_proximal_sampler_and_why(caplog):
    with caplog.at_level("INFO"):
        DPnP(GAUSSIAN, model())
    assert "closed form with exact splitting: no bias for η ≤ σ/‖A‖, because MatrixOperator with" in caplog.text


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (torch.tensor([0.1, math.nan]), ValueError, "1 NaN"),
        (torch.zeros(3), ValueError, r"\(3,\)"),
        (torch.zeros(1, 2), ValueError, "without a batch dimension"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "complex"),
        ([0.0, 0.0], TypeError, "list"),
    ],
)
def test_a_wrong_measurement_is_named(y, error, message):
    with pytest.raises(error, match=message):
        DPnP(GAUSSIAN, model().float()).sample(y, chains=2, seed=0)


def test_bad_arguments_are_named():
    for arguments, word in [
        ({"dds": "euler"}, "ddim"),
        ({"proximal": "best"}, "auto"),
        ({"annealing": "slow"}, "auto"),
    ]:
        with pytest.raises(ValueError, match=word):
            DPnP(GAUSSIAN, model(), **arguments)
    dpnp = DPnP(GAUSSIAN, model())
    for arguments in ({"chains": 0}, {"draws": 0}, {"thin": 0}, {"seed": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            dpnp.sample(Y.float(), **{"chains": 1, "seed": 0, **arguments})


def test_a_prior_is_not_used_beyond_its_noise_levels():
    prior = GaussianPrior(0.0, 1.0, SHAPE)
    prior.sigma_min, prior.sigma_max = 0.01, 2.0
    with pytest.raises(ValueError, match=r"\[0.01, 2\]"):
        DPnP(prior, model(), annealing=Annealing(eta_max=5.0))


def test_a_chain_that_breaks_down_is_named():
    class Broken(GaussianPrior):
        def forward(self, x, sigma):
            x = super().forward(x, sigma)
            x[1:2] = math.nan
            return x

    with pytest.raises(SamplingError, match=r"chains \[1\]"):
        DPnP(Broken(0.0, 1.0, SHAPE), model().float()).sample(Y.float(), chains=3, seed=0)


def test_schedule():
    schedule = Annealing(eta_max=8.0, eta_min=0.5, constant=2, decay=4, final=3).schedule(
        GAUSSIAN, model(), torch.zeros(1, *SHAPE)
    )
    assert schedule == pytest.approx([8, 8, 4, 2, 1, 0.5, 0.5, 0.5, 0.5])
    automatic = Annealing()
    norm = float(torch.linalg.svdvals(A)[0])
    for splitting, factor in ((True, 0.9), (False, 0.5)):
        schedule = automatic.schedule(GAUSSIAN, model(0.2), torch.zeros(1, *SHAPE), exact_splitting=splitting)
        assert schedule[-1] == pytest.approx(factor * 0.2 / norm, rel=1e-5)
        assert schedule[0] == pytest.approx(math.sqrt(float(torch.linalg.eigvalsh(COVARIANCE)[-1])))
        assert schedule == sorted(schedule, reverse=True)


def test_automatic_eta_min_of_a_nonlinear_model():
    shape = (1, 8, 8)
    prior = GaussianPrior(0.0, 1.0, shape)
    operator = PhaseRetrieval(shape)  # |F u|, u = (x + 1)/2: its Jacobian's norm is about 1/2
    schedule = Annealing().schedule(prior, ForwardModel(operator, GaussianNoise(0.01)), torch.zeros(1, *shape))
    assert schedule[-1] == pytest.approx(0.01, rel=0.3)


@pytest.mark.parametrize(
    "arguments",
    [{"eta_max": 0.0}, {"eta_min": math.nan}, {"eta_min": 2.0, "eta_max": 1.0}, {"decay": 0}, {"final": -1}],
)
def test_bad_schedules_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Annealing(**arguments)


def test_three_channels_and_one_chain():
    shape = (3, 4, 6)
    prior = GaussianPrior(0.0, 1.0, shape)
    inpainting = ForwardModel(RandomInpainting(shape, missing=0.5), GaussianNoise(0.05))
    y = inpainting.simulate(torch.zeros(1, *shape), generator=torch.Generator().manual_seed(0))[0]
    posterior = DPnP(prior, inpainting).sample(y, chains=1, seed=0)
    assert posterior.samples.shape == (1, 1, *shape)
    seen = ~inpainting.operator.unseen.expand(shape)
    assert float((posterior.mean - y)[seen].abs().max()) < 0.3


def test_a_convolutional_prior_draws_images_of_the_operators_size():
    torch.manual_seed(0)
    network = UNet(2, widths=(8, 8), blocks=1, attention=(1,), head_channels=4, embedding=8)
    prior = Prior(network, EDM(), PriorCard("test", (2, 8, 8))).eval().requires_grad_(False)
    inpainting = ForwardModel(RandomInpainting((2, 11, 6)), GaussianNoise(0.05))
    posterior = DPnP(prior, inpainting, annealing=Annealing(constant=0, decay=2, final=0)).sample(
        torch.zeros(2, 11, 6), chains=2, seed=0
    )
    assert posterior.samples.shape == (2, 1, 2, 11, 6)
    with pytest.raises(ValueError, match="was trained at"):
        DPnP(prior, ForwardModel(RandomInpainting((1, 8, 8)), GaussianNoise(0.05)))
