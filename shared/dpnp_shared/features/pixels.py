"""Pixels as features, for data that no classifier is at hand for."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention


class PixelFeatures(nn.Module):
    """The image itself, averaged down to a small one.

    Args:
        size: the small image's sides, ``(H, W)``; smaller images are taken as they are.

    Raises:
        ValueError: a side is not positive.
    """

    def __init__(self, size: tuple[int, int] = (8, 8)) -> None:
        super().__init__()
        if min(size) < 1:
            raise ValueError(f"size = {tuple(size)}; both sides must be positive")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) in [0, 1] → ``(B, C min(H, h) min(W, w))``."""
        height, width = min(x.shape[2], self.size[0]), min(x.shape[3], self.size[1])
        return F.adaptive_avg_pool2d(x, (height, width)).flatten(1)
