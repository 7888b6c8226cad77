"""The unconditional U-Net of Hugging Face diffusers, ``UNet2DModel``, in code of our own: inference does not need that package.

Arguments have the names of its ``config.json`` and modules the names of the keys in its files, so that a state dict loads as it is.
It covers the block types of DDPM and ADM; the architecture is Ho et al. 2020's, with the choices of Dhariwal & Nichol 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from einops import rearrange
from torch import Tensor, nn

# block type: has it attention, and how it changes the resolution (None: as downsample_type or upsample_type says)
DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP_BLOCKS = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


class DiffusersUNet(nn.Module):
    """``UNet2DModel`` without class conditioning and with sinusoidal time; arguments and defaults are that class's own.

    An image whose height or width the down-sampling does not divide is padded by replication on its right
    and lower side, and the output is cropped to the input's size.

    Args:
        in_channels: image channels C.
        out_channels: C, or 2C if the network also gives a variance; the first C are the output.
        center_input_sample: maps the input x to 2x - 1 first.
        time_embedding_dim: features of the time embedding, ``4 * block_out_channels[0]`` by default.
        freq_shift: shift of the frequencies' exponents.
        flip_sin_to_cos: cosines before sines.
        down_block_types: of each level, finest first: ``DownBlock2D``, ``AttnDownBlock2D`` or ``ResnetDownsampleBlock2D``.
        mid_block_type: ``UNetMidBlock2D`` or None.
        up_block_types: of each level, coarsest first: ``UpBlock2D``, ``AttnUpBlock2D`` or ``ResnetUpsampleBlock2D``.
        block_out_channels: feature channels of each level, finest first.
        layers_per_block: residual blocks of each level on the way down; one more on the way up.
        mid_block_scale_factor: the middle's residual sums are divided by it.
        downsample_padding: 1, or 0 for a pad on the right and lower side only.
        downsample_type: ``conv`` or ``resnet``, in blocks with attention.
        upsample_type: ``conv`` or ``resnet``, in blocks with attention.
        dropout: dropout probability inside the residual blocks.
        act_fn: ``silu``, ``swish``, ``mish``, ``gelu`` or ``relu``.
        attention_head_dim: channels of an attention head; None for one head.
        norm_num_groups: groups of the group normalisations.
        attn_norm_num_groups: the same for the middle's attention.
        norm_eps: ε of the group normalisations.
        resnet_time_scale_shift: ``default`` (addition) or ``scale_shift``.
        add_attention: attention in the middle.

    Raises:
        ValueError: an argument out of range.
    """

    hyperparameters: dict[str, Any]

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_dim: int | None = None,
        freq_shift: float = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1.0,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
    ) -> None:
        super().__init__()
        widths, levels = list(block_out_channels), len(block_out_channels)
        _allow("mid_block_type", mid_block_type, (None, "UNetMidBlock2D"))
        _allow("downsample_padding", downsample_padding, (0, 1))
        _allow("downsample_type", downsample_type, ("conv", "resnet"))
        _allow("upsample_type", upsample_type, ("conv", "resnet"))
        _allow("act_fn", act_fn, ACTIVATIONS)
        _allow("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift"))
        _allow("out_channels", out_channels, (in_channels, 2 * in_channels))
        for kind in down_block_types:
            _allow("down_block_types", kind, DOWN_BLOCKS)
        for kind in up_block_types:
            _allow("up_block_types", kind, UP_BLOCKS)
        if not (levels >= 1 and levels == len(down_block_types) == len(up_block_types)):
            raise ValueError(
                f"block_out_channels = {widths} needs one entry a level, as down_block_types = {list(down_block_types)} "
                f"and up_block_types = {list(up_block_types)} do"
            )
        if in_channels < 1 or layers_per_block < 1 or norm_num_groups < 1 or any(w % norm_num_groups for w in widths):
            raise ValueError(
                f"in_channels = {in_channels}, layers_per_block = {layers_per_block} must be positive and "
                f"norm_num_groups = {norm_num_groups} divide block_out_channels = {widths}"
            )
        if widths[0] % 2 or widths[0] // 2 == freq_shift:
            raise ValueError(
                f"block_out_channels[0] = {widths[0]} must be even, and not 2 freq_shift = {2 * freq_shift}"
            )
        if not (mid_block_scale_factor > 0 and norm_eps > 0 and 0 <= dropout < 1):
            raise ValueError(
                f"mid_block_scale_factor = {mid_block_scale_factor} and norm_eps = {norm_eps} must be positive, "
                f"dropout = {dropout} in [0, 1)"
            )
        self.hyperparameters = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "center_input_sample": center_input_sample,
            "time_embedding_dim": time_embedding_dim,
            "freq_shift": freq_shift,
            "flip_sin_to_cos": flip_sin_to_cos,
            "down_block_types": list(down_block_types),
            "mid_block_type": mid_block_type,
            "up_block_types": list(up_block_types),
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "mid_block_scale_factor": mid_block_scale_factor,
            "downsample_padding": downsample_padding,
            "downsample_type": downsample_type,
            "upsample_type": upsample_type,
            "dropout": dropout,
            "act_fn": act_fn,
            "attention_head_dim": attention_head_dim,
            "norm_num_groups": norm_num_groups,
            "attn_norm_num_groups": attn_norm_num_groups,
            "norm_eps": norm_eps,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "add_attention": add_attention,
        }
        self.channels, self.stride, self.center = in_channels, 2 ** (levels - 1), center_input_sample
        self.sinusoids, self.freq_shift, self.cosines_first = widths[0], freq_shift, flip_sin_to_cos
        features = time_embedding_dim if time_embedding_dim is not None else 4 * widths[0]
        scale_shift = resnet_time_scale_shift == "scale_shift"

        def residual(c_in: int, c_out: int, resample: str = "", divisor: float = 1.0) -> ResnetBlock:
            return ResnetBlock(
                c_in, c_out, features, norm_num_groups, norm_eps, act_fn, scale_shift, resample, dropout, divisor
            )

        def attend(c: int, groups: int | None = norm_num_groups, divisor: float = 1.0) -> Attention:
            return Attention(c, attention_head_dim, groups, norm_eps, divisor)

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], features)
        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, kind in enumerate(down_block_types):
            attention, how = DOWN_BLOCKS[kind]
            block = Level()
            for _ in range(layers_per_block):
                block.add(residual(width, widths[level]), attend(widths[level]) if attention else None)
                width = widths[level]
                skips.append(width)
            if level < levels - 1:
                by_block = (how or downsample_type) == "resnet"
                block.downsamplers = nn.ModuleList(
                    [residual(width, width, "down") if by_block else Downsample(width, downsample_padding)]
                )
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block: Level | None = None
        if mid_block_type is not None:
            groups = attn_norm_num_groups
            if groups is None and not scale_shift:
                groups = norm_num_groups
            divisor = mid_block_scale_factor
            self.mid_block = Level()
            self.mid_block.add(
                residual(width, width, "", divisor), attend(width, groups, divisor) if add_attention else None
            )
            self.mid_block.add(residual(width, width, "", divisor), None)

        self.up_blocks = nn.ModuleList()
        for level, kind in zip(reversed(range(levels)), up_block_types, strict=True):
            attention, how = UP_BLOCKS[kind]
            block = Level()
            for _ in range(layers_per_block + 1):
                block.add(residual(width + skips.pop(), widths[level]), attend(widths[level]) if attention else None)
                width = widths[level]
            if level:
                by_block = (how or upsample_type) == "resnet"
                block.upsamplers = nn.ModuleList([residual(width, width, "up") if by_block else Upsample(width)])
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, norm_eps)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Raw network output, without a variance.

        Args:
            x: scaled noisy images ``(B, C, H, W)``, of about unit variance.
            noise: time of each image ``(B,)``, an index into the table of β's that may be fractional.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            ValueError: ``x`` does not have ``in_channels`` channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this network takes (B, {self.channels}, H, W)")
        height, width = x.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        h = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
        h = self.conv_in(2 * h - 1 if self.center else h)
        embedding = self.time_embedding(self._sinusoids(noise).to(x.dtype))
        skips = [h]
        for block in self.down_blocks:
            h = block(h, embedding, give=skips)
        if self.mid_block is not None:
            h = self.mid_block(h, embedding)
        for block in self.up_blocks:
            h = block(h, embedding, take=skips)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out[:, : self.channels, :height, :width]

    def _sinusoids(self, t: Tensor) -> Tensor:
        """Sines and cosines of the time, ``(B,)`` → ``(B, block_out_channels[0])``."""
        half = self.sinusoids // 2
        exponent = torch.arange(half, dtype=t.dtype, device=t.device) / (half - self.freq_shift)
        angles = t[:, None] * torch.exp(-math.log(10_000) * exponent)
        waves = [angles.cos(), angles.sin()] if self.cosines_first else [angles.sin(), angles.cos()]
        return torch.cat(waves, dim=1)


class TimeEmbedding(nn.Module):
    """Two linear layers on the sinusoids of the time."""

    def __init__(self, sinusoids: int, features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(sinusoids, features)
        self.linear_2 = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, sinusoids) → (B, features)."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class Level(nn.Module):
    """The layers of one resolution on one side."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()  # as many as residual blocks, or fewer
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def add(self, resnet: ResnetBlock, attention: Attention | None) -> None:
        """Append a layer."""
        self.resnets.append(resnet)
        if attention is not None:
            self.attentions.append(attention)

    def forward(
        self, x: Tensor, embedding: Tensor, take: list[Tensor] | None = None, give: list[Tensor] | None = None
    ) -> Tensor:
        """Each residual block, with its attention if it has one, then the change of resolution.

        Args:
            x: ``(B, c_in, H, W)``.
            embedding: ``(B, features)``.
            take: on the way up, features from the way down; each residual block takes one off the end.
            give: on the way down, where each output is appended.

        Returns:
            ``(B, c_out, H', W')``.
        """
        for i, resnet in enumerate(self.resnets):
            x = resnet(x if take is None else torch.cat([x, take.pop()], 1), embedding)
            if i < len(self.attentions):
                x = self.attentions[i](x)
            if give is not None:
                give.append(x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x, embedding)
            if give is not None:
                give.append(x)
        return x


class ResnetBlock(nn.Module):
    """Residual block, which may halve (``down``, by averages) or double (``up``, by copies) the resolution on its way."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        features: int,
        groups: int,
        eps: float,
        activation: str,
        scale_shift: bool,
        resample: str,
        dropout: float,
        divisor: float,
    ) -> None:
        super().__init__()
        self.activation, self.resample, self.scale_shift, self.divisor = activation, resample, scale_shift, divisor
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(features, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, c_in, H, W), ``embedding`` (B, features) → (B, c_out, H', W')."""
        act = ACTIVATIONS[self.activation]
        h = self.conv1(self._resampled(act(self.norm1(x))))
        condition = self.time_emb_proj(act(embedding))[..., None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + condition)
        out: Tensor = self.conv_shortcut(self._resampled(x)) + self.conv2(self.dropout(act(h)))
        return out / self.divisor

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x


class Attention(nn.Module):
    """Self-attention over the pixels, with a residual connection."""

    def __init__(self, channels: int, head_dim: int | None, groups: int | None, eps: float, divisor: float) -> None:
        super().__init__()
        head_dim = channels if head_dim is None else head_dim
        if head_dim < 1 or channels % head_dim:
            raise ValueError(f"attention_head_dim = {head_dim} does not divide a level's {channels} channels")
        self.heads, self.divisor = channels // head_dim, divisor
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else nn.Identity()
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, H, W)."""
        pixels = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        q, k, v = (
            rearrange(project(pixels), "b l (n c) -> b n l c", n=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = self.to_out[0](rearrange(F.scaled_dot_product_attention(q, k, v), "b n l c -> b l (n c)"))
        out: Tensor = x + rearrange(h, "b (h w) c -> b c h w", h=x.shape[-2])
        return out / self.divisor


class Downsample(nn.Module):
    """Half the resolution, by a convolution of stride 2."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.pad = (0, 0, 0, 0) if padding else (0, 1, 0, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, H/2, W/2)."""
        out: Tensor = self.conv(F.pad(x, self.pad))
        return out


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, C, H, W) → (B, C, 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def _allow(name: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        raise ValueError(f"{name} has the value {value!r}; allowed are {', '.join(map(repr, allowed))}")
