"""Ellipse phantoms: pictures and line integrals of one object."""

import math

import pytest
import torch
from skimage.data import shepp_logan_phantom

from dpnp_shared.phantoms import Ellipses

TURNED = Ellipses(((0.7, 1.0, -2.0, 4.0, 1.5, 30.0), (-0.2, 1.5, -1.5, 1.0, 2.0, -70.0)))


def test_a_pixel_is_the_mean_over_its_area():
    image = TURNED.image(24, 30, pixel_size=0.5)
    assert image.shape == (1, 24, 30)
    assert image.dtype == torch.float64
    mass = math.pi * (0.7 * 4 * 1.5 - 0.2 * 1 * 2)
    assert float(image.sum() * 0.25) == pytest.approx(mass, rel=2e-3)
    # the middle of the first ellipse, (1, -2), is two pixels right and four below the image's, inside of the second one as well
    assert float(image[0, 12 + 4, 15 + 2]) == pytest.approx(0.5)
    assert float(image[0, 12 - 4, 15 - 2]) == 0
    # 30° anticlockwise: the long axis rises to the right
    assert float(image[0, 12 + 1, 15 + 7]) == pytest.approx(0.7)
    assert float(image[0, 12 + 7, 15 + 7]) == 0


def test_line_integrals_are_sums_of_values_along_the_line():
    generator = torch.Generator().manual_seed(0)
    points = 4 * torch.rand(50, 2, generator=generator, dtype=torch.float64) - 2
    angle = 2 * math.pi * torch.rand(50, generator=generator, dtype=torch.float64)
    directions = torch.stack([angle.cos(), angle.sin()], -1)
    t = torch.linspace(-15, 15, 20001, dtype=torch.float64)
    along = points[:, None] + t[:, None] * directions[:, None]
    expected = TURNED.values(along).sum(1) * (t[1] - t[0])
    assert float(expected.max()) > 3
    torch.testing.assert_close(TURNED.line_integrals(points, directions), expected, rtol=0, atol=3e-3)


def test_shepp_logan_is_the_known_picture():
    known = torch.from_numpy(shepp_logan_phantom())  # at points from -1 to 1, both included
    ours = Ellipses.shepp_logan().image(400, 400, 2 / 399, samples=2)[0]
    assert float(torch.corrcoef(torch.stack([known.flatten(), ours.flatten()]))[0, 1]) > 0.98
    assert float((ours - known).abs().median()) < 1e-12
    assert float(((ours - known).abs() > 3e-3).double().mean()) < 0.02  # 8-bit values but at the edges
    torch.testing.assert_close(Ellipses.shepp_logan(200).image(400, 400, 400 / 399, samples=2)[0], ours)


@pytest.mark.parametrize("row", [(1.0, 0.0, 0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 1.0, 1.0)])
def test_rows_that_are_no_ellipses_are_refused(row):
    with pytest.raises(ValueError, match="table holds the row"):
        Ellipses((row,))
