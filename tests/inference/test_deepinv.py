"""deepinv both ways, against the installed package."""

from __future__ import annotations

import copy
import importlib
import math
import re
import sys
from pathlib import Path

import deepinv
import numpy as np
import pytest
import torch
import yaml
from deepinv import physics as theirs
from deepinv.utils import TensorList
from torch import Tensor

from dpnp_inference import Annealing, PerturbAndSolve
from dpnp_inference.deepinv import DeepinvDenoiser, DPnPReconstructor, PhysicsOperator, from_physics, measurement
from dpnp_inference.deepinv.physics import build_physics
from dpnp_inference.proximal import ClosedForm
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.noise import GaussianNoise, JointNoise, LogPoissonNoise, PoissonNoise

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Complex modules"
)  # what PyTorch says when deepinv builds complex physics


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


FILTER = uniform(1, 1, 3, 3, seed=7)
MASK = (uniform(1, 1, 6, 5, seed=8) > 0.4).float()
COILS = torch.complex(uniform(1, 3, 6, 5, seed=9), uniform(1, 3, 6, 5, seed=10) - 0.5)

# a physics, the image's shape, and whether its singular values are used
LINEAR = {
    "denoising": (lambda: theirs.Denoising(), (1, 6, 5), True),
    "inpainting": (lambda: theirs.Inpainting((3, 6, 5), mask=0.5, rng=seeded()), (3, 6, 5), True),
    "demosaicing": (lambda: theirs.Demosaicing((3, 6, 4)), (3, 6, 4), True),
    "decolorize": (lambda: theirs.Decolorize(), (3, 4, 5), True),
    "blur_fft": (lambda: theirs.BlurFFT((1, 6, 5), filter=FILTER), (1, 6, 5), True),
    "blur_fft_rgb": (lambda: theirs.BlurFFT((3, 4, 6), filter=FILTER.expand(1, 3, 3, 3)), (3, 4, 6), True),
    "single_pixel_fast": (lambda: theirs.SinglePixelCamera(12, (1, 8, 4), fast=True, rng=seeded()), (1, 8, 4), True),
    "single_pixel": (lambda: theirs.SinglePixelCamera(12, (1, 8, 4), fast=False, rng=seeded()), (1, 8, 4), True),
    "mri": (lambda: theirs.MRI(mask=MASK, img_size=(2, 6, 5)), (2, 6, 5), True),
    "blur_valid": (lambda: theirs.Blur(filter=FILTER), (1, 7, 6), False),
    "blur_circular": (lambda: theirs.Blur(filter=FILTER, padding="circular"), (3, 7, 6), False),
    "downsampling": (lambda: theirs.Downsampling((1, 8, 8), "gaussian", 2, padding="circular"), (1, 8, 8), False),
    "sensing": (lambda: theirs.CompressedSensing(10, (1, 6, 5), rng=seeded()), (1, 6, 5), False),
    "sensing_complex": (
        lambda: theirs.CompressedSensing(10, (1, 6, 5), dtype=torch.cfloat, rng=seeded()),
        (1, 6, 5),
        False,
    ),
    "multi_coil_mri": (lambda: theirs.MultiCoilMRI(MASK, COILS, img_size=(2, 6, 5)), (2, 6, 5), False),
    "tomography": (lambda: theirs.Tomography(7, 12, normalize=True), (1, 12, 12), False),
    "fan_beam": (lambda: theirs.Tomography(7, 12, fan_beam=True, normalize=True), (1, 12, 12), False),
    "unmixing": (lambda: theirs.HyperSpectralUnmixing(E=2, C=5), (2, 6, 5), False),
    "spectral_imaging": (lambda: theirs.CompressiveSpectralImaging((7, 9, 7), rng=seeded()), (7, 9, 7), False),
    "composed": (
        lambda: theirs.ComposedLinearPhysics(
            theirs.Blur(filter=FILTER, padding="circular"), theirs.Inpainting((1, 6, 6), mask=0.5, rng=seeded())
        ),
        (1, 6, 6),
        False,
    ),
    "pansharpen": (lambda: theirs.Pansharpen((3, 8, 8), factor=2), (3, 8, 8), False),
    "stack": (lambda: theirs.stack(theirs.Denoising(), theirs.Blur(filter=FILTER)), (1, 6, 5), False),
    "no_adjoint": (lambda: theirs.LinearPhysics(A=lambda x: x[:, :, 1:] - 2 * x[:, :, :-1]), (1, 6, 5), False),
}
NONLINEAR = {
    "random_phase_retrieval": (lambda: theirs.RandomPhaseRetrieval(20, (1, 4, 3), rng=seeded()), (1, 4, 3)),
    "structured_phase_retrieval": (
        lambda: theirs.StructuredRandomPhaseRetrieval((1, 4, 4), (1, 6, 6), 2),
        (1, 4, 4),
    ),
    "unwrapping": (lambda: theirs.SpatialUnwrapping(threshold=0.4), (1, 4, 3)),
    "of_a_function": (lambda: theirs.Physics(A=lambda x: (x**2).flatten(1)), (1, 4, 3)),
    "nonlinear_stack": (
        lambda: theirs.stack(theirs.Denoising(), theirs.Physics(A=lambda x: x.exp())),
        (1, 4, 3),
    ),
}


@pytest.fixture(params=[*LINEAR, *NONLINEAR])
def any_case(request: pytest.FixtureRequest):
    """A physics and the image's shape."""
    torch.manual_seed(0)  # some physics draw from PyTorch's global generator
    build, shape, *_ = {**LINEAR, **NONLINEAR}[request.param]
    return build(), shape


@pytest.fixture(params=LINEAR)
def linear_case(request: pytest.FixtureRequest):
    """The linear part of a physics' operator, the image's shape, and whether singular values are used."""
    torch.manual_seed(0)
    build, shape, diagonal = LINEAR[request.param]
    linear = PhysicsOperator(build(), shape).linear_part
    assert linear is not None
    return linear, shape, diagonal


def flat(y: Tensor | TensorList) -> Tensor:
    """Their measurements as ours."""
    return torch.cat([part.flatten(1) for part in y], 1) if isinstance(y, TensorList) else y


def dense(linear, shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix (m, d)."""
    d = math.prod(shape)
    return linear(torch.eye(d, dtype=dtype).reshape(d, *shape)).reshape(d, -1).T


def state_of(physics: theirs.Physics) -> dict:
    parts = [physics, *getattr(physics, "physics_list", [])]
    return {
        "tensors": [
            copy.deepcopy(dict(module.named_buffers()) | dict(module.named_parameters()))
            for part in parts
            for module in part.modules()
        ],
        "solver": [(part.solver, part.max_iter, part.tol) for part in parts],
        "generators": [
            value.get_state() for part in parts for value in vars(part).values() if isinstance(value, torch.Generator)
        ],
        "gradients": [p.requires_grad for part in parts for p in part.parameters()],
    }


def assert_same(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def test_operator_is_the_physics_in_our_units_and_leaves_it_alone(any_case):
    physics, shape = any_case
    before = state_of(physics)
    operator = PhysicsOperator(physics, shape, value_range=(-1, 3))
    u = uniform(3, *shape, seed=1)
    x = -1 + 4 * u
    y = operator(x)
    operator.to(torch.float64)(x.double())
    assert_same(before, state_of(physics))
    is_complex = (
        isinstance(physics, theirs.CompressedSensing | theirs.RandomPhaseRetrieval) and physics.dtype.is_complex
    )
    expected = flat(physics.A(u.cfloat() if is_complex else u))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-6)
    assert operator.image_shape == shape
    torch.testing.assert_close(operator(x.double()).to(y.dtype), y, rtol=1e-4, atol=1e-5)


def test_linear_part_and_adjoint(linear_case):
    linear, shape, _ = linear_case
    for dtype, exact in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        x = normal(3, *shape, dtype=dtype)
        y = linear(x)
        assert y.real.dtype == dtype
        v = torch.randn(y.shape, generator=seeded(2), dtype=y.dtype)
        image = linear.adjoint(v)
        assert image.dtype == dtype
        assert image.shape == x.shape
        left, right = (v.conj() * y).flatten(1).real.sum(1), (image * x).flatten(1).sum(1)
        torch.testing.assert_close(left, right, rtol=exact, atol=10 * exact)
        A = dense(linear, shape, dtype)
        torch.testing.assert_close(y.flatten(1), x.flatten(1).to(A.dtype) @ A.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(image.flatten(1), (v.flatten(1) @ A.conj()).real, rtol=1e-4, atol=1e-5)
    A = torch.cat([A.real, A.imag]) if A.is_complex() else A
    assert linear.norm() == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-4)


def test_functions_of_the_gram_matrix(linear_case):
    linear, shape, diagonal = linear_case
    assert linear.has_gram_function == diagonal
    x = normal(2, *shape)
    if not diagonal:
        with pytest.raises(NotImplementedError, match="closed form"):
            linear.gram_function(lambda s: s, x)
        return
    A = dense(linear, shape)
    s, V = torch.linalg.eigh(A.T @ A)
    for f in (lambda s: 1 / (0.01 + s), lambda s: (1 + s).sqrt(), lambda s: s):
        expected = x.flatten(1) @ (V * f(s.clamp(min=0))) @ V.T
        torch.testing.assert_close(linear.gram_function(f, x).flatten(1), expected, rtol=0, atol=1e-4)
        single = linear.gram_function(f, x.float())
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.flatten(1).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "case", ["blur_fft", "sensing_complex", "multi_coil_mri", "tomography", "pansharpen", *NONLINEAR]
)
def test_likelihood_gradient(case):
    torch.manual_seed(0)
    build, shape, *_ = {**LINEAR, **NONLINEAR}[case]
    model = from_physics(build(), shape, noise=GaussianNoise(0.5))
    x = 0.5 * normal(2, *shape, dtype=torch.float64).requires_grad_(True)
    y = model.simulate(0.2 * normal(1, *shape, seed=1), generator=seeded(2))[0]
    (gradient,) = torch.autograd.grad(model.log_likelihood(x, y).sum(), x)
    step = 1e-3 * normal(2, *shape, seed=3)
    with torch.no_grad():
        difference = model.log_likelihood(x + step, y) - model.log_likelihood(x - step, y)
    slope = (gradient * step).flatten(1).sum(1)
    torch.testing.assert_close(2 * slope, difference, rtol=2e-3, atol=1e-4 * float(step.norm()))


NOISES = {
    "gaussian": theirs.GaussianNoise(0.3),
    "poisson": theirs.PoissonNoise(0.25),
    "poisson_counts": theirs.PoissonNoise(0.25, normalize=False),
    "poisson_clipped": theirs.PoissonNoise(0.25, clip_positive=True),
    "poisson_gaussian": theirs.PoissonGaussianNoise(0.25, 0.2),
    "poisson_gaussian_clipped": theirs.PoissonGaussianNoise(0.25, 0.2, clip_positive=True),
    "poisson_gaussian_without_sigma": theirs.PoissonGaussianNoise(0.25, 0.0),
    "log_poisson": theirs.LogPoissonNoise(N0=6.0, mu=0.7),
    "laplace": theirs.LaplaceNoise(0.3),
    "rician": theirs.RicianNoise(0.3),
}


@pytest.mark.parametrize("name", NOISES)
def test_noise_has_the_same_law(name):
    # every pixel has the same noiseless value; the expected log density of their data is that of ours
    n = 20_000
    physics = theirs.Denoising(NOISES[name])
    u = torch.full((1, 1, 1, n), 0.8)
    torch.manual_seed(0)
    their_y = physics(u)
    one = from_physics(physics, (1, 1, 1))
    our_y = one.simulate(2 * u.reshape(n, 1, 1, 1) - 1, generator=seeded(1))
    their_y = measurement(their_y.reshape(n, 1, 1, 1), one)
    assert bool(their_y.isfinite().all())
    for statistic in (
        lambda y: y,
        lambda y: y.square(),
        lambda y: one.log_likelihood(torch.full((n, 1, 1, 1), 0.6), y)[:, None],
        lambda y: one.log_likelihood(torch.full((n, 1, 1, 1), 0.1), y)[:, None],
    ):
        a, b = statistic(their_y).double(), statistic(our_y).double()
        error = math.sqrt(float(a.var() + b.var()) / n)
        assert abs(float(a.mean() - b.mean())) < 4 * error


def test_densities_are_those_of_the_equations():
    u, y = uniform(1, 1, 2, 3) + 0.1, torch.tensor([[[0.0, 0.25, 0.5], [1.0, 0.75, 2.0]]])
    rate = u[0].double() / 0.25
    counts = torch.distributions.Poisson(rate).log_prob(4 * y.double()).sum()
    for noise, data in ((theirs.PoissonNoise(0.25), y), (theirs.PoissonNoise(0.25, normalize=False), 4 * y)):
        model = from_physics(theirs.Denoising(noise), (1, 2, 3))
        assert float(model.log_likelihood(2 * u - 1, data)) == pytest.approx(float(counts), rel=1e-5)
    with pytest.raises(ValueError, match="counts"):
        from_physics(theirs.Denoising(theirs.PoissonNoise(0.25)), (1, 2, 3)).log_likelihood(2 * u - 1, y + 0.1)

    physics = theirs.CompressedSensing(4000, (1, 1, 2), dtype=torch.cfloat, rng=seeded())
    physics.noise_model = theirs.GaussianNoise(0.3)
    u, clean = u[:, :, :1, :2], physics.A(u[:, :, :1, :2].cfloat())
    torch.manual_seed(0)
    data = physics(u.cfloat())
    for part in (data - clean).real, (data - clean).imag:
        assert float(part.square().mean()) == pytest.approx(0.3**2 / 2, rel=4 * math.sqrt(2 / 4000))
    parts = torch.view_as_real(data - clean).double()
    expected = torch.distributions.Normal(0.0, 0.3 / math.sqrt(2), validate_args=False).log_prob(parts).sum()
    assert float(from_physics(physics).log_likelihood(2 * u - 1, data[0])) == pytest.approx(float(expected), rel=1e-5)


def test_a_stack_has_a_law_for_each_part():
    blur = theirs.Blur(filter=FILTER, padding="circular", noise_model=theirs.GaussianNoise(0.1))
    camera = theirs.Denoising(theirs.PoissonNoise(0.25))
    physics = theirs.stack(blur, camera)
    u = uniform(2, 1, 4, 5)
    torch.manual_seed(0)
    y = physics(u)
    model = from_physics(physics, (1, 4, 5))
    assert isinstance(model.noise, JointNoise)
    joined = measurement(y, model)
    parts = [
        from_physics(part, (1, 4, 5)).log_likelihood(2 * u - 1, y_part)
        for part, y_part in zip((blur, camera), y, strict=True)
    ]
    torch.testing.assert_close(model.log_likelihood(2 * u - 1, joined), sum(parts), rtol=1e-6, atol=1e-4)
    with pytest.raises(TypeError, match="TensorList"):
        measurement(y[0], model)
    with pytest.raises(TypeError, match="no stack"):
        measurement(y, from_physics(blur, (1, 4, 5)))
    with pytest.raises(ValueError, match="1 parts"):
        measurement(y[:1] if isinstance(y[:1], TensorList) else [y[0]], model)

    two = theirs.stack(blur, theirs.Denoising(theirs.GaussianNoise(0.3)))
    gaussian = from_physics(two, (1, 4, 5)).noise
    assert isinstance(gaussian, GaussianNoise)  # closed forms stay
    assert sorted({round(float(s), 6) for s in gaussian.sigma}) == [0.1, 0.3]


def test_a_count_of_zero_in_log_poisson_data():
    model = from_physics(theirs.Denoising(theirs.LogPoissonNoise(N0=2.0, mu=0.5)), (1, 1, 2))
    assert isinstance(model.noise, LogPoissonNoise)
    y = measurement(torch.tensor([[[math.inf, -math.log(3 / 2) / 0.5]]]), model)
    u = torch.tensor([[[[0.3, 0.6]]]])
    rate = 2 * torch.exp(-0.5 * u.double()).flatten()
    expected = torch.distributions.Poisson(rate).log_prob(torch.tensor([0.0, 3.0])).sum()
    assert float(model.log_likelihood(2 * u - 1, y)) == pytest.approx(float(expected), rel=1e-5)


def test_photons_are_not_negative_and_may_have_a_background():
    physics = theirs.Denoising(theirs.PoissonNoise(0.5))
    dark = -1.5 * torch.ones(1, 1, 1, 1)
    y = torch.zeros(1, 1, 1)
    assert float(from_physics(physics, (1, 1, 1)).log_likelihood(dark, y)) == 0
    assert float(from_physics(physics, (1, 1, 1), clamp=False).log_likelihood(dark, y)) == -math.inf
    assert float(from_physics(physics, (1, 1, 1), background=0.1).log_likelihood(dark, y)) == pytest.approx(-0.1)


def proximal_law(physics, shape, sigma: float, eta: float, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of L(z; y) N(z; x, η² I), by dense algebra in [0, 1] units."""
    A = dense(lambda u: physics.A(u.float()).double(), shape)
    covariance = torch.linalg.inv(A.T @ A / sigma**2 + torch.eye(A.shape[1]) / eta**2)
    return covariance @ (A.T @ y.flatten().double() / sigma**2 + x.flatten().double() / eta**2), covariance


PROXIMAL = {
    "blur_fft": (lambda: theirs.BlurFFT((1, 3, 4), filter=FILTER), (1, 3, 4), ClosedForm(exact_splitting=False)),
    "blur_valid": (lambda: theirs.Blur(filter=FILTER), (1, 4, 4), PerturbAndSolve(exact_splitting=False)),
    "decolorize": (lambda: theirs.Decolorize(), (3, 2, 2), ClosedForm(exact_splitting=False)),
}


@pytest.mark.parametrize("case", PROXIMAL)
def test_proximal_draws_have_the_dense_law(case):
    build, shape, sampler = PROXIMAL[case]
    physics, sigma, eta, n = build(), 0.2, 0.3, 5_000
    physics.noise_model = theirs.GaussianNoise(sigma)
    u, centre = uniform(1, *shape), uniform(1, *shape, seed=1)
    y = physics(u)[0]
    mean, covariance = proximal_law(physics, shape, sigma, eta, y, centre)
    model, blank = from_physics(physics, shape), torch.zeros(1, *shape)
    x = (2 * centre - 1).expand(n, *shape)
    state = sampler.init(model.homogeneous, model.homogeneous_measurement(y, blank), x)
    _, z, _ = sampler.step(state, x, 2 * eta, generator=ChainGenerators(0, range(n)))
    draws = (z.flatten(1).double() + 1) / 2
    assert_normal(draws, mean, covariance)


def assert_normal(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Mean and covariance within five standard errors."""
    n, std = len(draws), covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / std).abs().max()) < 5 / math.sqrt(n)
    spread = (torch.outer(std, std) ** 2 + covariance**2).sqrt()
    assert float(((draws.T.cov() - covariance) / spread).abs().max()) < 5 / math.sqrt(n)


@pytest.mark.parametrize("case", ["blur_fft", "blur_valid"])
def test_their_prox_of_perturbed_data_is_a_draw(case):
    # prox_l2(x + η ε₁, y + σ ε₂, γ = η²/σ²) is affine in (ε₁, ε₂): its law follows from where it takes 0 and the unit vectors
    build, shape, _ = PROXIMAL[case]
    physics, sigma, eta = build().clone(), 0.2, 0.3
    centre, y = uniform(1, *shape, seed=1), physics.A(uniform(1, *shape))
    d, m = centre.numel(), y.numel()

    def prox(e_1: Tensor, e_2: Tensor) -> Tensor:
        options = {} if isinstance(physics, theirs.DecomposablePhysics) else {"max_iter": 200, "tol": 1e-7}
        z = physics.prox_l2(centre + eta * e_1, y + sigma * e_2, gamma=eta**2 / sigma**2, **options)
        return z.flatten(1).double()

    e_1 = torch.eye(d, d + m).T.reshape(d + m, *shape)
    e_2 = torch.eye(d + m)[:, d:].reshape(d + m, *y.shape[1:])
    start = prox(torch.zeros_like(centre), torch.zeros_like(y))
    J = prox(e_1, e_2) - start  # (d + m, d)
    mean, covariance = proximal_law(physics, shape, sigma, eta, y[0], centre)
    torch.testing.assert_close(start[0], mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(J.T @ J, covariance, rtol=0, atol=1e-4 * eta**2)


def test_a_wrong_adjoint_is_not_used(caplog):
    class Wrong(theirs.LinearPhysics):
        def A(self, x, **_):  # noqa: N802
            return x[:, :, 1:] - 2 * x[:, :, :-1]

        def A_adjoint(self, y, **_):  # noqa: N802
            return torch.nn.functional.pad(y, (0, 0, 0, 1))

    class Failing(Wrong):
        def A_adjoint(self, y, **_):  # noqa: N802
            raise NotImplementedError("not today")

    y = normal(2, 1, 3, 4)
    for kind, reason in ((Wrong, "is not the transpose"), (Failing, "fails .NotImplementedError: not today")):
        linear = PhysicsOperator(kind(), (1, 4, 4), (0, 1)).linear_part
        assert re.search(f"{kind.__name__}.A_adjoint {reason}.*automatic differentiation", caplog.text)
        A = dense(linear, (1, 4, 4))
        torch.testing.assert_close(linear.adjoint(y).flatten(1), y.flatten(1) @ A)
    caplog.clear()
    PhysicsOperator(theirs.CompressiveSpectralImaging((4, 8, 8), rng=seeded()))  # an even size
    assert "CompressiveSpectralImaging.A_adjoint is not the transpose" in caplog.text


class Numpy(theirs.LinearPhysics):
    """Outside of PyTorch, as physics by way of other packages are; a wrong factor spoils the adjoint."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.factor = np.random.default_rng(0).normal(size=(3, 8)).astype("float32"), factor

    def A(self, x, **_):  # noqa: N802
        return torch.from_numpy(x.numpy().reshape(len(x), -1) @ self.matrix.T)

    def A_adjoint(self, y, **_):  # noqa: N802
        return torch.from_numpy(self.factor * y.numpy() @ self.matrix).reshape(-1, 1, 2, 4)


def test_a_physics_outside_of_pytorch_has_the_gradient_of_its_adjoint():
    model = from_physics(Numpy(), (1, 2, 4), noise=GaussianNoise(0.5))
    assert model.operator.differentiable
    A = torch.from_numpy(Numpy().matrix)
    x = normal(2, 1, 2, 4, dtype=torch.float32).requires_grad_(True)
    y = normal(3, dtype=torch.float32)
    (gradient,) = torch.autograd.grad(model.log_likelihood(x, y).sum(), x)
    u = (x.detach() + 1) / 2
    torch.testing.assert_close(gradient.flatten(1), (y - u.flatten(1) @ A.T) @ A / 0.25 / 2, rtol=1e-4, atol=1e-4)
    step = normal(2, 1, 2, 4, seed=1, dtype=torch.float32)
    _, forwards = torch.autograd.functional.jvp(model.operator, x, step)
    torch.testing.assert_close(forwards, step.flatten(1) @ A.T / 2, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"Numpy.A_adjoint is not the transpose.*no transpose of A"):
        PhysicsOperator(Numpy(2.0), (1, 2, 4))
    values_only = theirs.Physics(A=lambda x: torch.from_numpy(x.numpy() ** 2))
    assert not PhysicsOperator(values_only, (1, 2, 4)).differentiable


def test_singular_values_that_are_none_are_not_used(caplog):
    physics = theirs.DecomposablePhysics(
        V_adjoint=lambda x: 2 * x, V=lambda x: x * 2, mask=uniform(1, 1, 3, 4), img_size=(1, 3, 4)
    )
    linear = PhysicsOperator(physics).linear_part
    assert not linear.has_gram_function
    assert "no singular value decomposition" in caplog.text


def test_arguments_and_how_an_image_is_taken(tmp_path):
    blur = theirs.Blur(padding="circular")
    operator = PhysicsOperator(blur, (1, 6, 5), arguments={"filter": FILTER})
    u = uniform(2, 1, 6, 5)
    torch.testing.assert_close(operator(2 * u - 1), theirs.Blur(filter=FILTER, padding="circular").A(u))
    np.save(tmp_path / "mask.npy", MASK.numpy())
    mri = theirs.MRI(img_size=(2, 6, 5))
    before = state_of(mri)
    real = PhysicsOperator(mri, image_as="pair", arguments={"mask": str(tmp_path / "mask.npy")})
    assert real.image_shape == (1, 6, 5)
    expected = theirs.MRI(mask=MASK, img_size=(2, 6, 5)).A(torch.cat([u, torch.zeros_like(u)], 1))
    torch.testing.assert_close(real(2 * u - 1), expected)
    assert not real.linear_part.has_gram_function
    A, v = dense(real.linear_part, (1, 6, 5)), normal(2, 2, 6, 5)
    torch.testing.assert_close(real.linear_part.adjoint(v).flatten(1), v.flatten(1) @ A)
    assert_same(before, state_of(mri))
    scaled = theirs.Physics(A=lambda x, exposure: exposure * x**2)
    torch.testing.assert_close(PhysicsOperator(scaled, (1, 6, 5), arguments={"exposure": 3})(2 * u - 1), 3 * u**2)


def test_moves_and_casts_keep_complex_tensors():
    operator = PhysicsOperator(theirs.MultiCoilMRI(MASK, COILS, img_size=(2, 6, 5)))
    x = normal(2, 2, 6, 5)
    before = operator(x)
    torch.testing.assert_close(operator.to(torch.float64)(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.to("cpu").to(torch.float32)(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(copy.deepcopy(operator)(x), before, rtol=0, atol=0)


def test_state_dict_brings_values_in_both_precisions():
    here, there = (PhysicsOperator(theirs.Blur(filter=k), (1, 4, 5)) for k in (FILTER, FILTER.flip(-1)))
    for dtype in (torch.float32, torch.float64):
        x = normal(2, 1, 4, 5, dtype=dtype)
        assert not torch.allclose(here(x), there(x))
    here.load_state_dict(there.state_dict())
    for dtype in (torch.float32, torch.float64):
        x = normal(2, 1, 4, 5, dtype=dtype)
        torch.testing.assert_close(here(x), there(x), rtol=0, atol=0)


def test_what_is_seen_and_shown():
    physics = theirs.Inpainting((1, 2, 2), mask=torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    operator = PhysicsOperator(physics)
    assert operator.unseen.tolist() == [[[False, True], [False, False]]]
    torch.testing.assert_close(operator.display(torch.full((1, 2, 2), 0.5)), torch.zeros(1, 2, 2))
    assert PhysicsOperator(theirs.Denoising(), (1, 2, 2)).unseen is None
    tomography = PhysicsOperator(LINEAR["tomography"][0](), (1, 12, 12))
    picture = tomography.display(tomography(torch.zeros(1, 1, 12, 12))[0])
    assert picture.aminmax() == (-1, 1)
    assert PhysicsOperator(LINEAR["sensing"][0]()).display(torch.zeros(10)) is None


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PhysicsOperator(torch.nn.Identity()), TypeError, "physics is a Identity"),
        (lambda: PhysicsOperator(theirs.Denoising()), ValueError, "image_shape = None.*Denoising"),
        (
            lambda: PhysicsOperator(theirs.Decolorize(), (1, 4, 4)),
            ValueError,
            r"Decolorize.A fails on images \(3, 1, 4, 4\)",
        ),
        (lambda: PhysicsOperator(theirs.Denoising(), (3, 4, 4), image_as="pair"), ValueError, r"'pair'.*\(3, 4, 4\)"),
        (lambda: PhysicsOperator(theirs.Denoising(), (3, 4, 4), image_as="octet"), ValueError, "'octet'"),
        (
            lambda: PhysicsOperator(theirs.Physics(A=torch.rand_like), (1, 4, 4)),
            ValueError,
            "Physics.A gives different measurements",
        ),
        (
            lambda: PhysicsOperator(theirs.Physics(A=lambda x: x - x.mean()), (1, 4, 4)),
            ValueError,
            "depends on the other images",
        ),
        (
            lambda: PhysicsOperator(theirs.Physics(A=lambda x: x.sum(0)), (1, 4, 4)),
            ValueError,
            "first dimension must be the batch",
        ),
        (
            lambda: PhysicsOperator(theirs.Inpainting((1, 4, 4), mask=torch.ones(5, 1, 4, 4)), (1, 4, 4)),
            ValueError,
            "Inpainting.A",
        ),
        (lambda: PhysicsOperator(theirs.LinearPhysics(A=lambda x: x + 1), (1, 4, 4)), ValueError, "not linear"),
        (
            lambda: PhysicsOperator(
                theirs.ComposedPhysics(theirs.Denoising(), theirs.stack(theirs.Denoising(), theirs.Denoising())),
                (1, 4, 4),
            ),
            TypeError,
            "A gives a TensorList",
        ),
        (
            lambda: PhysicsOperator(theirs.Blur(), (1, 4, 4), arguments={"filter": "x.pt"}),
            ValueError,
            "filter = 'x.pt'",
        ),
        (lambda: from_physics(theirs.Blur(filter=FILTER), (1, 4, 4)), TypeError, "has no noise.*give noise"),
        (
            lambda: from_physics(theirs.Denoising(theirs.UniformNoise()), (1, 4, 4)),
            TypeError,
            "UniformNoise of Denoising",
        ),
        (lambda: from_physics(theirs.Denoising(theirs.GammaNoise()), (1, 4, 4)), TypeError, "GammaNoise.*give noise"),
        (
            lambda: from_physics(theirs.Denoising(theirs.GaussianNoise(torch.tensor([0.1, 0.2]))), (1, 4, 4)),
            ValueError,
            r"GaussianNoise.sigma has shape \(2,\)",
        ),
        (
            lambda: from_physics(theirs.Denoising(theirs.GaussianNoise(), sensor_model=torch.round), (1, 4, 4)),
            TypeError,
            "sensor_model; give noise",
        ),
        (
            lambda: from_physics(
                theirs.Denoising(theirs.GaussianNoise(), sensor_model=lambda y: y.clamp(0, 1)), (1, 4, 4)
            ),
            TypeError,
            "sensor_model; give noise",
        ),
        (
            lambda: from_physics(theirs.SpatialUnwrapping(noise_model=theirs.GaussianNoise(0.1)), (1, 4, 4)),
            TypeError,
            "SpatialUnwrapping measures by a forward of its own",
        ),
        (lambda: DeepinvDenoiser(GaussianPrior(0.0, 1.0, (1, 1, 1)), (1, 0)), ValueError, r"value_range = \(1, 0\)"),
    ],
)
def test_refusals(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_sensor_that_does_nothing_and_noise_of_ones_own():
    for sensor in (torch.nn.Identity(), lambda measured: measured):
        assert isinstance(from_physics(theirs.Denoising(sensor_model=sensor), (1, 2, 2)).noise, GaussianNoise)
    rounded = theirs.Denoising(theirs.UniformNoise(), sensor_model=torch.round)
    assert isinstance(from_physics(rounded, (1, 2, 2), noise=PoissonNoise(3.0)).noise, PoissonNoise)


def test_without_deepinv_the_message_says_what_to_install(monkeypatch):
    for name in [
        name for name in sys.modules if name == "dpnp_inference.deepinv" or name.startswith("dpnp_inference.deepinv.")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(ImportError, match=r"pip install dpnp-imaging\[deepinv\]"):
        importlib.import_module("dpnp_inference.deepinv")


def random_gaussian(shape: tuple[int, int, int], value_range: tuple[float, float] = (-1, 1)) -> GaussianPrior:
    """A Gaussian prior with a full covariance around the middle of a value range."""
    d, (low, high) = math.prod(shape), value_range
    root = normal(d, d, seed=11) * (high - low) / (4 * math.sqrt(d))
    return GaussianPrior((low + high) / 2, root @ root.T + 1e-3 * torch.eye(d), shape)


def test_denoiser_is_the_prior_in_their_units():
    shape, low, scale = (1, 2, 3), -1.0, 4.0
    prior = random_gaussian(shape, (low, low + scale))
    denoiser = DeepinvDenoiser(prior, value_range=(low, low + scale))
    assert isinstance(denoiser, deepinv.models.Denoiser)
    # by hand: u ~ N((m - low)/scale, C/scale²)
    C = (prior.eigenvectors * prior.eigenvalues) @ prior.eigenvectors.T / scale**2
    m = (prior.mean - low) / scale
    u = normal(3, *shape).requires_grad_(True)
    sigmas = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    gains = [C @ torch.linalg.inv(C + s**2 * torch.eye(6)) for s in sigmas]
    expected = torch.stack([m + gain @ (x.flatten() - m) for gain, x in zip(gains, u, strict=True)]).reshape(3, *shape)
    torch.testing.assert_close(denoiser(u, sigmas), expected)
    torch.testing.assert_close(denoiser(u, sigmas.reshape(3, 1, 1, 1)), expected)
    torch.testing.assert_close(denoiser(u, 0.5)[1], expected[1])
    torch.testing.assert_close(denoiser(u, sigmas[1:2])[1], expected[1])
    (gradient,) = torch.autograd.grad(denoiser(u, sigmas).sum(), u)
    torch.testing.assert_close(gradient.flatten(1), torch.stack([gain.sum(0) for gain in gains]))
    mixture = GaussianMixturePrior(normal(2, 6), "equal", 0.1, shape)
    mixture.sigma_min, mixture.sigma_max = 0.1, 10.0  # as a trained prior has them
    x = u.detach()
    with pytest.raises(ValueError, match="outside of the noise levels"):
        DeepinvDenoiser(mixture)(x, 0.01)
    clamped = DeepinvDenoiser(mixture, clamp_sigma=True)
    torch.testing.assert_close(clamped(x, 0.01), clamped(x, 0.05))
    torch.testing.assert_close(clamped(x, 100.0), clamped(x, 5.0))


def test_denoiser_in_their_algorithms():
    shape = (1, 6, 6)
    prior = random_gaussian(shape)
    u = (prior.sample(2, generator=seeded()) + 1) / 2
    physics = theirs.Inpainting(shape, mask=0.7, rng=seeded(), noise_model=theirs.GaussianNoise(0.1, rng=seeded()))
    y = physics(u)
    denoiser = DeepinvDenoiser(prior)
    mean = torch.stack([from_posterior(prior, physics, shape, y_i).mean for y_i in y])
    mean = (mean.reshape(2, *shape) + 1) / 2

    # plug and play with the denoiser of a Gaussian prior at the noise of the data ends at the posterior mean
    model = deepinv.optim.PGD(
        prior=deepinv.optim.PnP(denoiser), data_fidelity=deepinv.optim.L2(), stepsize=1.0, g_param=0.1, max_iter=400
    )
    with torch.no_grad():
        torch.testing.assert_close(model(y, physics), mean.float(), rtol=0, atol=1e-3)

    torch.manual_seed(0)
    draw = deepinv.sampling.DiffPIR(denoiser, deepinv.optim.L2(), sigma=0.1, max_iter=40)(y.float(), physics)
    assert float((draw - u).square().mean()) < 0.5 * float((y - u).square().mean())


def test_their_diffusion_with_our_denoiser_draws_from_the_prior():
    shape, n = (1, 3, 4), 1000
    prior = random_gaussian(shape, (0, 3))
    flow = deepinv.sampling.DPS(
        DeepinvDenoiser(prior, (0, 3)), num_steps=200, weight=0.0, solver="euler", alpha=0.0, rng=seeded()
    )
    draws = flow(torch.zeros(n, *shape), theirs.Denoising(theirs.GaussianNoise(0.1))).flatten(1).double()
    C = (prior.eigenvectors * prior.eigenvalues) @ prior.eigenvectors.T
    assert_normal(draws, prior.mean / 3, C / 9)


def from_posterior(prior: GaussianPrior, physics, shape: tuple[int, int, int], y: Tensor):
    model = from_physics(physics, shape)
    return prior.posterior(model, measurement(y, model).double())


RECONSTRUCTIONS = {
    "blur": lambda: theirs.Blur(filter=FILTER, padding="circular", noise_model=theirs.GaussianNoise(0.3)),
    "stack": lambda: theirs.stack(
        theirs.BlurFFT((1, 3, 4), filter=FILTER, noise_model=theirs.GaussianNoise(0.3)),
        theirs.Denoising(theirs.GaussianNoise(0.4)),
    ),
}


@pytest.mark.parametrize("case", RECONSTRUCTIONS)
def test_reconstructor_gives_the_exact_posterior(case):
    shape, n = (1, 3, 4), 400
    prior, physics = random_gaussian(shape, (0, 2)), RECONSTRUCTIONS[case]()
    torch.manual_seed(0)
    y = physics(prior.sample(2, generator=seeded(1)) / 2)
    before, random = state_of(physics), torch.random.get_rng_state()
    model = DPnPReconstructor(prior, value_range=(0, 2), chains=n)
    assert isinstance(model, deepinv.models.Reconstructor)
    mean, variance = model.sample(y, physics)
    assert_same(before, state_of(physics))
    assert torch.equal(random, torch.random.get_rng_state())
    assert mean.shape == variance.shape == (2, *shape)
    for i in range(2):
        forward_model = from_physics(physics, shape, value_range=(0, 2))
        exact = prior.posterior(
            forward_model, measurement([part[i] for part in y] if case == "stack" else y[i], forward_model)
        )
        draws = exact.sample(20_000, generator=seeded(2)).flatten(1) / 2
        std = draws.std(0)
        assert float(((mean[i].flatten() - exact.mean.flatten() / 2) / std).abs().max()) < 5 / math.sqrt(n)
        assert float((variance[i].flatten() / std**2 - 1).abs().max()) < 5 * math.sqrt(2 / n) + 0.03


def test_reconstructor_seeds_and_arguments():
    shape = (1, 3, 4)
    prior, physics = random_gaussian(shape), theirs.Blur(padding="circular", noise_model=theirs.GaussianNoise(0.3))
    filters = torch.cat([FILTER, FILTER.flip(-1)])
    y = torch.cat([theirs.Blur(filter=k[None], padding="circular").A(uniform(1, *shape)) for k in filters])
    model = DPnPReconstructor(prior, chains=3, image_shape=shape, annealing=Annealing(constant=0, decay=2, final=0))
    means = model(y, physics, filter=filters)
    assert means.shape == (2, *shape)
    torch.testing.assert_close(means[:1], model(y[:1], physics, filter=filters[:1]), rtol=0, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(means[:1], model(y[:1], physics, filter=filters[1:]), rtol=0, atol=1e-3)
    first = model.posteriors(y, physics, filter=FILTER)
    again = model.posteriors(y, physics, seed=0, filter=FILTER)
    other = model.posteriors(y, physics, seed=1, filter=FILTER)
    assert torch.equal(first[1].samples, again[1].samples)
    assert not torch.equal(first[1].samples, other[1].samples)
    twice = model(torch.cat([y[:1], y[:1]]), physics, filter=FILTER)
    assert not torch.equal(twice[0], twice[1])  # randomness of its own
    with pytest.raises(ValueError, match=r"'filter': 2\} rows and there are 1"):
        model(y[:1], physics, filter=filters)
    with pytest.raises(ValueError, match="no measurement"):
        model(y[:0], physics, filter=FILTER)
    with pytest.raises(TypeError, match="UniformNoise"):
        model(y, theirs.Denoising(theirs.UniformNoise()))
    with pytest.raises(ValueError, match="at least 2 draws"):
        DPnPReconstructor(prior, chains=1, image_shape=shape).sample(y[:1], physics, filter=FILTER)


def test_physics_from_plain_values(tmp_path):
    np.save(tmp_path / "filter.npy", FILTER.double().numpy())
    blur = build_physics(
        {
            "class_path": "deepinv.physics.Blur",
            "init_args": {"filter": str(tmp_path / "filter.npy"), "padding": "valid"},
        },
        0,
    )
    assert torch.equal(blur.filter, FILTER)
    made = {"class_path": "deepinv.physics.functional.gaussian_blur", "init_args": {"sigma": [1.0, 0.5]}}
    noise = {"class_path": "deepinv.physics.GaussianNoise", "init_args": {"sigma": 0.3}}
    blur = build_physics({"class_path": "deepinv.physics.Blur", "init_args": {"filter": made, "noise_model": noise}}, 0)
    assert torch.equal(blur.filter, theirs.functional.gaussian_blur(sigma=(1.0, 0.5)))
    assert float(blur.noise_model.sigma) == pytest.approx(0.3)
    parts = [{"class_path": "deepinv.physics.Denoising"}, {"class_path": "deepinv.physics.Decolorize"}]
    stacked = build_physics(
        {"class_path": "deepinv.physics.StackedLinearPhysics", "init_args": {"physics_list": parts}}, 0
    )
    assert [type(part).__name__ for part in stacked.physics_list] == ["Denoising", "Decolorize"]
    explicit = {
        "class_path": "deepinv.physics.Inpainting",
        "init_args": {"img_size": [1, 2, 2], "mask": [[1, 0], [0, 1]]},
    }
    assert build_physics(explicit, 0).mask.flatten().tolist() == [1, 0, 0, 1]

    before = torch.random.get_rng_state()
    drawn = [
        PhysicsOperator({"class_path": f"deepinv.physics.{name}", "init_args": arguments}, seed=seed)
        for name, arguments in (
            ("CompressedSensing", {"m": 5, "img_size": [1, 2, 3]}),
            ("StructuredRandom", {"img_size": [1, 4, 4], "output_size": [1, 4, 4]}),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    for first, again, other in (drawn[:3], drawn[3:]):
        x = torch.zeros(1, *first.image_shape)
        assert torch.equal(first(x), again(x))
        assert not torch.equal(first(x), other(x))

    for description, error, message in (
        ({"class_path": "deepinv.physics.Nothing"}, ValueError, "deepinv.physics.Nothing: AttributeError"),
        ({"class_path": "no_such_package.Physics"}, ValueError, "no_such_package.Physics: ModuleNotFoundError"),
        ({"class_path": "deepinv.physics.Tomography", "init_args": {"angels": 3}}, ValueError, "TypeError"),
        ({"class_path": "deepinv.physics.Blur", "args": {}}, ValueError, "class_path and init_args"),
        ({"mask": 3}, TypeError, "physics is a dict"),
        ({"class_path": "torch.nn.Identity"}, TypeError, "physics is a Identity"),
    ):
        with pytest.raises(error, match=message):
            PhysicsOperator(description, (1, 4, 4))


def test_command_line_refuses_in_one_message(tmp_path, monkeypatch):
    from dpnp_inference.cli import main

    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / "inference" / "deepinv.yaml").read_text())
    config["operator"]["init_args"]["physics"]["init_args"]["img_width"] = -1
    Path("bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(["--config", "bad.yaml"])
    assert stop.value.code not in (0, None)
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.yaml"]


def test_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "deepinv.md").read_text()
    monkeypatch.setattr("dpnp_inference.dpnp.Annealing", lambda: Annealing(constant=0, decay=1, final=0))  # for speed
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    shipped = yaml.safe_load((ROOT / "configs" / "inference" / "deepinv.yaml").read_text())
    assert yaml.safe_load(config)["operator"] == shipped["operator"]
