"""Options of a training that change its speed and not its result: compilation, memory format, fused optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from dpnp_shared.acceleration import compile_options


def compile_network(network: nn.Module, how: bool | str, parts: Sequence[nn.Module] = ()) -> None:
    """Let ``torch.compile`` take the calls of a network, in place: names and values of its weights stay as they are.

    Nothing is compiled before the first call.

    Args:
        network: whose calls are compiled.
        how: ``True`` for the default backend, one of its modes, or another backend of ``torch.compiler.list_backends()``.
        parts: compile these instead, each by itself and for its shapes alone; shards have to be gathered between them.
    """
    if how is False:
        return
    options = compile_options(how)
    if not parts:
        network.compile(**options)
        return
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the name before torch 2.6
    # it counts all parts of one class together, and what exceeds it is not compiled
    setattr(config, limit, max(getattr(config, limit), 4 * len(parts)))
    for part in parts:
        part.compile(dynamic=False, **options)


def contiguous(x: Any) -> Any:
    """Tensors, or collections of them, as they are written to a checkpoint, whatever their memory format was."""
    return apply_to_collection(x, Tensor, Tensor.contiguous)


def align(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's loaded state the memory format of its parameters: fused kernels go through both in the order of the memory."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def make_adamw(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    fused: bool | Literal["auto"],
    device: torch.device,
) -> torch.optim.AdamW:
    """AdamW, fused or not.

    Args:
        parameters: to be trained.
        learning_rate: the first.
        weight_decay: its coefficient.
        fused: whether a step is one kernel; ``auto`` does so on CUDA devices.
        device: that of the parameters.
    """
    one_kernel = device.type == "cuda" if fused == "auto" else fused
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=one_kernel)
    # a fused optimiser offers to undo float16's loss scaling itself, amid its step; that would be too late for the clipping
    optimizer._step_supports_amp_scaling = False
    return optimizer
