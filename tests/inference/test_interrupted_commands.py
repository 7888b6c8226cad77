"""``dpnp-reconstruct`` that is killed, extended, and shared out to processes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dpnp_inference import workers
from dpnp_inference.checkpoint import LATEST, Checkpoints, FolderLock
from dpnp_inference.cli import main
from dpnp_inference.commands.reconstruct import state_folder
from dpnp_inference.gibbs import Gibbs
from dpnp_inference.posterior import Posterior

FAST = [
    "--annealing",
    "dpnp_inference.Annealing",
    "--annealing.constant=0",
    "--annealing.decay=2",
    "--annealing.final=0",
    "--dds",
    "dpnp_inference.DDSDDIM",
    "--dds.calls=2",
    "--chains=4",
    "--batch_size=2",
    "--checkpoint_every=0",
]
STATE = ".out.state"
RUN = "import sys; from dpnp_inference import gibbs; gibbs.START_CALLS = 3\nfrom dpnp_inference.cli import main; main(sys.argv[1:])"


class BreakdownError(BaseException):
    """Ends a command as nothing that it handles does."""


@pytest.fixture(autouse=True)
def _elsewhere(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpnp_inference.state.os.fsync", lambda descriptor: None)
    if not request.node.get_closest_marker("slow"):  # that has workers, which would not know of it
        monkeypatch.setattr("dpnp_inference.gibbs.START_CALLS", 3)


def samples(folder: str) -> torch.Tensor:
    return Posterior.load(folder).samples


def break_after(sweeps: int, monkeypatch, arguments: list[str]) -> None:
    """Run a command that breaks down in one of its sweeps."""
    left, sweep = [sweeps], Gibbs.sweep

    def once_more(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise BreakdownError
        return sweep(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Gibbs, "sweep", once_more)
        with pytest.raises(BreakdownError):
            main(arguments)


def refused(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return str(stop.value.code)


def test_after_kill_minus_nine_the_same_command_goes_on(caplog):
    command = [*FAST, "--output", "out", "--draws", "3", "--thin", "3"]
    process = subprocess.Popen([sys.executable, "-c", RUN, *command])
    try:
        while not Path(STATE, LATEST).exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not Path("out").exists()
    with caplog.at_level(logging.INFO):
        main(command)
    assert "going on after iteration" in caplog.text
    assert "of 16" in caplog.text
    assert os.listdir() == ["out"]
    main([*FAST, "--output", "whole", "--draws", "3", "--thin", "3"])
    assert torch.equal(samples("out"), samples("whole"))
    assert Posterior.load("out").diagnostics["network_calls"] == Posterior.load("whole").diagnostics["network_calls"]


@pytest.mark.parametrize("all_done", [False, True])
def test_a_state_that_was_being_written_is_not_left_behind(all_done, monkeypatch):
    command = [*FAST, "--output", "out"]
    if all_done:  # no state is written any more
        with monkeypatch.context() as patch:
            patch.setattr("dpnp_inference.commands.reconstruct.write_run", lambda *args, **more: Path("/").read_bytes())
            refused(command)
    else:
        break_after(3, monkeypatch, command)
    Path(STATE, f"new_{LATEST}.{os.getpid()}.tmp").write_bytes(b"half")
    main(command)
    assert os.listdir() == ["out"]


def test_states_clear_away_what_a_killed_process_was_writing(tmp_path):
    (tmp_path / f"new_{LATEST}.12345.tmp").write_bytes(b"half")
    states = Checkpoints(tmp_path, {}, every=0)
    assert states.save({"x": 1})
    assert os.listdir(tmp_path) == [LATEST]
    assert states.load() == {"x": 1}


def test_other_settings_are_refused_until_the_state_is_thrown_away(monkeypatch, caplog):
    break_after(3, monkeypatch, [*FAST, "--output", "out"])
    message = refused([*FAST, "--output", "out", "--seed", "1"])
    assert "seed: 0 there, 1 here" in message
    assert "--fresh true" in message
    assert "--processes" in refused([*FAST, "--output", "out", "--processes", "2"])
    with caplog.at_level(logging.INFO):
        main([*FAST, "--output", "out", "--seed", "1", "--fresh", "true"])
    assert "going on" not in caplog.text
    assert os.listdir() == ["out"]


def test_a_run_without_a_name_is_found_again(monkeypatch, caplog):
    main([*FAST, "--output", "first"])
    measured = ["--measurement", "first/measurement.npy", "--operator", "dpnp_shared.operators.RandomInpainting"]
    measured += [
        "--operator.image_shape",
        "[1,28,28]",
        "--noise",
        "dpnp_shared.noise.GaussianNoise",
        "--noise.sigma=0.05",
    ]
    moments = iter(["outputs/monday", "outputs/tuesday", "outputs/wednesday"])
    monkeypatch.setattr("dpnp_inference.commands.reconstruct.time.strftime", lambda form: next(moments))
    break_after(3, monkeypatch, [*FAST, *measured])
    with caplog.at_level(logging.INFO):
        main([*FAST, *measured])
    assert "going on after iteration 3 of 4" in caplog.text
    assert os.listdir("outputs") == ["monday"]
    main([*FAST, *measured, "--seed", "1"])
    assert sorted(os.listdir("outputs")) == ["monday", "wednesday"]


def test_draws_and_chains_are_added(monkeypatch):
    main([*FAST, "--output", "out"])
    more = [*FAST, "--output", "out", "--draws", "3", "--chains", "6"]
    assert "holds a run already" in refused(more)
    break_after(5, monkeypatch, [*more, "--extend", "true"])  # the state then is that of the extension
    assert samples("out").shape[:2] == (4, 1)
    main([*more, "--extend", "true"])
    main([*FAST, "--output", "whole", "--draws", "3", "--chains", "6"])
    assert torch.equal(samples("out"), samples("whole"))
    assert "one of the two must be more" in refused([*more, "--extend", "true"])
    assert "holds no finished run" in refused([*FAST, "--output", "new", "--extend", "true"])
    main([*FAST, "--output", "bare", "--keep_state", "false"])
    assert not Path("bare/state.safetensors").exists()
    assert "without the state" in refused([*FAST, "--output", "bare", "--draws", "2", "--extend", "true"])
    assert sorted(os.listdir()) == ["bare", "out", "whole"]


def test_statistics_in_place_of_draws():
    main([*FAST, "--output", "out", "--draws", "3", "--keep", "statistics"])
    posterior = Posterior.load("out")
    assert posterior.samples.shape[:2] == (4, 1)
    assert posterior.statistics.count == 12
    main([*FAST, "--output", "all", "--draws", "3"])
    torch.testing.assert_close(posterior.mean, Posterior.load("all").mean)


def test_what_goes_wrong_in_a_diagnosis_loses_nothing(monkeypatch, caplog, capsys):
    def fails(posterior, functionals=()):
        raise RuntimeError("no verdict today")

    with monkeypatch.context() as patch:
        patch.setattr("dpnp_inference.diagnostics.diagnose", fails)
        main([*FAST, "--output", "out"])
    assert "could not be diagnosed: RuntimeError: no verdict today" in caplog.text
    assert samples("out").shape[:2] == (4, 1)
    assert "picture: out/picture.png" in capsys.readouterr().out
    main([*FAST, "--output", "other"])
    printed = capsys.readouterr().out
    assert "reduced chi-square of the draws" in printed
    assert "verdict: misfit: the draws do not explain the measurement" in printed  # after so few iterations
    record = json.loads(Path("other/diagnostics.json").read_text())
    assert record["diagnosis"]["verdict"] == "misfit"
    assert record["diagnosis"]["reasons"][1].startswith("there are 4 chains of 1 draw")


def test_what_goes_wrong_in_writing_the_folder_loses_nothing(monkeypatch, caplog):
    def fails(*args, **more):
        raise OSError("no pictures today")

    with monkeypatch.context() as patch:
        patch.setattr("dpnp_inference.commands.reconstruct.draw_picture", fails)
        assert "no pictures today" in refused([*FAST, "--output", "out"])
    assert os.listdir() == [STATE]
    with caplog.at_level(logging.INFO):
        main([*FAST, "--output", "out"])
    assert "going on after iteration 4 of 4" in caplog.text
    assert os.listdir() == ["out"]


def test_an_output_that_another_process_is_writing_is_refused():
    with FolderLock(state_folder(Path("out"))):
        assert f"in use by process {os.getpid()} on" in refused([*FAST, "--output", "out"])
    assert os.listdir() == []


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed_draw_what_one_process_does(monkeypatch, caplog):
    killed = []
    started = workers.Supervisor._start

    def hear(message):
        if not killed:
            killed.append(running[0].processes[0].pid)
            os.kill(killed[0], signal.SIGKILL)
        return sweep(message)

    running, sweep = [], workers._sweep

    def start(self, i):
        running[:] = [self]
        started(self, i)

    monkeypatch.setattr(workers, "_sweep", hear)
    monkeypatch.setattr(workers.Supervisor, "_start", start)
    main([*FAST, "--draws", "3", "--output", "two", "--processes", "2"])
    assert len(killed) == 1
    assert "process 0 was killed by signal 9; it is started again from its last state" in caplog.text
    main([*FAST, "--draws", "3", "--output", "one"])
    assert torch.equal(samples("one"), samples("two"))
    one, two = (Posterior.load(name).diagnostics for name in ("one", "two"))
    assert one["network_calls"] == two["network_calls"]
    assert len(one["iterations"]) == len(two["iterations"]) == 2
    assert sorted(os.listdir()) == ["one", "two"]


def test_what_a_worker_cannot_do_is_one_message():
    several = [*FAST, "--processes", "2", "--output", "out"]
    assert "depend on each other" in refused([*several, "--population", "true"])
    assert "processes = 0" in refused([*FAST, "--processes", "0", "--output", "out"])
    assert os.listdir() == []


def test_chains_are_shared_out_by_whole_batches():
    assert workers.shared_out(39, 20, 2) == [range(0, 20), range(20, 39)]
    assert workers.shared_out(10, 2, 3) == [range(0, 2), range(2, 6), range(6, 10)]
    assert workers.shared_out(3, 4, 2) == [range(0, 3)]
