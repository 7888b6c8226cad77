"""One-bit cameras: dithered quantisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator, check_image_shape


class DitheredQuantisation(Operator):
    r"""What a one-bit measurement takes the sign of: :math:`A(x)_l = x - t_l` for looks :math:`l`.

    One look at a pixel is a bit, :math:`y_l = \mathrm{sign}(x - t_l + s\,\varepsilon)` with a known threshold
    :math:`t_l` and logistic noise :math:`\varepsilon`. The bit is random, so taking it belongs to the noise:
    this operator is the smooth, affine :math:`x - t_l`, and
    :class:`~dpnp_shared.noise.DitheredLogisticNoise` adds :math:`s\,\varepsilon`, takes the sign, and knows
    the exact probability of the bit. The measurement is ``(looks, C, H, W)`` of ±1.

    Args:
        image_shape: ``(C, H, W)``.
        looks: number of bits a pixel.
        dither: thresholds are uniform in ``[-dither, dither]``, in image units; with 0 all of them are 0.
        seed: of the thresholds.

    Raises:
        ValueError: ``looks`` is under 1 or ``dither`` is negative.
    """

    pixelwise = True
    thresholds: Tensor  # (looks, C, H, W)

    def __init__(self, image_shape: tuple[int, int, int], looks: int = 1, dither: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        if looks < 1:
            raise ValueError(f"looks = {looks}; allowed is a positive whole number")
        if not 0 <= dither < math.inf:
            raise ValueError(f"dither = {dither}; allowed is a number of at least 0")
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(looks, *self.image_shape, generator=generator, dtype=torch.float64)
        self.register_buffer("thresholds", dither * (2 * uniform - 1))

    def forward(self, x: Tensor) -> Tensor:
        """``x - t``, ``(B, looks, C, H, W)``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        return x[:, None] - self.thresholds.to(x.dtype)

    def display(self, y: Tensor) -> Tensor:
        """Mean of the looks, ``(C, H, W)``."""
        return y.mean(0)
