"""The equations of the linear operators; what all operators have in common is in test_operators.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import fft, linalg, ndimage, signal
from torch import Tensor

from dpnp_shared.operators import (
    BicubicSuperResolution,
    BoxInpainting,
    CircularConvolution,
    CompressedSensing,
    Convolution,
    GaussianBlur,
    Inpainting,
    KernelBlur,
    MatrixOperator,
    MotionBlur,
    RandomInpainting,
    SuperResolution,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
        (lambda: SuperResolution((4, 4), 2), r"image_shape = \(4, 4\)"),
    ],
)
def test_errors_name_argument_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_displays_have_an_image_shape_and_range():
    x = normal(1, 2, 4, 6).clamp(-1, 1)
    for operator, shape in (
        (RandomInpainting((2, 4, 6)), (2, 4, 6)),
        (SuperResolution((2, 4, 6), 2), (2, 4, 6)),
        (GaussianBlur((2, 4, 6), 1.0), (2, 4, 6)),
        (MotionBlur((2, 4, 6), 3, 45), (2, 4, 6)),
        (Convolution((2, 4, 6), [[0.2, 0.3, 0.5]]), (2, 4, 4)),
    ):
        picture = operator.display(operator(x)[0])
        assert picture.shape == shape
        assert float(picture.abs().max()) <= 1 + 1e-6
    bicubic = BicubicSuperResolution((2, 4, 6), 2)
    assert bicubic.display(bicubic(x)[0]).shape == (2, 4, 6)  # the cubic kernel overshoots
    assert MatrixOperator(normal(3, 48), (2, 4, 6)).display(normal(3)) is None
    assert CompressedSensing((2, 4, 6), 3).display(normal(3)) is None
