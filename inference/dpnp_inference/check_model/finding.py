"""What a check has found, and how findings are told."""

from __future__ import annotations

import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["OK", "NOTE", "PROBLEM"]
STYLES: dict[Status, str] = {"OK": "green", "NOTE": "yellow", "PROBLEM": "bold red"}
OURS = {"dpnp_inference", "dpnp_shared", "site-packages"}


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        name: what was looked at.
        status: ``OK``; ``NOTE``, something to know; or ``PROBLEM``, something to repair first.
        message: what it means, in plain words.
        remedy: what to do about it, if there is something to do.
    """

    name: str
    status: Status
    message: str
    remedy: str = ""


def ok(name: str, message: str) -> Finding:
    """All is well."""
    return Finding(name, "OK", message)


def note(name: str, message: str, remedy: str) -> Finding:
    """Something to know."""
    return Finding(name, "NOTE", message, remedy)


def problem(name: str, message: str, remedy: str) -> Finding:
    """Something to repair first."""
    return Finding(name, "PROBLEM", message, remedy)


def has_problem(findings: list[Finding]) -> bool:
    """Whether something has to be repaired."""
    return any(finding.status == "PROBLEM" for finding in findings)


def print_findings(findings: list[Finding], console: Console | None = None) -> None:
    """The findings as a table, what to do below what was found.

    Args:
        findings: of :func:`~dpnp_inference.check_model.check_model`.
        console: where to print; standard output by default.
    """
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        message = Text(finding.message)
        if finding.remedy:
            message.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(finding.status, style=STYLES[finding.status]), Text(finding.name), message)
    counts = [f"{sum(finding.status == status for finding in findings)} {status}" for status in STYLES]
    console = Console() if console is None else console
    console.print(table)
    console.print(", ".join(counts))


def describe(error: Exception) -> str:
    """An error, with the last line on its way that is neither this package's nor a library's."""
    library = Path(sysconfig.get_path("stdlib"))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if (file := Path(frame.filename)).is_file() and library not in file.parents and not OURS & {*file.parts}
    ]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).rstrip('.')}{place}"
