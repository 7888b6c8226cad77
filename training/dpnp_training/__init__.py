"""Training: from a data set to a portable prior, by denoising score matching."""

from dpnp_training.data import ImageData
from dpnp_training.export import prior_from_checkpoint
from dpnp_training.losses import DenoisingScoreMatching, LogNormal, LogUniform, UniformTime
from dpnp_training.module import ScoreMatching

__all__ = [
    "DenoisingScoreMatching",
    "ImageData",
    "LogNormal",
    "LogUniform",
    "ScoreMatching",
    "UniformTime",
    "prior_from_checkpoint",
]
