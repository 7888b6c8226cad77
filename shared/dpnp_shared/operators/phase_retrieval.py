"""Fourier phase retrieval.

Fienup 1982, Applied Optics 21, 2758; as posed in Chung et al. 2023 (DPS), arXiv 2209.14687.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator, check_image_shape


class PhaseRetrieval(Operator):
    r""":math:`y = |F\,\mathrm{pad}(u)|`, the magnitudes of an oversampled Fourier transform.

    :math:`u = (x - \text{low})/(\text{high} - \text{low})` is the physical intensity, so that zeros around
    the image mean darkness; :math:`F` is the orthonormal 2-D transform on a grid of ``ceil(oversampling·H)``
    x ``ceil(oversampling·W)``. ``y`` is real, ``(B, C, Hp, Wp)``, the frequency 0 at its corner. The image
    turned by 180° explains ``y`` equally well. Where a magnitude is 0 its gradient is taken as 0.

    Args:
        image_shape: ``(C, H, W)``.
        oversampling: of each axis, at least 1; with 2 the autocorrelation does not wrap around.
        value_range: ``(low, high)`` of ``x``, dark and bright.

    Raises:
        ValueError: ``oversampling`` is under 1 or ``value_range`` is empty.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        oversampling: float = 2.0,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        if not 1 <= oversampling < math.inf:
            raise ValueError(f"oversampling = {oversampling}; allowed is a number of at least 1")
        self.low, self.high = value_range
        if not self.low < self.high:
            raise ValueError(f"value_range = {value_range}; allowed is (low, high) with low < high")
        _, h, w = self.image_shape
        self.grid = (math.ceil(oversampling * h), math.ceil(oversampling * w))

    def forward(self, x: Tensor) -> Tensor:
        """Magnitudes ``(B, C, Hp, Wp)`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        u = (x - self.low) / (self.high - self.low)
        spectrum: Tensor = torch.fft.fft2(u, s=self.grid, norm="ortho")
        return spectrum.abs()

    def display(self, y: Tensor) -> Tensor:
        """``log(1 + |y|)`` with the frequency 0 in the middle, scaled to [-1, 1]."""
        picture: Tensor = torch.fft.fftshift(torch.log1p(y.abs()), dim=(-2, -1))
        low, high = picture.aminmax()
        return 2 * (picture - low) / (high - low).clamp_min(torch.finfo(picture.dtype).tiny) - 1
