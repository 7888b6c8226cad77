"""One generator a chain, so that a chain's draw does not depend on which others share its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dpnp_shared.randomness import derive_seed

Draw = Callable[..., Tensor]
BLOCK = 4096
DRAWS: dict[str, Draw] = {"normal": torch.randn, "uniform": torch.rand}


class ChainGenerators:
    """Random numbers for a batch of chains, each from its own stream seeded by ``(seed, chain index)``.

    Numbers are drawn on the CPU and then moved, so that they are the same on every device. They are drawn in blocks, so that
    thousands of chains of small images cost little.

    Args:
        seed: the user's seed, not negative.
        chains: index of each chain of the batch, in batch order.
    """

    def __init__(self, seed: int, chains: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(derive_seed(seed, chain)) for chain in chains]
        self._blocks: dict[tuple[str, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.generators)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise shaped like ``x`` ``(B, …)``, row i from chain i; complex noise is standard in each part.

        Raises:
            ValueError: the batch of ``x`` is not that of the generators.
        """
        if x.shape[0] != len(self):
            raise ValueError(f"x holds {x.shape[0]} chains, there are {len(self)} generators")
        noise = self._take("normal", x[0].numel(), x.dtype).reshape(x.shape)
        if x.is_complex():
            noise = noise * math.sqrt(2)  # PyTorch's complex normal has variance 1/2 in each part
        return noise.to(x.device)

    def uniform(self, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """One uniform number in [0, 1) a chain, ``(B,)``."""
        return self._take("uniform", 1, dtype).flatten().to(device)

    def uniform_like(self, x: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) shaped like ``x`` ``(B, …)``, row i from chain i."""
        return self._take("uniform", x[0].numel(), x.dtype).reshape(x.shape).to(x.device)

    def spawn(self) -> ChainGenerators:
        """New streams, each seeded by one number of its chain's own.

        However many numbers are taken from them, this object's streams go on the same: what one chain needs does not depend on
        how long the others take.
        """
        child = ChainGenerators(0, ())
        seeds = self._take("uniform", 1, torch.float64).flatten() * 2**53
        child.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        return child

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are: each generator's state ``(B, bytes)``, and the numbers that were drawn ahead."""
        blocks = {f"{kind}/{str(dtype).removeprefix('torch.')}": block for (kind, dtype), block in self._blocks.items()}
        return {"generators": torch.stack([g.get_state() for g in self.generators]), "blocks": blocks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called.

        Args:
            state: of as many streams.
        """
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.set_state(value.clone())
        self._blocks = {}
        for name, block in state["blocks"].items():
            kind, _, dtype = name.partition("/")
            self._blocks[kind, getattr(torch, dtype)] = block

    def _take(self, kind: str, n: int, dtype: torch.dtype) -> Tensor:
        """The next ``n`` numbers of each chain, ``(B, n)``."""
        block = self._blocks.get((kind, dtype))
        if block is None or block.shape[1] < n:
            block = torch.stack([DRAWS[kind](max(n, BLOCK), generator=g, dtype=dtype) for g in self.generators])
        taken, self._blocks[kind, dtype] = block[:, :n], block[:, n:]
        return taken
