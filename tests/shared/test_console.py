from __future__ import annotations

import subprocess
import sys

import pytest

LINE = "from dpnp_shared.console import ends_with_its_reader\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_command_whose_reader_has_gone_ends_quietly(lines: int) -> None:
    code = (
        LINE + f"import time\nwith ends_with_its_reader():\n    time.sleep(0.5)\n    for i in range({lines}): print(i)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert errors == ""


def test_output_that_is_read_is_whole() -> None:
    code = LINE + "with ends_with_its_reader():\n    for i in range(3): print(i)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n1\n2\n"
