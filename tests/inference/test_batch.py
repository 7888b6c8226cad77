"""Many measurements: whatever happens to an item or a process, the others' results are there, once each."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from dpnp_inference.batch.claims import Claims, birth, place, read_owner
from dpnp_inference.batch.folder import BatchFolder
from dpnp_inference.batch.items import open_items
from dpnp_inference.batch.overview import Overview
from dpnp_inference.batch.workers import VARIABLE, Worker, count_processes, device_of, find_worker
from dpnp_inference.cli import main
from dpnp_inference.commands import batch as command
from dpnp_inference.commands.batch import item_seed
from dpnp_inference.dpnp import DPnP, SamplingError
from dpnp_inference.posterior import Posterior

PRIOR = {"mean": 0.0, "covariance": 1.0, "image_shape": [1, 2, 2]}
MATRIX = {"A": [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]], "image_shape": [1, 2, 2]}
CONFIG = {
    "prior": {"class_path": "dpnp_shared.analytic.GaussianPrior", "init_args": PRIOR},
    "operator": {"class_path": "dpnp_shared.operators.MatrixOperator", "init_args": MATRIX},
    "noise": {"class_path": "dpnp_shared.noise.GaussianNoise", "init_args": {"sigma": 0.5}},
    "annealing": {
        "class_path": "dpnp_inference.Annealing",
        "init_args": {"constant": 0, "decay": 2, "final": 0},
    },
    "chains": 5,
    "seed": 3,
    "picture": False,
    "output": "out",
}
SLOW = """
import time
from dpnp_shared.operators import MatrixOperator

class Slow(MatrixOperator):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Six measurements, and no launcher's variables."""
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_", "LSB_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(command, "POLL", 0.01)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("y").mkdir()
    for i in range(6):
        np.save(f"y/y{i}.npy", np.array([i, -i, 1.0]))
    return tmp_path


def run(*options: str, source: tuple[str, ...] = ("--measurements", "y")) -> int:
    """Exit status of the command."""
    try:
        main(["batch", "--config", "config.yaml", *source, *options])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def states(output: str = "out") -> dict:
    return json.loads(Path(output, "manifest.json").read_text())["items"]


def samples(name: str, output: str = "out") -> torch.Tensor:
    return Posterior.load(f"{output}/items/{name}").samples


def spoil():
    """A corrupt file, one of another shape, and one that is not finite."""
    Path("y/corrupt.npy").write_bytes(b"\x93NUMPY nothing")
    np.save("y/long.npy", np.zeros(4))
    np.save("y/nan.npy", np.array([0, np.nan, 0]))


def test_bad_items_are_named_and_the_others_are_done(capsys):
    spoil()
    assert run("--merge", "true") == 3
    found = states()
    assert [name for name, state in found.items() if state["state"] == "failed"] == ["corrupt", "long", "nan"]
    assert [name for name, state in found.items() if state["state"] == "done"] == [f"y{i}" for i in range(6)]
    assert "not a .npy file of numbers" in found["corrupt"]["error"]
    assert "y has shape (4,)" in found["long"]["error"]
    assert "1 NaN" in found["nan"]["error"]
    for state in found.values():
        if state["state"] == "failed":
            assert "Traceback" in Path("out", state["traceback"]).read_text()
            assert "\n" not in state["error"]
    printed = capsys.readouterr().out
    assert "6 done, 3 failed" in printed
    assert printed.count("failed nan: ValueError: y holds 1 NaN") == 2  # when it happens, and in the end
    with open("out/results.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["item"] for row in rows] == list(found)
    assert [row["state"] for row in rows].count("failed") == 3
    assert pyarrow.parquet.read_table("out/results.parquet").column("item").to_pylist() == list(found)
    fits = [row["chi_square"] for row in rows if row["state"] == "done"]
    assert [float(fit) for fit in fits] == [found[f"y{i}"]["chi_square"] for i in range(6)]
    with np.load("out/merged.npz") as merged:
        assert merged["names"].tolist() == [f"y{i}" for i in range(6)]
        np.testing.assert_array_equal(merged["mean"][2], np.load("out/items/y2/mean.npy"))
        np.testing.assert_array_equal(merged["std"][5], np.load("out/items/y5/std.npy"))
    assert os.listdir("out/claims") == []
    assert not list(Path("out").rglob(".*"))


def test_done_items_are_skipped_and_failed_ones_tried_again(capsys):
    spoil()
    run()
    before = {file: file.stat().st_mtime_ns for file in Path("out/items").rglob("*") if file.is_file()}
    np.save("y/long.npy", np.zeros(3))
    os.utime("y/y0.npy")  # touched, with the same content
    capsys.readouterr()
    assert run() == 3
    printed = capsys.readouterr().out
    assert printed.count("done ") == 1
    assert "done long" in printed
    assert "attempt 2" in printed
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert states()["nan"]["attempts"] == 2
    assert states()["long"]["attempts"] == 2
    os.remove("y/corrupt.npy")
    os.remove("y/nan.npy")
    assert run() == 0
    assert sorted(os.listdir("out/failures")) == ["corrupt.json", "corrupt.txt", "nan.json", "nan.txt"]
    assert [*states()] == ["long", *(f"y{i}" for i in range(6))]


def test_a_changed_measurement_is_done_again_and_said_aloud(capsys):
    assert run() == 0
    before = {name: samples(name) for name in states()}
    np.save("y/y3.npy", np.array([9.0, 9.0, 9.0]))
    capsys.readouterr()
    assert run() == 0
    printed = capsys.readouterr().out
    assert "changed y3" in printed
    assert printed.count("done y") == 1
    assert {name for name in before if not torch.equal(before[name], samples(name))} == {"y3"}
    np.save("y/y3.npy", np.zeros(2))
    assert run() == 3
    assert not os.path.exists("out/items/y3")  # what was done is not of what is there
    assert states()["y3"]["state"] == "failed"


def test_another_configuration_is_refused_unless_fresh(capsys):
    assert run() == 0
    before = samples("y0")
    assert run("--chains", "6") == 1
    message = capsys.readouterr().err
    assert "another configuration (chains)" in message
    assert "--fresh true" in message
    assert samples("y0").shape[0] == 5
    assert run("--chains", "6", "--fresh", "true") == 0
    assert samples("y0").shape[0] == 6
    assert torch.equal(samples("y0")[:5], before)  # a chain does not depend on how many there are
    assert run("--chains", "6", "--batch_size", "2", "--retries", "1") == 0  # neither changes a result
    assert run("--chains", "6", "--output", "y") == 1
    assert "not the folder of a batch" in capsys.readouterr().err


def test_an_item_is_the_single_reconstruction_that_its_record_names():
    np.save("x.npy", np.arange(12.0).reshape(3, 1, 2, 2) / 6 - 1)
    run()
    run("--output", "images", source=("--images", "x.npy"))
    for item in ("out/items/y4", "images/items/000001"):
        record = json.loads(Path(item, "run.json").read_text())
        assert record["seed"] == item_seed(3, Path(item).name)
        Path("single.yaml").write_text(yaml.safe_dump(record["config"]))
        main(["--config", "single.yaml", "--output", "single", "--overwrite", "true"])
        assert torch.equal(Posterior.load(item).samples, Posterior.load("single").samples)
    assert states("images")["000001"]["scores"].keys() >= {"psnr"}


def test_a_result_does_not_depend_on_who_makes_it(monkeypatch):
    run()
    monkeypatch.setenv(VARIABLE, json.dumps({"rank": 1, "size": 2, "run": "a"}))
    run("--output", "other")
    order = sorted(states("other"), key=lambda name: os.stat(f"other/items/{name}").st_mtime_ns)
    assert order == ["y3", "y4", "y5", "y0", "y1", "y2"]
    for name in order:
        assert torch.equal(samples(name), samples(name, "other"))


def test_what_goes_wrong_in_sampling_is_the_items_own(monkeypatch, capsys):
    task = DPnP.task
    calls = []

    def broken(self, y, **kwargs):
        calls.append(float(y[0]))
        if y[0] == 1:
            raise SamplingError("chains 0-4 have left the finite numbers")
        if y[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if y[0] == 3 and calls.count(3.0) == 1:
            raise RuntimeError("for once")
        return task(self, y, **kwargs)

    monkeypatch.setattr(DPnP, "task", broken)
    assert run("--retries", "1") == 3
    assert calls == [0, 1, 2, 3, 4, 5, 1, 2, 3]
    found = states()
    assert {name for name, state in found.items() if state["state"] == "failed"} == {"y1", "y2"}
    assert found["y1"]["error"] == "SamplingError: chains 0-4 have left the finite numbers"
    assert found["y2"]["error"] == "OutOfMemoryError: CUDA out of memory"
    assert [found[name]["attempts"] for name in ("y0", "y1", "y3")] == [1, 2, 2]


def test_a_folder_that_cannot_be_written_to_stops_the_run(monkeypatch, capsys):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "staged_folder", full)
    assert run() == 1
    assert "cannot be written to: [Errno 28] No space left" in capsys.readouterr().err
    assert os.listdir("out/claims") == os.listdir("out/failures") == []  # it is no item's fault


def test_an_interrupted_run_gives_its_item_up(monkeypatch):
    def stop(*args, **kwargs):
        assert os.listdir("out/claims") == ["y0.1"]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(DPnP, "task", stop)
    assert run() == 128 + signal.SIGTERM
    assert os.listdir("out/claims") == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# claims


@pytest.fixture
def claims():
    with Claims(Path("claims"), stale=0.4) as claims:
        yield claims


def leave_claim(name: str, **owner) -> Path:
    """A claim whose owner is gone, or on another host."""
    Path("claims").mkdir(exist_ok=True)
    file = Path("claims", name)
    ended = subprocess.Popen(["true"])
    ended.wait()
    known = {"host": "here", "place": place(), "pid": ended.pid, "born": "1", "started": "2026-01-01T00:00:00+0000"}
    file.write_text(json.dumps({**known, **owner}))
    return file


def test_an_item_has_one_owner(claims):
    mine = claims.take("a")
    assert mine is not None
    assert claims.take("a") is None
    assert claims.take("a.1") is not None  # another item
    claims.release(mine)
    assert claims.take("a") is not None


def test_a_dead_process_of_this_host_is_known_at_once(claims):
    leave_claim("a.1")
    leave_claim("b.1", pid=os.getpid())  # the number was given to another process since
    leave_claim("c.1", pid=os.getpid(), born=birth(os.getpid()))
    taken = claims.take("a")
    assert taken is not None
    assert taken.number == 2
    assert claims.take("b") is not None
    assert claims.take("c") is None
    claims.release(taken)
    assert sorted(os.listdir("claims")) == ["b.1", "b.2", "c.1"]


def test_a_process_of_another_host_is_dead_when_it_gives_no_sign(claims):
    file = leave_claim("a.1", place="elsewhere")
    os.utime(file, (0, 0))  # clocks of other hosts say nothing
    assert claims.take("a") is None
    time.sleep(0.25)
    os.utime(file)
    assert claims.take("a") is None
    time.sleep(0.25)
    assert claims.take("a") is None
    time.sleep(0.3)
    assert claims.take("a") is not None


def test_a_claim_is_kept_fresh_and_a_lost_one_is_left_alone(claims):
    mine = claims.take("a")
    assert mine is not None
    elsewhere = Claims(Path("claims"), stale=0.4)
    elsewhere.owner["place"] = "elsewhere"
    mine.file.write_text(json.dumps({**claims.owner, "place": "elsewhere"}))
    for _ in range(4):
        assert elsewhere.take("a") is None
        time.sleep(0.2)
    assert claims.holds(mine)
    claims._held.clear()  # as if the process were suspended
    time.sleep(0.2)
    elsewhere.take("a")
    time.sleep(0.5)
    assert elsewhere.take("a") is not None
    assert not claims.holds(mine)
    claims.release(mine)
    assert sorted(os.listdir("claims")) == ["a.1", "a.2"]


def test_of_many_only_one_takes_over(claims):
    for i in range(20):
        leave_claim(f"{i}.1")
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda _, i=i: claims.take(str(i)), range(8)))
        assert sum(claim is not None for claim in taken) == 1


def test_what_dead_processes_leave_is_removed():
    run()
    ended = leave_claim("y1.1")
    pid = read_owner(ended)["pid"]
    ended.rename("out/claims/y1.1")
    leave_claim("y2.1", place="elsewhere").rename("out/claims/y2.1")  # may be at it
    Path("out/items/.y1.abc").mkdir()
    Path("out/items/.y1.old.abc").mkdir()
    Path("out/items/.y2.abc").mkdir()
    host = socket.gethostname()
    Path(f"out/.manifest.json.{host}.{pid}").touch()
    Path(f"out/.manifest.json.{host}.{os.getpid()}").touch()
    Path(f"out/.manifest.json.elsewhere.{pid}").touch()
    assert run() == 0
    assert os.listdir("out/claims") == ["y2.1"]
    assert [file.name for file in Path("out/items").glob(".*")] == [".y2.abc"]
    assert sorted(file.name for file in Path("out").glob(".*")) == sorted([f".manifest.json.elsewhere.{pid}"])


@pytest.fixture
def stopped(monkeypatch):
    """A batch that was interrupted after two iterations of y2; then, the iterations that are done from there on."""
    iterations = []

    def interrupt(overview, sweep):
        if overview._name == "y2" and sweep.iteration == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Overview, "sweep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("--checkpoint_every", "0", "--draws", "3")
    monkeypatch.setattr(Overview, "sweep", lambda overview, sweep: iterations.append((overview._name, sweep.iteration)))
    assert os.listdir("out/states") == ["y2"]
    return iterations


def test_an_interrupted_item_goes_on(stopped):
    assert run("--checkpoint_every", "0", "--draws", "3") == 0
    assert stopped[0] == ("y2", 2)
    assert not Path("out/states").exists()
    assert run("--draws", "3", "--output", "whole") == 0
    for i in range(6):
        assert torch.equal(samples(f"y{i}"), samples(f"y{i}", "whole"))


def test_an_item_that_is_another_now_begins_anew(stopped, caplog):
    np.save("y/y2.npy", np.array([0.0, 1.0, 2.0]))
    assert run("--checkpoint_every", "0", "--draws", "3") == 0
    assert stopped[0] == ("y2", 1)
    assert "y2 begins anew" in caplog.text
    assert "measurement" in caplog.text


@pytest.mark.pictures
def test_statistics_and_reports():
    assert run("--keep", "statistics", "--draws", "3", "--report", "true") == 0
    assert run("--draws", "3", "--output", "whole") == 0
    for name, state in states().items():
        posterior = Posterior.load(f"out/items/{name}")
        assert posterior.samples.shape[1] == 1
        torch.testing.assert_close(posterior.mean, Posterior.load(f"whole/items/{name}").mean)
        assert "<html" in Path(f"out/items/{name}/report.html").read_text()
        assert state["verdict"]


def test_an_item_at_which_processes_die_has_failed():
    (Path("out") / "claims").mkdir(parents=True)
    run("--output", "elsewhere")
    os.rename("elsewhere/batch.json", "out/batch.json")
    for number in (1, 2):
        leave_claim(f"y2.{number}").rename(f"out/claims/y2.{number}")
    leave_claim("y3.1").rename("out/claims/y3.1")  # once may be chance
    assert run() == 3
    assert "processes died at it 2 times in a row" in states()["y2"]["error"]
    assert states()["y3"]["state"] == "done"
    assert run() == 0  # and the next run tries again


# processes


def slow_down():
    Path("slow.py").write_text(SLOW)
    config = {**CONFIG, "operator": {"class_path": "slow.py:Slow", "init_args": MATRIX}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    for i in range(18):
        np.save(f"y/z{i:02d}.npy", np.array([i, -i, 1.0]))


def finished_names(text: str) -> list[str]:
    return sorted(line.split()[1] for line in text.splitlines() if line.startswith("done "))


@pytest.mark.slow
def test_one_of_two_processes_is_killed_half_way(capfd, caplog):
    slow_down()

    def kill_one() -> int:
        while True:
            for file in Path("out").glob("claims/*"):
                owner = read_owner(file) if len(list(Path("out/items").glob("[yz]*"))) > 4 else {}
                if owner:
                    os.kill(owner["pid"], signal.SIGKILL)
                    return owner["pid"]
            time.sleep(0.01)

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill_one)
        assert run("--processes", "2") == 0
        killed.result()
    found = states()
    assert len(found) == 24
    assert {state["state"] for state in found.values()} == {"done"}
    assert {state["processes"] for state in found.values()} == {2}
    told = finished_names(capfd.readouterr().out)
    assert len({*told}) == len(told)  # none twice
    assert len({*found} - {*told}) <= 1  # the process may be killed when its item is done and it has yet to say so
    assert caplog.text.count("another takes its place") == 1
    assert os.listdir("out/claims") == []


@pytest.mark.slow
def test_torchrun():
    arguments = ["batch", "--config", "config.yaml", "--measurements", "y"]
    np.save("y/nan.npy", np.full(3, np.nan))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*launcher, "-m", "dpnp_inference.cli", *arguments], capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 1  # torchrun's own for a process that did not end with 0
    found = states()
    assert [name for name, state in found.items() if state["state"] != "done"] == ["nan"]
    assert {state["processes"] for state in found.values()} == {2}
    assert found["nan"]["attempts"] == 1  # a failure of one process is one of the run
    assert finished_names(ended.stdout) == [f"y{i}" for i in range(6)]


SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "batch",
}


def test_slurm(monkeypatch, capsys):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    worker = find_worker()
    assert worker == Worker(3, 4, 1, "SLURM_JOB_ID=77 SLURM_STEP_ID=0 SLURM_RESTART_COUNT=", "SLURM")
    spoil()
    assert run() == 3
    assert {state["processes"] for state in states().values()} == {4}
    monkeypatch.setenv("SLURM_PROCID", "0")  # another process of the same step, which comes late
    assert run() == 3
    assert states()["nan"]["attempts"] == 1
    monkeypatch.setenv("SLURM_STEP_ID", "1")  # the command again
    assert run() == 3
    assert states()["nan"]["attempts"] == 2
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    assert find_worker().run == "SLURM_ARRAY_JOB_ID=70 SLURM_RESTART_COUNT="
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    capsys.readouterr()
    assert run() == 1
    assert "ntasks-per-node" in capsys.readouterr().err


def test_torchruns_variables(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    for name, value in SLURM.items():  # torchrun within a job
        monkeypatch.setenv(name, value)
    worker = find_worker()
    assert (worker.rank, worker.size, worker.local, worker.launcher) == (5, 8, 1, "TorchElastic")


def test_devices(monkeypatch):
    found = [torch.device("cuda", i) for i in range(4)]
    monkeypatch.setattr("dpnp_inference.batch.workers.accelerators", lambda: found)
    assert [device_of(Worker(local=i), "auto") for i in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert device_of(Worker(local=2), "cuda") == "cuda:2"
    assert device_of(Worker(local=2), "cuda:1") == "cuda:1"
    assert device_of(Worker(local=2), "cpu") == "cpu"
    assert count_processes("auto") == 4
    found.clear()
    assert device_of(Worker(local=2), "auto") == "cpu"
    assert count_processes("auto") == 1
    with pytest.raises(ValueError, match="processes = 0"):
        count_processes(0)


# sources


def test_files_keep_their_names():
    Path("y/more").mkdir()
    Path("y/.hidden.npy").touch()
    Path("y/notes.txt").touch()
    np.savez("y/more/z.npz", a=np.zeros(3), b=np.ones(3))
    torch.save(torch.zeros(3), "y/more/t.pt")
    Image.new("L", (2, 2), 7).save("y/more/p.png")
    assert open_items("y", argument="measurements").names == [f"y{i}" for i in range(6)]
    items = open_items("y", argument="measurements", recursive=True, key="b")
    assert items.names[:3] == ["more__p", "more__t", "more__z"]
    assert items.read("more__z").tolist() == [1, 1, 1]
    assert items.read("more__p").tolist() == [[[7, 7], [7, 7]]]
    assert open_items("y", argument="measurements", pattern="*.txt").names == ["notes"]
    np.save("y/notes.npy", np.zeros(3))
    with pytest.raises(ValueError, match="would both be the item 'notes'; choose by pattern"):
        open_items("y", argument="measurements", pattern="notes*")
    with pytest.raises(FileNotFoundError, match=r"measurements = 'y' holds nothing that matches '\*.tif'"):
        open_items("y", argument="measurements", pattern="*.tif")
    with pytest.raises(FileNotFoundError, match="images = 'no/such/thing' is neither a file nor a folder"):
        open_items("no/such/thing", argument="images")
    with pytest.raises(ValueError, match=r"images = 'config\.yaml'; allowed are"):
        open_items("config.yaml", argument="images")


def test_medical_files_have_their_units():
    Path("scans").mkdir()
    pixels = np.array([[0.0, 255.0], [63.75, 127.5]], dtype=np.float32)  # of the card's source range, 0 to 255
    nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), "scans/a.nii.gz")
    Path("scans/notes.txt").write_text("no scan")
    assert run(source=("--images", "scans")) == 0
    assert sorted(np.load("out/items/a/truth.npy").flatten()) == [-1.0, -0.5, 0.0, 1.0]


def test_an_array_file_holds_many():
    np.save("y.npy", np.arange(6.0).reshape(2, 3))
    np.savez("y.npz", a=np.arange(6.0).reshape(2, 3), b=np.zeros(3))
    for items in (open_items("y.npy", argument="images"), open_items("y.npz", argument="images", key="a")):
        assert items.names == ["000000", "000001"]
        assert items.read("000001").tolist() == [3, 4, 5]
        assert items.digest("000000") != items.digest("000001")
    with pytest.raises(ValueError, match="begins with the number of items"):
        open_items("y.npz", argument="images", key="b")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tables(monkeypatch, tmp_path, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    y = [[[float(i)], [-i], [0.5]] for i in range(3)]
    features = datasets.Features({"y": datasets.Array2D((3, 1), "float32"), "name": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"y": y, "name": ["a/b", "c", ".d"]}, features=features)
    table.save_to_disk("saved")
    table.to_parquet("y.parquet")
    Path("y.json").write_text(json.dumps([{"y": row} for row in y]))
    with open("y.csv", "w") as stream:
        csv.writer(stream).writerows([["name", "y"], *((f"n{i}", json.dumps(row)) for i, row in enumerate(y))])
    options = {"argument": "measurements", "column": "y", "name_column": "name"}
    for source in ("saved", "y.parquet"):
        items = open_items(source, **options)
        assert items.names == ["a_b", "c", "_d"]
        assert items.read("c").dtype == torch.float32
        assert items.read("c").tolist() == y[1]
        assert items.stamp("c") == open_items(source, **options).stamp("c")
    assert open_items("y.json", argument="measurements").read("000002").tolist() == y[2]
    assert open_items("y.csv", **options).read("n2").tolist() == y[2]
    for wrong, message in (
        ({"column": "x"}, r"column = 'x'; measurements = 'saved' has the columns \['y', 'name'\]"),
        ({}, "column = None"),
        ({"column": "y", "name_column": "x"}, "name_column = 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_items("saved", argument="measurements", **wrong)
    datasets.Dataset.from_dict({"y": [[0.0, 0, 0], [1, 1, 1], None]}).to_parquet("flat.parquet")
    assert run(source=("--measurements", "flat.parquet")) == 3
    assert {name: state["state"] for name, state in states().items()} == {
        "000000": "done",
        "000001": "done",
        "000002": "failed",
    }
    assert "column 'y' is empty" in states()["000002"]["error"]


# what one sees


def test_status(capsys):
    spoil()
    run()
    os.rename("out/items/y5", "gone")
    os.rename("out/items/y4", "gone4")
    leave_claim("y5.1", pid=os.getpid(), born=birth(os.getpid())).rename("out/claims/y5.1")
    leave_claim("y4.1").rename("out/claims/y4.1")
    capsys.readouterr()
    main(["batch", "--status", "out", "--json", "true"])
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["counts"] == {"done": 4, "failed": 3, "running": 1, "pending": 1}
    assert manifest["items"]["y5"]["state"] == "running"
    assert manifest["items"]["y4"]["state"] == "pending"  # whoever was at it is dead
    main(["batch", "--status", "out"])
    printed = capsys.readouterr().out
    assert "4 done, 3 failed, 1 running, 1 pending" in printed
    assert "corrupt" in printed
    with pytest.raises(SystemExit, match="'y' is not the folder of a batch"):
        main(["batch", "--status", "y"])


def test_bad_options(capsys):
    for options, message in (
        (("--images", "y"), "measurements and images were both given"),
        (("--retries", "-1"), "retries = -1"),
        (("--stale", "0"), "stale = 0.0; it must be positive"),
        (("--processes", "0"), "processes = 0"),
        (("--chains", "0"), "chains = 0"),
    ):
        assert run(*options) == 1
        assert message in capsys.readouterr().err
    assert not os.path.exists("out")


def test_a_terminal_shows_failures_above_the_overview(capsys):
    with open("screen", "w") as stream, Overview(2, Console(file=stream, force_terminal=True, width=120)) as overview:
        overview.begin("a")
        overview.line("done a (1.0 s)", always=False)
        overview.line("failed b: ValueError: bad", always=True)
        overview.counts(2, "1 failed")
    shown = Path("screen").read_text()
    assert "failed b: ValueError: bad" in shown
    assert "2/2" in shown
    assert "done a" not in shown
    assert capsys.readouterr().out == ""


def test_the_folder_of_another_configuration_is_not_looked_at():
    run()
    folder = BatchFolder(Path("out"), "other")
    assert {state["state"] for state in folder.states(["y0", "y1"]).values()} == {"pending"}
