"""The one-page picture of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dpnp_inference.posterior import Posterior


def shown_range(draws: Tensor, value_range: tuple[float, float]) -> tuple[float, float]:
    """What is shown as black and white: the value range, or the draws' own where more than a twentieth of their pixels is far outside.

    Fields are such draws: their values have no limits.

    Args:
        draws: of any shape.
        value_range: of a pixel, as the prior has it.

    Returns:
        The value range, or the 0.1% and 99.9% quantiles of the draws' pixels.
    """
    low, high = value_range
    margin = 0.1 * (high - low)
    if float(((draws < low - margin) | (draws > high + margin)).float().mean()) <= 0.05:
        return value_range
    first, last = np.quantile(draws.cpu().numpy(), [0.001, 0.999])
    return float(first), float(last)


def draw_picture(
    file: str | Path,
    posterior: Posterior,
    *,
    value_range: tuple[float, float],
    measurement: Tensor | None = None,
    truth: Tensor | None = None,
    samples: int = 5,
    title: str = "",
    compact: bool = False,
) -> Path:
    """Truth, measurement, mean, standard deviation and error on top, single draws below.

    The compact picture has one small row: truth, measurement, mean, standard deviation, draws.

    Args:
        file: PNG to write.
        posterior: the draws.
        value_range: of a pixel, mapped to black and white; see :func:`shown_range`.
        measurement: an image ``(C, H, W)`` that shows the measurement, if it has one.
        truth: ``(C, H, W)`` if it is known.
        samples: how many draws to show.
        title: one line on top.
        compact: for pages with many pictures.

    Returns:
        The file.
    """
    mean = posterior.mean
    several = len(posterior.flat) > 1
    top: list[tuple[str, Tensor, dict[str, Any]]] = []
    low, high = shown_range(posterior.samples, value_range)
    gray = {"vmin": low, "vmax": high, "cmap": "gray"}
    if truth is not None:
        top.append(("truth", truth, gray))
    if measurement is not None:
        top.append(("measurement", measurement.real if measurement.is_complex() else measurement, gray))
    top.append(("posterior mean", mean, gray))
    scale = {"vmin": 0.0, "cmap": "magma"}
    if several:
        scale["vmax"] = max(float(posterior.std.amax()), 1e-6)
        top.append(("posterior std", posterior.std, scale))
    if truth is not None and not compact:
        top.append(("|mean - truth|", (mean - truth).abs(), scale))
    bottom = [(f"draw {i + 1}", x, gray) for i, x in enumerate(posterior.flat[:samples])]
    rows = [top + bottom] if compact else [top, bottom]
    columns = max(map(len, rows))
    figure = Figure(figsize=(1.45 * columns, 1.6) if compact else (2.1 * columns, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, panels in zip(axes, rows, strict=True):
        for axis in row:
            axis.axis("off")
        for axis, (name, image, style) in zip(row, panels, strict=False):
            shown = axis.imshow(_as_picture(image, style), interpolation="nearest", **style)
            axis.set_title(name, fontsize=10)
            if style is scale:
                figure.colorbar(shown, ax=axis, shrink=0.7)
    if title:
        figure.suptitle(title, fontsize=10)
    target = Path(file)
    figure.savefig(target, dpi=110)
    return target


def _as_picture(image: Tensor, style: dict[str, Any]) -> np.ndarray[Any, np.dtype[Any]]:
    """``(C, H, W)`` as matplotlib wants it: RGB for three channels, the channels' mean otherwise."""
    array = image.detach().float().cpu().numpy()
    if array.shape[0] == 3 and style["cmap"] == "gray":
        low, high = style["vmin"], style["vmax"]
        return np.asarray(np.clip((np.moveaxis(array, 0, -1) - low) / (high - low), 0, 1))
    return np.asarray(array.mean(0))
