"""Ways to run a network faster with the same result up to rounding, which training and inference have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def check_compile(how: bool | str) -> None:
    """Check an option ``compile``.

    Raises:
        ValueError: ``how`` is neither a switch, a mode nor a backend.
    """
    if isinstance(how, bool) or how in MODES:
        return
    if how not in torch.compiler.list_backends(exclude_tags=()):  # those for debugging are not recommended, but allowed
        raise ValueError(
            f"compile = {how!r}; allowed are true, false, a mode ({', '.join(MODES)}) or a backend "
            f"({', '.join(torch.compiler.list_backends())})"
        )


def compile_options(how: bool | str) -> dict[str, Any]:
    """Arguments of ``torch.compile`` for an option ``compile`` that is not ``False``: ``True``, a mode or a backend."""
    return {} if how is True else {"mode" if how in MODES else "backend": how}


def use_channels_last(network: nn.Module) -> None:
    """Keep a network's weights, its input and so its activations with the channels innermost (``torch.channels_last``), in place.

    Copies of the network do the same. Loading weights of either format leaves this one.
    """
    network.to(memory_format=torch.channels_last)
    network.register_forward_pre_hook(_channels_last_input)


def _channels_last_input(network: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = arguments
    return (x.contiguous(memory_format=torch.channels_last), *others) if isinstance(x, Tensor) else arguments
