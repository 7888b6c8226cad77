r"""Averages of a function around points: a linear measurement of a function, and a stylised nonlinear one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpnp_shared.gaussian_field import Basis, check_basis, positions
from dpnp_shared.operators.base import LinearOperator, Operator, array_argument


class LocalAverages(LinearOperator):
    r""":math:`u_j = \int w_j(s)\, x(s)\, ds` over the unit square, with Gaussian windows :math:`w_j` around points, each of integral 1.

    The integral is a sum over pixels, normalised on the grid, so that on two grids it measures the same up to the sum's error.

    Args:
        image_shape: ``(1, H, W)``.
        points: ``(m, 2)``, each in the unit square, down and right; or the path of a ``.npy`` file.
        width: standard deviation of the windows, as a part of the square's side; pixels should not be larger.
        basis: where pixels are, see :mod:`dpnp_shared.gaussian_field`; windows of ``periodic`` functions wrap around.

    Raises:
        ValueError: an argument of another shape or value.
    """

    matrix: Tensor  # (m, H·W)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        points: Sequence[Sequence[float]] | Tensor | str,
        width: float = 0.08,
        basis: Basis = "neumann",
    ) -> None:
        super().__init__(image_shape)
        h, w = check_function_shape(self.image_shape)
        check_basis(basis)
        where = check_points(points)
        if not 0 < width < math.inf:
            raise ValueError(f"width = {width}; it must be positive and finite")
        windows = []
        for n, at in ((h, where[:, 0]), (w, where[:, 1])):
            distance = positions(n, basis) - at[:, None]
            if basis == "periodic":
                distance = distance - distance.round()
            windows.append(torch.softmax(-(distance**2) / (2 * width**2), dim=1))
        matrix = windows[0][:, :, None] * windows[1][:, None, :]
        self.register_buffer("matrix", matrix.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 1, H, W)`` to ``(B, m)``."""
        self._check_image(x)
        return x.flatten(1) @ self.matrix.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        """See :class:`~dpnp_shared.operators.LinearOperator`."""
        assert self.image_shape is not None
        return (y @ self.matrix.to(y)).reshape(-1, *self.image_shape)


class CubicAverages(Operator):
    r""":math:`y_j = u_j + a\, u_j^3` of the local averages :math:`u_j`: a stylised problem with posteriors far from Gaussian.

    Args:
        image_shape: ``(1, H, W)``.
        points: as for :class:`LocalAverages`, as are the other arguments.
        width: of the windows.
        cubic: a, at least 0; 0 is linear.
        basis: where pixels are.

    Raises:
        ValueError: an argument of another shape or value.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        points: Sequence[Sequence[float]] | Tensor | str,
        width: float = 0.08,
        cubic: float = 1.0,
        basis: Basis = "neumann",
    ) -> None:
        super().__init__()
        if not 0 <= cubic < math.inf:
            raise ValueError(f"cubic = {cubic}; it must be at least 0 and finite")
        self.averages, self.cubic = LocalAverages(image_shape, points, width, basis), cubic
        self.image_shape = self.averages.image_shape

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 1, H, W)`` to ``(B, m)``."""
        u: Tensor = self.averages(x)
        return u + self.cubic * u**3


def check_function_shape(image_shape: tuple[int, int, int] | None) -> tuple[int, int]:
    """The grid of images of a single channel.

    Raises:
        ValueError: there are more channels.
    """
    assert image_shape is not None
    if image_shape[0] != 1:
        raise ValueError(f"image_shape = {image_shape}; allowed is one channel, (1, H, W)")
    return image_shape[1], image_shape[2]


def check_points(points: Sequence[Sequence[float]] | Tensor | str) -> Tensor:
    """Points of the unit square as a tensor ``(m, 2)`` in float64.

    Raises:
        ValueError: another shape, or a point outside.
    """
    where = array_argument(points, "points")
    if where.ndim != 2 or where.shape[1] != 2 or not len(where) or bool(((where < 0) | (where > 1)).any()):
        raise ValueError(
            f"points has shape {tuple(where.shape)}, from {float(where.min()) if where.numel() else math.nan:g} to "
            f"{float(where.max()) if where.numel() else math.nan:g}; allowed are points (m, 2) in [0, 1]"
        )
    return where
