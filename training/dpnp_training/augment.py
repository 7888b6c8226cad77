"""Augmentation that does not leak into what is learned (Karras et al. 2020, arXiv 2006.06676; Karras et al. 2022, appendix F.2).

The network is told how each training image was changed, by a vector that is zero for an unchanged one. At inference the vector
is left out, and the network denoises as if only unchanged images had ever been seen, though it learned from all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from dpnp_training.share import Share

AUGMENTATION_LENGTH = 8  # flips 2, turn 2, translation 2, scaling 1, anisotropy 1


class Augmentation:
    """Random flips, quarter turns, translations, and small scalings, isotropic and along the axes.

    Each is applied to each image independently with the same probability; a turn or a flip that is drawn may still be that by
    zero degrees or none. Flips, turns and translations move whole pixels, scalings are bicubic; the surroundings are the mirrored image.

    The network must take the vector: ``augmentation: 8`` among the arguments of :class:`~dpnp_shared.networks.UNet` and
    :class:`~dpnp_shared.networks.DiT`.

    Args:
        probability: of each kind of change.
        horizontal_flip: mirror left and right.
        vertical_flip: mirror top and bottom.
        quarter_turns: turn by multiples of 90 degrees; for square images only.
        translation: standard deviation of the translation, as a fraction of width and height.
        scaling: standard deviation of log2 of the scale.
        anisotropy: standard deviation of log2 of the scale along x, its inverse is taken along y.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        probability: float = 0.12,
        horizontal_flip: bool = True,
        vertical_flip: bool = True,
        quarter_turns: bool = True,
        translation: float = 0.125,
        scaling: float = 0.2,
        anisotropy: float = 0.2,
    ) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability = {probability}; it must be in [0, 1]")
        for name, value in (("translation", translation), ("scaling", scaling), ("anisotropy", anisotropy)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value}; it must be at least 0 and finite")
        self.probability = probability
        self.horizontal_flip, self.vertical_flip, self.quarter_turns = horizontal_flip, vertical_flip, quarter_turns
        self.translation, self.scaling, self.anisotropy = translation, scaling, anisotropy

    def __call__(self, x: Tensor, *, generator: torch.Generator, share: Share | None = None) -> tuple[Tensor, Tensor]:
        """Change each image in its own way.

        Args:
            x: clean images ``(B, C, H, W)``, of any value range, which is kept.
            generator: source of the changes, on the device of ``x``; the same for all shares of a batch.
            share: which images of the whole batch these are; all of them by default.

        Returns:
            The images, and what was done to each, ``(B, 8)``: whether mirrored horizontally and vertically, cosine minus 1 and sine
            of the turn, translation as a fraction of width and height, log2 of scale and anisotropy.

        Raises:
            ValueError: the images are not square, and ``quarter_turns`` is set.
        """
        height, width = x.shape[-2:]
        if self.quarter_turns and height != width:
            raise ValueError(f"quarter_turns = True, but the images are {height} x {width}, not square")
        share = share if share is not None else Share.all(x.shape[0])
        u = share.of(torch.rand(share.whole, 8, generator=generator, device=x.device)).T
        g = share.of(torch.randn(share.whole, 4, generator=generator, device=x.device)).T
        on = u[:6] < self.probability
        flip_x = on[0] & (u[6] < 0.5) & self.horizontal_flip
        flip_y = on[1] & (u[7] < 0.5) & self.vertical_flip
        # the gate's own number, given that it is open, is uniform again
        turn = ((u[2] / max(self.probability, 1e-12) * 4).floor() * on[2] * self.quarter_turns) * (math.pi / 2)
        shift_x = (g[0] * self.translation * width).round() * on[3]
        shift_y = (g[1] * self.translation * height).round() * on[3]
        scale = g[2] * self.scaling * on[4]
        anisotropy = g[3] * self.anisotropy * on[5]
        cos, sin = turn.cos().round(), turn.sin().round()

        # where each pixel of the result comes from, in pixels from the centre; autocast must not touch it: no matrix product
        row = torch.arange(height, device=x.device)[:, None] - (height - 1) / 2
        column = torch.arange(width, device=x.device) - (width - 1) / 2
        a = (column - shift_x.view(-1, 1, 1)) * torch.exp2(-(scale + anisotropy)).view(-1, 1, 1)
        b = (row - shift_y.view(-1, 1, 1)) * torch.exp2(-(scale - anisotropy)).view(-1, 1, 1)
        c, s = cos.view(-1, 1, 1), sin.view(-1, 1, 1)
        source_x = (c * a + s * b) * (1 - 2 * flip_x.float()).view(-1, 1, 1)
        source_y = (c * b - s * a) * (1 - 2 * flip_y.float()).view(-1, 1, 1)
        grid = torch.stack([source_x * (2 / width), source_y * (2 / height)], -1).to(x.dtype)
        moved = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        moved = torch.minimum(torch.maximum(moved, x.amin((1, 2, 3), keepdim=True)), x.amax((1, 2, 3), keepdim=True))

        vector = torch.stack(
            [flip_x, flip_y, cos - 1, sin, shift_x / width, shift_y / height, scale, anisotropy], dim=1
        ).to(x.dtype)
        unchanged = (vector == 0).all(1).view(-1, 1, 1, 1)
        return torch.where(unchanged, x, moved), vector


class _Informed(nn.Module):
    """A network with the augmentation vector filled in."""

    def __init__(self, network: nn.Module, augmentation: Tensor) -> None:
        super().__init__()
        self.network, self.augmentation = network, augmentation

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~dpnp_shared.networks.UNet`."""
        output: Tensor = self.network(x, noise, self.augmentation)
        return output


def informed(network: nn.Module, augmentation: Tensor | None = None) -> nn.Module:
    """The network as a function of image and noise level alone, the augmentation vector ``(B, A)`` filled in if there is one."""
    return network if augmentation is None else _Informed(network, augmentation)
