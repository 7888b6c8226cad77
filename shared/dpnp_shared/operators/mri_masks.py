"""Patterns in which a Cartesian k-space is undersampled, drawn from a seed.

The frequency 0 is at ``(H // 2, W // 2)``. Columns are phase-encoding lines, as in the fastMRI data (Zbontar et al. 2018,
arXiv 1811.08839), whose masks have the fully sampled centre too.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

PATTERNS = ("equispaced", "random", "poisson_disc", "radial_lines")
GOLDEN_ANGLE = (
    math.pi * (math.sqrt(5) - 1) / 2
)  # 111.25 degrees; Winkelmann et al. 2007, IEEE Trans. Med. Imaging 26, 68


def draw_mask(
    pattern: str, height: int, width: int, acceleration: float, centre_fraction: float = 0.08, seed: int = 0
) -> Tensor:
    r"""A sampling mask.

    - ``"equispaced"``: columns outside of the centre at equal distances, up to rounding; the seed shifts them;
    - ``"random"``: such columns drawn without replacement;
    - ``"poisson_disc"``: points at random, but none within the radius :math:`s\,(1 + 3\rho)` of one drawn before, where
      :math:`\rho` is 0 in the middle and 1 at the ends of the axes and :math:`s` follows from the acceleration: denser in
      the middle (Vasanawala et al. 2010, Radiology 256, 607);
    - ``"radial_lines"``: grid points on lines through the middle, each turned by the golden angle from the one before; the
      seed sets the first.

    The first three sample ``round(n / acceleration)`` of the ``n`` columns or grid points, with the centre, exactly; lines
    are added while that brings their number nearer.

    Args:
        pattern: one of these.
        height: H.
        width: W.
        acceleration: at least 1.
        centre_fraction: the middle ``round(centre_fraction · W)`` columns are all sampled; for the latter two patterns a
            rectangle of as many columns and ``round(centre_fraction · H)`` rows.
        seed: of the draw.

    Returns:
        ``(H, W)``, bool.

    Raises:
        ValueError: an argument is out of range, or the centre alone has more samples than the acceleration allows.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern = {pattern!r}; allowed are {', '.join(PATTERNS)}")
    if not 1 <= acceleration < math.inf:
        raise ValueError(f"acceleration = {acceleration}; allowed is a number of at least 1")
    if not 0 <= centre_fraction <= 1:
        raise ValueError(f"centre_fraction = {centre_fraction}; allowed is a fraction in [0, 1]")
    generator = torch.Generator().manual_seed(seed)
    lines, columns = pattern in ("equispaced", "random"), _centre(width, centre_fraction)
    centre = columns if lines else _centre(height, centre_fraction)[:, None] & columns
    inner, total = int(centre.sum()), round(centre.numel() / acceleration)
    if not max(inner, 1) <= total:
        raise ValueError(
            f"acceleration = {acceleration} leaves {total} of {centre.numel()} {'columns' if lines else 'grid points'}, of which "
            f"the centre (centre_fraction = {centre_fraction}) takes {inner}; lower one of the two"
        )
    if pattern == "poisson_disc":
        return centre | _poisson_disc(centre, total - inner, generator)
    if pattern == "radial_lines":
        return _radial_lines(centre, total, generator)
    outer = (~centre).nonzero()[:, 0]
    if pattern == "random":
        outer = outer[torch.randperm(len(outer), generator=generator)[: total - inner]]
    else:
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        steps = (torch.arange(total - inner) + shift) * len(outer) / max(total - inner, 1)
        outer = outer[steps.long().clamp(max=len(outer) - 1)]
    return columns.index_fill(0, outer, True).repeat(height, 1)


def _centre(n: int, fraction: float) -> Tensor:
    """The middle ``round(fraction · n)`` of ``n`` entries, around ``n // 2``; bool."""
    size = round(fraction * n)
    middle = torch.zeros(n, dtype=torch.bool)
    middle[n // 2 - size // 2 :][:size] = True
    return middle


def _poisson_disc(centre: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` points outside of the centre, in a Poisson-disc pattern of growing radius; bool ``(H, W)``.

    The scale of the radii is found by bisection, to 1%.
    """
    height, width = centre.shape
    shuffled = torch.randperm(height * width, generator=generator)
    order: list[int] = shuffled[~centre.flatten()[shuffled]].tolist()
    rows = (np.arange(height)[:, None] - height // 2) / (height / 2)
    columns = (np.arange(width) - width // 2) / (width / 2)
    growth = 1 + 3 * np.hypot(rows, columns)
    low, high = 0.0, float(max(height, width))
    best = order  # all of them, at radius 0
    while high - low > 0.01 * high and high > 0.1:  # under a radius of 1 grid point nothing is left out
        middle = (low + high) / 2
        points = _throw_darts(order, middle * growth, count)
        if len(points) == count:
            low, best = middle, points
        else:
            high = middle
    mask = torch.zeros(height * width, dtype=torch.bool)
    mask[torch.tensor(best[:count], dtype=torch.long)] = True
    return mask.reshape(height, width)


def _throw_darts(order: list[int], radius: np.ndarray, most: int) -> list[int]:
    """Go through grid points in an order and keep those that are not within the radius of one kept before.

    Args:
        order: flat indices.
        radius: ``(H, W)``, in grid points.
        most: stop at so many.

    Returns:
        Flat indices, in that order.
    """
    height, width = radius.shape
    free = np.ones((height, width), dtype=bool)
    flat = free.reshape(-1)
    kept: list[int] = []
    for index in order:
        if len(kept) == most:
            break
        if not flat[index]:
            continue
        kept.append(index)
        row, column = divmod(index, width)
        r = radius[row, column]
        reach = int(r)
        top, left = max(row - reach, 0), max(column - reach, 0)
        window = free[top : row + reach + 1, left : column + reach + 1]
        down = np.arange(top, top + window.shape[0]) - row
        right = np.arange(left, left + window.shape[1]) - column
        window &= down[:, None] ** 2 + right**2 > r * r
    return kept


def _radial_lines(centre: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Lines through the middle until about ``count`` grid points, with the centre, are sampled; bool ``(H, W)``."""
    height, width = centre.shape
    mask = centre
    angle = math.pi * float(torch.rand((), generator=generator, dtype=torch.float64))
    steps = torch.linspace(-1, 1, 4 * max(height, width) + 1, dtype=torch.float64)
    while True:
        sine, cosine = math.sin(angle), math.cos(angle)
        reach = steps / max(abs(sine), abs(cosine))  # to the border
        rows = (height // 2 + reach * sine * height / 2).round().long()
        columns = (width // 2 + reach * cosine * width / 2).round().long()
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        longer = mask.clone()
        longer[rows[inside], columns[inside]] = True
        before, after = int(mask.sum()), int(longer.sum())
        if before > 0 and after - count > count - before:
            return mask
        mask = longer
        if after == height * width:
            return mask
        angle += GOLDEN_ANGLE
