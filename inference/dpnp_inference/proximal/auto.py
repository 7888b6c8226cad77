"""``proximal="auto"``: ask the forward model what it can do."""

from __future__ import annotations

from dpnp_inference.proximal.base import ProximalSampler
from dpnp_inference.proximal.closed_form import ClosedForm
from dpnp_inference.proximal.elliptical_slice import EllipticalSlice
from dpnp_inference.proximal.mala import MALA
from dpnp_inference.proximal.perturb_and_solve import PerturbAndSolve
from dpnp_inference.proximal.pixelwise_slice import PixelwiseSlice
from dpnp_shared.forward_model import ForwardModel


def choose_proximal(forward_model: ForwardModel) -> tuple[ProximalSampler, str]:
    """The most exact sampler the forward model allows, and why.

    Args:
        forward_model: operator and noise.

    Returns:
        The sampler and one sentence for the log.
    """
    model = f"{type(forward_model.operator).__name__} with {type(forward_model.noise).__name__}"
    if ClosedForm.supports(forward_model):
        return ClosedForm(), (
            "closed form with exact splitting: no bias for η ≤ σ/‖A‖, "
            f"because {model} is linear and Gaussian and its spectrum is known"
        )
    if PerturbAndSolve.supports(forward_model):
        return PerturbAndSolve(), (
            "perturb and solve by conjugate gradients with exact splitting: no bias for η ≤ 0.9 σ/‖A‖, "
            f"because {model} is linear and Gaussian"
        )
    if PixelwiseSlice.supports(forward_model):
        return PixelwiseSlice(), f"slice sampling of every pixel by itself, because {model} sees each by itself"
    if MALA.supports(forward_model):
        return MALA(), f"MALA with Metropolis step, because {model} is differentiable but not linear and Gaussian"
    return (
        EllipticalSlice(),
        f"elliptical slice sampling, because {model} gives values of its likelihood and no gradient",
    )
