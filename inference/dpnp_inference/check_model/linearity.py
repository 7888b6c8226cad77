"""Checks of what closed forms and solvers rely on: linearity, the adjoint, the norm, functions of the Gram matrix."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from dpnp_inference.check_model.finding import Finding, note, ok, problem
from dpnp_inference.check_model.subject import TINY, Subject, name_of, rows, shape_of, size
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import LinearOperator

POWER_ITERATIONS, POWER_SECONDS = 64, 2.0


@torch.no_grad()
def check_linearity(subject: Subject) -> Iterator[Finding]:
    """It is linear or affine where it says so; and says so where it is."""
    A = subject.precise.operator
    L = A.linear_part
    u, v = (subject.noisy_images(2, purpose, subject.eta_max) for purpose in (20, 21))
    a, b, zero = 1.7, -0.6, A(torch.zeros_like(u))
    Au, Av, Aw = (A(x) - zero for x in (u, v, a * u + b * v))
    scale = size(Au) + size(Av)
    if scale == 0 or not (math.isfinite(scale) and math.isfinite(size(Aw))):
        yield note(
            "linearity", "Not tried: the operator is constant or not finite for draws with noise.", "See values."
        )
        return
    defect, offset = size(Aw - a * Au - b * Av) / scale, size(zero) / scale
    affine, linear = defect <= subject.tolerance, offset <= subject.tolerance
    if isinstance(A, LinearOperator):
        if affine and linear:
            yield ok("linearity", f"Linear, as it says (to {max(defect, offset):.1g}).")
        elif affine:
            found = f"It is a LinearOperator, and a blank image gives a measurement that is not 0 (but {offset:.2g} of its size)."
            yield problem("linearity", found, "Make it an Operator whose linear_part is x -> A(x) - A(0).")
        else:
            found = (
                f"It is a LinearOperator, and is not linear (by {defect:.2g}). Closed forms and solvers are wrong then."
            )
            yield problem("linearity", found, "Make it an Operator.")
    elif L is not None:
        wrong = max(size(L(u) - Au), size(L(v) - Av)) / scale
        if wrong <= subject.tolerance:
            yield ok("linearity", f"Affine, as it says (to {wrong:.1g}).")
        else:
            found = (
                f"Its linear_part is not x -> A(x) - A(0) (by {wrong:.2g}). Closed forms and solvers are wrong then."
            )
            yield problem("linearity", found, "Correct linear_part, or remove it.")
    elif not affine:
        yield ok("linearity", "Not linear, and does not claim to be.")
    elif not isinstance(subject.noise, GaussianNoise):
        kind = "Linear" if linear else "Affine"
        yield ok(
            "linearity", f"{kind}; with {type(subject.noise).__name__} there is no closed form to gain by saying so."
        )
    else:
        yield note(
            "linearity",
            f"It is {'linear' if linear else 'affine'} (to {max(defect, offset) if linear else defect:.1g}) and does not say so. With "
            "Gaussian noise it could be sampled exactly.",
            "Subclass LinearOperator (only forward is needed; super().__init__(image_shape)), or give a matrix to MatrixOperator or "
            "ScipyOperator."
            if linear
            else "Subclass Operator, with a LinearOperator as linear_part: x -> A(x) - A(0).",
        )


@torch.no_grad()
def check_adjoint(subject: Subject) -> Iterator[Finding]:
    r"""The adjoint is the adjoint: :math:`\langle v, A u\rangle = \langle A^T v, u\rangle`."""
    L = subject.precise.operator.linear_part
    if L is None:
        return
    u = subject.noisy_images(3, 30, subject.eta_max)
    Lu = L(u)
    w = subject.normal(Lu, 31)
    v = Lu / max(size(Lu), TINY) + w / size(w)
    back = L.adjoint(v)
    if back.shape != u.shape or back.dtype != u.dtype:
        yield problem(
            "adjoint",
            f"The adjoint gives {shape_of(back)}, {name_of(back.dtype)}, where images are {shape_of(u)}, {name_of(u.dtype)}.",
            "Reshape to images; they are real, take the real part. Or remove adjoint, which is then found by differentiation.",
        )
        return
    left, right = rows((v.conj() * Lu).real).sum(1), rows(back * u).sum(1)
    error = float((left - right).abs().max()) / max(size(v) * size(Lu), TINY)
    if error <= subject.tolerance:
        yield ok("adjoint", f"<v, A u> = <A^T v, u> (to {error:.1g}).")
    else:
        yield problem(
            "adjoint",
            f"<A^T v, u> is {float(right.sum() / left.sum()):.4g} times <v, A u> (off by {error:.2g}). Solvers end at a wrong image then.",
            "A back-projection that only resembles the adjoint does not do. Correct it, or remove it: it is then found by differentiation.",
        )


@torch.no_grad()
def check_norm(subject: Subject) -> Iterator[Finding]:
    """The norm is the largest singular value, where the operator says it by itself."""
    L = subject.precise.operator.linear_part
    if L is None or type(L).norm is LinearOperator.norm:
        return
    v = subject.normal(subject.noisy_images(1, 40, 0.0), 41)
    start, least = time.perf_counter(), 0.0
    for _ in range(POWER_ITERATIONS):
        v = L.adjoint(L(v / v.norm()))
        least = math.sqrt(float(v.norm()))
        if least == 0 or time.perf_counter() - start > POWER_SECONDS:
            break
    given, remedy = L.norm(), "Correct norm, or remove it: it is then found by power iteration."
    found = f"norm() is {given:.4g}, and there is an image that A makes {least:.4g} times as large"
    if given < least * (1 - 1e-3):
        yield problem("norm", f"{found}. Exact splitting takes out more noise than there is then.", remedy)
    elif given > 2 * least:
        yield note("norm", f"{found}, none by more. The annealing goes on for longer than it has to.", remedy)
    else:
        yield ok("norm", f"{found}.")


@torch.no_grad()
def check_gram_function(subject: Subject) -> Iterator[Finding]:
    """``gram_function(f, x)`` is ``f(A^T A) x``: for ``f = 1``, ``f(s) = s`` and ``f(s) = 1/(1 + c s)``."""
    L = subject.precise.operator.linear_part
    if L is None or not L.has_gram_function:
        return
    u, c = subject.noisy_images(2, 50, subject.eta_max), 1 / max(L.norm() ** 2, TINY)
    inverse = L.gram_function(lambda s: 1 / (1 + c * s), u)
    defects = {
        "f = 1 does not give x": L.gram_function(torch.ones_like, u) - u,
        "f(s) = s does not give A^T A x": c * (L.gram_function(lambda s: s, u) - L.adjoint(L(u))),
        "f(s) = 1/(1 + c s) does not invert 1 + c A^T A": inverse + c * L.adjoint(L(inverse)) - u,
    }
    errors = {what: size(defect) / size(u) for what, defect in defects.items()}
    wrong = [f"{what} (off by {error:.2g})" for what, error in errors.items() if not error <= subject.tolerance]
    if wrong:
        yield problem(
            "gram function",
            f"gram_function is not f(A^T A): {'; '.join(wrong)}. Closed forms are wrong then.",
            "Correct gram_function, or remove it: the step is then solved by conjugate gradients.",
        )
    else:
        yield ok("gram function", f"gram_function(f, x) is f(A^T A) x (to {max(errors.values()):.1g}).")
