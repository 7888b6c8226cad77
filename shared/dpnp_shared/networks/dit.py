"""The diffusion transformer (DiT) of Peebles & Xie 2023 (arXiv 2212.09748), for images of any shape."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpnp_shared.networks.unet import SinusoidalEmbedding, augmented


class DiT(nn.Module):
    """Transformer over image patches whose layers are modulated by the noise level (adaLN-Zero, section 3.2).

    Positions are computed from the grid of patches at hand, so that height and width may differ from those of training; an image
    that the patches do not divide is padded by replication on its right and lower side, and the output is cropped to its size.

    Args:
        channels: image channels C, any number.
        width: features of a token.
        depth: number of transformer blocks.
        patch: side of a patch in pixels.
        head_channels: features of one attention head.
        mlp_ratio: hidden features of the feed-forward layers, as a multiple of ``width``.
        embedding: features of the sinusoidal embedding of the noise level.
        dropout: dropout probability at the end of each residual branch.
        positions: ``sincos``, sines and cosines of row and column added to the tokens (section 3.2), or ``rotary``, queries and
            keys rotated by them, so that attention sees differences of positions only (Su et al. 2021, arXiv 2104.09864).
        augmentation: length of the augmentation vector that :meth:`forward` may be given, 0 for none.
        checkpoint_activations: recompute the blocks' activations in the backward pass instead of storing them; same result, less
            memory, about a third more time. Not part of ``hyperparameters``: it is no property of the weights.

    Raises:
        ValueError: an argument out of range.
    """

    hyperparameters: dict[str, Any]

    def __init__(
        self,
        channels: int = 1,
        width: int = 384,
        depth: int = 12,
        patch: int = 2,
        head_channels: int = 64,
        mlp_ratio: float = 4.0,
        embedding: int = 256,
        dropout: float = 0.0,
        positions: Literal["sincos", "rotary"] = "sincos",
        augmentation: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1 or depth < 1 or patch < 1:
            raise ValueError(f"channels = {channels}, depth = {depth}, patch = {patch}; each must be at least 1")
        if width < 4 or width % 4:
            raise ValueError(f"width = {width}; a multiple of 4 is needed")
        if head_channels < 4 or head_channels % 4 or width % head_channels:
            raise ValueError(f"head_channels = {head_channels}; a multiple of 4 that divides width = {width} is needed")
        if not mlp_ratio * width >= 1:
            raise ValueError(f"mlp_ratio = {mlp_ratio}; it must be positive and leave at least one feature")
        if embedding < 4 or embedding % 2:
            raise ValueError(f"embedding = {embedding}; an even number of at least 4 is needed")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout = {dropout}; it must be in [0, 1)")
        if positions not in ("sincos", "rotary"):
            raise ValueError(f"positions = {positions!r}; allowed are 'sincos' and 'rotary'")
        if augmentation < 0:
            raise ValueError(f"augmentation = {augmentation}; it must be at least 0")
        self.hyperparameters = {
            "channels": channels,
            "width": width,
            "depth": depth,
            "patch": patch,
            "head_channels": head_channels,
            "mlp_ratio": mlp_ratio,
            "embedding": embedding,
            "dropout": dropout,
            "positions": positions,
            "augmentation": augmentation,
        }
        self.channels, self.width, self.patch = channels, width, patch
        self.head_channels, self.positions = head_channels, positions
        self.checkpoint_activations = checkpoint_activations
        self.sinusoids = SinusoidalEmbedding(embedding)
        self.augment = nn.Linear(augmentation, embedding, bias=False) if augmentation else None
        self.embed = nn.Sequential(nn.Linear(embedding, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = nn.Conv2d(channels, width, patch, stride=patch)
        self.blocks = nn.ModuleList(
            Layer(width, head_channels, round(mlp_ratio * width), dropout) for _ in range(depth)
        )
        self.condition = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch**2 * channels)
        self._initialise()

    def _initialise(self) -> None:
        """As the paper: Xavier for linear layers, every block the identity and the output zero at the start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.stem.weight.view(self.width, -1))
        nn.init.zeros_(self.stem.bias)  # type: ignore[arg-type]
        for module in self.embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in (self, *self.blocks):
            nn.init.zeros_(module.condition.weight)
        nn.init.zeros_(self.head.weight)

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
        bottom, right = -height % self.patch, -width % self.patch
        h = F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x
        condition = F.silu(self.embed(augmented(self.sinusoids(noise).to(x.dtype), augmentation, self.augment)))
        h = self.stem(h)
        rows, columns = h.shape[-2:]
        h = rearrange(h, "b c h w -> b (h w) c")
        rotation = None
        if self.positions == "sincos":
            angles = grid_angles(rows, columns, self.width, x.device)
            h = h + torch.cat([angles.sin(), angles.cos()], 1).to(h.dtype)
        else:
            angles = grid_angles(rows, columns, self.head_channels, x.device, max_period=100.0)
            rotation = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                h = checkpoint(block, h, condition, rotation, use_reentrant=False)
            else:
                h = block(h, condition, rotation)
        shift, scale = self.condition(condition)[:, None].chunk(2, dim=-1)
        h = self.head(normalised(h) * (1 + scale) + shift)
        p = self.patch
        out: Tensor = rearrange(h, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)
        return out[..., :height, :width]


class Layer(nn.Module):
    """Attention and feed-forward layer, each scaled, shifted and gated by the condition (adaLN-Zero, figure 3)."""

    def __init__(self, width: int, head_channels: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = width // head_channels
        self.condition = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, condition: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """``x`` (B, N, width), ``condition`` (B, width), ``rotation`` two of (N, head_channels/2) → (B, N, width)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.condition(condition)[:, None].chunk(6, dim=-1)
        h = self.qkv(normalised(x) * (1 + scale_1) + shift_1)
        q, k, v = rearrange(h, "b n (three heads c) -> three b heads n c", three=3, heads=self.heads)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")
        x = x + gate_1 * self.dropout(self.out(h))
        out: Tensor = x + gate_2 * self.dropout(self.mlp(normalised(x) * (1 + scale_2) + shift_2))
        return out


def normalised(x: Tensor) -> Tensor:
    """Layer normalisation without weights of its own; scale and shift come from the condition."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def grid_angles(rows: int, columns: int, features: int, device: torch.device, max_period: float = 10_000.0) -> Tensor:
    """Angles of each cell of a grid, half of them of its row, half of its column, frequencies from 1 down to ``1/max_period``.

    Returns:
        ``(rows · columns, features / 2)`` in float32, cells row by row.
    """
    quarter = features // 4
    frequency = max_period ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    row = torch.arange(rows, device=device)[:, None, None] * frequency
    column = torch.arange(columns, device=device)[None, :, None] * frequency
    return torch.cat([row.expand(-1, columns, -1), column.expand(rows, -1, -1)], 2).flatten(0, 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of features, one of the first and one of the second half, turned by its angle: ``x`` (…, N, F) → (…, N, F)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
