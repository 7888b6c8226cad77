"""Samples of the averaged network, and tensors of all ranks in one."""

from __future__ import annotations

import lightning as L  # noqa: N812 - Lightning's own convention
import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from dpnp_shared.randomness import derive_seed
from dpnp_shared.solvers import sample_unconditional
from dpnp_training.module import ScoreMatching

BATCH = 250


def draw_share(trainer: L.Trainer, module: ScoreMatching, n: int, *, calls: int, seed: int) -> Tensor:
    """This rank's share of ``n`` samples of the averaged network.

    All ranks together draw the same samples, however many ranks there are.

    Args:
        trainer: whose ranks.
        module: whose average.
        n: samples over all ranks.
        calls: network calls a sample.
        seed: of the initial noise.

    Returns:
        ``(share, C, H, W)`` in the prior's value range, on the module's device; the share may be empty.
    """
    prior = module.to_prior()
    sizes = [min(BATCH, n - start) for start in range(0, n, BATCH)]
    drawn = [
        sample_unconditional(
            prior,
            sizes[batch],
            generator=torch.Generator().manual_seed(derive_seed(seed, batch)),
            steps=calls,
            device=module.device,
        )
        for batch in range(trainer.global_rank, len(sizes), trainer.world_size)
    ]
    return torch.cat([torch.zeros(0, *prior.image_shape, device=module.device), *drawn])


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, rank by rank; the numbers of rows may differ."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    return torch.cat(gather_all_tensors(x))
