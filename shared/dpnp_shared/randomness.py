"""Explicit randomness: seeds that are derived, never drawn from global state."""

from __future__ import annotations

import numpy as np


def derive_seed(*numbers: int) -> int:
    """One 63-bit seed from several non-negative integers, well mixed and the same on every machine.

    Args:
        numbers: for example a user's seed and a chain's index.

    Returns:
        A seed for :meth:`torch.Generator.manual_seed`.

    Raises:
        ValueError: a number is negative.
    """
    if any(number < 0 for number in numbers):
        raise ValueError(f"seeds must not be negative, got {numbers}")
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
