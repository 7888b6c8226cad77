"""Inference: from a prior, a forward model and a measurement to a posterior."""

from dpnp_inference.annealing import Annealing
from dpnp_inference.dds import DDSDDIM, DDSDDPM, DenoisingSampler
from dpnp_inference.dpnp import DPnP, SamplingError, Sweep
from dpnp_inference.population import Population
from dpnp_inference.posterior import Interval, Posterior
from dpnp_inference.proximal import (
    HMC,
    MALA,
    ClosedForm,
    EllipticalSlice,
    PerturbAndSolve,
    PixelwiseSlice,
    ProximalSampler,
)
from dpnp_inference.randomness import ChainGenerators
from dpnp_inference.replica_exchange import ReplicaExchange

__all__ = [
    "DDSDDIM",
    "DDSDDPM",
    "HMC",
    "MALA",
    "Annealing",
    "ChainGenerators",
    "ClosedForm",
    "DPnP",
    "DenoisingSampler",
    "EllipticalSlice",
    "Interval",
    "PerturbAndSolve",
    "PixelwiseSlice",
    "Population",
    "Posterior",
    "ProximalSampler",
    "ReplicaExchange",
    "SamplingError",
    "Sweep",
]
