r"""Complex visibilities: the Fourier transform of the sky, at the frequencies an array measures.

Thompson, Moran and Swenson 2017, Interferometry and Synthesis in Radio Astronomy, 3rd edition, chapters 2 and 3 (van Cittert and
Zernike's theorem).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator, check_image_shape
from dpnp_shared.operators.interferometry.array import Coverage
from dpnp_shared.operators.matrix import MatrixOperator

Pulse = Literal["square", "triangle", "point"]
PULSES: dict[str, int] = {"point": 0, "square": 1, "triangle": 2}
MICROARCSECOND = math.pi / 180 / 3600 * 1e-6


class Visibilities(LinearOperator):
    r""":math:`V(u, v) = \hat p(u, v) \sum_k I_k\, e^{-2\pi i (u l_k + v m_k)}`, the sum written out, complex ``y`` ``(B, visibilities)``.

    ``x`` is the flux :math:`I_k` of each pixel, at :math:`l_k` towards east, which is to the left, and :math:`m_k` towards
    north, which is up; the image's middle is the phase centre. :math:`\hat p` is the transform of a pixel's shape, with the
    pixel's side :math:`\Delta`

    - ``"square"``: :math:`\mathrm{sinc}(u\Delta)\, \mathrm{sinc}(v\Delta)` with :math:`\mathrm{sinc}\, t = \sin(\pi t)/(\pi t)`;
    - ``"triangle"``: its square, that is linear interpolation between pixels;
    - ``"point"``: 1.

    For :math:`u, v` of the baseline from station i to j, :math:`V` is :math:`\langle E_i E_j^* \rangle` of fields
    :math:`E \propto e^{+i \omega t}`. ``y`` is in the units of ``x``, janskys say;
    :class:`~dpnp_shared.operators.PhysicalUnits` turns a prior's values into fluxes. Stations' gains are not modelled; for them
    see :class:`~dpnp_shared.operators.ClosurePhases` and :class:`~dpnp_shared.operators.LogClosureAmplitudes`.

    The singular value decomposition is taken once, so that white noise has a closed form.

    Args:
        image_shape: ``(1, H, W)``.
        coverage: the frequencies.
        field_of_view: width of the image in microarcseconds; pixels are squares.
        pulse: ``"square"``, ``"triangle"`` or ``"point"``.

    Raises:
        ValueError: the image has several channels, ``field_of_view`` is not positive, or ``pulse`` is another word.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], coverage: Coverage, field_of_view: float, pulse: Pulse = "square"
    ) -> None:
        super().__init__(image_shape)
        self.parts = MatrixOperator(fourier_matrix(image_shape, coverage, field_of_view, pulse), image_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Visibilities ``(B, m)``, complex, of ``x`` ``(B, 1, H, W)``."""
        self._check_image(x)
        return as_complex(self.parts(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """The real part of the backward transform, ``(B, 1, H, W)``, of ``y`` ``(B, m)``."""
        image: Tensor = self.parts.adjoint(torch.cat([y.real, y.imag], dim=1))
        return image

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """By the singular value decomposition of real and imaginary parts."""
        return self.parts.gram_function(f, x)

    def norm(self) -> float:
        """Largest singular value."""
        return self.parts.norm()

    def display(self, y: Tensor) -> Tensor:
        r"""A smooth inverse, :math:`(A^T A + 0.01 \|A\|^2)^{-1} A^T y`, in the units of ``x``.

        It is a dirty image whose frequencies do not count the more the more often they were measured.
        """
        floor = 0.01 * self.norm() ** 2
        return self.gram_function(lambda s: 1 / (s + floor), self.adjoint(y[None]))[0]


def fourier_matrix(image_shape: tuple[int, int, int], coverage: Coverage, field_of_view: float, pulse: Pulse) -> Tensor:
    """Real parts of all visibilities, then the imaginary ones, as a matrix ``(2 m, H·W)`` in float64; see :class:`Visibilities`."""
    c, h, w = check_image_shape(image_shape)
    if c != 1:
        raise ValueError(f"image_shape = {(c, h, w)}; allowed are images of one channel (1, H, W)")
    if not 0 < field_of_view < math.inf:
        raise ValueError(f"field_of_view = {field_of_view}; allowed is a positive number of microarcseconds")
    if pulse not in PULSES:
        raise ValueError(f"pulse = {pulse!r}; allowed are {', '.join(map(repr, PULSES))}")
    pixel = field_of_view * MICROARCSECOND / w
    east = ((w - 1) / 2 - torch.arange(w, dtype=torch.float64)) * pixel
    north = ((h - 1) / 2 - torch.arange(h, dtype=torch.float64)) * pixel
    u, v = coverage.uv[:, 0, None, None], coverage.uv[:, 1, None, None]
    phase = -2 * math.pi * (u * east + v * north[:, None])
    shape = (torch.sinc(u * pixel) * torch.sinc(v * pixel)) ** PULSES[pulse]
    return torch.cat([shape * phase.cos(), shape * phase.sin()]).flatten(1)


def as_complex(parts: Tensor) -> Tensor:
    """Visibilities ``(B, m)`` of their real and imaginary parts, one after the other, ``(B, 2 m)``."""
    real, imaginary = parts.chunk(2, dim=-1)
    return torch.complex(real, imaginary)
