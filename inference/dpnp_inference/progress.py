"""What a run is doing: a table on a terminal, now and then a line of the log elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live as RichLive
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dpnp_inference.gibbs import Sweep

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


LOG_EVERY = 30.0  # seconds
MOST_ROWS = 8  # of the table

log = logging.getLogger(__name__)


class Live:
    """A context manager that shows lines of progress, and nothing where the console is not a terminal.

    Args:
        console: where to draw; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console if console is not None else Console(stderr=True)
        self.is_live = console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


class ProgressBar:
    """A table of the run on a terminal; elsewhere a line of the log every half a minute, so that short runs have none.

    It is a context manager, and its call is the ``on_sweep`` of :meth:`DPnP.sample <dpnp_inference.dpnp.DPnP.sample>`.

    Args:
        console: where to draw; standard error by default.
        chains: how many there will be, for the time that is left; one batch by default.
        clock: seconds, growing.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        chains: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console if console is not None else Console(stderr=True)
        self.chains, self.clock = chains, clock
        self._batches: dict[range, Sweep] = {}
        self._start = self._logged = clock()
        self._live = RichLive(console=self.console, get_renderable=self.table, refresh_per_second=4)

    def __enter__(self) -> Self:
        self._start = self._logged = self.clock()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def __call__(self, sweep: Sweep) -> None:
        """Take note of one iteration."""
        self._batches[sweep.chains] = sweep
        now = self.clock()
        if not self.console.is_terminal and now - self._logged >= LOG_EVERY:
            self._logged = now
            log.info("%s: %s; %s", _name(sweep), describe_sweep(sweep), self._times())

    def table(self) -> Group:
        """What a terminal shows: a row for each batch of chains, the last few of them, and the time."""
        shown = list(self._batches.values())[-MOST_ROWS:]
        columns: list[tuple[str, list[str]]] = [
            ("chains", [_chains(sweep) for sweep in shown]),
            ("iteration", [_count(sweep) for sweep in shown]),
            ("coupling η", [f"{sweep.eta:.3g}" for sweep in shown]),
            ("network calls", [str(sweep.network_calls) for sweep in shown]),
        ]
        for name in ("acceptance", "residual"):
            if any(getattr(sweep.info, name) is not None for sweep in shown):
                columns.append((name, [_of_step(sweep, name) for sweep in shown]))
        for name in {name: None for sweep in shown for name in sweep.standing or {}}:
            columns.append((name, [_number((sweep.standing or {}).get(name)) for sweep in shown]))
        done = len(self._batches) - len(shown)
        earlier = f"{done} earlier batches · " if done else ""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name, _ in columns:
            table.add_column(name, justify="right")
        for row in zip(*(values for _, values in columns), strict=True):
            table.add_row(*row)
        return Group(table, Text(f"{earlier}{self._times()}"))

    def _times(self) -> str:
        """Time that has passed and, where the number of iterations is known, about how much is left."""
        passed = self.clock() - self._start
        text = f"{_duration(passed)} passed"
        done = 0.0
        for sweep in self._batches.values():
            if sweep.iterations is None:
                return text
            done += len(sweep.chains) * sweep.iteration / sweep.iterations
        total = self.chains or sum(len(batch) for batch in self._batches)
        return f"{text}, about {_duration(passed * (total - done) / done)} left" if 0 < done < total else text


def describe_sweep(sweep: Sweep) -> str:
    """One iteration in words, for example ``η 0.31 · 240 network calls · acceptance 0.57``."""
    parts = [f"η {sweep.eta:.3g}", f"{sweep.network_calls} network calls"]
    parts += [
        f"{name} {_of_step(sweep, name)}"
        for name in ("acceptance", "residual")
        if getattr(sweep.info, name) is not None
    ]
    parts += [f"{name} {_number(value)}" for name, value in (sweep.standing or {}).items()]
    return " · ".join(parts)


def _of_step(sweep: Sweep, name: str) -> str:
    value = getattr(sweep.info, name)
    if value is None:
        return "–"
    return f"{float(value.mean()):.2f}" if name == "acceptance" else f"{float(value.max()):.0e}"


def _number(value: float | None) -> str:
    return "–" if value is None else str(value) if isinstance(value, int) else f"{value:.2f}"


def _chains(sweep: Sweep) -> str:
    first, last = sweep.chains.start, sweep.chains.stop - 1
    return f"{first}" if first == last else f"{first}-{last}"


def _count(sweep: Sweep) -> str:
    return f"{sweep.iteration}" if sweep.iterations is None else f"{sweep.iteration}/{sweep.iterations}"


def _name(sweep: Sweep) -> str:
    return f"chains {_chains(sweep)}, iteration {_count(sweep)}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
