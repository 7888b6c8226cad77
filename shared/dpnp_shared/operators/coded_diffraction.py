"""Phase retrieval from coded diffraction patterns.

Candès, Li and Soltanolkotabi 2015, Appl. Comput. Harmon. Anal. 39, 277, arXiv 1310.3240.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator, check_image_shape


class CodedDiffraction(Operator):
    r""":math:`y_j = |F(d_j \odot u)|`, Fourier magnitudes of the image behind random masks :math:`d_j`.

    :math:`u = (x - \text{low})/(\text{high} - \text{low})` is the physical intensity and :math:`F` the orthonormal
    2-D transform. A mask has independent complex entries, the same for all channels:

    - ``"octanary"``: :math:`d = b_1 b_2` with :math:`b_1` uniform in :math:`\{1, -1, i, -i\}` and :math:`b_2 =
      \sqrt{1/2}` with probability 4/5, else :math:`\sqrt 3`;
    - ``"phase"``: :math:`d = e^{i\varphi}` with a uniform phase.

    Both have :math:`E|d|^2 = 1`. ``y`` is real, ``(B, masks, C, H, W)``, the frequency 0 at its corner. ``u`` and
    :math:`-u` explain it equally well, of which only one is physical. Where a magnitude is 0 its gradient is taken
    as 0.

    Args:
        image_shape: ``(C, H, W)``.
        masks: how many.
        kind: ``"octanary"`` or ``"phase"``.
        seed: of the masks.
        value_range: ``(low, high)`` of ``x``, dark and bright.

    Raises:
        ValueError: ``masks`` is under 1, ``kind`` is another word, or ``value_range`` is empty.
    """

    mask: Tensor  # (masks, H, W, 2), real and imaginary parts; a complex buffer would not survive .to(float32)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        masks: int = 4,
        kind: Literal["octanary", "phase"] = "octanary",
        seed: int = 0,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        if masks < 1:
            raise ValueError(f"masks = {masks}; allowed is a positive whole number")
        if kind not in ("octanary", "phase"):
            raise ValueError(f"kind = {kind!r}; allowed are 'octanary' and 'phase'")
        self.low, self.high = value_range
        if not self.low < self.high:
            raise ValueError(f"value_range = {value_range}; allowed is (low, high) with low < high")
        shape = (masks, *self.image_shape[1:])
        generator = torch.Generator().manual_seed(seed)
        if kind == "octanary":
            quarters = torch.randint(4, shape, generator=generator)
            real = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)[quarters]
            imaginary = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)[quarters]
            frequent = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.8
            radius = (frequent * 0.5 + ~frequent * 3.0).double().sqrt()
            mask = torch.stack([radius * real, radius * imaginary], dim=-1)
        else:
            phase = 2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64)
            mask = torch.stack([phase.cos(), phase.sin()], dim=-1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Magnitudes ``(B, masks, C, H, W)`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        u = (x - self.low) / (self.high - self.low)
        d = torch.view_as_complex(self.mask.to(x.dtype))[:, None]  # (masks, 1, H, W)
        spectrum: Tensor = torch.fft.fft2(d * u[:, None], norm="ortho")
        return spectrum.abs()

    def display(self, y: Tensor) -> Tensor:
        """``log(1 + |y|)`` of the first mask, with the frequency 0 in the middle, scaled to [-1, 1]."""
        picture: Tensor = torch.fft.fftshift(torch.log1p(y[0].abs()), dim=(-2, -1))
        low, high = picture.aminmax()
        return 2 * (picture - low) / (high - low).clamp_min(torch.finfo(picture.dtype).tiny) - 1
