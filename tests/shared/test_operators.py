"""One suite over all linear operators, and the properties of each nonlinear one."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from scipy import fft, linalg, ndimage, signal
from torch import Tensor

from dpnp_shared.operators import (
    BicubicSuperResolution,
    BoxInpainting,
    CircularConvolution,
    CodedDiffraction,
    Compose,
    CompressedSensing,
    Convolution,
    DitheredQuantisation,
    FunctionOperator,
    GaussianBlur,
    HighDynamicRange,
    Inpainting,
    KernelBlur,
    LinearCompose,
    LinearOperator,
    LinearStack,
    MatrixOperator,
    MotionBlur,
    NonlinearBlur,
    Operator,
    PhaseRetrieval,
    Ptychography,
    Quantisation,
    RandomInpainting,
    Stack,
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
    "kernel_blur": (lambda: KernelBlur((2, 5, 4), normal(3, 2).abs()), (2, 5, 4)),
    "motion_blur": (lambda: MotionBlur((2, 5, 8), length=3.7, angle=25), (2, 5, 8)),
    "motion_blur_wrapped": (lambda: MotionBlur((1, 4, 3), length=6, angle=-90), (1, 4, 3)),
    "convolution_valid": (lambda: Convolution((2, 5, 6), normal(3, 2)), (2, 5, 6)),
    "convolution_reflect": (lambda: Convolution((2, 5, 4), normal(4, 3), "reflect"), (2, 5, 4)),
    "convolution_reflect_large": (lambda: Convolution((1, 3, 4), normal(9, 6), "reflect"), (1, 3, 4)),
    "bicubic_2": (lambda: BicubicSuperResolution((2, 6, 4), 2), (2, 6, 4)),
    "bicubic_3": (lambda: BicubicSuperResolution((1, 6, 9), 3), (1, 6, 9)),
    "sensing_gaussian": (lambda: CompressedSensing((2, 3, 4), 7), (2, 3, 4)),
    "sensing_gaussian_tall": (lambda: CompressedSensing((2, 3, 4), 30), (2, 3, 4)),
    "sensing_hadamard": (lambda: CompressedSensing((3, 2, 4), 9, "hadamard"), (3, 2, 4)),
    "sensing_dct": (lambda: CompressedSensing((2, 3, 5), 11, "dct"), (2, 3, 5)),
    "sensing_dct_full": (lambda: CompressedSensing((2, 3, 5), 30, "dct"), (2, 3, 5)),
    "compose": (lambda: Compose([GaussianBlur((2, 6, 4), 0.8), SuperResolution((2, 6, 4), 2)]), (2, 6, 4)),
    "stack": (lambda: Stack([SuperResolution((2, 6, 4), 2), BoxInpainting((2, 6, 4), 1, 0, 2, 3)]), (2, 6, 4)),
    "defaults": (lambda: VerticalDifference((2, 4, 3)), (2, 4, 3)),
}


# linear, without functions of A^T A in closed form
WITHOUT_GRAM_FUNCTION = (VerticalDifference, Convolution, LinearCompose, LinearStack)


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
    if isinstance(operator, WITHOUT_GRAM_FUNCTION):
        assert not operator.has_gram_function
        with pytest.raises(NotImplementedError, match=type(operator).__name__):
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
        ("KernelBlur", {"image_shape": [1, 4, 4], "kernel": [[1, 2]]}),
        ("MotionBlur", {"image_shape": [1, 4, 4], "length": 3, "angle": 45}),
        ("Convolution", {"image_shape": [1, 4, 4], "kernel": [[1, 2]], "boundary": "reflect"}),
        ("BicubicSuperResolution", {"image_shape": [1, 4, 4], "factor": 2}),
        ("CompressedSensing", {"image_shape": [1, 4, 4], "measurements": 5, "transform": "hadamard", "seed": 1}),
        ("HighDynamicRange", {"gain": 2, "low": -1, "high": 1}),
        ("NonlinearBlur", {"image_shape": [1, 4, 4], "kernel": [[1, 2]], "gamma": 2, "value_range": [0, 1]}),
        ("CodedDiffraction", {"image_shape": [1, 4, 4], "masks": 2, "kind": "phase", "seed": 1}),
        ("Ptychography", {"image_shape": [1, 4, 4], "probe_size": 3, "step": 1, "probe": "disk"}),
        ("Quantisation", {"levels": 8}),
        ("Compose", {"operators": [{"class_path": "dpnp_shared.operators.HighDynamicRange"}] * 2}),
        (
            "Stack",
            {"operators": [{"class_path": "dpnp_shared.operators.HighDynamicRange"}], "image_shape": [1, 2, 2]},
        ),
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
        (lambda: KernelBlur((1, 4, 4), torch.ones(3)), r"kernel has shape \(3,\)"),
        (lambda: KernelBlur((1, 4, 4), [[1.0, -0.5]]), "smallest entry -0.5"),
        (lambda: KernelBlur((1, 4, 4), [[0.0]]), "the sum 0.0"),
        (lambda: MotionBlur((1, 4, 4), 0.0, 3.0), "length = 0.0"),
        (lambda: MotionBlur((1, 4, 4), 2.0, math.inf), "angle = inf"),
        (lambda: Convolution((1, 4, 4), torch.ones(3)), r"kernel has shape \(3,\)"),
        (lambda: Convolution((1, 4, 4), torch.ones(5, 1)), r"kernel has shape \(5, 1\).*\(4, 4\)"),
        (lambda: Convolution((1, 4, 4), torch.ones(1, 1), "zero"), "boundary = 'zero'.*'valid' and 'reflect'"),
        (lambda: BicubicSuperResolution((1, 6, 4), 3), "factor = 3.*H = 6 and W = 4"),
        (lambda: CompressedSensing((1, 3, 4), 4, "hadamard"), "'hadamard' with H·W = 3·4 = 12.*power of two"),
        (lambda: CompressedSensing((2, 3, 4), 25, "dct"), "measurements = 25.*at most C·H·W = 24"),
        (lambda: CompressedSensing((2, 3, 4), 0), "measurements = 0"),
        (lambda: CompressedSensing((2, 3, 4), 4, "fourier"), "transform = 'fourier'"),
        (lambda: HighDynamicRange(gain=-1), "gain = -1"),
        (lambda: HighDynamicRange(low=1, high=0), r"\(low, high\) = \(1, 0\)"),
        (lambda: NonlinearBlur((1, 4, 4), [[1.0]], gamma=0.5), "gamma = 0.5"),
        (lambda: NonlinearBlur((1, 4, 4), [[1.0]], saturation=-1), "saturation = -1"),
        (lambda: NonlinearBlur((1, 4, 4), [[1.0]], value_range=(1, 1)), "value_range"),
        (lambda: CodedDiffraction((1, 4, 4), masks=0), "masks = 0"),
        (lambda: CodedDiffraction((1, 4, 4), kind="binary"), "kind = 'binary'"),
        (lambda: CodedDiffraction((1, 4, 4), value_range=(1, 0)), "value_range"),
        (lambda: Ptychography((1, 4, 6), 5, 1), r"probe_size = 5.*= 4 pixels"),
        (lambda: Ptychography((1, 4, 6), 4, 4), r"step = 4.*= 3 pixels"),
        (lambda: Ptychography((1, 4, 6), 4, 2, probe="square"), "probe = 'square'"),
        (lambda: Ptychography((1, 4, 6), 4, 2, value_range=(1, 0)), "value_range"),
        (lambda: Quantisation(1), "levels = 1"),
        (lambda: Quantisation(2.5), "levels = 2.5"),
        (lambda: Quantisation(4, low=0, high=math.inf), r"\(0, inf\)"),
        (lambda: Compose([]), "operators is empty"),
        (lambda: Stack([]), "operators is empty"),
        (lambda: Stack([HighDynamicRange()]), "image_shape = None"),
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
    x = normal(2, 2, 3, 4).requires_grad_()
    for operator in (
        HighDynamicRange(gain=1.5),
        NonlinearBlur((2, 3, 4), [[1, 2], [3, 4]], gamma=1.0, saturation=0.5),
        NonlinearBlur((2, 3, 4), [[1, 2], [3, 4]], gamma=2.2, saturation=0.0),
        CodedDiffraction((2, 3, 4), masks=2),
        CodedDiffraction((2, 3, 4), masks=2, kind="phase"),
        Ptychography((2, 3, 4), probe_size=3, step=1),
        Ptychography((2, 3, 4), probe_size=3, step=2, probe="disk"),
        Compose([GaussianBlur((2, 3, 4), 0.8), HighDynamicRange()]),
        Stack([GaussianBlur((2, 3, 4), 0.8), CodedDiffraction((2, 3, 4))]),
    ):
        assert torch.autograd.gradcheck(operator, x)


def test_gradients_are_finite_at_zero():
    for operator in (
        PhaseRetrieval((1, 4, 4)),
        CodedDiffraction((1, 4, 4)),
        Ptychography((1, 4, 4), probe_size=3, step=1),
        NonlinearBlur((1, 4, 4), [[1.0, 1.0]], gamma=1.5, saturation=1.0),
    ):
        for x in (-torch.ones(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)):
            x.requires_grad_()
            operator(x).sum().backward()
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
        (MotionBlur((2, 4, 6), 3, 45), (2, 4, 6)),
        (Convolution((2, 4, 6), [[0.2, 0.3, 0.5]]), (2, 4, 4)),
        (HighDynamicRange(low=0.0), (2, 4, 6)),
        (NonlinearBlur((2, 4, 6), [[1, 1]]), (2, 4, 6)),
        (CodedDiffraction((2, 4, 6), masks=3), (2, 4, 6)),
        (Ptychography((2, 4, 6), probe_size=3, step=2), (2, 6, 9)),
        (Quantisation(4), (2, 4, 6)),
        (Compose([GaussianBlur((2, 4, 6), 1.0), SuperResolution((2, 4, 6), 2)]), (2, 4, 6)),
    ):
        picture = operator.display(operator(x)[0])
        assert picture.shape == shape
        assert float(picture.abs().max()) <= 1 + 1e-6
    bicubic = BicubicSuperResolution((2, 4, 6), 2)
    assert bicubic.display(bicubic(x)[0]).shape == (2, 4, 6)  # the cubic kernel overshoots
    assert MatrixOperator(normal(3, 48), (2, 4, 6)).display(normal(3)) is None
    assert CompressedSensing((2, 4, 6), 3).display(normal(3)) is None
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


def test_motion_blur_is_a_line():
    level = MotionBlur((1, 5, 7), length=3, angle=0)
    delta = torch.zeros(1, 1, 5, 7, dtype=torch.float64)
    delta[..., 2, 3] = 1
    # a box of width 3 convolved with the hat function
    row = torch.tensor([0, 1 / 8, 7 / 8, 1, 7 / 8, 1 / 8, 0], dtype=torch.float64) / 3
    torch.testing.assert_close(level(delta)[0, 0, 2], row, rtol=0, atol=1e-12)
    assert float(level(delta).sum()) == pytest.approx(1)
    upright = MotionBlur((1, 7, 5), length=3, angle=90)(delta.mT)
    torch.testing.assert_close(upright, level(delta).mT, rtol=0, atol=1e-12)
    # rising to the right, and against the integral by the midpoint rule
    y = MotionBlur((1, 5, 7), length=3.3, angle=30)(delta)[0, 0]
    t = 3.3 * ((np.arange(100_000) + 0.5) / 100_000 - 0.5)
    hat = [np.maximum(0, 1 - np.abs(s)) for s in (-1 + t / 2, 1 - t * math.cos(math.pi / 6))]
    assert float(y[1, 4]) == pytest.approx(float((hat[0] * hat[1]).mean()), abs=1e-8)
    assert float(y[1, 4]) > 2 * float(y[3, 4])


def test_kernel_blur_is_normalised(tmp_path):
    np.save(tmp_path / "kernel.npy", np.array([[1, 3]], dtype=np.uint8))
    x = normal(1, 2, 4, 5)
    expected = CircularConvolution([[0.25, 0.75]], (2, 4, 5))(x)
    for kernel in ([[1, 3]], str(tmp_path / "kernel.npy"), torch.tensor([[2.0, 6.0]])):
        torch.testing.assert_close(KernelBlur((2, 4, 5), kernel)(x), expected)


@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (1, 3), (4, 3)])
def test_convolution_matches_scipy(shape):
    kernel, x = normal(*shape), normal(2, 3, 6, 5)
    valid = Convolution((3, 6, 5), kernel)(x)
    expected = signal.convolve(x.numpy(), kernel.numpy()[None, None], mode="valid", method="direct")
    torch.testing.assert_close(valid, torch.from_numpy(expected))
    reflected = Convolution((3, 6, 5), kernel, "reflect")(x)
    expected = ndimage.convolve(x.numpy(), kernel.numpy()[None, None], mode="mirror")
    torch.testing.assert_close(reflected, torch.from_numpy(expected))


def test_bicubic_is_antialiased():
    operator = BicubicSuperResolution((2, 24, 36), 3)
    x = normal(2, 2, 24, 36)
    y = operator(x)
    assert y.shape == (2, 2, 8, 12)
    # PyTorch has the same kernel and another border
    mirrored = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (12, 12), (12, 12)), mode="symmetric"))
    other = torch.nn.functional.interpolate(mirrored, scale_factor=1 / 3, mode="bicubic", antialias=True)
    torch.testing.assert_close(y, other[..., 4:-4, 4:-4])
    torch.testing.assert_close(operator(torch.ones_like(x)), torch.ones_like(y))
    torch.testing.assert_close(BicubicSuperResolution((2, 24, 36), 1)(x), x)


@pytest.mark.parametrize("transform", ["hadamard", "dct"])
def test_subsampled_transforms_follow_their_equation(transform):
    x = normal(3, 2, 4, 8)
    operator = CompressedSensing((2, 4, 8), 20, transform, seed=3)
    signed = (operator.signs * x).numpy()
    if transform == "dct":
        coefficients = fft.dctn(signed, axes=(2, 3), norm="ortho")
    else:
        coefficients = signed.reshape(3, 2, 32) @ linalg.hadamard(32) / math.sqrt(32)
    expected = coefficients.reshape(3, -1)[:, operator.kept.numpy()]
    torch.testing.assert_close(operator(x), torch.from_numpy(expected))
    assert set(operator.signs.flatten().tolist()) == {-1.0, 1.0}
    assert len(set(operator.kept.tolist())) == 20
    y = normal(2, 20)
    torch.testing.assert_close(operator(operator.adjoint(y)), y)  # A A^T = I
    same, other = (CompressedSensing((2, 4, 8), 20, transform, seed=seed) for seed in (3, 4))
    torch.testing.assert_close(same(x), operator(x), rtol=0, atol=0)
    assert not torch.allclose(other(x), operator(x))


def test_gaussian_rows_have_their_variance():
    matrix, other = (CompressedSensing((1, 20, 30), 50, seed=seed).dense.matrix for seed in (1, 2))
    # 30,000 squares of N(0, 1/50): the standard error of their mean is 0.8 % of it
    assert float((matrix**2).mean()) * 50 == pytest.approx(1, abs=0.03)
    assert not torch.equal(matrix, other)


def test_high_dynamic_range_clips():
    x = normal(2, 3, 4, 5)
    y = HighDynamicRange(gain=1.5, low=-0.5, high=0.8)(x)
    torch.testing.assert_close(y, torch.from_numpy(np.clip(1.5 * x.numpy(), -0.5, 0.8)))
    x = torch.tensor([[[[-0.8, 0.2, 0.7]]]], requires_grad=True)
    HighDynamicRange(gain=2.0)(x).sum().backward()
    assert x.grad.flatten().tolist() == [0, 2, 0]


def test_nonlinear_blur_follows_its_equation():
    kernel, x = np.array([[1.0, 2.0, 1.0], [0.0, 3.0, 0.0]]), normal(2, 2, 4, 5).clamp(-1, 1)
    operator = NonlinearBlur((2, 4, 5), kernel.tolist(), gamma=2.2, saturation=1.5)
    light = ((x.numpy() + 1) / 2) ** 2.2
    blurred = ndimage.convolve(light, kernel[None, None] / 7, mode="wrap")
    torch.testing.assert_close(operator(x), torch.from_numpy(np.tanh(1.5 * blurred) / math.tanh(1.5)))
    for value in (-1.0, 1.0):  # dark stays dark, bright stays bright
        flat = torch.full((1, 2, 4, 5), value, dtype=torch.float64)
        torch.testing.assert_close(operator(flat), (flat + 1) / 2)
    plain = NonlinearBlur((2, 4, 5), kernel.tolist(), gamma=1.0, value_range=(0, 1))
    torch.testing.assert_close(plain(x), KernelBlur((2, 4, 5), kernel.tolist())(x))
    below = NonlinearBlur((2, 4, 5), [[1.0]], gamma=2.0, value_range=(0, 1))
    torch.testing.assert_close(below(x), x.sign() * x**2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["octanary", "phase"])
def test_coded_diffraction_follows_its_equation(kind):
    x = normal(2, 3, 4, 5)
    operator = CodedDiffraction((3, 4, 5), masks=2, kind=kind, seed=1)
    d = operator.mask.numpy()[..., 0] + 1j * operator.mask.numpy()[..., 1]
    y = operator(x)
    assert y.shape == (2, 2, 3, 4, 5)
    for j in range(2):
        expected = np.abs(np.fft.fft2(d[j] * (x.numpy() + 1) / 2)) / math.sqrt(20)
        torch.testing.assert_close(y[:, j], torch.from_numpy(expected))
    torch.testing.assert_close(operator(-2 - x), y)  # -u
    assert not torch.equal(operator.mask, CodedDiffraction((3, 4, 5), masks=2, kind=kind, seed=2).mask)
    torch.testing.assert_close(copy.deepcopy(operator).to(torch.float32)(x), y, rtol=1e-5, atol=1e-5)


def test_coded_diffraction_masks_have_their_law():
    mask = CodedDiffraction((1, 100, 100), masks=1).mask.reshape(-1, 2)
    square = mask.square().sum(1)
    frequent = (square - 0.5).abs() < 1e-12
    assert bool((frequent | ((square - 3).abs() < 1e-12)).all())
    # 10,000 draws: the standard errors are 0.004 of the fraction, 0.01 of |d|^2, 0.007 of the parts of d
    assert float(frequent.double().mean()) == pytest.approx(0.8, abs=0.015)
    assert float(square.mean()) == pytest.approx(1, abs=0.04)
    assert mask.mean(0).abs().max() < 0.03
    phase = CodedDiffraction((1, 100, 100), masks=1, kind="phase").mask.reshape(-1, 2)
    torch.testing.assert_close(phase.square().sum(1), torch.ones(10_000, dtype=torch.float64))
    assert phase.mean(0).abs().max() < 0.03


@pytest.mark.parametrize("probe", ["gaussian", "disk"])
def test_ptychography_follows_its_equation(probe):
    x = normal(2, 2, 6, 9)
    y = Ptychography((2, 6, 9), probe_size=4, step=3, probe=probe)(x)
    u = (x.numpy() + 1) / 2
    distance = np.hypot(*np.meshgrid(np.arange(4) - 1.5, np.arange(4) - 1.5))
    p = np.exp(-(distance**2) / 2) if probe == "gaussian" else 1.0 * (distance <= 2)
    corners = [(i, j) for i in (0, 2) for j in (0, 3, 5)]  # the last ones touch the border
    assert y.shape == (2, 6, 2, 4, 4)
    for k, (i, j) in enumerate(corners):
        expected = np.abs(np.fft.fft2(p * u[:, :, i : i + 4, j : j + 4])) / 4
        torch.testing.assert_close(y[:, k], torch.from_numpy(expected))


def test_ptychography_sees_what_its_probe_lights():
    assert Ptychography((1, 6, 9), probe_size=4, step=3).unseen is None
    disk = Ptychography((1, 6, 9), probe_size=4, step=3, probe="disk")
    assert disk.unseen.shape == (1, 6, 9)
    assert disk.unseen[0, 0, 0]
    x = normal(1, 1, 6, 9)
    torch.testing.assert_close(disk(x + 5 * disk.unseen), disk(x))
    for i, j in (~disk.unseen[0]).nonzero().tolist():
        changed = x.clone()
        changed[0, 0, i, j] += 1
        assert not torch.allclose(disk(changed), disk(x))


def test_uniform_quantisation_takes_the_middle_of_a_level():
    operator = Quantisation(levels=4, low=0, high=2)
    x = torch.tensor([[[[-3.0, 0.1, 0.4999, 0.5, 1.2, 1.99, 2.0, 7.0]]]])
    assert operator(x).flatten().tolist() == [0.25, 0.25, 0.25, 0.75, 1.25, 1.75, 1.75, 1.75]
    assert not operator.differentiable
    x = normal(2, 3, 4, 5)
    centres = np.linspace(-1, 1, 17)[:-1] + 1 / 16
    nearest = centres[np.abs(x.numpy()[..., None] - centres).argmin(-1)]
    torch.testing.assert_close(Quantisation(16)(x), torch.from_numpy(nearest))


@pytest.mark.parametrize(
    "operator",
    [
        HighDynamicRange(),
        NonlinearBlur((2, 4, 6), [[1, 2, 3]], saturation=1.0),
        CodedDiffraction((2, 4, 6)),
        Ptychography((2, 4, 6), probe_size=3, step=2),
        Quantisation(8),
        Compose([GaussianBlur((2, 4, 6), 1.0), Quantisation(8)]),
        Stack([HighDynamicRange(), CodedDiffraction((2, 4, 6))]),
    ],
    ids=lambda operator: type(operator).__name__,
)
def test_nonlinear_operators_keep_batch_and_dtype(operator):
    x = normal(3, 2, 4, 6)
    torch.testing.assert_close(operator(x)[1:2], operator(x[1:2]), rtol=0, atol=1e-13)
    assert operator(x.float()).dtype == torch.float32
    assert not isinstance(operator, LinearOperator)
    if operator.image_shape is not None:
        with pytest.raises(ValueError, match=r"\(3, 2, 5, 7\)"):
            operator(normal(3, 2, 5, 7))


def test_compose_applies_from_left_to_right():
    x = normal(2, 2, 4, 6)
    blur, pool, clip = GaussianBlur((2, 4, 6), 1.0), SuperResolution((2, 4, 6), 2), HighDynamicRange()
    linear = Compose([blur, pool])
    assert isinstance(linear, LinearCompose)
    assert linear.image_shape == (2, 4, 6)
    torch.testing.assert_close(linear(x), pool(blur(x)), rtol=0, atol=0)
    mixed = Compose([blur, clip, torch.exp])
    torch.testing.assert_close(mixed(x), clip(blur(x)).exp(), rtol=0, atol=0)
    assert mixed.differentiable
    assert not isinstance(mixed, LinearOperator)
    assert not Compose([blur, Quantisation(4)]).differentiable
    hidden = BoxInpainting((2, 4, 6), 1, 1, 2, 2)
    assert torch.equal(Compose([hidden, blur]).unseen, hidden.unseen)
    mask = Inpainting(torch.ones(4, 6))  # takes any number of channels
    assert Compose([mask, mask], image_shape=(2, 4, 6)).norm() == pytest.approx(1)
    for kept in (linear, mixed):
        for again in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
            assert type(again) is type(kept)
            torch.testing.assert_close(again(x), kept(x), rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"operators holds a HighDynamicRange.*LinearCompose"):
        LinearCompose([blur, clip])


def test_stack_concatenates_and_splits():
    x = normal(2, 2, 4, 6)
    pool, diffraction = SuperResolution((2, 4, 6), 2), CodedDiffraction((2, 4, 6), masks=3)
    stack = Stack([pool, diffraction])
    y = stack(x)
    assert y.shape == (2, 12 + 144)
    for part, expected in zip(stack.split(y), (pool(x), diffraction(x)), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    for part, expected in zip(stack.split(y[0]), (pool(x)[0], diffraction(x)[0]), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"y has shape \(5,\).*\(156,\)"):
        stack.split(torch.zeros(5))
    assert stack.display(y[0]) is None
    left, right = BoxInpainting((2, 4, 6), 0, 0, 4, 4), BoxInpainting((2, 4, 6), 0, 3, 4, 3)
    assert Stack([left, right]).unseen.nonzero()[:, 2].unique().tolist() == [3]
    assert Stack([left, pool]).unseen is None
    assert isinstance(copy.deepcopy(Stack([left, right])), LinearStack)
    assert not Stack([pool, Quantisation(4)]).differentiable
    with pytest.raises(TypeError, match="complex64"):
        Stack([pool, torch.fft.fft2])
    with pytest.raises(TypeError, match=r"operators holds a CodedDiffraction.*LinearStack"):
        LinearStack([pool, diffraction])
