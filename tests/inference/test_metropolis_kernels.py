"""Proximal samplers that move by proposals: their laws against closed forms and quadrature, and what they do at zero likelihood."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from dpnp_inference import ChainGenerators
from dpnp_inference.proximal import HMC, MALA, EllipticalSlice
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise, Noise
from dpnp_shared.operators import DitheredQuantisation, MatrixOperator, Operator

SHAPE = (1, 2, 3)
D = 6
KERNELS = (MALA(steps=60, warmup=60), HMC(steps=10, leapfrogs=6, warmup=30), EllipticalSlice(steps=40))
P_VALUE = 1e-4  # about a hundred Kolmogorov-Smirnov tests are made


def name(kernel):
    return type(kernel).__name__


def draw(kernel, model, y, x, eta, *, n, draws=1, start=None):
    """The last draws (n, d) of n independent chains at the centre ``x`` (1, C, H, W), and what all draws did."""
    centre = x.expand(n, -1, -1, -1)
    state = kernel.init(model, y, centre if start is None else start.expand(n, -1, -1, -1))
    generator, infos = ChainGenerators(0, range(n)), []
    for _ in range(draws):
        state, z, info = kernel.step(state, centre, eta, generator=generator)
        infos.append(info)
    return z.flatten(1), infos


def linear_problem():
    A = torch.randn(4, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 2
    model = ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(0.3))
    x = torch.full((1, *SHAPE), 0.3, dtype=torch.float64)
    return model, A, torch.tensor([0.5, -1.0, 0.2, 0.7], dtype=torch.float64), x


def check_gaussian(draws, mean, covariance):
    """Along random directions, and the whole covariance by the trace of its whitened sample version (5 standard errors)."""
    for u in torch.randn(6, D, generator=torch.Generator().manual_seed(11), dtype=torch.float64):
        std = float((u @ covariance @ u).sqrt())
        assert kstest(((draws @ u - u @ mean) / std).numpy(), "norm").pvalue > P_VALUE
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).T, upper=False)
    assert float(white.square().mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / white.numel()))


@pytest.mark.parametrize(
    "kernel",
    [
        *KERNELS,
        HMC(steps=60, leapfrogs=3, warmup=0, first_step=0.55),  # most proposals are refused
        EllipticalSlice(steps=120, most_proposals=2),  # most ellipses are given up
    ],
    ids=["mala", "hmc", "slice", "hmc-large-step", "slice-bounded"],
)
def test_linear_gaussian_law(kernel):
    model, A, y, x = linear_problem()
    draws, infos = draw(kernel, model, y, x, 0.7, n=1000)
    covariance = torch.linalg.inv(A.T @ A / 0.3**2 + torch.eye(D).double() / 0.7**2)
    check_gaussian(draws, covariance @ (A.T @ y / 0.3**2 + x.flatten() / 0.7**2), covariance)
    acceptance = float(infos[-1].acceptance.mean())
    if isinstance(kernel, MALA):
        assert acceptance == pytest.approx(kernel.target, abs=0.1)
    if isinstance(kernel, HMC):
        assert acceptance > kernel.target - 0.1 if kernel.warmup else acceptance < 0.5
    assert float(infos[-1].non_finite.sum()) == 0


class Product(Operator):
    """``(x_1², x_1 x_2)``: two curved modes."""

    def forward(self, x):
        a, b = x.flatten(1).T
        return torch.stack([a**2, a * b], dim=1)


class Root(Operator):
    """``(|x_1|, √|x_1 x_2|)``: kinks, and a gradient that is infinite on the axes."""

    differentiable = False

    def forward(self, x):
        a, b = x.flatten(1).T
        return torch.stack([a.abs(), (a * b).abs().sqrt()], dim=1)


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [*((kernel, Product()) for kernel in KERNELS), (EllipticalSlice(steps=40), Root())],
    ids=["mala", "hmc", "slice", "slice-kinks"],
)
def test_nonlinear_law_against_quadrature(kernel, operator):
    model, eta = ForwardModel(operator, GaussianNoise(0.3)), 0.6
    y = torch.tensor([0.4, 0.3], dtype=torch.float64)
    x = torch.tensor([0.15, -0.2], dtype=torch.float64).reshape(1, 1, 1, 2)
    grid = torch.linspace(-3.5, 3.5, 801, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    log_p = model.log_likelihood(points.reshape(-1, 1, 1, 2), y) - (points - x.flatten()).square().sum(1) / (2 * eta**2)
    p = (log_p - log_p.max()).exp().reshape(801, 801)
    draws, _ = draw(kernel, model, y, x, eta, n=1500, draws=4)
    for values, marginal in ((draws[:, 0], p.sum(1)), (draws[:, 1], p.sum(0))):
        cdf = ((marginal.cumsum(0) - marginal / 2) / marginal.sum()).numpy()
        assert kstest(values.numpy(), lambda v, cdf=cdf: np.interp(v, grid.numpy(), cdf)).pvalue > P_VALUE
    # how the two depend on each other, within 4.5 standard errors
    product = draws.prod(1)
    expected = float((p.flatten() * points.prod(1)).sum() / p.sum())
    assert float(product.mean()) == pytest.approx(expected, abs=4.5 * float(product.std()) / math.sqrt(1500))


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_one_bit_law_against_quadrature(kernel):
    operator = DitheredQuantisation(SHAPE, looks=2, dither=0.5)
    model, eta = ForwardModel(operator, DitheredLogisticNoise(0.1)), 0.8
    y = 2 * torch.randint(2, (2, *SHAPE), generator=torch.Generator().manual_seed(5)).double() - 1
    x = torch.zeros(1, *SHAPE, dtype=torch.float64)
    draws, _ = draw(kernel, model, y, x, eta, n=1000, draws=2)
    grid = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    for i in range(D):  # pixels are independent
        bits, thresholds = y.flatten(1)[:, i, None], operator.thresholds.flatten(1)[:, i, None]
        log_p = -(grid**2) / (2 * eta**2) - torch.log1p(torch.exp(-bits * (grid - thresholds) / 0.1)).sum(0)
        p = (log_p - log_p.max()).exp()
        cdf = ((p.cumsum(0) - p / 2) / p.sum()).numpy()
        assert kstest(draws[:, i].numpy(), lambda v, cdf=cdf: np.interp(v, grid.numpy(), cdf)).pvalue > P_VALUE


class Cliff(Noise):
    """Gaussian, and beyond 0.5 what ``beyond`` says."""

    def __init__(self, beyond):
        super().__init__()
        self.beyond = beyond

    def sample(self, clean, generator=None):
        return clean

    def log_prob(self, y, clean):
        value = -0.5 * (y - clean).square().flatten(1).sum(1)
        return torch.where(clean.flatten(1).amax(1) > 0.5, self.beyond, value)


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
@pytest.mark.parametrize("beyond", [math.nan, -math.inf, math.inf])
def test_non_finite_likelihoods_are_zero_and_counted(kernel, beyond):
    model = ForwardModel(MatrixOperator(torch.eye(D, dtype=torch.float64), SHAPE), Cliff(beyond))
    x, eta = torch.zeros(1, *SHAPE, dtype=torch.float64), 0.5
    draws, infos = draw(kernel, model, torch.zeros(D).double(), x, eta, n=1000, draws=2)
    assert float(sum(info.non_finite.sum() for info in infos)) > 0
    # pixels are independent normal ones cut off at 0.5
    scale = eta / math.sqrt(1 + eta**2)
    normal = torch.distributions.Normal(0.0, scale)
    top = normal.cdf(torch.tensor(0.5).double())
    for i in range(D):
        cdf = lambda v: (normal.cdf(torch.as_tensor(v)) / top).clamp(max=1).numpy()  # noqa: E731
        assert kstest(draws[:, i].numpy(), cdf).pvalue > P_VALUE


@pytest.mark.parametrize("kernel", [MALA(), HMC(), EllipticalSlice()], ids=name)
def test_a_start_of_zero_likelihood_is_left(kernel):
    model = ForwardModel(MatrixOperator(torch.eye(D, dtype=torch.float64), SHAPE), Cliff(math.nan))
    x = torch.full((1, *SHAPE), -2.0, dtype=torch.float64)
    draws, _ = draw(kernel, model, torch.zeros(D).double(), x, 0.3, n=5, start=x + 2.6)
    assert float(draws.max()) <= 0.5
    assert bool(torch.isfinite(draws).all())


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_streams_stay_apart_over_many_draws(kernel):
    # chain 1 is alone, or beside chains whose slices take more and fewer proposals
    model, _, y, _ = linear_problem()
    model.noise.sigma.fill_(0.05)
    x = torch.tensor([0.0, 1.0, 30.0], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, *SHAPE)

    def chain_1(rows):
        state, generator = kernel.init(model, y, x[rows]), ChainGenerators(7, rows)
        for eta in (0.7, 0.7, 0.3):
            state, z, _ = kernel.step(state, x[rows], eta, generator=generator)
        return z[rows.index(1)]

    # 100 trajectories amplify the rounding of products with one and with three rows; other numbers would differ by 0.1
    torch.testing.assert_close(chain_1([1]), chain_1([0, 1, 2]), rtol=0, atol=1e-4)
    torch.testing.assert_close(chain_1([1]), chain_1([2, 1]), rtol=0, atol=1e-4)


class Counting(MatrixOperator):
    """Counts the images that it is applied to."""

    images = 0

    def forward(self, x):
        self.images += len(x)
        return super().forward(x)


@pytest.mark.parametrize("kernel", [MALA(), HMC(), EllipticalSlice()], ids=name)
def test_forward_calls_are_counted(kernel):
    _, A, y, x = linear_problem()
    operator = Counting(A, SHAPE)
    _, infos = draw(kernel, ForwardModel(operator, GaussianNoise(0.1)), y, x, 0.7, n=7, draws=2)
    assert sum(info.forward_calls for info in infos) == pytest.approx(operator.images / 7, abs=2)


def test_hmc_freezes_its_step_sizes_while_eta_stays():
    model, _, y, x = linear_problem()
    generator, kernel = ChainGenerators(0, range(1)), HMC(steps=2, leapfrogs=5, warmup=4)
    state, _, first = kernel.step(kernel.init(model, y, x), x, 0.7, generator=generator)
    state_2, _, second = kernel.step(state, x, 0.7, generator=generator)
    assert torch.equal(state.log_s, state_2.log_s)
    assert (first.forward_calls, second.forward_calls) == (31, 11)
    state_3, _, _ = kernel.step(state_2, x, 0.5, generator=generator)
    assert not torch.equal(state_2.log_s, state_3.log_s)


def test_hmc_draws_a_gaussian_without_likelihood_at_once():
    model = ForwardModel(MatrixOperator(torch.zeros(1, D, dtype=torch.float64), SHAPE), GaussianNoise(1.0))
    x = torch.full((1, *SHAPE), 0.3, dtype=torch.float64)
    draws, infos = draw(HMC(steps=3, warmup=20), model, torch.zeros(1).double(), x, 2.0, n=1000, start=x + 9)
    assert float(infos[0].acceptance.min()) == 1
    check_gaussian(draws, x.flatten(), 4 * torch.eye(D).double())


def test_a_slice_given_up_leaves_the_chain_where_it_was():
    model, _, _, x = linear_problem()
    model.noise.sigma.fill_(1e-6)
    y = model.operator(x)[0]  # the start is the peak
    draws, infos = draw(EllipticalSlice(steps=1, most_proposals=1), model, y, x, 0.7, n=20)
    assert torch.equal(draws, x.expand(20, -1, -1, -1).flatten(1))
    assert float(infos[0].acceptance.sum()) == 0
