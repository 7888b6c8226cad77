"""An image in the middle of a larger field."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from dpnp_shared.operators.base import LinearOperator


class ZeroPadding(LinearOperator):
    r"""The image with zeros around it, :math:`A^T A = I`; ``y`` is ``(C, top + H + bottom, left + W + right)``.

    It stands before operators that need a size of their own, such as the Walsh-Hadamard transform of a single-pixel camera.

    Args:
        image_shape: ``(C, H, W)``.
        padding: rows and columns of zeros: one number for all sides, or ``(left, right, top, bottom)``.

    Raises:
        ValueError: ``padding`` is negative, or holds neither one nor four numbers.
    """

    def __init__(self, image_shape: tuple[int, int, int], padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(image_shape)
        sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        if len(sides) != 4 or min(sides) < 0:
            raise ValueError(f"padding = {padding}; allowed are one or four numbers of at least 0")
        self.padding = sides

    def forward(self, x: Tensor) -> Tensor:
        """The padded image ``(B, C, H', W')`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        return functional.pad(x, self.padding)

    def adjoint(self, y: Tensor) -> Tensor:
        """The part of ``y`` ``(B, C, H', W')`` that is the image, ``(B, C, H, W)``."""
        _, h, w = self._known_image_shape("adjoint")
        left, _, top, _ = self.padding
        return y[..., top : top + h, left : left + w]

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """All eigenvalues are 1."""
        return f(x.new_ones(())) * x

    def norm(self) -> float:
        """1."""
        return 1.0

    def display(self, y: Tensor) -> Tensor:
        """The measurement is an image already."""
        return y
