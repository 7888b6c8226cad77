"""Networks of EDM's code (Karras et al. 2022): DDPM++, NCSN++ and ADM, in any of its preconditionings.

Its pickles hold the networks' source code, which loading them would run; they are not read. Where that code base is installed, a state
dict is made once by ``torch.save(pickle.load(open("network.pkl", "rb"))["ema"].state_dict(), "network.pt")``. The keys and shapes of
the state dict tell the whole architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpnp_shared.networks.edm_unet import EDMUNet
from dpnp_shared.preconditioning import EDM, VE, ContinuousVP, Preconditioning, VPEpsilon
from dpnp_shared.prior import PriorError
from dpnp_training.foreign.weights import Converted, file_hash, fill, read_weights, shape_of

AUGMENTATION = "map_augment.weight"  # of labels that are zero when the network is used, so it has no effect


@dataclass
class EDMOptions:
    """What an EDM state dict does not say.

    Attributes:
        preconditioning: ``edm``, ``vp`` or ``ve``: the class that wraps the network (``EDMPrecond``, ``VPPrecond``, ``VEPrecond``), which
            is EDM's for the files named ``edm-…`` and the architecture's own for those named ``baseline-…``.
        sigma_data: of EDM's preconditioning.
        entry: key of the state dict in a checkpoint that holds several things.
    """

    preconditioning: Literal["edm", "vp", "ve"]
    sigma_data: float = 0.5
    entry: str | None = None


def convert(source: str | Path, options: EDMOptions | None) -> Converted:
    """Read an EDM state dict.

    Args:
        source: ``.pt`` or ``.safetensors`` file of the (averaged) network's state dict, with or without ``model.`` before each key.
        options: what it does not say.

    Raises:
        PriorError: the file is damaged, or its network is class-conditional or not of EDM's code.
        ValueError: the options are missing or out of range.
    """
    if options is None:
        raise ValueError(
            "options are missing: the file does not tell the network's preconditioning; needed is edm, vp or ve"
        )
    preconditioning = _preconditioning(options)
    file = Path(source)
    if file.suffix == ".pkl":
        raise PriorError(
            f"{file} is a pickle with source code in it, which is not run. Where EDM's code is installed, write "
            "torch.save(pickle.load(open('network.pkl', 'rb'))['ema'].state_dict(), 'network.pt') and import that file"
        )
    weights = read_weights(file, options.entry)
    if all(key.startswith("model.") for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    arguments = architecture(weights, file)
    with torch.device("meta"):
        network = EDMUNet(**arguments)
    provenance = {
        "imported from": f"EDM ({arguments['kind']})",
        "file": file.name,
        "SHA-256 of the file": file_hash(file),
    }
    if weights.pop(AUGMENTATION, None) is not None:
        provenance["left out"] = f"{AUGMENTATION}, the labels of augmentations, which are zero in use"
    fill(network, weights, file)
    return Converted(
        network, preconditioning, (network.channels, arguments["resolution"], arguments["resolution"]), provenance
    )


def _preconditioning(options: EDMOptions) -> Preconditioning:
    if options.preconditioning == "edm":
        return EDM(options.sigma_data)
    if options.preconditioning == "vp":
        return VPEpsilon(ContinuousVP())
    if options.preconditioning == "ve":
        return VE()
    raise ValueError(f"preconditioning = {options.preconditioning!r}; allowed are edm, vp, ve")


def architecture(weights: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """Arguments of :class:`EDMUNet` that keys and shapes tell.

    Raises:
        PriorError: a key is missing, or the network takes class labels.
    """

    def shape(key: str, axes: int) -> torch.Size:
        return shape_of(weights, key, axes, file)

    if any(key.startswith("map_label.") for key in weights):
        raise PriorError(f"{file} has the key map_label.weight: a class-conditional network; a prior is unconditional")
    stems = [match for key in weights if (match := re.fullmatch(r"enc\.(\d+)x\1_conv\.weight", key))]
    if len(stems) != 1:
        raise PriorError(f"{file} is not a network of EDM's code: it has {len(stems)} keys enc.NxN_conv.weight")
    resolution = int(stems[0][1])
    levels, blocks = 0, 0
    while levels < resolution.bit_length() and f"{_level(resolution, levels)}_block0.conv1.weight" in weights:
        levels += 1
    while f"{_level(resolution, 0)}_block{blocks}.conv1.weight" in weights:
        blocks += 1
    if not levels:
        raise PriorError(
            f"{file} is not a network of EDM's code: the key {_level(resolution, 0)}_block0.conv1.weight is missing"
        )
    kind = "adm" if "out_conv.weight" in weights else "ncsn++" if "map_noise.freqs" in weights else "ddpm++"
    stem, channels = shape(stems[0][0], 4)[:2]
    features, sinusoids = shape("map_layer0.weight", 2)
    names = [_level(resolution, level) for level in range(levels)]
    return {
        "kind": kind,
        "channels": channels,
        "resolution": resolution,
        "widths": [shape(f"{name}_block0.conv1.weight", 4)[0] for name in names],
        "stem": stem,
        "blocks": blocks,
        "attention": [level for level, name in enumerate(names) if f"{name}_block0.qkv.weight" in weights],
        "sinusoids": sinusoids,
        "features": features,
    }


def _level(resolution: int, level: int) -> str:
    return f"enc.{resolution >> level}x{resolution >> level}"
