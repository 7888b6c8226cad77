"""Checks of the noise model: that it takes back what it simulates, and that its density is the one that it draws from."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dpnp_inference.check_model.finding import Finding, note, ok, problem
from dpnp_inference.check_model.subject import TINY, Subject, name_of, shape_of, size, span

STEP = {torch.float32: 1e-1, torch.float64: 1e-3}  # of difference quotients, in units of the noise
TOLERANCE = {torch.float32: 3e-2, torch.float64: 1e-3}
MOST_ENTRIES = 2**21  # that are simulated at once


@torch.no_grad()
def check_noise(subject: Subject) -> Iterator[Finding]:
    """Simulated measurements are what the noise model takes back."""
    noise, name, clean = subject.noise, type(subject.noise).__name__, subject.operator(subject.images[:4])
    y, again = (noise.sample(clean, subject.generator(70)) for _ in range(2))
    if not isinstance(y, Tensor) or y.shape != clean.shape or y.is_complex() != clean.is_complex():
        got = f"{shape_of(y)}, {name_of(y.dtype)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        found = f"{name}.sample gives {got} for noiseless values {shape_of(clean)}, {name_of(clean.dtype)}."
        yield problem("noise", found, "A measurement has the shape of the noiseless one, and is complex where that is.")
        return
    bad = int((~y.isfinite()).sum())
    if bad:
        yield problem(
            "noise",
            f"{bad} of {y.numel()} simulated entries are not finite; the noiseless ones are {span(clean)}.",
            "Is the operator's output in the units of the noise model? (Rates, say, are not negative.)",
        )
        return
    log_p, summed = noise.log_prob(y, clean), "Sum over all entries of a measurement, and never over the batch."
    if log_p.shape != (len(y),):
        found = f"{name}.log_prob gives shape {shape_of(log_p)} for a batch of {len(y)}; it must be ({len(y)},)."
        yield problem("noise", found, summed)
        return
    if not bool(log_p.isfinite().all()):
        found = f"{name}.log_prob is {float(log_p[~log_p.isfinite()][0])} for a measurement that it has simulated."
        yield problem("noise", found, "The density must be positive and finite wherever sample can lead.")
        return
    alone = torch.cat([noise.log_prob(y[i], clean[i : i + 1]) for i in range(len(y))])
    if not torch.allclose(alone, log_p, rtol=1e-4, atol=1e-3):
        found = f"{name}.log_prob changes with the batch: {float(log_p[0]):.6g} is {float(alone[0]):.6g} for the image alone."
        yield problem("noise", found, f"{summed} y may come without a batch dimension.")
        return
    if not torch.equal(y, again):
        found = f"{name}.sample does not use the generator that it is given: a seed would not repeat a run."
        yield problem("noise", found, "Pass generator=generator to torch.randn and the like.")
        return
    scatter = size(y - clean) / math.sqrt(y.numel())
    yield ok(
        "noise", f"Simulated measurements are {span(y)}, they scatter by {scatter:.3g}; their log density is finite."
    )


@torch.no_grad()
def check_noise_density(subject: Subject) -> Iterator[Finding]:
    r"""``log_prob`` is the density that ``sample`` draws from.

    For any two noiseless values :math:`E\, p(y \mid \bar y')/p(y \mid \bar y) = 1` with :math:`y \sim p(\cdot \mid \bar y)`.
    The second one is moved from the first towards that of another image, as far as the logarithm of the ratio varies by 1.
    """
    clean = subject.operator(subject.images[:5])
    n = max(64, min(1024, MOST_ENTRIES // max(1, clean[0].numel())))
    here = clean[:1].expand(n, *clean.shape[1:])
    y = subject.noise.sample(here, subject.generator(71))
    base, worst = subject.noise.log_prob(y, here), (-1.0, 0.0, 0.0)
    for other in clean[1:]:
        for halvings in range(40):
            log_ratio = subject.noise.log_prob(y, here + 0.5**halvings * (other - here)) - base
            if bool(log_ratio.isfinite().all()) and float(log_ratio.std()) <= 1:
                break
        if float(log_ratio.std()) > 1e-3:  # else the two are not told apart
            ratio = log_ratio.double().exp()
            mean, error = float(ratio.mean()), float(ratio.std()) / math.sqrt(n)
            worst = max(worst, (abs(mean - 1) / error, mean, error))
    deviations, mean, error = worst
    if deviations < 0:
        found = "Not tried: a measurement either excludes images that are close to its own one, or does not tell them apart."
        yield note("noise density", found, "A density that falls off smoothly lets chains move.")
    elif deviations > 5:
        yield problem(
            "noise density",
            f"log_prob is not the density of what sample draws: a mean ratio that must be 1 is {mean:.3f} ± {error:.3f}. Simulated noise "
            f"is {'wider' if mean > 1 else 'narrower'} than log_prob assumes, or shifted; or log_prob lacks a term that depends on clean.",
            "Let sample and log_prob follow the same law.",
        )
    else:
        yield ok("noise density", f"log_prob is the density of what sample draws (1 is {mean:.3f} ± {error:.3f}).")


def check_noise_gradient(subject: Subject) -> Iterator[Finding]:
    """The gradient of ``log_prob`` in the noiseless values is that of its values."""
    operator, noise = subject.precise.operator, subject.precise.noise
    if not (operator.differentiable and noise.differentiable):
        return
    remedy = "set differentiable = False on the noise model."
    with torch.no_grad():
        clean = operator(subject.noisy_images(2, 72, 0.0))
        y = noise.sample(clean, subject.generator(73))
    with torch.enable_grad():
        log_p = noise.log_prob(y, clean.requires_grad_(True))
        if not log_p.requires_grad:
            yield problem(
                "noise gradient", "log_prob has no gradient in clean.", f"Remove detach() and the like, or {remedy}"
            )
            return
        (gradient,) = torch.autograd.grad(log_p.sum(), clean)
    h = STEP[subject.precision] * (noise.resolution or size(y - clean) / math.sqrt(y.numel()) or 1.0)
    v = gradient / max(size(gradient), TINY) * math.sqrt(gradient.numel()) + subject.normal(gradient, 74)
    with torch.no_grad():
        expected = float((noise.log_prob(y, clean + h * v) - noise.log_prob(y, clean - h * v)).sum()) / (2 * h)
    found = float((gradient.conj() * v).real.sum())
    error = abs(found - expected) / max(size(gradient) * size(v), TINY)
    if error <= TOLERANCE[subject.precision]:
        yield ok("noise gradient", f"It is that of log_prob (to {error:.1g}).")
    else:
        along = f"{found:.4g} along a direction in which they give {expected:.4g}"
        message = f"The gradient of log_prob in clean is not that of its values: {along}."
        yield problem("noise gradient", message, f"Check detach() and backward passes of your own, or {remedy}")


@torch.no_grad()
def check_likelihood(subject: Subject) -> Iterator[Finding]:
    """A measurement is more probable under its own image than under others, on average."""
    clean = subject.operator(subject.images[:32])
    y, n = subject.noise.sample(clean, subject.generator(75)), len(clean)
    log_l = torch.stack([subject.noise.log_prob(y[i], clean) for i in range(n)]).double()  # (measurement, image)
    if bool(log_l.isnan().any()):
        yield problem("likelihood", "The log likelihood of some draws is NaN.", "Give -inf where the density is 0.")
        return
    own, others = log_l.diagonal()[:, None], ~torch.eye(n, dtype=torch.bool, device=log_l.device)
    wins = float(((own > log_l).double() + 0.5 * (own == log_l).double())[others].mean())
    gain = torch.where(others, own - log_l, 0.0).clamp(-1e30, 1e30).sum(1) / (
        n - 1
    )  # positive on average for every law
    z = float(gain.mean() / gain.std().clamp(min=TINY)) * math.sqrt(n)
    if z < -3:
        yield problem(
            "likelihood",
            f"A measurement is less probable under its own image than under other draws (more in only {wins:.0%} of the comparisons).",
            "log_prob(y, clean) has a sign, an argument or a unit wrong.",
        )
    elif float(gain.mean()) < 0.5:
        yield note(
            "likelihood",
            f"A measurement hardly tells images apart: its own one is more probable than other draws in {wins:.0%} of the comparisons, on "
            f"average by a factor of {math.exp(float(gain.mean())):.2g}.",
            "The posterior will resemble the prior. Is the noise in the units of the measurement?",
        )
    else:
        found = f"A measurement is more probable under its own image than under other draws in {wins:.0%} of the comparisons."
        yield ok("likelihood", found)
