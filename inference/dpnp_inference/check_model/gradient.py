"""Checks of what Langevin and Hamiltonian steps rely on: that autograd gives the gradient of the operator's values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from dpnp_inference.check_model.finding import Finding, note, ok, problem
from dpnp_inference.check_model.subject import TINY, Subject, rows, size

VALUES_ONLY = (
    "set differentiable = False (FunctionOperator(A, differentiable=False)), which elliptical slice sampling takes."
)
AT_ZERO = "sqrt, norms and divisions have none at 0: keep their argument away from it (torch.where before the operation, not after it)."
DRAWS = "draws from the prior"
STEP = {torch.float32: 2e-2, torch.float64: 1e-5}  # of difference quotients, in units of the images' spread
TOLERANCE = {torch.float32: 3e-2, torch.float64: 1e-5}  # of derivatives, relative


class Derivative(NamedTuple):
    """The operator's derivative along random directions.

    Attributes:
        quotient: size of the difference quotient of the values.
        gradient: size of the gradient.
        error: what they differ by, relative.
        ratio: of the derivative that the gradient gives to the difference quotient.
        change: size of the change over a large step.
    """

    quotient: float
    gradient: float
    error: float
    ratio: float
    change: float


def check_gradient(subject: Subject) -> Iterator[Finding]:
    """Where autograd is to give a gradient, it gives that of the values."""
    if not subject.operator.differentiable:
        yield _values_only(subject)
        return
    with torch.enable_grad():
        y = subject.operator(subject.images[:2].clone().requires_grad_(True))
    if not y.requires_grad:
        yield problem(
            "gradient",
            "The operator says that it is differentiable, and autograd finds no way through it.",
            f"Remove detach(), item(), numpy(), torch.no_grad() or torch.tensor(x) on the way; or {VALUES_ONLY}",
        )
        return
    singular = not_finite(subject)
    if DRAWS in singular:
        yield problem("gradient", f"The gradient is not finite for {', '.join(singular)}.", AT_ZERO)
        return
    found = derivative(subject)
    if found.gradient == 0 and found.change > 0:
        yield problem(
            "gradient",
            "The gradient is 0 everywhere, and values change: the operator is constant piece by piece (rounding, thresholds, indices). "
            "MALA would only diffuse.",
            f"{VALUES_ONLY[0].upper()}{VALUES_ONLY[1:]}",
        )
    elif not found.error <= TOLERANCE[subject.precision]:
        surrogate = "it is a surrogate, not 0 where values do not change (a straight-through estimator?)"
        differs = f"along random directions they differ by {found.error:.2g} of their size (ratio {found.ratio:.4g})"
        yield problem(
            "gradient",
            f"The gradient is not that of the values: {surrogate if found.quotient == 0 else differs}. Proposals go astray.",
            f"Check detach(), backward passes and vjp of your own; or {VALUES_ONLY}",
        )
    elif singular:
        message = f"It is that of the values, and not finite for {', '.join(singular)}. Such proposals are rejected."
        yield note("gradient", message, AT_ZERO)
    else:
        yield ok("gradient", f"It is that of the values (to {found.error:.1g}).")


def derivative(subject: Subject) -> Derivative:
    """Compare gradient and difference quotients of the precise model, near draws from the prior."""
    A, h = subject.precise.operator, STEP[subject.precision]
    x = subject.noisy_images(4, 60, 0.05 * subject.spread)
    v = subject.spread * subject.normal(x, 61)
    with torch.no_grad():
        quotient = (A(x + h * v) - A(x - h * v)) / (2 * h)  # J v
        change = size(A(x + v) - A(x - v))
    noise = subject.normal(quotient, 62)
    w = noise / size(noise) + quotient / max(size(quotient), TINY)  # sees an error along J v as well as any other
    with torch.enable_grad():
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad((w.conj() * A(x)).real.sum(), x)  # J^T w
    found, expected = rows(gradient * v).sum(1), rows((w.conj() * quotient).real).sum(1)
    error, scale = float((found - expected).abs().max()), size(w) * size(quotient)
    return Derivative(
        quotient=size(quotient),
        gradient=size(gradient),
        error=error / scale if scale else (math.inf if error else 0.0),
        ratio=float(found.sum() / expected.sum()),
        change=change,
    )


def not_finite(subject: Subject) -> list[str]:
    """Which images have no finite gradient: draws, and images of one value."""
    bad = []
    for what, images in {DRAWS: subject.images[:4], **subject.special_images()}.items():
        with torch.enable_grad():
            x = images.clone().requires_grad_(True)
            y = subject.operator(x)
            (gradient,) = torch.autograd.grad((subject.normal(y.detach(), 63).conj() * y).real.sum(), x)
        if not bool(gradient.isfinite().all()):
            bad.append(what)
    return bad


def _values_only(subject: Subject) -> Finding:
    """Whether an operator that says that it has no gradient has one."""
    try:
        with torch.enable_grad():
            y = subject.precise.operator(subject.noisy_images(2, 64, 0.0).requires_grad_(True))
        found = derivative(subject) if y.requires_grad else None
    except Exception:  # the user's code, which never said that this works
        found = None
    if found is None or found.quotient == 0 or not found.error <= TOLERANCE[torch.float64]:
        return ok("gradient", "None, as it says: samplers use values only.")
    return note(
        "gradient",
        "The operator says that it is not differentiable, and autograd gives its gradient.",
        "Set differentiable = True: MALA needs fewer calls than slice sampling.",
    )
