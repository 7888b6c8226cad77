"""Runs that are interrupted, gone on with and extended."""

import json
import logging
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dpnp_inference import (
    HMC,
    MALA,
    Annealing,
    ClosedForm,
    DPnP,
    EllipticalSlice,
    PerturbAndSolve,
    PixelwiseSlice,
    Population,
    Posterior,
    ReplicaExchange,
)
from dpnp_inference.checkpoint import LATEST, PREVIOUS, FolderLock, RunError
from dpnp_inference.fingerprint import describe, differences
from dpnp_inference.state import StateError, changes, read_state, restored, write_state
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, LaplaceNoise
from dpnp_shared.operators import Identity, MatrixOperator, Operator

SHAPE = (1, 1, 3)
A = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.6, -0.8]], dtype=torch.float64)
Y = torch.tensor([0.9, -0.3], dtype=torch.float64)
MIXTURE = GaussianMixturePrior(
    torch.tensor([[0.8, -0.5, 0.6], [-0.8, 0.6, -0.2]], dtype=torch.float64), torch.tensor([0.3, 0.7]), 0.15, SHAPE
)
LINEAR = ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(0.5))
SHORT = Annealing(constant=1, decay=3, final=1)
CHAINS, DRAWS = 7, 3
HOW = {"chains": CHAINS, "seed": 3, "draws": DRAWS, "thin": 2, "batch_size": 3}
KINDS = {
    "chains": False,
    "population": Population(start=2, populations=2),
    "replicas": ReplicaExchange(burn_in=2, ladder=Population(start=1, ess=0.5, final=1, populations=1)),
}
KERNELS = {
    "closed": ClosedForm(),
    "perturb": PerturbAndSolve(),
    "mala": MALA(steps=2, warmup=2),
    "hmc": HMC(steps=1, leapfrogs=2, warmup=2),
    "slice": EllipticalSlice(steps=2),
}


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("dpnp_inference.state.os.fsync", lambda descriptor: None)


class StoppedError(Exception):
    """What interrupts a run."""


def sampler(kernel="closed", kind="chains", prior=MIXTURE, model=LINEAR) -> DPnP:
    proximal = KERNELS[kernel] if isinstance(kernel, str) else kernel
    return DPnP(prior, model, proximal=proximal, annealing=SHORT, population=KINDS[kind], dtype=torch.float64)


def stop_after(iterations: int):
    left = [iterations]

    def on_sweep(sweep):
        left[0] -= 1
        if left[0] < 0:
            raise StoppedError

    return on_sweep


def interrupted(make, folder, *, y=Y, **how) -> tuple[Posterior, int]:
    """The posterior of a run that is interrupted after 1 to 9 iterations again and again, and how often that was."""
    moments = random.Random(0)
    for times in range(300):
        try:
            run = make().sample(
                y, **how, checkpoint=folder, checkpoint_every=0, on_sweep=stop_after(moments.randint(1, 9))
            )
        except StoppedError:
            continue
        return run, times
    raise AssertionError("the run never ends")


def assert_same(a: Posterior, b: Posterior) -> None:
    """Draws, statistics and record are the same, but for the time that it took."""
    assert torch.equal(a.samples, b.samples)
    assert (a.statistics is None) == (b.statistics is None)
    if a.statistics is not None:
        mine, others = a.statistics.state_dict(), b.statistics.state_dict()
        assert all(torch.equal(value, others[name]) for name, value in mine.items())

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key != "seconds"}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    assert repr(timeless(a.diagnostics)) == repr(timeless(b.diagnostics))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_interrupted_run_ends_as_one_that_was_left_alone(kind, kernel, tmp_path):
    whole = sampler(kernel, kind).sample(Y, **HOW)
    resumed, times = interrupted(lambda: sampler(kernel, kind), tmp_path / "state", **HOW)
    assert times >= 2
    assert_same(whole, resumed)


@pytest.mark.parametrize("noise", [LaplaceNoise(0.3), GaussianNoise(0.3)], ids=["laplace", "gaussian"])
def test_pixelwise_slices_and_single_precision_too(noise, tmp_path):
    def make():
        model = ForwardModel(Identity(), noise)
        prior = GaussianPrior(torch.zeros(3), torch.eye(3), SHAPE)
        return DPnP(prior, model, proximal=PixelwiseSlice(steps=1), annealing=SHORT)

    y = torch.tensor([0.5, -1.0, 0.2]).reshape(SHAPE)
    whole = make().sample(y, **HOW)
    resumed, times = interrupted(make, tmp_path / "state", y=y, **HOW)
    assert times >= 2
    assert_same(whole, resumed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", ["statistics", 2])
def test_statistics_are_gone_on_with(kind, keep, tmp_path):
    whole = sampler(kind=kind).sample(Y, **HOW, keep=keep)
    resumed, times = interrupted(lambda: sampler(kind=kind), tmp_path / "state", **HOW, keep=keep)
    assert times >= 2
    assert_same(whole, resumed)
    every = sampler(kind=kind).sample(Y, **HOW)
    assert torch.equal(whole.samples[:, -1], every.samples[:, -1])
    torch.testing.assert_close(whole.mean, every.mean)
    torch.testing.assert_close(whole.std, every.std)


def test_memory_does_not_grow_with_the_draws_where_statistics_are_kept():
    def kept(draws, keep):
        made = sampler().sample(Y, chains=40, seed=0, draws=draws, keep=keep)
        return made.samples.numel() * 8 + (made.statistics.nbytes if made.statistics else 0)

    assert kept(20, "statistics") == kept(60, "statistics")
    assert kept(60, "all") == 3 * kept(20, "all")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ["closed", "mala"])
def test_further_draws_are_those_of_one_longer_run(kind, kernel, tmp_path):
    whole = sampler(kernel, kind).sample(Y, **HOW)
    short = sampler(kernel, kind).sample(Y, **{**HOW, "draws": 1})
    assert_same(whole, sampler(kernel, kind).sample(Y, **HOW, extend=short.save(tmp_path / "short")))
    # and an extension that is interrupted
    resumed, times = interrupted(lambda: sampler(kernel, kind), tmp_path / "state", **HOW, extend=short)
    assert times >= 1
    assert_same(whole, resumed)


@pytest.mark.parametrize("kernel", KERNELS)
def test_further_chains_and_draws_are_those_of_one_run(kernel):
    whole = sampler(kernel).sample(Y, **HOW)
    first = sampler(kernel).sample(Y, **{**HOW, "chains": 3, "draws": 2})
    second = sampler(kernel).sample(Y, **{**HOW, "chains": 6, "draws": 2}, extend=first)
    assert_same(whole, sampler(kernel).sample(Y, **HOW, extend=second))


def test_batches_that_do_not_match_change_rounding_only():
    whole = sampler("mala").sample(Y, **{**HOW, "batch_size": None})
    first = sampler("mala").sample(Y, **{**HOW, "chains": 4, "batch_size": None})
    more = sampler("mala").sample(Y, **{**HOW, "batch_size": None}, extend=first)
    torch.testing.assert_close(more.samples, whole.samples)
    assert torch.equal(more.samples[:4], first.samples)


def test_statistics_are_extended(tmp_path):
    how = {**HOW, "keep": "statistics"}
    whole, first = sampler().sample(Y, **how), sampler().sample(Y, **{**how, "chains": 3, "draws": 2})
    more = sampler().sample(Y, **how, extend=first)
    assert torch.equal(more.samples, whole.samples)
    torch.testing.assert_close(more.mean, whole.mean)
    torch.testing.assert_close(more.std, whole.std)
    assert more.statistics.count == CHAINS * DRAWS
    resumed, times = interrupted(sampler, tmp_path, **how, extend=first)
    assert times >= 1
    assert_same(more, resumed)


def test_what_cannot_be_extended_is_refused():
    small = sampler().sample(Y, **{**HOW, "chains": 3})
    for change, words in (
        ({"chains": 3}, "3 chains of 3 draws, asked for are 3 of 3"),
        ({"draws": 2}, "none fewer"),
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"keep": "statistics"}, "keep: all there, statistics here"),
    ):
        with pytest.raises(RunError, match=words):
            sampler().sample(Y, **{**HOW, **change}, extend=small)
    with pytest.raises(RunError, match="without the state"):
        sampler().sample(Y, **HOW, extend=small[:2])
    spaced = sampler().sample(Y, **HOW, keep=2)
    with pytest.raises(ValueError, match="needed is 'all' or 'statistics'"):
        sampler().sample(Y, **{**HOW, "draws": 9}, keep=2, extend=spaced)
    for kind in ("population", "replicas"):
        some = sampler(kind=kind).sample(Y, **HOW)
        with pytest.raises(RunError, match="only draws can be added"):
            sampler(kind=kind).sample(Y, **{**HOW, "chains": 9}, extend=some)


def half_done(folder, **how):
    with pytest.raises(StoppedError):
        sampler().sample(Y, **{**HOW, **how}, checkpoint=folder, checkpoint_every=0, on_sweep=stop_after(10))


def test_a_state_of_other_settings_is_refused_and_says_what_differs(tmp_path):
    half_done(tmp_path)
    other_prior = GaussianPrior(torch.zeros(3), torch.eye(3), SHAPE)
    for words, make, y, change in (
        ("draws: 3 there, 2 here", sampler, Y, {"draws": 2}),
        ("seed: 3 there, 4 here", sampler, Y, {"seed": 4}),
        (r"chains\.?1?: .*7.* there, .*5.* here", sampler, Y, {"chains": 5}),
        ("measurement", sampler, Y + 1e-12, {}),
        ("prior.class: dpnp_shared.analytic", lambda: sampler(prior=other_prior), Y, {}),
        (r"noise.sigma", lambda: sampler(model=ForwardModel(MatrixOperator(A, SHAPE), GaussianNoise(0.4))), Y, {}),
        (
            r"operator.matrix",
            lambda: sampler(model=ForwardModel(MatrixOperator(2 * A, SHAPE), GaussianNoise(0.5))),
            Y,
            {},
        ),
        ("proximal.class", lambda: sampler("perturb"), Y, {}),
    ):
        with pytest.raises(RunError, match=f"{words}.*--fresh true"):
            make().sample(y, **{**HOW, **change}, checkpoint=tmp_path)
    assert_same(sampler().sample(Y, **HOW), sampler().sample(Y, **HOW, checkpoint=tmp_path))  # it has come to no harm


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text", "missing"])
def test_of_a_damaged_state_the_one_before_is_taken(damage, tmp_path, caplog):
    half_done(tmp_path)
    file = tmp_path / LATEST
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": content[:-100], "bit": content, "empty": b"", "text": b"{}" * 50}[damage])
    with caplog.at_level(logging.INFO):
        resumed = sampler().sample(Y, **HOW, checkpoint=tmp_path)
    assert ("is damaged" in caplog.text) == (damage != "missing")
    assert "going on after iteration 9 of 27" in caplog.text
    assert_same(sampler().sample(Y, **HOW), resumed)


def test_where_both_are_damaged_the_run_begins_anew_and_says_so(tmp_path, caplog):
    half_done(tmp_path)
    for name in (LATEST, PREVIOUS):
        (tmp_path / name).write_bytes(b"nothing")
    resumed = sampler().sample(Y, **HOW, checkpoint=tmp_path)
    assert caplog.text.count("is damaged") == 2
    assert_same(sampler().sample(Y, **HOW), resumed)


def test_a_full_disk_is_a_warning_and_the_last_state_stays(tmp_path, monkeypatch, caplog):
    half_done(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dpnp_inference.state.os.fsync", full)
        resumed = sampler().sample(Y, **HOW, checkpoint=tmp_path, checkpoint_every=0)
    assert "No space left on device; the run goes on" in caplog.text
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.safetensors")} == before
    assert not list(tmp_path.glob("*.tmp"))
    whole = sampler().sample(Y, **HOW)
    assert_same(whole, resumed)
    assert_same(whole, sampler().sample(Y, **HOW, checkpoint=tmp_path))


def test_a_finished_run_is_not_run_again(tmp_path):
    first = sampler().sample(Y, **HOW, checkpoint=tmp_path)
    again = sampler().sample(Y, **HOW, checkpoint=tmp_path, on_sweep=stop_after(0))
    assert_same(first, again)


def test_two_runs_do_not_use_one_folder(tmp_path):
    with FolderLock(tmp_path / "state"), pytest.raises(RunError, match=r"in use by process \d+ on "):
        sampler().sample(Y, **HOW, checkpoint=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_folder_that_comes_and_goes_belongs_to_one_at_a_time(tmp_path):
    inside, most = 0, 0

    def enter(_):
        nonlocal inside, most
        with FolderLock(tmp_path / "state", patience=60):
            inside += 1
            most = max(most, inside)
            time.sleep(0.002)
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(40)))
    assert most == 1
    assert not (tmp_path / "state").exists()


def test_a_folder_removed_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    make, removed = Path.mkdir, [FileExistsError(), FileNotFoundError()]

    def mkdir(self, *args, **kwargs):
        if removed:
            raise removed.pop()
        return make(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with FolderLock(tmp_path / "state"):
        assert not removed
    assert not (tmp_path / "state").exists()


def test_a_folder_that_another_process_has_begun_in_is_left(tmp_path, monkeypatch):
    remove = Path.unlink

    def unlink(self, *args, **kwargs):
        remove(self, *args, **kwargs)
        self.with_name("of another").touch()

    with FolderLock(tmp_path / "above" / "state"):
        monkeypatch.setattr(Path, "unlink", unlink)
    assert [file.name for file in (tmp_path / "above" / "state").iterdir()] == ["of another"]


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "state").touch()
    with pytest.raises(FileExistsError), FolderLock(tmp_path / "state"):
        pass


def test_a_negative_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every = -1"):
        sampler().sample(Y, **HOW, checkpoint=tmp_path, checkpoint_every=-1)


def test_a_proximal_state_that_cannot_be_kept_is_a_warning(tmp_path, caplog):
    class Odd:
        """Not a tensor, and no structure of them."""

    class Kernel(EllipticalSlice):
        def init(self, forward_model, y, x):
            return {"state": super().init(forward_model, y, x), "odd": Odd()}

        def step(self, state, x, eta, *, generator):
            new, z, info = super().step(state["state"], x, eta, generator=generator)
            return {"state": new, "odd": Odd()}, z, info

        def retarget(self, state, forward_model):
            return {**state, "state": super().retarget(state["state"], forward_model)}

    made = sampler(Kernel(steps=1)).sample(Y, **HOW, checkpoint=tmp_path, checkpoint_every=0)
    assert "holds a Odd, which cannot be kept" in caplog.text
    assert made.state is None


def test_states_go_through_files(tmp_path):
    state = {
        "a": torch.randn(2, 3, dtype=torch.complex64),
        "b": [torch.tensor(1.5), {"c": torch.arange(3)[1:], "d": float("nan")}],
        "tensor:text": "tensor:a",
        "none": None,
        "empty": torch.zeros(0, 2),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    write_state(tmp_path / "s", state, {"of": "this"})
    found, about = read_state(tmp_path / "s")
    assert about == {"of": "this"}
    assert torch.equal(found["a"], state["a"])
    assert torch.equal(found["b"][0], state["b"][0])
    assert torch.equal(found["b"][1]["c"], state["b"][1]["c"])
    assert found["b"][1]["d"] != found["b"][1]["d"]
    assert found["tensor:text"] == "tensor:a"
    assert found["none"] is None
    assert found["empty"].shape == (0, 2)
    assert found["half"].dtype == torch.bfloat16
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "none")
    (tmp_path / "s").write_bytes(b"\x00" * 20)
    with pytest.raises(StateError, match="is damaged"):
        read_state(tmp_path / "s")


def test_only_what_has_changed_is_kept():
    kernel, x = MALA(steps=1, warmup=1), torch.zeros(2, *SHAPE, dtype=torch.float64)
    initial = kernel.init(LINEAR, Y, x)
    moved = initial._replace(z=x + 1, eta=0.5)
    kept = changes(moved, initial)
    assert kept.keys() == {"z", "eta"}
    again = restored(kernel.init(LINEAR, Y, x), kept, torch.device("cpu"))
    assert torch.equal(again.z, x + 1)
    assert again.eta == 0.5
    assert again.forward_model is LINEAR


def test_descriptions_tell_things_apart_and_are_the_same_for_equals():
    class Scale(Operator):
        def __init__(self, factor, extra=None):
            super().__init__()
            self.factor, self.extra = factor, extra

        def forward(self, x):
            return self.factor * x

    assert describe(Scale(2.0)) == describe(Scale(2.0))
    assert json.dumps(describe(Scale(2.0)))
    assert differences(describe(Scale(2.0)), describe(Scale(3.0))) == ["factor: 2.0 there, 3.0 here"]
    assert describe(Scale(1, torch.ones(2))) != describe(Scale(1, torch.zeros(2)))
    assert describe(Scale(1, lambda x: x)) == describe(Scale(1, lambda x: x))
    cached = MatrixOperator(A, SHAPE)
    before = describe(cached)
    cached.norm()
    assert describe(cached) == before
    loop = Scale(1)
    loop.extra = [loop]
    assert json.dumps(describe(loop))
