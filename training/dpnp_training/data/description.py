"""What is known of a data set: the figures on the prior's card."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass
class DataDescription:
    """The figures of a data set that end up on the prior's card.

    Attributes:
        name: title of the prior's card.
        image_shape: ``(C, H, W)``.
        value_range: of a pixel as the network sees it.
        source_range: of a pixel in the data, mapped linearly onto ``value_range``.
        data_std: standard deviation of all pixel values, in units of ``value_range``.
        spread: standard deviation along the widest direction, in the same units.
        dataset: where the images come from and how many they are.
        license: of the data.
    """

    name: str
    image_shape: tuple[int, int, int]
    value_range: tuple[float, float]
    source_range: tuple[float, float]
    data_std: float
    spread: float
    dataset: str
    license: str


def measure_spread(data: Dataset[Tensor], most_images: int = 4096, most_values: int = 2 * 10**8) -> tuple[float, float]:
    """Pixel standard deviation and standard deviation along the widest direction, on evenly chosen images.

    Args:
        data: images ``(C, H, W)``.
        most_images: upper limit of images looked at.
        most_values: upper limit of pixel values held in memory.

    Returns:
        Both in image units. The second is the square root of the largest eigenvalue of the sample covariance.
    """
    length = len(data)  # type: ignore[arg-type]
    n = max(2, min(length, most_images, most_values // max(1, data[0].numel())))
    x = torch.stack([data[i].flatten() for i in np.linspace(0, length - 1, n).astype(int).tolist()])
    data_std = float(x.std())
    x -= x.mean(0)
    small = x @ x.T if n <= x.shape[1] else x.T @ x
    spread = float(torch.linalg.eigvalsh(small.double())[-1].clamp(min=0) / (n - 1)) ** 0.5
    if not (data_std > 0 and spread > 0):
        raise ValueError("all images are equal; there is nothing to learn from them")
    return data_std, spread
