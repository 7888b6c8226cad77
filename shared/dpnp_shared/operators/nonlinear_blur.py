"""Blur of the light, seen through a camera's response.

The order (linear light, blur, response) is that of Tai et al. 2013, IEEE Trans. Pattern Anal. Mach. Intell. 35,
2498; the response curve here is a simple saturating one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator, check_image_shape
from dpnp_shared.operators.blur import KernelBlur


class NonlinearBlur(Operator):
    r""":math:`y = r(k * \ell(u))` with a circular blur :math:`k` of the linear light :math:`\ell(u)`.

    :math:`u = (x - \text{low})/(\text{high} - \text{low})` is the picture's brightness, and

    .. math:: \ell(u) = \mathrm{sign}(u)\,|u|^\gamma, \qquad r(t) = \frac{\tanh(s t)}{\tanh s}

    are the light that a display shows for it and the response of the camera with saturation :math:`s`
    (:math:`r(t) = t` for :math:`s = 0`). For ``u`` in [0, 1] so is ``y``. Brightness below 0, which is not physical,
    is continued oddly, so that the map has a continuous gradient everywhere. ``y`` has the image's shape.

    Args:
        image_shape: ``(C, H, W)``.
        kernel: ``(kh, kw)``, as in :class:`~dpnp_shared.operators.KernelBlur`: not negative, and divided by its sum.
        gamma: :math:`\gamma`, at least 1.
        saturation: :math:`s`, at least 0.
        value_range: ``(low, high)`` of ``x``, dark and bright.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        kernel: Tensor | list[list[float]] | str,
        gamma: float = 2.2,
        saturation: float = 0.0,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        if not 1 <= gamma < math.inf:
            raise ValueError(f"gamma = {gamma}; allowed is a number of at least 1")
        if not 0 <= saturation < math.inf:
            raise ValueError(f"saturation = {saturation}; allowed is a number of at least 0")
        self.low, self.high = value_range
        if not self.low < self.high:
            raise ValueError(f"value_range = {value_range}; allowed is (low, high) with low < high")
        self.gamma, self.saturation = gamma, saturation
        self.blur = KernelBlur(self.image_shape, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """``r(k * l(u))``, ``(B, C, H, W)``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        u = (x - self.low) / (self.high - self.low)
        # autograd takes |u|' = 0 at 0, which would only be wrong for gamma = 1
        light = u if self.gamma == 1 else u.sign() * u.abs() ** self.gamma
        blurred: Tensor = self.blur(light)
        if self.saturation == 0:
            return blurred
        return torch.tanh(self.saturation * blurred) / math.tanh(self.saturation)

    def display(self, y: Tensor) -> Tensor:
        """The measurement with 0 at -1 and 1 at 1; noise may lead beyond."""
        return 2 * y - 1
