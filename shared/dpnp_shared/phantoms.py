r"""Test objects made of ellipses, with exact line integrals.

The picture of an object that consists of ellipses is known at any resolution, and so is its integral along any line (Kak and
Slaney 1988, section 3.1): a reference for tomography that no discretisation enters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Toft 1996, "The Radon transform: theory and implementation" (thesis, DTU): the head of Shepp and Logan 1974 with more contrast.
SHEPP_LOGAN = (
    (1.0, 0.0, 0.0, 0.69, 0.92, 0.0),
    (-0.8, 0.0, -0.0184, 0.6624, 0.874, 0.0),
    (-0.2, 0.22, 0.0, 0.11, 0.31, -18.0),
    (-0.2, -0.22, 0.0, 0.16, 0.41, 18.0),
    (0.1, 0.0, 0.35, 0.21, 0.25, 0.0),
    (0.1, 0.0, 0.1, 0.046, 0.046, 0.0),
    (0.1, 0.0, -0.1, 0.046, 0.046, 0.0),
    (0.1, -0.08, -0.605, 0.046, 0.023, 0.0),
    (0.1, 0.0, -0.605, 0.023, 0.023, 0.0),
    (0.1, 0.06, -0.605, 0.023, 0.046, 0.0),
)


@dataclass(frozen=True)
class Ellipses:
    """A sum of ellipses of constant value.

    Attributes:
        table: one row ``(value, x, y, a, b, angle)`` an ellipse: what it adds inside of it, its middle, its half axes (lengths),
            and the angle of the first axis in degrees, anticlockwise from the x axis. x goes to the right and y up; the origin
            is the middle of the image.

    Raises:
        ValueError: a row has another number of entries, or an axis is not positive.
    """

    table: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for row in self.table:
            if len(row) != 6 or not min(row[3:5]) > 0:
                raise ValueError(
                    f"table holds the row {row}; allowed are (value, x, y, a, b, angle) with positive a and b"
                )

    @classmethod
    def shepp_logan(cls, radius: float = 1.0) -> Ellipses:
        """Shepp and Logan's head phantom, values from 0 to 1, inside of a circle of this radius."""
        return cls(tuple((row[0], *(radius * length for length in row[1:5]), row[5]) for row in SHEPP_LOGAN))

    def values(self, points: Tensor) -> Tensor:
        """The object's value at ``points`` ``(..., 2)``, ``(...)``."""
        return self._sum(
            points, lambda middle, matrix: (((points - middle) @ matrix.T).square().sum(-1) <= 1).to(points)
        )

    def image(self, height: int, width: int, pixel_size: float = 1.0, samples: int = 8) -> Tensor:
        """The picture, each pixel the mean over ``samples`` x ``samples`` points in it.

        Args:
            height: rows.
            width: columns.
            pixel_size: side of a pixel.
            samples: points in a pixel, along each axis.

        Returns:
            ``(1, height, width)`` in float64.
        """
        x = (torch.arange(width * samples, dtype=torch.float64) + 0.5) / samples - width / 2
        y = height / 2 - (torch.arange(height * samples, dtype=torch.float64) + 0.5) / samples
        y, x = torch.meshgrid(y * pixel_size, x * pixel_size, indexing="ij")
        fine = self.values(torch.stack([x, y], -1))
        return fine.reshape(1, height, samples, width, samples).mean((2, 4))

    def line_integrals(self, points: Tensor, directions: Tensor) -> Tensor:
        """Exact integrals along straight lines.

        Args:
            points: ``(..., 2)``, a point ``(x, y)`` of each line.
            directions: ``(..., 2)``, of length 1.

        Returns:
            ``(...)``, in units of (value x length).
        """

        def chord(middle: Tensor, matrix: Tensor) -> Tensor:
            o, d = (points - middle) @ matrix.T, directions @ matrix.T  # where the ellipse is the unit circle
            a, b, c = d.square().sum(-1), (o * d).sum(-1), o.square().sum(-1) - 1
            return 2 * (b**2 - a * c).clamp(min=0).sqrt() / a

        return self._sum(points, chord)

    def _sum(self, points: Tensor, of_one: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum over the ellipses of value x ``of_one(middle, matrix)``, where ``matrix`` makes the ellipse a unit circle."""
        total = torch.zeros_like(points[..., 0])
        for value, x, y, a, b, angle in self.table:
            c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            matrix = points.new_tensor([[c / a, s / a], [-s / b, c / b]])
            total = total + value * of_one(points.new_tensor([x, y]), matrix)
        return total
