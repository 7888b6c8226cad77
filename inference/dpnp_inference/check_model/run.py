"""Checks of the run to come: whether the measurement fits, which proximal sampler is taken, and how long it all takes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dpnp_inference.check_model.finding import Finding, note, ok, problem
from dpnp_inference.check_model.subject import TINY, Subject, name_of, real, rows, shape_of, span
from dpnp_inference.dpnp import DPnP
from dpnp_inference.gibbs import START_CALLS
from dpnp_inference.proximal import MarkovKernel, ProximalSampler, TemperedForwardModel, choose_proximal
from dpnp_inference.randomness import ChainGenerators

FEW = 2  # chains that timings are extrapolated from
SLOW = 2e-2  # seconds of a call of the operator from which on a single step of the proximal sampler is timed, else some
LONG = 3600.0  # seconds of a run from which on it is worth a note


@torch.no_grad()
def check_measurement(subject: Subject) -> Iterator[Finding]:
    """The measurement fits the model, and resembles simulated ones."""
    y, x = subject.y, subject.images
    if y is None:
        return
    _, c, h, w = x.shape
    try:
        subject.forward_model.check_measurement(y, (c, h, w), dtype=x.dtype, device=x.device)
    except (ValueError, TypeError) as error:
        remedy = (
            "Give one measurement without a batch dimension, in the units and the order of axes that the operator has."
        )
        yield problem("measurement", f"{str(error).rstrip('.')}.", remedy)
        return
    y = y.to(x.device)
    if not bool(subject.noise.log_prob(y, subject.operator(x)).isfinite().any()):
        found = "The noise model gives it the probability 0 for all draws from the prior."
        yield problem("measurement", found, "Check its units, and which values the noise model allows.")
        return
    yield ok("measurement", f"{shape_of(y)}, {name_of(y.dtype)}, {span(y)}: it fits the model.")
    simulated = subject.forward_model.simulate(x, generator=subject.generator(80))
    yield plausibility(real(simulated), real(y.to(simulated.dtype)))


def plausibility(simulated: Tensor, y: Tensor) -> Finding:
    """How far a measurement is from simulated ones, each entry in units of their scatter.

    The distance of each measurement from all others is compared; if ``y`` were one of the simulated ones, it would have the largest with a
    probability of 1 in n + 1.

    Args:
        simulated: ``(n, *y_shape)``, real.
        y: ``(*y_shape)``.
    """
    n = len(simulated)
    entries = rows(torch.cat([simulated, y[None]])).double()
    mean = (entries.sum(0) - entries) / n  # of the others
    variance = ((entries.square().sum(0) - entries.square()) / n - mean.square()).clamp(min=0)
    floor = (1e-2 * float(simulated.double().std())) ** 2 + TINY  # for entries that are always the same
    distance = ((entries - mean).square() / (variance + floor)).mean(1).sqrt()  # (n + 1,)
    own, others = float(distance[n]), distance[:n]
    found = (
        f"Its entries are {span(y)} (mean {float(y.double().mean()):.3g}), those of {n} simulated measurements of draws {span(simulated)} "
        f"(mean {float(simulated.double().mean()):.3g}). They are {own:.2f} standard deviations from the simulated ones, "
        f"simulated ones {float(others.min()):.2f} to {float(others.max()):.2f} from each other"
    )
    larger = int((others >= own).sum())
    if own > 10 * float(others.max()):
        remedy = "Check units, offset, order of axes and flips of the measurement, and which value range the operator expects of images."
        return problem("plausibility", f"{found}: this model and this prior would never give it.", remedy)
    if larger == 0:
        return note(
            "plausibility",
            f"{found}: further than all of them (1 time in {n + 1} by chance).",
            "Either the image is unlike those of the prior, or operator or noise are not the instrument's. Compare a simulated measurement "
            "with yours by eye.",
        )
    if larger == n:
        remedy = "Is it blank, averaged or denoised already? Is the noise that you give larger than the instrument's?"
        return note("plausibility", f"{found}: closer than all of them (1 time in {n + 1} by chance).", remedy)
    return ok("plausibility", f"{found}: {larger} of {n} are further off.")


def check_sampler(subject: Subject) -> Iterator[Finding]:
    """Which proximal sampler is taken, whether it starts, and how long a run takes."""
    proximal, reason = _proximal(subject)
    try:
        dpnp = DPnP(
            subject.prior,
            subject.forward_model,
            dds=subject.dds,
            proximal=proximal,
            annealing=subject.annealing,
            dtype=subject.images.dtype,
        )
        y = subject.forward_model.simulate(subject.images[:1], generator=subject.generator(81))[0]
        y = subject.forward_model.homogeneous_measurement(y, dpnp.blank())
        proximal.init(dpnp.kernel_model, y, subject.images[:FEW])
    except (ValueError, TypeError) as error:
        remedy = "proximal = auto takes a sampler that fits; annealing.eta_max and eta_min give the coupling's ends."
        yield problem("sampler", f"{str(error).rstrip('.')}.", remedy)
        return
    yield ok("sampler", f"{reason[0].upper()}{reason[1:]}. {dpnp.plan[0].upper()}{dpnp.plan[1:]}.")
    yield _time(subject, dpnp, y)


def _proximal(subject: Subject) -> tuple[ProximalSampler, str]:
    if not isinstance(subject.proximal, str):
        return subject.proximal, f"{type(subject.proximal).__name__}, as was chosen"
    return choose_proximal(subject.forward_model.homogeneous)


@torch.no_grad()
def _time(subject: Subject, dpnp: DPnP, y: Tensor) -> Finding:
    """What a run of single chains takes, extrapolated from some calls of the operator, the proximal sampler and the prior."""
    A, chains = subject.operator, subject.chains
    few = _seconds(lambda: A(dpnp.blank(FEW)))
    many = few * chains / FEW
    if many < 1:
        many = _seconds(lambda: A(dpnp.blank(chains)))
    x, generator = subject.images[:FEW], ChainGenerators(subject.seed, range(FEW))
    proximal, draws = _short(dpnp.proximal, 1 if few > SLOW else 4)
    state = proximal.init(dpnp.kernel_model, y, x)
    forward = 0.0
    tried = (0, len(dpnp.schedule) // 2, len(dpnp.schedule) - 1)
    for i in tried:
        if isinstance(proximal, MarkovKernel):
            state = proximal.retarget(state, TemperedForwardModel(dpnp.kernel_model, dpnp.powers[i]))
        start = time.perf_counter()
        state, _, _ = proximal.step(state, x, dpnp.schedule[i], generator=generator)
        forward += (time.perf_counter() - start) * draws * len(dpnp.schedule) / len(tried)
    forward *= many / few
    network = _seconds(lambda: subject.prior(dpnp.blank(chains), dpnp.schedule[0]))
    calls_for = getattr(dpnp.dds, "calls_for", lambda prior, eta: 10)
    total = forward + network * (START_CALLS + sum(calls_for(subject.prior, eta) for eta in dpnp.schedule))
    found = (
        f"A call takes {duration(many)} of the operator and {duration(network)} of the prior, for {chains} images. {chains} single chains "
        f"of {len(dpnp.schedule)} iterations take about {duration(total)}, {forward / total:.0%} of it in the forward model."
    )
    if total < LONG:
        return ok("time", found)
    faster = "a faster operator, or workers and persistent of ExternalProgram" if forward > total / 2 else "a GPU"
    return note("time", found, f"Fewer chains, fewer steps of the proximal sampler, {faster}.")


def _short(proximal: Any, steps: int) -> tuple[ProximalSampler, float]:
    """The sampler with a few steps a draw, where it has steps, and how many of its draws make a whole one."""
    if not hasattr(proximal, "steps"):
        return proximal, 1.0
    fields = {"steps": steps, "warmup": 0} if hasattr(proximal, "warmup") else {"steps": steps}
    whole = proximal.steps + getattr(proximal, "warmup", 0)
    return dataclasses.replace(proximal, **fields), (1 + whole) / (1 + steps)  # each begins with a call


def _seconds(call: Callable[[], Tensor]) -> float:
    """Wall time of a call: the shortest of three, as the first one is often slow."""
    shortest = math.inf
    for _ in range(3):
        start = time.perf_counter()
        if call().is_cuda:
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - start)
        if shortest > 1:
            break
    return max(shortest, 1e-9)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for most, unit, name in ((1e-3, 1e-6, "µs"), (1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "minutes")):
        if seconds < 0.995 * most:
            return f"{seconds / unit:.2g} {name}" if seconds < 99 * unit else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.0f} hours"
