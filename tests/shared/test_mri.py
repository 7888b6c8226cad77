"""MRI operators against dense sums written out in NumPy."""

from __future__ import annotations

import copy
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MRI, Compose, GaussianBlur, LinearOperator, NonCartesianMRI, PhysicalUnits, RadialMRI
from dpnp_shared.operators.coils import CoilOperator, birdcage_maps
from dpnp_shared.operators.mri_masks import PATTERNS, draw_mask


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(coils: int, h: int, w: int) -> Tensor:
    return torch.complex(normal(coils, h, w, seed=1), normal(coils, h, w, seed=2))


def points(n: int, h: int, w: int, seed: int = 3) -> Tensor:
    unit = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return unit * torch.tensor([h, w])


def transform(k: np.ndarray, h: int, w: int) -> np.ndarray:
    """The Fourier transform at points (n, 2) in cycles per field of view, of an image with its origin at (h // 2, w // 2)."""
    r = np.stack(np.meshgrid(np.arange(h) - h // 2, np.arange(w) - w // 2, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.exp(-2j * np.pi * (k / [h, w]) @ r.T) / np.sqrt(h * w)


def encoding(operator: CoilOperator) -> np.ndarray:
    """Complex (coils · n, H · W): what the operator should be, from its own mask or trajectory and maps."""
    _, h, w = operator.image_shape
    cartesian = isinstance(operator, MRI)
    k = operator.mask.nonzero().numpy() - [h // 2, w // 2] if cartesian else operator.trajectory.numpy()
    F = transform(k, h, w)
    S = np.ones((1, h, w)) if operator.maps is None else torch.view_as_complex(operator.maps).numpy()
    return np.concatenate([F * s.ravel() for s in S])


def stacked(E: np.ndarray, channels: int) -> np.ndarray:
    """Real (2 · coils · n, channels · H · W): all real parts of the measurement above all imaginary ones."""
    real = np.concatenate([E.real, E.imag])
    return real if channels == 1 else np.hstack([real, np.concatenate([-E.imag, E.real])])


OPERATORS = {
    "single_even": (lambda: MRI((1, 6, 8), "random", 2)),
    "single_odd": (lambda: MRI((1, 5, 7), "poisson_disc", 2, centre_fraction=0.2)),
    "single_complex": (lambda: MRI((2, 5, 6), "radial_lines", 2, centre_fraction=0)),
    "single_given": (lambda: MRI((1, 4, 7), normal(4, 7) > 0)),
    "single_phase": (lambda: MRI((1, 4, 5), "equispaced", 2, coils=maps(1, 4, 5))),
    "coils": (lambda: MRI((1, 6, 5), "equispaced", 2, coils=3)),
    "coils_complex": (lambda: MRI((2, 5, 6), "random", 2, coils=maps(2, 5, 6))),
    "coils_as_given": (lambda: MRI((1, 6, 5), "random", 2, coils=maps(2, 6, 5), normalise=False)),
    "trajectory": (lambda: NonCartesianMRI((1, 5, 8), points(13, 5, 8))),
    "trajectory_coils_complex": (lambda: NonCartesianMRI((2, 6, 5), points(11, 6, 5), coils=maps(2, 6, 5))),
    "radial": (lambda: RadialMRI((1, 6, 7), spokes=3, coils=2)),
}  # fmt: skip


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> CoilOperator:
    return OPERATORS[request.param]()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_measurement_is_the_dense_sum(operator, dtype, tolerance):
    c, h, w = operator.image_shape
    x = normal(3, c, h, w)
    u = (x[:, 0] if c == 1 else torch.complex(x[:, 0], x[:, 1])).flatten(1).numpy()
    expected = (u @ encoding(operator).T).reshape(3, operator.coils, -1)
    y = operator(x.to(dtype))
    assert y.dtype == dtype.to_complex()
    np.testing.assert_allclose(y.numpy(), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(operator(x[1:2].to(dtype)).numpy(), y[1:2].numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_adjoint(operator, dtype, tolerance):
    x = normal(3, *operator.image_shape, seed=4).to(dtype)
    y = operator(x)
    v = torch.complex(normal(*y.shape, seed=5), normal(*y.shape, seed=6)).to(y.dtype)
    back = operator.adjoint(v)
    assert back.dtype == dtype
    inner = float((y.conj() * v).real.double().sum() - (x * back).double().sum())
    assert abs(inner) <= tolerance * float(y.abs().norm() * v.abs().norm())
    torch.testing.assert_close(back, LinearOperator.adjoint(operator, v), rtol=0, atol=20 * tolerance)


def test_norm_and_gram_function_against_dense_algebra(operator):
    c, h, w = operator.image_shape
    A = stacked(encoding(operator), c)
    # power iteration ends early where singular values lie close together
    assert operator.norm() == pytest.approx(np.linalg.norm(A, 2), rel=1e-12 if operator.has_gram_function else 3e-4)
    x = normal(3, c, h, w, seed=7)
    if operator.has_gram_function:
        values, V = np.linalg.eigh(A.T @ A)
        for f in (lambda s: s, lambda s: 1 / (0.1 + s), lambda s: (1 - s).clamp(min=0)):
            dense = V * f(torch.from_numpy(values.clip(0))).numpy() @ V.T
            result = operator.gram_function(f, x)
            np.testing.assert_allclose(result.flatten(1).numpy(), x.flatten(1).numpy() @ dense, rtol=0, atol=1e-12)
            np.testing.assert_allclose(operator.gram_function(f, x.float()).numpy(), result.numpy(), rtol=0, atol=1e-4)
    else:
        with pytest.raises(NotImplementedError, match=type(operator).__name__):
            operator.gram_function(lambda s: s, x)


def test_which_operators_have_a_closed_form():
    closed = {name for name, build in OPERATORS.items() if build().has_gram_function}
    assert closed == {"single_even", "single_odd", "single_complex", "single_given"}


def test_half_of_a_real_images_spectrum():
    # one frequency of a conjugate pair gives both, at half the weight: eigenvalues 0, 1/2 and, for the mean, 1
    mask = torch.zeros(5, 5)
    mask[1, 3] = 1
    assert MRI((1, 5, 5), mask).norm() == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert MRI((2, 5, 5), mask).norm() == 1.0
    mask[2, 2] = 1
    assert MRI((1, 5, 5), mask).norm() == 1.0


def test_moves_to_another_precision_and_copies(operator):
    x = normal(2, *operator.image_shape)
    kept, again = operator(x), copy.deepcopy(operator)
    torch.testing.assert_close(again(x), kept, rtol=0, atol=0)
    again.load_state_dict(operator.state_dict())
    single = again.to(torch.float32)(x.float())
    torch.testing.assert_close(single, kept.to(torch.complex64), rtol=0, atol=2e-5)


@pytest.mark.parametrize("build", [lambda: MRI((1, 4, 5), coils=2), lambda: RadialMRI((2, 4, 5), 2)])
def test_gradients_of_both_orders(build):
    operator = build()
    x = normal(1, *operator.image_shape).requires_grad_(True)
    assert torch.autograd.gradcheck(operator, x, atol=1e-6)
    y = operator(x.detach()).requires_grad_(True)
    assert torch.autograd.gradcheck(operator.adjoint, y, atol=1e-6)

    def energy(v: Tensor) -> Tensor:
        return operator(v).abs().square().sum() / 2

    (gradient,) = torch.autograd.grad(energy(x), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    expected = operator.adjoint(operator(torch.ones_like(x))).detach()
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-10)


def test_trajectory_of_whole_numbers_is_the_cartesian_grid():
    for h, w in ((5, 6), (4, 7)):
        full = MRI((1, h, w), torch.ones(h, w), coils=2)
        k = full.mask.nonzero() - torch.tensor([h // 2, w // 2])
        grid = NonCartesianMRI((1, h, w), k, coils=2)
        x = normal(2, 1, h, w)
        torch.testing.assert_close(grid(x), full(x), rtol=0, atol=1e-11)
        torch.testing.assert_close(grid.density_compensation(), torch.ones(h * w).double(), rtol=0, atol=1e-10)


def test_spokes():
    A = RadialMRI((1, 6, 10), spokes=4, readout=8, angles="uniform")
    spokes = A.trajectory.reshape(4, 8, 2) / torch.tensor([6, 10])  # cycles per pixel
    torch.testing.assert_close(spokes[0, :, 1], torch.arange(-4, 4).double() / 8, rtol=0, atol=1e-12)
    angle = torch.atan2(spokes[:, -1, 0], spokes[:, -1, 1])
    torch.testing.assert_close(angle, torch.arange(4).double() * math.pi / 4, rtol=0, atol=1e-12)
    golden = RadialMRI((1, 6, 10), spokes=2).trajectory.reshape(2, 20, 2) / torch.tensor([6, 10])
    step = math.degrees(math.atan2(float(golden[1, -1, 0]), float(golden[1, -1, 1])))
    assert step == pytest.approx(111.246, abs=1e-3)
    assert bool((golden[:, 10] == 0).all())


def test_density_compensation_of_spokes_is_the_ramp():
    # away from the middle each sample of a well-covered disc stands for 2 pi |k| dk / (2 spokes)
    A = RadialMRI((1, 32, 32), spokes=64, readout=64, angles="uniform")
    k = A.trajectory.norm(dim=1)
    ring = (k > 4) & (k < 12)
    ramp = math.pi * k * 0.5 / 64
    ratio = (A.density_compensation() / ramp)[ring]
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
    assert float((ratio - 1).abs().max()) < 0.1
    alone = NonCartesianMRI((1, 8, 8), [[0.0, 0.0], [3.0, -2.0]])
    torch.testing.assert_close(alone.density_compensation(), torch.ones(2).double(), rtol=0, atol=1e-10)


def test_pictures_are_images():
    smooth = torch.exp(-((torch.arange(24) - 11.0) ** 2) / 20)
    x = torch.stack([smooth[:, None] * smooth, 0.5 * smooth[:, None] * smooth])[None].double()
    for c in (1, 2):
        shape, image = (c, 24, 24), x[:, :c]
        cartesian = [
            MRI(shape, "random", 2, centre_fraction=0.4),
            MRI(shape, "radial_lines", 2, centre_fraction=0.4, coils=3),
            MRI(shape, torch.ones(24), coils=maps(2, 24, 24), normalise=False),
        ]
        for A in (*cartesian, RadialMRI(shape, 40, coils=2), RadialMRI(shape, 40, coils=1)):
            picture = A.display(A(image)[0])
            assert picture.shape == shape
            assert float((picture - image[0]).abs().max()) < (0.01 if isinstance(A, RadialMRI) else 0.05)
            wrapped = PhysicalUnits(A, value_range=(-1, 1), physical_range=(0, 1))
            pixels = 2 * image - 1
            assert float((wrapped.display(wrapped(pixels)[0]) - pixels[0]).abs().max()) < 0.1


# coil maps


def test_birdcage_maps():
    S = birdcage_maps(4, 8, 8)
    assert S.shape == (4, 8, 8)
    for c in range(4):  # a quarter turn of the image is one coil further
        torch.testing.assert_close(torch.rot90(S[c], -1), S[(c + 1) % 4], rtol=0, atol=1e-12)
    # the first conductor is on the right, at 1.5 half widths: magnitudes are inverse distances
    columns = (2 * torch.arange(8).double() - 7) / 8
    distance = ((1.5 - columns) ** 2 + (1 / 8) ** 2).sqrt()
    torch.testing.assert_close(S[0, 3].abs(), 1.5 / distance, rtol=1e-12, atol=0)


def test_maps_are_normalised_to_a_unit_sum_of_squares():
    given = maps(3, 6, 5)
    given[:, 2, 3] = 0
    for A in (MRI((1, 6, 5), coils=given), NonCartesianMRI((1, 6, 5), points(4, 6, 5), coils=given)):
        energy = A.maps.square().sum((0, 3))
        seen = torch.ones(6, 5).double()
        seen[2, 3] = 0
        torch.testing.assert_close(energy, seen, rtol=0, atol=1e-12)
        assert A.unseen.nonzero().tolist() == [[0, 2, 3]]
    kept = MRI((1, 6, 5), coils=given, normalise=False)
    torch.testing.assert_close(torch.view_as_complex(kept.maps), given, rtol=0, atol=0)
    assert MRI((1, 6, 5), coils=4).unseen is None
    assert MRI((1, 6, 5)).unseen is None


def test_maps_and_masks_from_files(tmp_path):
    given = maps(2, 4, 6)
    np.save(tmp_path / "maps.npy", given.to(torch.complex64).numpy())
    np.save(tmp_path / "mask.npy", np.array([True, False, True, True, False, False]))
    A = MRI((1, 4, 6), str(tmp_path / "mask.npy"), coils=str(tmp_path / "maps.npy"))
    torch.testing.assert_close(
        torch.view_as_complex(A.maps).abs(), MRI((1, 4, 6), coils=given).maps.norm(dim=-1), rtol=0, atol=1e-6
    )
    assert A.mask.int().tolist() == [[1, 0, 1, 1, 0, 0]] * 4
    assert MRI((1, 2, 3), [[1, 0, 0], [0, 0, 2]]).sampled.tolist() == [0, 5]


# masks


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    ("h", "w", "acceleration", "centre"), [(28, 28, 4, 0.08), (27, 40, 3.5, 0.1), (40, 31, 8, 0.0), (12, 9, 1, 0.3)]
)
def test_masks_have_the_acceleration_and_the_centre(pattern, h, w, acceleration, centre):
    mask = draw_mask(pattern, h, w, acceleration, centre, seed=1)
    assert mask.shape == (h, w)
    middle = mask[:, w // 2 - round(centre * w) // 2 :][:, : round(centre * w)]
    if pattern in ("equispaced", "random"):
        assert bool((mask == mask[:1]).all())
        assert int(mask[0].sum()) == round(w / acceleration)
    else:
        middle = middle[h // 2 - round(centre * h) // 2 :][: round(centre * h)]
        # lines are whole: nearer by less than half of one, which has at most max(h, w) points
        slack = 0 if pattern == "poisson_disc" else max(h, w) / 2
        assert abs(int(mask.sum()) - round(h * w / acceleration)) <= slack
    assert bool(middle.all())
    assert torch.equal(mask, draw_mask(pattern, h, w, acceleration, centre, seed=1))
    if acceleration > 1:
        assert not torch.equal(mask, draw_mask(pattern, h, w, acceleration, centre, seed=2))


def test_equispaced_columns():
    for seed in range(5):
        columns = draw_mask("equispaced", 2, 96, 4, 0.0, seed)[0].nonzero()[:, 0]
        assert columns.diff().unique().tolist() == [4]
        columns = draw_mask("equispaced", 2, 100, 3, 0.0, seed)[0].nonzero()[:, 0]
        assert set(columns.diff().tolist()) == {3, 4}


def test_random_columns_are_uniform():
    # 13 of the 24 columns outside of the centre, 400 times: 5 binomial standard errors
    outside = (
        torch.stack([draw_mask("random", 1, 28, 28 / 17, 4 / 28, seed)[0] for seed in range(400)]).double().mean(0)
    )
    outside = torch.cat([outside[:12], outside[16:]])
    p = 13 / 24
    assert float((outside - p).abs().max()) < 5 * math.sqrt(p * (1 - p) / 400)


def test_poisson_discs_keep_their_distance_and_thin_out():
    mask = draw_mask("poisson_disc", 64, 48, 10, 0.0, seed=3)
    at = mask.nonzero().double()
    rho = ((at - torch.tensor([32, 24])) / torch.tensor([32, 24])).norm(dim=1)
    distance = torch.cdist(at, at).fill_diagonal_(math.inf)
    # radii s (1 + 3 rho): the nearest pair on that scale says how large s is; uniform points come as near as neighbours do
    growth = 1 + 3 * torch.minimum(rho[:, None], rho)
    closest = float((distance / growth).min())
    uniform = torch.randperm(64 * 48, generator=torch.Generator().manual_seed(0))[: len(at)]
    spread = torch.stack([uniform // 48, uniform % 48], dim=1).double()
    far = ((spread - torch.tensor([32, 24])) / torch.tensor([32, 24])).norm(dim=1)
    random = torch.cdist(spread, spread).fill_diagonal_(math.inf) / (1 + 3 * torch.minimum(far[:, None], far))
    assert closest > 3 * float(random.min())
    area = 64 * 48 * math.pi / 4
    inner, outer = float((rho < 0.4).sum()) / (area * 0.16), float(((rho > 0.8) & (rho < 1)).sum()) / (area * 0.36)
    assert 2.5 < inner / outer < 8  # (1 + 3 · 0.9)² / (1 + 3 · 0.27)² = 4.2


def test_lines_go_through_the_middle():
    mask = draw_mask("radial_lines", 33, 48, 40, 0.0, seed=4)
    assert bool(mask[16, 24])
    assert bool(mask[[0, -1]].any() or mask[:, [0, -1]].any())
    # a point reflection through the middle, where both points are on the grid; ties of rounding go to even numbers
    reflected = torch.zeros_like(mask)
    reflected[:, 1:] = mask.flip(0, 1)[:, :-1]
    assert float((mask == reflected).double().mean()) > 0.97


# k-space of one's own


def test_full_and_zero_filled_kspace_become_samples():
    A = MRI((1, 5, 6), "random", 2, coils=2)
    x = normal(1, 1, 5, 6)
    y, full = A(x)[0], MRI((1, 5, 6), torch.ones(6), coils=2)
    kspace = full.zero_filled(full(x)[0])
    assert kspace.shape == (2, 5, 6)
    for stored in (kspace, kspace * A.mask, y, A.zero_filled(y)):
        torch.testing.assert_close(A.as_measurement(stored), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(A.sample(kspace), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(A.zero_filled(y), kspace * A.mask, rtol=0, atol=1e-12)
    assert A.zero_filled(A(x)).shape == (1, 2, 5, 6)
    # its own zeros are its mask
    again = MRI((1, 5, 6), A.zero_filled(y), coils=2)
    assert torch.equal(again.mask, A.mask)
    single = MRI((1, 5, 6))
    torch.testing.assert_close(single.as_measurement(single.zero_filled(single(x)[0])[0]), single(x)[0])
    for wrapped in (PhysicalUnits(A), Compose([GaussianBlur((1, 5, 6), 1.0), A])):
        torch.testing.assert_close(wrapped.as_measurement(kspace), y, rtol=0, atol=1e-12)
    radial = RadialMRI((1, 5, 6), 3, 4, coils=2)
    samples = radial(x)[0]
    torch.testing.assert_close(radial.as_measurement(samples.reshape(2, 3, 4)), samples, rtol=0, atol=0)
    one = RadialMRI((1, 5, 6), 3, 4)
    torch.testing.assert_close(one.as_measurement(one(x)[0].reshape(3, 4)), one(x)[0], rtol=0, atol=0)


def test_kspace_that_does_not_fit_is_refused():
    A, radial = MRI((1, 5, 6), torch.ones(6), coils=2), RadialMRI((1, 5, 6), 3, 4, coils=2)
    zeros = torch.zeros(2, 5, 6, dtype=torch.complex64)
    for stored, error, words in [
        (torch.zeros(2, 5, 6), TypeError, "float32.*complex"),
        (zeros[:1], ValueError, r"\(1, 5, 6\); allowed are \(2, 5, 6\)"),
        (zeros[:, :4], ValueError, r"\(2, 4, 6\)"),
        (zeros[0], ValueError, r"\(5, 6\)"),
        (zeros, ValueError, "30 entries, of 30, where the measurement is exactly 0"),
    ]:
        with pytest.raises(error, match=words):
            A.as_measurement(stored)
    for stored, error, words in [
        (torch.zeros(2, 12), TypeError, "complex"),
        (zeros, ValueError, r"\(2, 5, 6\); allowed are \(2, 12\)"),
        (zeros[0, :3, :4], ValueError, r"\(3, 4\)"),
    ]:
        with pytest.raises(error, match=words):
            radial.as_measurement(stored)


def test_noise_of_each_coil():
    model = ForwardModel(MRI((1, 20, 30), "random", 2, coils=2), GaussianNoise([[0.1], [0.3]]))
    x = normal(1, 1, 20, 30)
    noise = (model.simulate(x, generator=torch.Generator().manual_seed(0)) - model.operator(x))[0]
    for part in (noise.real, noise.imag):
        np.testing.assert_allclose(part.std(1), [0.1, 0.3], rtol=5 / math.sqrt(2 * 300))


# refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_shape": (3, 4, 6)}, r"\(3, 4, 6\).*1 channel.*and 2"),
        ({"mask": "spiral"}, "mask = 'spiral'; allowed are equispaced, random, poisson_disc, radial_lines"),
        ({"mask": torch.ones(5, 6)}, r"mask has shape \(5, 6\); allowed are \(4, 6\)"),
        ({"mask": torch.ones(1, 1, 4, 6)}, r"\(1, 1, 4, 6\)"),
        ({"mask": torch.zeros(6)}, "mask samples nothing"),
        ({"mask": torch.tensor([1.0, math.nan, 0, 0, 0, 0])}, "mask holds 1 entries"),
        ({"acceleration": 0.5}, "acceleration = 0.5"),
        ({"acceleration": math.nan}, "acceleration = nan"),
        ({"acceleration": 100}, "leaves 0 of 6 columns"),
        ({"centre_fraction": 0.8}, r"leaves 2 of 6 columns, of which the centre \(centre_fraction = 0.8\) takes 5"),
        ({"centre_fraction": -0.1}, "centre_fraction = -0.1"),
        ({"coils": 0}, "coils = 0"),
        ({"coils": torch.ones(2, 6, 4)}, r"\(2, 6, 4\); allowed are coil maps \(coils, 4, 6\)"),
        ({"coils": torch.zeros(2, 4, 6)}, "zeros only"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        MRI(**{"image_shape": (1, 4, 6), "acceleration": 3, **arguments})


def test_bad_trajectories_are_named():
    with pytest.raises(ValueError, match=r"pattern = 'x'"):
        draw_mask("x", 4, 4, 2)
    for trajectory, words in [
        (torch.zeros(3), r"trajectory has shape \(3,\); allowed are \(n, 2\)"),
        (torch.zeros(0, 2), r"\(0, 2\)"),
        (torch.tensor([[2.1, 0.0]]), "vertical frequency of 2.1 .*half of the 4 pixels"),
        (torch.tensor([[0.0, -3.5]]), "horizontal frequency of 3.5"),
        (torch.tensor([[0.0, math.inf]]), "NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=words):
            NonCartesianMRI((1, 4, 6), trajectory)
    for arguments, words in [
        ({"spokes": 0}, "spokes = 0"),
        ({"spokes": 2, "readout": 1}, "readout = 1"),
        ({"spokes": 2, "angles": "silver"}, "angles = 'silver'"),
        ({"spokes": 2, "image_shape": (1, 4)}, "image_shape"),
    ]:
        with pytest.raises(ValueError, match=words):
            RadialMRI(**{"image_shape": (1, 4, 6), **arguments})


def test_images_of_another_shape_are_refused(operator):
    c, h, w = operator.image_shape
    with pytest.raises(ValueError, match=f"{type(operator).__name__} takes images"):
        operator(torch.zeros(1, c, h + 1, w))


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(
        ImportError, match=r"need the package finufft; install it with pip install 'dpnp-imaging\[mri\]'"
    ):
        RadialMRI((1, 4, 6), 3)
