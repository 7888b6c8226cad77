import math

import pytest
import torch

from dpnp_inference.metrics import sliced_wasserstein


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    a = torch.randn(500, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    shift = torch.zeros(1, 2, 3)
    shift[0, 0, 0] = 4.0
    # E|u_1| of a random unit vector in d dimensions is Γ(d/2) / (√π Γ((d+1)/2))
    expected = 4 * math.gamma(3) / (math.sqrt(math.pi) * math.gamma(3.5))
    assert sliced_wasserstein(a, a + shift, projections=20_000) == pytest.approx(expected, rel=0.01)
    assert sliced_wasserstein(a, a[torch.randperm(500)]) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_of_sets_that_differ_in_shape():
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(4, 2\)"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))
