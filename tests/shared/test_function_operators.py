"""Measurements of functions: Darcy flow against manufactured solutions, local averages against integrals."""

import itertools
import math

import pytest
import torch

from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.operators import CubicAverages, DarcyFlow, LocalAverages

POINTS = [[0.2, 0.3], [0.51, 0.77], [0.9, 0.05], [0.5, 0.5]]


def cells(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return u[:, None].expand(n, n), u.expand(n, n)


def manufactured(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x = cos(pi u) + v/2, p = sin(pi u) sin(2 pi v): x, p and f = -e^x (grad x · grad p + Laplace p) at cell centres."""
    u, v = cells(n)
    x = torch.cos(math.pi * u) + v / 2
    p = torch.sin(math.pi * u) * torch.sin(2 * math.pi * v)
    p_u = math.pi * torch.cos(math.pi * u) * torch.sin(2 * math.pi * v)
    p_v = 2 * math.pi * torch.sin(math.pi * u) * torch.cos(2 * math.pi * v)
    f = -x.exp() * (-math.pi * torch.sin(math.pi * u) * p_u + 0.5 * p_v - 5 * math.pi**2 * p)
    return x[None, None], p, f


def test_darcy_converges_to_a_manufactured_solution_at_second_order():
    errors, sensors = [], []
    exact = torch.tensor([math.sin(math.pi * u) * math.sin(2 * math.pi * v) for u, v in POINTS], dtype=torch.float64)
    for n in (16, 32, 64):
        x, p, f = manufactured(n)
        operator = DarcyFlow((1, n, n), POINTS, source=f)
        errors.append(float((operator.pressure(x)[0] - p).abs().max()))
        sensors.append(float((operator(x)[0] - exact).abs().max()))
    assert errors[-1] < 2e-3
    for coarse, fine in itertools.pairwise(errors):
        assert 3.3 < coarse / fine < 4.7
    assert sensors[-1] < sensors[0] / 10  # between cells the error depends on the place as well
    assert sensors[-1] < 5e-3


def test_darcy_solves_the_equations_on_an_oblong_grid():
    x = GaussianField().sample(3, (12, 20), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = DarcyFlow((1, 12, 20), POINTS, tolerance=1e-11)
    from dpnp_shared.operators.darcy import faces, flow

    torch.testing.assert_close(flow(faces(x[:, 0]), operator.pressure(x)), torch.ones(3, 12, 20, dtype=torch.float64))
    alone = operator(x[1:2])
    torch.testing.assert_close(operator(x)[1:2], alone, rtol=1e-12, atol=0)  # an image does not see the others


def test_darcy_gradient_is_that_of_finite_differences():
    x = GaussianField().sample(2, (9, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    operator = DarcyFlow((1, 9, 8), POINTS, tolerance=1e-13)
    assert torch.autograd.gradcheck(operator, (x.requires_grad_(),), eps=1e-5, rtol=1e-5, atol=1e-10)


def test_darcy_iterations_do_not_grow_with_the_grid():
    for n in (16, 64):
        x = GaussianField().sample(4, (n, n), generator=torch.Generator().manual_seed(2))
        DarcyFlow((1, n, n), POINTS, most_iterations=50)(x)


def test_darcy_errors_name_the_argument():
    for arguments, message in (
        ({"points": [[0.5, 1.5]]}, "points"),
        ({"source": [[1.0, 2.0]]}, "source"),
        ({"tolerance": 0.0}, "tolerance = 0"),
        ({"image_shape": (3, 8, 8)}, "image_shape"),
    ):
        with pytest.raises(ValueError, match=message):
            DarcyFlow(**{"image_shape": (1, 8, 8), "points": POINTS, **arguments})
    with pytest.raises(RuntimeError, match="after 1 iterations"):
        DarcyFlow((1, 8, 8), POINTS, most_iterations=1)(torch.randn(1, 1, 8, 8))


@pytest.mark.parametrize("basis", ["neumann", "periodic"])
def test_local_averages_are_integrals_on_every_grid(basis):
    """Of a wave cos(2 pi u): a Gaussian window keeps exp(-(2 pi width)^2/2) of it, away from the boundary."""
    width = 0.08
    offset = 0.5 if basis == "neumann" else 0.0
    values = []
    for n in (16, 32, 64):
        u = (torch.arange(n, dtype=torch.float64) + offset) / n
        x = torch.cos(2 * math.pi * u)[:, None].expand(1, 1, n, n)
        values.append(LocalAverages((1, n, n), [[0.5, 0.4], [0.6, 0.6]], width, basis)(x)[0])
    exact = math.exp(-((2 * math.pi * width) ** 2) / 2) * torch.cos(2 * math.pi * torch.tensor([0.5, 0.6]).double())
    for value in values:
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-5)


def test_cubic_averages_and_the_adjoint():
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    u = LocalAverages((1, 8, 8), POINTS)(x)
    torch.testing.assert_close(CubicAverages((1, 8, 8), POINTS, cubic=2.0)(x), u + 2 * u**3)
    y = torch.randn_like(u)
    product = (LocalAverages((1, 8, 8), POINTS).adjoint(y) * x).sum()
    torch.testing.assert_close(product, (u * y).sum())
    with pytest.raises(ValueError, match="cubic = -1"):
        CubicAverages((1, 8, 8), POINTS, cubic=-1)
