r"""Is this forward model what a sampler takes it for? One small check for each thing that goes wrong, in plain words.

A sampler believes what a forward model says of itself: that the images of a batch do not touch, that a gradient is the gradient, that
an adjoint is the adjoint. Where that is wrong the posterior is wrong too, or chains stand still, and nothing says so. Each check tries
one such promise on draws from the prior, and says what it found and what to do about it.

Identities (linearity, adjoint, gradient) are tried on a copy of the model in double precision where that works, so that rounding and
mistakes are told apart.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpnp_inference.annealing import Annealing
from dpnp_inference.check_model import gradient, linearity, noise, output, run
from dpnp_inference.check_model.finding import Finding, describe, has_problem, print_findings, problem
from dpnp_inference.check_model.subject import TOLERANCE, Check, Subject, draw_images
from dpnp_inference.dds import DenoisingSampler
from dpnp_inference.dpnp import image_shape_of
from dpnp_inference.proximal import ProximalSampler
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.prior import Prior

__all__ = ["Finding", "check_model", "has_problem", "print_findings"]

ESSENTIAL: tuple[Check, ...] = (output.check_output, output.check_dtype)  # without these nothing else can be tried
CHECKS: tuple[Check, ...] = (
    *ESSENTIAL,
    output.check_input,
    output.check_repeatability,
    output.check_independence,
    output.check_values,
    linearity.check_linearity,
    linearity.check_adjoint,
    linearity.check_norm,
    linearity.check_gram_function,
    gradient.check_gradient,
    output.check_pixelwise,
    output.check_unseen,
    noise.check_noise,
    noise.check_noise_density,
    noise.check_noise_gradient,
    noise.check_likelihood,
    output.check_display,
    run.check_measurement,
    run.check_sampler,
)


def check_model(
    prior: Denoiser,
    forward_model: ForwardModel,
    y: Tensor | None = None,
    *,
    images: Tensor | None = None,
    draws: int = 32,
    proximal: Literal["auto"] | ProximalSampler = "auto",
    annealing: Literal["auto"] | Annealing = "auto",
    dds: Literal["ddim", "ddpm"] | DenoisingSampler = "ddim",
    chains: int = 39,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[Finding]:
    """Try a forward model on draws from a prior.

    Args:
        prior: a trained or an analytic prior.
        forward_model: operator and noise, on the device of the prior.
        y: the measurement that it is for ``(*y_shape)``, if there is one.
        images: further images to try it on ``(n, C, H, W)``, in the prior's units.
        draws: from the prior, at least 4.
        proximal: of the run to come; as for :class:`~dpnp_inference.dpnp.DPnP`, like the next two.
        annealing: of the run to come.
        dds: of the run to come.
        chains: of the run to come, for the estimate of its time.
        seed: of all random numbers, not negative.
        dtype: of the images, float32 or float64.

    Returns:
        One or several findings of each check, in the order in which they are best repaired.

    Raises:
        ValueError: an argument is out of range. What the forward model raises is a finding.
    """
    if draws < 4 or chains < 1 or seed < 0:
        raise ValueError(f"draws = {draws}, chains = {chains}, seed = {seed}; they must be at least 4, 1 and 0")
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype = {dtype}; allowed are torch.float32 and torch.float64")
    try:
        shape = image_shape_of(prior, forward_model)
    except ValueError as error:
        return [
            problem("images", f"{str(error).rstrip('.')}.", "Change the operator's image_shape, or take another prior.")
        ]
    x = draw_images(prior, shape, draws, seed=seed, dtype=dtype)
    values = prior.card.value_range if isinstance(prior, Prior) else (float(x.min()), float(x.max()))
    x = x if images is None else torch.cat([images.to(x), x])
    subject = Subject(prior, forward_model, x, values, y, proximal, annealing, dds, chains, seed)
    findings: list[Finding] = []
    for check in CHECKS:
        findings += _guarded(check, subject)
        if check in ESSENTIAL and has_problem(findings):
            break
    return findings


def _guarded(check: Check, subject: Subject) -> list[Finding]:
    """The findings of a check; an error on the way is one of them."""
    findings: list[Finding] = []
    try:
        findings.extend(check(subject))
    except Exception as error:  # the user's code may raise anything, and what it raises is to be found out
        name = check.__name__.removeprefix("check_").replace("_", " ")
        findings.append(problem(name, f"It fails with {describe(error)}.", "Repair this first."))
    return findings
