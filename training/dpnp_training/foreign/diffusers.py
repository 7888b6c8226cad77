"""Folders of Hugging Face diffusers that hold a ``UNet2DModel`` and its scheduler (DDPM, DDIM and their kin).

``config.json`` tells the architecture and ``scheduler_config.json`` the noise schedule and what the network predicts; nothing has to be
known beside them. The folder is that of a pipeline (``unet/``, ``scheduler/``) or a flat one; the package itself is not needed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpnp_shared.networks.diffusers_unet import DiffusersUNet
from dpnp_shared.preconditioning import DiscreteVP, Preconditioning, VPEpsilon, VPrediction
from dpnp_shared.prior import PriorError
from dpnp_training.foreign.weights import Converted, file_hash, fill, read_weights

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# samplers of networks that were trained on DDPM's table of β's, with the table's index as time
SCHEDULERS = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
)  # fmt: skip
PREDICTIONS = {"epsilon": VPEpsilon, "v_prediction": VPrediction}
# entries of config.json that say nothing about an unconditional network with sinusoidal time, and what they must be then
FIXED = {"time_embedding_type": "positional", "class_embed_type": None, "num_class_embeds": None}
UNUSED = ("sample_size", "num_train_timesteps")
# attention's names in files written before version 0.15
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def convert(source: str | Path) -> Converted:
    """Read a folder of diffusers.

    Args:
        source: the folder.

    Raises:
        PriorError: the folder lacks a file or holds a damaged one, or its network is conditional, works on latents, or is of a kind that
            has no counterpart here; names the file and the entry.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise PriorError(f"source = {str(source)!r} is not a folder of diffusers")
    _check_pipeline(folder)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    schedulers = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    config_file, scheduler_file = unet / "config.json", next(filter(Path.is_file, schedulers), schedulers[0])
    config = _read(config_file)
    arguments = _arguments(config, config_file)
    preconditioning = _preconditioning(_read(scheduler_file), scheduler_file)
    weights_file = next((unet / name for name in WEIGHTS if (unet / name).is_file()), None)
    if weights_file is None:
        found = sorted(item.name for item in unet.iterdir())
        raise PriorError(f"{unet} holds neither {WEIGHTS[0]} nor {WEIGHTS[1]}, but {', '.join(found)}")
    try:
        with torch.device("meta"):
            network = DiffusersUNet(**arguments)
    except (TypeError, ValueError) as error:
        raise PriorError(f"{config_file}: {error}") from error
    fill(network, _renamed(read_weights(weights_file)), weights_file)
    return Converted(network, preconditioning, (network.channels, *_size(config, config_file)), {
        "imported from": f"diffusers {config.get('_diffusers_version', '(version not stated)')}",
        "SHA-256 of the file": file_hash(weights_file),
    })  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise PriorError(f"{file} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PriorError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise PriorError(f"{file} holds a {type(content).__name__}, not a dictionary")
    return content


def _check_pipeline(folder: Path) -> None:
    """Refuse pipelines of which the U-Net is only a part."""
    index = folder / "model_index.json"
    if index.is_file():
        parts = [key for key in _read(index) if not key.startswith("_")]
        other = sorted(set(parts) - {"unet", "scheduler"})
        if other:
            raise PriorError(f"{index}: the pipeline also has {', '.join(other)}; a prior is a network on images alone")


def _size(config: dict[str, Any], file: Path) -> tuple[int, int]:
    """Height and width of the images, 0 if they are not stated."""
    size = config.get("sample_size")
    if size is None:
        return 0, 0
    pair = [size, size] if isinstance(size, int) else size
    if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) and n > 0 for n in pair)):
        raise PriorError(f"{file}: sample_size is {size!r}; allowed are a positive number and two of them")
    return pair[0], pair[1]


def _arguments(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Arguments of :class:`DiffusersUNet`; an entry that is left out has the same default here and there."""
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise PriorError(f"{file}: _class_name is {kind!r}; allowed is 'UNet2DModel' (unconditional)")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise PriorError(f"{file}: {key} is {config[key]!r}; allowed is {value!r}")
    skip = (*FIXED, *UNUSED)
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in skip}


def _preconditioning(config: dict[str, Any], file: Path) -> Preconditioning:
    """The table of β's and what the network predicts."""
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise PriorError(f"{file}: _class_name is {kind!r}; allowed are {', '.join(SCHEDULERS)}")
    for key in ("rescale_betas_zero_snr", "use_flow_sigmas"):
        if config.get(key):
            raise PriorError(f"{file}: {key} is {config[key]!r}; allowed is false")
    # 'predict_epsilon' is the entry's name before version 0.11
    default = "sample" if config.get("predict_epsilon") is False else "epsilon"
    prediction = config.get("prediction_type", default)
    if prediction not in PREDICTIONS:
        raise PriorError(f"{file}: prediction_type is {prediction!r}; allowed are {', '.join(PREDICTIONS)}")
    try:
        return PREDICTIONS[prediction](_table(config, file))
    except (TypeError, ValueError) as error:
        raise PriorError(f"{file}: {error}") from error


def _table(config: dict[str, Any], file: Path) -> DiscreteVP:
    betas = config.get("trained_betas")
    if betas is not None:
        return DiscreteVP(betas=betas)
    missing = [k for k in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end") if k not in config]
    if missing:  # their defaults differ among schedulers
        raise PriorError(f"{file}: {', '.join(missing)} is missing")
    steps, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    name = config["beta_schedule"]
    if name == "linear":
        return DiscreteVP(steps, low, high)
    if name == "squaredcos_cap_v2":
        return DiscreteVP(steps, schedule="cosine")
    if name == "scaled_linear":
        return DiscreteVP(betas=torch.linspace(low**0.5, high**0.5, steps, dtype=torch.float64).square().tolist())
    if name == "sigmoid":
        ramp = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        return DiscreteVP(betas=(low + (high - low) * ramp).tolist())
    raise PriorError(
        f"{file}: beta_schedule is {name!r}; allowed are linear, scaled_linear, squaredcos_cap_v2, sigmoid and trained_betas"
    )


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of attention layers in the names of today."""

    def today(match: re.Match[str]) -> str:
        return match[1] + OLD_NAMES[match[2]] + match[3]

    pattern = re.compile(rf"(.*attentions\.\d+\.)({'|'.join(OLD_NAMES)})(\.(?:weight|bias))")
    return {pattern.sub(today, key): value for key, value in weights.items()}
