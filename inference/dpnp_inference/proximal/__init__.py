"""Proximal consistency samplers: draw ``z ~ L(z; y) N(z; x, η² I)`` (Xu & Chi 2024, section 3.1)."""

from dpnp_inference.proximal.auto import choose_proximal
from dpnp_inference.proximal.base import MarkovKernel, ProximalInfo, ProximalSampler, TemperedForwardModel
from dpnp_inference.proximal.closed_form import ClosedForm
from dpnp_inference.proximal.elliptical_slice import EllipticalSlice
from dpnp_inference.proximal.hmc import HMC
from dpnp_inference.proximal.mala import MALA
from dpnp_inference.proximal.perturb_and_solve import PerturbAndSolve
from dpnp_inference.proximal.pixelwise_slice import PixelwiseSlice

__all__ = [
    "HMC",
    "MALA",
    "ClosedForm",
    "EllipticalSlice",
    "MarkovKernel",
    "PerturbAndSolve",
    "PixelwiseSlice",
    "ProximalInfo",
    "ProximalSampler",
    "TemperedForwardModel",
    "choose_proximal",
]
