"""Noise: how a measurement scatters around the operator's noiseless output, one file a kind."""

from dpnp_shared.noise.base import Noise
from dpnp_shared.noise.dithered_logistic import DitheredLogisticNoise
from dpnp_shared.noise.gaussian import GaussianNoise

__all__ = [
    "DitheredLogisticNoise",
    "GaussianNoise",
    "Noise",
]
