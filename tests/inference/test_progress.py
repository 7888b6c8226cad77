import io
import json
import os
import pty
import re
import select
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from dpnp_inference import DPnP, Population, Sweep
from dpnp_inference.progress import LOG_EVERY, ProgressBar, describe_sweep
from dpnp_inference.proximal import ProximalInfo
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import SuperResolution

COMMAND = [
    sys.executable,
    "-c",
    "from dpnp_inference.cli import main; import sys; main(sys.argv[1:])",
    "--annealing",
    "dpnp_inference.Annealing",
    "--annealing.constant=0",
    "--annealing.decay=2",
    "--annealing.final=0",
    "--chains",
    "3",
]


def sweep(iteration: int, chains: range = range(4), standing=None, **info) -> Sweep:
    return Sweep(chains, iteration, 3, 0.31, 80 * iteration, ProximalInfo(forward_calls=2, **info), standing or {})


def test_an_iteration_in_words():
    assert describe_sweep(sweep(3)) == "η 0.31 · 240 network calls"
    assert describe_sweep(sweep(1, acceptance=torch.tensor([0.5, 0.6]))).endswith("acceptance 0.55")
    assert describe_sweep(sweep(1, residual=torch.tensor([1e-6, 2e-6]))).endswith("residual 2e-06")
    told = {"level": 3, "ESS": 0.612, "founders": 1024}
    assert describe_sweep(sweep(1, standing=told)).endswith("level 3 · ESS 0.61 · founders 1024")


def shown(*sweeps: Sweep, seconds: float = 10.0, **options) -> str:
    """The table on a terminal after these iterations."""
    now = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    bar = ProgressBar(console, clock=lambda: now[0], **options)
    for one in sweeps:
        now[0] += seconds
        bar(one)
    with console.capture() as capture:
        console.print(bar.table())
    return capture.get()


def test_the_table_has_a_row_for_each_batch_and_the_time_that_is_left():
    text = shown(sweep(3, acceptance=torch.tensor([0.5])), sweep(1, range(4, 8)), chains=16)
    assert re.search(r"0-3\s+3/3\s+0\.31\s+240\s+0\.50", text)
    assert re.search(r"4-7\s+1/3\s+0\.31\s+80\s+–", text)
    # 20 s for a third more than 4 of 16 chains
    assert "0:20 passed, about 0:40 left" in text
    many = shown(*(sweep(3, range(i, i + 1)) for i in range(12)), seconds=400.0)
    assert "4 earlier batches · 1:20:00 passed" in many
    assert "left" not in many
    assert "residual" not in many


def test_a_population_shows_where_it_is_and_promises_no_time():
    prior = GaussianPrior(torch.zeros(4), torch.eye(4), (1, 2, 2))
    dpnp = DPnP(prior, ForwardModel(SuperResolution((1, 2, 2), 1), GaussianNoise(0.5)), population=Population())
    sweeps: list[Sweep] = []
    posterior = dpnp.sample(torch.ones(1, 2, 2), chains=20, seed=0, on_sweep=sweeps.append)
    levels = posterior.diagnostics["populations"][0]["levels"]
    last = [one for one in sweeps if one.chains.start == 0][-1].standing
    assert last == {"level": len(levels), "ESS": levels[-1]["ess"], "founders": levels[-1]["founders"]}
    assert sweeps[0].standing["level"] == 1
    text = shown(sweeps[-1])
    assert re.search(r"level\s+ESS\s+founders", text)
    assert "left" not in text


def test_off_a_terminal_short_runs_are_silent_and_long_ones_log_now_and_then(caplog):
    now = [0.0]
    stream = io.StringIO()
    with caplog.at_level("INFO"), ProgressBar(Console(file=stream), clock=lambda: now[0]) as bar:
        for _ in range(100):
            now[0] += LOG_EVERY / 10
            bar(sweep(1))
            assert now[0] >= LOG_EVERY or not caplog.records
    assert stream.getvalue() == ""
    assert len(caplog.records) == 10
    assert caplog.messages[0] == "chains 0-3, iteration 1/3: η 0.31 · 80 network calls; 0:30 passed, about 1:00 left"


@pytest.mark.slow
def test_on_a_pseudo_terminal(tmp_path):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=environment, close_fds=True
    )
    os.close(theirs)
    written = b""
    try:
        while select.select([ours], [], [], 120)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
        assert process.wait(120) == 0
    finally:
        process.kill()
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    assert re.search(r"chains\s+iteration\s+coupling η\s+network calls", text)
    assert re.search(r"0-2\s+2/2\s+0\.0\d+\s+\d+", text)
    assert b"\x1b[?25l" in written  # the cursor is hidden while the table lives
    assert b"\x1b[?25h" in written
    assert "report: outputs/demo/report.html" in text


@pytest.mark.slow
def test_json_and_nothing_else_on_standard_output(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*COMMAND, "--json", "true"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    found = json.loads(done.stdout)
    record = json.loads((tmp_path / "outputs/demo/run.json").read_text())
    assert {key: found[key] for key in record} == record
    assert found["verdict"] == found["diagnosis"]["verdict"] == "misfit"  # after so few iterations
    assert found["scores"].keys() >= {"psnr", "ssim"}
    assert sorted(found["files"]) == sorted(
        f"outputs/demo/{file.name}" for file in (tmp_path / "outputs/demo").iterdir()
    )
    assert "json" not in record["config"]
    assert b"proximal sampler" in done.stderr
    assert b"passed" not in done.stderr  # a short run is not followed
