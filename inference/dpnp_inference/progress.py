"""A live line for a run: coupling, network calls, acceptance or residual."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dpnp_inference.gibbs import Sweep

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


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


class ProgressBar(Live):
    """Its call is the ``on_sweep`` of :meth:`DPnP.sample <dpnp_inference.dpnp.DPnP.sample>`.

    Args:
        console: where to draw; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._tasks: dict[range, TaskID] = {}

    def __call__(self, sweep: Sweep) -> None:
        """Show one iteration."""
        if sweep.chains not in self._tasks:
            name = f"chains {sweep.chains.start}-{sweep.chains.stop - 1}"
            self._tasks[sweep.chains] = self.progress.add_task(name, total=sweep.iterations, state="")
        self.progress.update(self._tasks[sweep.chains], completed=sweep.iteration, state=describe_sweep(sweep))


def describe_sweep(sweep: Sweep) -> str:
    """One iteration in words, for example ``η 0.31 · 240 network calls · acceptance 0.57``."""
    parts = [f"η {sweep.eta:.3g}", f"{sweep.network_calls} network calls"]
    if sweep.info.acceptance is not None:
        parts.append(f"acceptance {float(sweep.info.acceptance.mean()):.2f}")
    if sweep.info.residual is not None:
        parts.append(f"residual {float(sweep.info.residual.max()):.0e}")
    return " · ".join(parts)
