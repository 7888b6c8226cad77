"""Stacks with complex and affine parts, and noise of its own for each part."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from dpnp_inference import DPnP
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import (
    GaussianNoise,
    JointNoise,
    LaplaceNoise,
    Noise,
    PoissonNoise,
)
from dpnp_shared.operators import (
    Compose,
    GaussianBlur,
    HighDynamicRange,
    LinearOperator,
    LinearStack,
    MatrixOperator,
    PhysicalUnits,
    Stack,
    SuperResolution,
)

SHAPE = (2, 3, 4)


class Fourier(LinearOperator):
    """Complex measurements."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x, norm="ortho")


class SilentNoise(LaplaceNoise):
    """Does not say its resolution, and has no gradient."""

    resolution = None
    differentiable = False


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complex_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.complex(normal(*shape, seed=seed), normal(*shape, seed=seed + 100))


def mixed_stack() -> Stack:
    """A real part (2, 3, 4), a complex one (2, 3, 4) and a real vector (5,)."""
    return Stack([GaussianBlur(SHAPE, 0.8), Fourier(SHAPE), MatrixOperator(normal(5, 24, seed=3), SHAPE)])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_complex_parts_are_pairs_of_reals():
    stack, x = mixed_stack(), normal(3, *SHAPE)
    y = stack(x)
    assert y.dtype == torch.float64
    assert y.shape == (3, 24 + 48 + 5)
    assert stack.y_shapes == [SHAPE, SHAPE, (5,)]
    for batched in (y, y[1]):
        parts = stack.split(batched)
        assert [part.is_complex() for part in parts] == [False, True, False]
        assert torch.equal(stack.join(parts), batched)
    for part, A in zip(stack.split(y), stack.operators, strict=True):
        torch.testing.assert_close(part, A(x), rtol=0, atol=0)
    assert torch.equal(y[:, 24:72:2], Fourier()(x).real.flatten(1))
    assert stack(x.float()).dtype == torch.float32
    assert stack.split(y.float())[1].dtype == torch.complex64


def test_adjoint_with_complex_parts_is_the_transpose():
    stack = mixed_stack()
    assert isinstance(stack, LinearStack)
    A = stack(torch.eye(24, dtype=torch.float64).reshape(24, *SHAPE)).T
    y = normal(3, 77, seed=1)
    torch.testing.assert_close(stack.adjoint(y).flatten(1), y @ A, rtol=0, atol=1e-12)
    assert stack.norm() == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-5)


def test_affine_parts_keep_their_linear_part():
    units = PhysicalUnits(SuperResolution((2, 4, 4), 2), physical_range=(0.5, 3))
    blur, x = GaussianBlur((2, 4, 4), 0.8), normal(3, 2, 4, 4)
    for affine in (Stack([units, blur]), Compose([PhysicalUnits(blur), SuperResolution((2, 4, 4), 2)])):
        assert not isinstance(affine, LinearOperator)
        linear = affine.linear_part
        assert isinstance(linear, LinearOperator)
        torch.testing.assert_close(linear(x), affine(x) - affine(torch.zeros_like(x)))
        y = normal(*linear(x).shape, seed=1)
        torch.testing.assert_close((linear(x) * y).sum(), (x * linear.adjoint(y)).sum())
    for linear in (Stack([blur, blur]), Compose([blur, blur])):
        assert linear.linear_part is linear
    assert Stack([units, HighDynamicRange()]).linear_part is None
    assert Compose([blur, HighDynamicRange()]).linear_part is None


def test_joint_density_is_the_sum_of_the_parts():
    stack, x = mixed_stack(), normal(3, *SHAPE)
    noises = [LaplaceNoise(0.3), GaussianNoise(torch.linspace(0.1, 1, 12).reshape(3, 4)), GaussianNoise(0.2)]
    model = ForwardModel(stack, JointNoise(noises))
    y = model.simulate(x[:1], generator=generator())[0]
    expected = sum(
        noise.log_prob(part, A(x)) for noise, part, A in zip(noises, stack.split(y), stack.operators, strict=True)
    )
    torch.testing.assert_close(model.log_likelihood(x, y), expected)
    torch.testing.assert_close(model.log_likelihood(x, y.expand(3, -1)), expected)
    model.check_measurement(y, SHAPE, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: model.log_likelihood(v, y), x)


def test_joint_samples_are_the_parts_samples():
    stack, x = mixed_stack(), normal(2, *SHAPE)
    noises = [LaplaceNoise(0.3), GaussianNoise(0.1), GaussianNoise(0.2)]
    y = ForwardModel(stack, JointNoise(noises)).simulate(x, generator=generator())
    same = generator()
    expected = stack.join([noise.sample(A(x), same) for noise, A in zip(noises, stack.operators, strict=True)])
    assert torch.equal(y, expected)


def test_binding_leaves_the_users_noise_alone():
    noise, stack = JointNoise([LaplaceNoise([0.1]), GaussianNoise(0.2), PoissonNoise()]), mixed_stack()
    before = copy.deepcopy(noise.state_dict())
    model = ForwardModel(stack, noise).float()
    assert isinstance(model.noise, JointNoise)
    assert model.noise is not noise
    assert noise.layout is None
    assert all(
        torch.equal(before[key], value) and value.dtype == before[key].dtype
        for key, value in noise.state_dict().items()
    )
    assert [type(part) for part in model.noise.parts] == [LaplaceNoise, GaussianNoise, PoissonNoise]
    assert [part.counts for part in model.noise.parts] == [False, False, True]
    assert not model.noise.counts
    again = ForwardModel(stack, model.noise)
    assert again.noise is model.noise  # bound already
    x, y = (
        normal(2, *SHAPE).float(),
        stack.join([torch.ones(SHAPE), torch.ones(SHAPE).to(torch.complex64), torch.ones(5)]),
    )
    assert torch.equal(again.log_likelihood(x, y), model.log_likelihood(x, y))
    with pytest.raises(RuntimeError, match="binds it to its operator"):
        noise.log_prob(y, stack(x))
    with pytest.raises(RuntimeError, match="binds it to its operator"):
        noise.sample(stack(x))


def test_resolution_and_gradient_are_those_of_all_parts():
    fine, coarse, silent = LaplaceNoise(0.1), GaussianNoise(0.4), SilentNoise(0.01)
    assert JointNoise([coarse, fine]).resolution == 0.1
    assert JointNoise([coarse, silent]).resolution is None
    blur = GaussianBlur(SHAPE, 0.8)
    assert ForwardModel(Stack([blur, blur]), JointNoise([coarse, fine])).differentiable
    assert not ForwardModel(Stack([blur, blur]), JointNoise([coarse, silent])).differentiable
    assert not ForwardModel(blur, silent).differentiable
    hidden = Compose([blur, SuperResolution(SHAPE, 1)])
    hidden.differentiable = False
    assert not ForwardModel(hidden, fine).differentiable


@pytest.mark.parametrize("covariance", [False, True], ids=["sigmas", "covariance"])
def test_gaussian_parts_are_one_gaussian(covariance):
    root = normal(5, 5, seed=9)
    last = GaussianNoise(covariance=root @ root.T + torch.eye(5)) if covariance else GaussianNoise(0.7)
    noises = [GaussianNoise([0.1, 0.2, 0.3, 0.4]), GaussianNoise(torch.linspace(0.5, 1, 3)[:, None]), last]
    stack, x = mixed_stack(), normal(2, *SHAPE)
    model = ForwardModel(stack, JointNoise(noises))
    assert isinstance(model.noise, GaussianNoise)
    assert model.linear_gaussian
    y = normal(77, seed=4)
    expected = sum(n.log_prob(part, A(x)) for n, part, A in zip(noises, stack.split(y), stack.operators, strict=True))
    torch.testing.assert_close(model.log_likelihood(x, y), expected)
    w = normal(2, 77, seed=5)
    parts = stack.join([n.precision_mul(part) for n, part in zip(noises, stack.split(w), strict=True)])
    torch.testing.assert_close(model.noise.precision_mul(w), parts)


def test_equal_gaussians_stay_a_number():
    model = ForwardModel(mixed_stack(), JointNoise([GaussianNoise(0.3)] * 3))
    assert model.noise.is_scalar


def test_joint_gaussians_have_the_closed_form_posterior():
    prior = GaussianPrior(torch.zeros(24, dtype=torch.float64), torch.eye(24, dtype=torch.float64) * 0.3 + 0.1, SHAPE)
    stack = Stack([PhysicalUnits(GaussianBlur(SHAPE, 0.8)), Fourier(SHAPE)])
    model = ForwardModel(stack, JointNoise([GaussianNoise(0.2), GaussianNoise(0.5)]))
    y = model.simulate(normal(1, *SHAPE), generator=generator())[0]
    A = stack.linear_part(torch.eye(24, dtype=torch.float64).reshape(24, *SHAPE)).T
    sigma = torch.cat([torch.full((24,), 0.2), torch.full((48,), 0.5)]).double()
    by_hand = prior.posterior(
        ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(sigma)), y - stack(torch.zeros(1, *SHAPE).double())[0]
    )
    exact = prior.posterior(model, y)
    torch.testing.assert_close(exact.mean, by_hand.mean)
    assert exact.log_evidence == pytest.approx(by_hand.log_evidence)
    dpnp = DPnP(prior, model, dtype=torch.float64)
    assert type(dpnp.proximal).__name__ == "PerturbAndSolve"
    draws = dpnp.sample(y, chains=400, seed=0).flat
    error = (draws.mean(0) - exact.mean).abs() / (draws.std(0) / math.sqrt(400))
    assert float(error.max()) < 4.5  # standard errors, of 24 pixels


def test_composition_and_physical_units_around_a_stack_are_seen():
    inner = Stack([GaussianBlur(SHAPE, 0.8), SuperResolution(SHAPE, 1)])
    noise, x = JointNoise([LaplaceNoise(0.1), GaussianNoise(0.2)]), normal(2, *SHAPE)
    for operator in (Compose([GaussianBlur(SHAPE, 0.5), inner]), PhysicalUnits(inner)):
        model = ForwardModel(operator, noise)
        y = model.simulate(x, generator=generator())
        assert y.shape == (2, 48)
        assert model.log_likelihood(x, y).shape == (2,)
    nested = ForwardModel(Stack([inner, Fourier(SHAPE)]), JointNoise([noise, GaussianNoise(0.3)]))
    y = nested.simulate(x, generator=generator())
    first, second = nested.operator.split(y)
    expected = ForwardModel(inner, noise).log_likelihood(x, first) + GaussianNoise(0.3).log_prob(second, Fourier()(x))
    torch.testing.assert_close(nested.log_likelihood(x, y), expected)


def test_joint_noise_is_built_from_plain_values():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--noise", type=Noise)
    parts = [("GaussianNoise", {"sigma": 0.1}), ("PoissonNoise", {"gain": 10})]
    noises = [{"class_path": f"dpnp_shared.noise.{name}", "init_args": arguments} for name, arguments in parts]
    config = {"noise": {"class_path": "dpnp_shared.noise.JointNoise", "init_args": {"noises": noises}}}
    noise = parser.instantiate(parser.parse_object(config)).noise
    assert [type(part) for part in noise.parts] == [GaussianNoise, PoissonNoise]


GAUSS = GaussianNoise(0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: JointNoise([]), ValueError, "noises is empty"),
        (lambda: JointNoise([0.1]), TypeError, "noises holds a float"),
        (lambda: ForwardModel(Fourier(SHAPE), JointNoise([GAUSS])), TypeError, "needs a Stack.*Fourier"),
        (lambda: ForwardModel(torch.abs, JointNoise([GAUSS])), TypeError, "needs a Stack.*FunctionOperator"),
        (lambda: ForwardModel(mixed_stack(), JointNoise([GAUSS] * 2)), ValueError, "2 noises and the Stack 3"),
        (
            lambda: ForwardModel(mixed_stack(), JointNoise([GAUSS, GAUSS, GaussianNoise([1.0, 2.0])])),
            ValueError,
            r"part 2: sigma has shape \(2,\)",
        ),
        (
            lambda: ForwardModel(mixed_stack(), JointNoise([GAUSS, GAUSS, GaussianNoise(covariance=torch.eye(4))])),
            ValueError,
            r"part 2: covariance is for 4 real entries",
        ),
        (
            lambda: ForwardModel(mixed_stack(), JointNoise([GAUSS, GaussianNoise(covariance=torch.eye(24)), GAUSS])),
            TypeError,
            "part 1 is complex",
        ),
        (lambda: mixed_stack().split(normal(2, 76)), ValueError, r"y has shape \(2, 76\); allowed are \(77,\)"),
        (lambda: mixed_stack().split(complex_normal(77)), TypeError, "complex128"),
        (lambda: mixed_stack().join([normal(*SHAPE)]), ValueError, "1 parts; the stack has 3"),
        (
            lambda: mixed_stack().join([normal(*SHAPE), normal(*SHAPE), normal(5)]),
            TypeError,
            "part 1 has dtype torch.float64; it must be complex",
        ),
        (
            lambda: mixed_stack().join([normal(2, *SHAPE), complex_normal(*SHAPE), normal(5)]),
            ValueError,
            r"part 1 has shape \(2, 3, 4\)",
        ),
    ],
)
def test_errors_name_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_copies_of_a_stack_keep_their_layout():
    stack = copy.deepcopy(mixed_stack())
    assert isinstance(stack, LinearStack)
    np.testing.assert_array_equal(stack.layout.sizes, [24, 48, 5])
