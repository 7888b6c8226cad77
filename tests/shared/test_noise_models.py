"""One suite over all noise models: adding one to ``CASES`` is all it takes. What is special to a model follows behind."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

import dpnp_shared.noise
from dpnp_shared.noise import (
    CensoredGaussianNoise,
    DitheredLogisticNoise,
    GaussianNoise,
    JointNoise,
    LaplaceNoise,
    LogPoissonNoise,
    Noise,
    PoissonGaussianNoise,
    PoissonNoise,
    RicianNoise,
    StudentTNoise,
    TransmissionNoise,
    VonMisesNoise,
    poisson_gaussian,
)

SHAPE = (2, 3)


@dataclass
class Outcomes:
    """What one entry can measure, in ascending order: atoms, and points of a quadrature of the density between them."""

    y: Tensor
    weight: Tensor  # 1 for an atom, the cell's width for a point of the quadrature
    atom: Tensor  # bool


def atoms(y: Any) -> Outcomes:
    y = torch.as_tensor(y, dtype=torch.float64)
    return Outcomes(y, torch.ones_like(y), torch.ones_like(y, dtype=torch.bool))


def interval(low: float, high: float, cells: int = 4000) -> Outcomes:
    """The midpoint rule."""
    width = (high - low) / cells
    y = low + width * (torch.arange(cells, dtype=torch.float64) + 0.5)
    return Outcomes(y, torch.full_like(y, width), torch.zeros_like(y, dtype=torch.bool))


def line(centre: float, scale: float, end: float) -> Outcomes:
    """All numbers, by the midpoint rule in t of y = centre + scale sinh(t), |t| < end."""
    t = interval(-end, end)
    return Outcomes(centre + scale * t.y.sinh(), t.weight * scale * t.y.cosh(), t.atom)


def between_atoms(low: float, high: float) -> Outcomes:
    inside = interval(low, high)
    parts = zip(*((o.y, o.weight, o.atom) for o in (atoms([low]), inside, atoms([high]))), strict=True)
    return Outcomes(*(torch.cat(part) for part in parts))


@dataclass
class Case:
    """A noise model and what is known of it from elsewhere.

    Attributes:
        build: the model with its parameters times a number, or times one an entry.
        clean: six noiseless values.
        reference: log density of an entry, from scipy.
        outcomes: of an entry of a given noiseless value.
        informative: the noiseless value that the resolution is taken at.
        information: the least and the largest ratio allowed of the Fisher information there to 1/resolution².
        far: pairs of a measurement and a noiseless value far from it.
        refused: measurements out of the support, with what the error says.
        arguments: plain values that build it from a configuration.
        scales: whether the parameters may be one an entry.
    """

    build: Callable[[Any], Noise]
    clean: list[float]
    reference: Callable[[Any, Any], Any]
    outcomes: Callable[[float], Outcomes]
    informative: float
    arguments: dict[str, Any]
    information: tuple[float, float] = (1 - 1e-5, 1 + 1e-5)
    far: list[tuple[float, float]] = field(default_factory=list)
    refused: list[tuple[float, str]] = field(default_factory=list)
    scales: bool = True


def censored(y: Any, clean: Any, sigma: float = 0.5, low: float = 0.0, high: float = 1.0) -> Any:
    inside = scipy.stats.norm.logpdf(y, clean, sigma)
    inside = np.where(y == low, scipy.stats.norm.logcdf(low, clean, sigma), inside)
    return np.where(y == high, scipy.stats.norm.logsf(high, clean, sigma), inside)


def poisson_gaussian_reference(
    y: Any, clean: Any, gain: float = 2.0, sigma: float = 1.0, background: float = 0.3
) -> Any:
    k = np.arange(200).reshape(-1, *[1] * np.ndim(y))
    terms = scipy.stats.poisson.logpmf(k, clean / gain + background) + scipy.stats.norm.logpdf(y, gain * k, sigma)
    return scipy.special.logsumexp(terms, axis=0)


REAL_FAR = [(0.0, 1e4), (0.0, -1e4), (1e6, 0.0)]
LINE = [-2.0, -0.5, 0.0, 0.3, 1.0, 5.0]

CASES = {
    "gaussian": Case(
        lambda f: GaussianNoise(0.3 * f),
        LINE,
        lambda y, c: scipy.stats.norm.logpdf(y, c, 0.3),
        lambda c: line(c, 0.3, 4),
        0.7,
        {"sigma": 0.1},
        far=REAL_FAR,
    ),
    "laplace": Case(
        lambda f: LaplaceNoise(0.3 * f),
        LINE,
        lambda y, c: scipy.stats.laplace.logpdf(y, c, 0.3),
        lambda c: line(c, 0.3, 5),
        0.7,
        {"scale": [0.1, 0.2]},
        far=REAL_FAR,
    ),
    "student_t": Case(
        lambda f: StudentTNoise(0.3 * f, 2.5),
        LINE,
        lambda y, c: scipy.stats.t.logpdf(y, 2.5, c, 0.3),
        lambda c: line(c, 0.3, 16),
        0.7,
        {"scale": 0.1, "dof": 4},
        far=[*REAL_FAR, (0.0, 1e100)],
    ),
    "censored_gaussian": Case(
        lambda f: CensoredGaussianNoise(0.5 * f, 0.0, 1.0),
        [-1.0, 0.0, 0.2, 0.5, 1.0, 1.8],
        censored,
        lambda c: between_atoms(0.0, 1.0),
        0.5,
        {"sigma": 0.1, "low": 0, "high": None},
        information=(0.5, 1.0),
        far=[(0.0, 1e4), (1.0, -1e4), (0.0, -1e4), (0.4, 1e4)],
        refused=[(-0.1, "like -0.1; allowed are values from 0.0 to 1.0"), (1.1, "like 1.1"), (math.nan, "like nan")],
    ),
    "dithered_logistic": Case(
        lambda f: DitheredLogisticNoise(0.3 * f),
        LINE,
        lambda y, c: scipy.stats.logistic.logcdf(y * c / 0.3),
        lambda c: atoms([-1, 1]),
        0.0,
        {"scale": 0.1},
        far=[(1.0, -1e4), (-1.0, -1e4)],
        refused=[(0.0, "allowed are -1 and")],
        scales=False,
    ),
    "von_mises": Case(
        lambda f: VonMisesNoise(3.0 * f),
        [-3.0, -1.0, 0.0, 0.5, 3.14, 10.0],
        lambda y, c: scipy.stats.vonmises.logpdf(y, 3.0, c),
        lambda c: interval(-math.pi, math.pi),
        0.5,
        {"concentration": 10},
        far=[(-3.0, 0.1), (1.0, 1e4)],
    ),
    "rician": Case(
        lambda f: RicianNoise(0.3 * f),
        [-1.0, 0.0, 0.1, 0.3, 1.0, 5.0],
        lambda y, c: scipy.stats.rice.logpdf(y, abs(c) / 0.3, scale=0.3),
        lambda c: interval(0, abs(c) + 4),
        1e3,
        {"sigma": 0.1},
        far=[(1e-3, 1e4), (1e4, 0.0), (1e4, 1e-200), (1e5, 1e5)],
        refused=[(0.0, "like 0.0; allowed are positive"), (-1.0, "like -1.0")],
    ),
    "poisson": Case(
        lambda f: PoissonNoise(2.0 * f, 0.5 * f),
        [0.25, 0.5, 1.0, 2.0, 10.0, 50.0],
        lambda y, c: scipy.stats.poisson.logpmf(y, 2 * c + 0.5),
        lambda c: atoms(range(300)),
        0.25,
        {"gain": 100, "background": 1},
        far=[(0.0, 1e6), (1e6, 0.0), (1e12, 5e11), (1e3, -0.25 + 1e-12)],
        refused=[(0.5, "like 0.5; allowed are counts"), (-1.0, "like -1.0"), (math.inf, "like inf")],
    ),
    "poisson_gaussian": Case(
        lambda f: PoissonGaussianNoise(2.0 * f, 1.0 * f, 0.3),
        [1.4, 2.0, 3.0, 7.0, 20.0, 100.0],
        poisson_gaussian_reference,
        lambda c: interval(-12, 2 * c + 60),
        1.4,
        {"gain": 2, "sigma": 1, "background": 0.1},
        information=(1, 1.25),
        far=[(-1e4, 1.0), (1e5, 1.0), (0.0, 1e6), (1e6, 1e6)],
        refused=[(1e13, r"like 1e\+13|like 10000000000000.0.*5e\+12 photons"), (math.inf, "like inf")],
    ),
    "transmission": Case(
        lambda f: TransmissionNoise(40.0 * f, 2.0 * f),
        [0.0, 0.5, 1.0, 2.0, 3.0, 8.0],
        lambda y, c: scipy.stats.poisson.logpmf(y, 40 * np.exp(-c) + 2),
        lambda c: atoms(range(200)),
        0.0,
        {"photons": 1000},
        far=[(0.0, 1e3), (50.0, 700.0), (0.0, -100.0), (1e6, 3.0)],
        refused=[(0.5, "like 0.5; allowed are counts"), (-1.0, "like -1.0")],
    ),
    "log_poisson": Case(
        lambda f: LogPoissonNoise(40.0 * f, 2.0 * f, mu=0.5),
        [0.0, 0.5, 1.0, 2.0, 6.0, 16.0],
        lambda y, c: scipy.stats.poisson.logpmf(np.round(40 * np.exp(-0.5 * y)), 40 * np.exp(-0.5 * c) + 2),
        lambda c: atoms([*(-2 * math.log(n / 40) for n in range(200, 0, -1)), -2 * math.log(0.1 / 40)]),
        0.0,
        {"photons": 1000, "mu": 2, "zero": 0.5},
        far=[(-2 * math.log(0.1 / 40), -200.0), (0.0, 1500.0)],
        refused=[(-2 * math.log(1.5 / 40), r"1.5 photons"), (100.0, "photons"), (-100.0, "up to 2.53")],
    ),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measurements(case: Case) -> tuple[Noise, Tensor, Tensor]:
    """The model, noiseless values (3, 2, 3), and a measurement of each."""
    noise, clean = case.build(1.0), torch.tensor(case.clean, dtype=torch.float64).reshape(SHAPE)
    clean = torch.stack([clean, clean.flip(1), clean.mT.reshape(SHAPE)])
    return noise, clean, noise.sample(clean, generator())


def column(noise: Noise, y: Tensor, clean: Tensor) -> Tensor:
    """Log density of each pair of entries."""
    return noise.log_prob(y[:, None], clean[:, None])


def test_all_noise_models_are_in_the_suite():
    exported = {getattr(dpnp_shared.noise, name) for name in dpnp_shared.noise.__all__}
    assert {type(case.build(1.0)) for case in CASES.values()} == exported - {Noise, JointNoise}
    assert all(not inspect.isabstract(kind) for kind in exported - {Noise})


def test_density_sums_to_one(case):
    noise = case.build(1.0)
    for c in case.clean:
        o = case.outcomes(c)
        total = (o.weight * column(noise, o.y, torch.full_like(o.y, c)).exp()).sum()
        assert float(total) == pytest.approx(1, abs=1e-6)


def test_density_agrees_with_scipy(case):
    noise, clean, y = measurements(case)
    assert noise.log_prob(y, clean).dtype == torch.float64
    expected = case.reference(y.numpy(), clean.numpy()).reshape(3, -1).sum(1)
    np.testing.assert_allclose(noise.log_prob(y, clean).numpy(), expected, rtol=1e-11, atol=1e-11)


def test_samples_follow_the_density(case):
    noise, n = case.build(1.0), 20_000
    clean = torch.tensor(case.clean, dtype=torch.float64).expand(n, -1)
    samples = (
        noise.sample(clean.reshape(1, n, -1), generator(1))[0] if case.scales else noise.sample(clean, generator(1))
    )
    for c, drawn in zip(case.clean, samples.T, strict=True):
        o = case.outcomes(c)
        p = o.weight * column(noise, o.y, torch.full_like(o.y, c)).exp()
        below = p.cumsum(0) - torch.where(o.atom, 0.0, p / 2)  # probability of y up to this point
        # cuts at the nearest points to 19 quantiles; behind an atom, half-way to the next point
        index = (
            torch.searchsorted(below, torch.linspace(0.05, 0.95, 19, dtype=torch.float64))
            .clamp(max=len(p) - 2)
            .unique()
        )
        cut = torch.where(o.atom, (o.y + o.y.roll(-1)) / 2, o.y)[index]
        expected = n * torch.diff(below[index], prepend=torch.zeros(1).double(), append=torch.ones(1).double())
        counts = torch.bincount(torch.searchsorted(cut, drawn.contiguous()), minlength=len(cut) + 1)
        keep = expected > 5
        chi_square = float(((counts - expected) ** 2 / expected)[keep].sum())
        assert int(counts[~keep].sum()) < 30
        assert scipy.stats.chi2.sf(chi_square, max(int(keep.sum()) - 1, 1)) > 1e-4


def test_gradient_matches_finite_differences(case):
    noise, clean, y = measurements(case)
    assert noise.differentiable
    clean = (clean + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: noise.log_prob(y, c), clean, eps=1e-6, rtol=1e-5, atol=1e-6)


def fisher_information(noise: Noise, c: float, o: Outcomes) -> float:
    clean = torch.full_like(o.y, c).requires_grad_()
    log_p = column(noise, o.y, clean)
    (score,) = torch.autograd.grad(log_p.sum(), clean)
    return float((o.weight * log_p.detach().exp() * score**2).sum())


def test_resolution_is_the_largest_fisher_information(case):
    noise = case.build(1.0)
    resolution = noise.resolution
    assert resolution is not None
    ratio = fisher_information(noise, case.informative, case.outcomes(case.informative)) * resolution**2
    assert case.information[0] - 1e-6 <= ratio <= case.information[1] + 1e-6
    for c in case.clean:
        assert fisher_information(noise, c, case.outcomes(c)) * resolution**2 <= case.information[1] + 1e-5


def test_fisher_information_is_that_of_the_density(case):
    noise = case.build(1.0)
    told = noise.fisher_information(torch.tensor([case.clean], dtype=torch.float64))
    assert told is not None
    if type(noise).fisher_information is Noise.fisher_information:  # whatever the value, the largest
        assert told.tolist() == [[noise.resolution**-2] * len(case.clean)]
        return
    known = [fisher_information(noise, c, case.outcomes(c)) for c in case.clean]
    assert told[0].tolist() == pytest.approx(known, rel=1e-4)
    assert bool((told <= noise.resolution**-2 * (1 + 1e-12)).all())
    assert noise.fisher_information(torch.zeros(2, 1)).dtype == torch.float32


def test_entries_of_a_batch_do_not_touch(case):
    noise, clean, y = measurements(case)
    together = noise.log_prob(y, clean)
    for i in range(3):
        torch.testing.assert_close(noise.log_prob(y[i], clean[i : i + 1]), together[i : i + 1], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(noise.log_prob(y[0], clean)[:1], together[:1], rtol=1e-14, atol=1e-14)
    assert torch.equal(noise.sample(clean, generator()), y)
    torch.manual_seed(123)  # an explicit generator is all that counts
    assert torch.equal(noise.sample(clean, generator()), y)
    assert not torch.equal(noise.sample(clean, generator(9)), y)
    assert noise.sample(clean).shape == y.shape


def test_the_density_is_that_of_its_entries(case):
    noise, clean, y = measurements(case)
    assert noise.independent
    entries = noise.entry_log_prob(y, clean)
    assert entries.shape == clean.shape
    torch.testing.assert_close(entries.flatten(1).sum(1), noise.log_prob(y, clean), rtol=1e-12, atol=1e-12)
    moved = clean.clone()
    moved[1, 0, 2] = moved[1, 0, 2] * 1.25 + 0.01
    assert (noise.entry_log_prob(y, moved) != entries).nonzero().tolist() == [[1, 0, 2]]


def test_entries_of_correlated_noise_have_no_density_of_their_own():
    full = GaussianNoise(covariance=torch.eye(2))
    assert not full.independent
    with pytest.raises(RuntimeError, match="covariance"):
        full.entry_log_prob(torch.zeros(2), torch.zeros(1, 2))

    class Whole(Noise):
        def sample(self, clean, generator=None):
            return clean

    class Special(GaussianNoise):
        def log_prob(self, y, clean):
            return 0 * clean.flatten(1).sum(1)

    assert not Whole().independent
    assert not Special(0.1).independent
    with pytest.raises(NotImplementedError, match="Whole must define entry_log_prob"):
        Whole().log_prob(torch.zeros(2), torch.zeros(1, 2))


def test_parameters_may_be_one_an_entry(case):
    if not case.scales:
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            case.build(torch.ones(SHAPE))
        return
    _, clean, _ = measurements(case)
    factor = torch.linspace(0.5, 3, 6, dtype=torch.float64).reshape(SHAPE)
    noise = case.build(factor)
    y = noise.sample(clean, generator())
    pairs = [(case.build(float(factor[i, j])), i, j) for i in range(2) for j in range(3)]
    expected = sum(column(one, y[:, i, j], clean[:, i, j]) for one, i, j in pairs)
    torch.testing.assert_close(noise.log_prob(y, clean), expected)
    assert noise.resolution == pytest.approx(min(one.resolution for one, _, _ in pairs))
    row = case.build(torch.ones(3, dtype=torch.float64))
    assert torch.equal(row.sample(clean, generator()), case.build(1.0).sample(clean, generator()))
    with pytest.raises(ValueError, match=r"has shape \(5,\); it must broadcast to measurements of shape \(2, 3\)"):
        case.build(torch.ones(5)).sample(clean)
    with pytest.raises(ValueError, match=r"has shape \(3, 2, 3\)"):
        case.build(torch.ones(3, 2, 3)).log_prob(y, clean)


def test_single_precision_is_computed_in_double(case):
    noise, clean, _ = measurements(case)
    clean = clean.float()
    y = noise.sample(clean, generator())
    assert y.dtype == torch.float32
    exact = noise.log_prob(y.double(), clean.double())
    assert noise.log_prob(y, clean).dtype == torch.float64
    torch.testing.assert_close(noise.log_prob(y, clean), exact, rtol=1e-6, atol=1e-5)
    rounded = copy.deepcopy(noise).to(torch.float32)
    torch.testing.assert_close(rounded.log_prob(y, clean), exact, rtol=1e-5, atol=1e-4)
    clean.requires_grad_()
    (gradient,) = torch.autograd.grad(noise.log_prob(y, clean).sum(), clean)
    assert gradient.dtype == torch.float32


def test_models_survive_state_dict_and_copies(case):
    noise, clean, y = measurements(case)
    before = noise.log_prob(y, clean)
    for again in (copy.deepcopy(noise), case.build(1.0)):
        again.load_state_dict(noise.state_dict())
        assert torch.equal(again.log_prob(y, clean), before)
    for module in noise.modules():  # else a move to another device would leave it behind
        assert not any(isinstance(value, Tensor) for value in vars(module).values())


def test_wrong_measurements_are_refused(case):
    noise, clean, y = measurements(case)
    with pytest.raises(TypeError, match="complex128"):
        noise.log_prob(torch.complex(y, y), clean)
    if not isinstance(noise, GaussianNoise):
        with pytest.raises(TypeError, match=r"clean has dtype torch\.complex128"):
            noise.sample(torch.complex(clean, clean))
        with pytest.raises(TypeError, match="complex128"):
            noise.log_prob(y, torch.complex(clean, clean))
    with pytest.raises(ValueError, match=r"y has shape \(2,\)"):
        noise.log_prob(y[0, :, 0], clean)
    with pytest.raises(ValueError, match=r"y has shape \(2, 2, 3\)"):
        noise.log_prob(y[:2], clean)
    for value, message in case.refused:
        wrong = y[0].clone()
        wrong[1, 2] = value
        with pytest.raises(ValueError, match=f"y holds 1 entries.*{message}"):
            noise.log_prob(wrong, clean)


def test_far_tails_have_finite_values_and_gradients(case):
    noise = case.build(1.0)
    y, clean = torch.tensor(case.far, dtype=torch.float64).T
    clean = clean.clone().requires_grad_()
    log_p = column(noise, y, clean)
    assert bool(log_p.isfinite().all())
    (gradient,) = torch.autograd.grad(log_p.sum(), clean)
    assert bool(gradient.isfinite().all())
    h = 1e-7 * clean.detach().abs().clamp(min=1e-300)
    differences = (column(noise, y, clean + h) - column(noise, y, clean - h)).detach() / (2 * h)
    moving = differences.abs() * h > 1e-9 * log_p.detach().abs()  # else rounding is all there is
    moving &= differences.isfinite() & (clean.detach().abs() > 1e-3)
    torch.testing.assert_close(gradient[moving], differences[moving], rtol=1e-3, atol=1e-6)


def test_noiseless_values_that_are_not_finite_have_no_finite_density(case):
    noise, clean, y = measurements(case)
    clean[0, 0, 0] = math.nan
    log_p = noise.log_prob(y, clean)
    assert not bool(log_p[0].isfinite())
    assert bool(log_p[1:].isfinite().all())


def test_noise_is_built_from_plain_values(case):
    kind = type(case.build(1.0)).__name__
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--noise", type=Noise)
    config = {"noise": {"class_path": f"dpnp_shared.noise.{kind}", "init_args": case.arguments}}
    noise = parser.instantiate(parser.parse_object(config)).noise
    clean = torch.ones(3, 2)
    assert bool(noise.log_prob(noise.sample(clean, generator()), clean).isfinite().all())


def test_only_counts_are_counts():
    counted = {name for name, case in CASES.items() if case.build(1.0).counts}
    assert counted == {"poisson", "transmission"}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PoissonNoise(0.0), "gain = 0.0; allowed are positive"),
        (lambda: PoissonNoise(1.0, -1.0), "background = -1.0; allowed are numbers of at least 0"),
        (lambda: PoissonNoise([1.0, math.nan]), "gain holds 1 entries"),
        (lambda: PoissonNoise([]), r"gain has shape \(0,\)"),
        (lambda: PoissonNoise([1.0, 2.0], [1.0, 2.0, 3.0]), r"'gain': \(2,\), 'background': \(3,\)"),
        (lambda: PoissonGaussianNoise(0.0, 1.0), "gain = 0.0"),
        (lambda: PoissonGaussianNoise(1.0, 0.0), "sigma = 0.0"),
        (lambda: PoissonGaussianNoise(1.0, 1.0, -2.0), "background = -2.0"),
        (lambda: PoissonGaussianNoise(1.0, [1.0, 2e4]), "sigma is up to 20000 times gain"),
        (lambda: PoissonGaussianNoise([1.0, 2.0], 1.0, [1.0, 2.0, 3.0]), "do not broadcast"),
        (lambda: LaplaceNoise(-1.0), "scale = -1.0"),
        (lambda: StudentTNoise(0.0, 3.0), "scale = 0.0"),
        (lambda: StudentTNoise(1.0, 0.0), "dof = 0.0"),
        (lambda: TransmissionNoise(0.0), "photons = 0.0"),
        (lambda: TransmissionNoise(1.0, -1.0), "background = -1.0"),
        (lambda: LogPoissonNoise(0.0), "photons = 0.0"),
        (lambda: LogPoissonNoise(1.0, mu=0.0), "mu = 0.0"),
        (lambda: LogPoissonNoise(1.0, zero=0.6), "zero = 0.6"),
        (lambda: CensoredGaussianNoise(0.0, 0.0, 1.0), "sigma = 0.0"),
        (lambda: CensoredGaussianNoise(1.0, 1.0, 1.0), r"\(low, high\) = \(1.0, 1.0\)"),
        (lambda: CensoredGaussianNoise(1.0, None, None), r"\(None, None\)"),
        (lambda: CensoredGaussianNoise(1.0, -math.inf, 1.0), r"\(-inf, 1.0\)"),
        (lambda: CensoredGaussianNoise(1.0, 0.0, math.nan), r"\(0.0, nan\)"),
        (lambda: VonMisesNoise(0.0), "concentration = 0.0"),
        (lambda: RicianNoise(math.inf), "sigma holds 1 entries"),
    ],
)
def test_errors_name_argument_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def scalar(noise: Noise, y: float, c: float) -> tuple[float, float]:
    """Log density and its derivative in the noiseless value, of one entry."""
    clean = torch.tensor([[c]], dtype=torch.float64, requires_grad=True)
    log_p = noise.log_prob(torch.tensor([y], dtype=torch.float64), clean)
    (gradient,) = torch.autograd.grad(log_p.sum(), clean)
    return log_p.item(), gradient.item()


@pytest.mark.parametrize("noise", [PoissonNoise(2.0), PoissonNoise([2.0], 0.5), PoissonGaussianNoise(0.5, 0.1, 0.3)])
def test_negative_mean_counts_are_impossible(noise):
    dark = -float(noise.background) * (0.5 if isinstance(noise, PoissonNoise) else float(noise.gain))
    clean = torch.tensor([[dark], [dark - 1e-9], [dark + 1]], dtype=torch.float64, requires_grad=True)
    log_p = noise.log_prob(torch.zeros(1), clean)
    assert bool(log_p[0].isfinite())
    assert log_p[1] == -math.inf
    assert bool(log_p[2].isfinite())
    (gradient,) = torch.autograd.grad(log_p.sum(), clean)
    assert bool(gradient.isfinite().all())
    assert bool(noise.sample(clean[::2].detach(), generator()).isfinite().all())
    with pytest.raises(
        ValueError, match=r"1 entries of \d a mean count out of range, the first -.* at \[\d, 0\]; allowed are 0"
    ):
        noise.sample(clean.detach())


def test_darkness_counts_nothing():
    noise = PoissonNoise(2.0)
    assert scalar(noise, 0.0, 0.0) == (0.0, -2.0)
    assert scalar(noise, 1.0, 0.0)[0] == -math.inf
    assert int(noise.sample(torch.zeros(1, 100), generator()).sum()) == 0


def test_resolution_of_counts_is_at_least_a_photon():
    assert PoissonNoise(10.0).resolution == pytest.approx(0.1)
    assert PoissonNoise(10.0, 0.01).resolution == pytest.approx(0.1)
    assert PoissonNoise(10.0, 25.0).resolution == pytest.approx(0.5)
    assert PoissonNoise([10.0, 20.0], [0.0, 400.0]).resolution == pytest.approx(0.1)
    # as a function of the noiseless value, the probability of a count is never narrower
    c = torch.linspace(0, 5, 200_001, dtype=torch.float64)
    for count in (0.0, 1.0, 4.0):
        p = PoissonNoise(10.0).log_prob(torch.full((1,), count), c[:, None]).exp()
        mean = (p * c).sum() / p.sum()
        std = ((p * (c - mean) ** 2).sum() / p.sum()).sqrt()
        assert float(std) == pytest.approx(math.sqrt(count + 1) / 10, rel=1e-3)


def test_large_counts_keep_their_digits():
    for n, mean in ((1e6, 1.001e6), (1e12, 1e12 + 3e6), (15.0, 14.0), (16.0, 14.0), (2.0**53, 2.0**53)):
        with mpmath.workdps(60):
            exact = float(n * mpmath.log(mpmath.mpf(mean)) - mpmath.mpf(mean) - mpmath.loggamma(mpmath.mpf(n) + 1))
        assert scalar(PoissonNoise(), n, mean)[0] == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 1.0, 3.0, 30.0])
def test_resolution_of_a_sensor_is_within_a_quarter_of_its_information(ratio):
    noise = PoissonGaussianNoise(1.0, ratio)
    o = interval(-12 * ratio - 1, 12 * ratio + 25, 8000)
    assert 1 <= fisher_information(noise, 1.0, o) * noise.resolution**2 <= 1.25
    # less information at more photons
    assert fisher_information(noise, 2.0, o) < fisher_information(noise, 1.0, o)


def exact_poisson_gaussian(y: float, rate: float, s: float) -> tuple[float, float]:
    """The sum over counts and its derivative in the rate, to 40 digits, from terms that are added until none counts."""
    with mpmath.workdps(40):
        y, rate, s = mpmath.mpf(y), mpmath.mpf(rate), mpmath.mpf(s)

        def term(k: int) -> Any:
            return k * mpmath.log(rate) - rate - mpmath.loggamma(k + 1) - (y - k) ** 2 / (2 * s**2)

        terms = [term(k) for k in range(1300)]
        largest = max(terms)
        weights = [mpmath.e ** (t - largest) for t in terms]
        total = mpmath.fsum(weights)
        mean = mpmath.fsum(k * w for k, w in enumerate(weights)) / total
        log_p = largest + mpmath.log(total) - mpmath.log(s * mpmath.sqrt(2 * mpmath.pi))
        return float(log_p), float(mean / rate - 1)


@pytest.mark.parametrize(
    ("y", "rate", "s"),
    [
        (2.0, 3.0, 0.5),
        (4.0, 1e-3, 1.0),
        (3.0, 1e-12, 0.3),
        (90.0, 100.0, 3.0),
        (900.0, 1000.0, 40.0),
        (-30.0, 0.2, 2.0),
        (7.5, 2.0, 1e-3),
        (3.4, 50.0, 0.01),
        (7.3, 7.0, 1e4),
        (10.0, 800.0, 2.0),
        (1200.0, 10.0, 5.0),
    ],
)
def test_sensor_density_is_the_whole_sum(y, rate, s):
    exact, derivative = exact_poisson_gaussian(y, rate, s)
    log_p, gradient = scalar(PoissonGaussianNoise(1.0, s), y, rate)
    assert log_p == pytest.approx(exact, rel=1e-13, abs=1e-12)
    assert gradient == pytest.approx(derivative, rel=1e-10, abs=1e-13)


def test_window_leaves_out_less_than_rounding(monkeypatch):
    u = torch.rand(3, 3000, generator=generator(), dtype=torch.float64)
    rate, s = 10 ** (9 * u[0] - 4), 10 ** (4 * u[1] - 2)
    y = rate + 6 * (u[2] - 0.5) * (rate + s**2).sqrt()
    narrow = poisson_gaussian._sum_over_counts(rate, y, s)
    half_width = poisson_gaussian._half_width
    monkeypatch.setattr(poisson_gaussian, "_half_width", lambda peak, s: 2 * half_width(peak, s))
    wide = poisson_gaussian._sum_over_counts(rate, y, s)
    torch.testing.assert_close(narrow[0], wide[0], rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(narrow[1], wide[1], rtol=1e-9, atol=1e-12)
    monkeypatch.setattr(poisson_gaussian, "_half_width", lambda peak, s: (half_width(peak, s) / 2).ceil())
    half = poisson_gaussian._sum_over_counts(rate, y, s)[0]
    assert float((half - wide[0]).abs().max()) > 1e-6  # so that the comparison could have failed


def test_terms_are_held_a_bounded_number_at_a_time(monkeypatch):
    noise, clean, y = measurements(CASES["poisson_gaussian"])
    together = noise.log_prob(y, clean)
    sizes = []
    window = poisson_gaussian._window

    def watched(*arguments: Any) -> Any:
        sizes.append(len(arguments[0]) * arguments[-1])
        return window(*arguments)

    monkeypatch.setattr(poisson_gaussian, "_window", watched)
    monkeypatch.setattr(poisson_gaussian, "TERMS", 64)
    torch.testing.assert_close(noise.log_prob(y, clean), together, rtol=1e-14, atol=1e-14)
    assert max(sizes) <= 64
    assert len(sizes) > 1


def test_dark_sensor_entries():
    noise = PoissonGaussianNoise(2.0, 1.0)
    for y in (-1.0, 0.4, 3.0):
        log_p, gradient = scalar(noise, y, 0.0)
        assert log_p == pytest.approx(float(scipy.stats.norm.logpdf(y)))
        assert gradient == pytest.approx(scalar(noise, y, 1e-9)[1], rel=1e-6)


def test_transmission_with_nothing_behind_the_absorber():
    noise = TransmissionNoise(100.0)  # no background: mean counts down to exp(-800), which is 0 in float64
    for y, c in ((0.0, 800.0), (2.0, 800.0), (150.0, -0.5)):
        log_p, gradient = scalar(noise, y, c)
        with mpmath.workdps(40):
            log_mean = mpmath.log(100) - mpmath.mpf(c)
            exact = y * log_mean - mpmath.e**log_mean - mpmath.loggamma(y + 1)
            slope = mpmath.e**log_mean - y
        assert log_p == pytest.approx(float(exact), rel=1e-12)
        assert gradient == pytest.approx(float(slope), rel=1e-12)
    assert scalar(noise, 3.0, -800.0)[0] == -math.inf
    with pytest.raises(ValueError, match=r"out of range.*inf"):
        noise.sample(torch.full((1, 1), -800.0))


def test_log_poisson_is_transmission_after_the_logarithm():
    for photons, mu in ((4096.0, 81.35858), (3e7, 0.2)):
        of_counts, of_logs = TransmissionNoise(photons, 3.0), LogPoissonNoise(photons, 3.0, mu)
        clean = torch.linspace(0, 6, 50, dtype=torch.float64)[None] / mu
        for dtype in (torch.float32, torch.float64):
            y = of_logs.sample(clean.to(dtype), generator())
            counts = of_counts.sample(mu * clean.to(dtype).double(), generator())
            assert y.dtype == dtype
            # neighbouring counts differ by 1 in N, single precision by N |mu y| 1e-7
            allowed = 0 if photons < 1e6 or dtype == torch.float64 else 20
            assert float((of_logs.counts_of(y) - counts).abs().max()) <= allowed
            expected = of_counts.log_prob(counts, mu * clean)
            torch.testing.assert_close(of_logs.log_prob(y, clean), expected, rtol=1e-6, atol=0.05 if allowed else 1e-3)
    assert LogPoissonNoise(100.0, 0.0, 0.5).resolution == pytest.approx(2 * TransmissionNoise(100.0).resolution)


def test_log_poisson_counts_of_zero_are_recorded_and_read():
    noise = LogPoissonNoise(10.0, mu=2.0, zero=0.25)
    y = noise.sample(torch.full((1, 20), 50.0), generator())
    torch.testing.assert_close(y, torch.full_like(y, -math.log(0.25 / 10) / 2))
    assert float(noise.log_prob(y, torch.zeros(1, 20))) == pytest.approx(-200)
    with pytest.raises(ValueError, match=r"stands for 0\.1 photons.*0\.25 for none"):
        noise.log_prob(torch.tensor([-math.log(0.1 / 10) / 2], dtype=torch.float64), torch.zeros(1, 1))


def test_limits_are_seen_whatever_the_dtype():
    noise = CensoredGaussianNoise(0.5, 0.1, 0.7)  # neither is a float32
    clean = torch.tensor([[-3.0, 4.0]])
    exact = scipy.stats.norm.logcdf(0.1, -3, 0.5) + scipy.stats.norm.logsf(0.7, 4, 0.5)
    for dtype in (torch.float32, torch.float64):
        y = noise.sample(clean.to(dtype), generator())
        for read in (y, y.float(), y.double(), y.float().double()):
            assert float(noise.log_prob(read, clean)) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(ValueError, match=r"entries like 0\.0"):
        noise.log_prob(torch.tensor([0.5, 0.0]), clean)


def test_one_sided_limits():
    clean = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([5.0, 1.0])
    log_p = float(CensoredGaussianNoise(1.0, 1.0, None).log_prob(y, clean))
    assert log_p == pytest.approx(scipy.stats.norm.logpdf(5) + scipy.stats.norm.logcdf(-1))
    log_p = float(CensoredGaussianNoise(1.0, None, 5.0).log_prob(y, clean))
    assert log_p == pytest.approx(scipy.stats.norm.logsf(5) + scipy.stats.norm.logpdf(-1))


def test_saturation_tails_follow_mills_ratio():
    # log Phi(-z) = -z²/2 - log(z sqrt(2 pi)) + log(1 - 1/z² + ...), derivative -z - 1/z + ...
    for z in (1e3, 1e5, 1e9):
        log_p, gradient = scalar(CensoredGaussianNoise(1.0, 0.0, 1.0), 0.0, z)
        assert log_p == pytest.approx(-0.5 * z**2 - math.log(z * math.sqrt(2 * math.pi)) - 1 / z**2, rel=1e-14)
        assert gradient == pytest.approx(-z - 1 / z + 2 / z**3, rel=1e-14)
    for z in (0.999, 1.001):  # either side of where the formula changes
        log_p, gradient = scalar(CensoredGaussianNoise(1.0, 0.0, 9.0), 0.0, z)
        assert log_p == pytest.approx(float(scipy.stats.norm.logcdf(-z)), rel=1e-14)
        hazard = math.exp(scipy.stats.norm.logpdf(z) - scipy.stats.norm.logcdf(-z))
        assert gradient == pytest.approx(-hazard, rel=1e-13)


@pytest.mark.parametrize("kappa", [1e-3, 0.5, 30.0, 1e6, 1e12, 1e200])
def test_concentrations_from_flat_to_sharp(kappa):
    noise = VonMisesNoise(kappa)
    n = 20_000
    y = noise.sample(torch.zeros(1, n, dtype=torch.float64), generator())[0]
    assert float(y.abs().max()) <= math.pi
    assert torch.equal(noise.sample(torch.zeros(2, n, dtype=torch.float64), generator())[0], y)
    flat = torch.linspace(-math.pi, math.pi, 10_001, dtype=torch.float64)  # the variance by the trapezoidal rule
    weight = torch.exp(kappa * (flat.cos() - 1))
    variance = float((weight * flat**2).sum() / weight.sum()) if kappa < 1e3 else 1 / kappa  # right to 1/kappa
    square = y**2 / variance
    assert float(square.mean()) == pytest.approx(1, abs=5 * float(square.std()) / math.sqrt(n))
    log_p, gradient = scalar(noise, 0.0, 0.7 / math.sqrt(kappa) if kappa > 1 else 0.7)
    if kappa > 1e5:
        assert log_p == pytest.approx(float(scipy.stats.norm.logpdf(0.7)) + 0.5 * math.log(kappa), rel=1e-5)
        assert gradient == pytest.approx(-0.7 * math.sqrt(kappa), rel=1e-5)
        assert noise.resolution == pytest.approx(kappa**-0.5, rel=1e-5)
    else:
        assert log_p == pytest.approx(
            float(scipy.stats.vonmises.logpdf(0.7 / math.sqrt(kappa) if kappa > 1 else 0.7, kappa))
        )


def test_phases_are_wrapped():
    noise = VonMisesNoise(1e8)
    clean = torch.tensor([[math.pi - 1e-2, math.pi + 1e-2, 20.0, -7.0]], dtype=torch.float64)
    y = noise.sample(clean, generator())
    expected = torch.tensor([[math.pi - 1e-2, -math.pi + 1e-2, 20 - 6 * math.pi, -7 + 2 * math.pi]])
    torch.testing.assert_close(y, expected.double(), rtol=0, atol=1e-3)
    moved = y + 2 * math.pi * torch.tensor([[1, -1, 3, 0]], dtype=torch.float64)
    torch.testing.assert_close(noise.log_prob(moved, clean), noise.log_prob(y, clean), rtol=1e-6, atol=0)


def test_magnitudes_do_not_know_signs():
    noise = RicianNoise(0.3)
    for c in (0.2, 1.0, 10.0):
        (plus, slope), (minus, back) = scalar(noise, 0.5, c), scalar(noise, 0.5, -c)
        assert plus == minus
        assert slope == -back
    assert scalar(noise, 0.5, 0.0)[1] == 0
    assert scalar(noise, 0.5, 1e-8)[1] == pytest.approx(scalar(noise, 0.5, 2e-8)[1] / 2, rel=1e-5)


@pytest.mark.parametrize("dof", [0.3, 1.0, 99.0, 101.0, 1e9])
def test_tails_of_every_weight(dof):
    expected = scipy.stats.t.logpdf(2.0, dof) if dof < 1e6 else scipy.stats.norm.logpdf(2.0)
    assert scalar(StudentTNoise(1.0, dof), 2.0, 0.0)[0] == pytest.approx(float(expected), rel=1e-8)
    y = StudentTNoise(1.0, dof).sample(torch.zeros(1, 4000, dtype=torch.float64), generator())[0].numpy()
    assert scipy.stats.kstest(y, scipy.stats.t(dof).cdf if dof < 1e6 else scipy.stats.norm.cdf).pvalue > 1e-3
