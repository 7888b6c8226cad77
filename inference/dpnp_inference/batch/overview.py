"""What one sees of a batch: a live overview on a terminal, a line an item elsewhere, and a table of a batch's state."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dpnp_inference.batch.folder import Record
from dpnp_inference.dpnp import Sweep
from dpnp_inference.progress import Live, describe_sweep

MOST_ROWS = 40  # of items that are neither done nor pending


class Overview(Live):
    """Items done and failed, and what the present one does; lines of standard output where there is no terminal.

    Args:
        items: how many there are.
        console: where to draw; standard error by default.
    """

    def __init__(self, items: int, console: Console | None = None) -> None:
        super().__init__(console)
        self._task = self.progress.add_task("items", total=items, state="")
        self._item = self.progress.add_task("", total=None, state="", visible=False)
        self._name = ""

    def begin(self, name: str) -> None:
        """The next item."""
        self._name = name
        self.progress.reset(self._item, total=None, description=name, state="", visible=True)

    def sweep(self, sweep: Sweep) -> None:
        """One iteration of the present item."""
        self.progress.update(
            self._item,
            completed=sweep.iteration,
            total=sweep.iterations,
            description=self._name,
            state=describe_sweep(sweep),
        )

    def counts(self, settled: int, state: str) -> None:
        """How many items are done or failed, and a word on it."""
        self.progress.update(self._task, completed=settled, state=state)

    def line(self, text: str, *, always: bool) -> None:
        """A line about an item; on a terminal only those that are ``always`` shown, above the overview."""
        if not self.is_live:
            print(f"{text}\n", end="", flush=True)  # one write, since processes share the output
        elif always:
            self.progress.console.print(text, markup=False, highlight=False)


def describe(name: str, record: Record) -> str:
    """An item in one line."""
    if record["state"] == "failed":
        return f"failed {name}: {record['error']}"
    figures = [f"{record['seconds']:.1f} s"]
    scores = record.get("scores", {})
    if "psnr" in scores:
        figures.append(f"PSNR {scores['psnr']:.2f} dB")
    if record["attempts"] > 1:
        figures.append(f"attempt {record['attempts']}")
    if record.get("warnings"):
        figures.append(f"{len(record['warnings'])} warnings")
    return f"done {name} ({', '.join(figures)})"


def status_table(states: dict[str, Record]) -> Table:
    """The items of a batch that are at work or have failed."""
    table = Table()
    for column in ("item", "state", "attempts", "seconds", "worker", "error"):
        table.add_column(column, overflow="fold")
    shown = [(name, state) for name, state in states.items() if state["state"] in ("running", "failed")]
    for name, state in shown[:MOST_ROWS]:
        seconds = "" if "seconds" not in state else f"{state['seconds']:.1f}"
        cells = (
            state["state"],
            str(state.get("attempts", "")),
            seconds,
            state.get("worker", ""),
            state.get("error", ""),
        )
        table.add_row(name, *cells)
    if len(shown) > MOST_ROWS:
        table.add_row(f"… {len(shown) - MOST_ROWS} more", "", "", "", "", "manifest.json has all")
    return table
