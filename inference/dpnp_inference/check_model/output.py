"""Checks of what the operator gives: a tensor for each image, the same each time, finite, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpnp_inference.check_model.finding import Finding, describe, note, ok, problem
from dpnp_inference.check_model.subject import Subject, in_double, name_of, rows, shape_of, size, span


@torch.no_grad()
def check_output(subject: Subject) -> Iterator[Finding]:
    """It runs, gives a tensor, and keeps the batch."""
    shapes = set()
    for batch in (3, 1):
        x = subject.images[:batch]
        y = subject.operator(x)
        if not isinstance(y, Tensor):
            found = f"The operator gives a {type(y).__module__}.{type(y).__name__}; it must give a torch.Tensor."
            yield problem("output", found, "A function of NumPy arrays is wrapped: operators.NumpyOperator(function).")
            return
        if y.shape[:1] != (batch,):
            yield problem(
                "output",
                f"The operator gives shape {shape_of(y)} for images {shape_of(x)}; it must keep the batch as first dimension.",
                "Write it for (B, C, H, W), B = 1 included (no bare squeeze()). For a function of one image see torch.vmap, and "
                "per_image of NumpyOperator.",
            )
            return
        shapes.add(tuple(y.shape[1:]))
    if len(shapes) > 1:
        found = f"A measurement has another shape in a batch of three than alone: {sorted(shapes)}."
        yield problem("output", found, "Let the shape depend on that of the image only.")
        return
    yield ok("output", f"Images {shape_of(x[0])} give measurements {shape_of(y[0])}; the batch is kept.")


@torch.no_grad()
def check_dtype(subject: Subject) -> Iterator[Finding]:
    """The precision of the images is kept."""
    x, y = subject.images[:2], subject.operator(subject.images[:2])
    kept = f"{name_of(x.dtype)} images give {name_of(y.dtype)}"
    if not (y.is_floating_point() or y.is_complex()):
        yield problem("dtype", f"{kept}; noise and gradients need real numbers.", "End with y.to(x.dtype).")
    elif y.real.dtype != x.dtype:
        yield note("dtype", f"{kept}.", "Make constants with dtype=x.dtype, or register them as buffers.")
    elif x.dtype == torch.float64:
        yield ok("dtype", f"{kept}.")
    elif (
        subject.precision == torch.float64 or not subject.operator.differentiable
    ):  # (levels may look like single precision)
        yield ok("dtype", f"{kept}, and it works in float64 too.")
    else:
        reason = "numbers have single precision then, too"
        try:
            _, wide = in_double(subject.forward_model, x.double())
            if wide.real.dtype != torch.float64:
                reason = f"float64 images give {name_of(wide.dtype)}"
        except Exception as error:  # the user's code
            reason = describe(error)
        found = f"{kept}. --precision float64 gains nothing: {reason}."
        yield note("dtype", found, "If you need it, keep the dtype of x throughout.")


@torch.no_grad()
def check_input(subject: Subject) -> Iterator[Finding]:
    """Images are not written into."""
    x = subject.images[:3].clone()
    subject.operator(x)
    if torch.equal(x, subject.images[:3]):
        yield ok("input", "Images are left as they are.")
    else:
        yield problem(
            "input",
            "The operator writes into its images, and so into the states of the chains.",
            "Replace operations in place on x (x *= 2, x[...] = 0, x.clamp_()), or start with x = x.clone().",
        )


@torch.no_grad()
def check_repeatability(subject: Subject) -> Iterator[Finding]:
    """The same image gives the same measurement."""
    x = subject.images[:3]
    share, error = subject.differ(subject.operator(x), subject.operator(x))
    if share == 0:
        yield ok(
            "repeatability", "The same image gives the same measurement" + (f" (to {error:.1g})." if error else ".")
        )
    else:
        yield problem(
            "repeatability",
            f"The same image gives another measurement each time (by {error:.2g} of its size).",
            "An operator is noiseless. What is random belongs into the noise; masks and the like are drawn once, in __init__, from a "
            "seed; dropout is switched off by eval().",
        )


@torch.no_grad()
def check_independence(subject: Subject) -> Iterator[Finding]:
    """A measurement depends on its own image only."""
    x, A = subject.images[:4], subject.operator
    y, order = A(x), torch.tensor([2, 0, 3, 1])
    others = torch.cat([x[:1], x[1:] + subject.spread * subject.normal(x[1:], 10)])
    tried = {
        "when the images are in another order": (A(x[order]), y[order]),
        "when the image is alone": (A(x[1:2]), y[1:2]),
        "when the other images change": (A(others)[:1], y[:1]),
    }
    share, error, when = max((*subject.differ(found, expected), when) for when, (found, expected) in tried.items())
    # where values are rounded to levels, some go to the next one when a batch is computed in another order
    if share == 0 or (not A.differentiable and share < 0.01):
        yield ok("independence", "A measurement depends on its own image only.")
    else:
        yield problem(
            "independence",
            f"A measurement changes {when} (by {error:.2g} of its size). Chains of a batch would disturb each other.",
            "Take means, maxima and norms over dimensions 1, 2, 3, never over the batch; put normalisation layers into eval().",
        )


@torch.no_grad()
def check_values(subject: Subject) -> Iterator[Finding]:
    """Measurements are finite for all images that come up, and differ between them."""
    x, (low, high) = subject.images, subject.values
    wide = x[:8] + subject.eta_max * subject.normal(x[:8], 11)
    where_chains_start = f"draws with noise of eta_max = {subject.eta_max:.3g}, where chains start"
    failures: list[str] = []
    partly = ""
    for what, images in {"draws from the prior": x, **subject.special_images(), where_chains_start: wide}.items():
        try:
            y = subject.operator(images)
        except Exception as error:  # the user's code
            failures.append(f"{what} ({describe(error)})")
            continue
        bad = int((~rows(y).isfinite()).any(1).sum())
        if images is wide and 0 < bad < len(wide):
            partly = f"{what} ({bad} of {len(wide)})"
        elif bad:
            failures.append(f"{what} ({bad} of {len(images)})")
    if failures:
        yield problem(
            "values",
            f"The operator fails or is not finite for {'; '.join(failures)}.",
            "Chains pass through images that the prior would not draw: clamp the arguments of log, sqrt and division. For an image "
            "without a measurement it may give NaN, but not raise.",
        )
        return
    y = subject.operator(x)
    if size(y - y[:1]) <= 1e-6 * size(y):
        yield problem(
            "values",
            "All draws give the same measurement: it says nothing about the image.",
            f"Does forward use x? Are pixels in the units that it expects? Those of the prior are {low:.3g} to {high:.3g}.",
        )
    elif partly:
        found = f"The operator is not finite for some {partly}. Such proposals are rejected and counted."
        yield note("values", found, "If chains get stuck, clamp what leaves the operator's domain.")
    else:
        yield ok("values", f"Finite for draws, blank and extreme images, and draws with noise; for draws {span(y)}.")


@torch.no_grad()
def check_pixelwise(subject: Subject) -> Iterator[Finding]:
    """Every entry depends on its own pixel only where the operator says so; and it says so where that helps."""
    A, x = subject.operator, subject.images[:2]
    y = A(x)
    fits = y.shape[-3:] == x.shape[1:]
    if A.pixelwise and not fits:
        found = f"It says that it is pixelwise, and a measurement {shape_of(y[0])} does not end with the image's dimensions."
        yield problem("pixelwise", found, "Set pixelwise = False, or give measurements (…, C, H, W).")
    gains = subject.noise.independent and not subject.forward_model.homogeneous.linear_gaussian
    if not fits or not (A.pixelwise or gains):
        return
    changed = subject.normal(x, 13) > 0
    there, before = (
        A(images).reshape(len(x), -1, *x.shape[1:])
        for images in (torch.where(changed, x + subject.spread * subject.normal(x, 14), x), x)
    )
    share, error = subject.differ(torch.where(changed[:, None], before, there), before)
    if share and A.pixelwise:
        found = f"It says that it is pixelwise, and entries change with other pixels than their own (by {error:.2g} of their size)."
        yield problem(
            "pixelwise", found, "Set pixelwise = False: each pixel would be drawn as if the others did not matter."
        )
    elif A.pixelwise:
        yield ok("pixelwise", "Every entry depends on its own pixel only, as it says.")
    elif share == 0:
        found = "Every entry depends on its own pixel only, and the operator does not say so."
        yield note(
            "pixelwise",
            found,
            "Set pixelwise = True (of a function: FunctionOperator(function, pixelwise=True)): pixels are then drawn one by one, well even "
            "where the noise is small.",
        )


@torch.no_grad()
def check_unseen(subject: Subject) -> Iterator[Finding]:
    """Pixels that are called unseen do not matter."""
    unseen = subject.operator.unseen
    if unseen is None or not bool(unseen.any()):
        return
    x = subject.images[:2]
    changed = torch.where(unseen.to(x.device), x + subject.spread, x)
    share, error = subject.differ(subject.operator(changed), subject.operator(x))
    if share == 0:
        yield ok("unseen", f"The pixels that it calls unseen, {float(unseen.double().mean()):.0%}, do not matter.")
    else:
        yield problem(
            "unseen",
            f"Pixels that it calls unseen change the measurement (by {error:.2g} of its size).",
            "Correct the property unseen: scores of unseen pixels follow from it.",
        )


@torch.no_grad()
def check_display(subject: Subject) -> Iterator[Finding]:
    """The picture of a measurement can be drawn."""
    y = subject.forward_model.simulate(subject.images[:1], generator=subject.generator(12))[0]
    picture = subject.operator.display(y)
    if picture is None:
        yield ok("display", "A run's picture shows no measurement; display(y) would give one.")
    elif isinstance(picture, Tensor) and picture.ndim == 3:
        yield ok("display", f"A run's picture shows the measurement as {shape_of(picture)}.")
    else:
        got = shape_of(picture) if isinstance(picture, Tensor) else f"a {type(picture).__name__}"
        found = f"display(y) gives {got}; it must give (C', H', W') or None. A run would fail at its end."
        yield problem("display", found, "Return y[None] for a measurement (H', W').")
