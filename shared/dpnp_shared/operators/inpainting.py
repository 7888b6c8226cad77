"""Missing pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator, array_argument, check_image_shape


class Inpainting(LinearOperator):
    r""":math:`y = m \odot x` with a mask :math:`m \in \{0, 1\}`.

    ``y`` has the image's shape, with zeros where nothing is seen; noise falls on all of its entries.

    Args:
        mask: ``(H, W)`` or ``(C, H, W)``; the non-zero pixels are seen. A tensor, nested lists, or the path
            of a ``.npy`` file or of a picture (read as grey scale), which a configuration file is better given: the parser
            takes seconds over long lists.

    Raises:
        ValueError: the mask has another number of dimensions.
    """

    pixelwise = True
    mask: Tensor  # (1, H, W) or (C, H, W), bool

    def __init__(self, mask: Tensor | list[list[float]] | list[list[list[float]]] | str) -> None:
        super().__init__()
        if isinstance(mask, str | Path) and Path(mask).suffix != ".npy":
            with Image.open(mask) as picture:
                mask = torch.from_numpy(np.array(picture.convert("L")))
        seen = array_argument(mask, "mask") != 0
        if seen.ndim not in (2, 3):
            raise ValueError(f"mask has shape {tuple(seen.shape)}; allowed are (H, W) and (C, H, W)")
        self.register_buffer("mask", seen if seen.ndim == 3 else seen[None])

    @property
    def unseen(self) -> Tensor:
        """Where the mask is zero, shaped like the mask."""
        return ~self.mask

    def forward(self, x: Tensor) -> Tensor:
        """``m * x``, ``(B, C, H, W)``."""
        self._check_against_mask(x)
        return x * self.mask

    def adjoint(self, y: Tensor) -> Tensor:
        """``m * y``: the operator is an orthogonal projection, its own adjoint."""
        self._check_against_mask(y)
        return y * self.mask

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``f(m) * x``, since ``A^T A = A`` is diagonal."""
        self._check_against_mask(x)
        return x * f(self.mask.to(x.dtype))

    def norm(self) -> float:
        """1, or 0 where no pixel is seen."""
        return float(self.mask.any())

    def display(self, y: Tensor) -> Tensor:
        """The measurement is an image already."""
        return y

    def _check_against_mask(self, x: Tensor) -> None:
        self._check_image(x)
        c, h, w = self.mask.shape
        if x.ndim != 4 or tuple(x.shape[2:]) != (h, w) or c not in (1, x.shape[1]):
            raise ValueError(
                f"an image batch has shape {tuple(x.shape)}; mask {(c, h, w)} needs "
                f"(B, {'C' if c == 1 else c}, {h}, {w})"
            )


class RandomInpainting(Inpainting):
    """Pixels missing at random, exactly ``round(missing · H · W)`` of them.

    Args:
        image_shape: ``(C, H, W)``.
        missing: fraction of the pixels that is missing, in [0, 1].
        seed: of the mask.
        per_channel: draw the mask over all ``C·H·W`` entries instead of over pixels.

    Raises:
        ValueError: ``missing`` is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        missing: float = 0.5,
        seed: int = 0,
        per_channel: bool = False,
    ) -> None:
        c, h, w = check_image_shape(image_shape)
        if not 0 <= missing <= 1:
            raise ValueError(f"missing = {missing}; allowed is a fraction in [0, 1]")
        shape = (c if per_channel else 1, h, w)
        mask = torch.ones(shape, dtype=torch.bool)
        order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))
        mask.view(-1)[order[: round(missing * mask.numel())]] = False
        super().__init__(mask)
        self.image_shape = (c, h, w)


class BoxInpainting(Inpainting):
    """A missing rectangle.

    Args:
        image_shape: ``(C, H, W)``.
        top: first missing row.
        left: first missing column.
        height: number of missing rows.
        width: number of missing columns.

    Raises:
        ValueError: the box does not lie inside the image.
    """

    def __init__(self, image_shape: tuple[int, int, int], top: int, left: int, height: int, width: int) -> None:
        c, h, w = check_image_shape(image_shape)
        if min(top, left) < 0 or min(height, width) < 1 or top + height > h or left + width > w:
            raise ValueError(
                f"box (top, left, height, width) = {(top, left, height, width)} does not lie inside of "
                f"an image of {h} rows and {w} columns"
            )
        mask = torch.ones(1, h, w, dtype=torch.bool)
        mask[:, top : top + height, left : left + width] = False
        super().__init__(mask)
        self.image_shape = (c, h, w)
