import math
import warnings

import pytest
import torch
from scipy.stats import kstest

from dpnp_inference import ChainGenerators
from dpnp_inference.proximal import (
    HMC,
    MALA,
    ClosedForm,
    EllipticalSlice,
    PerturbAndSolve,
    PixelwiseSlice,
    choose_proximal,
)
from dpnp_inference.proximal.perturb_and_solve import (
    chebyshev_root,
    conjugate_gradients,
    largest_eigenvalue,
    matrix_polynomial,
)
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise, Noise
from dpnp_shared.operators import (
    DitheredQuantisation,
    GaussianBlur,
    HighDynamicRange,
    LinearOperator,
    MatrixOperator,
    PhaseRetrieval,
    RandomInpainting,
    SuperResolution,
)

SHAPE = (1, 4, 6)
D = 24
KERNELS = (
    ClosedForm(),
    PerturbAndSolve(),
    MALA(steps=10, warmup=10),
    HMC(steps=3, leapfrogs=4, warmup=5),
    EllipticalSlice(steps=10),
)


def operators() -> dict[str, LinearOperator]:
    A = torch.randn(10, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 5
    return {
        "inpainting": RandomInpainting(SHAPE, missing=0.4),
        "super-resolution": SuperResolution(SHAPE, 2),
        "blur": GaussianBlur(SHAPE, 0.8),
        "matrix": MatrixOperator(A, SHAPE),
    }


def dense_law(model: ForwardModel, y: torch.Tensor, x: torch.Tensor, eta: float, *, split: float = 0.0):
    """Mean (d,) and covariance (d, d) of the proximal law for noise covariance R - split AA^T, by dense linear algebra."""
    A, R = model.linear_gaussian_dense(SHAPE)
    precision = torch.linalg.inv(R - split * A @ A.T + 1e-12 * torch.eye(len(R)).double())
    covariance = torch.linalg.inv(A.T @ precision @ A + torch.eye(D).double() / eta**2)
    return covariance @ (A.T @ precision @ y.flatten() + x.flatten() / eta**2), covariance


def check_law(draws: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> None:
    """Kolmogorov-Smirnov tests of independent draws (n, d) along random directions and coordinate axes."""
    directions = torch.randn(6, D, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    for u in (*directions, *torch.eye(D).double()[:3]):
        std = float((u @ covariance @ u).sqrt())
        p = kstest(((draws @ u - u @ mean) / std).numpy(), "norm").pvalue
        assert p > 1e-4  # 200 such tests are made
    # the whole covariance, by the trace of its whitened sample version
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).T, upper=False)
    assert float(white.square().mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / white.numel()))


def one_problem(operator, noise):
    model = ForwardModel(operator, noise)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    return model, model.simulate(x, generator=generator)[0], torch.zeros(1, *SHAPE, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [
        (ClosedForm(exact_splitting=False), 0.2),
        (ClosedForm(exact_splitting=False), 2.0),
        (ClosedForm(), 0.1),
        (PerturbAndSolve(exact_splitting=False, most_diagonalised=0), 0.7),
        (PerturbAndSolve(exact_splitting=False, tolerance=1e-8, most_diagonalised=0), 5.0),
        (PerturbAndSolve(most_diagonalised=0), 0.1),
        (PerturbAndSolve(most_diagonalised=0), 0.25),
        (PerturbAndSolve(most_diagonalised=0), 0.7),
        (PerturbAndSolve(tolerance=1e-8, most_diagonalised=0), 5.0),
        (PerturbAndSolve(), 0.7),
        (PerturbAndSolve(exact_splitting=False), 5.0),
    ],
    ids=[
        "closed-0.2",
        "closed-2",
        "splitting-0.1",
        "cg-0.7",
        "cg-5",
        "cg-split-0.1",
        "cg-split-0.25",
        "cg-split-0.7",
        "cg-split-5",
        "diagonalised-split-0.7",
        "diagonalised-5",
    ],
)
def test_law_of_linear_gaussian_models(name, sampler, eta):
    model, y, x = one_problem(operators()[name], GaussianNoise(0.3))
    n = 2000
    state = sampler.init(model, y, x)
    _, z, info = sampler.step(state, x.expand(n, -1, -1, -1), eta, generator=ChainGenerators(0, range(n)))
    mean, covariance = dense_law(model, y, x, eta, split=min(eta**2, sampler.split_variance(state)))
    check_law(z.reshape(n, D), mean, covariance)
    if info.residual is not None:
        assert float(info.residual.max()) <= sampler.tolerance


def test_coloured_noise():
    A = torch.randn(5, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 5
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 4
    covariance = root @ root.T + 0.05 * torch.eye(5).double()
    model, y, x = one_problem(MatrixOperator(A, SHAPE), GaussianNoise(covariance=covariance))
    for sampler in (
        ClosedForm(exact_splitting=False),
        PerturbAndSolve(exact_splitting=False, tolerance=1e-8),
        PerturbAndSolve(tolerance=1e-8),
        PerturbAndSolve(tolerance=1e-8, most_diagonalised=0),
    ):
        n, state = 2000, sampler.init(model, y, x)
        for eta in (0.1, 0.6):
            _, z, _ = sampler.step(state, x.expand(n, -1, -1, -1), eta, generator=ChainGenerators(0, range(n)))
            check_law(z.reshape(n, D), *dense_law(model, y, x, eta, split=min(eta**2, sampler.split_variance(state))))


def test_exact_splitting_pins_seen_pixels_at_the_noise_level():
    operator = RandomInpainting(SHAPE, missing=0.4)
    model, y, x = one_problem(operator, GaussianNoise(0.3))
    _, z, _ = ClosedForm().step(ClosedForm().init(model, y, x), x, 0.3, generator=ChainGenerators(0, range(1)))
    torch.testing.assert_close(z[0][operator.mask], y[operator.mask], rtol=0, atol=1e-12)


def test_closed_form_survives_float32_at_large_eta():
    # observed directions must keep their small spread while the others have that of η
    A = torch.randn(4, D, generator=torch.Generator().manual_seed(3)) / 5
    model = ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(0.01)).float()
    y, x = 5 * torch.ones(4), torch.full((2000, *SHAPE), 3.0)
    sampler = ClosedForm(exact_splitting=False)
    _, z, _ = sampler.step(sampler.init(model, y, x), x, 20.0, generator=ChainGenerators(0, range(2000)))
    residual = (model.operator(z) - y) / 0.01
    assert float(residual.square().mean()) == pytest.approx(1.0, rel=0.1)


def run_chain(sampler, model, y, x, eta, n, steps):
    """Draws (n, d) of n chains after so many steps."""
    generator = ChainGenerators(0, range(n))
    state = sampler.init(model, y, x.expand(n, -1, -1, -1))
    infos = []
    for _ in range(steps):
        state, z, info = sampler.step(state, x.expand(n, -1, -1, -1), eta, generator=generator)
        infos.append(info)
    return z.reshape(n, D), infos


def test_mala_has_the_closed_form_law():
    model, y, x = one_problem(operators()["matrix"], GaussianNoise(0.3))
    draws, infos = run_chain(MALA(steps=30, warmup=40), model, y, x, 0.7, n=400, steps=3)
    check_law(draws, *dense_law(model, y, x, 0.7))
    assert 0.45 < float(infos[-1].acceptance.mean()) < 0.75
    assert float(infos[-1].non_finite.sum()) == 0


def test_the_metropolis_step_is_what_makes_it_right():
    # at a step size too large, where most proposals are refused, the law is still exact
    model, y, x = one_problem(operators()["matrix"], GaussianNoise(0.3))
    sampler = MALA(steps=400, warmup=0, first_step=0.18)
    draws, infos = run_chain(sampler, model, y, x, 0.7, n=300, steps=1)
    assert float(infos[-1].acceptance.mean()) < 0.4
    check_law(draws, *dense_law(model, y, x, 0.7))


def test_step_sizes_are_frozen_while_eta_stays():
    model, y, x = one_problem(operators()["matrix"], GaussianNoise(0.3))
    generator, sampler = ChainGenerators(0, range(1)), MALA(steps=5, warmup=5)
    state, _, first = sampler.step(sampler.init(model, y, x), x, 0.7, generator=generator)
    state_2, _, second = sampler.step(state, x, 0.7, generator=generator)
    assert torch.equal(state.log_s, state_2.log_s)
    assert (first.forward_calls, second.forward_calls) == (11, 6)
    state_3, _, _ = sampler.step(state_2, x, 0.5, generator=generator)
    assert not torch.equal(state_2.log_s, state_3.log_s)


class Cliff(Noise):
    """A likelihood that is NaN beyond 0.5."""

    def sample(self, clean, generator=None):
        return clean

    def log_prob(self, y, clean):
        value = -0.5 * (y - clean).square().flatten(1).sum(1)
        return torch.where(clean.flatten(1).amax(1) > 0.5, torch.nan, value)


def test_non_finite_proposals_are_rejected_and_counted():
    model = ForwardModel(MatrixOperator(torch.eye(D, dtype=torch.float64), SHAPE), Cliff())
    x = torch.zeros(1, *SHAPE, dtype=torch.float64)
    draws, infos = run_chain(MALA(steps=50, warmup=20), model, torch.zeros(D).double(), x, 0.5, n=20, steps=2)
    assert float(draws.max()) <= 0.5
    assert torch.isfinite(draws).all()
    assert sum(float(info.non_finite.sum()) for info in infos) > 0
    assert float(infos[-1].acceptance.min()) > 0


@pytest.mark.parametrize("sampler", KERNELS, ids=lambda sampler: type(sampler).__name__)
def test_a_chain_does_not_depend_on_its_batch(sampler):
    model, y, _ = one_problem(operators()["matrix"], GaussianNoise(0.3))
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, z, _ = sampler.step(sampler.init(model, y, x), x, 0.7, generator=ChainGenerators(7, range(4)))
    _, alone, _ = sampler.step(sampler.init(model, y, x[2:3]), x[2:3], 0.7, generator=ChainGenerators(7, [2]))
    torch.testing.assert_close(alone[0], z[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sampler", KERNELS, ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_keep_their_dtype(sampler, dtype):
    model, y, x = one_problem(operators()["matrix"], GaussianNoise(0.3))
    state = sampler.init(model.to(dtype), y.to(dtype), x.to(dtype))
    _, z, _ = sampler.step(state, x.to(dtype), 0.7, generator=ChainGenerators(0, range(1)))
    assert z.dtype == dtype


def test_mala_leaves_a_start_of_zero_likelihood():
    model = ForwardModel(MatrixOperator(torch.eye(D, dtype=torch.float64), SHAPE), Cliff())
    x = torch.full((1, *SHAPE), 0.49, dtype=torch.float64)
    state = MALA().init(model, torch.zeros(D).double(), x + 0.1)  # beyond the cliff
    _, z, _ = MALA().step(state, x - 3.0, 0.3, generator=ChainGenerators(0, range(1)))
    assert float(z.max()) <= 0.5


def test_small_eta_needs_no_solve():
    model, y, x = one_problem(_Plain(operators()["matrix"]), GaussianNoise(0.3))
    sampler = PerturbAndSolve()
    state = sampler.init(model, y, x)
    largest = 0.9 * 0.3 / operators()["matrix"].norm()
    assert sampler.split_variance(state) == pytest.approx(largest**2, rel=1e-3)
    _, _, info = sampler.step(state, x, 0.99 * largest, generator=ChainGenerators(0, range(1)))
    assert info.residual is None
    assert info.forward_calls <= 3 + 2 * 15
    _, _, info = sampler.step(state, x, 1.1 * largest, generator=ChainGenerators(0, range(1)))
    assert info.residual is not None
    blind = ForwardModel(MatrixOperator(torch.zeros(3, D, dtype=torch.float64), SHAPE), GaussianNoise(0.3))
    state = sampler.init(blind, torch.zeros(3).double(), x)
    assert math.isinf(sampler.split_variance(state))
    _, z, _ = sampler.step(state, x.expand(2000, -1, -1, -1), 2.0, generator=ChainGenerators(0, range(2000)))
    check_law(z.reshape(2000, D), x.flatten(), 4 * torch.eye(D).double())
    assert PerturbAndSolve(exact_splitting=False).init(model, y, x).split_variance == 0


@pytest.mark.parametrize("high", [0.0, 1e-4, 0.3, 0.81])
def test_chebyshev_square_root(high):
    coefficients = chebyshev_root(high)
    assert len(coefficients) - 1 <= 14
    diagonal = torch.linspace(0, high, D, dtype=torch.float64).reshape(1, *SHAPE)
    v = torch.ones(3, *SHAPE, dtype=torch.float64)
    root = matrix_polynomial(lambda v: diagonal * v, coefficients, high, v)
    torch.testing.assert_close(root, (1 - diagonal).sqrt().expand_as(v), rtol=0, atol=1e-6)


def test_largest_eigenvalue_of_a_crowded_spectrum():
    diagonal = torch.linspace(0, 7, D, dtype=torch.float64).reshape(1, *SHAPE)
    assert 0.95 * 7 < largest_eigenvalue(lambda v: diagonal * v, torch.zeros(1, *SHAPE).double()) <= 7
    assert largest_eigenvalue(lambda v: 0 * v, torch.zeros(1, *SHAPE).double()) == 0


@pytest.mark.parametrize("sampler", KERNELS, ids=lambda sampler: type(sampler).__name__)
def test_select_takes_chains_along(sampler):
    model, y, _ = one_problem(operators()["matrix"], GaussianNoise(0.3))
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state, _, _ = sampler.step(sampler.init(model, y, x), x, 0.7, generator=ChainGenerators(7, range(4)))
    index = torch.tensor([2, 0, 2])
    for eta in (0.7, 0.5):
        _, z, _ = sampler.step(sampler.select(state, index), x[index], eta, generator=ChainGenerators(9, [12, 10, 12]))
        _, whole, _ = sampler.step(state, x, eta, generator=ChainGenerators(9, range(10, 14)))
        torch.testing.assert_close(z, whole[index], rtol=1e-10, atol=1e-10)


def test_conjugate_gradients_report_what_they_did_not_reach():
    diagonal = torch.logspace(0, 6, D, dtype=torch.float64).reshape(1, *SHAPE)
    b = torch.ones(2, *SHAPE, dtype=torch.float64)
    v, residual, iterations = conjugate_gradients(lambda v: diagonal * v, b, tolerance=1e-10, most_iterations=300)
    torch.testing.assert_close(v, b / diagonal, rtol=1e-6, atol=0)
    assert float(residual.max()) <= 1e-10
    _, _, fewer = conjugate_gradients(
        lambda v: diagonal * v, b, lambda r: r / diagonal, tolerance=1e-10, most_iterations=300
    )
    assert fewer == 1 < iterations
    zero, residual, _ = conjugate_gradients(lambda v: diagonal * v, 0 * b, tolerance=1e-10, most_iterations=3)
    assert float(zero.abs().max()) == 0
    assert float(residual.max()) == 0
    _model, y, x = one_problem(operators()["matrix"], GaussianNoise(1e-3))
    sampler = PerturbAndSolve(most_iterations=1, most_diagonalised=0)
    with pytest.warns(RuntimeWarning, match="raise most_iterations"):
        sampler.step(
            sampler.init(ForwardModel(_Plain(operators()["matrix"]), GaussianNoise(1e-3)), y, x),
            x,
            10.0,
            generator=ChainGenerators(0, range(1)),
        )


def test_diagonalising_spares_the_iterations():
    # 24 unknowns, squared singular values from 1e-4 to 1e4 times the noise's
    left, right = (
        torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(s), dtype=torch.float64))[0]
        for s in (1, 2)
    )
    A = _Plain(MatrixOperator(left * torch.logspace(-2, 2, D, dtype=torch.float64) @ right.T, SHAPE))
    noise = GaussianNoise(torch.linspace(0.5, 2, D).double())
    model, y, x = one_problem(A, noise)
    draws = {}
    for most in (0, D):
        sampler = PerturbAndSolve(tolerance=1e-9, most_diagonalised=most)
        state = sampler.init(model, y, x)
        _, draws[most], info = sampler.step(state, x, 3.0, generator=ChainGenerators(0, range(1)))
        assert float(info.residual.max()) <= 1e-9
        assert (info.forward_calls <= 3 + 2 * 13 + 2 * 2) == (most == D)
    torch.testing.assert_close(draws[0], draws[D], rtol=0, atol=1e-4)
    values, vectors = sampler.init(model, y, x).spectrum
    dense, _ = model.linear_gaussian_dense(SHAPE)
    gram = dense.T @ (dense / noise.sigma[:, None] ** 2)
    torch.testing.assert_close(vectors * values @ vectors.T, gram)
    assert PerturbAndSolve(most_diagonalised=D - 1).init(model, y, x).spectrum is None


class _Plain(LinearOperator):
    """A linear operator that knows nothing but its forward map."""

    def __init__(self, inner: LinearOperator) -> None:
        super().__init__(SHAPE)
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("operator", "noise", "expected", "word"),
    [
        (RandomInpainting(SHAPE), GaussianNoise(0.1), ClosedForm, "closed form"),
        (RandomInpainting(SHAPE), GaussianNoise([0.1] * 6), PerturbAndSolve, "conjugate gradients"),
        (_Plain(GaussianBlur(SHAPE, 1.0)), GaussianNoise(0.1), PerturbAndSolve, "conjugate gradients"),
        (PhaseRetrieval(SHAPE), GaussianNoise(0.1), MALA, "differentiable"),
        (DitheredQuantisation(SHAPE), DitheredLogisticNoise(0.1), PixelwiseSlice, "every pixel by itself"),
        (HighDynamicRange(), GaussianNoise(0.1), PixelwiseSlice, "every pixel by itself"),
        (HighDynamicRange(), GaussianNoise(covariance=torch.eye(D)), MALA, "differentiable"),
        (GaussianBlur(SHAPE, 1.0), DitheredLogisticNoise(0.1), MALA, "differentiable"),
    ],
)
def test_auto_takes_the_most_exact_sampler(operator, noise, expected, word):
    sampler, reason = choose_proximal(ForwardModel(operator, noise))
    assert isinstance(sampler, expected)
    assert word in reason


@pytest.mark.parametrize("without_gradient", ["operator", "noise"])
def test_auto_needs_values_only(without_gradient):
    model = ForwardModel(PhaseRetrieval(SHAPE), GaussianNoise(0.1))
    getattr(model, without_gradient).differentiable = False
    sampler, reason = choose_proximal(model)
    assert isinstance(sampler, EllipticalSlice)
    assert "PhaseRetrieval" in reason
    for refusing in (ClosedForm(), PerturbAndSolve(), PixelwiseSlice(), MALA(), HMC()):
        with pytest.raises(TypeError, match="PhaseRetrieval"):
            refusing.init(model, torch.zeros(1), torch.zeros(1, *SHAPE))


def test_bad_arguments_are_named():
    for make, word in [
        (lambda: MALA(steps=0), "steps"),
        (lambda: MALA(target=1.0), "target"),
        (lambda: PerturbAndSolve(tolerance=0), "tolerance"),
        (lambda: PerturbAndSolve(most_iterations=0), "most_iterations"),
        (lambda: PerturbAndSolve(most_diagonalised=-1), "most_diagonalised"),
        (lambda: HMC(leapfrogs=0), "leapfrogs"),
        (lambda: HMC(warmup=-1), "warmup"),
        (lambda: HMC(target=0.0), "target"),
        (lambda: HMC(first_step=-1.0), "first_step"),
        (lambda: EllipticalSlice(steps=0), "steps"),
        (lambda: EllipticalSlice(most_proposals=0), "most_proposals"),
        (lambda: PixelwiseSlice(steps=0), "steps"),
        (lambda: PixelwiseSlice(most_proposals=0), "most_proposals"),
    ]:
        with pytest.raises(ValueError, match=word):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClosedForm()
