"""A forward model's likelihood, and that a measurement which does not fit it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise, Noise
from dpnp_shared.operators import DitheredQuantisation, GaussianBlur, MatrixOperator, SuperResolution

SHAPE = (1, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class SummedNoise(Noise):
    """A mistake: one number for the whole batch."""

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return clean

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        return -((y - clean) ** 2).sum()


def test_likelihood_is_the_noise_density_around_the_operator():
    operator = SuperResolution(SHAPE, 2)
    model, x, y = ForwardModel(operator, GaussianNoise(0.2)), normal(3, *SHAPE), normal(1, 2, 2, seed=1)
    expected = torch.distributions.Normal(operator(x), 0.2).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(model.log_likelihood(x, y), expected)
    torch.testing.assert_close(model.log_likelihood(x, y.expand(3, 1, 2, 2)), expected)


def test_simulate_takes_its_generator():
    model, x = ForwardModel(GaussianBlur(SHAPE, 1.0), GaussianNoise(0.2)), normal(2, *SHAPE)
    y = model.simulate(x, generator=torch.Generator().manual_seed(0))
    assert y.shape == (2, *SHAPE)
    assert torch.equal(y, model.simulate(x, generator=torch.Generator().manual_seed(0)))


def test_likelihood_gradient_matches_finite_differences():
    model = ForwardModel(DitheredQuantisation(SHAPE, looks=2, dither=0.3), DitheredLogisticNoise(0.5))
    x = normal(1, *SHAPE).requires_grad_()
    y = model.simulate(x.detach(), generator=torch.Generator().manual_seed(0))[0]
    assert torch.autograd.gradcheck(lambda x: model.log_likelihood(x, y), x)


def test_dense_form_reproduces_the_likelihood():
    sigma = torch.tensor([0.1, 0.2], dtype=torch.float64)
    model, x, y = (
        ForwardModel(SuperResolution(SHAPE, 2), GaussianNoise(sigma)),
        normal(2, *SHAPE),
        normal(1, 2, 2),
    )
    A, R = model.linear_gaussian_dense(SHAPE)
    dense = torch.distributions.MultivariateNormal(x.flatten(1) @ A.T, R)
    torch.testing.assert_close(model.log_likelihood(x, y), dense.log_prob(y.flatten()))


def test_linear_gaussian_is_told():
    assert ForwardModel(GaussianBlur(SHAPE, 1.0), GaussianNoise(0.2)).linear_gaussian
    for model in (
        ForwardModel(torch.abs, GaussianNoise(0.2)),
        ForwardModel(GaussianBlur(SHAPE, 1.0), DitheredLogisticNoise(1.0)),
    ):
        assert not model.linear_gaussian
        with pytest.raises(TypeError, match=r"FunctionOperator|DitheredLogisticNoise"):
            model.linear_gaussian_dense(SHAPE)


def test_shapes_never_broadcast_silently():
    model, x = ForwardModel(GaussianBlur(SHAPE, 1.0), GaussianNoise(0.2)), normal(3, *SHAPE)
    for y in (normal(4, 4), normal(1), normal(1, *SHAPE), normal(1, 1, 4)):
        with pytest.raises(ValueError, match=r"y has shape"):
            model.log_likelihood(x, y)
    with pytest.raises(ValueError, match=r"SummedNoise.*\(\).*\(3,\)"):
        ForwardModel(torch.abs, SummedNoise()).log_likelihood(x, normal(*SHAPE))
    with pytest.raises(ValueError, match="batch"):
        ForwardModel(lambda x: x.sum(0), GaussianNoise(0.2)).log_likelihood(x, normal(*SHAPE))


def test_check_measurement_accepts_what_simulate_gives():
    for operator, noise in (
        (MatrixOperator(normal(5, 16), SHAPE), GaussianNoise([0.1] * 5)),
        (DitheredQuantisation(SHAPE, looks=3), DitheredLogisticNoise(0.2)),
        (lambda x: x.sum((1, 2, 3)), GaussianNoise(0.2)),
    ):
        model = ForwardModel(operator, noise)
        y = model.simulate(normal(1, *SHAPE).float(), generator=torch.Generator().manual_seed(0))[0]
        model.check_measurement(y, SHAPE)
        assert bool(model.log_likelihood(normal(2, *SHAPE), y).isfinite().all())


@pytest.mark.parametrize(
    ("operator", "y", "error", "message"),
    [
        (torch.abs, [0.0], TypeError, "y is a list"),
        (torch.abs, torch.full(SHAPE, float("nan")), ValueError, "16 NaN and 0 infinite entries of 16"),
        (torch.abs, torch.full(SHAPE, float("inf")), ValueError, "0 NaN and 16 infinite"),
        (torch.abs, torch.zeros(1, *SHAPE), ValueError, r"\(1, 1, 4, 4\).*gives \(1, 4, 4\)"),
        (torch.abs, torch.zeros(SHAPE, dtype=torch.complex64), TypeError, "complex64"),
        (torch.fft.fft2, torch.zeros(SHAPE), TypeError, "complex64"),
        (lambda x: x[0], torch.zeros(SHAPE), ValueError, "batch"),
        (lambda x: x.sum(), torch.zeros(SHAPE), ValueError, "batch"),
        (lambda x: 1 / x, torch.zeros(SHAPE), ValueError, "32 entries of 32"),
        (lambda x: x.numpy(), torch.zeros(SHAPE), TypeError, "ndarray"),
    ],
)
def test_check_measurement_says_what_is_wrong(operator, y, error, message):
    with pytest.raises(error, match=message):
        ForwardModel(operator, GaussianNoise(0.1)).check_measurement(y, SHAPE)


def test_check_measurement_asks_the_noise():
    model = ForwardModel(DitheredQuantisation(SHAPE), DitheredLogisticNoise(0.2))
    with pytest.raises(ValueError, match="allowed are -1 and"):
        model.check_measurement(torch.zeros(1, *SHAPE), SHAPE)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="noise is a float"):
        ForwardModel(torch.abs, 0.1)
    with pytest.raises(TypeError, match="operator is a int"):
        ForwardModel(3, GaussianNoise(0.1))
