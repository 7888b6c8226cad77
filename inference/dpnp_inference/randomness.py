"""One generator a chain, so that a chain's draw does not depend on which others share its batch."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from dpnp_shared.randomness import derive_seed


class ChainGenerators:
    """Random numbers for a batch of chains, each from its own stream seeded by ``(seed, chain index)``.

    Numbers are drawn on the CPU and then moved, so that they are the same on every device.

    Args:
        seed: the user's seed, not negative.
        chains: index of each chain of the batch, in batch order.
    """

    def __init__(self, seed: int, chains: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(derive_seed(seed, chain)) for chain in chains]

    def __len__(self) -> int:
        return len(self.generators)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise shaped like ``x`` ``(B, …)``, row i from chain i; complex noise is standard in each part.

        Raises:
            ValueError: the batch of ``x`` is not that of the generators.
        """
        if x.shape[0] != len(self):
            raise ValueError(f"x holds {x.shape[0]} chains, there are {len(self)} generators")
        noise = torch.empty(x.shape, dtype=x.dtype)
        for row, generator in zip(noise, self.generators, strict=True):
            torch.randn(row.shape, generator=generator, dtype=x.dtype, out=row)
        if x.is_complex():
            noise *= math.sqrt(2)  # PyTorch's complex normal has variance 1/2 in each part
        return noise.to(x.device)

    def uniform(self, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One uniform number in [0, 1) a chain, ``(B,)``."""
        return torch.cat([torch.rand(1, generator=g, dtype=dtype) for g in self.generators]).to(device)
