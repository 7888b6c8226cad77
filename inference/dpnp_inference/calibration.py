r"""Whether a sampler's uncertainty can be trusted, from pairs that were simulated: :math:`x \sim p(x)`, :math:`y \sim p(y \mid x)`.

Given y, the truth x and exact posterior draws :math:`x^{(1)}, \dots, x^{(L)}` are L + 1 draws from one law, so that the rank of the truth
among them is uniform on :math:`0, \dots, L`, whatever number is taken of each image. From such ranks come

- **simulation-based calibration** (Talts et al. 2018, arXiv 1804.06788): rank histograms of the pixels, of the mean intensity and of random
  projections of the image;
- **coverage of intervals**: the k-th smallest and the k-th largest draw enclose the truth with probability exactly
  :math:`(L + 1 - 2k)/(L + 1)`, that is when its rank is in :math:`k, \dots, L - k`;
- **TARP** (Lemos et al. 2023, arXiv 2302.03026): the rank of the truth's distance to a random reference point, which sees the whole image
  at once.

Ties (black pixels, quantised values) are broken at random, which keeps the rank uniform; closed intervals cover at least what is reported.
Pairs are independent, pixels of an image are not: every error bar is over pairs.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from dpnp_shared.randomness import derive_seed

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LEVELS = (0.5, 0.8, 0.95)
PROJECTIONS, REFERENCES = 16, 8
UNCERTAIN = 0.1  # of the image's root-mean-square spread
LEAST_PAIRS = 20
ERRORS, TOLERANCE, SHIFT_TOLERANCE = 3.3, 0.02, 0.03

OTHER_LAW = " Where a solver's own law is not the posterior (docs/solvers.md), only another solver helps."
PIXELS, UNCERTAIN_PIXELS, INTENSITY, PROJECTED = "pixels", "uncertain pixels", "mean intensity", "random projections"
ADVICE = {
    "fine": "no line above is off by more than chance allows; more pairs make the error bars smaller.",
    "too narrow": "the intervals promise more than they hold. Spend more on each draw (iterations of the annealing, network calls of the "
    "denoising sampler, proposals of the proximal sampler) and check again. If truths = sampler are covered meanwhile, the "
    "measurement enters rightly, and what is off is the prior as the sampler draws it: too few network calls, or a network whose noise "
    "levels contradict each other." + OTHER_LAW,
    "too wide": "the intervals are honest but larger than they need be. With DPnP lower the last coupling (eta_min), with more iterations "
    "on the way there, and check again." + OTHER_LAW,
    "biased": "the draws lie beside the truth to one side. Spend more network calls on each draw, with DPnP lower the last coupling "
    "(eta_min), and check again." + OTHER_LAW,
    "wrong shape": "the draws have tails or a middle unlike the posterior's. Spend more on each draw, and check again.",
    "too few pairs": f"at least {LEAST_PAIRS} pairs are needed to tell.",
}


@dataclass(frozen=True)
class Ranks:
    """Ranks of the truth among L draws, for n pairs; all that is needed of their images.

    Attributes:
        draws: L.
        pixels: ``(n, C, H, W)``, each in 0 … L.
        uncertain: boolean ``(n, C, H, W)``: pixels whose spread over truth and draws is at least a tenth of the image's
            root-mean-square spread. Truth and draws count alike in that, so that ranks of the chosen pixels stay uniform.
        summaries: ``(n, 1 + projections)``: mean intensity, then random projections.
        distances: ``(n, references)``: rank of the truth's distance to each reference point.
    """

    draws: int
    pixels: Integers
    uncertain: npt.NDArray[np.bool_]
    summaries: Integers
    distances: Integers

    def __len__(self) -> int:
        return len(self.pixels)

    @classmethod
    def join(cls, parts: Iterable[Ranks]) -> Ranks:
        """Pairs of several parts as one.

        Raises:
            ValueError: there is no part, or they differ in their draws or shapes.
        """
        rows = list(parts)
        shapes = {(r.draws, r.pixels.shape[1:], r.summaries.shape[1], r.distances.shape[1]) for r in rows}
        if len(shapes) != 1:
            raise ValueError(f"ranks of one number of draws and one image shape can be joined, got {sorted(shapes)}")
        names = ("pixels", "uncertain", "summaries", "distances")
        return cls(rows[0].draws, *(np.concatenate([getattr(r, name) for r in rows]) for name in names))

    def to_json(self) -> dict[str, Any]:
        """As JSON, pixels packed (zlib, base 64)."""
        return {
            "draws": self.draws,
            "shape": list(self.pixels.shape),
            "pixels": _pack(self.pixels.astype("<u2" if self.draws > 255 else "u1").tobytes()),
            "uncertain": _pack(np.packbits(self.uncertain).tobytes()),
            "summaries": self.summaries.tolist(),
            "distances": self.distances.tolist(),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Ranks:
        """What :meth:`to_json` gave."""
        shape, draws = record["shape"], int(record["draws"])
        pixels = np.frombuffer(_unpack(record["pixels"]), "<u2" if draws > 255 else "u1").astype(np.int64)
        bits = np.unpackbits(np.frombuffer(_unpack(record["uncertain"]), np.uint8))[: math.prod(shape)]
        summaries, distances = (np.asarray(record[name], np.int64) for name in ("summaries", "distances"))
        return cls(draws, pixels.reshape(shape), bits.astype(bool).reshape(shape), summaries, distances)


def rank_pair(
    truth: Tensor, draws: Tensor, *, seed: int, projections: int = PROJECTIONS, references: int = REFERENCES
) -> Ranks:
    """Ranks of one truth among draws from its posterior.

    The projections are along unit directions that are the same for all pairs. Reference points are uniform in the box that truth and draws
    span, pixel by pixel (Lemos et al. take the box of all pairs; the smaller one tells more about each posterior, and it treats truth
    and draws alike as well).

    Args:
        truth: ``(C, H, W)``.
        draws: ``(L, C, H, W)``, independent given the measurement.
        seed: not negative, another one for each pair: of reference points and ties.
        projections: how many.
        references: how many.

    Returns:
        The ranks, n = 1.

    Raises:
        ValueError: the shapes do not fit, or a value is not finite.
    """
    if truth.ndim != 3 or draws.ndim != 4 or draws.shape[1:] != truth.shape or 0 in draws.shape:
        raise ValueError(
            f"truth has shape {tuple(truth.shape)} and draws {tuple(draws.shape)}; needed are (C, H, W) and (L, C, H, W)"
        )
    x: Floats = torch.cat([truth[None].cpu(), draws.cpu()]).flatten(1).double().numpy()  # row 0 is the truth
    if not bool(np.isfinite(x).all()):
        raise ValueError("truth and draws must be finite")
    random = np.random.default_rng(derive_seed(seed))
    direction = np.random.default_rng(0).standard_normal((projections, x.shape[1]))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    low, high = x.min(0), x.max(0)
    reference = low + (high - low) * random.random((references, x.shape[1]))
    distance = np.stack([np.linalg.norm(x - r, axis=1) for r in reference], 1) if references else x[:, :0]
    spread = x.std(0)
    uncertain = spread >= max(UNCERTAIN * math.sqrt(float((spread**2).mean())), np.finfo(np.float64).tiny)
    summaries = np.concatenate([x.mean(1, keepdims=True), x @ direction.T], 1)
    shape = (1, *truth.shape)
    return Ranks(
        len(draws),
        _rank(x, random).reshape(shape),
        uncertain.reshape(shape),
        _rank(summaries, random)[None],
        _rank(distance, random)[None],
    )


def rank_pairs(truths: Tensor, draws: Tensor, *, seed: int = 0) -> Ranks:
    """Ranks of several pairs, see :func:`rank_pair`.

    Args:
        truths: ``(n, C, H, W)``.
        draws: ``(n, L, C, H, W)``.
        seed: not negative; pair i takes what ``(seed, i)`` gives.

    Raises:
        ValueError: the shapes do not fit.
    """
    if len(truths) != len(draws) or len(truths) == 0:
        raise ValueError(
            f"truths holds {len(truths)} images, draws {len(draws)} sets; needed are as many, at least one"
        )
    return Ranks.join(
        rank_pair(x, d, seed=derive_seed(seed, i)) for i, (x, d) in enumerate(zip(truths, draws, strict=True))
    )


@dataclass(frozen=True)
class Coverage:
    """How often intervals of one level contain the truth.

    Attributes:
        level: that they should cover, ``(L + 1 - 2k)/(L + 1)``.
        k: they reach from the k-th smallest to the k-th largest draw.
        covered: fraction that they do cover.
        error: standard error of that, over pairs.
        limit: how far off chance can be said to bring it, at least two per cent.
    """

    level: float
    k: int
    covered: float
    error: float
    limit: float

    @property
    def excess(self) -> float:
        """What they cover too much; negative for too little."""
        return self.covered - self.level

    @property
    def significant(self) -> bool:
        """Whether the excess is beyond the limit."""
        return abs(self.excess) > self.limit


@dataclass(frozen=True)
class Quantity:
    """One number an image, or a group of like ones.

    Attributes:
        name: what it is.
        histogram: how often each rank 0 … L was taken, summing to 1.
        histogram_error: its standard error, over pairs.
        coverages: of the intervals.
        shift: mean rank over L, minus a half; positive where the truth lies above the draws. For a group whose members may be shifted to
            different sides (projections, single pixels), that of the member that is farthest out.
        shift_errors: the shift in its standard errors, less what the farthest of so many members has by chance.
        verdict: one of the keys of ``ADVICE``.
    """

    name: str
    histogram: list[float]
    histogram_error: list[float]
    coverages: list[Coverage]
    shift: float
    shift_errors: float
    verdict: str

    def sentences(self) -> list[str]:
        """For example ``random projections: 95% intervals cover 93.1% ± 0.9%``."""
        lines = [
            f"{self.name}: {c.level:.0%} intervals cover {c.covered:.1%} ± {c.error:.1%}"
            + (
                f": too {'much' if c.excess > 0 else 'little'}"
                if c.significant and self.verdict != "too few pairs"
                else ""
            )
            for c in self.coverages
        ]
        if self.verdict == "biased":
            side = "above" if self.shift > 0 else "below"
            lines.append(
                f"{self.name}: the truth lies {side} the draws (mean rank {self.shift + 0.5:.2f} instead of 0.50)"
            )
        return lines


@dataclass(frozen=True)
class Calibration:
    """The result.

    Attributes:
        pairs: n.
        draws: L.
        quantities: pixels, uncertain pixels, mean intensity, random projections.
        credibility: levels α of the TARP curve.
        expected_coverage: fraction of truths closer to the reference point than a fraction α of the draws; α itself if calibrated.
        coverage_band: half width of its 99.9% band, simultaneous over α, by bootstrap over pairs.
        notes: what the reader should know, such as a level that so few draws cannot have.
        verdict: one of the keys of ``ADVICE``: the gravest of the uncertain pixels, the mean intensity and the projections; TARP
            decides where they see nothing.
    """

    pairs: int
    draws: int
    quantities: list[Quantity]
    credibility: list[float]
    expected_coverage: list[float]
    coverage_band: float
    notes: list[str]
    verdict: str

    @property
    def tarp_deviation(self) -> float:
        """Largest distance of the TARP curve from the diagonal, with the sign it has there."""
        gaps = np.subtract(self.expected_coverage, self.credibility)
        return float(gaps[np.abs(gaps).argmax()])

    def describe(self) -> str:
        """The result in plain words, one fact a line, the verdict last."""
        lines = [line for quantity in self.quantities for line in quantity.sentences()]
        inside = "inside" if abs(self.tarp_deviation) <= self.coverage_band else "outside"
        lines.append(
            f"whole images (TARP): farthest from the diagonal {self.tarp_deviation:+.3f}, {inside} of the 99.9% band "
            f"± {self.coverage_band:.3f}"
        )
        lines += self.notes
        return "\n".join([*lines, f"verdict: {self.verdict}; {ADVICE[self.verdict]}"])

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the description and what the verdict rests on."""
        return {
            **dataclasses.asdict(self),
            "tarp_deviation": self.tarp_deviation,
            "description": self.describe().split("\n"),
        }


def calibrate(truths: Tensor, draws: Tensor, *, seed: int = 0, levels: Sequence[float] = LEVELS) -> Calibration:
    """:func:`rank_pairs` and :func:`assess` in one.

    Args:
        truths: ``(n, C, H, W)``, draws from the prior.
        draws: ``(n, L, C, H, W)``, independent draws from the posterior of each truth's measurement.
        seed: of reference points and ties.
        levels: of the intervals.

    Raises:
        ValueError: the shapes do not fit, or a level is outside of (0, 1).
    """
    return assess(rank_pairs(truths, draws, seed=seed), levels=levels)


def assess(ranks: Ranks, *, levels: Sequence[float] = LEVELS) -> Calibration:
    r"""Histograms, coverage and a verdict from ranks.

    A verdict other than *fine* needs a departure that is beyond chance (3.3 standard errors over pairs, more for few pairs as Student's t
    has it; for the most shifted of several members, what has the same chance; for TARP its 99.9% band) and of a size that matters: coverage
    off by more than two per cent, or a mean rank off by more than 0.03 L. *biased*: the mean rank is off. Else *too narrow*: intervals of
    some level cover too little; *too wide*: too much; *wrong shape*: one level too much and another too little. All pixels are reported,
    only those that are uncertain are judged: what draws do within a hundredth of a gray level of a black background decides nothing. About
    one check in a hundred calls an exact sampler something else than fine.

    Args:
        ranks: of n pairs; a verdict needs 20.
        levels: of the intervals; one that so few draws cannot have is replaced by the widest they have, and a note says so.

    Raises:
        ValueError: a level is outside of (0, 1).
    """
    kept, notes = _order_statistics(ranks.draws, levels)
    n, top = len(ranks), ranks.draws
    pixels, uncertain = ranks.pixels.reshape(n, -1), ranks.uncertain.reshape(n, -1)
    quantities = [
        _quantity(PIXELS, pixels, np.ones_like(uncertain), top, kept),
        _quantity(UNCERTAIN_PIXELS, pixels, uncertain, top, kept),
        _quantity(INTENSITY, ranks.summaries[:, :1], None, top, kept),
        _quantity(PROJECTED, ranks.summaries[:, 1:], None, top, kept),
    ]
    credibility = (np.arange(top) + 1) / (top + 1)
    below = (ranks.distances[:, :, None] <= np.arange(top)).mean(1)  # (n, L): of each pair, over its reference points
    curve = below.mean(0)
    random = np.random.default_rng(0)
    picks = random.integers(n, size=(4000, n))
    # each bootstrap's largest departure from the curve, by the weights of its pairs
    weights = np.stack([np.bincount(pick, minlength=n) for pick in picks]) / n
    band = float(np.quantile(np.abs(weights @ below - curve).max(1), 0.999))
    calibration = Calibration(n, top, quantities, credibility.tolist(), curve.tolist(), band, notes, "fine")
    found = [q.verdict for q in quantities if q.name != PIXELS]
    verdict = next(
        (v for v in ("too few pairs", "biased", "too narrow", "wrong shape", "too wide") if v in found), "fine"
    )
    gap = calibration.tarp_deviation
    if verdict == "fine" and abs(gap) > max(band, 2 * TOLERANCE):
        verdict = "too narrow" if gap < 0 else "too wide"
        notes.append("no single quantity is off, whole images are: the draws' pixels vary together unlike the truth's")
    return dataclasses.replace(calibration, verdict=verdict)


def draws_needed(level: float) -> int:
    """The smallest number of draws that have an interval of this level: 39 for 0.95.

    Raises:
        ValueError: ``level`` is outside of (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}; it must be in (0, 1)")
    return math.ceil(2 / (1 - level) - 1e-9) - 1


def draw_calibration(file: str | Path, calibration: Calibration, *, title: str = "") -> Path:
    """Rank histograms with their bands, coverage of the intervals, and the TARP curve.

    Args:
        file: PNG to write.
        calibration: the result.
        title: one line on top.

    Returns:
        The file.
    """
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    quantities = {q.name: q for q in calibration.quantities}
    for axis, name in zip(axes.flat, (UNCERTAIN_PIXELS, INTENSITY, PROJECTED), strict=False):
        _draw_histogram(axis, quantities[name], calibration)
    _draw_histogram(axes[1, 0], quantities[PIXELS], calibration)
    bars: Axes = axes[1, 1]
    levels = [c.level for c in calibration.quantities[0].coverages]
    for i, quantity in enumerate(calibration.quantities):
        at = np.arange(len(levels)) + (i - 1.5) * 0.2
        covered, error = [c.covered for c in quantity.coverages], [2 * c.error for c in quantity.coverages]
        bars.bar(at, covered, 0.18, yerr=error, label=quantity.name, error_kw={"lw": 1})
    for i, level in enumerate(levels):
        bars.plot([i - 0.45, i + 0.45], [level, level], "k--", lw=1, label="as it should be" if i == 0 else None)
    bars.set_xticks(range(len(levels)), [f"{level:.0%}" for level in levels])
    bars.set(xlabel="level of the interval", ylim=(0, 1.5))
    bars.set_title("truths inside the intervals, ± 2 standard errors", fontsize=10)
    bars.legend(fontsize=7, loc="upper left", ncols=2)
    curve: Axes = axes[1, 2]
    alpha, band = np.array(calibration.credibility), calibration.coverage_band
    curve.fill_between(alpha, alpha - band, alpha + band, color="0.85", label="99.9% band")
    curve.plot([0, 1], [0, 1], "k--", lw=1)
    curve.plot(alpha, calibration.expected_coverage, color="C3", label="expected coverage")
    curve.set(xlabel="credibility level", xlim=(0, 1), ylim=(0, 1))
    curve.set_title("whole images (TARP)", fontsize=10)
    curve.legend(fontsize=7, loc="upper left")
    words = f"{calibration.pairs} pairs, {calibration.draws} draws each: {calibration.verdict}"
    figure.suptitle(f"{title}: {words}" if title else words, fontsize=10)
    target = Path(file)
    figure.savefig(target, dpi=110)
    return target


def _draw_histogram(axis: Axes, quantity: Quantity, calibration: Calibration) -> None:
    """Ranks in at most 20 bins, each of at least five pairs, relative to a uniform histogram."""
    ranks = len(quantity.histogram)
    bins = np.array_split(np.arange(ranks), max(1, min(20, ranks, calibration.pairs // 5)))
    share = np.array([len(b) / ranks for b in bins])
    height = np.array([sum(quantity.histogram[r] for r in b) for b in bins]) / share
    edges = np.array([b[0] for b in bins] + [ranks]) / ranks
    axis.bar(edges[:-1], height, np.diff(edges), align="edge", color="C0", edgecolor="white")
    if quantity.name == INTENSITY:  # one a pair: its counts are binomial
        ends = np.array([binomial_interval(calibration.pairs, p, 0.99) for p in share]) / calibration.pairs
        for i, p in enumerate(share):
            axis.fill_between(edges[i : i + 2], *(ends[i] / p), color="0.5", alpha=0.35, lw=0)
        axis.set_title(f"{quantity.name}, 99% binomial band", fontsize=10)
    else:
        error = [math.sqrt(sum(quantity.histogram_error[r] ** 2 for r in b)) for b in bins] / share
        axis.errorbar((edges[:-1] + edges[1:]) / 2, height, 2 * error, fmt="none", color="0.2", lw=1)
        axis.set_title(f"{quantity.name}, ± 2 standard errors", fontsize=10)
    axis.axhline(1, color="k", ls="--", lw=1)
    axis.set(xlabel="rank of the truth among the draws / (L + 1)", xlim=(0, 1))


def binomial_interval(n: int, p: float, level: float) -> tuple[int, int]:
    """Central interval of a binomial law: the smallest counts whose cumulative probability reaches each end.

    Args:
        n: trials.
        p: probability, in (0, 1].
        level: of the interval.
    """
    if p >= 1:
        return n, n
    k = np.arange(n + 1)
    log_choose = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    cumulative = np.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p)).cumsum()
    low, high = (int(np.searchsorted(cumulative, q)) for q in ((1 - level) / 2, (1 + level) / 2))
    return low, min(high, n)


def _quantity(
    name: str, ranks: Integers, where: npt.NDArray[np.bool_] | None, top: int, kept: list[tuple[float, int]]
) -> Quantity:
    """Figures of the ranks ``(n, m)`` of m members of a group, of which those count where the mask says so (all without one)."""
    n, m = ranks.shape
    mask = np.ones((n, m), bool) if where is None else where
    histogram, histogram_error = _mean_over_pairs(
        np.stack([(ranks == r) & mask for r in range(top + 1)]), mask, 1 / (top + 1)
    )
    allowed = errors_allowed(n)
    coverages = []
    for level, k in kept:
        covered, error = _mean_over_pairs(((ranks >= k) & (ranks <= top - k) & mask)[None], mask, level)
        coverages.append(
            Coverage(level, k, float(covered[0]), float(error[0]), max(allowed * float(error[0]), TOLERANCE))
        )
    shift, shift_errors = _shift(ranks, mask, top)
    narrow = any(c.significant and c.excess < 0 for c in coverages)
    wide = any(c.significant and c.excess > 0 for c in coverages)
    if n < LEAST_PAIRS:
        verdict = "too few pairs"
    elif shift_errors > allowed and abs(shift) > SHIFT_TOLERANCE:
        verdict = "biased"
    else:
        verdict = {(0, 0): "fine", (1, 0): "too narrow", (0, 1): "too wide", (1, 1): "wrong shape"}[narrow, wide]
    return Quantity(name, histogram.tolist(), histogram_error.tolist(), coverages, shift, shift_errors, verdict)


def _mean_over_pairs(hits: npt.NDArray[np.bool_], mask: npt.NDArray[np.bool_], p: float) -> tuple[Floats, Floats]:
    """Fraction of hits ``(…, n, m)`` among the members that count, and its standard error over pairs.

    The error is that of a ratio of sums. It is at least what probability p itself would give, with the dependence between members that
    is seen, and with none: a few pairs that happen to agree do not claim to be certain.
    """
    n, counts = len(mask), mask.sum(1)
    total = max(int(counts.sum()), 1)
    of_pair = hits.sum(-1)
    mean = of_pair.sum(-1) / total
    square = ((of_pair - mean[..., None] * counts) ** 2).sum(-1) * n / max(n - 1, 1)
    spread = np.maximum(total * mean * (1 - mean), 1e-9)
    dependence = np.maximum(square / spread, 1)  # variance over that of independent members
    return mean, np.sqrt(np.maximum(square, dependence * total * p * (1 - p))) / total


def errors_allowed(pairs: int) -> float:
    """3.3 standard errors, and more where few pairs know their own standard error badly (Student's t, to first order)."""
    return ERRORS + (ERRORS**3 + ERRORS) / (4 * max(pairs - 1, 1))


def _shift(ranks: Integers, mask: npt.NDArray[np.bool_], top: int) -> tuple[float, float]:
    """Mean rank over L minus a half, and in standard errors: of the whole group, or of the member that is farthest out.

    The farthest of m members is beyond z errors by chance m times as often as one is, so that its z is lowered to that of one
    member with the same chance.
    """
    centred = np.where(mask, ranks / top - 0.5, 0.0)
    variance = (1 + 2 / top) / 12  # of a uniform rank over L
    counts = mask.sum(1)
    total = max(int(counts.sum()), 1)
    shift = centred.sum() / total
    n = len(ranks)
    square = ((centred.sum(1) - shift * counts) ** 2).sum() * n / max(n - 1, 1)
    error = math.sqrt(max(square, total * variance)) / total
    found = (float(shift), abs(float(shift)) / error)
    seen = mask.sum(0)
    members = seen >= LEAST_PAIRS
    if ranks.shape[1] > 1 and members.any():
        z = centred.sum(0)[members] / np.sqrt(seen[members] * variance)
        farthest = int(np.abs(z).argmax())
        lowered = _same_chance(abs(float(z[farthest])), int(members.sum()))
        if lowered > found[1]:
            found = (float((centred.sum(0)[members] / seen[members])[farthest]), lowered)
    return found


def _same_chance(z: float, members: int) -> float:
    """The number of standard errors that one normal number exceeds as often as the largest of so many exceeds z."""
    log_tail = _log_tail(z) + math.log(members)
    if log_tail >= 0:
        return 0.0
    low, high = 0.0, z
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _log_tail(middle) > log_tail else (low, middle)
    return low


def _log_tail(z: float) -> float:
    """``log P(|N(0, 1)| > z)``, by its asymptotic form where the error function underflows."""
    tail = math.erfc(z / math.sqrt(2))
    return math.log(tail) if tail > 0 else -(z**2) / 2 - math.log(z) + 0.5 * math.log(2 / math.pi)


def _order_statistics(draws: int, levels: Sequence[float]) -> tuple[list[tuple[float, int]], list[str]]:
    """Exact levels and k of the intervals that L draws have, and a note for each that they have not."""
    kept: list[tuple[float, int]] = []
    notes = []
    for level in levels:
        needed = draws_needed(level)
        k = math.floor((draws + 1) * (1 - level) / 2 + 1e-9)
        if k < 1:
            k = 1
            widest = (draws - 1) / (draws + 1)
            notes.append(
                f"{draws} draws have no {level:.0%} interval, which needs {needed}; the widest that they have, from the smallest to "
                f"the largest, is of {widest:.0%}"
            )
        exact = (draws + 1 - 2 * k) / (draws + 1)
        if exact > 0 and (exact, k) not in kept:
            kept.append((exact, k))
    return kept, notes


def _rank(x: Floats, random: np.random.Generator) -> Integers:
    """Rank of row 0 of ``x`` ``(L + 1, m)`` among the others, ties broken at random, ``(m,)``."""
    below, equal = (x[1:] < x[0]).sum(0), (x[1:] == x[0]).sum(0)
    return np.asarray(below + random.integers(0, equal + 1), np.int64)


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
