"""Simulated pairs of truth and measurement, on which a configuration of the sampler is checked."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.randomness import derive_seed
from dpnp_shared.solvers import sample_unconditional

TRUTH, MEASUREMENT, CHAINS, RANKS = range(4)  # what a pair's seed is for


@runtime_checkable
class ExactPrior(Protocol):
    """A prior that draws from itself exactly, as analytic ones do."""

    def sample(self, n: int, *, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw ``(n, C, H, W)``."""
        ...


def pair_seed(seed: int, pair: int, purpose: int) -> int:
    """The seed of one pair for one of ``TRUTH``, ``MEASUREMENT``, ``CHAINS`` and ``RANKS``.

    Args:
        seed: the user's.
        pair: number of the pair.
        purpose: what it is for.
    """
    return derive_seed(seed, pair, purpose)


@torch.no_grad()
def simulate_pair(
    prior: Denoiser,
    forward_model: ForwardModel,
    *,
    seed: int,
    pair: int,
    calls: int = 40,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A truth from the prior, and a measurement of it.

    An analytic prior is drawn from exactly, a trained one by its probability flow.

    Args:
        prior: gives the truth.
        forward_model: gives the measurement.
        seed: the user's, not negative.
        pair: number of the pair; the result depends on ``(seed, pair)`` only.
        calls: network calls of the probability flow.
        dtype: of the images.
        device: where prior and forward model are.

    Returns:
        ``x`` ``(C, H, W)`` and ``y`` ``(*y_shape)``.
    """
    generator = torch.Generator().manual_seed(pair_seed(seed, pair, TRUTH))
    if isinstance(prior, ExactPrior):
        x = prior.sample(1, generator=generator, dtype=dtype).to(device)
    else:
        x = sample_unconditional(prior, 1, generator=generator, steps=calls, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(pair_seed(seed, pair, MEASUREMENT))
    return x[0], forward_model.simulate(x, generator=generator)[0]
