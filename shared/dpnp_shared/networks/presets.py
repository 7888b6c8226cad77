"""Networks by size, and what a network costs: parameters, arithmetic and memory, without running it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from dpnp_shared.networks.dit import DiT, Layer
from dpnp_shared.networks.unet import Block, UNet

BYTES_PER_PARAMETER = 20  # float32: weights 4, gradients 4, Adam's two moments 8, moving average 4

_ADM: dict[str, Any] = {"resample": "residual", "head_channels": 64}
_DDPMPP: dict[str, Any] = {**_ADM, "scale_residual": True}

#: Class and arguments of each preset, by name; the number is that of its parameters.
PRESETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "unet-0.3m": (UNet, {"widths": [16, 28, 36], "blocks": [1, 1, 1], "attention": [2], "head_channels": 36, "embedding": 64}),
    "unet-1m": (UNet, {"widths": [24, 40, 56], "blocks": [1, 2, 2], "attention": [2], "head_channels": 28, "embedding": 64}),
    "unet-10m": (UNet, {"widths": [48, 96, 192], "blocks": 2, "attention": [2], "head_channels": 32, "embedding": 192}),
    # after DDPM++ of Song et al. 2021 and EDM at 32 x 32 and 64 x 64
    "unet-60m": (UNet, {"widths": [128, 256, 256, 256], "blocks": 3, "attention": [2, 3], "embedding": 512, **_DDPMPP}),
    # after ADM of Dhariwal & Nichol 2021 at 64 x 64
    "unet-280m": (UNet, {"widths": [192, 384, 576, 768], "blocks": 3, "attention": [2, 3], "embedding": 768, **_ADM}),
    # after ADM at 256 x 256
    "unet-500m": (
        UNet,
        {"widths": [256, 256, 512, 512, 960, 960], "blocks": 2, "attention": [4, 5], "embedding": 1024, **_ADM},
    ),
    "dit-0.3m": (DiT, {"width": 64, "depth": 4, "patch": 2, "head_channels": 32, "embedding": 64}),
    "dit-1m": (DiT, {"width": 96, "depth": 6, "patch": 2, "head_channels": 32, "embedding": 96}),
    "dit-10m": (DiT, {"width": 256, "depth": 8, "patch": 2}),
    # S, B and L of Peebles & Xie 2023
    "dit-33m": (DiT, {"width": 384, "depth": 12, "patch": 4}),
    "dit-130m": (DiT, {"width": 768, "depth": 12, "patch": 4}),
    "dit-280m": (DiT, {"width": 896, "depth": 19, "patch": 4}),
    "dit-460m": (DiT, {"width": 1024, "depth": 24, "patch": 4}),
}  # fmt: skip


def preset(
    name: str,
    channels: int = 1,
    dropout: float = 0.0,
    augmentation: int = 0,
    checkpoint_activations: bool = False,
) -> nn.Module:
    """A network of a given size.

    In a training config it stands where a class would: ``class_path: dpnp_shared.networks.presets.preset``.

    Args:
        name: one of :data:`PRESETS`, for example ``unet-10m``.
        channels: image channels C.
        dropout: dropout probability.
        augmentation: length of the augmentation vector, 0 for none.
        checkpoint_activations: recompute activations in the backward pass instead of storing them.

    Returns:
        A new :class:`~dpnp_shared.networks.UNet` or :class:`~dpnp_shared.networks.DiT`.

    Raises:
        ValueError: an unknown name, or an argument that the network refuses.
    """
    if name not in PRESETS:
        raise ValueError(f"name = {name!r}; allowed are {', '.join(PRESETS)}")
    network, arguments = PRESETS[name]
    return network(
        channels,
        **arguments,
        dropout=dropout,
        augmentation=augmentation,
        checkpoint_activations=checkpoint_activations,
    )


class Cost(NamedTuple):
    """What one image costs.

    Attributes:
        parameters: trained numbers.
        flops: floating-point operations of one forward call, a multiply-add counted as two; the backward pass takes twice as many.
        activations: bytes stored for the backward pass, in float32.
        recomputed: the same with ``checkpoint_activations``: each block's input, and all of the largest block.
    """

    parameters: int
    flops: int
    activations: int
    recomputed: int


def measure(network: Callable[[], nn.Module], image_shape: tuple[int, int, int]) -> Cost:
    """Count what a network costs on shapes alone (the meta device): nothing is allocated and nothing computed.

    Attention is counted as fused kernels store it: queries, keys, values and the result, not the matrix between pixels. What the
    allocator, cuDNN's workspaces and the optimiser's step need on top is not counted.

    Args:
        network: makes the network.
        image_shape: ``(C, H, W)`` of an image.

    Returns:
        The cost of a batch of one.

    Raises:
        ValueError: ``image_shape`` is not three positive numbers, or its channels are not the network's.
    """
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape = {tuple(image_shape)}; three positive numbers (C, H, W) are needed")
    with torch.device("meta"):
        module, x, noise = network(), torch.empty(1, *image_shape), torch.empty(1)
    stored = _Stored(module)
    with FlopCounterMode(display=False) as flops, stored, torch.autograd.graph.saved_tensors_hooks(stored.keep, _same):
        module(x, noise)
    outside = sum(stored.outside.values())
    inside = [sum(block.values()) for block in stored.blocks]
    return Cost(
        parameters=sum(p.numel() for p in module.parameters()),
        flops=flops.get_total_flops(),
        activations=outside + sum(inside),
        recomputed=outside + sum(stored.inputs.values()) + max(inside, default=0),
    )


class _Stored(TorchFunctionMode):
    """Bytes of the tensors kept for the backward pass, by storage: outside of the blocks, in each of them, and the blocks' inputs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.outside: dict[int, int] = {_key(p): 0 for p in module.parameters()}  # parameters are counted elsewhere
        self.inputs: dict[int, int] = {}
        self.blocks: list[dict[int, int]] = []
        self.inside = False
        self.alive: list[Tensor] = []  # so that no two tensors share an address
        for block in module.modules():
            if isinstance(block, (Block, Layer)):
                block.register_forward_pre_hook(self._enter)
                block.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.inside = True
        self.blocks.append({})
        if _key(inputs[0]) not in self.outside:
            self.inputs[_key(inputs[0])] = inputs[0].untyped_storage().nbytes()

    def _leave(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inside = False

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor unless its storage was counted before."""
        self.alive.append(tensor)
        key = _key(tensor)
        if key not in self.outside and not any(key in block for block in self.blocks):
            (self.blocks[-1] if self.inside else self.outside)[key] = tensor.untyped_storage().nbytes()
        return tensor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Attention by hand, all else as it is."""
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autograd.graph.saved_tensors_hooks(_same, _same):
            out = func(*args, **(kwargs or {}))
        for tensor in (*args[:3], out):
            self.keep(tensor)
        return out


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _key(tensor: Tensor) -> int:
    """The address of the storage's description; storages on the meta device have no address of their own."""
    return int(tensor.untyped_storage()._cdata)


def table(image_shape: tuple[int, int, int], names: Sequence[str] | None = None) -> str:
    """The presets' costs as a Markdown table.

    Args:
        image_shape: ``(C, H, W)``.
        names: presets to list; all by default.

    Returns:
        A header and one line a preset.

    Raises:
        ValueError: an unknown name or a shape that no image has.
    """
    c, h, w = image_shape
    rows = [
        f"| {c} x {h} x {w} | parameters | GFLOPs a call | weights, gradients, Adam, average | activations an image | with recomputation |",
        "|---|---|---|---|---|---|",
    ]
    for name in PRESETS if names is None else names:
        cost = measure(functools.partial(preset, name, c), image_shape)
        rows.append(
            f"| {name} | {cost.parameters / 1e6:.2f} M | {cost.flops / 1e9:.3g} | {_size(BYTES_PER_PARAMETER * cost.parameters)} "
            f"| {_size(cost.activations)} | {_size(cost.recomputed)} |"
        )
    return "\n".join(rows)


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def presets(image_shape: tuple[int, int, int] = (1, 28, 28), names: list[str] | None = None) -> None:
    """Print what each preset network costs for images of a shape: parameters, FLOPs and training memory in float32.

    Args:
        image_shape: ``[C, H, W]``.
        names: presets to list; all by default.
    """
    print(table(image_shape, names))
