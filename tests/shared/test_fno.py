"""A network between functions: grids, basis, portable form."""

import pytest
import torch

from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.networks import FNO

BASES = ("neumann", "periodic")


def network(basis: str, **changes) -> FNO:
    torch.manual_seed(0)
    net = FNO(**{"width": 8, "modes": 5, "layers": 3, "embedding": 16, "basis": basis, **changes})
    for parameter in net.project[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.double().eval()


def smooth(basis: str, grid: int) -> tuple[torch.Tensor, GaussianField]:
    """Three functions of 4 x 4 modes."""
    field = GaussianField(basis=basis)
    low = field.sample(3, (4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return field.resample(low, (grid, grid)), field


@pytest.mark.parametrize("basis", BASES)
def test_the_same_function_on_three_grids(basis):
    net, t = network(basis), torch.linspace(-0.5, 0.5, 3, dtype=torch.float64)
    with torch.no_grad():
        outputs = {n: net(smooth(basis, n)[0], t) for n in (16, 32, 64)}
    field = smooth(basis, 16)[1]
    fine = field.resample(outputs[64], (16, 16))
    scale = float(fine.std())
    assert scale > 0.1
    coarse, middle = (
        float((field.resample(outputs[n], (16, 16)) - fine).square().mean().sqrt()) / scale for n in (16, 32)
    )
    assert middle < 1e-3  # aliasing of the bends, which vanishes as the grid is refined
    assert middle < coarse < 0.05


@pytest.mark.parametrize("basis", BASES)
def test_every_mode_and_the_noise_level_count(basis):
    net, (x, _) = network(basis), smooth(basis, 16)
    t = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        before = net(x, t)
        assert not torch.allclose(before, net(x, t + 0.5))
        moved = x.clone()
        moved[:, :, 0, 0] += 1
        assert float((net(moved, t) - before)[:, :, -1, -1].abs().min()) > 1e-6  # each pixel reaches all others
        torch.testing.assert_close(net(x[1:2], t[1:2]), before[1:2])  # images of a batch do not see each other


@pytest.mark.parametrize("basis", BASES)
def test_a_coarse_or_oblong_grid_and_half_precision(basis):
    net = network(basis, modes=12)
    x = torch.randn(2, 1, 8, 11, dtype=torch.float64)
    assert net(x, torch.zeros(2, dtype=torch.float64)).shape == x.shape
    half = net.bfloat16()(x.bfloat16(), torch.zeros(2))
    assert half.dtype == torch.bfloat16
    assert bool(half.isfinite().all())


def test_bad_arguments_are_named():
    for changes, message in (
        ({"width": 0}, "width = 0"),
        ({"embedding": 5}, "embedding = 5"),
        ({"basis": "sines"}, "basis = 'sines'"),
    ):
        with pytest.raises(ValueError, match=message):
            network(**{"basis": "neumann", **changes})
