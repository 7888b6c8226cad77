"""Inference: from a prior, a forward model and a measurement to a posterior."""

from dpnp_inference.annealing import Annealing
from dpnp_inference.dds import DDSDDIM, DDSDDPM, DenoisingSampler
from dpnp_inference.dpnp import DPnP, SamplingError, Sweep
from dpnp_inference.posterior import Interval, Posterior
from dpnp_inference.proximal import MALA, ClosedForm, PerturbAndSolve, ProximalSampler
from dpnp_inference.randomness import ChainGenerators

__all__ = [
    "DDSDDIM",
    "DDSDDPM",
    "MALA",
    "Annealing",
    "ChainGenerators",
    "ClosedForm",
    "DPnP",
    "DenoisingSampler",
    "Interval",
    "PerturbAndSolve",
    "Posterior",
    "ProximalSampler",
    "SamplingError",
    "Sweep",
]
