"""Interferometry operators against closed forms, and the invariances that closure quantities are made for."""

from __future__ import annotations

import cmath
import copy
import math
import pickle
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, JointNoise, VonMisesNoise
from dpnp_shared.operators import (
    EHT_2017,
    ClosurePhases,
    Coverage,
    EarthRotation,
    LinearOperator,
    LogClosureAmplitudes,
    PhysicalUnits,
    Stack,
    TotalFlux,
    Visibilities,
)
from dpnp_shared.operators.interferometry.array import sidereal_time

UAS = math.pi / 180 / 3600 / 1e6  # a microarcsecond in radians
NIGHT = [0.5, 3.0, 5.5, 8.0]
M87 = EarthRotation(NIGHT)
CLOSURES = [ClosurePhases, LogClosureAmplitudes]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complete(stations: int, scans: int = 1, seed: int = 0) -> Coverage:
    """All baselines of stations at random places, which turn from scan to scan."""
    places = np.random.default_rng(seed).normal(size=(stations, 2)) * 3e9
    rows = []
    for scan in range(scans):
        turn = np.array([[math.cos(scan), -math.sin(scan)], [math.sin(scan), math.cos(scan)]])
        rows += [[*(turn @ (places[j] - places[i])), i, j, scan] for i, j in combinations(range(stations), 2)]
    return Coverage(rows)


# Coverage


def test_sidereal_time():
    # Meeus 1998, Astronomical Algorithms, examples 12.a and 12.b
    assert sidereal_time((1987, 4, 10), 0) == pytest.approx(13 + 10 / 60 + 46.3668 / 3600, abs=0.1 / 3600)
    assert sidereal_time((1987, 4, 10), 19 + 21 / 60) == pytest.approx(8 + 34 / 60 + 57.0896 / 3600, abs=0.1 / 3600)


def test_stations_lie_where_they_should():
    def kilometres(first: str, second: str) -> float:
        return math.dist(EHT_2017[first], EHT_2017[second]) / 1e3

    assert kilometres("JCMT", "SMA") == pytest.approx(0.16, abs=0.01)  # the array's shortest baseline
    assert kilometres("ALMA", "APEX") == pytest.approx(2.6, abs=0.1)
    places = {  # geographic longitude and latitude, degrees; height over the ellipsoid, metres
        "ALMA": (-67.75, -23.03, 5070), "APEX": (-67.76, -23.01, 5100), "JCMT": (-155.48, 19.82, 4120), "LMT": (-97.31, 18.99, 4590),
        "PV": (-3.39, 37.07, 2920), "SMA": (-155.48, 19.82, 4110), "SMT": (-109.89, 32.70, 3160), "SPT": (0.0, -90.0, 2850),
    }  # fmt: skip
    a, e2 = 6378137.0, 0.00669437999  # WGS 84
    for name, (longitude, latitude, height) in places.items():
        lon, lat = math.radians(longitude), math.radians(latitude)
        curvature = a / math.sqrt(1 - e2 * math.sin(lat) ** 2)
        xyz = (
            (curvature + height) * math.cos(lat) * math.cos(lon),
            (curvature + height) * math.cos(lat) * math.sin(lon),
            (curvature * (1 - e2) + height) * math.sin(lat),
        )
        assert math.dist(xyz, EHT_2017[name]) < 2e3, name


def test_baselines_turn_with_the_earth():
    alpha, delta = math.radians(15 * 12.513729), math.radians(12.391123)
    east = np.array([-math.sin(alpha), math.cos(alpha), 0.0])  # of a fixed sky, under which the Earth is turned
    north = np.array([-math.sin(delta) * math.cos(alpha), -math.sin(delta) * math.sin(alpha), math.cos(delta)])
    source = np.array([math.cos(delta) * math.cos(alpha), math.cos(delta) * math.sin(alpha), math.sin(delta)])
    found = {
        (scan, M87.names[i], M87.names[j]): uv
        for scan, (i, j), uv in zip(M87.scan.tolist(), M87.stations.tolist(), M87.uv.tolist(), strict=True)
    }
    expected = {}
    for scan, hours in enumerate(NIGHT):
        t = math.radians(15 * sidereal_time((2017, 4, 11), hours))
        turn = np.array([[math.cos(t), -math.sin(t), 0], [math.sin(t), math.cos(t), 0], [0, 0, 1]])
        places = {name: turn @ np.array(xyz) for name, xyz in EHT_2017.items()}
        up = [name for name, r in places.items() if math.degrees(math.asin(r @ source / np.linalg.norm(r))) >= 10]
        for first, second in combinations(up, 2):
            baseline = (places[second] - places[first]) / 1.3e-3
            expected[scan, first, second] = [baseline @ east, baseline @ north]
    assert found.keys() == expected.keys()
    for key, uv in expected.items():
        assert found[key] == pytest.approx(uv, rel=1e-9, abs=1e-3)


def test_a_day_of_a_baseline_is_an_ellipse():
    X, Y, Z, delta = 3.1e6, -1.7e6, 2.3e6, 41.0
    day = EarthRotation(
        [2.5 * k for k in range(9)], declination=delta, wavelength=1e-3, stations=[[1e6, 2e6, 3e6], [1e6 + X, 2e6 + Y, 3e6 + Z]],
        min_elevation=-90,
    )  # fmt: skip
    u, v = day.uv.T * 1e-3
    delta = math.radians(delta)
    assert len(day) == 9
    torch.testing.assert_close(
        u**2 + ((v - Z * math.cos(delta)) / math.sin(delta)) ** 2, torch.full((9,), X**2 + Y**2, dtype=torch.float64)
    )


def test_the_south_pole_does_not_see_m87():
    night = EarthRotation([0.5 * k for k in range(48)], min_elevation=0.0)
    seen = {night.names[i] for i in night.stations.flatten().tolist()}
    assert seen == set(EHT_2017) - {"SPT"}
    # the longest projected baseline towards M 87 is somewhat under the Earth's diameter
    assert 10.5e6 < float(night.uv.norm(dim=1).max()) * 1.3e-3 < 11e6


def test_stations_in_any_form(tmp_path):
    names = ["SMT", "LMT", "ALMA"]
    places = torch.tensor([EHT_2017[name] for name in names], dtype=torch.float64)
    np.save(tmp_path / "stations.npy", places.numpy())
    by_name = EarthRotation([4.0], stations=names)
    assert by_name.names == names
    for stations in (places, places.tolist(), str(tmp_path / "stations.npy")):
        torch.testing.assert_close(EarthRotation([4.0], stations=stations).uv, by_name.uv)


def test_coverage_of_a_file(tmp_path):
    rows = torch.cat([M87.uv, M87.stations, M87.scan[:, None]], dim=1)
    np.save(tmp_path / "points.npy", rows.numpy())
    coverage = Coverage(str(tmp_path / "points.npy"))
    assert torch.equal(coverage.uv, M87.uv)
    assert torch.equal(coverage.stations, M87.stations)
    assert torch.equal(coverage.scan, M87.scan)
    assert Coverage(rows[:, :2]).stations is None
    assert len(coverage) == len(rows)


# Visibilities and the total flux


def test_point_source():
    operator = Visibilities((1, 6, 9), M87, 180.0, pulse="point")
    x = torch.zeros(1, 1, 6, 9, dtype=torch.float64)
    x[0, 0, 1, 2] = 0.7  # two pixels of 20 µas to the left, that is east, and one and a half up, north
    east, north = 2 * 20 * UAS, 1.5 * 20 * UAS
    expected = [0.7 * cmath.exp(-2j * math.pi * (u * east + v * north)) for u, v in M87.uv.tolist()]
    torch.testing.assert_close(operator(x)[0], torch.tensor(expected, dtype=torch.complex128))


def test_gaussian_source():
    pixels, sigma = 48, 12 * UAS
    offsets = ((pixels - 1) / 2 - torch.arange(pixels, dtype=torch.float64)) * 4 * UAS
    profile = torch.exp(-((offsets - 5 * UAS) ** 2) / (2 * sigma**2))  # 5 µas to the east and to the north
    x = torch.outer(profile, profile) / profile.sum() ** 2
    u, v = M87.uv.T
    expected = torch.exp(-2 * math.pi**2 * sigma**2 * (u**2 + v**2)) * torch.exp(-2j * math.pi * (u + v) * 5 * UAS)
    operator = Visibilities((1, pixels, pixels), M87, 4.0 * pixels, pulse="point")
    torch.testing.assert_close(operator(x[None, None])[0], expected, rtol=0, atol=1e-9)


def test_square_pixels_are_many_points():
    x, few = uniform(1, 1, 3, 4), Coverage(M87.uv[::6])
    fine = x.repeat_interleave(64, 2).repeat_interleave(64, 3) / 64**2
    square = Visibilities((1, 3, 4), few, 90.0)(x)
    # the midpoint rule is off by (π u Δ / 64)²/6 and the like
    torch.testing.assert_close(square, Visibilities((1, 192, 256), few, 90.0, "point")(fine), rtol=0, atol=1e-3)
    assert float((square - Visibilities((1, 3, 4), few, 90.0, "point")(x)).abs().max()) > 0.1


@pytest.mark.parametrize(("pulse", "power"), [("point", 0), ("square", 1), ("triangle", 2)])
def test_sum_over_pixels(pulse, power):
    x = uniform(2, 1, 5, 4)
    side = 100 * UAS / 4
    expected = np.zeros((2, len(M87)), dtype=complex)
    for n, (u, v) in enumerate(M87.uv.tolist()):
        for row in range(5):
            for column in range(4):
                east, north = (1.5 - column) * side, (2 - row) * side
                expected[:, n] += x[:, 0, row, column].numpy() * np.exp(-2j * np.pi * (u * east + v * north))
        expected[:, n] *= (np.sinc(u * side) * np.sinc(v * side)) ** power
    found = Visibilities((1, 5, 4), M87, 100.0, pulse=pulse)(x)
    torch.testing.assert_close(found, torch.from_numpy(expected))


LINEAR = {
    "visibilities": (lambda: Visibilities((1, 6, 5), M87, 120.0), (1, 6, 5)),
    "visibilities_few": (lambda: Visibilities((1, 6, 5), Coverage(M87.uv[::9]), 120.0), (1, 6, 5)),
    "total_flux": (lambda: TotalFlux((2, 3, 4)), (2, 3, 4)),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_algebra(name, dtype):
    make, shape = LINEAR[name]
    operator = make().to(dtype)
    x = uniform(3, *shape).to(dtype) - 0.5
    y = operator(uniform(3, *shape, seed=1).to(dtype) - 0.5)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}

    def dot(a: Tensor, b: Tensor) -> Tensor:
        product = a.real * b.real + a.imag * b.imag if a.is_complex() else a * b
        return product.flatten(1).sum(1)

    torch.testing.assert_close(dot(operator(x), y), dot(x, operator.adjoint(y)), **close)
    torch.testing.assert_close(operator.adjoint(y), LinearOperator.adjoint(operator, y), **close)
    d = math.prod(shape)
    columns = operator(torch.eye(d, dtype=dtype).reshape(d, *shape)).flatten(1)
    A = (torch.cat([columns.real, columns.imag], 1) if columns.is_complex() else columns).T
    _, S, Vt = torch.linalg.svd(A, full_matrices=True)
    assert operator.norm() == pytest.approx(float(S[0]), rel=1e-5)
    eigenvalues = torch.cat([S, S.new_zeros(d - len(S))]) ** 2 if len(S) < d else S**2
    gram = (x.flatten(1) @ Vt.T / (1 + eigenvalues) @ Vt).reshape(x.shape)
    torch.testing.assert_close(operator.gram_function(lambda s: 1 / (1 + s), x), gram, **close)
    torch.testing.assert_close(pickle.loads(pickle.dumps(operator))(x), operator(x))
    torch.testing.assert_close(operator(x[1:2]), operator(x)[1:2], **close)


def test_total_flux_is_the_visibility_at_no_distance():
    x = uniform(2, 1, 5, 4)
    torch.testing.assert_close(TotalFlux((1, 5, 4))(x), Visibilities((1, 5, 4), Coverage([[0.0, 0.0]]), 100.0)(x).real)


def test_visibilities_are_shown_as_an_image_in_their_units():
    x = torch.zeros(1, 16, 16, dtype=torch.float64)
    x[0, 4:9, 9:13] = 2.0
    operator = Visibilities((1, 16, 16), Coverage((uniform(2000, 2) - 0.5) * 5e10), 64.0)  # all frequencies of the grid
    picture = operator.display(operator(x[None])[0])
    assert picture.shape == x.shape
    assert float((picture - x).norm() / x.norm()) < 0.1
    units = PhysicalUnits(operator, physical_range=(0.0, 2.0))
    torch.testing.assert_close(units.display(units(x[None] - 1)[0]), picture - 1)


# Closure quantities


@pytest.mark.parametrize("stations", range(3, 9))
def test_number_of_independent_closures(stations):
    coverage = complete(stations, scans=2)
    phases = ClosurePhases((1, 4, 4), coverage, 100.0)
    assert len(phases.design) == 2 * (stations - 1) * (stations - 2) // 2
    assert torch.linalg.matrix_rank(phases.design) == len(phases.design)
    assert all(0 in path for _, path in phases.paths)  # the reference
    if stations > 3:
        amplitudes = LogClosureAmplitudes((1, 4, 4), coverage, 100.0)
        assert len(amplitudes.design) == 2 * stations * (stations - 3) // 2
        assert torch.linalg.matrix_rank(amplitudes.design) == len(amplitudes.design)
        assert all({0, 1} <= set(path) for _, path in amplitudes.paths)


@pytest.mark.parametrize("seed", range(4))
def test_missing_baselines(seed):
    pairs = list(combinations(range(7), 2))
    kept = np.random.default_rng(seed).permutation(len(pairs))[:13]
    rng = np.random.default_rng(seed)
    coverage = Coverage([[*rng.normal(size=2), *pairs[k], 3] for k in kept])
    place = {pairs[k]: n for n, k in enumerate(kept)}
    for cls, length, sign in ((ClosurePhases, 3, -1), (LogClosureAmplitudes, 4, 1)):
        rows = []
        for path in permutations(range(7), length):
            i, j, k, m = (*path, path[0])[:4]
            terms = (
                [(i, j, 1), (j, k, 1), (i, k, -1)] if length == 3 else [(i, j, 1), (k, m, 1), (i, k, -1), (j, m, -1)]
            )
            if all((min(a, b), max(a, b)) in place for a, b, _ in terms):
                row = np.zeros(13)
                for a, b, s in terms:
                    row[place[min(a, b), max(a, b)]] = s if a < b else s * sign
                rows.append(row)
        rank = np.linalg.matrix_rank(np.array(rows)) if rows else 0
        if rank == 0:
            with pytest.raises(ValueError, match="no scan has a closed path"):
                cls((1, 4, 4), coverage, 100.0)
            continue
        found = cls((1, 4, 4), coverage, 100.0).design.numpy()
        assert len(found) == np.linalg.matrix_rank(found) == rank
        assert np.linalg.matrix_rank(np.vstack([found, rows])) == rank


def test_closures_are_what_their_paths_say():
    coverage = complete(5, scans=2)
    x = uniform(1, 1, 6, 6)
    V = Visibilities((1, 6, 6), coverage, 100.0)(x)[0].tolist()
    at = {}
    for scan, (i, j), value in zip(coverage.scan.tolist(), coverage.stations.tolist(), V, strict=True):
        at[scan, i, j], at[scan, j, i] = value, value.conjugate()
    phases = ClosurePhases((1, 6, 6), coverage, 100.0)
    expected = [cmath.phase(at[s, i, j] * at[s, j, k] * at[s, k, i]) for s, (i, j, k) in phases.paths]
    assert phases(x)[0].tolist() == pytest.approx(expected, abs=1e-9)
    amplitudes = LogClosureAmplitudes((1, 6, 6), coverage, 100.0)
    expected = [
        math.log(abs(at[s, i, j]) * abs(at[s, k, m]) / (abs(at[s, i, k]) * abs(at[s, j, m])))
        for s, (i, j, k, m) in amplitudes.paths
    ]
    assert amplitudes(x)[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_order_of_baselines_and_stations_does_not_matter():
    coverage = complete(5)
    rows = torch.cat([coverage.uv, coverage.stations, coverage.scan[:, None]], dim=1)
    turned = torch.cat([-rows[:, :2], rows[:, [3, 2, 4]]], dim=1)
    mixed = torch.where(torch.arange(len(rows))[:, None] % 3 == 0, turned, rows).flip(0)
    x = uniform(1, 1, 6, 6)
    for cls in CLOSURES:
        first, second = cls((1, 6, 6), coverage, 100.0), cls((1, 6, 6), Coverage(mixed), 100.0)
        assert first.paths == second.paths
        torch.testing.assert_close(first(x), second(x))


@pytest.mark.parametrize("cls", CLOSURES)
def test_gains_do_not_matter(cls):
    operator, x = cls((1, 8, 8), M87, 120.0), uniform(2, 1, 8, 8)
    V = Visibilities((1, 8, 8), M87, 120.0)(x).numpy()
    rng = np.random.default_rng(1)
    spoilt = V.copy()
    for n, (scan, (i, j)) in enumerate(zip(M87.scan.tolist(), M87.stations.tolist(), strict=True)):
        gains = [np.random.default_rng([scan, k]).normal(size=2) @ [1, 1j] for k in (i, j)]
        spoilt[:, n] *= gains[0] * np.conj(gains[1])
    expected = operator(x)

    def gap(V: np.ndarray) -> float:
        difference = operator.of(torch.from_numpy(V)) - expected
        if cls is ClosurePhases:
            difference = torch.remainder(difference + math.pi, 2 * math.pi) - math.pi
        return float(difference.abs().max())

    assert np.abs(spoilt - V).max() > 0.1
    assert gap(spoilt) < 1e-9
    # errors of baselines, not of stations, do matter
    assert gap(V * (rng.normal(size=V.shape) + 1j * rng.normal(size=V.shape))) > 0.1


@pytest.mark.parametrize("cls", CLOSURES)
def test_symmetries(cls):
    operator = cls((1, 12, 12), M87, 120.0)
    x = torch.zeros(1, 1, 12, 12, dtype=torch.float64)
    x[:, :, 3:8, 4:9] = uniform(1, 1, 5, 5)
    y = operator(x)
    torch.testing.assert_close(operator(0.003 * x), y)  # the total flux
    torch.testing.assert_close(operator(x.roll((2, -3), (2, 3))), y)  # the place
    sign = -1 if cls is ClosurePhases else 1
    torch.testing.assert_close(operator(x.flip((2, 3))), sign * y)  # turned by 180 degrees
    assert float(y.abs().max()) > 0.1


def test_closure_phases_are_angles():
    phases = ClosurePhases((1, 12, 12), M87, 300.0)
    y = phases(uniform(200, 1, 12, 12))
    assert float(y.min()) > -math.pi
    assert float(y.max()) <= math.pi
    assert float(y.min()) < -3
    assert float(y.max()) > 3
    # a source and itself turned by 180 degrees in one image: real visibilities, phases 0 and exactly π
    x = uniform(20, 1, 12, 12) ** 8
    y = phases(x + x.flip((2, 3)))
    folded = torch.minimum(y.abs(), (y.abs() - math.pi).abs())
    assert float(folded.max()) < 1e-6


@pytest.mark.parametrize("cls", CLOSURES)
def test_gradients(cls):
    operator = cls((1, 4, 5), EarthRotation([4.0], stations=["ALMA", "LMT", "SMT", "PV"]), 100.0)
    x = uniform(2, 1, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(operator, (x,))
    assert torch.autograd.gradgradcheck(operator, (x,))


@pytest.mark.parametrize("cls", CLOSURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blank_and_faint_images(cls, dtype):
    operator = cls((1, 6, 6), M87, 120.0).to(dtype)
    blank = torch.zeros(2, 1, 6, 6, dtype=dtype, requires_grad=True)
    y = operator(blank)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(torch.autograd.grad(y.sum(), blank)[0], torch.zeros_like(blank))
    _, forward = torch.autograd.functional.jvp(operator, blank.detach(), torch.ones_like(blank))
    assert bool(forward.isfinite().all())
    x = uniform(1, 1, 6, 6).to(dtype)
    faint = (1e-26 * x).requires_grad_()  # SI units; the squares of these fluxes underflow in float32
    y = operator(faint)
    torch.testing.assert_close(y, operator(x), rtol=1e-3, atol=1e-3)
    bright = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(y.sum(), faint)
    (expected,) = torch.autograd.grad(operator(bright).sum(), bright)
    torch.testing.assert_close(gradient * 1e-26, expected, rtol=1e-2, atol=1e-2)


def test_a_sampler_can_start_from_blank_images():
    operator = Stack(
        [ClosurePhases((1, 6, 6), M87, 120.0), LogClosureAmplitudes((1, 6, 6), M87, 120.0), TotalFlux((1, 6, 6))]
    )
    for A in (operator, PhysicalUnits(operator, physical_range=(0.0, 0.01))):
        model = ForwardModel(A, JointNoise([VonMisesNoise(10.0), GaussianNoise(0.3), GaussianNoise(0.1)]))
        y = model.simulate(uniform(1, 1, 6, 6).float(), generator=torch.Generator().manual_seed(0))[0]
        model.check_measurement(y, (1, 6, 6))


@pytest.mark.parametrize("cls", CLOSURES)
def test_covariance(cls):
    coverage = complete(5)
    operator = cls((1, 6, 6), coverage, 60.0)
    V = operator.visibilities(uniform(1, 1, 6, 6))[0]
    sigma = V.abs() * (0.004 + 0.006 * uniform(len(V)))  # a signal-to-noise ratio over 100: the first order is enough
    expected = operator.covariance(V, sigma)
    draws = 20_000
    w = torch.randn(2, draws, len(V), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = operator.of(V + sigma * torch.complex(w[0], w[1])) - operator.of(V[None])
    if cls is ClosurePhases:
        noise = torch.remainder(noise + math.pi, 2 * math.pi) - math.pi
    found = noise.T @ noise / draws
    variances = expected.diagonal()
    error = ((torch.outer(variances, variances) + expected**2) / draws).sqrt()  # of a Gaussian's covariance
    assert float(((found - expected) / error).abs().max()) < 4.5
    assert float(expected.fill_diagonal_(0).abs().max()) > 1e-6  # closure quantities with common baselines do correlate
    GaussianNoise(covariance=operator.covariance(V, 0.01))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": []}, "times"),
        ({"times": [2.0, 1.0]}, "increasing"),
        ({"times": [math.nan]}, "times"),
        ({"date": (2017, 2, 29)}, r"date = \(2017, 2, 29\)"),
        ({"date": (2017, 2)}, r"date = \(2017, 2\)"),
        ({"right_ascension": 24.0}, "right_ascension = 24.0"),
        ({"declination": -91.0}, "declination = -91.0"),
        ({"wavelength": 0.0}, "wavelength = 0.0"),
        ({"min_elevation": 90.0}, "min_elevation = 90.0"),
        ({"stations": "vla"}, "stations = 'vla'"),
        ({"stations": ["ALMA", "VLA"]}, "VLA"),
        ({"stations": ["ALMA", "ALMA"]}, "different ones"),
        ({"stations": ["ALMA"]}, "at least two"),
        ({"stations": [[1.0, 2.0], [3.0, 4.0]]}, r"shape \(2, 2\)"),
        ({"stations": [[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]]}, "centre"),
        ({"stations": [[math.nan, 0.0, 0.0], [1.0, 2.0, 3.0]]}, "NaN"),
        ({"stations": ["SPT", "ALMA"]}, "no two stations"),
    ],
)
def test_earth_rotation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        EarthRotation(**{"times": [1.0], **arguments})


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "shape"),
        ([[1.0, 2.0, 3.0]], r"shape \(1, 3\)"),
        ([[math.inf, 2.0]], "infinite"),
        ([[1.0, 2.0, 0.5, 1.0, 0.0]], "whole"),
        ([[1.0, 2.0, 1.0, 1.0, 0.0]], "itself"),
        ([[1.0, 2.0, 0.0, 1.0, 0.0], [3.0, 4.0, 1.0, 0.0, 0.0]], "several"),
    ],
)
def test_coverage_refuses(points, message):
    with pytest.raises(ValueError, match=message):
        Coverage(points)


@pytest.mark.parametrize("cls", [Visibilities, *CLOSURES])
def test_operators_refuse(cls):
    for shape, view, pulse, message in (
        ((3, 4, 4), 100.0, "square", "one channel"),
        ((1, 4, 4), 0.0, "square", "field_of_view = 0.0"),
        ((1, 4, 4), 100.0, "round", "pulse = 'round'"),
    ):
        with pytest.raises(ValueError, match=message):
            cls(shape, M87, view, pulse=pulse)
    with pytest.raises(ValueError, match=r"takes images \(B, 1, 4, 4\)"):
        cls((1, 4, 4), M87, 100.0)(torch.zeros(1, 1, 5, 4))


def test_closures_need_stations_and_paths():
    for cls in CLOSURES:
        with pytest.raises(ValueError, match="need the stations"):
            cls((1, 4, 4), Coverage(M87.uv), 100.0)
        with pytest.raises(ValueError, match=f"as {cls.__name__} need"):
            cls((1, 4, 4), complete(2), 100.0)
    operator = ClosurePhases((1, 4, 4), complete(3), 100.0)
    V = torch.ones(3, dtype=torch.complex128)
    for arguments, message in (
        ((V[:2], 0.1), "shape"),
        ((V, [0.1, 0.2]), "sigma"),
        ((V, 0.0), "positive"),
        ((0 * V, 0.1), "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            operator.covariance(*arguments)


@pytest.mark.parametrize("cls", CLOSURES)
def test_copies_and_single_images(cls):
    operator = cls((1, 5, 7), M87, 120.0)
    x = uniform(3, 1, 5, 7)
    assert operator(x.float()).dtype == torch.float32
    torch.testing.assert_close(copy.deepcopy(operator)(x), operator(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(operator))(x), operator(x))
    torch.testing.assert_close(operator(x[1:2]), operator(x)[1:2])
