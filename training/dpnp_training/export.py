"""From a training checkpoint to a portable prior."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dpnp_shared.preconditioning import Preconditioning
from dpnp_shared.prior import Prior, PriorCard, PriorError, build

EMA_PREFIX = "ema.ema_model."


def prior_from_checkpoint(file: str | Path, *, trusted_modules: Sequence[str] = ()) -> Prior:
    """Read the averaged network out of a checkpoint without running any code stored in it.

    Args:
        file: a ``.ckpt`` written by training.
        trusted_modules: modules outside of this package whose classes may be imported.

    Returns:
        The prior, in evaluation mode.

    Raises:
        PriorError: the file is missing, is not such a checkpoint, or its weights do not fit its network.
    """
    path = Path(file)
    if not path.is_file():
        raise PriorError(f"checkpoint {path} does not exist")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files; none may pass
        raise PriorError(f"checkpoint {path} cannot be read safely: {error}") from error
    if not isinstance(checkpoint, dict) or "prior" not in checkpoint:
        raise PriorError(f"checkpoint {path} holds no description of a prior; was it written by dpnp-train?")
    network = build(checkpoint["prior"]["network"], trusted_modules)
    preconditioning = build(checkpoint["prior"]["preconditioning"], trusted_modules)
    if not isinstance(preconditioning, Preconditioning):
        raise PriorError(f"checkpoint {path}: its preconditioning is not a Preconditioning")
    weights = {
        key.removeprefix(EMA_PREFIX): value
        for key, value in checkpoint["state_dict"].items()
        if key.startswith(EMA_PREFIX)
    }
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise PriorError(f"checkpoint {path}: {error}") from error
    return Prior(network, preconditioning, PriorCard(**checkpoint["prior"]["card"])).eval().requires_grad_(False)
