r"""A Fourier neural operator (Li et al. 2021, arXiv 2010.08895), a network between functions that may be used on any grid.

A layer multiplies the lowest modes of its features by learned matrices, :math:`(K h)_k = R_k h_k`, adds a map of each point on its own, and
bends the sum: :math:`h \leftarrow h + V\, \mathrm{GELU}(K h + W h + b)`. The noise level scales and shifts what is bent. Coefficients are
those of functions, not of pixels, so that the same weights work on every grid; two grids differ by what the bends put above the coarser
one's modes. Basis ``periodic`` takes waves (complex :math:`R_k`); ``neumann`` takes cosines (real :math:`R_k`), for functions whose normal
derivative vanishes at the boundary, which waves would wrap around.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from dpnp_shared.gaussian_field import Basis, check_basis, cosines, positions
from dpnp_shared.networks.unet import SinusoidalEmbedding


class FNO(nn.Module):
    """Fourier neural operator with an embedding of the noise level, for images as functions on the unit square.

    Args:
        channels: image channels C.
        width: features.
        modes: wave numbers below it, along each side, have weights of their own; what is above is seen point by point. On a grid that
            holds fewer, the rest is left unused.
        layers: how many.
        embedding: features of the noise level.
        basis: ``neumann`` or ``periodic``; see :mod:`dpnp_shared.gaussian_field`, also for where pixels are.

    Raises:
        ValueError: an argument out of range.
    """

    hyperparameters: dict[str, Any]

    def __init__(
        self,
        channels: int = 1,
        width: int = 32,
        modes: int = 12,
        layers: int = 4,
        embedding: int = 64,
        basis: Basis = "neumann",
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("width", width), ("modes", modes), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} = {value}; at least 1 is needed")
        if embedding < 4 or embedding % 2:
            raise ValueError(f"embedding = {embedding}; an even number of at least 4 is needed")
        check_basis(basis)
        self.hyperparameters = {
            "channels": channels,
            "width": width,
            "modes": modes,
            "layers": layers,
            "embedding": embedding,
            "basis": basis,
        }
        self.channels, self.basis = channels, basis
        self.embed = nn.Sequential(SinusoidalEmbedding(embedding), nn.Linear(embedding, embedding), nn.GELU())
        self.lift = nn.Conv2d(channels + (2 if basis == "neumann" else 4), width, 1)
        self.layers = nn.ModuleList(Layer(width, modes, embedding, basis) for _ in range(layers))
        self.project = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.Conv2d(width, channels, 1))
        nn.init.zeros_(self.project[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.project[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Map ``c_in x`` ``(B, C, H, W)`` and ``c_noise`` ``(B,)`` to ``(B, C, H, W)``."""
        where = self._places(x)
        h = self.lift(torch.cat([x, where.expand(len(x), -1, -1, -1)], dim=1))
        embedding = self.embed(noise.to(x.dtype))
        for layer in self.layers:
            h = layer(h, embedding)
        out: Tensor = self.project(h)
        return out

    def _places(self, x: Tensor) -> Tensor:
        """The lowest modes as features, by which the network knows where it is, ``(1, 2 or 4, H, W)``."""
        h, w = x.shape[2:]
        u, v = (positions(n, self.basis).to(x) for n in (h, w))
        waves = [torch.cos(math.pi * t) for t in (u, v)]
        if self.basis == "periodic":
            waves = [f(2 * math.pi * t) for f in (torch.cos, torch.sin) for t in (u, v)]
        return torch.stack([t[:, None].expand(h, w) if i % 2 == 0 else t.expand(h, w) for i, t in enumerate(waves)])[
            None
        ]


class Layer(nn.Module):
    """One layer; see the module."""

    def __init__(self, width: int, modes: int, embedding: int, basis: Basis) -> None:
        super().__init__()
        self.spectral: nn.Module = Cosines(width, modes) if basis == "neumann" else Waves(width, modes)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.modulate = nn.Linear(embedding, 2 * width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """``(B, width, H, W)`` to the same."""
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        mixed = (1 + scale) * (self.spectral(h) + self.pointwise(h)) + shift
        out: Tensor = h + self.out(F.gelu(mixed))
        return out


class Cosines(nn.Module):
    """``R_k`` real, on the lowest ``modes x modes`` cosines."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.weight = nn.Parameter(torch.randn(modes * modes, width, width) / math.sqrt(width))

    def forward(self, h: Tensor) -> Tensor:
        """``(B, width, H, W)`` to the same; the transforms are in single precision at least."""
        x = h.float() if h.dtype in (torch.float16, torch.bfloat16) else h
        rows, columns = (cosines(n, min(self.modes, n), x.dtype, x.device) for n in x.shape[2:])  # (m1, H), (m2, W)
        c = rows @ x @ columns.T  # a product of matrices is faster than a whole transform
        weight = self.weight.to(c).reshape(self.modes, self.modes, *self.weight.shape[1:])[: len(rows), : len(columns)]
        mixed = torch.einsum("bixy,xyio->boxy", c, weight)
        return (rows.T @ mixed @ columns).to(h.dtype)


class Waves(nn.Module):
    """``R_k`` complex, on waves of numbers ``-modes < k_1 < modes``, ``0 <= k_2 < modes`` (the others follow, functions being real)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        # real and imaginary parts side by side: no complex numbers in a prior's file
        self.weight = nn.Parameter(torch.randn((2 * modes - 1) * modes, width, 2 * width) / math.sqrt(2 * width))

    def forward(self, h: Tensor) -> Tensor:
        """``(B, width, H, W)`` to the same; the transforms are in single precision at least."""
        x = h.float() if h.dtype in (torch.float16, torch.bfloat16) else h
        c = torch.fft.rfft2(x, norm="forward")
        height, width = x.shape[2:]
        # a grid's highest wave is left out: it stands for two
        m1, m2 = min(self.modes, (height + 1) // 2), min(self.modes, (width + 1) // 2)
        weight = self.weight.to(x).reshape(2 * self.modes - 1, self.modes, *self.weight.shape[1:])
        numbers = torch.arange(1 - m1, m1, device=x.device)
        real, imaginary = weight[numbers + self.modes - 1, :m2].chunk(2, dim=-1)
        out = torch.zeros_like(c)
        kept = c[:, :, numbers % height, :m2]
        out[:, :, numbers % height, :m2] = torch.einsum("bixy,xyio->boxy", kept, torch.complex(real, imaginary))
        back: Tensor = torch.fft.irfft2(out, s=(height, width), norm="forward")
        return back.to(h.dtype)
