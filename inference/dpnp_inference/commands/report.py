"""``dpnp-reconstruct report``: a finished run as a page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpnp_inference.html_report import write_report


def report(arguments: list[str]) -> None:
    """Write the report of a run from its folder.

    Args:
        arguments: of the command, after its name.

    Raises:
        RunFolderError: the folder is not that of a finished run, or a file in it is damaged.
    """
    parser = argparse.ArgumentParser(
        prog="dpnp-reconstruct report",
        description="Write the report of a finished run: one HTML file that needs nothing else.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="file to write; by default report.html in the run's folder")
    given = parser.parse_args(arguments)
    print(f"report: {write_report(given.run, given.output)}")
