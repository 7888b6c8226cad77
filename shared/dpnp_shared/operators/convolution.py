"""Convolution that is not circular: only where the kernel lies inside of the image, or with a reflected border."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dpnp_shared.operators.base import LinearOperator, array_argument


class Convolution(LinearOperator):
    r""":math:`y = k * x` with the same kernel for every channel, and an explicit border.

    With ``boundary="reflect"`` the image is continued by its mirror image, without repeating the outermost
    pixels (as in :func:`numpy.pad`), and ``y`` has the image's shape:

    .. math:: y_{ij} = \sum_{ab} k_{ab}\, x_{i - a + k_h // 2,\ j - b + k_w // 2}

    With ``boundary="valid"`` only sums that need no pixel outside of the image are kept, and ``y`` has
    ``H - kh + 1`` rows and ``W - kw + 1`` columns:

    .. math:: y_{ij} = \sum_{ab} k_{ab}\, x_{i - a + k_h - 1,\ j - b + k_w - 1}

    There is no closed form of functions of :math:`A^T A`.

    Args:
        image_shape: ``(C, H, W)``.
        kernel: ``(kh, kw)``: a tensor, nested lists, or the path of a ``.npy`` file. It is used as it is, not
            normalised.
        boundary: ``"valid"`` or ``"reflect"``.

    Raises:
        ValueError: ``kernel`` is not two-dimensional, holds an entry that is not finite, or is larger than the
            image where ``boundary`` is ``"valid"``; or ``boundary`` is another word.
    """

    kernel: Tensor  # (kh, kw)
    rows: Tensor  # (H + kh - 1,) image row of every padded row; (H,) where nothing is padded
    columns: Tensor  # likewise

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        kernel: Tensor | list[list[float]] | str,
        boundary: Literal["valid", "reflect"] = "valid",
    ) -> None:
        super().__init__(image_shape)
        values = array_argument(kernel, "kernel")
        if values.ndim != 2 or values.numel() == 0:
            raise ValueError(f"kernel has shape {tuple(values.shape)}; allowed is (kh, kw)")
        if boundary not in ("valid", "reflect"):
            raise ValueError(f"boundary = {boundary!r}; allowed are 'valid' and 'reflect'")
        _, h, w = self._known_image_shape("__init__")
        kh, kw = values.shape
        if boundary == "valid" and (kh > h or kw > w):
            raise ValueError(
                f"kernel has shape {(kh, kw)}; with boundary = 'valid' it may not be larger than the image {(h, w)}"
            )
        self.boundary = boundary
        self.register_buffer("kernel", values)
        self.register_buffer("rows", self._padded(h, kh))
        self.register_buffer("columns", self._padded(w, kw))

    def _padded(self, n: int, k: int) -> Tensor:
        """The pixel that each position of the padded axis shows."""
        border = (k - 1 - k // 2, k // 2) if self.boundary == "reflect" else (0, 0)
        return torch.from_numpy(np.pad(np.arange(n), border, mode="reflect"))

    def forward(self, x: Tensor) -> Tensor:
        """``k * x``, ``(B, C, H', W')``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        padded = x[:, :, self.rows][..., self.columns] if self.boundary == "reflect" else x
        flipped = self.kernel.to(x.dtype).flip(0, 1)[None, None]
        y = functional.conv2d(padded.flatten(0, 1)[:, None], flipped)
        return y.reshape(*x.shape[:2], *y.shape[-2:])

    def adjoint(self, y: Tensor) -> Tensor:
        """Correlation with the kernel, the border added back to the pixels it mirrors; ``(B, C, H, W)``."""
        c, h, w = self._known_image_shape("adjoint")
        flipped = self.kernel.to(y.dtype).flip(0, 1)[None, None]
        padded = functional.conv_transpose2d(y.flatten(0, 1)[:, None], flipped)
        padded = padded.reshape(-1, c, *padded.shape[-2:])
        if self.boundary == "valid":
            return padded
        folded = padded.new_zeros(*padded.shape[:2], h, padded.shape[3]).index_add(2, self.rows, padded)
        return folded.new_zeros(*folded.shape[:3], w).index_add(3, self.columns, folded)

    def display(self, y: Tensor) -> Tensor:
        """The measurement is an image already."""
        return y
