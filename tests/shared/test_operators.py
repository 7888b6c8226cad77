"""One suite over all linear operators, and the properties of each nonlinear one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor

from dpnp_shared.operators import (
    BoxInpainting,
    CircularConvolution,
    DitheredQuantisation,
    FunctionOperator,
    GaussianBlur,
    Inpainting,
    LinearOperator,
    MatrixOperator,
    Operator,
    PhaseRetrieval,
    RandomInpainting,
    SuperResolution,
    as_operator,
)


class VerticalDifference(LinearOperator):
    """A user's operator: forward only, everything else by default."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, 1:] - 2 * x[:, :, :-1]).flatten(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LINEAR = {
    "matrix_wide": (lambda: MatrixOperator(normal(7, 24), (2, 3, 4)), (2, 3, 4)),
    "matrix_tall": (lambda: MatrixOperator(normal(30, 24), (2, 3, 4)), (2, 3, 4)),
    "matrix_rank_deficient": (
        lambda: MatrixOperator(normal(7, 2) @ normal(2, 24, seed=1), (2, 3, 4)),
        (2, 3, 4),
    ),
    "mask": (lambda: Inpainting(normal(3, 4) > 0), (2, 3, 4)),
    "mask_per_channel": (lambda: Inpainting(normal(2, 3, 4) > 0), (2, 3, 4)),
    "random": (lambda: RandomInpainting((2, 5, 4), missing=0.3, seed=1), (2, 5, 4)),
    "random_per_channel": (lambda: RandomInpainting((2, 5, 4), missing=0.3, per_channel=True), (2, 5, 4)),
    "box": (lambda: BoxInpainting((2, 5, 4), top=1, left=0, height=2, width=3), (2, 5, 4)),
    "super_resolution_2": (lambda: SuperResolution((2, 6, 4), 2), (2, 6, 4)),
    "super_resolution_3": (lambda: SuperResolution((1, 6, 9), 3), (1, 6, 9)),
    "blur_odd": (lambda: GaussianBlur((2, 5, 7), 0.8), (2, 5, 7)),
    "blur_even": (lambda: GaussianBlur((2, 6, 4), 1.5), (2, 6, 4)),
    "convolution": (lambda: CircularConvolution(normal(3, 2), (2, 5, 4)), (2, 5, 4)),
    "convolution_wrapped": (lambda: CircularConvolution(normal(9, 7), (1, 5, 4)), (1, 5, 4)),
    "defaults": (lambda: VerticalDifference((2, 4, 3)), (2, 4, 3)),
}


@pytest.fixture(params=LINEAR)
def case(request: pytest.FixtureRequest) -> tuple[LinearOperator, tuple[int, int, int], Tensor]:
    """An operator, its image shape, and its matrix (m, d)."""
    build, shape = LINEAR[request.param]
    operator, d = build(), math.prod(shape)
    A = operator(torch.eye(d, dtype=torch.float64).reshape(d, *shape)).reshape(d, -1).T
    return operator, shape, A


def test_operator_is_linear_and_applies_its_matrix(case):
    operator, shape, A = case
    x = normal(3, *shape)
    torch.testing.assert_close(operator(x).flatten(1), x.flatten(1) @ A.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator(2 * x[:1] - x[1:2]), 2 * operator(x[:1]) - operator(x[1:2]), rtol=0, atol=1e-12)


def test_adjoint_is_the_transpose(case):
    operator, shape, A = case
    y = normal(3, *operator(normal(1, *shape)).shape[1:], seed=2)
    assert operator.adjoint(y).shape == (3, *shape)
    torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ A, rtol=0, atol=1e-12)
    x = normal(3, *shape, seed=3)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum(), rtol=1e-12, atol=1e-12)


def test_norm_is_the_largest_singular_value(case):
    operator, _, A = case
    assert operator.norm() == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-5)


def test_gram_function_matches_dense_algebra(case):
    operator, shape, A = case
    x = normal(3, *shape, seed=4)
    if isinstance(operator, VerticalDifference):
        assert not operator.has_gram_function
        with pytest.raises(NotImplementedError, match="VerticalDifference"):
            operator.gram_function(lambda s: s, x)
        return
    assert operator.has_gram_function
    torch.testing.assert_close(
        operator.gram_function(lambda s: s, x), operator.adjoint(operator(x)), rtol=0, atol=1e-10
    )
    inverse = torch.linalg.solve(torch.eye(A.shape[1], dtype=A.dtype) + A.T @ A, x.flatten(1).T).T
    torch.testing.assert_close(operator.gram_function(lambda s: 1 / (1 + s), x).flatten(1), inverse, rtol=0, atol=1e-11)
    root = operator.gram_function(lambda s: (1 + s) ** -0.5, x)
    twice = operator.gram_function(lambda s: (1 + s) ** -0.5, root)
    torch.testing.assert_close(twice.flatten(1), inverse, rtol=0, atol=1e-11)


def test_images_of_a_batch_do_not_touch_and_the_dtype_is_kept(case):
    operator, shape, _ = case
    x = normal(3, *shape)
    torch.testing.assert_close(operator(x)[1:2], operator(x[1:2]), rtol=0, atol=1e-13)
    y = operator(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), operator(x), rtol=1e-4, atol=1e-5)
    assert operator.adjoint(y).dtype == torch.float32
    if operator.has_gram_function:
        assert operator.gram_function(lambda s: 1 / (1 + s), x.float()).dtype == torch.float32


def test_operators_survive_state_dict_and_cast(case):
    operator, shape, _ = case
    x = normal(2, *shape)
    before = operator(x)
    operator.load_state_dict(operator.state_dict())
    torch.testing.assert_close(operator(x), before, rtol=0, atol=0)
    torch.testing.assert_close(operator.to(torch.float32)(x), before, rtol=1e-5, atol=1e-5)


def test_wrong_image_shape_is_named(case):
    operator, (c, h, w), _ = case
    if isinstance(operator, VerticalDifference):  # a user's forward checks what it likes, the adjoint knows the shape
        assert operator.adjoint(operator(normal(1, c, h, w))).shape == (1, c, h, w)
        return
    with pytest.raises(ValueError, match=rf"\(1, {c}, {h + 1}, {w + 1}\)"):
        operator(normal(1, c, h + 1, w + 1))


def test_default_adjoint_works_in_inference_mode_and_needs_a_shape():
    y = normal(2, 18)
    with torch.inference_mode():
        inside = VerticalDifference((2, 4, 3)).adjoint(y)
    torch.testing.assert_close(inside, VerticalDifference((2, 4, 3)).adjoint(y), rtol=0, atol=0)
    for call in (lambda: VerticalDifference().adjoint(y), lambda: VerticalDifference().norm()):
        with pytest.raises(ValueError, match="image_shape is None"):
            call()


def test_blur_is_a_circular_gaussian():
    operator = GaussianBlur((1, 9, 8), 0.7)
    delta = torch.zeros(1, 1, 9, 8, dtype=torch.float64)
    delta[..., 0, 3] = 1
    y = operator(delta)
    assert float(y.sum()) == pytest.approx(1)
    assert float(y[0, 0, 1, 3] / y[0, 0, 0, 3]) == pytest.approx(math.exp(-1 / (2 * 0.49)))
    torch.testing.assert_close(y[0, 0, 8], y[0, 0, 1])  # one row above wraps to the last
    assert operator.norm() == pytest.approx(1)
    wide = GaussianBlur((1, 9, 8), 50.0)(delta)  # much wider than the image: flat
    torch.testing.assert_close(wide, torch.full_like(wide, 1 / 72), rtol=1e-6, atol=0)


def test_convolution_follows_its_equation():
    kernel, x = normal(3, 2), normal(1, 1, 4, 5)
    y = CircularConvolution(kernel, (1, 4, 5))(x)
    i, j = 3, 0
    by_hand = sum(kernel[a, b] * x[0, 0, (i - a + 1) % 4, (j - b + 1) % 5] for a in range(3) for b in range(2))
    assert float(y[0, 0, i, j]) == pytest.approx(float(by_hand))


def test_random_mask_is_exact_and_seeded():
    first, second = (RandomInpainting((3, 10, 10), 0.37, seed=s).mask for s in (1, 2))
    assert int((~first).sum()) == int((~second).sum()) == 37
    assert not torch.equal(first, second)
    assert torch.equal(first, RandomInpainting((3, 10, 10), 0.37, seed=1).mask)
    assert RandomInpainting((3, 10, 10), 1.0).norm() == 0


def test_arrays_come_from_files(tmp_path):
    mask = np.array([[1, 0], [0, 1]], dtype=np.uint8)
    np.save(tmp_path / "mask.npy", mask)
    Image.fromarray(mask * 255).save(tmp_path / "mask.png")
    for name in ("mask.npy", "mask.png"):
        assert Inpainting(str(tmp_path / name)).mask.tolist() == [[[True, False], [False, True]]]
    np.save(tmp_path / "A.npy", np.ones((3, 4)))
    assert MatrixOperator(str(tmp_path / "A.npy"), (1, 2, 2)).norm() == pytest.approx(math.sqrt(12))
    assert Inpainting([[1, 0]]).unseen.tolist() == [[[False, True]]]
    assert GaussianBlur((1, 4, 4), 1.0).unseen is None
    with pytest.raises(ValueError, match=r"\.npy"):
        MatrixOperator("A.mat", (1, 2, 2))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("MatrixOperator", {"A": [[1.0, 2.0]], "image_shape": [1, 1, 2]}),
        ("Inpainting", {"mask": [[1, 0], [0, 1]]}),
        ("RandomInpainting", {"image_shape": [1, 4, 4], "missing": 0.25, "per_channel": True}),
        ("BoxInpainting", {"image_shape": [1, 4, 4], "top": 0, "left": 0, "height": 2, "width": 2}),
        ("SuperResolution", {"image_shape": [1, 4, 4], "factor": 2}),
        ("CircularConvolution", {"kernel": [[0.5, 0.5]], "image_shape": [1, 4, 4]}),
        ("GaussianBlur", {"image_shape": [1, 4, 4], "sigma": 1}),
        ("PhaseRetrieval", {"image_shape": [1, 4, 4], "value_range": [0, 1]}),
        ("DitheredQuantisation", {"image_shape": [1, 4, 4], "looks": 2, "dither": 0.5}),
    ],
)
def test_operators_are_built_from_plain_values(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--operator", type=Operator)
    config = {"operator": {"class_path": f"dpnp_shared.operators.{name}", "init_args": arguments}}
    operator = parser.instantiate(parser.parse_object(config)).operator
    x = torch.zeros(2, *(operator.image_shape or (1, 2, 2)))
    assert operator(x).shape[0] == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MatrixOperator(normal(3, 5), (1, 2, 2)), r"A has shape \(3, 5\).*\(m, 4\)"),
        (lambda: MatrixOperator([[float("nan")] * 4], (1, 2, 2)), "A holds 4 entries"),
        (lambda: Inpainting(torch.ones(3)), r"mask has shape \(3,\)"),
        (lambda: RandomInpainting((1, 2, 2), missing=1.5), "missing = 1.5"),
        (lambda: BoxInpainting((1, 4, 4), 3, 0, 2, 2), r"\(3, 0, 2, 2\)"),
        (lambda: SuperResolution((1, 6, 4), 3), "factor = 3.*H = 6 and W = 4"),
        (lambda: GaussianBlur((1, 4, 4), 0.0), "sigma = 0.0"),
        (lambda: CircularConvolution(torch.ones(3), (1, 4, 4)), r"kernel has shape \(3,\)"),
        (lambda: PhaseRetrieval((1, 4, 4), oversampling=0.5), "oversampling = 0.5"),
        (lambda: PhaseRetrieval((1, 4, 4), value_range=(1, 1)), "value_range"),
        (lambda: DitheredQuantisation((1, 4, 4), looks=0), "looks = 0"),
        (lambda: DitheredQuantisation((1, 4, 4), dither=-1), "dither = -1"),
        (lambda: SuperResolution((4, 4), 2), r"image_shape = \(4, 4\)"),
    ],
)
def test_errors_name_argument_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_phase_retrieval_follows_its_equation():
    operator = PhaseRetrieval((2, 3, 4), oversampling=1.5, value_range=(-1, 1))
    x = normal(2, 2, 3, 4).clamp(-1, 1)
    padded = np.zeros((2, 2, 5, 6))
    padded[..., :3, :4] = (x.numpy() + 1) / 2
    expected = np.abs(np.fft.fft2(padded)) / math.sqrt(5 * 6)
    torch.testing.assert_close(operator(x), torch.from_numpy(expected))
    # Parseval; and darkness everywhere gives zeros
    torch.testing.assert_close((operator(x) ** 2).sum(), (((x + 1) / 2) ** 2).sum())
    assert operator(-torch.ones(1, 2, 3, 4)).abs().max() == 0
    turned = operator(x.flip(-2, -1))
    torch.testing.assert_close(turned, operator(x))


def test_nonlinear_gradients_match_finite_differences():
    x = normal(1, 1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(PhaseRetrieval((1, 3, 4)), x)
    assert torch.autograd.gradcheck(DitheredQuantisation((1, 3, 4), looks=2, dither=0.5), x)


def test_phase_retrieval_gradient_is_finite_at_zero():
    for x in (-torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)):
        x.requires_grad_()
        PhaseRetrieval((1, 4, 4))(x).sum().backward()
        assert bool(x.grad.isfinite().all())


def test_quantisation_thresholds():
    operator = DitheredQuantisation((1, 3, 4), looks=500, dither=0.5, seed=3)
    y = operator(torch.zeros(2, 1, 3, 4))
    assert y.shape == (2, 500, 1, 3, 4)
    torch.testing.assert_close(y[0].double(), -operator.thresholds, rtol=0, atol=1e-6)
    # 6,000 uniforms of variance 1/12: the standard error of the mean is 0.0037
    assert abs(float(operator.thresholds.mean())) < 0.012
    assert 0.49 < float(operator.thresholds.abs().max()) <= 0.5
    assert DitheredQuantisation((1, 3, 4)).thresholds.abs().max() == 0


def test_displays_have_an_image_shape_and_range():
    x = normal(1, 2, 4, 6).clamp(-1, 1)
    for operator, shape in (
        (RandomInpainting((2, 4, 6)), (2, 4, 6)),
        (SuperResolution((2, 4, 6), 2), (2, 4, 6)),
        (GaussianBlur((2, 4, 6), 1.0), (2, 4, 6)),
        (PhaseRetrieval((2, 4, 6)), (2, 8, 12)),
        (DitheredQuantisation((2, 4, 6), looks=3), (2, 4, 6)),
    ):
        picture = operator.display(operator(x)[0])
        assert picture.shape == shape
        assert float(picture.abs().max()) <= 1 + 1e-6
    assert MatrixOperator(normal(3, 48), (2, 4, 6)).display(normal(3)) is None
    assert bool(PhaseRetrieval((2, 4, 6)).display(torch.zeros(2, 8, 12)).isfinite().all())


def test_as_operator():
    blur = GaussianBlur((1, 4, 4), 1.0)
    assert as_operator(blur) is blur
    module = torch.nn.Linear(3, 2)
    wrapped = as_operator(module)
    assert isinstance(wrapped, FunctionOperator)
    assert list(wrapped.parameters()) == list(module.parameters())
    assert as_operator(torch.abs)(torch.tensor([-1.0])) == 1
    assert not FunctionOperator(torch.abs, differentiable=False).differentiable
    for wrong, message in ((3, "a int"), (GaussianBlur, "the class GaussianBlur")):
        with pytest.raises(TypeError, match=message):
            as_operator(wrong)
