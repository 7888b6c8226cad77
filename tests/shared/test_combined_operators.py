"""Operators made of operators."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from dpnp_shared.operators import (
    BoxInpainting,
    CodedDiffraction,
    Compose,
    GaussianBlur,
    HighDynamicRange,
    Inpainting,
    LinearCompose,
    LinearOperator,
    LinearStack,
    Quantisation,
    Stack,
    SuperResolution,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    with pytest.raises(TypeError, match=r"operators holds a CodedDiffraction.*LinearStack"):
        LinearStack([pool, diffraction])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Compose([]), "operators is empty"),
        (lambda: Stack([]), "operators is empty"),
        (lambda: Stack([HighDynamicRange()]), "image_shape = None"),
    ],
)
def test_errors_name_argument_and_value(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_compose_displays_as_its_last_operator():
    x = normal(1, 2, 4, 6).clamp(-1, 1)
    operator = Compose([GaussianBlur((2, 4, 6), 1.0), SuperResolution((2, 4, 6), 2)])
    picture = operator.display(operator(x)[0])
    assert picture.shape == (2, 4, 6)
    assert float(picture.abs().max()) <= 1 + 1e-6
