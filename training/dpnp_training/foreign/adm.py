"""U-Nets of guided-diffusion ("ADM", Dhariwal & Nichol 2021) and improved-diffusion (Nichol & Dhariwal 2021).

Their files hold the state dict alone. Its keys and shapes tell the architecture but for the attention heads and the noise schedule,
which the user must know: they are the options of the script that trained the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpnp_shared.networks.adm import ADMUNet
from dpnp_shared.preconditioning import DiscreteVP, VPEpsilon
from dpnp_shared.prior import PriorError
from dpnp_training.foreign.weights import Converted, file_hash, fill, read_weights, shape_of


@dataclass
class ADMOptions:
    """What a guided-diffusion file does not say. Exactly one of ``head_channels`` and ``heads`` is needed.

    Attributes:
        head_channels: channels of an attention head (``--num_head_channels``; 64 in all published 256 x 256 networks).
        heads: attention heads (``--num_heads``, where ``--num_head_channels`` was not given).
        new_attention_order: ``--use_new_attention_order``.
        schedule: ``--noise_schedule``.
        steps: ``--diffusion_steps``.
        rescale_timesteps: ``--rescale_timesteps``.
        entry: key of the state dict in a checkpoint that holds several things.
        prefix: what each key of the state dict begins with.
    """

    head_channels: int | None = None
    heads: int | None = None
    new_attention_order: bool = False
    schedule: Literal["linear", "cosine"] = "linear"
    steps: int = 1000
    rescale_timesteps: bool = False
    entry: str | None = None
    prefix: str = ""


def convert(source: str | Path, options: ADMOptions | None) -> Converted:
    """Read a guided-diffusion file.

    Args:
        source: ``.pt`` or ``.safetensors`` file of the (averaged) weights.
        options: what it does not say.

    Raises:
        PriorError: the file is damaged, or its network is class-conditional or not a guided-diffusion U-Net.
        ValueError: an option is missing or does not fit the network.
    """
    options = options if options is not None else ADMOptions()
    if (options.head_channels is None) == (options.heads is None):
        raise ValueError(
            f"head_channels = {options.head_channels}, heads = {options.heads}: the file does not tell the attention heads, "
            "give exactly one of them (num_head_channels or num_heads of the training script)"
        )
    if options.steps < 2:
        raise ValueError(f"steps = {options.steps}; at least 2 are needed")
    file = Path(source)
    weights = read_weights(file, options.entry, options.prefix)
    arguments = architecture(weights, file)
    with torch.device("meta"):
        network = ADMUNet(
            **arguments,
            heads=options.heads if options.heads is not None else 1,
            head_channels=options.head_channels,
            new_attention_order=options.new_attention_order,
            time_scale=1000 / options.steps if options.rescale_timesteps else 1.0,
        )
    fill(network, weights, file)
    return Converted(network, VPEpsilon(schedule(options)), (network.channels, 0, 0), {
        "imported from": "guided-diffusion (ADM)",
        "file": file.name,
        "SHA-256 of the file": file_hash(file),
    })  # fmt: skip


def schedule(options: ADMOptions) -> DiscreteVP:
    """The table of β's; the linear one is stretched to ``steps``, so that it ends at the same noise level."""
    stretch = 1000 / options.steps
    return DiscreteVP(options.steps, 1e-4 * stretch, 0.02 * stretch, options.schedule)


def architecture(weights: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Arguments of :class:`ADMUNet` that keys and shapes tell.

    Each resolution level has ``blocks + 1`` stages on either side. The first stage on the way up that changes the resolution is the last
    of its level, and is known by a second residual block or a convolution at its end.

    Raises:
        PriorError: a key is missing, or the network takes class labels.
    """

    def shape(key: str, axes: int) -> torch.Size:
        return shape_of(weights, key, axes, file)

    if any(key.startswith("label_emb.") for key in weights):
        raise PriorError(f"{file} has the key label_emb.weight: a class-conditional network; a prior is unconditional")
    stages = 0
    while f"output_blocks.{stages}.0.in_layers.0.weight" in weights:
        stages += 1

    def upsampling(stage: int) -> str | None:
        """``conv`` or ``block`` if the stage ends with an up-sampling, None if not."""
        if any(f"output_blocks.{stage}.{i}.conv.weight" in weights for i in (1, 2)):
            return "conv"
        return "block" if any(f"output_blocks.{stage}.{i}.in_layers.0.weight" in weights for i in (1, 2)) else None

    first = next((stage for stage in range(stages) if upsampling(stage)), stages - 1)
    blocks = first
    if blocks < 1 or stages % (blocks + 1):
        raise PriorError(f"{file} is not a guided-diffusion U-Net: it has {stages} complete output_blocks")
    starts = [1 + level * (blocks + 1) for level in range(stages // (blocks + 1))]  # of the levels, in input_blocks
    widths = [shape(f"input_blocks.{start}.0.out_layers.3.weight", 4)[0] for start in starts]
    channels = shape("input_blocks.0.0.weight", 4)[1]
    outputs = shape("out.2.weight", 4)[0]
    if outputs not in (channels, 2 * channels):
        raise PriorError(
            f"{file}: out.2.weight gives {outputs} channels for an image of {channels}; allowed are {channels} (noise) "
            f"and {2 * channels} (noise and learned variance)"
        )
    return {
        "channels": channels,
        "widths": widths,
        "blocks": blocks,
        "attention": [level for level, start in enumerate(starts) if f"input_blocks.{start}.1.qkv.weight" in weights],
        "embedding": shape("time_embed.0.weight", 2)[1],
        "resample_blocks": upsampling(first) == "block",
        "scale_shift": shape("middle_block.0.emb_layers.1.weight", 2)[0] == 2 * widths[-1],
        "learned_variance": outputs == 2 * channels,
    }
