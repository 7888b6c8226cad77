"""The equations of the nonlinear operators; what all operators have in common is in test_operators.py."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from dpnp_shared.operators import (
    CodedDiffraction,
    DitheredQuantisation,
    HighDynamicRange,
    KernelBlur,
    NonlinearBlur,
    PhaseRetrieval,
    Ptychography,
    Quantisation,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    ("build", "message"),
    [
        (lambda: PhaseRetrieval((1, 4, 4), oversampling=0.5), "oversampling = 0.5"),
        (lambda: PhaseRetrieval((1, 4, 4), value_range=(1, 1)), "value_range"),
        (lambda: DitheredQuantisation((1, 4, 4), looks=0), "looks = 0"),
        (lambda: DitheredQuantisation((1, 4, 4), dither=-1), "dither = -1"),
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
    ],
)
def test_errors_name_argument_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_displays_have_an_image_shape_and_range():
    x = normal(1, 2, 4, 6).clamp(-1, 1)
    for operator, shape in (
        (PhaseRetrieval((2, 4, 6)), (2, 8, 12)),
        (DitheredQuantisation((2, 4, 6), looks=3), (2, 4, 6)),
        (HighDynamicRange(low=0.0), (2, 4, 6)),
        (NonlinearBlur((2, 4, 6), [[1, 1]]), (2, 4, 6)),
        (CodedDiffraction((2, 4, 6), masks=3), (2, 4, 6)),
        (Ptychography((2, 4, 6), probe_size=3, step=2), (2, 6, 9)),
        (Quantisation(4), (2, 4, 6)),
    ):
        picture = operator.display(operator(x)[0])
        assert picture.shape == shape
        assert float(picture.abs().max()) <= 1 + 1e-6
