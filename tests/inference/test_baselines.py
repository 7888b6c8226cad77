import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from typing import NamedTuple

import azula.denoise
import azula.guidance.diffpir
import azula.guidance.dps
import azula.guidance.pgdm
import azula.noise
import azula.sample
import deepinv
import pytest
import torch
from jsonargparse import ArgumentParser

from dpnp_inference.baselines import (
    DAPS,
    DDRM,
    DPS,
    LGDMC,
    Baseline,
    DiffPIR,
    NonlinearCT,
    PiGDM,
    PnPDM,
    UnadjustedLangevin,
    linear,
)
from dpnp_inference.baselines.common import alpha_bars, ddim_noise, noise_level
from dpnp_inference.baselines.nonlinear_ct import Scan
from dpnp_inference.baselines.pnp_dm import PROCESSES, PUBLISHED
from dpnp_inference.dpnp import SamplingError
from dpnp_inference.proximal import ClosedForm, EllipticalSlice, PerturbAndSolve
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, PoissonNoise, TransmissionNoise
from dpnp_shared.operators import (
    MRI,
    BeerLambert,
    CompressedSensing,
    Convolution,
    FanBeamCT,
    GaussianBlur,
    Inpainting,
    MatrixOperator,
    Operator,
    ParallelBeamCT,
    PhaseRetrieval,
    PhysicalUnits,
)
from dpnp_shared.prior import Prior

# --- a Gaussian prior and a linear Gaussian model, under which each sampler is an affine map with Gaussian noise

SHAPE = (1, 1, 3)
DOUBLE = torch.float64
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.6, -0.8]], dtype=DOUBLE)
Y = torch.tensor([0.9, -0.3], dtype=DOUBLE)
MEAN = torch.tensor([0.5, -0.2, 0.1], dtype=DOUBLE)
COVARIANCE = torch.tensor([[1.0, 0.3, 0.0], [0.3, 0.5, 0.2], [0.0, 0.2, 0.8]], dtype=DOUBLE)
PRIOR = GaussianPrior(MEAN, COVARIANCE, SHAPE)
UNIT = GaussianPrior(0.0, 1.0, SHAPE)
EYE = torch.eye(3, dtype=DOUBLE)
SIGMA = 0.5
N = 3000


def model(sigma: float = SIGMA) -> ForwardModel:
    return ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(sigma))


class Law(NamedTuple):
    """A normal law, and what an affine map with Gaussian noise makes of it."""

    mean: torch.Tensor
    cov: torch.Tensor

    def push(self, M, b=0.0, Q=0.0) -> "Law":
        M = M * EYE if isinstance(M, float) or M.ndim == 0 else M
        return Law(M @ self.mean + b, M @ self.cov @ M.T + Q * EYE if isinstance(Q, float) else M @ self.cov @ M.T + Q)


class Denoise(NamedTuple):
    """D(x; sigma) = K x + k of a Gaussian prior."""

    K: torch.Tensor
    k: torch.Tensor


def denoise(sigma: float, cov: torch.Tensor = COVARIANCE, mean: torch.Tensor = MEAN) -> Denoise:
    K = cov @ torch.linalg.inv(cov + sigma**2 * EYE)
    return Denoise(K, mean - K @ mean)


def deviation(x: torch.Tensor, law: Law) -> float:
    """The largest deviation of the whitened draws' moments, in standard errors; below 4.5 for draws from the law."""
    x = x.reshape(-1, 3).double()
    L = torch.linalg.cholesky(law.cov)
    z = torch.linalg.solve_triangular(L, (x - law.mean).T, upper=False)
    of_mean = z.mean(1).abs().max() * math.sqrt(len(x))
    of_cov = ((z.cov() - EYE).abs() / (1 + EYE).sqrt()).max() * math.sqrt(len(x))
    return float(max(of_mean, of_cov))


def draws(sampler, n: int = N) -> torch.Tensor:
    return sampler.sample(Y, chains=n, seed=0).flat


def exact(prior: GaussianPrior, extra_noise: float = 0.0) -> Law:
    posterior = prior.posterior(model(), Y, extra_noise)
    return Law(posterior.mean.flatten(), posterior.covariance)


# --- PnP-DM


def released_schedule(process: str) -> tuple[Callable, Callable, Callable]:
    """sigma(t), s(t) and the inverse of sigma, as in the paper's table."""
    if process == "vp":
        low, high = 1e-3, 1.0
        ends = [math.expm1(19.9 * t**2 / 2 + 0.1 * t) for t in (low, high)]
        beta_d = 2 * (math.log(ends[0] + 1) / low - math.log(ends[1] + 1)) / (low - 1)
        beta_min = math.log(ends[1] + 1) - beta_d / 2

        def vp_sigma(t):
            return (torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1).sqrt()

        def inverse(sigma):
            return ((beta_min**2 + 2 * beta_d * math.log(sigma**2 + 1)) ** 0.5 - beta_min) / beta_d

        return vp_sigma, lambda t: 1 / (1 + vp_sigma(t) ** 2).sqrt(), inverse
    if process == "ve":
        return lambda t: t.sqrt(), torch.ones_like, lambda sigma: sigma**2
    return lambda t: t, torch.ones_like, lambda sigma: sigma


def prior_step_law(law: Law, sampler: PnPDM, process: str, rho: float, factor: float) -> Law:
    """Euler's method on the reverse diffusion, by automatic differentiation of its schedule."""
    sigma_of, scale_of, inverse = released_schedule(process)
    levels = [s for s in sampler.process.levels if s < rho]
    times = [inverse(s) for s in ([rho, *levels] if sampler.insert_rho else levels)] + [0.0]
    t = torch.tensor(times[0], dtype=DOUBLE)
    law = law.push(scale_of(t))
    for i, (now, after) in enumerate(itertools.pairwise(times)):
        t = torch.tensor(now, dtype=DOUBLE, requires_grad=True)
        sigma, s = sigma_of(t), scale_of(t)
        (sigma_dot,) = torch.autograd.grad(sigma, t, retain_graph=True)
        s_dot = torch.autograd.grad(s, t)[0] if s.requires_grad else torch.zeros((), dtype=DOUBLE)
        sigma, s, dt = sigma.detach(), s.detach(), after - now
        K, k = denoise(float(sigma))
        noise = 0.0 if factor == 1 or i == len(times) - 2 else float(-2 * s**2 * sigma_dot * sigma * dt)
        pull = factor * sigma_dot / sigma
        law = law.push(EYE + dt * ((pull + s_dot / s) * EYE - pull * K), -dt * pull * s * k, noise)
    return law


def likelihood_step_law(law: Law, rho: float) -> Law:
    P = torch.linalg.inv(A.T @ A / SIGMA**2 + EYE / rho**2)
    return law.push(P / rho**2, P @ A.T @ Y / SIGMA**2, P)


@pytest.mark.parametrize("process", ["vp", "ve", "iddpm", "edm"])
@pytest.mark.parametrize(
    ("stochastic", "insert"),
    [(True, True), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(False, True), (True, False)])],
)
def test_pnp_dm_is_the_papers_recursion(process, stochastic, insert):
    # few levels, so that Euler's error, and where the step starts, are in the law
    settings = {"rho": 2.0, "decay": 0.7, "rho_min": 0.6, "iterations": 6, "steps": 9, "dtype": DOUBLE}

    def law(insert: bool, factor: float) -> Law:
        state = Law(torch.zeros(3, dtype=DOUBLE), EYE)
        chain = PnPDM(PRIOR, model(), **settings, process=process, insert_rho=insert)
        for rho in chain.schedule:
            state = prior_step_law(likelihood_step_law(state, rho), chain, process, rho, factor)
        return state

    factor = 2.0 if stochastic else 1.0
    x = draws(PnPDM(PRIOR, model(), **settings, process=process, stochastic=stochastic, insert_rho=insert))
    assert deviation(x, law(insert, factor)) < 4.5
    assert deviation(x, law(not insert, factor)) > 6
    assert deviation(x, law(insert, 3 - factor)) > 6


def test_pnp_dm_at_a_fixed_coupling_has_the_likelihood_widened_by_it():
    settings = {"rho": 0.6, "rho_min": 0.6, "iterations": 10, "dtype": DOUBLE}
    x = draws(PnPDM(PRIOR, model(), **settings))
    # Euler's method with 37 levels leaves 2% of the standard deviation, that is 2 standard errors of the moments
    assert deviation(x, exact(PRIOR, 0.6)) < 4.5 + 2
    assert deviation(x, exact(PRIOR)) > 20
    assert deviation(draws(PnPDM(PRIOR, model(), **settings, stochastic=False)), exact(PRIOR, 0.6)) > 20


def test_the_grids_are_the_published_ones():
    levels = {name: PROCESSES[name](PRIOR, 100).levels for name in PROCESSES}
    assert all(len(grid) == 100 and grid == sorted(grid, reverse=True) for grid in levels.values())
    ends = {"vp": (152.17, 0.0105), "ve": (100, 0.02), "edm": (80, 0.002), "iddpm": (80.25, 0.0064)}
    for name, (high, low) in ends.items():
        assert levels[name][0] == pytest.approx(high, rel=0.01)
        assert levels[name][-1] == pytest.approx(low, rel=0.01)
    narrow = GaussianPrior(0.0, 1.0, SHAPE)
    narrow.sigma_min, narrow.sigma_max = 0.05, 20.0
    for name in PROCESSES:
        assert 0.05 <= PROCESSES[name](narrow, 30).levels[-1] < 0.06
        assert 19 < PROCESSES[name](narrow, 30).levels[0] <= 20


def test_levels_that_a_process_cannot_have_are_named():
    coarse = GaussianPrior(0.0, 1.0, SHAPE)
    coarse.sigma_min, coarse.sigma_max = 0.5, 80.0
    with pytest.raises(
        ValueError, match=r"process = 'vp': no linear beta\(t\) goes from the level 0.5 .* take another process"
    ):
        PnPDM(coarse, model(), rho_min=0.6, process="vp")
    assert PnPDM(coarse, model(), rho_min=0.6, process="ve").process.levels[-1] == pytest.approx(0.5)
    coarse.sigma_min, coarse.sigma_max = 100.0, 200.0
    with pytest.raises(
        ValueError, match=r"noise levels \[0.002, 80\] and the prior's \[100, 200\] have none in common"
    ):
        PnPDM(coarse, model(), rho=150.0, rho_min=120.0)


def test_unadjusted_langevin_is_the_papers_recursion():
    x, rho, step = torch.tensor([0.4, -1.0, 0.8], dtype=DOUBLE), 0.7, 0.02
    kernel = UnadjustedLangevin(steps=10, step_size=step)
    start = x.reshape(1, *SHAPE).expand(N, -1, -1, -1)
    state = kernel.init(model(), Y, start)
    _, z, info = kernel.step(state, start, rho, generator=ChainGenerators(0, range(N)))
    H = A.T @ A / SIGMA**2 + EYE / rho**2
    law = Law(x, 0 * EYE)
    for _ in range(10):
        law = law.push(EYE - step * H, step * (A.T @ Y / SIGMA**2 + x / rho**2), 2 * step)
    assert deviation(z, law) < 4.5
    assert (
        deviation(z, likelihood_step_law(Law(x, 0 * EYE), rho)) > 6
    )  # ten steps are not enough, and there is no Metropolis step
    assert info.forward_calls == 20


def test_pnp_dm_takes_the_likelihood_step_that_the_model_allows():
    image = (1, 8, 8)
    prior = GaussianPrior(0.0, 0.25, image)
    noise = GaussianNoise(0.1)
    assert PnPDM(prior, ForwardModel(GaussianBlur(image, 1.0), noise)).likelihood == ClosedForm(exact_splitting=False)
    correlated = Convolution(image, torch.ones(3, 3) / 9)
    assert PnPDM(prior, ForwardModel(correlated, noise)).likelihood == PerturbAndSolve(exact_splitting=False)
    assert PnPDM(prior, ForwardModel(PhaseRetrieval(image), noise)).likelihood == UnadjustedLangevin()
    black = ForwardModel(Black(), noise)
    with pytest.raises(TypeError, match=r"PnP-DM with likelihood='auto' needs a differentiable .* Black"):
        PnPDM(prior, black)
    y = torch.zeros(image)
    assert PnPDM(prior, black, likelihood=EllipticalSlice(), iterations=3, steps=5).sample(
        y, chains=2, seed=0
    ).samples.shape == (2, 1, *image)


@pytest.mark.parametrize("problem", PUBLISHED)
def test_published_settings_of_pnp_dm(problem):
    sampler = PnPDM.published(problem, UNIT, model())
    assert sampler.schedule[0] == 10
    assert sampler.schedule[-1] == PUBLISHED[problem]["rho_min"] == min(sampler.schedule)
    assert PnPDM.published(problem, UNIT, model(), iterations=7).iterations == 7
    with pytest.raises(ValueError, match=r"problem = 'sorcery'; published are gaussian_deblurring"):
        PnPDM.published("sorcery", UNIT, model())


@pytest.mark.parametrize("problem", PUBLISHED)
def test_published_settings_can_be_written_as_class_path_and_init_args(problem):
    parser = ArgumentParser()
    parser.add_argument("--solver", type=Callable[[Denoiser, ForwardModel], Baseline])
    settings = dict(PUBLISHED[problem])
    if "likelihood" in settings:
        kind = "dpnp_inference.baselines.UnadjustedLangevin"
        settings["likelihood"] = {"class_path": kind, "init_args": dataclasses.asdict(settings["likelihood"])}
    config = {"solver": {"class_path": "dpnp_inference.baselines.PnPDM", "init_args": settings}}
    build = parser.instantiate(parser.parse_object(config)).solver
    sampler = build(UNIT, model(), dtype=DOUBLE)
    assert sampler.settings == PnPDM.published(problem, UNIT, model()).settings
    assert sampler.dtype == DOUBLE


def test_draws_of_a_pnp_dm_chain_end_with_its_last_image():
    sampler = PnPDM(PRIOR, model(), iterations=20, burn_in=10, steps=8, dtype=DOUBLE)
    several = sampler.sample(Y, chains=3, seed=1, draws=3)
    assert several.samples.shape == (3, 3, *SHAPE)
    torch.testing.assert_close(several.samples[:, -1], sampler.sample(Y, chains=3, seed=1).samples[:, 0])
    assert not torch.allclose(several.samples[:, 1], several.samples[:, 2])
    with pytest.raises(ValueError, match=r"draws = 10; iterations = 20 with burn_in = 10 allow at most 9"):
        sampler.sample(Y, chains=3, seed=1, draws=10)
    with pytest.raises(ValueError, match="thin = 2"):
        sampler.sample(Y, chains=3, seed=1, draws=2, thin=2)


def test_restarts_keep_the_most_likely_run():
    settings = {"iterations": 5, "steps": 8, "dtype": DOUBLE}
    one, four = (PnPDM(PRIOR, model(0.2), **settings, restarts=r).sample(Y, chains=50, seed=0) for r in (1, 4))
    fit_one, fit_four = (model(0.2).log_likelihood(p.flat, Y) for p in (one, four))
    assert bool((fit_four >= fit_one - 1e-9).all())  # the first run is the same
    assert 0.1 < float((fit_four > fit_one + 1e-9).double().mean()) < 0.95
    assert four.diagnostics["network_calls"] == 4 * one.diagnostics["network_calls"]


# --- PiGDM


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pigdm_by_the_score_is_exact_for_an_isotropic_gaussian(eta):
    prior, settings = GaussianPrior(0.0, 4.0, SHAPE), {"eta": eta, "dtype": DOUBLE}
    x = draws(PiGDM(prior, model(), guidance="score", prior_std=2.0, steps=200, **settings))
    assert deviation(x, exact(prior)) < 4.5 + 1  # 200 steps leave 1% of the standard deviation
    for wrong in ({"guidance": "score", "prior_std": 1.0}, {"guidance": "adaptive", "prior_std": 2.0}):
        assert deviation(draws(PiGDM(prior, model(), steps=50, **wrong, **settings)), exact(prior)) > 10


def test_pigdm_guidance_agrees_with_deepinv():
    image, sigma, sigma_y = (1, 4, 5), 0.8, 0.3
    mixture = GaussianMixturePrior(torch.randn(3, 20, generator=torch.Generator().manual_seed(0)), "equal", 0.3, image)
    mask = torch.rand(image, generator=torch.Generator().manual_seed(1)) > 0.4
    x = torch.randn(2, *image, generator=torch.Generator().manual_seed(2))
    y = torch.randn(image, generator=torch.Generator().manual_seed(3)) * mask
    physics = deepinv.physics.Inpainting(image, mask=mask.float(), noise_model=deepinv.physics.GaussianNoise(sigma_y))
    fidelity = deepinv.sampling.PiGDMDataFidelity(lambda x, s: mixture(x, s.flatten()))
    theirs = fidelity.grad(x, y.expand(2, -1, -1, -1), physics, torch.tensor(sigma))

    ours = PiGDM(mixture, ForwardModel(Inpainting(mask), GaussianNoise(sigma_y)), guidance="score", eta=0.0)
    alpha = 1 / (1 + sigma**2)
    ours.alpha_bars, ours.schedule = (
        [alpha],
        [sigma],
    )  # one step from sigma to 0: the denoised image plus sigma^2 times the gradient
    start = math.sqrt(alpha) * x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChainGenerators, "normal_like", lambda self, like: start)
        result = ours.sample(y, chains=2, seed=0).flat
    torch.testing.assert_close(result, mixture(x, sigma) - sigma**2 * theirs, rtol=1e-4, atol=1e-4)


# --- azula's samplers, on the same time steps with the same noise


class AzulaSchedule(azula.noise.Schedule):
    """The time i stands for the i-th value before the last; 0 for a clean image."""

    def __init__(self, bars: list[float]) -> None:
        self.table = torch.tensor([1.0, *reversed(bars)], dtype=DOUBLE)

    def __call__(self, t):
        bar = self.table[t.round().long()]
        return bar.sqrt(), (1 - bar).sqrt()


class AzulaPrior(azula.denoise.Denoiser):
    def __init__(self, prior: Denoiser, bars: list[float]) -> None:
        super().__init__()
        self.prior, self.schedule = prior, AzulaSchedule(bars)

    def forward(self, x_t, t, **kwargs):
        alpha, sigma = self.schedule(t)
        return azula.denoise.DiracPosterior(mean=self.prior(x_t / alpha, float(sigma / alpha)))


MIXTURE = GaussianMixturePrior(
    torch.tensor([[1.0, -0.5, 0.5], [-1.0, 0.5, 0.0]], dtype=DOUBLE), torch.tensor([0.4, 0.6]), 0.2, SHAPE
)


def forward(x):
    return x.flatten(1) @ A.T


def by_azula(sampler_class, sampler, **arguments) -> torch.Tensor:
    """One chain of ours by azula's sampler: the start and the noise of each step are our chain's."""
    stream = ChainGenerators(7, range(1))
    bars = sampler.alpha_bars
    start = stream.normal_like(torch.zeros(1, *SHAPE, dtype=DOUBLE))
    settings = {"start": len(bars), "stop": 0, "steps": len(bars), "dtype": DOUBLE, "silent": True}
    prior = arguments.pop("denoiser", lambda base: base)(AzulaPrior(MIXTURE, bars))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", stream.normal_like)
        return sampler_class(prior, **arguments, **settings)(start)


def test_dps_agrees_with_azula():
    ours = DPS(MIXTURE, model(), steps=40, zeta=0.1, dtype=DOUBLE)
    theirs = by_azula(azula.guidance.dps.DPSSampler, ours, y=Y, A=forward, zeta=0.2)
    torch.testing.assert_close(ours.sample(Y, chains=1, seed=7).flat, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pigdm_agrees_with_azula(eta):
    ours = PiGDM(MIXTURE, model(1e-5), steps=40, eta=eta, dtype=DOUBLE)  # azula's measurement has no noise
    inverse = torch.linalg.pinv(A).T
    # azula draws numbers that it multiplies by 0; ours does not, and at eta = 1 the last step has none
    theirs = by_azula(
        azula.guidance.pgdm.PGDMSampler,
        ours,
        y=Y[None],
        A=forward,
        A_inv=lambda v: (v @ inverse).reshape(-1, *SHAPE),
        eta=eta,
    )
    result = ours.sample(Y, chains=1, seed=7).flat
    torch.testing.assert_close(result, theirs, rtol=1e-5, atol=1e-6)
    assert float((forward(result) - Y).norm()) < 1e-3


def test_diffpir_agrees_with_azula():
    ours = DiffPIR(MIXTURE, model(), steps=30, lambda_=3.0, zeta=0.0, dtype=DOUBLE)
    theirs = by_azula(
        azula.sample.DDIMSampler,
        ours,
        denoiser=lambda base: azula.guidance.diffpir.DiffPIRDenoiser(
            base, y=Y[None], A=forward, var_y=SIGMA**2, lmbda=3.0, iterations=3
        ),
    )
    torch.testing.assert_close(ours.sample(Y, chains=1, seed=7).flat, theirs, rtol=1e-5, atol=1e-6)


# --- DiffPIR


class Recorded(Denoiser):
    """A prior, and what it was called with."""

    def __init__(self, prior: Denoiser) -> None:
        super().__init__()
        self.prior, self.calls = prior, []
        self.image_shape, self.spread = prior.image_shape, prior.spread
        self.sigma_min, self.sigma_max = prior.sigma_min, prior.sigma_max

    def forward(self, x, sigma):
        self.calls.append((x.detach().clone(), float(sigma)))
        return self.prior(x, sigma)


def test_diffpir_agrees_with_deepinv():
    image, sigma = (1, 4, 5), 0.2  # of images in [-1, 1]; deepinv's are in [0, 1]
    prior = Recorded(GaussianPrior(0.1, 0.04, image))
    mask = torch.rand(image, generator=torch.Generator().manual_seed(1)) > 0.4
    y = mask * (0.3 * torch.randn(image, generator=torch.Generator().manual_seed(2))).clamp(-1, 1)
    physics = deepinv.physics.Inpainting(image, mask=mask.float(), noise_model=deepinv.physics.GaussianNoise(sigma / 2))
    # deepinv's proximal map has half of the squared residual, and its rho a noise of half the size
    ours = DiffPIR(prior, ForwardModel(Inpainting(mask), GaussianNoise(sigma)), steps=20, lambda_=7.0 / 2, zeta=0.0)
    ours.sample(y, chains=1, seed=0)
    mine, prior.calls = prior.calls, []

    theirs = deepinv.sampling.DiffPIR(
        lambda x, s: (prior(2 * x - 1, 2 * s) + 1) / 2, deepinv.optim.data_fidelity.L2(), sigma / 2, 20, 0.0, 7.0
    )
    bar, level = ours.alpha_bars[0], ours.schedule[0]
    start = ChainGenerators(0, range(1)).normal_like(torch.zeros(1, *image))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: start / math.sqrt(bar * (level**2 - sigma**2)))
        theirs((y / 2 + 0.5 * mask)[None], physics, x_init=torch.full((1, *image), 0.5))
    assert len(mine) == len(prior.calls) == 20
    for (x, s), (x_theirs, s_theirs) in zip(mine, prior.calls, strict=True):
        assert s == pytest.approx(s_theirs, rel=1e-4)
        torch.testing.assert_close(x, x_theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zeta", [0.3, 1.0])
def test_diffpir_is_the_papers_recursion(zeta):
    def law(lambda_: float) -> Law:
        state = Law(torch.zeros(3, dtype=DOUBLE), EYE)
        bars = [*alpha_bars(25, "quad"), 1.0]
        for bar, bar_next in itertools.pairwise(bars):
            K, k = denoise(noise_level(bar))
            rho = lambda_ * SIGMA**2 / noise_level(bar) ** 2
            P = torch.linalg.inv(A.T @ A + rho * EYE)  # x_0 = P (A^T y + rho D(x))
            M, b = rho * P @ K / math.sqrt(bar), P @ (A.T @ Y + rho * k)
            keep = math.sqrt((1 - bar_next) * (1 - zeta) / (1 - bar))
            to_image = math.sqrt(bar_next) - keep * math.sqrt(bar)
            state = state.push(to_image * M + keep * EYE, to_image * b, (1 - bar_next) * zeta)
        return state

    x = draws(DiffPIR(PRIOR, model(), steps=25, lambda_=2.0, zeta=zeta, dtype=DOUBLE))
    assert deviation(x, law(2.0)) < 4.5
    assert deviation(x, law(4.0)) > 6
    assert deviation(x, exact(PRIOR)) > 6  # it is no sampler of the posterior


# --- DDRM


def ddrm_law(schedule: list[float], eta: float, eta_b: float) -> Law:
    """Equations 7 and 8 in the coordinates of the singular vectors."""
    U, s, Vt = torch.linalg.svd(A)
    s = torch.cat([s, torch.zeros(1, dtype=DOUBLE)])
    y_bar = torch.cat([U.T @ Y / s[:2], torch.zeros(1, dtype=DOUBLE)])
    noise = SIGMA / s  # infinite where nothing is measured
    high = schedule[0]
    seen = noise < high
    state = Law(torch.where(seen, y_bar, 0.0), torch.diag(high**2 - torch.where(seen, noise, 0.0) ** 2))
    for sigma, after in zip(schedule, [*schedule[1:], 0.0], strict=True):
        K, k = denoise(sigma)
        K, k = Vt @ K @ Vt.T, Vt @ k
        clean, noisy, unseen = (
            (noise <= after).double(),
            ((noise > after) & noise.isfinite()).double(),
            noise.isinf().double(),
        )
        keep = math.sqrt(1 - eta**2) * after
        of_denoised = unseen * (1 - keep / sigma) + noisy * (1 - keep / noise) + clean * (1 - eta_b)
        constant = of_denoised * k + torch.where(noise.isinf(), 0.0, noisy * keep / noise + clean * eta_b) * y_bar
        variance = torch.where(noise <= after, after**2 - (eta_b * noise).clamp(max=1e6) ** 2, (eta * after) ** 2)
        state = state.push(of_denoised[:, None] * K + torch.diag(unseen * keep / sigma), constant, torch.diag(variance))
    return Law(Vt.T @ state.mean, Vt.T @ state.cov @ Vt)


@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.5, 0.7)])
def test_ddrm_is_the_papers_recursion(eta, eta_b):
    sampler = DDRM(PRIOR, model(), eta=eta, eta_b=eta_b, steps=30, dtype=DOUBLE)
    x = draws(sampler)
    assert deviation(x, ddrm_law(sampler.schedule, eta, eta_b)) < 4.5
    assert deviation(x, ddrm_law(sampler.schedule, 0.1, eta_b)) > 6
    assert deviation(x, exact(PRIOR)) > 6  # the prior's covariance and A^T A do not commute


def test_ddrm_agrees_with_deepinv():
    image, sigma = (1, 4, 5), 0.2
    prior = GaussianMixturePrior(
        torch.randn(3, 20, generator=torch.Generator().manual_seed(0), dtype=DOUBLE), "equal", 0.3, image
    )
    mask = torch.rand(image, generator=torch.Generator().manual_seed(1)) > 0.4
    y = mask * torch.randn(image, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    ours = DDRM(prior, ForwardModel(Inpainting(mask), GaussianNoise(sigma)), steps=15, dtype=DOUBLE)
    physics = deepinv.physics.Inpainting(image, mask=mask.double(), noise_model=deepinv.physics.GaussianNoise(sigma))
    theirs = deepinv.sampling.DDRM(lambda x, s: prior(x, float(s)), sigmas=[*ours.schedule, 0.0], eps=1e-12)
    stream = ChainGenerators(3, range(2))
    with pytest.MonkeyPatch.context() as patch:  # deepinv divides its noise by the root of 2
        patch.setattr(torch, "randn_like", lambda x: math.sqrt(2) * stream.normal_like(x))
        x = theirs(y.repeat(2, 1, 1, 1), physics)
    torch.testing.assert_close(ours.sample(y, chains=2, seed=3).flat, x.double(), rtol=1e-4, atol=1e-4)


# --- DAPS


def test_daps_is_the_papers_recursion():
    settings = {"steps": 6, "sigma_max": 5.0, "langevin_steps": 8, "step_size": 0.02, "power": 2.0, "dtype": DOUBLE}

    def law(power: float) -> Law:
        sampler = DAPS(PRIOR, model(), **settings)
        state = Law(torch.zeros(3, dtype=DOUBLE), sampler.schedule[0] ** 2 * EYE)
        for i, sigma in enumerate(sampler.schedule):
            ends = [sigma ** (1 / 7), 0.01 ** (1 / 7)]
            levels = [(ends[0] + j / 5 * (ends[1] - ends[0])) ** 7 for j in range(6)]
            for now, after in itertools.pairwise(levels):
                K, k = denoise(now)
                state = state.push(EYE + (after - now) / now * (EYE - K), -(after - now) / now * k)
            step = 0.02 * (1 - 0.99 * i / 6)
            M, b, Q = EYE, torch.zeros(3, dtype=DOUBLE), 0 * EYE  # of the Langevin steps, from x_0
            H = power * A.T @ A / SIGMA**2 + EYE / sigma**2
            for _ in range(8):
                F = EYE - step * H
                M, b, Q = (
                    F @ M + step / sigma**2 * EYE,
                    F @ b + step * power * A.T @ Y / SIGMA**2,
                    F @ Q @ F.T + 2 * step * EYE,
                )
            state = state.push(M, b, Q)
            if i < 5:
                state = state.push(1.0, 0.0, sampler.schedule[i + 1] ** 2)
        return state

    x = draws(DAPS(PRIOR, model(), **settings))
    assert deviation(x, law(2.0)) < 4.5
    assert deviation(x, law(1.0)) > 6
    assert deviation(x, exact(PRIOR)) > 6


def test_the_levels_of_daps_are_the_published_ones():
    levels = DAPS(UNIT, model()).schedule
    assert len(levels) == 200
    assert levels[0] == 100
    assert levels[-1] == pytest.approx((0.1 ** (1 / 7) + (100 ** (1 / 7) - 0.1 ** (1 / 7)) / 200) ** 7)


# --- LGD-MC


def test_lgd_mc_with_many_samples_is_exact_for_an_isotropic_gaussian():
    def sampler(samples: int) -> LGDMC:
        return LGDMC(UNIT, model(), guidance="score", samples=samples, steps=100, dtype=DOUBLE)

    n = 1000
    # a hundred steps, and samples that are not infinitely many, leave some percent of the standard deviation
    assert deviation(draws(sampler(100), n), exact(UNIT)) < 4.5 + 2
    assert deviation(draws(sampler(1), n), exact(UNIT)) > 8


def test_one_sample_without_noise_is_dps():
    settings = {"steps": 1, "zeta": 0.2, "dtype": DOUBLE}
    wide = GaussianPrior(1.0, 100.0**2, SHAPE)
    one = LGDMC(wide, model(), samples=1, prior_std=1e-9, **settings).sample(Y, chains=5, seed=3)
    torch.testing.assert_close(one.samples, DPS(wide, model(), **settings).sample(Y, chains=5, seed=3).samples)


# --- nonlinear CT


RAYS = ParallelBeamCT((1, 8, 10), 12)
SMOOTH = torch.exp(-(torch.cdist(*[torch.cartesian_prod(torch.arange(8.0), torch.arange(10.0)).double()] * 2) ** 2) / 8)
BODY = GaussianPrior(0.0, 0.25 * SMOOTH + 1e-4 * torch.eye(80), (1, 8, 10))


def scan(photons: float, background: float = 0.0, rays=RAYS) -> ForwardModel:
    lines = PhysicalUnits(rays, physical_range=(0.0, 0.8))
    return ForwardModel(BeerLambert(lines, photons), PoissonNoise(background=background))


def test_the_exact_slope_is_that_of_the_likelihood():
    x = BODY.sample(2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    for forward_model in (
        scan(50.0, 2.0),
        ForwardModel(PhysicalUnits(RAYS, physical_range=(0.0, 0.8)), TransmissionNoise(50.0, 2.0)),
    ):
        y = forward_model.simulate(x[:1], generator=torch.Generator().manual_seed(1))[0]
        p = Scan.of(forward_model).lines(x).requires_grad_(True)
        log_l = TransmissionNoise(50.0, 2.0).log_prob(y, p)
        u, w = Scan.of(forward_model).slope(p.detach(), y, "poisson")
        torch.testing.assert_close(u, torch.autograd.grad(log_l.sum(), p)[0])
        assert bool((w >= y).all())


def test_the_other_slopes_are_those_of_their_squares():
    y = torch.tensor([0.0, 1.0, 5.0, 40.0], dtype=DOUBLE)
    p = torch.tensor([[3.0, 4.0, 2.0, 0.2]], dtype=DOUBLE, requires_grad=True)
    photons, background = 50.0, 2.0
    of_scan = Scan(RAYS, torch.tensor(photons), torch.tensor(background))
    gaussian = -0.5 * ((photons * torch.exp(-p) + background - y) ** 2 / y.clamp(min=1)).sum()
    torch.testing.assert_close(of_scan.slope(p.detach(), y, "gaussian")[0], torch.autograd.grad(gaussian, p)[0])
    u, w = of_scan.slope(p.detach(), y, "linearised")
    assert u[0, :2].tolist() == w[0, :2].tolist() == [0.0, 0.0]  # fewer counts than background
    line = -torch.log(torch.tensor(38.0 / 50.0, dtype=DOUBLE))
    assert float(u[0, 3]) == pytest.approx(float(38**2 / 40 * (line - 0.2)))


@pytest.mark.parametrize("rays", [RAYS, FanBeamCT((1, 8, 10), 12, source_distance=30.0, detector_distance=10.0)])
def test_subsets_are_the_views_of_the_scan(rays):
    forward_model = scan(50.0, 1.0, rays)
    x = BODY.sample(2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    y = forward_model.simulate(x[:1], generator=torch.Generator().manual_seed(1))[0]
    whole = Scan.of(forward_model)
    seen = torch.zeros_like(whole.lines(x))
    for first in range(5):
        part, counts = whole.subset(first, 5, y)
        torch.testing.assert_close(counts, y[:, first::5])
        seen[:, :, first::5] = part.lines(x)
    torch.testing.assert_close(seen, whole.lines(x))


def test_at_low_dose_the_exact_likelihood_beats_the_linearised_one():
    def error(photons: float, **settings) -> float:
        forward_model, total = scan(photons), 0.0
        for k in range(2):
            truth = BODY.sample(1, generator=torch.Generator().manual_seed(k), dtype=DOUBLE)
            y = forward_model.simulate(truth, generator=torch.Generator().manual_seed(100 + k))[0]
            sampler = NonlinearCT(BODY, forward_model, **({"steps": 30, "inner": 3, "dtype": DOUBLE} | settings))
            total += float((sampler.sample(y, chains=6, seed=0).mean - truth[0]).square().mean())
        return math.sqrt(total / 2)

    low = {name: error(10.0, likelihood=name) for name in ("poisson", "gaussian", "linearised")}
    assert low["poisson"] < 0.8 * low["linearised"]
    assert low["poisson"] < 0.8 * low["gaussian"]
    assert error(10.0, subsets=4) < 1.15 * low["poisson"]
    high = error(1e4), error(1e4, likelihood="linearised")
    assert high[0] == pytest.approx(high[1], rel=0.1)
    assert high[0] < 0.3 * low["poisson"]
    assert error(1e4, inner=0) > 2 * high[0]  # the bound alone is too cautious
    assert error(1e4, step=0.0) > 5 * high[0]  # the measurement matters


def test_at_high_dose_nonlinear_ct_is_exact_for_an_isotropic_gaussian():
    image, photons = (1, 3, 4), 2000.0
    rays = PhysicalUnits(ParallelBeamCT(image, 4), physical_range=(0.0, 0.1))
    prior = GaussianPrior(0.0, 1.0, image)
    forward_model = ForwardModel(rays, TransmissionNoise(photons))
    truth = prior.sample(1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    y = forward_model.simulate(truth, generator=torch.Generator().manual_seed(1))[0]
    line = ForwardModel(rays, GaussianNoise(1 / y.sqrt()))
    right = prior.posterior(line, -(y / photons).log())
    std = right.covariance.diagonal().sqrt()
    n = 300

    def misfit(**settings) -> float:
        sampler = NonlinearCT(prior, forward_model, **({"steps": 100, "inner": 8} | settings), dtype=DOUBLE)
        x = sampler.sample(y, chains=n, seed=0).flat.flatten(1)
        of_mean = ((x.mean(0) - right.mean.flatten()) / std).abs().max() * math.sqrt(n)
        of_std = (x.std(0) / std - 1).abs().max() * math.sqrt(2 * n)
        return float(max(of_mean, of_std))

    assert float(std.min()) < 0.5  # the measurement tells much more than the prior
    assert (
        misfit() < 4.5 + 1
    )  # 100 steps, and what is not Gaussian of 2000 counts, leave some percent of the standard deviation
    assert misfit(prior_std=0.3) > 10
    assert misfit(inner=0) > 10


def test_a_jump_start_saves_calls():
    forward_model = scan(1000.0)
    truth = BODY.sample(1, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    y = forward_model.simulate(truth, generator=torch.Generator().manual_seed(1))[0]
    near, full = (
        NonlinearCT(BODY, forward_model, steps=50, jump_start=start, inner=0, step=2.0, dtype=DOUBLE)
        for start in (0.5, None)
    )
    assert near.schedule[0] <= 0.5 < full.schedule[0]
    image = near.filtered_back_projection(y)
    assert float((image - truth).square().mean()) < 0.1  # in the prior's units
    a, b = near.sample(y, chains=6, seed=0), full.sample(y, chains=6, seed=0)
    assert 2 * a.diagnostics["network_calls"] < b.diagnostics["network_calls"]
    assert float((a.mean - b.mean).square().mean().sqrt()) < 0.15
    subsets = NonlinearCT(BODY, forward_model, steps=50, subsets=3, inner=0, dtype=DOUBLE).sample(y, chains=1, seed=0)
    assert subsets.diagnostics["forward_calls"] == 50
    assert b.diagnostics["forward_calls"] == 150


def test_nonlinear_ct_says_what_it_needs():
    with pytest.raises(
        TypeError, match=r"needs a BeerLambert operator with PoissonNoise, .* got GaussianBlur and GaussianNoise"
    ):
        NonlinearCT(BODY, ForwardModel(GaussianBlur((1, 8, 10), 1.0), GaussianNoise(1.0)))
    for arguments, words in [
        ({"likelihood": "exact"}, "likelihood = 'exact'; allowed are poisson, gaussian, linearised"),
        ({"subsets": 13}, "subsets = 13; it must be at least 1 and at most 12"),
        ({"subsets": 0}, "subsets = 0"),
        ({"step": -1.0}, "step = -1.0"),
        ({"inner": -1}, "inner = -1"),
        ({"jump_start": 1e-5}, "jump_start = 1e-05; it must be at least 0.01"),
    ]:
        with pytest.raises(ValueError, match=words):
            NonlinearCT(BODY, scan(10.0), **arguments)
    clamped = PhysicalUnits(RAYS, physical_range=(0.0, 0.8), clamp=True)
    with pytest.raises(TypeError, match="inner = 5: it needs line integrals that are affine in the image"):
        NonlinearCT(BODY, ForwardModel(clamped, TransmissionNoise(10.0)))
    y = torch.full((1, 12, len(RAYS.positions)), 5.0)
    x = NonlinearCT(BODY, ForwardModel(clamped, TransmissionNoise(10.0)), inner=0, steps=10).sample(y, chains=2, seed=0)
    assert bool(x.samples.isfinite().all())
    blurred = ForwardModel(BeerLambert(GaussianBlur((1, 8, 10), 1.0), 10.0), PoissonNoise())
    with pytest.raises(TypeError, match=r"\(views, detectors\) are needed, .* got GaussianBlur"):
        NonlinearCT(BODY, blurred, subsets=2)
    sampler = NonlinearCT(
        BODY, ForwardModel(BeerLambert(lambda x: x.flatten(1), 10.0), PoissonNoise()), inner=0, jump_start=1.0
    )
    with pytest.raises(TypeError, match="FunctionOperator has none"):
        sampler.sample(torch.ones(80), chains=1, seed=0)


# --- what all of them promise


class Black(Operator):
    differentiable = False

    def forward(self, x):
        return x.round()


class Offset(Operator):
    """An affine operator."""

    def __init__(self, linear_operator, offset: float) -> None:
        super().__init__()
        self.part, self.offset, self.image_shape = linear_operator, offset, linear_operator.image_shape

    @property
    def linear_part(self):
        return self.part

    def forward(self, x):
        return self.part(x) + self.offset


IMAGE = (3, 4, 6)
FEW = {
    DPS: {"steps": 12},
    PnPDM: {"iterations": 4, "steps": 8},
    PiGDM: {"steps": 12},
    DiffPIR: {"steps": 12},
    DDRM: {"steps": 8},
    DAPS: {"steps": 5, "langevin_steps": 6},
    LGDMC: {"steps": 12, "samples": 3},
}
SOLVERS = pytest.mark.parametrize("solver", FEW, ids=lambda solver: solver.__name__)
LINEAR = pytest.mark.parametrize("solver", [PiGDM, DiffPIR, DDRM], ids=lambda solver: solver.__name__)


def blur() -> ForwardModel:
    return ForwardModel(GaussianBlur(IMAGE, 1.0), GaussianNoise(0.1))


def measurement(forward_model: ForwardModel, prior: GaussianPrior) -> torch.Tensor:
    truth = prior.sample(1, generator=torch.Generator().manual_seed(0))
    return forward_model.simulate(truth, generator=torch.Generator().manual_seed(1))[0]


@pytest.mark.parametrize("solver", [*FEW, NonlinearCT], ids=lambda solver: solver.__name__)
def test_a_chain_depends_on_its_seed_and_index_only(solver):
    prior = GaussianPrior(0.1, 0.2, IMAGE)
    forward_model = scan(40.0, 1.0, ParallelBeamCT(IMAGE, 6)) if solver is NonlinearCT else blur()
    y = measurement(forward_model, prior)
    settings = FEW.get(solver, {"steps": 12, "subsets": 2})
    sampler = solver(prior, forward_model, **settings, dtype=DOUBLE)
    together = sampler.sample(y, chains=5, seed=1).samples
    assert together.shape == (5, 1, *IMAGE)
    assert together.dtype == DOUBLE
    torch.testing.assert_close(sampler.sample(y, chains=5, seed=1, batch_size=2).samples, together, rtol=0, atol=1e-9)
    torch.testing.assert_close(sampler.sample(y, chains=2, seed=1).samples, together[:2], rtol=0, atol=1e-9)
    assert not torch.allclose(sampler.sample(y, chains=5, seed=2).samples, together)
    single = solver(prior, forward_model.float(), **settings).sample(y, chains=5, seed=1).samples
    assert single.dtype == torch.float32


@SOLVERS
def test_the_record_says_what_was_done(solver):
    prior = Recorded(GaussianPrior(0.1, 0.2, IMAGE))
    calls = []
    operator = GaussianBlur(IMAGE, 1.0)
    forward_model = ForwardModel(operator, GaussianNoise(0.1))
    y = measurement(forward_model, prior.prior)
    sampler = solver(prior, forward_model, **FEW[solver])
    assert type(sampler).__name__ in sampler.plan
    operator.register_forward_hook(lambda *_: calls.append(1))
    seen = []
    posterior = sampler.sample(y, chains=5, seed=0, batch_size=3, on_sweep=seen.append)
    record = posterior.diagnostics
    assert record["sampler"] == solver.__name__
    assert record["batches"] == 2
    assert record["network_calls"] == len(prior.calls) > 0
    assert [s.iteration for s in seen] == [*range(1, len(sampler.schedule) + 1)] * 2
    assert [s.eta for s in seen] == sampler.schedule * 2
    assert seen[-1].network_calls == record["network_calls"] // 2
    differentiates = solver in (DPS, PiGDM, LGDMC)
    assert record["network_gradients"] == (record["network_calls"] if differentiates else 0)
    # each gradient or adjoint goes with a forward call; LGD-MC has 3 samples in one call; the measurement is checked by 2, and the
    # fit of each draw by one more
    forward = (len(calls) - 2 - record["fit"]["draws"]) * (3 if solver is LGDMC else 1)
    assert record["forward_calls"] == pytest.approx(2 * forward, abs=2)
    assert record["warnings"] == []
    assert record["convergence"] is None
    assert json.loads(json.dumps(record)) == record
    for name, value in FEW[solver].items():
        assert (len(record["schedule"]) if name == "iterations" else record[name]) == value
    rows = record["iterations"]
    assert [[row["eta"] for row in batch] for batch in rows] == [record["schedule"]] * 2
    assert sum(row["network_calls"] for batch in rows for row in batch) == record["network_calls"]
    assert sum(row["forward_calls"] for batch in rows for row in batch) == record["forward_calls"]
    assert 0 < sum(row["seconds"] for batch in rows for row in batch) <= record["seconds"]


@SOLVERS
def test_the_measurement_matters_also_complex_and_affine(solver):
    image = (1, 6, 8)
    prior = GaussianPrior(0.0, 0.25, image)
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)) > 0.3
    more = {DPS: {"steps": 60}, LGDMC: {"steps": 60}, PnPDM: {"steps": 40, "iterations": 25}}
    settings = FEW[solver] | more.get(solver, {})
    for operator in (MRI(image, mask), Offset(CompressedSensing(image, 38, seed=0), 0.3)):
        forward_model = ForwardModel(operator, GaussianNoise(0.1))
        y = measurement(forward_model, prior)
        x = solver(prior, forward_model, **settings).sample(y, chains=8, seed=0).flat
        wild = prior.sample(64, generator=torch.Generator().manual_seed(5))
        assert (
            float(forward_model.log_likelihood(x, y).mean()) > float(forward_model.log_likelihood(wild, y).mean()) + 20
        )


@SOLVERS
def test_a_trained_prior_computes_in_its_own_precision(solver):
    prior = Prior.from_pretrained("fashion_mnist")
    forward_model = ForwardModel(GaussianBlur((1, 28, 28), 1.0), GaussianNoise(0.1))
    few = {PnPDM: {"iterations": 1, "steps": 4}, DAPS: {"steps": 1, "ode_steps": 2, "langevin_steps": 2}}
    sampler = solver(prior, forward_model, **few.get(solver, {"steps": 3}), dtype=DOUBLE)
    posterior = sampler.sample(torch.zeros(1, 28, 28), chains=1, seed=0)
    assert posterior.samples.dtype == DOUBLE
    assert bool(posterior.samples.isfinite().all())
    assert {p.dtype for p in prior.parameters()} == {torch.float32}
    assert all(p.grad is None for p in prior.parameters())


@LINEAR
def test_linear_solvers_refuse_what_is_not_linear_and_gaussian(solver):
    name = "PiGDM" if solver is PiGDM else solver.__name__
    with pytest.raises(TypeError, match=rf"{name} needs a linear operator and Gaussian noise, got PhaseRetrieval"):
        solver(GaussianPrior(0.0, 1.0, IMAGE), ForwardModel(PhaseRetrieval(IMAGE), GaussianNoise(0.1)))
    with pytest.raises(TypeError, match="got GaussianBlur and PoissonNoise"):
        solver(GaussianPrior(0.0, 1.0, IMAGE), ForwardModel(GaussianBlur(IMAGE, 1.0), PoissonNoise(10.0)))


@pytest.mark.parametrize("solver", [DPS, DAPS, LGDMC], ids=lambda solver: solver.__name__)
def test_gradient_solvers_refuse_what_has_none(solver):
    with pytest.raises(
        TypeError, match=r"needs a differentiable likelihood; of Black and GaussianNoise one says it is not"
    ):
        solver(UNIT, ForwardModel(Black(), GaussianNoise(1.0)))


@LINEAR
def test_coloured_noise_and_operators_without_a_spectrum_are_whitened(solver):
    prior = GaussianPrior(0.0, 1.0, SHAPE)
    R = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=DOUBLE)
    root = torch.linalg.cholesky(R)
    coloured = ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(covariance=R))
    white_A = torch.linalg.solve_triangular(root, A, upper=False)
    white = ForwardModel(MatrixOperator(white_A, SHAPE), GaussianNoise(1.0))
    y_white = torch.linalg.solve_triangular(root, Y[:, None], upper=False)[:, 0]
    settings = FEW[solver] | {"dtype": DOUBLE}
    x = solver(prior, coloured, **settings).sample(Y, chains=3, seed=0).samples
    torch.testing.assert_close(x, solver(prior, white, **settings).sample(y_white, chains=3, seed=0).samples)


def test_large_images_are_solved_by_conjugate_gradients_or_refused(monkeypatch):
    prior = GaussianPrior(0.0, 0.25, IMAGE)
    forward_model = ForwardModel(Convolution(IMAGE, torch.rand(3, 3, dtype=DOUBLE) / 5), GaussianNoise(0.2))
    y = measurement(forward_model, prior).double()
    for solver in (PiGDM, DiffPIR):
        small = solver(prior, forward_model, **FEW[solver], dtype=DOUBLE).sample(y, chains=3, seed=0)
        with monkeypatch.context() as patch:
            patch.setattr(linear, "MOST_DIAGONALISED", 10)
            large = solver(prior, forward_model, **FEW[solver], dtype=DOUBLE).sample(y, chains=3, seed=0)
        torch.testing.assert_close(large.samples, small.samples, rtol=1e-3, atol=1e-3)
        assert large.diagnostics["forward_calls"] > small.diagnostics["forward_calls"]
    monkeypatch.setattr(linear, "MOST_DIAGONALISED", 10)
    with pytest.raises(
        ValueError, match=r"DDRM needs the singular values of Convolution, .* at most 10 entries .* has 72"
    ):
        DDRM(prior, forward_model)
    monkeypatch.setattr(linear, "MOST_ITERATIONS", 1)
    with pytest.warns(RuntimeWarning, match="conjugate gradients stopped at a relative residual"):
        DiffPIR(prior, forward_model, steps=2).sample(y, chains=1, seed=0)


@pytest.mark.parametrize(
    ("solver", "arguments", "words"),
    [
        (PnPDM, {"rho": 0.1}, "rho = 0.1; it must be at least 0.3"),
        (PnPDM, {"rho_min": 0}, "rho_min = 0; it must be above 0"),
        (PnPDM, {"decay": 1.1}, "decay = 1.1; it must be above 0 and at most 1"),
        (PnPDM, {"iterations": 0}, "iterations = 0"),
        (PnPDM, {"steps": 1}, "steps = 1; it must be at least 2"),
        (PnPDM, {"restarts": 0}, "restarts = 0"),
        (PnPDM, {"process": "vpp"}, "process = 'vpp'; allowed are vp, ve, iddpm, edm"),
        (PnPDM, {"likelihood": "exact"}, "likelihood = 'exact'"),
        (PiGDM, {"eta": 1.5}, "eta = 1.5; it must be at least 0 and at most 1"),
        (PiGDM, {"guidance": "strong"}, "guidance = 'strong'; allowed are 'adaptive' and 'score'"),
        (PiGDM, {"prior_std": math.nan}, "prior_std = nan"),
        (PiGDM, {"steps": 1001}, "steps = 1001; allowed are 1 to 1000"),
        (DiffPIR, {"lambda_": 0}, "lambda_ = 0"),
        (DiffPIR, {"zeta": -0.1}, "zeta = -0.1"),
        (DiffPIR, {"spacing": "cubic"}, "spacing = 'cubic'; allowed are 'uniform' and 'quad'"),
        (DDRM, {"eta_b": 2}, "eta_b = 2"),
        (DDRM, {"null": -1}, "null = -1"),
        (DAPS, {"sigma_max": 0.01}, "sigma_max = 0.01; it must be at least 0.1"),
        (DAPS, {"step_size": math.inf}, "step_size = inf"),
        (DAPS, {"langevin_steps": 0}, "langevin_steps = 0"),
        (DAPS, {"power": -1}, "power = -1"),
        (LGDMC, {"samples": 0}, "samples = 0"),
        (LGDMC, {"guidance": "strong"}, "guidance = 'strong'; allowed are 'normalised' and 'score'"),
    ],
)
def test_bad_arguments_are_named(solver, arguments, words):
    with pytest.raises(ValueError, match=words):
        solver(UNIT, model(), **arguments)


@SOLVERS
def test_bad_calls_are_named(solver):
    sampler = solver(UNIT, model(), **FEW[solver])
    for arguments, words in [
        ({"chains": 0, "seed": 0}, "chains = 0"),
        ({"chains": 1, "seed": -1}, "seed = -1"),
        ({"chains": 1, "seed": 0, "batch_size": 0}, "batch_size = 0"),
        ({"chains": 1, "seed": 0, "draws": 0}, "draws = 0"),
        ({"chains": 1, "seed": 0, "draws": 99}, "draws = 99"),
        ({"chains": 1, "seed": 0, "thin": 2}, "thin = 2"),
    ]:
        with pytest.raises(ValueError, match=words):
            sampler.sample(Y, **arguments)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        sampler.sample(torch.zeros(3), chains=1, seed=0)
    with pytest.raises(ValueError, match="operator takes images of shape"):
        solver(GaussianPrior(0.0, 1.0, (3, 1, 3)), model())


def test_noise_levels_stay_within_the_priors_range():
    prior = Recorded(UNIT)
    prior.sigma_min, prior.sigma_max = 0.05, 30.0
    for solver, settings in FEW.items():
        solver(prior, model(), **settings).sample(Y, chains=2, seed=0)
        levels = [sigma for _, sigma in prior.calls]
        assert max(levels) <= 30 * (1 + 1e-6), solver
        assert min(levels) >= 0.05 * (1 - 1e-6), solver
        prior.calls = []
    with pytest.raises(ValueError, match="outside of the noise levels"):
        PnPDM(prior, model(), rho=40.0)
    with pytest.raises(ValueError, match="outside of the noise levels"):
        PnPDM(prior, model(), rho_min=0.01)


def test_langevin_steps_that_diverge_are_an_error():
    for sampler in (
        DAPS(UNIT, model(0.001), steps=5),
        PnPDM(UNIT, model(0.001), iterations=5, likelihood=UnadjustedLangevin(step_size=1e-3)),
    ):
        with pytest.raises(SamplingError, match=r"no longer finite after step \d+ at sigma = .*lower .*step_size"):
            sampler.sample(Y, chains=2, seed=0)


def test_ddim_noise_is_ancestral_at_eta_1():
    bar, bar_next = 0.3, 0.5
    c_1, c_2 = ddim_noise(bar, bar_next, 1.0)
    assert c_1**2 == pytest.approx((1 - bar_next) / (1 - bar) * (1 - bar / bar_next))  # the posterior variance of DDPM
    assert c_1**2 + c_2**2 == pytest.approx(1 - bar_next)
    assert ddim_noise(bar, bar_next, 0.0) == pytest.approx((0.0, math.sqrt(0.5)))
