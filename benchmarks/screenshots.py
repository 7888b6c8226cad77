"""Pictures of the report and of the terminal for ``docs/report.md``, from one run of the demo with 20 chains.

    python benchmarks/screenshots.py [--run FOLDER]

It runs the demo on a pseudo-terminal, whose screen is drawn half-way and at the end, and photographs the report in a headless browser.
With ``--run`` only the report of that finished run is photographed. Needs chromium and its driver (``apt-get install chromium
chromium-driver``).
"""

from __future__ import annotations

import argparse
import base64
import copy
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text
from selenium import webdriver

from dpnp_inference.html_report import write_report

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
COMMAND = "dpnp-reconstruct --chains 20 --batch_size 10"
COLUMNS = 96
MOST_BYTES = 300_000
SHOTS = {  # picture: colour scheme, first and last element that are on it
    "report_pictures": ("light", "header", "#draws"),
    "report_convergence": ("dark", "#truth", "#convergence"),
    "report_run": ("light", "#run", "#reproduce"),
}


class Screen:
    """The lines of a terminal, as far as rich's live displays move about in them; colours stay in the lines."""

    def __init__(self) -> None:
        self.lines, self.row = [""], 0

    def feed(self, text: str) -> None:
        """Take what a program has written."""
        for part in re.split(r"(\r\n|\r|\n|\x1b\[[0-9;?]*[A-Za-z])", text):
            if part in ("\n", "\r\n"):
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif re.fullmatch(r"\x1b\[\d*A", part):
                self.row = max(0, self.row - int(part[2:-1] or 1))
            elif part != "\r" and not re.fullmatch(r"\x1b\[[0-9;?]*[A-Za-ln-z]", part):
                self.lines[self.row] += part

    def text(self) -> Text:
        """The screen, with the command above."""
        return Text.from_ansi("\n".join([f"$ {COMMAND}", *self.lines]).rstrip())


def run_demo(folder: Path) -> list[tuple[str, Text]]:
    """The demo on a pseudo-terminal; its screen when half of it is done, and at the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    arguments = [*COMMAND.split()[1:], "--output", "outputs/demo", "--overwrite", "true"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "inference" / "reconstruct.py"), *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=environment,
    )
    os.close(theirs)
    screen, found, rest = Screen(), [], b""
    while True:
        try:
            rest += os.read(ours, 65536)
        except OSError:  # the program has ended
            break
        whole = rest.rfind(b"\n") + 1  # whole lines only: a cut may be within a character or a sequence
        screen.feed(rest[:whole].decode())
        rest = rest[whole:]
        now = copy.deepcopy(screen)
        now.feed(rest.decode(errors="ignore"))  # the last line has no end yet
        if not found and re.search(r"10-19\s+1\d/32(.|\n)* left$", now.text().plain):
            found.append(("terminal_live", now.text()))
    screen.feed(rest.decode())
    if not found:
        raise RuntimeError(f"the table was not seen half-way:\n{screen.text()}")
    if process.wait() != 0:
        raise RuntimeError(f"the demo failed:\n{screen.text()}")
    return [*found, ("terminal_end", screen.text())]


def draw_terminal(browser: webdriver.Chrome, text: Text, file: Path) -> None:
    """A terminal's screen as a picture."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(text)
    svg = console.export_svg(title="dpnp-reconstruct", theme=MONOKAI)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S).replace(
        "Fira Code", "DejaVu Sans Mono"
    )  # nothing is fetched
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as page:
        page.write(f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><div style="width:900px">{svg}</div>')
        page.flush()
        browser.get(Path(page.name).as_uri())
        photograph(browser, "svg", "svg", file, margin=0)


def photograph(browser: webdriver.Chrome, first: str, last: str, file: Path, *, margin: int = 16) -> None:
    """From one element of a page to another."""
    x, top, width, bottom = browser.execute_script(
        "const [a, b] = [...arguments].map(s => document.querySelector(s).getBoundingClientRect());"
        "return [Math.min(a.left, b.left), a.top + scrollY, Math.max(a.width, b.width), b.bottom + scrollY]",
        first,
        last,
    )
    clip = {"x": max(0, x - margin), "y": max(0, top - margin), "scale": 1}
    clip |= {"width": width + 2 * margin, "height": bottom + margin - clip["y"]}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as picture:
        picture.convert("RGB").save(file, optimize=True)
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise RuntimeError(f"{file} has {size} bytes; allowed are {MOST_BYTES}")
    print(f"{file.relative_to(ROOT)}: {picture.width} x {picture.height}, {size / 1000:.0f} kB")


def open_browser() -> webdriver.Chrome:
    """Chromium without a window."""
    program, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if program is None or driver is None:
        sys.exit("screenshots: there is no chromium with its driver (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,900"):
        options.add_argument(argument)
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run, in place of the demo")
    given = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    browser = open_browser()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run = given.run
            if run is None:
                for name, text in run_demo(Path(scratch)):
                    draw_terminal(browser, text, PICTURES / f"{name}.png")
                run = Path(scratch) / "outputs" / "demo"
            start = time.process_time()
            page = write_report(run, Path(scratch) / "report.html")
            print(f"report: {page.stat().st_size / 1000:.0f} kB, {time.process_time() - start:.2f} s of one core")
            for name, (scheme, first, last) in SHOTS.items():
                feature = {"name": "prefers-color-scheme", "value": scheme}
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
                browser.get(page.as_uri())
                photograph(browser, first, last, PICTURES / f"{name}.png")
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
