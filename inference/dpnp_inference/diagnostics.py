r"""How far posterior draws can be trusted, as figures (through ArviZ) and as a verdict in words that follows from them by stated rules.

R-hat and effective sample sizes are those of Vehtari, Gelman, Simpson, Carpenter & Bürkner (2021, arXiv 1903.08008), as ArviZ computes
them: of every pixel and of functionals of the image (its mean intensity, random projections, the draws' own principal components, and the
user's). The usual run of this package has many chains of *one* draw each. Such draws are independent, so that their Monte Carlo error is
known without R-hat, which they do not have; whether each chain has come to its law cannot be seen from them, and the verdict says so.

The rules and their constants are described in ``docs/diagnostics.md``. From the command line::

    python -m dpnp_inference.diagnostics FOLDER [--functional path/to/file.py:name] [--against FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor

from dpnp_inference.calibration import UNCERTAIN
from dpnp_inference.fit import Fit
from dpnp_inference.plots import mean_intensity
from dpnp_inference.posterior import LEAST_DRAWS, Floats, Functional, Posterior, arviz_statistics, monte_carlo_errors
from dpnp_inference.streaming import RunningPosterior
from dpnp_inference.userfile import resolve_user_files

R_HAT = 1.01  # above it chains have not mixed (Vehtari et al. 2021, section 4)
R_HAT_DISAGREE = 1.1  # above it, and if the chains keep to themselves, they disagree
CHANCE = 0.01  # how often independent draws may be taken for ones that have not mixed
PERSISTENT = 0.75  # correlation of the two halves of a chain beyond which it is shorter than its own relaxation time
ESS = 400.0  # bulk and tail (Vehtari et al. 2021, section 4)
MOST_STAGES = 64  # that a table shows
LEAST_CHAINS = 4  # of several draws (the same)
PIXELS_ALLOWED = 0.01  # part of the judged pixels that may miss R-hat or the effective sample size
ERROR = 0.1  # Monte Carlo error of the mean, in posterior standard deviations, that is called small
LEAST_SINGLE_DRAWS = 20  # below it nothing is said about independent draws
GROUPS, GROUPS_FEW = (
    0.75,
    0.8,
)  # a split in two that explains more than 0.75 + 0.8/√n of the variance shows separate groups
GROUP = 0.05  # part of the draws that makes a group, at least 3 of them
GROUP_GAP = 4.0  # standard deviations within the groups, from where on a pixel is said to differ between them
RESIDUAL = 1e-3  # relative residual of a solve at the last coupling
EXCHANGE = 0.05  # rate below which neighbouring replicas hardly exchange
EVIDENCE = 0.5  # relative standard error of the evidence beyond which one population outweighs the others

MOST_PIXELS = 4096  # that ArviZ is asked about, a few milliseconds each
PROJECTIONS, COMPONENTS = 4, 4
MOST_FOR_COMPONENTS = 1000  # draws

Verdict = Literal["converged", "no objection", "run longer", "chains disagree", "too few draws", "misfit"]
Kind = Literal["chains", "population", "replica exchange"]
MEANING: dict[str, str] = {
    "converged": "nothing that was looked at speaks against these draws, and R-hat or independent populations could have shown it.",
    "no objection": "nothing speaks against these draws, but they are of a kind that cannot show convergence either.",
    "run longer": "these draws do not yet give what their number promises.",
    "chains disagree": "chains keep to values of their own, which a longer run will hardly mend.",
    "too few draws": "nothing can be said about so few.",
    "misfit": "these draws do not explain the measurement as the forward model's posterior would.",
}


@dataclass(frozen=True)
class FunctionalSummary:
    """A number taken of each draw.

    Attributes:
        name: of the functional.
        mean: over all draws.
        std: likewise.
        mcse_mean: Monte Carlo standard error of the mean; None where it cannot be had.
        mcse_std: of the standard deviation, likewise.
        r_hat: rank-normalised split R-hat; None for fewer than 4 draws a chain, one chain, or a constant.
        ess_bulk: None for fewer than 4 draws a chain or a constant.
        ess_tail: likewise.
        persistence: correlation of a chain's two halves, see :func:`persistence`; None as R-hat.
        groups: sizes of two separate groups of chains, if there are such.
    """

    name: str
    mean: float
    std: float
    mcse_mean: float | None
    mcse_std: float | None
    r_hat: float | None
    ess_bulk: float | None
    ess_tail: float | None
    persistence: float | None
    groups: tuple[int, int] | None


@dataclass(frozen=True)
class PixelSummary:
    """All pixels in a few figures; :attr:`Diagnosis.maps` has each.

    Attributes:
        total: entries of an image.
        constant: those that no draw changes. They have no R-hat, and decide nothing.
        judged: those whose standard deviation is at least a tenth of the image's root-mean-square one. They decide.
        evaluated: those of them that ArviZ was asked about: all, or the ones of largest split R-hat before ranks are taken.
        mcse_mean: median over the judged pixels of the Monte Carlo error of the mean over the standard deviation.
        mcse_std: likewise of the standard deviation's; None where only statistics were kept.
        r_hat: largest of a judged pixel; infinite where every chain stands still at a value of its own.
        r_hat_limit: from where on R-hat counts; see :func:`r_hat_limit`.
        above: judged pixels above the limit.
        disagree: judged pixels by which chains disagree.
        ess_bulk: smallest of a judged pixel; that by batch means where only statistics were kept.
        ess_tail: likewise; None where only statistics were kept.
        short: judged pixels of a bulk or tail effective sample size that is too small.
        worst: the ten judged pixels of largest R-hat: ``c``, ``h``, ``w``, ``r_hat``, ``ess_bulk``, ``ess_tail``.
    """

    total: int
    constant: int
    judged: int
    evaluated: int
    mcse_mean: float | None
    mcse_std: float | None
    r_hat: float | None = None
    r_hat_limit: float | None = None
    above: int = 0
    disagree: int = 0
    ess_bulk: float | None = None
    ess_tail: float | None = None
    short: int = 0
    worst: list[dict[str, float]] = field(default_factory=list)

    @property
    def ess(self) -> float | None:
        """The smaller of the two effective sample sizes, as far as there are."""
        return min((ess for ess in (self.ess_bulk, self.ess_tail) if ess is not None), default=None)


@dataclass(frozen=True)
class Stage:
    """All sweeps at one coupling, of all batches of chains.

    Attributes:
        eta: coupling, in image units.
        sweeps: how many.
        network_calls: each on a batch; None where the record does not have it, also for the next two.
        forward_calls: likewise.
        seconds: wall time.
        acceptance: mean over sweeps and chains; None for a sampler without Metropolis step.
        acceptance_min: of the worst chain in the worst sweep.
        residual: largest relative residual of a solve.
        jump: how far a draw goes, in parts of an independent one's way.
        still: part of the draws that stay where they were.
        non_finite: proposals at which the likelihood was not finite.
    """

    eta: float
    sweeps: int
    network_calls: int | None = None
    forward_calls: int | None = None
    seconds: float | None = None
    acceptance: float | None = None
    acceptance_min: float | None = None
    residual: float | None = None
    jump: float | None = None
    still: float | None = None
    non_finite: int | None = None


@dataclass(frozen=True)
class Halves:
    r"""How much the other half of the chains changes the answer: even against odd chains.

    Attributes:
        mean: root-mean-square difference of the two means over the judged pixels, in posterior standard deviations.
        mean_expected: the same for independent draws, :math:`2/\sqrt n`.
        std: root-mean-square relative difference of the two standard deviations.
        std_expected: the same for independent normal draws, :math:`\sqrt{2/n}`.
    """

    mean: float
    mean_expected: float
    std: float
    std_expected: float


@dataclass(frozen=True)
class Diagnosis:
    """What is known about a posterior's draws. It prints as a table, and :meth:`to_json` gives it to machines.

    Attributes:
        verdict: *converged*, *no objection*, *run longer*, *chains disagree*, *too few draws* or *misfit*.
        reasons: of the verdict, one sentence each.
        notes: what else is worth knowing, and what cannot be known from these draws.
        kind: of the sampler.
        chains: how many.
        draws: of each chain.
        functionals: their summaries.
        pixels: summary of the pixels.
        halves: comparison of even and odd chains; None for fewer than 4 chains, or of single draws in a population.
        stages: per coupling, from the largest on.
        fit: how well the draws explain the measurement; None where the record does not have it.
        network_calls: of the whole run, as it is recorded; None where it is not, also for the next two.
        forward_calls: likewise.
        seconds: likewise.
        maps: ``(C, H, W)`` each, NaN where not evaluated: ``r_hat``, ``ess_bulk``, ``ess_tail`` (from 4 draws a chain on), ``mcse_mean``,
            ``mcse_std``, ``disagree`` (1 at the pixels by which chains disagree, else 0). Not part of the JSON form.
    """

    verdict: Verdict
    reasons: list[str]
    notes: list[str]
    kind: Kind
    chains: int
    draws: int
    functionals: list[FunctionalSummary]
    pixels: PixelSummary
    halves: Halves | None
    stages: list[Stage]
    fit: Fit | None
    network_calls: int | None
    forward_calls: int | None
    seconds: float | None
    maps: dict[str, Tensor] = field(repr=False, compare=False)

    @property
    def sentence(self) -> str:
        """The verdict with its first reason, for one line."""
        return f"{self.verdict}: {self.reasons[0] if self.reasons else MEANING[self.verdict]}"

    def describe(self) -> str:
        """Verdict, meaning, reasons, notes and fit in plain words, one a line."""
        lines = [f"verdict: {self.verdict}; {MEANING[self.verdict]}"]
        lines += [f"because {reason}" for reason in self.reasons] + [f"note: {note}" for note in self.notes]
        if self.fit is not None:
            lines.append(f"fit: {self.fit.describe()}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As JSON, without the maps. A number that is not finite becomes ``None``."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "maps"}
        json_able: dict[str, Any] = _finite(values)
        return json_able

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colour = {"converged": "green", "no objection": "cyan", "run longer": "yellow"}.get(self.verdict, "red")
        yield Text(f"{_count(self.chains, 'chain')}, {_count(self.draws, 'draw')} each", style="bold")
        yield from (Text(), self._functional_table(), Text(), Text(self._pixel_line()), Text())
        if self.stages:
            yield from (self._stage_table(), Text())
        first, *others = self.describe().split("\n")
        yield Group(Text(first, style=f"bold {colour}"), *(Text(line) for line in others))

    def _functional_table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        table.add_column("functional", no_wrap=True)
        for name in ("mean", "± error", "std", "± error", "R-hat", "bulk ESS", "tail ESS"):
            table.add_column(name, justify="right")
        for f in self.functionals:
            numbers = (f.mean, f.mcse_mean, f.std, f.mcse_std)
            table.add_row(
                f.name,
                *(_show(x, ".3g") for x in numbers),
                _show(f.r_hat, ".3f"),
                _show(f.ess_bulk, ".0f"),
                _show(f.ess_tail, ".0f"),
            )
        return table

    def _stage_table(self) -> Table:
        columns: list[tuple[str, str, str]] = [
            ("coupling η", "eta", ".3g"),
            ("sweeps", "sweeps", "d"),
            ("network calls", "network_calls", "d"),
            ("forward calls", "forward_calls", "d"),
            ("seconds", "seconds", ".2f"),
            ("acceptance", "acceptance", ".2f"),
            ("residual", "residual", ".0e"),
            ("jump", "jump", ".2f"),
            ("still", "still", ".0%"),
        ]
        kept = [column for column in columns if any(getattr(stage, column[1]) is not None for stage in self.stages)]
        table = Table(box=None, pad_edge=False)
        for name, _, _ in kept:
            table.add_column(name, justify="right")
        every = math.ceil(len(self.stages) / MOST_STAGES)  # of a solver with a thousand noise levels some are shown
        for stage in [*self.stages[:-1:every], self.stages[-1]]:
            table.add_row(*(_show(getattr(stage, attribute), form) for _, attribute, form in kept))
        return table

    def _pixel_line(self) -> str:
        p = self.pixels
        parts = [f"pixels: {p.total}, of which {p.constant} never change and {p.judged} vary enough to be judged"]
        if p.r_hat is not None:
            parts.append(f"worst R-hat {_show(p.r_hat, '.3f')}, {p.above} above {_show(p.r_hat_limit, '.3f')}")
        if p.ess_bulk is not None:
            parts.append(f"least bulk ESS {_show(p.ess_bulk, '.0f')}, tail ESS {_show(p.ess_tail, '.0f')}")
        if p.mcse_mean is not None:
            parts.append(f"Monte Carlo error of the mean {p.mcse_mean:.2g} standard deviations (median)")
        if self.halves is not None:
            h = self.halves
            parts.append(
                f"even and odd chains' means differ by {h.mean:.2g} standard deviations ({h.mean_expected:.2g} expected)"
            )
        return "; ".join(parts)


def diagnose(posterior: Posterior, functionals: Mapping[str, Functional] | Sequence[str] = ()) -> Diagnosis:
    """Look at a posterior's draws and at the record of how they came about.

    Where a run has kept :attr:`statistics <dpnp_inference.posterior.Posterior.statistics>` in place of its draws, the pixels are judged by
    these, by split R-hat without ranks and the effective sample size by batch means; functionals are those of the draws that were kept, and
    are shown without being judged.

    Args:
        posterior: the draws, of any number of chains and draws.
        functionals: numbers to look at beside the built-in ones, each a callable ``(n, C, H, W)`` to ``(n,)``: by name, or a list of class
            paths and of ``path/to/file.py:name`` as for :func:`load_functionals`.

    Returns:
        Figures and verdict.

    Raises:
        ValueError: a functional cannot be found, has a built-in one's name, or gives something else than a finite number for each draw;
            or the draws are not finite.
    """
    chains, draws = posterior.samples.shape[:2]
    values = functional_values(posterior, functionals)
    record = posterior.diagnostics
    kind: Kind = (
        "population" if "populations" in record else "replica exchange" if "replica_exchange" in record else "chains"
    )
    summaries, stages, notes = _summarise(values), stages_of(record), list[str]()
    statistics = posterior.statistics
    if statistics is not None and statistics.kept_draws >= LEAST_DRAWS:
        chains, draws, halves = len(statistics.chains), statistics.kept_draws, None
        pixels, maps = _look_at_statistics(statistics)
        notes.append(
            f"pixels are judged by statistics of {statistics.count} draws, of which {len(posterior.flat)} were kept; functionals are of "
            "these, and not judged"
        )
        judged_functionals: list[FunctionalSummary] = []
    else:
        x = posterior.samples.flatten(2).double().numpy()
        judged = _judged(_spread(x.reshape(-1, x.shape[2])))
        pixels, maps = _look_at_pixels(x, judged, tuple(posterior.samples.shape[2:]))
        halves = None if chains < 4 or len(judged) == 0 else _halves(x[..., judged], draws)
        judged_functionals = summaries
    reasons, verdict = _judge(kind, chains, draws, judged_functionals, pixels, stages, record, notes)
    fit = Fit.of(record)
    misfit = _look_at_fit(fit, notes)
    if fit is None and "fit" in record:
        notes.append("whether the draws explain the measurement could not be found out; the log says why")
    if misfit:
        reasons, verdict = [*misfit, *reasons], "misfit"
    calls = {name: record.get(name) for name in ("network_calls", "forward_calls", "seconds")}
    return Diagnosis(
        verdict, reasons, notes, kind, chains, draws, summaries, pixels, halves, stages, fit, **calls, maps=maps
    )


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart in one functional.

    Attributes:
        name: of the functional.
        mean: difference of the means, in standard deviations of all draws.
        mean_error: its Monte Carlo standard error, likewise.
        std: logarithm of the ratio of the standard deviations.
        std_error: its Monte Carlo standard error.
    """

    name: str
    mean: float
    mean_error: float
    std: float
    std_error: float

    @property
    def errors(self) -> float:
        """The larger of the two differences, in its standard errors; infinite for constants that differ."""
        pairs = ((self.mean, self.mean_error), (self.std, self.std_error))
        return max(abs(d) / error if error > 0 else math.inf if d else 0.0 for d, error in pairs)


@dataclass(frozen=True)
class Comparison:
    """Whether two runs draw from one law, as far as functionals of the image and so many draws can tell. It prints as a table.

    Attributes:
        differences: of each functional.
        limit: standard errors beyond which a difference counts; chance exceeds it in one comparison of equal laws in a hundred.
        pixels: root-mean-square difference of the mean images over the judged pixels, in standard deviations of all draws.
        pixels_expected: the same from Monte Carlo error alone.
        notes: what else is worth knowing.
    """

    differences: list[Difference]
    limit: float
    pixels: float
    pixels_expected: float
    notes: list[str]

    @property
    def differ(self) -> list[Difference]:
        """Those beyond the limit."""
        return [d for d in self.differences if d.errors > self.limit]

    def describe(self) -> str:
        """The result in plain words, one fact a line."""
        images = (
            f"the mean images differ by {self.pixels:.2g} posterior standard deviations (root mean square), {self.pixels_expected:.2g} are "
            "expected from Monte Carlo error"
        )
        if self.differ:
            worst = max(self.differ, key=lambda d: d.errors)
            by = f"{_list([d.name for d in self.differ])} (up to {_show(worst.errors, '.1f')} standard errors)"
            found = f"verdict: the runs differ, by {by}"
        else:
            seen = max((self.limit * d.mean_error for d in self.differences), default=math.inf)
            found = (
                f"verdict: no difference found; one of the means by {seen:.2g} standard deviations would show, "
                "a smaller one needs more draws"
            )
        return "\n".join([images, found, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """As JSON, with the description. A number that is not finite becomes ``None``."""
        json_able: dict[str, Any] = _finite({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return json_able | {"differ": [d.name for d in self.differ], "description": self.describe().split("\n")}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, pad_edge=False)
        table.add_column("difference of", no_wrap=True)
        for name in ("means / std", "± error", "log std", "± error", "standard errors"):
            table.add_column(name, justify="right")
        for d in self.differences:
            numbers = (_show(x, ".2f") for x in (d.mean, d.mean_error, d.std, d.std_error))
            table.add_row(d.name, *numbers, _show(d.errors, ".1f"))
        yield from (table, Text(), Text(self.describe()))


def compare(a: Posterior, b: Posterior, functionals: Mapping[str, Functional] | Sequence[str] = ()) -> Comparison:
    """Look for differences between two runs, such as one with twice as slow an annealing: in means and standard deviations of functionals.

    The built-in functionals are those of :func:`diagnose`, with the principal components of both runs' draws together. Of runs that kept
    statistics in place of draws, the draws that were kept are compared.

    Args:
        a: one posterior.
        b: another of images of the same shape, with randomness of its own (another seed).
        functionals: as for :func:`diagnose`.

    Returns:
        The differences and whether they are more than chance.

    Raises:
        ValueError: shapes differ, a run has too few draws for a Monte Carlo error, or as for :func:`diagnose`.
    """
    if a.samples.shape[2:] != b.samples.shape[2:]:
        shapes = " and ".join(str(tuple(run.samples.shape[2:])) for run in (a, b))
        raise ValueError(f"images of {shapes} cannot be compared; shapes must be equal")
    flat = torch.cat([run.flat.flatten(1).double() for run in (a, b)])
    runs = [functional_values(run, functionals, of=flat) for run in (a, b)]
    stacked = [torch.stack(list(values.values()), dim=2).numpy() for values in runs]
    differences = [Difference(name, *(float(v[i]) for v in _differences(*stacked))) for i, name in enumerate(runs[0])]
    independent = [len(run.samples) for run in (a, b) if run.samples.shape[1] < LEAST_DRAWS]
    chance = CHANCE / (4 * len(differences))  # of means and standard deviations, to either side
    limit = float(stats.t.isf(chance, min(independent) - 1) if independent else stats.norm.isf(chance))
    x = [run.samples.flatten(2).double().numpy() for run in (a, b)]
    judged = _judged(_spread(flat.numpy()))
    pixels, expected = 0.0, 0.0
    if len(judged):
        mean, error, *_ = _differences(*(part[..., judged] for part in x))
        pixels, expected = (math.sqrt(float((v**2).mean())) for v in (mean, error))
    notes = []
    if any("populations" in run.diagnostics for run in (a, b)):
        notes.append(
            "particles share ancestors: Monte Carlo errors are lower bounds, and a difference of a few of them may be chance"
        )
    seeds = [run.diagnostics.get("seed") for run in (a, b)]
    if seeds[0] is not None and seeds[0] == seeds[1]:
        notes.append(
            f"both runs have seed {seeds[0]} and may share randomness, which hides differences; give one of them another"
        )
    return Comparison(differences, limit, pixels, expected, notes)


def _differences(a: Floats, b: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Of two runs' quantities ``(chains, draws, m)``: of means with error, of logarithmic standard deviations with error."""
    spread = np.concatenate([x.reshape(-1, x.shape[2]) for x in (a, b)]).std(0, ddof=1)
    errors = [monte_carlo_errors(x, "mcse_mean", "mcse_std") for x in (a, b)]
    std = [x.std((0, 1), ddof=1) for x in (a, b)]
    scale = np.where(spread > 0, spread, 1.0)
    mean_error = np.hypot(*(e["mcse_mean"] for e in errors)) / scale
    relative = [
        np.divide(e["mcse_std"], s, out=np.zeros_like(s), where=s > 0) for e, s in zip(errors, std, strict=True)
    ]
    both = (std[0] > 0) & (std[1] > 0)
    ratio = np.log(np.where(both, std[0], 1.0) / np.where(both, std[1], 1.0))
    return (a.mean((0, 1)) - b.mean((0, 1))) / scale, mean_error, ratio, np.hypot(*relative)


def load_functionals(paths: Sequence[str]) -> dict[str, Functional]:
    """Functionals by class path.

    Args:
        paths: ``package.module.name`` or ``path/to/file.py:name``, of a function or of a class that is made without arguments.

    Returns:
        By the last part of their paths.

    Raises:
        ValueError: there is no such thing, it cannot be called, or two have one name.
    """
    found: dict[str, Functional] = {}
    for path in paths:
        module_name, _, name = str(resolve_user_files(path)).rpartition(".")
        try:
            f = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"functional {path!r} cannot be found ({error}); give package.module.name or path/to/file.py:name"
            ) from error
        f = f() if isinstance(f, type) else f
        if not callable(f):
            raise ValueError(
                f"functional {path!r} is a {type(f).__name__}; it must be callable, images (n, C, H, W) to numbers (n,)"
            )
        if name in found:
            raise ValueError(f"functionals: two are named {name!r}; rename one")
        found[name] = f
    return found


def r_hat_limit(chains: int, draws: int, quantities: int = 1) -> float:
    r"""From where on split R-hat says that chains have not mixed.

    Of independent normal draws in 2m half chains of length n, :math:`\hat R^2 = (n - 1 + F)/n`, with F in the F distribution of
    :math:`2m - 1` and :math:`2m(n - 1)` degrees of freedom. The limit is 1.01, or where that is larger, what the largest of so many
    quantities exceeds by chance once in a hundred times (by Bonferroni's bound; bulk and tail are two).

    Args:
        chains: m, at least 1.
        draws: of a chain, at least 4; n is half of it.
        quantities: how many are looked at.
    """
    n, halves = draws // 2, 2 * chains
    f = float(stats.f.isf(CHANCE / (2 * max(quantities, 1)), halves - 1, halves * (n - 1)))
    return max(R_HAT, math.sqrt((n - 1 + f) / n))


def persistence(x: Floats) -> Floats:
    r"""Intraclass correlation of the means of a chain's two halves, :math:`(B - W)/(B + W)`.

    B is twice the variance of the chains' means, W half the mean square difference of their halves. Chains that mix have about 0, chains
    that stand apart for good have 1. A chain with exponential autocorrelation has 0.73 where its length is one relaxation time.

    Args:
        x: ``(chains, draws, m)``, of at least 2 chains and 2 draws.

    Returns:
        ``(m,)``, in [-1, 1]; 0 where nothing varies.
    """
    n = x.shape[1] // 2
    first, second = x[:, :n].mean(1), x[:, -n:].mean(1)
    between = 2 * ((first + second) / 2).var(0, ddof=1)
    within = ((first - second) ** 2).mean(0) / 2
    total = between + within
    return np.asarray(np.divide(between - within, total, out=np.zeros_like(total), where=total > 0))


def find_groups(x: Floats) -> tuple[int, int] | None:
    r"""Whether independent numbers fall into two separate groups.

    Sorted numbers are cut where the cut explains most of their variance (two-means clustering in one dimension). Of a normal law it
    explains 64% of it, of a uniform one 75%; groups are reported beyond :math:`0.75 + 0.8/\sqrt n`, which n uniform numbers exceed about
    once in a thousand times, and normal, exponential or heavy-tailed ones less often.

    Args:
        x: ``(n,)``.

    Returns:
        Sizes of the lower and the upper group; None if there are no such groups, or fewer than 20 numbers.
    """
    n = len(x)
    if n < LEAST_SINGLE_DRAWS or not np.ptp(x) > 0:
        return None
    least = max(3, math.ceil(GROUP * n))
    centred = np.sort(x) - x.mean()
    size = np.arange(1, n)
    explained = np.cumsum(centred)[:-1] ** 2 * (1 / size + 1 / (n - size)) / (centred**2).sum()
    explained[: least - 1] = explained[n - least :] = 0
    cut = int(explained.argmax())
    return (cut + 1, n - cut - 1) if explained[cut] > GROUPS + GROUPS_FEW / math.sqrt(n) else None


def stages_of(record: Mapping[str, Any]) -> list[Stage]:
    """The iterations of a run's record, summed up for each coupling, in the order in which they came.

    Args:
        record: ``Posterior.diagnostics``; one without iterations has no stages.
    """
    rows: dict[float, list[dict[str, float]]] = {}
    for batch in record.get("iterations", []):
        for row in batch:
            rows.setdefault(row["eta"], []).append(row)
    return [_stage(eta, of_eta) for eta, of_eta in rows.items()]


def _stage(eta: float, rows: list[dict[str, float]]) -> Stage:
    def over(name: str, combine: Any) -> Any:
        values = [row[name] for row in rows if name in row]
        return combine(values) if values else None

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    counts = {name: over(name, lambda v: int(sum(v))) for name in ("network_calls", "forward_calls", "non_finite")}
    return Stage(
        eta,
        len(rows),
        seconds=over("seconds", sum),
        acceptance=over("acceptance", mean),
        acceptance_min=over("acceptance_min", min),
        residual=over("residual", max),
        jump=over("jump", mean),
        still=over("still", mean),
        **counts,
    )


def functional_values(
    posterior: Posterior, functionals: Mapping[str, Functional] | Sequence[str] = (), *, of: Tensor | None = None
) -> dict[str, Tensor]:
    """Functionals of each draw: the built-in ones (mean intensity, random projections, principal components) and the user's.

    Args:
        posterior: the draws.
        functionals: as for :func:`diagnose`.
        of: draws ``(n, d)`` whose principal components are taken; the posterior's own by default.

    Returns:
        ``(chains, draws)`` by name.

    Raises:
        ValueError: as for :func:`diagnose`.
    """
    if not bool(torch.isfinite(posterior.samples).all()):
        raise ValueError("samples contains values that are not finite; draws that have broken down cannot be diagnosed")
    given = dict(functionals) if isinstance(functionals, Mapping) else load_functionals(functionals)
    values = _built_in(posterior, posterior.flat.flatten(1).double() if of is None else of)
    for name, f in given.items():
        if name in values:
            raise ValueError(f"functionals: {name!r} is the name of a built-in functional; built in are {list(values)}")
        values[name] = posterior.functional(f).double()
    return values


def _built_in(posterior: Posterior, of: Tensor) -> dict[str, Tensor]:
    """Mean intensity, random projections and principal components of given draws, ``(chains, draws)`` each."""
    flat = posterior.flat.flatten(1).double()
    values = {"mean intensity": mean_intensity(posterior.flat.double())}
    u = torch.randn(flat.shape[1], PROJECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = {f"projection {i + 1}": v for i, v in enumerate((u / u.norm(dim=0)).T)}
    directions |= {f"component {i + 1}": v for i, v in enumerate(_components(of))}
    values |= {name: flat @ v for name, v in directions.items()}
    if bool((flat == flat[0]).all()):  # equal images have equal numbers, whatever the rounding of their products
        values = {name: value[:1].expand(len(flat)) for name, value in values.items()}
    return {name: value.reshape(posterior.samples.shape[:2]) for name, value in values.items()}


def _components(flat: Tensor) -> list[Tensor]:
    """The first principal directions of draws ``(n, d)``, ``(d,)`` each, the largest entry positive."""
    centred = flat - flat.mean(0)
    # from evenly spaced draws where there are many: the Gram matrix of n draws has n² entries
    some = centred[:: math.ceil(len(centred) / MOST_FOR_COMPONENTS)]
    power, vectors = torch.linalg.eigh(some @ some.T)
    found = []
    for i in range(min(COMPONENTS, len(some))):
        if power[-1 - i] > 1e-12 * power[-1]:
            direction = some.T @ vectors[:, -1 - i]
            direction = direction / direction.norm()
            found.append(direction * direction[direction.abs().argmax()].sign())
    return found


def _summarise(values: dict[str, Tensor]) -> list[FunctionalSummary]:
    x = torch.stack(list(values.values()), dim=2).numpy()
    chains, draws, _ = x.shape
    varies = np.ptp(x, axis=(0, 1)) > 0
    columns: dict[str, list[float | None]] = {}
    if chains > 1 or draws >= LEAST_DRAWS:
        columns |= {name: v.tolist() for name, v in monte_carlo_errors(x, "mcse_mean", "mcse_std").items()}
    if draws >= LEAST_DRAWS:
        names = ("ess_bulk", "ess_tail") if chains == 1 else ("r_hat", "ess_bulk", "ess_tail")
        for name, value in _of_varying(x, varies, *names).items():
            columns[name] = [None if np.isnan(v) else float(v) for v in value]
        if chains > 1:
            columns["persistence"] = [float(p) if v else None for p, v in zip(persistence(x), varies, strict=True)]
    of_chains = x.mean(1)
    return [
        FunctionalSummary(
            name,
            float(x[..., i].mean()),
            float(x[..., i].std(ddof=1)) if chains * draws > 1 else 0.0,
            **{
                key: columns[key][i] if key in columns else None
                for key in ("mcse_mean", "mcse_std", "r_hat", "ess_bulk", "ess_tail", "persistence")
            },
            groups=find_groups(of_chains[:, i]),
        )
        for i, name in enumerate(values)
    ]


def _of_varying(x: Floats, varies: Any, *names: str) -> dict[str, Floats]:
    """ArviZ's statistics, NaN where nothing varies."""
    found = {name: np.full(x.shape[2], np.nan) for name in names}
    if varies.any():
        for name, value in arviz_statistics(x[..., varies], *names).items():
            found[name][varies] = value
    return found


def _spread(x: Floats) -> Floats:
    """Standard deviations of ``(n, m)``, exactly 0 where nothing varies, which rounding of the mean may hide."""
    return np.asarray(np.where(np.ptp(x, axis=0) > 0, x.std(0), 0.0))


def _judged(spread: Floats) -> Any:
    """Numbers of the pixels that decide, by their standard deviations ``(m,)``."""
    return np.flatnonzero((spread > 0) & (spread >= UNCERTAIN * math.sqrt(float((spread**2).mean()))))


def _look_at_statistics(statistics: RunningPosterior) -> tuple[PixelSummary, dict[str, Tensor]]:
    """Summary and maps of the pixels of a run whose draws were not kept; R-hat and what needs it as far as chains are complete."""
    spread = statistics.std.double().flatten().numpy()
    judged = _judged(spread)
    found = {"ess_bulk": statistics.ess, "mcse_mean": statistics.mcse_mean}
    if len(statistics.chains) > 1:
        found["r_hat"] = statistics.r_hat
    flat = {name: value.double().flatten().numpy() for name, value in found.items()}
    error = float(np.median(flat["mcse_mean"][judged] / spread[judged])) if len(judged) else None
    summary = PixelSummary(len(spread), int((spread == 0).sum()), len(judged), len(judged), error, None)
    if len(judged):
        alone = len(statistics.chains) == 1
        persistent = np.zeros(len(judged)) if alone else statistics.persistence.flatten().numpy()[judged]
        summary = _summarise_pixels(
            summary,
            judged,
            flat,
            persistent >= PERSISTENT,
            len(statistics.chains),
            statistics.kept_draws,
            statistics.image_shape,
        )
    return summary, {name: torch.from_numpy(value).reshape(statistics.image_shape) for name, value in flat.items()}


def _look_at_pixels(x: Floats, judged: Any, shape: tuple[int, ...]) -> tuple[PixelSummary, dict[str, Tensor]]:
    """Summary and maps of the pixels ``(chains, draws, m)``, of which some are judged (their numbers)."""
    chains, draws, total = x.shape
    constant = int((np.ptp(x, axis=(0, 1)) == 0).sum())
    several = draws >= LEAST_DRAWS
    evaluated = judged
    if several and len(judged) > MOST_PIXELS:
        order = np.argsort(-_plain_r_hat(x[..., judged]), kind="stable")
        evaluated = np.sort(judged[order[:MOST_PIXELS]])
    found: dict[str, Floats] = {}
    errors: tuple[float | None, float | None] = (None, None)
    if chains > 1 or several:
        where = evaluated if several else np.arange(total)
        for name, value in monte_carlo_errors(x[..., where], "mcse_mean", "mcse_std").items():
            found[name] = np.full(total, np.nan)
            found[name][where] = value
        if len(judged):
            std = x[..., evaluated].std((0, 1), ddof=1)
            errors = (
                float(np.median(found["mcse_mean"][evaluated] / std)),
                float(np.median(found["mcse_std"][evaluated] / std)),
            )
    summary = PixelSummary(total, constant, len(judged), len(evaluated), *errors)
    if several and len(judged):
        names = ("ess_bulk", "ess_tail") if chains == 1 else ("r_hat", "ess_bulk", "ess_tail")
        for name, value in arviz_statistics(x[..., evaluated], *names).items():
            found[name] = np.full(total, np.nan)
            found[name][evaluated] = value
        persistent = persistence(x[..., evaluated]) >= PERSISTENT if chains > 1 else np.zeros(len(evaluated), bool)
        summary = _summarise_pixels(summary, evaluated, found, persistent, chains, draws, shape)
    maps = {name: torch.from_numpy(value).reshape(shape) for name, value in found.items()}
    return summary, maps


def _summarise_pixels(
    summary: PixelSummary,
    evaluated: Any,
    found: dict[str, Floats],
    persistent: Any,
    chains: int,
    draws: int,
    shape: tuple[int, ...],
) -> PixelSummary:
    """Add what chains of several draws tell; ``found`` gets the map of pixels by which chains disagree."""
    ess = {name: found[name][evaluated] for name in ("ess_bulk", "ess_tail") if name in found}
    least = {name: float(value.min()) for name, value in ess.items()}
    short = int((np.min(list(ess.values()), axis=0) < ESS).sum())
    summary = dataclasses.replace(summary, short=short, ess_bulk=least["ess_bulk"], ess_tail=least.get("ess_tail"))
    if chains == 1:
        return summary
    r_hat = found["r_hat"][evaluated]
    limit = r_hat_limit(chains, draws, summary.judged)
    stuck = (r_hat > max(R_HAT_DISAGREE, limit)) & persistent
    found["disagree"] = np.zeros(summary.total)
    found["disagree"][evaluated[stuck]] = 1
    worst = []
    for i in np.argsort(-r_hat, kind="stable")[:10]:
        c, h, w = (int(at) for at in np.unravel_index(evaluated[i], shape))
        figures = {"r_hat": float(r_hat[i])} | {name: float(value[i]) for name, value in ess.items()}
        worst.append({"c": c, "h": h, "w": w, **figures})
    return dataclasses.replace(
        summary,
        r_hat=float(r_hat.max()),
        r_hat_limit=limit,
        above=int((r_hat > limit).sum()),
        disagree=int(stuck.sum()),
        worst=worst,
    )


def _plain_r_hat(x: Floats) -> Floats:
    """Split R-hat without ranks (Gelman et al. 2013), of all quantities at once; it picks the pixels that ArviZ is asked about."""
    n = x.shape[1] // 2
    halves = np.concatenate([x[:, :n], x[:, -n:]])
    within, between = halves.var(1, ddof=1).mean(0), halves.mean(1).var(0, ddof=1)
    return np.asarray(np.divide(between, within, out=np.full_like(between, np.inf), where=within > 0))


def _halves(x: Floats, draws: int) -> Halves:
    n = x.shape[0] * draws
    even, odd = (part.reshape(-1, x.shape[2]) for part in (x[::2], x[1::2]))
    std = x.std((0, 1), ddof=1)
    mean = (even.mean(0) - odd.mean(0)) / std
    spread = (even.std(0, ddof=1) - odd.std(0, ddof=1)) / std
    return Halves(
        math.sqrt(float((mean**2).mean())), 2 / math.sqrt(n), math.sqrt(float((spread**2).mean())), math.sqrt(2 / n)
    )


def _judge(
    kind: Kind,
    chains: int,
    draws: int,
    functionals: list[FunctionalSummary],
    pixels: PixelSummary,
    stages: list[Stage],
    record: Mapping[str, Any],
    notes: list[str],
) -> tuple[list[str], Verdict]:
    """Reasons and verdict, by the rules of docs/diagnostics.md; adds to the notes."""
    if pixels.judged == 0 and chains * draws > 1:
        notes.append("no pixel varies: every draw is the same image")
    if pixels.evaluated < pixels.judged:
        notes.append(
            f"{pixels.evaluated} of {pixels.judged} pixels were looked at, those of largest split R-hat before ranks are taken"
        )
    longer = _objections_of_the_run(stages, record)
    if kind == "population":
        agree, more = _look_at_populations(record, notes)
        longer += more
        if chains < LEAST_SINGLE_DRAWS:
            return [f"there are {_count(chains, 'particle')}; give at least {LEAST_SINGLE_DRAWS}"], "too few draws"
        return longer, "run longer" if longer else "converged" if agree else "no objection"
    if draws < LEAST_DRAWS:
        if chains < LEAST_SINGLE_DRAWS:
            what = (
                f"there are {_count(chains, 'chain')} of {_count(draws, 'draw')}; give {LEAST_SINGLE_DRAWS} chains, or {LEAST_CHAINS} "
                "chains of many draws"
            )
            return [what, *longer], "too few draws"
        groups = [f for f in functionals if f.groups is not None]
        if groups and kind == "chains":
            return [_describe_groups(groups), *longer], "chains disagree"
        if groups:
            notes.append(_describe_groups(groups))
        _note_single_draws(chains, draws, pixels, notes)
        return longer, "run longer" if longer else "no objection"
    return _judge_chains(kind, chains, draws, functionals, pixels, longer, notes)


def _judge_chains(
    kind: Kind,
    chains: int,
    draws: int,
    functionals: list[FunctionalSummary],
    pixels: PixelSummary,
    of_the_run: list[str],
    notes: list[str],
) -> tuple[list[str], Verdict]:
    """Chains of several draws: R-hat and effective sample sizes."""
    disagree: list[str] = []
    longer = list(of_the_run)
    if chains > 1:
        limit = r_hat_limit(chains, draws, len(functionals))
        above = [f for f in functionals if f.r_hat is not None and f.r_hat > limit]
        stuck = [f for f in above if (f.r_hat or 0) > max(R_HAT_DISAGREE, limit) and (f.persistence or 0) >= PERSISTENT]
        if stuck:
            worst = max(stuck, key=lambda f: f.r_hat or 0)
            disagree.append(
                f"each chain keeps to its own {_list([f.name for f in stuck])} (R-hat up to {_show(worst.r_hat, '.2f')})"
            )
            groups = [f for f in stuck if f.groups is not None]
            if groups:
                disagree.append(_describe_groups(groups))
        if pixels.disagree:
            some = ", ".join(f"({p['c']}, {p['h']}, {p['w']})" for p in pixels.worst[:3])
            disagree.append(
                f"chains disagree about {pixels.disagree} of {pixels.judged} pixels, the worst (c, h, w) {some}, "
                f"R-hat up to {_show(pixels.r_hat, '.2f')}"
            )
        moving = [f for f in above if f not in stuck]
        if moving:
            worst = max(moving, key=lambda f: f.r_hat or 0)
            longer.append(f"R-hat of {worst.name} is {_show(worst.r_hat, '.3f')}, above {limit:.3f}")
        if pixels.r_hat is not None and pixels.r_hat_limit is not None:
            many = pixels.above - pixels.disagree > PIXELS_ALLOWED * pixels.judged
            far = pixels.r_hat > max(R_HAT_DISAGREE, pixels.r_hat_limit) and not pixels.disagree
            if many or far:
                longer.append(
                    f"R-hat of {pixels.above} of {pixels.judged} pixels is above {pixels.r_hat_limit:.3f}, "
                    f"the worst {_show(pixels.r_hat, '.3f')}"
                )
    if chains < LEAST_CHAINS:
        longer.append(f"R-hat compares chains, and there are {chains}; give at least {LEAST_CHAINS}")
    small = [
        (min(f.ess_bulk, f.ess_tail), f.name) for f in functionals if f.ess_bulk is not None and f.ess_tail is not None
    ]
    if small and min(small)[0] < ESS:
        ess, name = min(small)
        longer.append(f"the effective sample size of {name} is {ess:.0f}, less than {ESS:.0f}{_advise(ess, draws)}")
    elif pixels.short > PIXELS_ALLOWED * pixels.judged:
        ess = pixels.ess or 0.0
        longer.append(
            f"{pixels.short} of {pixels.judged} pixels have an effective sample size less than {ESS:.0f}, the least {ess:.0f}"
            f"{_advise(ess, draws)}"
        )
    if disagree:
        remedy = (
            "either the chains are in separate modes, into which they freeze as the coupling falls: then a population is recommended "
            "(population: true), or replica exchange; or the last coupling is small against the posterior's width, so that a draw stays "
            "close to the one before: then many chains of one draw each are. Such chains (chains = 100, draws = 1) also show which it is, "
            "by falling into groups or not"
            if kind == "chains"
            else "replicas did not carry the chains between modes: more burn_in and more thin, or a finer ladder"
        )
        notes.append(remedy)
        return [*disagree, *of_the_run], "chains disagree"
    return longer, "run longer" if longer else "converged"


def _objections_of_the_run(stages: list[Stage], record: Mapping[str, Any]) -> list[str]:
    """What the record says against the draws, whatever these look like."""
    reasons = [str(warning) for warning in record.get("warnings", [])]
    if stages:
        last = min(stages, key=lambda stage: stage.eta)
        if last.residual is not None and not last.residual <= RESIDUAL:
            reasons.append(
                f"the proximal sampler's solves end at a relative residual of {last.residual:.1e} at the last coupling, above "
                f"{RESIDUAL:g}; raise most_iterations"
            )
    rates = [rate for rate in record.get("replica_exchange", {}).get("exchange_rates", []) if rate is not None]
    if rates and min(rates) < EXCHANGE:
        reasons.append(
            f"neighbouring replicas exchange at a rate of {min(rates):.3f} somewhere on the ladder, less than {EXCHANGE}; make it finer"
        )
    return reasons


def _look_at_fit(fit: Fit | None, notes: list[str]) -> list[str]:
    """What the fit to the measurement says against the draws; adds to the notes."""
    if fit is None:
        return []
    if 0 < fit.impossible < fit.draws:
        notes.append(
            f"under {fit.impossible} of {fit.draws} draws that were looked at the measurement has probability 0"
        )
    return [] if fit.objection is None else [fit.objection]


def _look_at_populations(record: Mapping[str, Any], notes: list[str]) -> tuple[bool, list[str]]:
    """Whether independent populations agree about the evidence, and what speaks against them."""
    notes.append(
        "particles share ancestors: Monte Carlo errors are lower bounds, and R-hat does not judge them, as particles may stay in a mode "
        "that their number weighs"
    )
    populations = record["populations"]
    founders = [p["levels"][-1]["founders"] for p in populations if p.get("levels")]
    if founders:
        notes.append(f"the particles of a population descend from {min(founders)} draws of the prior, or more")
    error = record.get("log_evidence_se")
    if error is None:
        notes.append(
            "one population cannot be compared with others; populations = 2 or more shows whether they agree about the evidence"
        )
        return False, []
    if error > EVIDENCE:
        return False, [
            f"the populations disagree about the evidence (relative standard error {error:.2f}, more than {EVIDENCE}): one outweighs the "
            "others; give more particles (chains) or smaller steps (ess)"
        ]
    return True, []


def _note_single_draws(chains: int, draws: int, pixels: PixelSummary, notes: list[str]) -> None:
    notes.append(
        f"each chain has {'one draw' if draws == 1 else f'{draws} draws'}, R-hat needs {LEAST_DRAWS}: that the annealing has brought every "
        "chain to its law is taken on trust; to see whether more of it changes the answer, anneal twice as slowly and compare"
    )
    if pixels.mcse_mean is not None:
        small = pixels.mcse_mean <= ERROR
        wanted = f"; {math.ceil(chains * (pixels.mcse_mean / ERROR) ** 2)} chains would bring it to {ERROR}"
        notes.append(
            f"the mean is known to {pixels.mcse_mean:.2g} posterior standard deviations (median over pixels), from the chains' independence"
            + ("" if small else wanted)
        )
    notes.append(
        "intervals between order statistics hold their level at any number of draws; groups of chains (modes) were looked for"
    )


def _describe_groups(found: list[FunctionalSummary]) -> str:
    f = max(found, key=lambda f: min(f.groups or (0, 0)))
    low, high = f.groups or (0, 0)
    return (
        f"the chains fall into groups of {low} and {high} by {f.name}: separate modes, whose frequencies single chains freeze where they "
        "stop to hop between them; a population is recommended (population: true)"
    )


def _advise(ess: float, draws: int) -> str:
    return f"; about {math.ceil(draws * ESS / max(ess, 1))} draws a chain would do, or as many times more chains"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _show(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else format(value, form)


def _finite(value: Any) -> Any:
    """The same structure as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _finite(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(args: Sequence[str] | None = None) -> None:
    """Diagnose the folder of a run.

    Args:
        args: command-line arguments; those of the process by default.

    Raises:
        SystemExit: with one message, for any bad input.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dpnp_inference.diagnostics", description="Can the draws of a run be trusted?"
    )
    parser.add_argument("folder", type=Path, help="folder of a run, with samples.safetensors and diagnostics.json")
    parser.add_argument(
        "--functional", action="append", default=[], help="class path or path/to/file.py:name; may be repeated"
    )
    parser.add_argument("--against", type=Path, help="folder of another run, to compare with in place of a diagnosis")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    given = parser.parse_args(args)
    try:
        posterior = Posterior.load(given.folder)
        found: Diagnosis | Comparison = (
            diagnose(posterior, given.functional)
            if given.against is None
            else compare(posterior, Posterior.load(given.against), given.functional)
        )
        if given.json is not None:
            given.json.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"diagnostics: {error}")
    Console().print(found)


if __name__ == "__main__":
    main()
