"""The convolutional U-Net of DDPM (Ho et al. 2020) and ADM (Dhariwal & Nichol 2021), for images of any shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class UNet(nn.Module):
    """Residual U-Net with self-attention at chosen levels and a sinusoidal embedding of the noise level.

    An image whose height or width the down-sampling does not divide is padded by replication on its right
    and lower side, and the output is cropped to the input's size.

    Args:
        channels: image channels C, any number.
        widths: feature channels of each resolution level, finest first; each level halves the resolution.
        blocks: residual blocks of each level; one number for all, or one a level.
        attention: levels (0 = finest) that end each block with self-attention.
        head_channels: channels of one attention head.
        embedding: channels of the embedding of the noise level.
        dropout: dropout probability inside the residual blocks.
        resample: how one level follows the other: ``conv``, a strided convolution and nearest neighbours with a convolution
            (DDPM), or ``residual``, residual blocks that average-pool or repeat pixels (DDPM++, Song et al. 2021, and ADM).
        scale_residual: divide the sum of a residual connection by √2, which keeps its variance (DDPM++).
        augmentation: length of the augmentation vector that :meth:`forward` may be given, 0 for none.
        checkpoint_activations: recompute the residual blocks' activations in the backward pass instead of storing them; same
            result, less memory, about a third more time. Not part of ``hyperparameters``: it is no property of the weights.

    Raises:
        ValueError: an argument out of range.
    """

    hyperparameters: dict[str, Any]

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (64, 128, 256),
        blocks: int | Sequence[int] = 2,
        attention: Sequence[int] = (2,),
        head_channels: int = 32,
        embedding: int = 256,
        dropout: float = 0.0,
        resample: Literal["conv", "residual"] = "conv",
        scale_residual: bool = False,
        augmentation: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        levels = len(widths)
        depths = [blocks] * levels if isinstance(blocks, int) else list(blocks)
        if channels < 1:
            raise ValueError(f"channels = {channels}; at least 1 is needed")
        if not widths or any(w < 1 for w in widths):
            raise ValueError(f"widths = {list(widths)}; one positive number a level is needed")
        if len(depths) != levels or any(b < 1 for b in depths):
            raise ValueError(f"blocks = {blocks}; needed is one positive number, or one for each of {levels} levels")
        if any(not 0 <= a < levels for a in attention):
            raise ValueError(f"attention = {list(attention)}; levels are 0 to {levels - 1}")
        if embedding < 4 or embedding % 2:
            raise ValueError(f"embedding = {embedding}; an even number of at least 4 is needed")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout}; it must be in [0, 1)")
        if resample not in ("conv", "residual"):
            raise ValueError(f"resample = {resample!r}; allowed are 'conv' and 'residual'")
        if augmentation < 0:
            raise ValueError(f"augmentation = {augmentation}; it must be at least 0")
        self.hyperparameters = {
            "channels": channels,
            "widths": list(widths),
            "blocks": depths,
            "attention": list(attention),
            "head_channels": head_channels,
            "embedding": embedding,
            "dropout": dropout,
            "resample": resample,
            "scale_residual": scale_residual,
            "augmentation": augmentation,
        }
        self.channels = channels
        self.stride = 2 ** (levels - 1)
        self.checkpoint_activations = checkpoint_activations
        self.embed = nn.Sequential(
            SinusoidalEmbedding(embedding), nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.augment = nn.Linear(augmentation, embedding, bias=False) if augmentation else None
        scale = 0.5**0.5 if scale_residual else 1.0

        def block(c_in: int, c_out: int, level: int) -> Block:
            return Block(c_in, c_out, embedding, dropout, head_channels if level in attention else 0, scale)

        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        width, skips = widths[0], [widths[0]]
        self.down = nn.ModuleList()
        for level in range(levels):
            if level:
                self.down.append(
                    nn.Conv2d(width, width, 3, stride=2, padding=1)
                    if resample == "conv"
                    else Block(width, width, embedding, dropout, 0, scale, resample="down")
                )
                skips.append(width)
            for _ in range(depths[level]):
                self.down.append(block(width, widths[level], level))
                width = widths[level]
                skips.append(width)
        last = levels - 1
        self.middle = nn.ModuleList([block(width, width, last), Block(width, width, embedding, dropout, 0, scale)])
        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for _ in range(depths[level] + 1):
                self.up.append(block(width + skips.pop(), widths[level], level))
                width = widths[level]
            if level:
                self.up.append(
                    Upsample(width)
                    if resample == "conv"
                    else Block(width, width, embedding, dropout, 0, scale, resample="up")
                )
        self.head = nn.Sequential(
            nn.GroupNorm(_groups(width), width), nn.SiLU(), zeroed(nn.Conv2d(width, channels, 3, padding=1))
        )

    def forward(self, x: Tensor, noise: Tensor, augmentation: Tensor | None = None) -> Tensor:
        """Raw network output.

        Args:
            x: scaled noisy images ``(B, C, H, W)``, of about unit variance.
            noise: conditioning number of each image ``(B,)``, the preconditioning's ``c_noise``.
            augmentation: how each image was augmented, ``(B, A)``; without it, not at all.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            ValueError: ``x`` does not have ``channels`` channels, or the network was not built for such an augmentation vector.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {self.channels}, H, W)")
        height, width = x.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        h = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
        sinusoids, project = self.embed[0], self.embed[1:]
        embedding = project(augmented(sinusoids(noise).to(x.dtype), augmentation, self.augment))
        h = self.stem(h)
        skips = [h]
        for layer in self.down:
            h = self._run(layer, h, embedding)
            skips.append(h)
        for layer in self.middle:
            h = self._run(layer, h, embedding)
        for layer in self.up:
            resamples = isinstance(layer, Upsample) or layer.resample
            h = self._run(layer, h if resamples else torch.cat([h, skips.pop()], 1), embedding)
        out: Tensor = self.head(h)
        return out[..., :height, :width]

    def _run(self, layer: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
        """One layer, a residual block by recomputation if asked for."""
        if not isinstance(layer, Block):
            out: Tensor = layer(h)
        elif self.checkpoint_activations and torch.is_grad_enabled():
            out = checkpoint(layer, h, embedding, use_reentrant=False)
        else:
            out = layer(h, embedding)
        return out


class Block(nn.Module):
    """Residual block with scale-and-shift conditioning (Dhariwal & Nichol 2021, section 3), then attention if asked for."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding: int,
        dropout: float,
        head_channels: int,
        scale: float = 1.0,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.resample = scale, resample
        self.norm_in = nn.GroupNorm(_groups(c_in), c_in)
        self.conv_in = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.condition = nn.Linear(embedding, 2 * c_out)
        self.norm_out = nn.GroupNorm(_groups(c_out), c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, head_channels, scale) if head_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, c_in, H, W), ``embedding`` (B, E) → (B, c_out, H', W'), of half or twice the size if the block resamples."""
        h = self.conv_in(self._resampled(F.silu(self.norm_in(x))))
        scale, shift = rearrange(self.condition(F.silu(embedding)), "b (two c) -> two b c 1 1", two=2)
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h) * (1 + scale) + shift)))
        out: Tensor = self.attention(added(self.skip(self._resampled(x)), h, self.scale))
        return out

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, head_channels: int, scale: float = 1.0) -> None:
        super().__init__()
        if channels % head_channels:
            raise ValueError(f"head_channels = {head_channels} does not divide the level's {channels} channels")
        self.heads, self.scale = channels // head_channels, scale
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, H, W)."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three n c) h w -> three b n (h w) c", three=3, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return added(x, self.out(rearrange(h, "b n (h w) c -> b (n c) h w", h=x.shape[-2])), self.scale)


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a number (Vaswani et al. 2017), frequencies from 1 down to ``1/max_period``.

    They are computed in the number's own precision: a DDPM time of a thousand would not survive half precision.
    """

    def __init__(self, dim: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.dim, self.max_period = dim, max_period

    def forward(self, t: Tensor) -> Tensor:
        """``t`` (B,) → (B, dim)."""
        exponent = torch.arange(self.dim // 2, dtype=t.dtype, device=t.device) / (self.dim // 2)
        angles = t[:, None] * torch.exp(-math.log(self.max_period) * exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def added(x: Tensor, branch: Tensor, scale: float) -> Tensor:
    """The residual sum, scaled where asked for."""
    total = x + branch
    return total if scale == 1.0 else total * scale


def augmented(embedding: Tensor, augmentation: Tensor | None, layer: nn.Linear | None) -> Tensor:
    """The embedding of the noise level (B, E), plus that of the augmentation vector (B, A) if there is one.

    The layer has no bias: no vector is the zero vector (Karras et al. 2022, appendix F.2).

    Raises:
        ValueError: the vector does not have the length that the network was built for.
    """
    if augmentation is None:
        return embedding
    length = layer.in_features if layer is not None else 0
    if layer is None or augmentation.shape != (embedding.shape[0], length):
        raise ValueError(
            f"the augmentation vector has shape {tuple(augmentation.shape)}; this network takes "
            f"({embedding.shape[0]}, {length}), see its argument 'augmentation'"
        )
    out: Tensor = embedding + layer(augmentation.to(embedding.dtype))
    return out


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with its weights set to zero, so that a residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _groups(channels: int) -> int:
    """The largest number of groups up to 32 that divides the channels and leaves at least 4 in each."""
    return next(g for g in range(min(32, max(1, channels // 4)), 0, -1) if channels % g == 0)
