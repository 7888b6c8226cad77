"""Physical units around an operator, and the closed forms that stay available through them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dpnp_inference.dpnp import DPnP
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import (
    GaussianBlur,
    HighDynamicRange,
    Identity,
    Inpainting,
    MatrixOperator,
    PhysicalUnits,
    Scaled,
)

SHAPE = (2, 3, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ranges", [((-1.0, 1.0), (0.0, 0.02)), ((0.0, 255.0), (3.0, -1.0))])
def test_the_operator_sees_the_physical_image(ranges):
    (v0, v1), (p0, p1) = ranges
    blur, x = GaussianBlur(SHAPE, 0.8), normal(3, *SHAPE)
    units = PhysicalUnits(blur, *ranges)
    torch.testing.assert_close(units(x), blur(p0 + (x - v0) / (v1 - v0) * (p1 - p0)))
    ends = PhysicalUnits(None, *ranges)(torch.tensor([v0, v1], dtype=torch.float64).reshape(2, 1, 1, 1))
    torch.testing.assert_close(ends.flatten(), torch.tensor([p0, p1], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(PhysicalUnits(None, *ranges).display(ends[0]), torch.full((1, 1, 1), v0).double())


def test_the_linear_part_is_the_map_less_its_offset():
    operator = PhysicalUnits(MatrixOperator(normal(5, 24), SHAPE), (-1, 2), (0.5, -4))
    linear, x = operator.linear_part, normal(3, *SHAPE)
    torch.testing.assert_close(linear(x), operator(x) - operator(torch.zeros_like(x)))
    assert linear.has_gram_function
    torch.testing.assert_close(linear.gram_function(lambda s: s, x), linear.adjoint(linear(x)))
    assert linear.norm() == pytest.approx(1.5 * operator.operator.norm())
    assert PhysicalUnits(HighDynamicRange()).linear_part is None
    assert PhysicalUnits(PhysicalUnits(Identity())).linear_part(x).equal(x / 4)


@pytest.mark.parametrize("end", [2.0, -2.0])
def test_clamped_values_stay_on_the_meaningful_side(end):
    operator = PhysicalUnits(None, physical_range=(0.0, end), clamp=True)
    u = operator(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).reshape(5, 1, 1, 1)).flatten() / end
    assert u.tolist() == [0.0, 0.0, 0.5, 1.0, 1.25]
    assert operator.linear_part is None


def test_an_affine_model_has_the_exact_posterior_and_the_exact_sampler():
    C = torch.eye(24, dtype=torch.float64) * 0.3 + 0.1
    prior = GaussianPrior(torch.full(SHAPE, 0.2, dtype=torch.float64), C, SHAPE)
    inner = MatrixOperator(normal(5, 24), SHAPE)
    model = ForwardModel(PhysicalUnits(inner, (-1, 1), (0, 3)), GaussianNoise(0.4))
    y = model.simulate(normal(1, *SHAPE, seed=3), generator=torch.Generator().manual_seed(0))[0]
    linear = ForwardModel(MatrixOperator(1.5 * inner.matrix, SHAPE), GaussianNoise(0.4))
    shifted = y - inner(torch.full((1, *SHAPE), 1.5, dtype=torch.float64))[0]
    exact, by_hand = prior.posterior(model, y), prior.posterior(linear, shifted)
    torch.testing.assert_close(exact.mean, by_hand.mean)
    assert exact.log_evidence == pytest.approx(by_hand.log_evidence)
    for population in (False, True):
        affine = DPnP(prior, model, population=population, dtype=torch.float64)
        assert type(affine.proximal).__name__ == "ClosedForm"
        draws = affine.sample(y, chains=20, seed=0)
        same = DPnP(prior, linear, population=population, dtype=torch.float64).sample(shifted, chains=20, seed=0)
        torch.testing.assert_close(draws.samples, same.samples, rtol=0, atol=1e-8)


def test_what_is_behind_shows_through():
    mask = normal(3, 4) > 0
    operator = PhysicalUnits(Inpainting(mask), physical_range=(0, 1))
    assert operator.unseen.equal(~mask[None])
    assert operator.linear_part.unseen.equal(~mask[None])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PhysicalUnits(value_range=(1, 1)), r"value_range = \(1, 1\)"),
        (lambda: PhysicalUnits(physical_range=(0, float("nan"))), "physical_range"),
        (lambda: Scaled(Identity(), 0.0), "scale = 0.0"),
    ],
)
def test_empty_ranges_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
