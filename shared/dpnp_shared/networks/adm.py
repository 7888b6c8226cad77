"""The U-Net of guided-diffusion, "ADM" (Dhariwal & Nichol 2021, arXiv 2105.05233), whose weights much of this field uses.

The modules carry the names of the keys in guided-diffusion's files (``input_blocks.3.0.in_layers.0.weight``, …), so that a state
dict loads as it is. Improved DDPM's U-Net (Nichol & Dhariwal 2021) is the same with other arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from einops import rearrange
from torch import Tensor, nn

from dpnp_shared.networks.unet import SinusoidalEmbedding, zeroed

GROUPS = 32  # of every group normalisation


class ADMUNet(nn.Module):
    """The unconditional U-Net of guided-diffusion.

    An image whose height or width the down-sampling does not divide is padded by replication on its right
    and lower side, and the output is cropped to the input's size.

    Args:
        channels: image channels C, any number.
        widths: feature channels of each resolution level, finest first (``num_channels`` times ``channel_mult``).
        blocks: residual blocks of each level (``num_res_blocks``).
        attention: levels (0 = finest) that have self-attention; the middle always has.
        heads: attention heads; used where ``head_channels`` is not given.
        head_channels: channels of one attention head (``num_head_channels``).
        embedding: sinusoids of the time embedding (``num_channels``), ``widths[0]`` by default.
        resample_blocks: change the resolution inside of residual blocks (``resblock_updown``), not by plain convolutions.
        scale_shift: condition by scale and shift (``use_scale_shift_norm``), not by addition.
        new_attention_order: split queries, keys and values before the heads (``use_new_attention_order``).
        learned_variance: the last convolution gives 2C channels (``learn_sigma``), of which the first C are the output.
        time_scale: factor on the time input; ``1000/T`` for networks trained with ``rescale_timesteps``.
        dropout: dropout probability inside the residual blocks.

    Raises:
        ValueError: an argument out of range.
    """

    hyperparameters: dict[str, Any]

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (128, 128, 256, 256, 512, 512),
        blocks: int = 1,
        attention: Sequence[int] = (4,),
        heads: int = 4,
        head_channels: int | None = 64,
        embedding: int | None = None,
        resample_blocks: bool = True,
        scale_shift: bool = True,
        new_attention_order: bool = False,
        learned_variance: bool = True,
        time_scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        levels = len(widths)
        if channels < 1 or blocks < 1:
            raise ValueError(f"channels = {channels} and blocks = {blocks} must be positive")
        if not widths or any(w < 1 or w % GROUPS for w in widths):
            raise ValueError(f"widths = {list(widths)}; needed is one positive multiple of {GROUPS} a level")
        if any(not 0 <= a < levels for a in attention):
            raise ValueError(f"attention = {list(attention)}; levels are 0 to {levels - 1}")
        for width in {widths[-1], *(widths[a] for a in attention)}:
            per_head = head_channels if head_channels is not None else heads
            if per_head < 1 or width % per_head:
                name = "head_channels" if head_channels is not None else "heads"
                raise ValueError(f"{name} = {per_head} does not divide a level's {width} channels")
        embedding = widths[0] if embedding is None else embedding
        if embedding < 2 or embedding % 2:
            raise ValueError(f"embedding = {embedding}; a positive even number is needed")
        if not time_scale > 0 or not 0 <= dropout < 1:
            raise ValueError(f"time_scale = {time_scale} must be positive and dropout = {dropout} in [0, 1)")
        self.hyperparameters = {
            "channels": channels,
            "widths": list(widths),
            "blocks": blocks,
            "attention": list(attention),
            "heads": heads,
            "head_channels": head_channels,
            "embedding": embedding,
            "resample_blocks": resample_blocks,
            "scale_shift": scale_shift,
            "new_attention_order": new_attention_order,
            "learned_variance": learned_variance,
            "time_scale": time_scale,
            "dropout": dropout,
        }
        self.channels, self.time_scale = channels, time_scale
        self.stride = 2 ** (levels - 1)
        features = 4 * embedding
        self.sinusoids = SinusoidalEmbedding(embedding)
        self.time_embed = nn.Sequential(nn.Linear(embedding, features), nn.SiLU(), nn.Linear(features, features))

        def residual(c_in: int, c_out: int, resample: str = "") -> ResBlock:
            return ResBlock(c_in, c_out, features, resample, scale_shift, dropout)

        def attend(c: int) -> AttentionBlock:
            return AttentionBlock(c, heads if head_channels is None else c // head_channels, new_attention_order)

        width, skips = widths[0], [widths[0]]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(channels, width, 3, padding=1)])])
        for level in range(levels):
            for _ in range(blocks):
                stage = Stage([residual(width, widths[level])])
                width = widths[level]
                if level in attention:
                    stage.append(attend(width))
                self.input_blocks.append(stage)
                skips.append(width)
            if level < levels - 1:
                self.input_blocks.append(
                    Stage([residual(width, width, "down") if resample_blocks else Downsample(width)])
                )
                skips.append(width)
        self.middle_block = Stage([residual(width, width), attend(width), residual(width, width)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            for i in range(blocks + 1):
                stage = Stage([residual(width + skips.pop(), widths[level])])
                width = widths[level]
                if level in attention:
                    stage.append(attend(width))
                if level and i == blocks:
                    stage.append(residual(width, width, "up") if resample_blocks else Upsample(width))
                self.output_blocks.append(stage)
        last = zeroed(nn.Conv2d(width, channels * (2 if learned_variance else 1), 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), last)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Raw network output, without the learned variance.

        Args:
            x: scaled noisy images ``(B, C, H, W)``, of about unit variance.
            noise: time of each image ``(B,)``, an index into the table of β's that may be fractional.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            ValueError: ``x`` does not have ``channels`` channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {self.channels}, H, W)")
        height, width = x.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        h = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
        embedding = self.time_embed(self.sinusoids(self.time_scale * noise).to(x.dtype))
        skips = []
        for stage in self.input_blocks:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, skips.pop()], 1), embedding)
        out: Tensor = self.out(h)
        return out[:, : self.channels, :height, :width]


class Stage(nn.ModuleList):
    """Layers in a row, of which the residual blocks also take the time's embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, c_in, H, W), ``embedding`` (B, E) → (B, c_out, H', W')."""
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    """Residual block, which may halve (``down``, by averages) or double (``up``, by copies) the resolution on its way."""

    def __init__(self, c_in: int, c_out: int, embedding: int, resample: str, scale_shift: bool, dropout: float) -> None:
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * c_out if scale_shift else c_out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, c_out), nn.SiLU(), nn.Dropout(dropout), zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, c_in, H, W), ``embedding`` (B, E) → (B, c_out, H', W')."""
        norm_in, act, conv = self.in_layers
        h = conv(self._resampled(act(norm_in(x))))
        condition = self.emb_layers(embedding)[..., None, None]
        norm_out, rest = self.out_layers[0], self.out_layers[1:]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = rest(norm_out(h) * (1 + scale) + shift)
        else:
            h = rest(norm_out(h + condition))
        out: Tensor = self.skip_connection(self._resampled(x)) + h
        return out

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads = heads
        self.order = "b (three n c) l -> three b n l c" if new_order else "b (n three c) l -> three b n l c"
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, H, W)."""
        q, k, v = rearrange(self.qkv(self.norm(x).flatten(2)), self.order, three=3, n=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b n l c -> b (n c) l")
        out: Tensor = x + self.proj_out(h).reshape(x.shape)
        return out


class Downsample(nn.Module):
    """Half the resolution, by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, H/2, W/2)."""
        out: Tensor = self.op(x)
        return out


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out
