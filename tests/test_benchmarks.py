"""The benchmarks' runner keeps, resumes and verifies; every benchmark's command line is there."""

import json
import math
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "runner.py", FOLDER / "problems.py"})
CELLS = {"a": (3.0, 4.0), "b": (5.0, 12.0)}


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import runner

    return runner


def arguments(folder: Path, verify: int = 0) -> Namespace:
    return Namespace(jobs=1, output=folder / "results.json", verify=verify)


def test_results_are_kept_and_verified(runner, tmp_path, capsys):
    assert runner.run_cells(math.hypot, CELLS, arguments(tmp_path), header={"n": 1}) == {"a": 5.0, "b": 13.0}
    # a cell that is done is not done again, and others stay
    record = json.loads((tmp_path / "results.json").read_text())
    record["results"]["a"] = 7.0
    (tmp_path / "results.json").write_text(json.dumps(record))
    assert runner.run_cells(math.hypot, CELLS, arguments(tmp_path), header={"n": 1}) == {"a": 7.0, "b": 13.0}
    with pytest.raises(SystemExit) as stop:
        runner.run_cells(math.hypot, CELLS, arguments(tmp_path, verify=9), header={"n": 1})
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "a:  7 -> 5" in printed
    assert "b: as kept" in printed
    with pytest.raises(SystemExit, match="not of"):
        runner.run_cells(math.hypot, CELLS, arguments(tmp_path), header={"n": 2})
    assert json.loads((tmp_path / "results.json").read_text())["results"]["a"] == 7.0


def test_differences_are_found_at_any_depth_and_times_do_not_count(runner):
    kept = {"seconds": 1.0, "rows": [1, {"w1": 0.5}], "nan": math.nan}
    assert list(runner._compare(kept, {"seconds": 9.0, "rows": [1, {"w1": 0.50001}], "nan": math.nan}, "")) == []
    assert list(runner._compare(kept, {"rows": [1, {"w1": 0.6}], "nan": math.nan}, "")) == ["/rows/1/w1 0.5 -> 0.6"]
    assert list(runner._compare(kept, {"rows": [1], "nan": math.nan}, "")) != []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_every_benchmark_says_what_it_does(command, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(command), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(command), run_name="__main__")
    assert stop.value.code == 0
    assert f"python benchmarks/{command.name}" in capsys.readouterr().out


def test_ct_pictures_are_half_slices_and_half_phantoms(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    import ct_pictures

    slices, held_out = torch.full((4, 1, 32, 32), 0.25), torch.zeros(3, 1, 32, 32)
    monkeypatch.setattr(ct_pictures, "split", lambda size: (slices, held_out))
    ct_pictures.prepare(6, tmp_path)
    train = np.load(tmp_path / "train.npy")
    assert (train.shape, train.dtype) == ((6, 32, 32), np.uint16)
    assert np.ptp(train[1::2]) <= 1  # a slice of one value stays one, turned and shifted
    assert abs(int(train[1, 0, 0]) - round(0.625 * 65535)) <= 1
    phantoms = np.load(tmp_path / "phantoms.npy")
    assert np.load(tmp_path / "head.npy").shape == (3, 1, 32, 32)
    assert phantoms.shape == (3, 1, 32, 32)
    for body in [*(train[::2] / 65535 * 2 - 1), *phantoms[:, 0]]:
        assert body.min() == -1  # air around
        assert -0.6 < body[body > -0.9].mean() < 0.2  # on the whole as dense as water, which is -1/3
    assert len(np.unique(train[::2], axis=0)) == 3
