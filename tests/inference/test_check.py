import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from dpnp_inference import DDSDDIM, Annealing, ClosedForm, DPnP
from dpnp_inference.baselines import DPS
from dpnp_inference.calibration import Ranks, assess
from dpnp_inference.check import PairProgress, PairStore, check_pairs, simulate_pair
from dpnp_inference.cli import main
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import RandomInpainting
from dpnp_shared.prior import Prior

ROOT = Path(__file__).parents[2]
SHAPE = (1, 4, 4)
MEANS = 0.6 * np.random.default_rng(0).standard_normal((3, 16))
PRIOR = GaussianMixturePrior(torch.from_numpy(MEANS), "equal", 0.2, SHAPE)
MODEL = ForwardModel(RandomInpainting(SHAPE, missing=0.5, seed=0), GaussianNoise(0.3))
MINE = {
    "prior": {
        "class_path": "dpnp_shared.analytic.GaussianMixturePrior",
        "init_args": {"means": MEANS.tolist(), "weights": "equal", "variance": 0.2, "image_shape": list(SHAPE)},
    },
    "operator": {"class_path": "dpnp_shared.operators.RandomInpainting", "init_args": {"image_shape": list(SHAPE)}},
    "noise": {"class_path": "dpnp_shared.noise.GaussianNoise", "init_args": {"sigma": 0.3}},
    "precision": "float64",
}
FEW = ["--draws_per_pair", "9", "--pairs", "4"]


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump(MINE))
    return "mine.yaml"


def failed(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    return str(stop.value.code)


def same_ranks(a: Ranks, b: Ranks) -> None:
    for name in ("pixels", "uncertain", "summaries", "distances"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.slow
def test_a_good_configuration_is_certified():
    dpnp = DPnP(PRIOR, MODEL, dtype=torch.float64)
    assert assess(check_pairs(dpnp, pairs=100, draws=39, seed=0)).verdict == "fine"


def test_a_bad_configuration_is_not():
    # at η = 1 without exact splitting the posterior is that of noise √(0.1² + 1), ten times the true one
    dpnp = DPnP(
        PRIOR,
        ForwardModel(RandomInpainting(SHAPE, missing=0.1, seed=0), GaussianNoise(0.1)),
        proximal=ClosedForm(exact_splitting=False),
        annealing=Annealing(eta_max=1.0, eta_min=1.0, constant=10, decay=1, final=0),
        dtype=torch.float64,
    )
    result = assess(check_pairs(dpnp, pairs=60, draws=39, seed=0))
    assert result.verdict == "too wide"
    assert "eta_min" in result.describe()


def test_the_baseline_can_be_checked_too():
    ranks = check_pairs(DPS(PRIOR, MODEL, steps=50), pairs=2, draws=9, seed=0)
    assert len(ranks) == 2
    assert ranks.draws == 9


def test_draws_are_taken_from_more_chains():
    dpnp = DPnP(PRIOR, MODEL, annealing=Annealing(decay=2), dtype=torch.float64)
    assert check_pairs(dpnp, pairs=1, draws=9, seed=0, chains=30).draws == 9
    with pytest.raises(ValueError, match="chains = 5 are fewer than draws = 9"):
        check_pairs(dpnp, pairs=1, draws=9, seed=0, chains=5)


def test_pairs_follow_prior_and_forward_model():
    pairs = [simulate_pair(PRIOR, MODEL, seed=0, pair=i, dtype=torch.float64) for i in range(500)]
    x, y = (torch.stack(part) for part in zip(*pairs, strict=True))
    error = (PRIOR.variance + torch.from_numpy(MEANS).var(0)).sqrt() / 500**0.5
    assert bool(((x.mean(0).flatten() - PRIOR.mean).abs() < 4.5 * error).all())
    noise = y - MODEL.operator(x)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.06)
    again = simulate_pair(PRIOR, MODEL, seed=0, pair=7, dtype=torch.float64)
    assert torch.equal(again[0], x[7])
    assert torch.equal(again[1], y[7])
    other = simulate_pair(PRIOR, MODEL, seed=1, pair=7, dtype=torch.float64)
    assert not torch.equal(other[0], x[7])


def test_a_trained_priors_truths_are_its_own_draws():
    prior = Prior.from_pretrained("fashion_mnist")
    model = ForwardModel(RandomInpainting((1, 28, 28), missing=0.5), GaussianNoise(0.05))
    x, y = simulate_pair(prior, model, seed=0, pair=0, calls=10)
    assert x.shape == y.shape == (1, 28, 28)
    assert 0.3 < float(x.std()) < 1.2


class Inconsistent(Denoiser):
    """Denoises large noise as if images had half of their size: no law has these denoisers."""

    def __init__(self):
        super().__init__()
        self.image_shape, self.spread, self.sigma_min, self.sigma_max = SHAPE, 1.0, 0.0, 1e3
        self.large, self.small = GaussianPrior(0.0, 0.25, SHAPE), GaussianPrior(0.0, 1.0, SHAPE)

    def forward(self, x, sigma):
        return (self.large if float(sigma) > 0.5 else self.small)(x, sigma)


def test_the_samplers_own_truths_follow_an_exact_prior():
    sampler = DPnP(GaussianPrior(0.5, 0.8, SHAPE), MODEL, dtype=torch.float64)
    x = sampler.sample_prior(400, seed=0)
    assert x.shape == (400, *SHAPE)
    assert float(x.mean()) == pytest.approx(0.5, abs=4.5 * (0.8 / x.numel()) ** 0.5)
    assert float(x.var()) == pytest.approx(0.8, rel=4.5 * (2 / x.numel()) ** 0.5 + 0.02)
    torch.testing.assert_close(sampler.sample_prior(2, seed=0), x[:2])
    for arguments, words in (({"n": 0, "seed": 0}, "n = 0"), ({"n": 1, "seed": -1}, "seed = -1")):
        with pytest.raises(ValueError, match=words):
            sampler.sample_prior(**arguments)


@pytest.mark.slow
def test_the_samplers_own_truths_do_not_see_what_is_wrong_with_and_without_a_measurement():
    # an exact prior, and so few network calls that the draws are too narrow
    sampler = DPnP(GaussianPrior(0.0, 1.0, SHAPE), MODEL, dds=DDSDDIM(calls=2), dtype=torch.float64)
    assert assess(check_pairs(sampler, pairs=100, draws=19, seed=0)).verdict == "too narrow"
    assert assess(check_pairs(sampler, pairs=100, draws=19, seed=0, truths="sampler")).verdict == "fine"


@pytest.mark.slow
def test_the_samplers_own_truths_follow_a_network_that_contradicts_itself():
    sampler = DPnP(
        Inconsistent(),
        ForwardModel(RandomInpainting(SHAPE, missing=0.9, seed=0), GaussianNoise(0.3)),
        annealing=Annealing(constant=1, decay=8, final=2),
    )
    assert assess(check_pairs(sampler, pairs=100, draws=19, seed=0)).verdict == "too wide"
    assert assess(check_pairs(sampler, pairs=100, draws=19, seed=0, truths="sampler")).verdict == "fine"
    with pytest.raises(TypeError, match="truths = 'sampler' needs a DPnP, and DPS is none"):
        check_pairs(DPS(PRIOR, MODEL, steps=50), pairs=1, draws=9, seed=0, truths="sampler")


def test_finished_pairs_are_not_done_again(tmp_path, monkeypatch):
    dpnp = DPnP(PRIOR, MODEL, annealing=Annealing(decay=2), dtype=torch.float64)
    whole = check_pairs(dpnp, pairs=5, draws=9, seed=0)
    store = PairStore(tmp_path / "out", {"a": 1}, overwrite=False)
    check_pairs(dpnp, pairs=3, draws=9, seed=0, store=store)
    seen = []
    sample = dpnp.sample
    monkeypatch.setattr(dpnp, "sample", lambda *a, **k: seen.append(1) or sample(*a, **k))
    store = PairStore(tmp_path / "out", {"a": 1}, overwrite=False)
    assert sorted(store.done) == [0, 1, 2]
    same_ranks(check_pairs(dpnp, pairs=5, draws=9, seed=0, store=store), whole)
    assert len(seen) == 2
    with pytest.raises(FileExistsError, match=r"another configuration \(a\)"):
        PairStore(tmp_path / "out", {"a": 2}, overwrite=False)


def test_the_command_says_it_in_plain_words(config, capsys):
    main(["check", "--config", config, "--pairs", "25", "--draws_per_pair", "39", "--output", "out"])
    printed = capsys.readouterr().out
    assert "25 truths drawn from the prior" in printed
    assert "not about whether the prior knows your images" in " ".join(printed.split())
    assert "random projections: 95% intervals cover" in printed
    assert "verdict: fine" in printed
    assert "picture: out/picture.png" in printed
    assert sorted(os.listdir()) == ["mine.yaml", "out"]
    assert sorted(os.listdir("out")) == ["pairs.json", "picture.png", "run.json"]
    run = json.loads(Path("out/run.json").read_text())
    assert run["check"]["verdict"] == "fine"
    assert run["check"]["pairs"] == 25
    assert run["config"]["draws_per_pair"] == 39
    assert "overwrite" in failed(["check", "--config", config, "--output", "out"])


def test_the_default_folder_is_the_configurations_own_and_more_pairs_go_on(config, capsys):
    main(["check", "--config", config, *FEW])
    (name,) = os.listdir("outputs")
    before = json.loads(Path("outputs", name, "pairs.json").read_text())["pairs"]
    main(["check", "--config", config, *FEW, "--pairs", "6", "--overwrite", "true"])
    assert os.listdir("outputs") == [name]
    after = json.loads(Path("outputs", name, "pairs.json").read_text())["pairs"]
    assert sorted(after) == ["0", "1", "2", "3", "4", "5"]
    assert {pair: after[pair] for pair in before} == before  # seconds and all
    main(["check", "--config", config, *FEW, "--seed", "1"])
    assert len(os.listdir("outputs")) == 2


@pytest.mark.slow
def test_a_killed_check_goes_on_and_ends_the_same(config):
    command = [sys.executable, str(ROOT / "inference" / "reconstruct.py"), "check", "--config", config]
    arguments = ["--pairs", "30", "--draws_per_pair", "39", "--output", "out"]
    process = subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not Path("out.unfinished/pair_00002.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("out").exists()
    kept = {file.name: file.read_text() for file in Path("out.unfinished").glob("pair_*.json")}
    assert 3 <= len(kept) < 30
    main([*command[2:], *arguments])
    assert sorted(path for path in os.listdir() if not path.startswith(".")) == ["mine.yaml", "out"]
    main(["check", "--config", config, *arguments[:-1], "again"])
    resumed, whole = (json.loads(Path(folder, "pairs.json").read_text())["pairs"] for folder in ("out", "again"))
    assert {k: v["ranks"] for k, v in resumed.items()} == {k: v["ranks"] for k, v in whole.items()}
    for name, text in kept.items():  # not done again: even the seconds are the same
        assert resumed[str(int(name[5:10]))] == json.loads(text)


def test_an_edited_forward_model_does_not_take_over_old_pairs(config):
    source = "def half(x):\n    return 0.5 * x\n"
    Path("camera.py").write_text(source)
    own = ["check", "--config", config, "--operator", "camera.py:half", *FEW, "--output", "out"]
    main(own)
    shutil.copytree("out", "kept")
    Path("out.unfinished").mkdir()
    record = json.loads(Path("out/pairs.json").read_text())
    Path("out.unfinished/configuration.json").write_text(
        json.dumps({**record["configuration"], "source of operator": 0})
    )
    shutil.rmtree("out")
    assert "another configuration (source of operator)" in failed(own)


def test_a_reconstructions_config_file_is_taken_as_it_is(config, capsys, caplog):
    Path("run.yaml").write_text(yaml.safe_dump({**MINE, "image": "x.npy", "chains": 3, "draws": 2}))
    with caplog.at_level("INFO"):
        main(["check", "--config", "run.yaml", *FEW, "--output", "out"])
    assert "image, chains, draws: for a reconstruction, a check has no use for it" in caplog.text


def test_an_analytic_prior_reconstructs_as_well(config):
    y = np.zeros(SHAPE, np.float32)
    np.save("y.npy", y)
    main(["--config", config, "--measurement", "y.npy", "--chains", "5", "--output", "out"])
    assert json.loads(Path("out/run.json").read_text())["prior"]["name"] == "GaussianMixturePrior"
    np.save("x.npy", y)
    main(["--config", config, "--image", "x.npy", "--chains", "5", "--output", "out2"])
    assert "no test images" in failed(["--config", config])


def test_bad_arguments_are_named(config, capsys):
    base = ["check", "--config", config]
    for arguments, words in [
        (["--pairs", "0"], "pairs = 0"),
        (["--draws_per_pair", "0"], "draws_per_pair = 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--batch_size", "0"], "batch_size = 0"),
        (["--particles", "5"], "chains = 5 are fewer"),
    ]:
        assert words in failed([*base, *arguments])
        assert os.listdir() == ["mine.yaml"]
    with pytest.raises(SystemExit):
        main([*base, "--colour", "red"])
    assert "colour" in capsys.readouterr().err
    os.mkdir("precious")
    assert "not the folder of a run" in failed([*base, "--output", "precious", "--overwrite", "true"])


@pytest.mark.parametrize(
    "population",
    [
        ["--population", "true"],
        ["--population", "dpnp_inference.population.Population", "--population.sweeps", "1"],
        ["--population", "dpnp_inference.replica_exchange.ReplicaExchange"],
    ],
)
def test_populations_can_be_chosen_and_checked(config, population):
    main(["check", "--config", config, *FEW, "--pairs", "1", "--particles", "20", *population, "--output", "out"])
    np.save("y.npy", np.zeros(SHAPE, np.float32))
    main(["--config", config, "--measurement", "y.npy", "--chains", "20", *population, "--output", "run"])
    for folder in ("out", "run"):
        assert json.loads(Path(folder, "run.json").read_text())["config"]["population"] not in (False, None)


def test_truths_can_be_the_samplers(config, capsys):
    main(["check", "--config", config, *FEW, "--truths", "sampler", "--output", "out"])
    printed = capsys.readouterr().out
    assert "4 truths drawn from the sampler without a measurement" in printed
    assert "not about the prior as the sampler draws it" in printed
    assert json.loads(Path("out/pairs.json").read_text())["configuration"]["truths"] == "sampler"


def test_help_lists_the_checks_own_options_only(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--draws_per_pair" in printed
    assert "--measurement" not in printed


def test_progress_is_live_on_a_terminal_and_silent_elsewhere(caplog):
    dpnp = DPnP(PRIOR, MODEL, annealing=Annealing(decay=2), dtype=torch.float64)
    console = Console(force_terminal=True, record=True, width=150, file=io.StringIO())
    with PairProgress(3, console) as progress:
        check_pairs(dpnp, pairs=3, draws=2, seed=0, progress=progress)
    assert "3/3" in console.export_text()
    quiet = Console(force_terminal=False, record=True, file=io.StringIO())
    with caplog.at_level("INFO"), PairProgress(2, quiet) as progress:
        check_pairs(dpnp, pairs=2, draws=2, seed=0, progress=progress)
    assert "2 of 2 pairs" in caplog.text
