"""Features of Fashion-MNIST: the last hidden layer of a small classifier, trained by ``benchmarks/feature_extractor.py``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

WEIGHTS = Path(__file__).with_name("fashion_mnist.safetensors")
CLASSES, SIDE = 10, 28


class FeaturesError(RuntimeError):
    """The weights of a feature extractor are missing, damaged, or not what their record says."""


class FashionMNISTFeatures(nn.Module):
    """Maps gray images to 64 features, none of them negative.

    Four convolutions with rectifiers and the mean over positions. The weights lie beside this file; ``fashion_mnist.json`` holds their
    SHA-256 and the classifier's accuracy. Images that are not 28 x 28 are resized, as Inception does it to 299 x 299.

    Args:
        weights: the weights' file, with a ``.json`` file of the same name beside it; the shipped ones by default.

    Raises:
        FeaturesError: a file is missing, or its content is not what the record says.
    """

    num_features = 64

    def __init__(self, weights: str | Path = WEIGHTS) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for c in convolutions() for layer in (c, nn.ReLU())))
        self.head = nn.Linear(self.num_features, CLASSES)
        _load(self, Path(weights))
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images.

        Args:
            x: ``(B, 1, H, W)`` in [0, 1], zero being the background.

        Returns:
            ``(B, 64)``.

        Raises:
            ValueError: ``x`` has another number of channels.
        """
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"x has shape {tuple(x.shape)}; these features are of gray images (B, 1, H, W)")
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
        features: Tensor = self.layers(x).mean((2, 3))
        return features

    def logits(self, x: Tensor) -> Tensor:
        """Unnormalised log probabilities of the ten classes ``(B, 10)``, of images as in :meth:`forward`."""
        out: Tensor = self.head(self(x))
        return out


def convolutions() -> list[nn.Conv2d]:
    """The four convolutions, 28 x 28 → 14 x 14 → 7 x 7."""
    return [
        nn.Conv2d(1, 32, 5, stride=2, padding=2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.Conv2d(64, FashionMNISTFeatures.num_features, 3, padding=1),
    ]


def _load(module: nn.Module, file: Path) -> None:
    """Load the weights after checking their hash; whatever precision they are stored in, the module computes in float32."""
    record = file.with_suffix(".json")
    for needed in (file, record):
        if not needed.is_file():
            raise FeaturesError(f"{needed} is missing; features are never computed with random weights")
    try:
        expected = json.loads(record.read_text(encoding="utf-8"))["sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise FeaturesError(f"{record} is not a JSON record with a 'sha256': {error}") from error
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise FeaturesError(f"{file}: its SHA-256 is {found}, the record says {expected!r}; it was changed or damaged")
    try:
        module.load_state_dict({name: value.to(torch.float32) for name, value in load_file(file).items()})
    except (SafetensorError, RuntimeError) as error:
        raise FeaturesError(f"{file} does not hold this network's weights: {error}") from error
