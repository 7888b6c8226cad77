import pytest
import torch

from dpnp_shared.denoiser import expand_sigma


def test_expand_sigma():
    x = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    assert expand_sigma(2.0, x).shape == (1, 1, 1, 1)
    assert expand_sigma(torch.tensor(2.0), x).dtype == torch.float64
    assert expand_sigma(torch.tensor([1.0, 2.0, 3.0]), x).shape == (3, 1, 1, 1)
    for wrong in (torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="sigma has shape"):
            expand_sigma(wrong, x)
