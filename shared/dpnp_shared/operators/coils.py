r"""What all MRI operators share: complex images seen through the sensitivities of receive coils.

Pruessmann, Weiger, Scheidegger and Boesiger 1999, Magn. Reson. Med. 42, 952 (SENSE).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator, array_argument


class CoilOperator(LinearOperator):
    r""":math:`y_c = E\,(S_c \odot u)` of a complex image :math:`u`, one measurement a coil :math:`c`.

    :math:`E` is the Fourier encoding, which a subclass gives, and :math:`S_c` the coil's sensitivity. The image has

    - one channel: :math:`u` is real; a known phase of the object goes into the coil maps;
    - two channels: the real and the imaginary part of :math:`u`, for a prior over such pairs.

    ``y`` is complex, ``(B, coils, n)`` with ``n`` samples a coil. Adjoint and norm are those of the real image entries:
    :math:`\langle a, b \rangle = \mathrm{Re}\, a^* b`, real and imaginary part of a measurement being two numbers.

    Args:
        image_shape: ``(C, H, W)`` with C = 1 or 2.
        coils: 1 for one coil of uniform sensitivity 1; another number for as many simulated maps (see
            :func:`birdcage_maps`); or the maps, ``(coils, H, W)``, real or complex: a tensor, nested lists, or the path of
            a ``.npy`` file.
        normalise: divide the maps by their root sum of squares, so that :math:`\sum_c |S_c|^2 = 1` wherever a coil sees
            anything; else they are taken as they are.

    Raises:
        ValueError: an argument has another shape or range.
    """

    maps: Tensor | None  # (coils, H, W, 2), real and imaginary parts; a complex buffer would not survive .to(float32)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        coils: int | str | list[list[list[float]]] | Tensor = 1,
        normalise: bool = True,
    ) -> None:
        super().__init__(image_shape)
        c, h, w = self._known_image_shape("__init__")
        if c not in (1, 2):
            raise ValueError(
                f"image_shape = {(c, h, w)}; allowed are 1 channel (a real image) and 2 (its real and imaginary parts)"
            )
        if isinstance(coils, int):
            if coils < 1:
                raise ValueError(f"coils = {coils}; allowed are a positive whole number or coil maps")
            maps = birdcage_maps(coils, h, w) if coils > 1 else None
        else:
            maps = array_argument(coils, "coils", allow_complex=True).to(torch.complex128)
            if maps.ndim != 3 or tuple(maps.shape[1:]) != (h, w) or len(maps) == 0:
                raise ValueError(f"coils has shape {tuple(maps.shape)}; allowed are coil maps (coils, {h}, {w})")
            if not bool(maps.any()):
                raise ValueError("coils holds zeros only; at least one coil must see a pixel")
        if maps is not None and normalise:
            energy = _energy(maps)
            maps = maps / torch.where(energy > 0, energy, 1.0).sqrt()
        self.coils = 1 if maps is None else len(maps)
        self.register_buffer("maps", None if maps is None else torch.view_as_real(maps).contiguous())

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Samples ``(B, coils, n)`` of the coils' complex images ``(B, coils, H, W)``."""

    @abstractmethod
    def encode_adjoint(self, y: Tensor) -> Tensor:
        """The adjoint of :meth:`encode`, ``(B, coils, H, W)`` of ``(B, coils, n)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Samples ``(B, coils, n)``, complex, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        u = (torch.complex(x[:, 0], x[:, 1]) if x.shape[1] == 2 else x[:, 0])[:, None]
        maps = self._maps(u)
        images = u if maps is None else maps * u
        return self.encode(images if images.is_complex() else torch.complex(images, torch.zeros_like(images)))

    def adjoint(self, y: Tensor) -> Tensor:
        r""":math:`\sum_c \bar S_c \odot E^* y_c`, ``(B, C, H, W)``: its real part, and its imaginary part for 2 channels."""
        images = self.encode_adjoint(y)
        maps = self._maps(y)
        combined = images[:, 0] if maps is None else (maps.conj() * images).sum(1)
        c, _, _ = self._known_image_shape("adjoint")
        return torch.stack([combined.real, combined.imag][:c], dim=1)

    @property
    def unseen(self) -> Tensor | None:
        """Pixels where all sensitivities are 0, ``(1, H, W)``; None if there are none."""
        maps = self._maps(torch.zeros((), dtype=torch.float64))
        dark = None if maps is None else _energy(maps)[None] == 0
        return dark if dark is not None and bool(dark.any()) else None

    def _combine(self, images: Tensor) -> Tensor:
        r""":math:`\sum_c \bar S_c u_c / \sum_c |S_c|^2` for pictures: the least-squares image of the coils' ``(coils, H, W)``."""
        maps = self._maps(images)
        if maps is None:
            u = images[0]
        else:
            energy = _energy(maps)
            u = (maps.conj() * images).sum(0) / torch.where(energy > 0, energy, 1.0)
        c, _, _ = self._known_image_shape("display")
        return torch.stack([u.real, u.imag][:c])

    def _maps(self, like: Tensor) -> Tensor | None:
        """Coil maps ``(coils, H, W)``, complex, in the precision of ``like``; None for one uniform coil."""
        return None if self.maps is None else torch.view_as_complex(self.maps.to(like.real.dtype))

    def _check_stored(self, stored: Tensor, allowed: str) -> None:
        """Refuse k-space data that is not complex, or not of this many coils.

        Args:
            stored: ``(coils, …)``.
            allowed: the shapes that are taken, for the error.

        Raises:
            TypeError: it is real.
            ValueError: it has another number of coils.
        """
        if not stored.is_complex():
            raise TypeError(f"k-space data has dtype {stored.dtype}; it must be complex")
        if stored.ndim < 2 or stored.shape[0] != self.coils:
            raise ValueError(f"k-space data has shape {tuple(stored.shape)}; allowed are {allowed}")


def birdcage_maps(coils: int, height: int, width: int) -> Tensor:
    r"""Sensitivities of long straight conductors on a circle around the image, as in a birdcage coil.

    With :math:`z = a + ib` the position in half widths and half heights from the image's middle and :math:`z_c = 1.5\,
    e^{2\pi i c/n}` a conductor's, :math:`S_c(z) = 1/(1 - z/z_c)`: by the law of Biot and Savart the transverse field falls
    as the inverse of the distance, and its direction is the phase; both are taken relative to the middle.

    Args:
        coils: n, how many.
        height: H, in pixels.
        width: W.

    Returns:
        ``(coils, H, W)``, complex128, not normalised.
    """
    rows = (2 * torch.arange(height, dtype=torch.float64) - height + 1) / height
    columns = (2 * torch.arange(width, dtype=torch.float64) - width + 1) / width
    z = torch.complex(columns.expand(height, width), rows[:, None].expand(height, width))
    angles = 2 * math.pi * torch.arange(coils, dtype=torch.float64) / coils
    return 1 / (1 - z / torch.polar(torch.full_like(angles, 1.5), angles)[:, None, None])


def _energy(maps: Tensor) -> Tensor:
    r""":math:`\sum_c |S_c|^2`, ``(H, W)``, of ``(coils, H, W)``."""
    return (maps.real**2 + maps.imag**2).sum(0)
