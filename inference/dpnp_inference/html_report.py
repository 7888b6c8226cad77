"""A run as one HTML file that needs nothing else: no server, no network, no second file.

Pictures are PNG and plots SVG, both inside of the file; the few lines of JavaScript are too, and the page's own policy
(``Content-Security-Policy``) forbids the browser to load or run anything besides. Everything is made from the run's folder, so that
``dpnp-reconstruct report RUN`` writes the same page as the run itself did.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
import yaml
from cycler import cycler
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from dpnp_inference.calibration import UNCERTAIN
from dpnp_inference.diagnostics import MEANING, Diagnosis, diagnose, functional_values
from dpnp_inference.finished_run import Run, read_run
from dpnp_inference.plots import plot_traces
from dpnp_inference.posterior import Functional, Posterior
from dpnp_inference.report import shown_range

REPORT = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
MOST_DRAWS = 60  # in the page
MOST_BYTES = 6_000_000  # of their pictures
MOST_PIXELS = 512  # along a side of a picture
MOST_POINTS = 2000  # of a line or scatter plot
CRISP = 256  # pixels along a side up to which they are shown as squares
LEVELS = (0.5, 0.8, 0.9, 0.95)
TRACED = ("mean intensity", "projection 1", "component 1", "component 2")
BLUE, ORANGE, GREEN, PURPLE = "#3b82c4", "#d9822b", "#3fa66b", "#b455a0"  # readable on white and on black
INK = "#7d7e7f"  # stands for the page's own text colour in plots
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpnp",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, PURPLE, "#c25b5b", "#5fa8a8"]),
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
}
EXACT, APPROXIMATE, LIMIT = "exact", "approximate", "exact in the limit"
ANALYTIC = ("GaussianPrior", "GaussianMixturePrior")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Picture:
    """An image in the page.

    Attributes:
        title: above it.
        alt: what it shows, for those who do not see it.
        uri: the PNG, as ``data:``.
        width: of the PNG.
        height: likewise.
        bar: URI of its colour bar, if it has one.
        low: at the bar's left end.
        high: at the right.
        note: what the picture leaves out.
    """

    title: str
    alt: str
    uri: str
    width: int
    height: int
    bar: str = ""
    low: str = ""
    high: str = ""
    note: str = ""

    @property
    def wide(self) -> bool:
        """Whether it needs a row of its own."""
        return self.width > 2.5 * self.height

    @property
    def crisp(self) -> bool:
        """Whether its pixels are to be seen."""
        return max(self.width, self.height) <= CRISP


@dataclass(frozen=True)
class Plot:
    """A drawing in the page.

    Attributes:
        title: above it.
        alt: what it shows, for those who do not see it.
        svg: safe markup.
    """

    title: str
    alt: str
    svg: Markup


def write_report(folder: str | Path, output: str | Path | None = None, *, diagnosis: Diagnosis | None = None) -> Path:
    """Write the page of a finished run, whole or not at all.

    Args:
        folder: of the run.
        output: file to write, replaced if it is there; ``report.html`` in the folder by default.
        diagnosis: of the run, if it has been made already.

    Returns:
        The file.

    Raises:
        RunFolderError: a file of the folder is missing or damaged.
        OSError: ``output`` cannot be written.
    """
    run = read_run(folder)
    target = run.folder / REPORT if output is None else Path(output)
    if target.is_dir():
        raise IsADirectoryError(f"output = {str(target)!r} is a folder; give a file")
    page = render_report(run, diagnosis=diagnosis)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(page)
        os.chmod(staged, 0o644)
        os.replace(staged, target)
    finally:
        Path(staged).unlink(missing_ok=True)
    return target


def render_report(run: Run, *, diagnosis: Diagnosis | None = None) -> str:
    """The page as text.

    Args:
        run: what is shown.
        diagnosis: of its draws; made here by default.
    """
    posterior, record = run.posterior, run.record
    diagnosis = diagnose(posterior) if diagnosis is None else diagnosis
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(REPORT)
    value_range, notes = _value_range(run)
    draws, draw_note = _draws(posterior, value_range)
    covered = coverage_table(posterior, run.truth) if run.truth is not None else []
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    return template.render(
        title=_title(record),
        run=run,
        record=record,
        diagnosis=diagnosis,
        meaning=MEANING,
        statistics=_headline(run),
        warnings=posterior.diagnostics.get("warnings", []),
        pictures=_pictures(run, value_range),
        measurement=_measurement(run.measurement),
        picture_notes=notes,
        draws=draws,
        draw_note=draw_note,
        errors=_error_plot(run),
        coverage=covered,
        coverage_plot=_coverage_plot(covered),
        traces=_trace_plot(posterior),
        iterations=_iteration_plot(posterior.diagnostics),
        stages=_stage_columns(diagnosis),
        populations=posterior.diagnostics.get("populations", []),
        population_plot=_population_plot(posterior.diagnostics),
        replicas=posterior.diagnostics.get("replica_exchange"),
        exactness=exactness(record, posterior.diagnostics),
        config=yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True, width=100),
        sampler=[(key, str(posterior.diagnostics[key])) for key in ("dds", "proximal") if key in posterior.diagnostics],
        show=_show,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def coverage_table(posterior: Posterior, truth: Tensor) -> list[dict[str, float]]:
    """How often intervals between order statistics contain the truth, for every level that so many draws have.

    Args:
        posterior: the draws.
        truth: ``(C, H, W)``.

    Returns:
        Rows of ``nominal`` (the level by construction), ``pixels`` (part of them that is covered) and ``uncertain`` (of those whose
        standard deviation is at least a tenth of the image's root-mean-square one; NaN if there are none); by growing level. No row for
        a single draw.
    """
    flat = posterior.flat
    if len(flat) < 2 and posterior.statistics is None:
        return []
    std = posterior.std
    uncertain = std >= UNCERTAIN * std.square().mean().sqrt()
    uncertain &= std > 0
    rows = []
    for nominal, inside in _inside(posterior, truth.to(flat)):
        covered = float(inside[uncertain].double().mean()) if bool(uncertain.any()) else math.nan
        rows.append({"nominal": nominal, "pixels": float(inside.double().mean()), "uncertain": covered})
    return rows


def _inside(posterior: Posterior, truth: Tensor) -> Iterable[tuple[float, Tensor]]:
    """Level, and which pixels its interval covers."""
    if posterior.statistics is not None:
        found = {}
        for level in LEVELS:
            try:
                interval = posterior.interval(level)
            except ValueError:  # too few draws for this level
                continue
            found[interval.level] = (interval.low <= truth) & (truth <= interval.high)
        yield from sorted(found.items(), key=lambda item: item[0])
        return
    flat = posterior.flat
    n = len(flat)
    depth = torch.minimum((flat <= truth).sum(0), (flat >= truth).sum(0))  # the k-th interval holds it for k up to this
    for k in range((n + 1) // 2, 0, -max(1, n // 100)):
        if n + 1 - 2 * k > 0:
            yield (n + 1 - 2 * k) / (n + 1), depth >= k


def exactness(record: Mapping[str, Any], diagnostics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What of a run's configuration is exact and what is approximate.

    Args:
        record: ``run.json``.
        diagnostics: the posterior's record.

    Returns:
        Part of the method, *exact*, *approximate* or *exact in the limit*, and why.
    """
    kernel = str(diagnostics.get("proximal", "")).partition("(")[0]
    source = record["prior"].get("source")
    rows = [
        ("prior", EXACT, f"{source} has its score in closed form.")
        if source in ANALYTIC
        else (
            "prior",
            APPROXIMATE,
            "its score is what a network has learned. Whether it knows images like yours is not tested by anything on this page.",
        ),
        (
            "denoising step",
            APPROXIMATE,
            "a differential equation solved with finitely many network calls; more of them make it as exact as the score. "
            "'dpnp-reconstruct check' shows whether they suffice.",
        ),
    ]
    if kernel == "ClosedForm":
        rows.append(("proximal step", EXACT, "drawn from its Gaussian law in closed form."))
    elif kernel == "PerturbAndSolve":
        residuals = [
            row["residual"] for batch in diagnostics.get("iterations", []) for row in batch if "residual" in row
        ]
        reached = f", here to a relative residual of {max(residuals):.0e} at worst" if residuals else ""
        rows.append(("proximal step", EXACT, f"drawn by a linear solve, as exactly as that is solved{reached}."))
    else:
        rows.append(
            (
                "proximal step",
                LIMIT,
                f"{kernel or 'the sampler'} leaves its law unchanged, and needs steps enough to come to it; acceptance and movement below.",
            )
        )
    populations = diagnostics.get("populations", [])
    last = min(diagnostics["schedule"]) if diagnostics.get("schedule") else math.nan
    if populations:
        bias = ", ".join(sorted({str(population.get("bias", "not recorded")) for population in populations}))
        rows.append(("splitting", EXACT if bias.startswith("none") else APPROXIMATE, f"bias of the splitting: {bias}."))
    elif diagnostics.get("exact_splitting"):
        rows.append(
            (
                "splitting",
                EXACT,
                f"what the coupling adds to the noise is taken out of the likelihood: no bias as long as the last coupling, {last:.3g}, is "
                "not above σ/‖A‖. The default annealing sees to that; an eta_min of your own may not.",
            )
        )
    else:
        rows.append(
            (
                "splitting",
                APPROXIMATE,
                f"draws have the law for a last coupling of {last:.3g}, which adds as much noise to the image before it is measured; a "
                "smaller eta_min makes this less and mixes more slowly.",
            )
        )
    rows.append(
        (
            "annealing",
            LIMIT,
            "chains come to their law if couplings fall slowly enough; the verdict says what can be known about it."
            if not populations
            else "weights make up for the path's pace; their error falls with the number of particles.",
        )
    )
    rows.append(
        (
            "number of draws",
            LIMIT,
            "mean, standard deviation and quantiles have a Monte Carlo error, which the diagnosis gives; intervals between order "
            "statistics hold their level at any number of draws.",
        )
    )
    return rows


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['prior'].get('name', 'prior')}: {_class_name(record.get('operator', ''))}, {_class_name(record.get('noise', ''))}"


def _class_name(text: str) -> str:
    return str(text).partition("(")[0] or "not recorded"


def _headline(run: Run) -> list[tuple[str, str]]:
    record, scores = run.posterior.diagnostics, run.record.get("scores", {})
    rows = [("draws", f"{record.get('chains', '?')} chains × {record.get('draws', '?')}")]
    if "psnr" in scores:
        rows.append(("PSNR of the mean", f"{scores['psnr']:.2f} dB"))
    if "ssim" in scores:
        rows.append(("SSIM of the mean", f"{scores['ssim']:.3f}"))
    if "coverage" in scores:
        rows.append((f"{scores['level']:.0%} intervals cover", f"{scores['coverage']:.1%} of pixels"))
    if "coverage_unseen" in scores:
        rows.append(("of unseen pixels", f"{scores['coverage_unseen']:.1%}"))
    if run.posterior.log_evidence is not None:
        error = run.posterior.log_evidence_se
        rows.append(
            ("log evidence", f"{run.posterior.log_evidence:.2f}" + ("" if error is None else f" ± {error:.2f}"))
        )
    if record.get("network_calls") is not None:
        rows.append(("network calls", f"{record['network_calls']:,}"))
    if record.get("seconds") is not None:
        rows.append(("time", f"{record['seconds']:.1f} s"))
    return rows


def _value_range(run: Run) -> tuple[tuple[float, float], list[str]]:
    """What is shown as black and white, and what must be said about it."""
    if run.value_range is not None:
        shown = shown_range(run.posterior.samples, run.value_range)
        if shown == run.value_range:
            return shown, []
        return shown, ["The draws go far beyond the prior's value range: black is {:.3g}, white {:.3g}.".format(*shown)]
    low, high = (float(value) for value in run.posterior.samples.aminmax())
    high = high if high > low else low + 1
    return (low, high), [
        f"The record has no value range: black is {low:.3g}, white {high:.3g}, the extremes of the draws."
    ]


def _pictures(run: Run, value_range: tuple[float, float]) -> list[Picture]:
    posterior = run.posterior
    several = len(posterior.flat) > 1 or posterior.statistics is not None
    found = []
    if run.truth is not None:
        found.append(_photograph("truth", "the image that was measured", run.truth, value_range))
    if run.display is not None:
        found.append(_display(run.display, value_range))
    found.append(_photograph("posterior mean", "mean of all draws", posterior.mean, value_range))
    if several:
        std = _over_channels(posterior.std)
        top = max(float(std.max()), 1e-12)
        found.append(_heat("posterior std", "standard deviation of each pixel over all draws", std, 0.0, top))
    if run.truth is not None:
        error = _over_channels(posterior.mean - run.truth.to(posterior.mean))
        top = top if several else max(float(error.max()), 1e-12)
        title = "error of the mean"
        found.append(_heat(title, "absolute difference of mean and truth, on the scale of the std", error, 0.0, top))
    return found


def _display(display: Tensor, value_range: tuple[float, float]) -> Picture:
    """The measurement as its operator shows it, in a range of its own where it is far outside of the prior's, as counts are."""
    alt = "the measurement as its operator shows it"
    picture = (display.real if display.is_complex() else display).double()
    (low, high), (first, last) = value_range, np.quantile(picture.numpy(), [0.01, 0.99])
    if first >= low - (high - low) / 2 and last <= high + (high - low) / 2:
        return _photograph("measurement", alt, picture, value_range)
    first, last = (float(value) for value in picture.aminmax())
    shown = _photograph("measurement", alt, picture, (first, last if last > first else first + 1))
    return dataclasses.replace(shown, note=_join(shown.note, f"black is {first:.3g}, white {last:.3g}"))


def _over_channels(x: Tensor) -> Array:
    """Root mean square over channels ``(H, W)``."""
    return np.asarray(x.double().square().mean(0).sqrt().numpy())


def _photograph(title: str, alt: str, x: Tensor, value_range: tuple[float, float]) -> Picture:
    """``(C, H, W)``: RGB for three channels, gray otherwise."""
    low, high = value_range
    values = ((x.detach().double() - low) / (high - low)).clamp(0, 1).numpy()
    note = "" if len(values) in (1, 3) else f"mean of {len(values)} channels"
    array = np.moveaxis(values, 0, -1) if len(values) == 3 else values.mean(0)
    array, smaller = _fit(array)
    size = f"{x.shape[-2]} × {x.shape[-1]} pixels"
    shown = np.round(255 * array).astype(np.uint8)
    return Picture(title, f"{alt}; {size}", _png(shown), shown.shape[1], shown.shape[0], note=_join(note, smaller))


def _heat(title: str, alt: str, array: Array, low: float, high: float, colours: str = "magma") -> Picture:
    """``(H, W)`` in colours, with a bar."""
    values, smaller = _fit(np.asarray(array, np.float64))
    span = high - low if high > low else 1.0
    colour_map = matplotlib.colormaps[colours]
    shown = np.asarray(colour_map(np.clip((values - low) / span, 0, 1), bytes=True))[..., :3]
    bar = np.asarray(colour_map(np.linspace(0, 1, 128)[None], bytes=True))[..., :3]
    alt = f"{alt}; from {low:.3g} to {high:.3g}"
    height, width = shown.shape[:2]
    return Picture(title, alt, _png(shown), width, height, _png(bar), f"{low:.3g}", f"{high:.3g}", smaller)


def _fit(array: Array) -> tuple[Array, str]:
    """An image ``(H, W)`` or ``(H, W, 3)`` made small enough to be shown, by averages of blocks, and a note if so."""
    h, w = array.shape[:2]
    block = math.ceil(max(h, w) / MOST_PIXELS)
    if block == 1:
        return array, ""
    by_h, by_w = min(block, h), min(block, w)
    rest = [(0, -h % by_h), (0, -w % by_w), (0, 0)][: array.ndim]
    padded = np.pad(array, rest, mode="edge")
    shape = (padded.shape[0] // by_h, by_h, padded.shape[1] // by_w, by_w, *array.shape[2:])
    return padded.reshape(shape).mean((1, 3)), f"shown at 1/{block} of its size of {h} × {w}"


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _png(array: Array) -> str:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="png", compress_level=6)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _measurement(y: Tensor) -> list[Picture | Plot]:
    """The numbers that were measured, whatever their shape."""
    size = " × ".join(map(str, y.shape)) or "1"
    if y.numel() == 0:
        return []
    values = y.detach().to(torch.complex128).numpy() if y.is_complex() else y.detach().double().numpy()
    if not np.isfinite(values).all():
        values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
    if max(y.shape, default=1) == y.numel():  # a vector
        return [_line_plot(values.reshape(-1), size)]
    parts = {"": values}
    if y.is_complex():
        parts = {"log(1 + magnitude)": np.log1p(np.abs(values)), "phase": np.angle(values)}
    found: list[Picture | Plot] = []
    for name, part in parts.items():
        planes = part.reshape(-1, *part.shape[-2:])
        if len(planes) > 4 and planes.shape[1] <= 4:  # many small tables are rows of one
            planes = planes.reshape(1, -1, planes.shape[-1])
        for i, plane in enumerate(planes[:4]):
            number = f"part {i + 1} of {len(planes)}" if len(planes) > 1 else ""
            title = _join("measurement", name, number)
            alt = f"numbers of the measurement ({size}{', complex' if y.is_complex() else ''})"
            found.append(_heat(title, alt, plane, float(part.min()), float(part.max()), "viridis"))
    return found


def _line_plot(values: Array, size: str) -> Plot:
    step = math.ceil(len(values) / MOST_POINTS)
    at = np.arange(0, len(values), step)

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        style: dict[str, Any] = {"lw": 0.9} if len(at) > 1 else {"marker": "o"}
        if np.iscomplexobj(values):
            axis.plot(at, values[at].real, label="real part", **style)
            axis.plot(at, values[at].imag, label="imaginary part", **style)
            axis.legend()
        else:
            axis.plot(at, values[at], **style)
        axis.set(xlabel="entry" if step == 1 else f"entry (every {step}th is shown)", ylabel="measured")

    return _plot("y", "measurement", f"the {size} numbers of the measurement in turn", draw, size=(7.6, 2.4))


def _draws(posterior: Posterior, value_range: tuple[float, float]) -> tuple[list[Picture], str]:
    """Draws for the slider, the first of every chain before the second of any, and what is left out."""
    chains, kept = posterior.samples.shape[:2]
    order = [(chain, draw) for draw in range(kept) for chain in range(chains)]
    chosen = [order[i] for i in _evenly(len(order), MOST_DRAWS)]
    pictures = [
        _photograph(
            f"chain {c + 1}, draw {d + 1}", f"draw {d + 1} of chain {c + 1}", posterior.samples[c, d], value_range
        )
        for c, d in chosen
    ]
    size = sum(len(picture.uri) for picture in pictures)
    if size > MOST_BYTES:
        pictures = [pictures[i] for i in _evenly(len(pictures), max(1, len(pictures) * MOST_BYTES // size))]
    note = "" if len(pictures) == len(order) else f"{len(pictures)} of {len(order)} draws, evenly chosen"
    return pictures, _join(note, *{picture.note for picture in pictures})


def _evenly(n: int, most: int) -> list[int]:
    return list(range(n)) if n <= most else [i * n // most for i in range(most)]


def _error_plot(run: Run) -> Plot | None:
    """Error against standard deviation of each pixel, and the same in bins."""
    posterior = run.posterior
    if run.truth is None or (len(posterior.flat) < 2 and posterior.statistics is None):
        return None
    std = posterior.std.double().flatten().numpy()
    error = (posterior.mean - run.truth.to(posterior.mean)).double().abs().flatten().numpy()
    varies = std > 0
    std, error = std[varies], error[varies]
    if len(std) < 20:
        return None
    order = np.argsort(std, kind="stable")
    bins = _bins(std)
    x, y = ([float(np.sqrt(np.mean(values[b] ** 2))) for b in bins] for values in (std, error))
    some = order[np.linspace(0, len(order) - 1, min(len(order), MOST_POINTS)).astype(int)]

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        axis.scatter(std[some], error[some], s=6, alpha=0.45, lw=0, color=BLUE, rasterized=True, label="a pixel each")
        top = 1.02 * float(std.max())
        axis.plot([0, top], [0, top], color=INK, ls="--", lw=1, label="error = std")
        axis.plot(x, y, "o-", color=ORANGE, ms=4, lw=1.2, label="pixels of like std, root mean square")
        axis.set(
            xlabel="posterior std of a pixel",
            ylabel="|mean − truth|",
            xlim=(0, top),
            ylim=(0, max(top, float(np.quantile(error, 0.995)))),
        )
        axis.legend(fontsize=8, loc="upper left")

    alt = f"root-mean-square error in {len(bins)} bins of pixels of growing std: " + ", ".join(
        f"{b:.2g} at std {a:.2g}" for a, b in zip(x, y, strict=True)
    )
    return _plot("errors", "error against std", alt, draw, size=(4.8, 3.6))


def _bins(std: Array) -> list[Array]:
    """Numbers of the pixels of like std: a dozen bins of equal width, joined until each has ten pixels."""
    places = np.digitize(std, np.linspace(0, std.max(), 13)[1:-1])
    found: list[Array] = []
    rest = np.zeros(0, np.int64)
    for place in range(12):
        rest = np.concatenate([rest, np.flatnonzero(places == place)])
        if len(rest) >= 10:
            found.append(rest)
            rest = rest[:0]
    if len(rest):
        found[-1:] = [np.concatenate([*found[-1:], rest])]
    return found


def _coverage_plot(rows: list[dict[str, float]]) -> Plot | None:
    if not rows:
        return None

    def draw(axes: list[Axes]) -> None:
        (axis,) = axes
        axis.plot([0, 1], [0, 1], color=INK, ls="--", lw=1, label="as promised")
        nominal = [row["nominal"] for row in rows]
        for key, colour, label in (("pixels", BLUE, "all pixels"), ("uncertain", ORANGE, "uncertain pixels")):
            axis.plot(nominal, [row[key] for row in rows], "o-", ms=3, lw=1.2, color=colour, label=label)
        axis.set(xlabel="level of the intervals", ylabel="part of the pixels they cover", xlim=(0, 1), ylim=(0, 1.02))
        axis.legend(fontsize=8)

    last = rows[-1]
    alt = f"coverage by level; intervals of {last['nominal']:.0%} cover {last['pixels']:.1%} of the pixels"
    return _plot("coverage", "coverage", alt, draw, size=(4.8, 3.6))


def _trace_plot(posterior: Posterior) -> Plot:
    values = {name: value for name, value in functional_values(posterior).items() if name in TRACED}
    chains, draws = posterior.samples.shape[:2]
    with matplotlib.rc_context(STYLE):
        figure = plot_traces(posterior, {name: _given(value) for name, value in values.items()})
        figure.set_size_inches(7.6, 1.5 * len(values))
        _set_margins(figure, len(values), 2)
        for number, axis in enumerate(figure.axes):
            axis.xaxis.set_major_locator(MaxNLocator(3 if number % 2 else "auto", integer=True))
            axis.title.set_fontsize(9)
            axis.title.set_color(INK)
        alt = f"{', '.join(values)} of the {draws} draws of each of {chains} chains in turn, each beside its histogram"
        return Plot("traces", alt, _svg("traces", figure))


def _given(value: Tensor) -> Functional:
    """A functional whose values are known."""
    return lambda _: value.flatten()


def _iteration_plot(record: Mapping[str, Any]) -> Plot | None:
    """Coupling, cost, and how well the proximal sampler does, iteration by iteration."""
    batches = [rows for rows in record.get("iterations", []) if rows]
    if not batches:
        return None
    present = {key for rows in batches for row in rows for key in row}
    panels: list[tuple[str, list[tuple[str, str]], bool]] = [("coupling η", [("eta", "")], True)]
    if "seconds" in present:
        panels.append(("seconds", [("seconds", "")], False))
    if "network_calls" in present:
        panels.append(("network calls", [("network_calls", "")], False))
    if "acceptance" in present:
        panels.append(("acceptance", [("acceptance", "mean"), ("acceptance_min", "worst chain")], False))
    if "jump" in present:
        panels.append(("movement", [("jump", "jump"), ("still", "still")], False))
    if "residual" in present:
        panels.append(("residual", [("residual", "")], True))

    def draw(axes: list[Axes]) -> None:
        for axis, (title, keys, logarithmic) in zip(axes, panels, strict=True):
            for key, label in keys:
                colour = BLUE if key == keys[0][0] else ORANGE
                for number, rows in enumerate(batches):
                    values = [row.get(key, math.nan) for row in rows]
                    if logarithmic:
                        values = [value if 0 < value < math.inf else math.nan for value in values]
                    name = label if number == 0 and label else None
                    axis.plot(range(1, len(rows) + 1), values, ".-", ms=4, lw=1, color=colour, label=name)
            plotted = [v for line in axis.lines for v in np.asarray(line.get_ydata(), float) if math.isfinite(v)]
            if logarithmic and plotted:
                axis.set_yscale("log")
            elif title in ("acceptance", "movement"):
                axis.set_ylim(-0.03, 1.03 if max(plotted, default=0) <= 1 else None)
            else:
                axis.set_ylim(bottom=0)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("iteration")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if len(keys) > 1:
                axis.legend(fontsize=7)

    some = "" if len(batches) == 1 else f", a line for each of {len(batches)} batches of chains"
    alt = f"{', '.join(panel[0] for panel in panels)} at each iteration{some}"
    rows = math.ceil(len(panels) / 3)
    return _plot("iterations", "iterations", alt, draw, size=(7.6, 2.1 * rows), panels=len(panels), columns=3)


def _population_plot(record: Mapping[str, Any]) -> Plot | None:
    populations = [population["levels"] for population in record.get("populations", []) if population.get("levels")]
    if not populations:
        return None

    def draw(axes: list[Axes]) -> None:
        for axis, (key, title) in zip(
            axes, (("ess", "effective sample size"), ("founders", "founders left")), strict=True
        ):
            for levels in populations:
                axis.plot(range(1, len(levels) + 1), [level.get(key, math.nan) for level in levels], ".-", ms=4, lw=1)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("level")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.set_ylim(bottom=0)

    alt = f"effective sample size (part of the particles) and number of founders left at each level, of {len(populations)} populations"
    return _plot("populations", "weights of the particles", alt, draw, size=(7.6, 2.3), panels=2)


def _stage_columns(diagnosis: Diagnosis) -> list[tuple[str, list[str]]]:
    """Columns of the table of couplings that have anything in them, as text."""
    columns = (
        ("coupling η", "eta", ".3g"),
        ("sweeps", "sweeps", "d"),
        ("network calls", "network_calls", "d"),
        ("forward calls", "forward_calls", "d"),
        ("seconds", "seconds", ".2f"),
        ("acceptance", "acceptance", ".2f"),
        ("residual", "residual", ".0e"),
        ("jump", "jump", ".2f"),
        ("still", "still", ".0%"),
    )
    found = []
    for title, name, form in columns:
        values = [getattr(stage, name) for stage in diagnosis.stages]
        if any(value is not None for value in values):
            found.append((title, [_show(value, form) for value in values]))
    return found


def _show(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else format(value, form)


def _plot(
    name: str,
    title: str,
    alt: str,
    draw: Callable[[list[Axes]], None],
    *,
    size: tuple[float, float],
    panels: int = 1,
    columns: int = 2,
) -> Plot:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        across = min(panels, columns)
        grid = figure.subplots(math.ceil(panels / across), across, squeeze=False)
        _set_margins(figure, *grid.shape)
        axes = list(grid.flat)
        for unused in axes[panels:]:
            unused.remove()
        draw(axes[:panels])
        return Plot(title, alt, _svg(name, figure))


def _set_margins(figure: Figure, rows: int, columns: int) -> None:
    """Room for labels of known size, in inches: asking matplotlib for it would draw everything twice."""
    width, height = figure.get_size_inches()
    left, right, bottom, top, between, above = 0.62, 0.12, 0.46, 0.28, 0.6, 0.72
    panel_w, panel_h = (width - left - right) / columns - between, (height - bottom - top) / rows - above
    figure.set_layout_engine(None)
    figure.subplots_adjust(
        left / width, bottom / height, 1 - right / width, 1 - top / height, between / panel_w, above / panel_h
    )


def _svg(name: str, figure: Figure) -> Markup:
    """The figure as markup whose ids no other figure has, in the page's own text colour."""
    FigureCanvasSVG(figure)
    file = io.StringIO()
    figure.savefig(
        file,
        format="svg",
        dpi=150,
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor")
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    return Markup(text)
