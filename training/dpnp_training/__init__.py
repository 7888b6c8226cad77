"""Training: from a data set to a portable prior, by denoising score matching."""

from dpnp_training.augment import Augmentation
from dpnp_training.data import ImageData
from dpnp_training.export import prior_from_checkpoint
from dpnp_training.losses import (
    AdaptiveBands,
    DenoisingScoreMatching,
    LogNormal,
    LogUniform,
    UniformFlowTime,
    UniformTime,
)
from dpnp_training.module import ScoreMatching

__all__ = [
    "AdaptiveBands",
    "Augmentation",
    "DenoisingScoreMatching",
    "ImageData",
    "LogNormal",
    "LogUniform",
    "ScoreMatching",
    "UniformFlowTime",
    "UniformTime",
    "prior_from_checkpoint",
]
