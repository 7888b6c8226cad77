import itertools
import math

import pytest
import torch

from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.solvers import karras_levels, sample_unconditional, solve


def test_levels_decrease_from_top_to_zero():
    levels = karras_levels(10.0, 0.1, 7)
    assert levels[0] == 10.0
    assert levels[-2:] == [0.1, 0.0]
    assert len(levels) == 8
    assert all(a > b for a, b in itertools.pairwise(levels))
    with pytest.raises(ValueError, match="steps"):
        karras_levels(1.0, 0.1, 0)


@pytest.mark.parametrize("order", [1, 2])
def test_probability_flow_converges_at_its_order(order):
    # for N(0, s²) the flow has the closed form x(0) = x(σ) s/√(s² + σ²)
    s, top, low = 0.6, 5.0, 0.05
    prior = GaussianPrior(0.0, s**2, (1, 1, 1))
    x = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    exact = 2.0 * math.sqrt((s**2 + low**2) / (s**2 + top**2))

    def error(steps: int) -> float:
        levels = [top * (low / top) ** (i / steps) for i in range(steps + 1)]
        return abs(float(solve(prior, x, levels, order=order)) - exact)

    ratio = error(40) / error(80)
    assert 2**order * 0.8 < ratio < 2**order * 1.3


def test_unconditional_samples_have_the_priors_moments():
    prior = GaussianPrior(1.0, torch.tensor([4.0, 0.25, 1.0, 1.0]), (1, 2, 2))
    x = sample_unconditional(prior, 4000, generator=torch.Generator().manual_seed(0), steps=60, dtype=torch.float64)
    torch.testing.assert_close(x.mean(0).flatten(), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.12)
    expected = torch.tensor([2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(x.std(0).flatten(), expected, rtol=0.05, atol=0)


def test_bad_arguments_are_named():
    prior, x = GaussianPrior(0.0, 1.0, (1, 1, 1)), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="order = 3"):
        solve(prior, x, [1.0, 0.0], order=3)
    with pytest.raises(ValueError, match="decrease"):
        solve(prior, x, [1.0, 2.0])
