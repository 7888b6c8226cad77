"""Noise: how a measurement scatters around the operator's noiseless output, one file a kind."""

from dpnp_shared.noise.base import Noise
from dpnp_shared.noise.censored_gaussian import CensoredGaussianNoise
from dpnp_shared.noise.dithered_logistic import DitheredLogisticNoise
from dpnp_shared.noise.gaussian import GaussianNoise
from dpnp_shared.noise.joint import JointNoise
from dpnp_shared.noise.laplace import LaplaceNoise
from dpnp_shared.noise.poisson import PoissonNoise
from dpnp_shared.noise.poisson_gaussian import PoissonGaussianNoise
from dpnp_shared.noise.rician import RicianNoise
from dpnp_shared.noise.student_t import StudentTNoise
from dpnp_shared.noise.transmission import LogPoissonNoise, TransmissionNoise
from dpnp_shared.noise.von_mises import VonMisesNoise

__all__ = [
    "CensoredGaussianNoise",
    "DitheredLogisticNoise",
    "GaussianNoise",
    "JointNoise",
    "LaplaceNoise",
    "LogPoissonNoise",
    "Noise",
    "PoissonGaussianNoise",
    "PoissonNoise",
    "RicianNoise",
    "StudentTNoise",
    "TransmissionNoise",
    "VonMisesNoise",
]
