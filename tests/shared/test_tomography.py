"""Computed tomography against other programs, exact sinograms and its own conventions."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from skimage.transform import iradon, radon
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, PoissonNoise, TransmissionNoise
from dpnp_shared.operators import (
    BeerLambert,
    FanBeamCT,
    LinearOperator,
    Operator,
    ParallelBeamCT,
    PhysicalUnits,
    RayTransform,
)
from dpnp_shared.phantoms import Ellipses

ELLIPSE = Ellipses(((1.0, 0.1, -0.2, 0.6, 0.3, 35.0),))
BALL = Ellipses(((1.0, 0.1, -0.2, 0.5, 0.5, 0.0),))
HEAD = Ellipses.shepp_logan()
SHORT_SCAN = 180 + 2 * math.degrees(math.asin(math.sqrt(2) / 3))  # of an image of side 2 from a distance of 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parallel(n: int, angles: int = 45, **options: float) -> ParallelBeamCT:
    """Of an image of side 2."""
    return ParallelBeamCT((1, n, n), angles, pixel_size=2 / n, **options)


def fan(n: int, angles: int = 45, **options: float | str) -> FanBeamCT:
    return FanBeamCT((1, n, n), angles, 3.0, 2.0, pixel_size=2 / n, **options)


def curved(n: int, angles: int = 45, **options: float) -> FanBeamCT:
    return fan(n, angles, detector_shape="curved", **options)


SCANNERS = [parallel, fan, curved]


def exact(operator: RayTransform, phantom: Ellipses) -> Tensor:
    """The phantom's line integrals, ``(1, 1, views, detectors)``."""
    return phantom.line_integrals(operator.points, operator.directions)[None, None]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def psnr(image: Tensor, truth: Tensor) -> float:
    return 10 * math.log10(float((truth.max() - truth.min()) ** 2 / (image - truth).square().mean()))


CASES = {
    "parallel": (lambda: ParallelBeamCT((2, 5, 4), 7), (2, 5, 4)),
    "parallel_spacing": (lambda: ParallelBeamCT((1, 4, 7), [0, 90.0, 33, 271], 5, 0.7, 1.3), (1, 4, 7)),
    "fan_flat": (lambda: FanBeamCT((2, 6, 4), 5, 9.0, 3.0), (2, 6, 4)),
    "fan_curved": (lambda: FanBeamCT((1, 5, 7), 6, 9.0, 0.0, 8, 1.1, 0.9, "curved", 200), (1, 5, 7)),
    "rays": (lambda: RayTransform((2, 4, 5), normal(6, 2), normal(6, 2, seed=1)), (2, 4, 5)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[LinearOperator, Tensor]:
    """An operator and its matrix."""
    build, shape = CASES[request.param]
    operator, d = build(), math.prod(shape)
    return operator, operator(torch.eye(d, dtype=torch.float64).reshape(d, *shape)).reshape(d, -1).T


def test_adjoint_is_the_exact_transpose(case):
    operator, A = case
    x = normal(3, *operator.image_shape)
    y = operator(x)
    torch.testing.assert_close(y.flatten(1), x.flatten(1) @ A.T, rtol=1e-12, atol=1e-12)
    z = normal(*y.shape, seed=2)
    torch.testing.assert_close(operator.adjoint(z).flatten(1), z.flatten(1) @ A, rtol=1e-12, atol=1e-12)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        forward, backward = operator(x.to(dtype)), operator.adjoint(z.to(dtype))
        assert forward.dtype == backward.dtype == dtype
        left, right = (forward.double() * z).sum(), (x * backward.double()).sum()
        assert float(left - right) == pytest.approx(0, abs=tolerance * float(y.norm() * z.norm()))
    assert operator.norm() == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-5)
    assert not operator.has_gram_function


def test_images_of_a_batch_do_not_touch(case):
    operator, _ = case
    x = normal(9, *operator.image_shape)
    for dtype in (torch.float32, torch.float64):
        y = operator(x.to(dtype))
        assert torch.equal(operator(x[4:5].to(dtype)), y[4:5])
        assert torch.equal(operator.adjoint(y[4:5]), operator.adjoint(y)[4:5])


def test_autograd_goes_through_twice(case):
    operator, _ = case
    x, v = normal(2, *operator.image_shape).requires_grad_(), normal(2, *operator.image_shape, seed=1)
    z = normal(*operator(x).shape, seed=2)
    (gradient,) = torch.autograd.grad((operator(x) * z).sum(), x)
    torch.testing.assert_close(gradient, operator.adjoint(z), rtol=0, atol=1e-14)
    _, jv = torch.autograd.functional.jvp(operator, x, v)
    torch.testing.assert_close(jv, operator(v), rtol=0, atol=1e-14)
    _, vj = torch.autograd.functional.vjp(operator, x, z)
    torch.testing.assert_close(vj, operator.adjoint(z), rtol=0, atol=1e-14)
    torch.testing.assert_close(torch.func.vjp(operator, x.detach())[1](z)[0], operator.adjoint(z), rtol=0, atol=1e-14)
    assert torch.autograd.gradgradcheck(lambda u: operator(u).square(), (x[:1].detach().requires_grad_(),))


def test_operators_are_copied_cast_and_kept(case):
    operator, _ = case
    x = normal(2, *operator.image_shape)
    y = operator(x)
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert torch.equal(other(x), y)
    blank = copy.deepcopy(operator)
    for values in blank.state_dict().values():
        values.zero_()
    blank.load_state_dict(operator.state_dict())
    assert torch.equal(blank(x), y)
    torch.testing.assert_close(operator.to(torch.float32)(x), y, rtol=1e-5, atol=1e-5)


def test_weights_are_those_of_joseph():
    h, w, p = 7, 5, 0.8
    operator = RayTransform((1, h, w), 3 * normal(200, 2), normal(200, 2, seed=1), p)
    image = normal(1, 1, h, w, seed=2)
    values = np.zeros((h + 2, w + 2))
    values[1:-1, 1:-1] = image[0, 0]
    columns, rows = (np.arange(-1, w + 1) - (w - 1) / 2) * p, ((h - 1) / 2 - np.arange(-1, h + 1)) * p
    expected = []
    for (x, y), (dx, dy) in zip(operator.points.tolist(), operator.directions.tolist(), strict=True):
        if abs(dy) >= abs(dx):
            samples = [np.interp(x + (rows[i] - y) / dy * dx, columns, values[i], 0, 0) for i in range(h + 2)]
        else:
            heights = [y + (columns[j] - x) / dx * dy for j in range(w + 2)]
            samples = [np.interp(heights[j], rows[::-1], values[::-1, j], 0, 0) for j in range(w + 2)]
        expected.append(sum(samples) * p / max(abs(dx), abs(dy)))
    assert np.count_nonzero(expected) > 100
    torch.testing.assert_close(operator(image)[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_angles_and_detectors_follow_the_stated_directions():
    n, p = 21, 0.5
    i, j = 3, 14  # up and to the right
    x, y = (j - 10) * p, (10 - i) * p
    image = torch.zeros(1, 1, n, n, dtype=torch.float64)
    image[..., i, j] = 1

    def middle(sinogram: Tensor, positions: Tensor) -> Tensor:
        return (sinogram[0, 0] * positions).sum(1) / sinogram[0, 0].sum(1)

    angles = [0.0, 90.0, 30.0, 135.0, 250.0]
    operator = ParallelBeamCT((1, n, n), angles, detectors=81, pixel_size=p, detector_spacing=0.2)
    theta = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    torch.testing.assert_close(
        middle(operator(image), operator.positions), x * theta.cos() + y * theta.sin(), rtol=0, atol=0.02
    )
    for shape in ("flat", "curved"):
        # source below the image, then to its right; 20 and 10 cm from the middle to source and detector
        operator = FanBeamCT((1, n, n), [0, 90.0], 20.0, 10.0, 201, p, 0.1, detector_shape=shape)
        tangent = torch.tensor([x / (20 + y), y / (20 - x)], dtype=torch.float64)
        expected = 30 * (tangent if shape == "flat" else tangent.atan())
        torch.testing.assert_close(middle(operator(image), operator.positions), expected, rtol=0, atol=0.02)
        torch.testing.assert_close(operator.points[:, 0], torch.tensor([[0.0, -20], [20, 0]], dtype=torch.float64))


def test_first_view_sums_columns_and_the_one_at_90_degrees_rows_from_below():
    image = normal(1, 2, 6, 8)
    y = ParallelBeamCT((2, 6, 8), [0.0, 90.0], detectors=8, pixel_size=0.5)(image)
    torch.testing.assert_close(y[:, :, 0], 0.5 * image.sum(2))
    torch.testing.assert_close(y[:, :, 1, 1:7], 0.5 * image.sum(3).flip(2))
    assert ParallelBeamCT((1, 28, 28), 1).rays == (1, 40)  # the diagonal is 39.6


@pytest.mark.parametrize("scanner", SCANNERS)
def test_line_integrals_of_an_ellipse_converge_with_the_resolution(scanner):
    errors = []
    for n in (32, 64, 128):
        operator = scanner(n, 20)
        errors.append(distance(operator(ELLIPSE.image(n, n, 2 / n)[None]), exact(operator, ELLIPSE)))
    assert errors[1] < 0.65 * errors[0]
    assert errors[2] < 0.65 * errors[1]
    assert errors[2] < 0.015


@pytest.mark.parametrize("scanner", SCANNERS)
def test_line_integrals_of_a_smooth_object_are_exact_to_second_order(scanner):
    errors = []
    for n in (16, 32, 64):
        operator, s = scanner(n, 20), 0.15
        t = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1
        blob = torch.exp(-((t - 0.1) ** 2 + (t[:, None] - 0.2) ** 2) / (2 * s**2))[None, None]  # around (0.1, -0.2)
        o = operator.points - torch.tensor([0.1, -0.2], dtype=torch.float64)
        square = o.square().sum(-1) - (o * operator.directions).sum(-1) ** 2
        errors.append(distance(operator(blob)[0, 0], math.sqrt(2 * math.pi) * s * torch.exp(-square / (2 * s**2))))
    assert errors[1] < 0.35 * errors[0]
    assert errors[2] < 0.35 * errors[1]
    assert errors[2] < 3e-3


def test_every_projection_has_the_mass_of_the_image():
    image = HEAD.image(48, 64, 1 / 32)[None]
    operator = ParallelBeamCT((1, 48, 64), 36, pixel_size=1 / 32, detector_spacing=1 / 48)
    mass = float(image.sum()) / 32**2
    np.testing.assert_allclose(operator(image).sum(3)[0, 0] / 48, mass, rtol=5e-3)


@pytest.mark.parametrize(("n", "tolerance"), [(65, 0.01), (129, 0.005)])
def test_sinogram_is_that_of_scikit_image(n, tolerance):
    image = HEAD.image(n, n, 2 / n)
    operator = ParallelBeamCT((1, n, n), 24, detectors=n)
    theirs = radon(image[0].numpy(), theta=operator.angles.numpy(), circle=True).T
    assert distance(operator(image[None])[0, 0], torch.from_numpy(theirs)) < tolerance


def test_filtered_back_projection_is_that_of_scikit_image():
    n = 65
    operator = ParallelBeamCT((1, n, n), 24, detectors=n)
    y = operator(HEAD.image(n, n, 2 / n)[None])
    x = torch.arange(n) - n // 2
    inside = x**2 + x[:, None] ** 2 < (n // 2) ** 2
    for window, name, tolerance in (("ram-lak", "ramp", 1e-10), ("hann", "hann", 5e-3)):  # theirs is not quite periodic
        theirs = iradon(y[0, 0].T.numpy(), theta=operator.angles.numpy(), filter_name=name, circle=True)
        assert distance(operator.fbp(y, window)[0, 0][inside], torch.from_numpy(theirs)[inside]) < tolerance


@pytest.mark.parametrize(
    ("build", "least"),
    [
        (lambda v: parallel(64, v), 25.0),
        (lambda v: parallel(64, 2 * v, arc=360), 25.0),
        (lambda v: fan(64, 2 * v), 27.0),
        (lambda v: curved(64, 2 * v), 26.0),
        (lambda v: fan(64, 2 * v, arc=SHORT_SCAN + 1), 27.0),
        (lambda v: curved(64, 2 * v, arc=300), 26.0),
    ],
    ids=["parallel", "parallel_turn", "flat", "curved", "short_scan", "over_scan"],
)
def test_filtered_back_projection_of_exact_data_nears_the_object_with_more_views(build, least):
    truth = HEAD.image(64, 64, 1 / 32)
    figures = [psnr(operator.fbp(exact(operator, HEAD))[0], truth) for operator in map(build, (8, 24, 80))]
    assert figures[0] + 1 < figures[1]
    assert figures[1] + 1 < figures[2]
    assert figures[2] > least


@pytest.mark.parametrize(
    "build",
    [
        lambda: parallel(48, 90, arc=270),
        lambda: parallel(48, 90, detector_spacing=0.03),
        lambda: fan(48, 120, detector_spacing=0.03),
        lambda: fan(48, 120, arc=SHORT_SCAN),
        lambda: fan(48, 120, arc=270),
        lambda: curved(48, 120, arc=SHORT_SCAN),
        lambda: FanBeamCT((1, 48, 48), 120, 3.0, 0.0, pixel_size=1 / 24, detector_shape="curved"),
    ],
)
@pytest.mark.parametrize("window", ["ram-lak", "hann"])
def test_values_inside_of_a_flat_object_are_right(build, window):
    operator = build()
    image = operator.fbp(exact(operator, BALL), window)
    x = (torch.arange(48) - 23.5) / 24
    radius = ((x - 0.1) ** 2 + (-x[:, None] + 0.2) ** 2).sqrt()
    assert float(image[0, 0][radius < 0.35].mean()) == pytest.approx(1, abs=0.01)
    assert float(image[0, 0][(radius > 0.65) & (radius < 0.8)].mean()) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("arc", [SHORT_SCAN + 0.01, 260.0, 330.0])
def test_short_scan_weights_of_a_line_add_up_to_one(arc):
    operator = fan(16, 720, arc=arc)
    fan_angle = (operator.positions / 5).atan()
    weights = (operator.line_weights / fan_angle.cos() / math.radians(arc / 720)).numpy()  # (views, detectors)
    beta = (operator.angles + arc / 1440).numpy()
    for k, gamma in enumerate(torch.rad2deg(fan_angle).tolist()):
        inner = abs(gamma) < 24  # of 28.1; further out, the weights rise too fast to be interpolated
        again = beta + 180 - 2 * gamma
        both = (again > beta[0]) & (again < beta[-1]) & inner
        mirror = np.interp(again[both], beta, weights[:, -1 - k])
        np.testing.assert_allclose(weights[both, k] + mirror, 1, atol=2e-3)
        once = (again > arc) & (beta - 180 - 2 * gamma < 0) & inner
        np.testing.assert_allclose(weights[once, k], 1, atol=1e-12)


def test_weights_of_views_count_the_angles_that_were_measured():
    step = math.radians(1)
    weights = lambda angles: ParallelBeamCT((1, 4, 4), angles).line_weights.flatten() / step  # noqa: E731
    np.testing.assert_allclose(weights([0.0, 90.0, 45.0, 135.0]), 45)
    np.testing.assert_allclose(weights([0.0, 10.0, 50.0, 100.0, 150.0]), [20, 25, 45, 50, 40])
    np.testing.assert_allclose(weights([0.0, 60.0, 120.0, 180.0]), [30, 60, 60, 30])  # the last is the first again
    np.testing.assert_allclose(ParallelBeamCT((1, 4, 4), 9, arc=90).line_weights.flatten() / step, 10)
    np.testing.assert_allclose(ParallelBeamCT((1, 4, 4), 1).line_weights / step, 180)
    # a fan that sees some lines twice and others never: 1 where a line is seen once, one half for twice
    operator = fan(16, 40, arc=200)
    shares = operator.line_weights / (operator.positions / 5).atan().cos() / (5 * step)
    assert {round(w, 6) for w in shares.flatten().tolist()} == {0.5, 1.0}
    order = [3, 0, 2, 1, 4]
    first = FanBeamCT((1, 8, 8), [0.0, 50.0, 100.0, 150.0, 200.0], 9.0, 9.0)
    second = FanBeamCT((1, 8, 8), [150.0, 0.0, 100.0, 50.0, 200.0], 9.0, 9.0)
    y = normal(1, 1, *first.rays)
    torch.testing.assert_close(second.fbp(y[:, :, order]), first.fbp(y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", ["flat", "curved"])
def test_a_far_source_gives_parallel_beams(shape):
    image = normal(1, 1, 9, 12)
    beams = ParallelBeamCT((1, 9, 12), 14, detectors=16)
    far = FanBeamCT((1, 9, 12), 14, 1e7, 0.0, detectors=16, detector_shape=shape, arc=180)
    torch.testing.assert_close(far(image), beams(image), rtol=0, atol=1e-4)
    beams = ParallelBeamCT((1, 9, 12), 14, detectors=16, arc=360)
    far = FanBeamCT((1, 9, 12), 14, 1e7, 0.0, detectors=16, detector_shape=shape)
    y = beams(image)
    torch.testing.assert_close(far.fbp(y), beams.fbp(y), rtol=0, atol=1e-4)


def test_channels_are_projected_each_on_its_own():
    image = normal(2, 3, 5, 6)
    for build in (lambda c: ParallelBeamCT((c, 5, 6), 4), lambda c: FanBeamCT((c, 5, 6), 4, 8.0, 8.0)):
        y = build(3)(image)
        single = torch.cat([build(1)(image[:, k : k + 1]) for k in range(3)], 1)
        torch.testing.assert_close(y, single, rtol=0, atol=1e-13)
        picture = build(3).display(y[0])
        assert picture.shape == (3, 5, 6)
        torch.testing.assert_close(picture, build(1).fbp(y[0, :, None])[:, 0])
        assert build(3).fbp(y.float()).dtype == torch.float32
        torch.testing.assert_close(build(3).float().fbp(y.float()).double(), build(3).fbp(y), rtol=0, atol=1e-4)


def test_unseen_pixels_are_those_that_no_ray_touches():
    operator = ParallelBeamCT((2, 4, 6), [0.0], detectors=3)
    # three vertical rays at -1, 0 and 1 between the columns' middles at -2.5, -1.5, ..., 2.5
    assert operator.unseen.tolist() == [[[True, False, False, False, False, True]] * 4]
    assert ParallelBeamCT((1, 8, 8), 10).unseen is None
    assert FanBeamCT((1, 8, 8), 10, 9.0, 9.0).unseen is None


def test_beer_lambert_follows_its_law_and_its_gradient():
    scanner = ParallelBeamCT((2, 4, 5), 3, detectors=4, pixel_size=0.3)
    x = normal(2, 2, 4, 5).abs()
    operator = BeerLambert(scanner, 500.0)
    torch.testing.assert_close(operator(x), 500 * torch.exp(-scanner(x)))
    assert float(operator(torch.zeros_like(x)).min()) == 500
    assert operator(x.float()).dtype == torch.float32
    assert torch.autograd.gradcheck(operator, (x[:1].requires_grad_(),))
    each = BeerLambert(scanner, [100.0, 200.0, 300.0, 400.0])
    torch.testing.assert_close(each(x)[..., 2], 300 * torch.exp(-scanner(x))[..., 2])
    for model in (operator, each):
        torch.testing.assert_close(model.line_integrals(model(x)), scanner(x))
        torch.testing.assert_close(model.display(model(x)[0]), scanner.display(scanner(x)[0]))
        assert model.image_shape == (2, 4, 5)
        assert model.differentiable
    dark = operator.line_integrals(torch.zeros(2, 3, 4))
    torch.testing.assert_close(dark, torch.full_like(dark, math.log(1000)))
    assert BeerLambert(ParallelBeamCT((1, 4, 6), [0.0], detectors=3), 9).unseen is not None
    assert not BeerLambert(WithoutGradient(), 9.0).differentiable


class WithoutGradient(Operator):
    differentiable = False

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_physical_units_go_around_the_law_or_inside_of_it():
    scanner = parallel(12, 20)
    outside = PhysicalUnits(BeerLambert(scanner, 1e3), physical_range=(0.0, 2.0))
    inside = BeerLambert(PhysicalUnits(scanner, physical_range=(0.0, 2.0)), 1e3)
    x = 2 * BALL.image(12, 12, 1 / 6)[None] - 1
    y = outside(x)
    torch.testing.assert_close(y, 1e3 * torch.exp(-scanner(x + 1)))
    torch.testing.assert_close(inside(x), y)
    torch.testing.assert_close(outside.display(y[0]), inside.display(y[0]))
    assert psnr(outside.display(y[0])[None], x) > 15  # in the prior's units
    assert outside.linear_part is None
    assert inside.linear_part is None
    logarithm = PhysicalUnits(scanner, physical_range=(0.0, 2.0))
    assert isinstance(logarithm.linear_part, LinearOperator)


def test_counts_have_the_law_of_transmission():
    scanner = ParallelBeamCT((1, 4, 5), 3, detectors=4, pixel_size=0.3)
    x = normal(1, 1, 4, 5).abs()
    counts = ForwardModel(BeerLambert(scanner, 50.0), PoissonNoise(background=2.0))
    y = counts.simulate(x.expand(4000, -1, -1, -1), generator=torch.Generator().manual_seed(0))
    mean = 50 * torch.exp(-scanner(x)) + 2
    assert float(((y.mean(0) - mean) / (mean / 4000).sqrt()).abs().max()) < 4  # of 12 standard normals
    integrals = ForwardModel(scanner, TransmissionNoise(50.0, background=2.0))
    torch.testing.assert_close(counts.log_likelihood(x, y[0]), integrals.log_likelihood(x, y[0]))


def test_the_gradient_of_a_likelihood_is_that_of_finite_differences():
    scanner = PhysicalUnits(FanBeamCT((1, 4, 5), 3, 6.0, 3.0, detectors=5), physical_range=(0.0, 0.2))
    model = ForwardModel(BeerLambert(scanner, 200.0), GaussianNoise(10.0))
    x, truth = normal(2, 1, 4, 5).requires_grad_(), normal(1, 1, 4, 5, seed=1)
    y = model.simulate(truth, generator=torch.Generator().manual_seed(0))[0]
    assert torch.autograd.gradcheck(lambda u: model.log_likelihood(u, y), (x,))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ParallelBeamCT", {"image_shape": [1, 4, 4], "angles": 6, "arc": 90}),
        ("ParallelBeamCT", {"image_shape": [1, 4, 4], "angles": [0, 10.5], "detectors": 4, "detector_spacing": 2}),
        ("ParallelBeamCT", {"image_shape": [1, 4, 4], "angles": "angles.npy", "pixel_size": 0.5}),
        (
            "FanBeamCT",
            {
                "image_shape": [1, 4, 4],
                "angles": 6,
                "source_distance": 9,
                "detector_distance": 0,
                "detector_shape": "curved",
            },
        ),
        ("RayTransform", {"image_shape": [1, 4, 4], "points": [[0, 0], [1, 0]], "directions": [[0, 1], [1, 1]]}),
        (
            "BeerLambert",
            {
                "operator": {
                    "class_path": "dpnp_shared.operators.ParallelBeamCT",
                    "init_args": {"image_shape": [1, 4, 4], "angles": 3},
                },
                "photons": 100,
            },
        ),
    ],
)
def test_operators_are_built_from_plain_values(name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("angles.npy", np.array([0.0, 30.0, 100.0]))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--operator", type=Operator)
    config = {"operator": {"class_path": f"dpnp_shared.operators.{name}", "init_args": arguments}}
    operator = parser.instantiate(parser.parse_object(config)).operator
    assert operator(torch.zeros(2, 1, 4, 4)).shape[0] == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ParallelBeamCT((1, 4, 4), 0), "angles = 0"),
        (lambda: ParallelBeamCT((1, 4, 4), []), r"angles has shape \(0,\)"),
        (lambda: ParallelBeamCT((1, 4, 4), [[0.0]]), r"angles has shape \(1, 1\)"),
        (lambda: ParallelBeamCT((1, 4, 4), [math.nan]), "angles holds 1 entries"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, arc=0), "arc = 0"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, arc=361), "arc = 361"),
        (lambda: ParallelBeamCT((1, 4, 4), [0.0], arc=90), "arc = 90 goes with a number of views"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, detectors=0), "detectors = 0"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, pixel_size=0), "pixel_size = 0"),
        (lambda: ParallelBeamCT((1, 4, 4), 3, detector_spacing=-1), "detector_spacing = -1"),
        (lambda: ParallelBeamCT((4, 4), 3), r"image_shape = \(4, 4\)"),
        (lambda: FanBeamCT((1, 6, 8), 3, 5.0, 5.0), "source_distance = 5.0; allowed is more than 5,"),
        (lambda: FanBeamCT((1, 6, 8), 3, 6.0, -1.0), "detector_distance = -1.0"),
        (lambda: FanBeamCT((1, 6, 8), 3, 6.0, 1.0, detector_shape="round"), "detector_shape = 'round'"),
        (lambda: FanBeamCT((1, 6, 8), 3, 6.0, 1.0, 30, detector_shape="curved"), "detectors = 30 reach around"),
        (lambda: RayTransform((1, 4, 4), torch.ones(3, 2), torch.ones(2, 2)), r"\(3, 2\) and directions \(2, 2\)"),
        (lambda: RayTransform((1, 4, 4), torch.ones(2), torch.ones(2)), r"points has shape \(2,\)"),
        (lambda: RayTransform((1, 4, 4), torch.ones(3, 2), torch.zeros(3, 2)), "length 0"),
        (lambda: RayTransform((1, 4096, 4096), torch.ones(2**18, 2), torch.ones(2**18, 2)), "262144 lines"),
        (lambda: ParallelBeamCT((1, 4, 4), 3)(torch.zeros(1, 1, 4, 5)), r"\(1, 1, 4, 5\).*\(B, 1, 4, 4\)"),
        (lambda: ParallelBeamCT((1, 4, 4), 3).adjoint(torch.zeros(1, 1, 3, 5)), r"\(1, 1, 3, 5\).*\(B, 1, 3, 6\)"),
        (lambda: ParallelBeamCT((1, 4, 4), 3).fbp(torch.zeros(1, 1, 2, 6)), r"\(1, 1, 2, 6\).*\(B, 1, 3, 6\)"),
        (lambda: ParallelBeamCT((1, 4, 4), 3).fbp(torch.zeros(1, 1, 3, 6), "hamming"), "window = 'hamming'"),
        (lambda: BeerLambert(ParallelBeamCT((1, 4, 4), 3), 0.0), "photons = 0.0"),
    ],
)
def test_errors_name_argument_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()
