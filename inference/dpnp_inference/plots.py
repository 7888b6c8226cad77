"""Pictures of a posterior, as matplotlib figures: nothing is shown, a notebook displays what a cell returns."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor

from dpnp_inference.posterior import Functional, Posterior

RANK_BINS = 20


class Picture(Figure):
    """A figure that notebooks display also where pyplot has not been imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def mean_intensity(x: Tensor) -> Tensor:
    """Mean over an image's entries: ``(n, C, H, W)`` to ``(n,)``."""
    return x.mean(dim=(1, 2, 3))


def plot_images(posterior: Posterior, value_range: tuple[float, float] | None = None, *, draws: int = 5) -> Figure:
    """Posterior mean, standard deviation and a few draws, the first of as many chains as there are.

    Args:
        posterior: the draws.
        value_range: shown as black and white; by default from the smallest to the largest value of the draws.
        draws: how many to show.

    Returns:
        The figure.

    Raises:
        ValueError: ``draws`` is negative, or ``value_range`` is empty.
    """
    if draws < 0:
        raise ValueError(f"draws = {draws}; it must not be negative")
    if value_range is None:
        low, high = float(posterior.samples.min()), float(posterior.samples.max())
        value_range = (low, high if high > low else low + 1)
    if not value_range[0] < value_range[1]:
        raise ValueError(f"value_range = {value_range}; the first must be below the second")
    chains = len(posterior.samples)
    order = posterior.samples.transpose(0, 1).flatten(0, 1)  # the first draw of every chain, then the second
    panels = [("mean", _as_picture(posterior.mean, value_range), False)]
    if len(order) > 1:
        panels.append(("standard deviation", posterior.std.double().square().mean(0).sqrt().numpy(), True))
    for i, x in enumerate(order[:draws]):
        panels.append((f"chain {i % chains}, draw {i // chains}", _as_picture(x, value_range), False))
    figure = _figure((2.1 * len(panels), 2.4))
    for axis, (name, image, spread) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        style = {"cmap": "magma", "vmin": 0.0} if spread else {"cmap": "gray", "vmin": 0.0, "vmax": 1.0}
        shown = axis.imshow(image, interpolation="nearest", **style)
        if spread:
            figure.colorbar(shown, ax=axis, shrink=0.7)
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    return figure


def plot_traces(posterior: Posterior, functionals: Mapping[str, Functional] | None = None) -> Figure:
    """Functionals of each chain's draws in turn, a row for each, beside their histogram over all draws.

    Chains that agree run through each other; bands that keep apart are chains that disagree.

    Args:
        posterior: the draws.
        functionals: by name, ``(n, C, H, W)`` to ``(n,)``; the mean intensity by default.

    Returns:
        The figure.

    Raises:
        ValueError: no functional, or one returns something else.
    """
    values = _values(posterior, functionals)
    figure = _figure((8.0, 2.2 * len(values)))
    rows = figure.subplots(len(values), 2, squeeze=False, width_ratios=(4, 1), sharey="row")
    for (trace, histogram), (name, value) in zip(rows, values.items(), strict=True):
        if value.shape[1] == 1:  # single draws: a point for each chain
            trace.plot(value[:, 0], "o", ms=3)
            trace.set_xlabel("chain")
        else:
            trace.plot(value.T, lw=0.8, alpha=0.8)
            trace.set_xlabel("draw")
        trace.set_title(name, fontsize=10)
        histogram.hist(value.ravel(), bins=min(40, max(5, int(np.sqrt(value.size)))), orientation="horizontal")
        histogram.set_xlabel("draws")
    return figure


def plot_ranks(posterior: Posterior, functionals: Mapping[str, Functional] | None = None) -> Figure:
    """Histogram of the ranks of each chain's draws among all draws (Vehtari et al. 2021, section 4.5), a row for each functional.

    Chains that draw from one law have level histograms.

    Args:
        posterior: the draws.
        functionals: as for :func:`plot_traces`.

    Returns:
        The figure.

    Raises:
        ValueError: no functional, one returns something else, or there is one draw a chain, whose rank says nothing about the chain.
    """
    chains, draws = posterior.samples.shape[:2]
    if draws < 2:
        raise ValueError("rank plots compare chains by their draws; there is 1 draw of each")
    values = _values(posterior, functionals)
    figure = _figure((8.0, 2.2 * len(values)))
    bins = max(2, min(RANK_BINS, draws // 5))
    edges = np.linspace(0, 1, bins + 1)
    for axis, (name, value) in zip(figure.subplots(len(values), 1, squeeze=False)[:, 0], values.items(), strict=True):
        rank = (rankdata(value, axis=None).reshape(value.shape) - 0.5) / value.size
        for chain in range(chains):
            axis.stairs(np.histogram(rank[chain], edges)[0] * bins / draws, edges, lw=1, alpha=0.8)
        axis.axhline(1, color="k", ls="--", lw=1)
        axis.set(xlim=(0, 1), xlabel="rank among all draws / their number", ylabel="density")
        axis.set_title(f"{name}, a line for each chain", fontsize=10)
    return figure


def _values(posterior: Posterior, functionals: Mapping[str, Functional] | None) -> dict[str, np.ndarray[Any, Any]]:
    chosen = {"mean intensity": mean_intensity} if functionals is None else functionals
    if not chosen:
        raise ValueError("functionals is empty; leave it out for the mean intensity")
    return {name: posterior.functional(f).double().numpy() for name, f in chosen.items()}


def _figure(size: tuple[float, float]) -> Figure:
    figure = Picture(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _as_picture(image: Tensor, value_range: tuple[float, float]) -> np.ndarray[Any, Any]:
    """``(C, H, W)`` in [0, 1]: RGB for three channels, the channels' mean otherwise."""
    low, high = value_range
    array = ((image.detach().double().cpu() - low) / (high - low)).clamp(0, 1).numpy()
    return np.moveaxis(array, 0, -1) if len(array) == 3 else np.asarray(array.mean(0))
