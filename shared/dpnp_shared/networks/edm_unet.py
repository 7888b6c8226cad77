"""The U-Nets of EDM's code (Karras et al. 2022, arXiv 2206.00364): DDPM++ and NCSN++ (``SongUNet``) and ADM (``DhariwalUNet``).

The modules carry the names of the keys in NVlabs' networks (``enc.32x32_block0.conv0.weight``, …), so that a state dict loads as it
is. The architectures are those of Song et al. 2021 (appendix H) and of Dhariwal & Nichol 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from einops import rearrange
from torch import Tensor, nn

GROUPS = 32  # of every group normalisation
KINDS = ("ddpm++", "ncsn++", "adm")


class EDMUNet(nn.Module):
    """An unconditional network of EDM's code, without augmentation labels (which are zero when it is used).

    An image whose height or width the down-sampling does not divide is padded by replication on its right
    and lower side, and the output is cropped to the input's size.

    Args:
        kind: ``ddpm++``, ``ncsn++`` or ``adm``.
        channels: image channels C, any number.
        resolution: of the images it was trained on; only names the modules.
        widths: feature channels of each resolution level, finest first.
        stem: feature channels of the first convolution.
        blocks: residual blocks of each level on the way down; one more on the way up.
        attention: levels (0 = finest) that have self-attention; the coarsest has it in the middle.
        sinusoids: features of the noise level's sines and cosines.
        features: of the embedding.
        dropout: dropout probability inside the residual blocks.

    Raises:
        ValueError: an argument out of range.
    """

    hyperparameters: dict[str, Any]

    def __init__(
        self,
        kind: str = "ddpm++",
        channels: int = 3,
        resolution: int = 64,
        widths: Sequence[int] = (128, 256, 256, 256),
        stem: int = 128,
        blocks: int = 4,
        attention: Sequence[int] = (2,),
        sinusoids: int = 128,
        features: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        levels = len(widths)
        if kind not in KINDS:
            raise ValueError(f"kind = {kind!r}; allowed are {', '.join(KINDS)}")
        if min(channels, blocks, stem, features) < 1 or not widths:
            raise ValueError(
                f"channels = {channels}, blocks = {blocks}, stem = {stem}, features = {features} must be positive, "
                f"widths = {list(widths)} not empty"
            )
        per_head = 64 if kind == "adm" else 1  # channels of a head; the others have one head
        if any(w < 1 or w % GROUPS or w % per_head for w in (stem, *widths)):
            raise ValueError(f"stem = {stem}, widths = {list(widths)}; needed are multiples of {max(GROUPS, per_head)}")
        if any(not 0 <= a < levels for a in attention):
            raise ValueError(f"attention = {list(attention)}; levels are 0 to {levels - 1}")
        if resolution >> (levels - 1) < 1:
            raise ValueError(f"resolution = {resolution} cannot be halved {levels - 1} times")
        if sinusoids < 4 or sinusoids % 2 or not 0 <= dropout < 1:
            raise ValueError(f"sinusoids = {sinusoids} must be even and at least 4, dropout = {dropout} in [0, 1)")
        self.hyperparameters = {
            "kind": kind,
            "channels": channels,
            "resolution": resolution,
            "widths": list(widths),
            "stem": stem,
            "blocks": blocks,
            "attention": list(attention),
            "sinusoids": sinusoids,
            "features": features,
            "dropout": dropout,
        }
        self.channels, self.kind, self.stride = channels, kind, 2 ** (levels - 1)
        taps = (1, 3, 3, 1) if kind == "ncsn++" else (1, 1)

        def block(c_in: int, c_out: int, resample: str = "", attention: bool = False) -> Block:
            return Block(kind, c_in, c_out, features, resample, taps, attention, dropout)

        self.map_noise = Fourier(sinusoids) if kind == "ncsn++" else Sinusoids(sinusoids, endpoint=kind == "ddpm++")
        self.map_layer0 = nn.Linear(sinusoids, features)
        self.map_layer1 = nn.Linear(features, features)
        names = [f"{resolution >> level}x{resolution >> level}" for level in range(levels)]
        width, aux, skips = stem, channels, [stem]
        self.enc = nn.ModuleDict({f"{names[0]}_conv": Conv(channels, stem, 3)})
        for level, name in enumerate(names):
            if level:
                self.enc[f"{name}_down"] = block(width, width, "down")
                skips.append(width)
                if kind == "ncsn++":  # the image itself, at this resolution, is added in
                    self.enc[f"{name}_aux_residual"] = Conv(aux, width, 3, "down", taps, fused=True)
                    aux = width
            for i in range(blocks):
                self.enc[f"{name}_block{i}"] = block(width, widths[level], attention=level in attention)
                width = widths[level]
                skips.append(width)
        self.dec = nn.ModuleDict()
        for level, name in reversed(list(enumerate(names))):
            if level == levels - 1:
                self.dec[f"{name}_in0"] = block(width, width, attention=True)
                self.dec[f"{name}_in1"] = block(width, width)
            else:
                self.dec[f"{name}_up"] = block(width, width, "up")
            for i in range(blocks + 1):
                attend = level in attention and (kind == "adm" or i == blocks)
                self.dec[f"{name}_block{i}"] = block(width + skips.pop(), widths[level], attention=attend)
                width = widths[level]
        if kind == "adm":
            self.out_norm, self.out_conv = nn.GroupNorm(GROUPS, width), Conv(width, channels, 3)
        else:
            self.dec[f"{names[0]}_aux_norm"] = nn.GroupNorm(GROUPS, width, 1e-6)
            self.dec[f"{names[0]}_aux_conv"] = Conv(width, channels, 3)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Raw network output.

        Args:
            x: scaled noisy images ``(B, C, H, W)``, of about unit variance.
            noise: conditioning number of each image ``(B,)``, the preconditioning's ``c_noise``.

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
        cosines, sines = self.map_noise(noise).chunk(2, dim=1)
        waves = torch.cat([cosines, sines] if self.kind == "adm" else [sines, cosines], dim=1).to(x.dtype)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(waves))))
        skips: list[Tensor] = []
        aux = h
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                h = aux = (h + layer(aux)) / math.sqrt(2)
                skips[-1] = h
            else:
                h = layer(h, embedding) if isinstance(layer, Block) else layer(h)
                skips.append(h)
        for name, layer in self.dec.items():
            if isinstance(layer, Block):
                h = layer(torch.cat([h, skips.pop()], 1) if "_block" in name else h, embedding)
            else:
                h = layer(F.silu(h) if name.endswith("_aux_conv") else h)
        if self.kind == "adm":
            h = self.out_conv(F.silu(self.out_norm(h)))
        return h[..., :height, :width]


class Block(nn.Module):
    """Residual block, which may change the resolution, then attention if asked for."""

    def __init__(
        self,
        kind: str,
        c_in: int,
        c_out: int,
        features: int,
        resample: str,
        taps: Sequence[int],
        attention: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        adm = kind == "adm"
        eps = 1e-5 if adm else 1e-6
        self.scale_shift, self.scale = adm, 1.0 if adm else math.sqrt(0.5)
        self.norm0 = nn.GroupNorm(GROUPS, c_in, eps)
        self.conv0 = Conv(c_in, c_out, 3, resample, taps)
        self.affine = nn.Linear(features, 2 * c_out if adm else c_out)
        self.norm1 = nn.GroupNorm(GROUPS, c_out, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv(c_out, c_out, 3)
        self.skip: nn.Module = nn.Identity()
        if c_in != c_out or resample:
            self.skip = Conv(c_in, c_out, 1 if c_in != c_out or not adm else 0, resample, taps)
        self.heads = (c_out // 64 if adm else 1) if attention else 0
        if attention:
            self.norm2 = nn.GroupNorm(GROUPS, c_out, eps)
            self.qkv = Conv(c_out, 3 * c_out, 1)
            self.proj = Conv(c_out, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B, c_in, H, W), ``embedding`` (B, features) → (B, c_out, H', W')."""
        h = self.conv0(F.silu(self.norm0(x)))
        condition = self.affine(embedding)[..., None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + condition)
        out: Tensor = self.scale * (self.conv1(self.dropout(F.silu(h))) + self.skip(x))
        if self.heads:
            q, k, v = rearrange(
                self.qkv(self.norm2(out)), "b (n c three) h w -> three b n (h w) c", three=3, n=self.heads
            )
            a = rearrange(F.scaled_dot_product_attention(q, k, v), "b n (h w) c -> b (n c) h w", h=out.shape[-2])
            out = self.scale * (self.proj(a) + out)
        return out


class Conv(nn.Module):
    """A convolution after (``fused``: before) a change of resolution by a separable filter; ``kernel = 0`` is that change alone."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        resample: str = "",
        taps: Sequence[int] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.resample, self.fused = resample, fused
        self.weight = self.bias = None
        if kernel:
            layer = nn.Conv2d(c_in, c_out, kernel)  # for its initialisation
            self.weight, self.bias = layer.weight, layer.bias
        if resample:
            row = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (row.outer(row) / row.sum() ** 2)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, c_in, H, W) → (B, c_out, H', W')."""
        if self.fused and self.weight is not None:  # padded for both at once
            padding = self.weight.shape[-1] // 2 + self._filter_padding()
            x = F.conv2d(x, self.weight, padding=padding)
            x = F.conv2d(x, self._filter(x), stride=2, groups=x.shape[1])
            return x if self.bias is None else x + self.bias[:, None, None]
        if self.resample == "down":
            x = F.conv2d(x, self._filter(x), stride=2, padding=self._filter_padding(), groups=x.shape[1])
        elif self.resample == "up":
            f = 4 * self._filter(x)
            x = F.conv_transpose2d(x, f, stride=2, padding=self._filter_padding(), groups=x.shape[1])
        if self.weight is not None:
            x = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        return x

    def _filter(self, x: Tensor) -> Tensor:
        """The filter for each channel of ``x``."""
        kernel: Tensor = self.get_buffer("resample_filter")
        return kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)

    def _filter_padding(self) -> int:
        return (self.get_buffer("resample_filter").shape[-1] - 1) // 2


class Sinusoids(nn.Module):
    """Cosines and sines of a number, frequencies from 1 down to 1/10000, that one included if ``endpoint``."""

    def __init__(self, dim: int, endpoint: bool) -> None:
        super().__init__()
        self.frequencies, self.last = dim // 2, dim // 2 - int(endpoint)

    def forward(self, t: Tensor) -> Tensor:
        """``t`` (B,) → (B, dim)."""
        exponent = torch.arange(self.frequencies, dtype=t.dtype, device=t.device) / self.last
        angles = t[:, None] * torch.exp(-math.log(10_000) * exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class Fourier(nn.Module):
    """Cosines and sines of a number at random frequencies (Tancik et al. 2020), of standard deviation 16."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        """``t`` (B,) → (B, dim)."""
        angles = t[:, None] * (2 * math.pi * self.get_buffer("freqs")).to(t.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
