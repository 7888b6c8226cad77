"""``--solver`` of ``dpnp-reconstruct``: any solver by name or class path, and what its run says of it."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml

from dpnp_inference import diagnostics
from dpnp_inference.baselines import DPS, PnPDM
from dpnp_inference.baselines.pnp_dm import PUBLISHED
from dpnp_inference.cli import _parser, main, read_options
from dpnp_inference.configuration import title_of
from dpnp_inference.files import read_tensor
from dpnp_inference.posterior import Posterior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import RandomInpainting
from dpnp_shared.prior import Prior

ROOT = Path(__file__).parents[2]
MODEL = ["--operator", "dpnp_shared.operators.RandomInpainting", "--operator.image_shape", "[1,28,28]"]
MODEL += ["--noise", "dpnp_shared.noise.GaussianNoise", "--noise.sigma", "0.05"]
NONLINEAR = ["--operator", "dpnp_shared.operators.PhaseRetrieval", "--operator.image_shape", "[1,28,28]", *MODEL[4:]]
FEW_PNP_DM = ["--solver", "PnPDM", "--solver.iterations", "2", "--solver.steps", "8"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def failed(arguments: list[str], capsys) -> str:
    """The message of a run that must fail and must leave nothing behind."""
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    assert sorted(os.listdir()) == before
    return f"{stop.value.code} {capsys.readouterr().err}"


def test_a_solver_by_name_draws_what_its_class_does_and_the_run_says_so(capsys):
    main(["--solver", "DPS", "--solver.steps", "6", "--chains", "2", "--output", "out"])
    assert "DPS: 2 chains, 1 draws each, " in capsys.readouterr().out
    prior = Prior.from_pretrained("fashion_mnist")
    model = ForwardModel(RandomInpainting((1, 28, 28), missing=0.5, seed=0), GaussianNoise(0.05))
    solver = DPS(prior, model, steps=6)
    expected = solver.sample(read_tensor(Path("out/measurement.npy")), chains=2, seed=0)
    assert title_of(solver, prior.card).endswith("RandomInpainting, GaussianNoise, by DPS")
    posterior = Posterior.load("out")
    assert torch.equal(posterior.samples, expected.samples)
    run = json.loads(Path("out/run.json").read_text())
    assert run["solver"] == posterior.diagnostics["sampler"] == "DPS"
    assert run["config"]["solver"] == {
        "class_path": "dpnp_inference.baselines.DPS",
        "init_args": {"steps": 6, "zeta": 0.15},
    }
    assert posterior.diagnostics["network_calls"] == len(posterior.diagnostics["iterations"][0])
    # the record of the steps is what a diagnosis takes it for
    diagnostics.main(["out"])
    assert "2 chains, 1 draw each" in capsys.readouterr().out


def test_a_config_file_a_class_path_and_replay_from_the_run():
    solver = {
        "class_path": "dpnp_inference.baselines.PnPDM",
        "init_args": {
            "process": "vp",
            "iterations": 2,
            "likelihood": {"class_path": "dpnp_inference.baselines.UnadjustedLangevin", "init_args": {"steps": 2}},
        },
    }
    Path("solver.yaml").write_text(yaml.safe_dump({"solver": solver}))
    run = ["--config", "solver.yaml", "--solver.steps", "8", "--precision", "float64", "--chains", "1"]
    main([*run, "--output", "a"])
    posterior = Posterior.load("a")
    assert posterior.samples.dtype == torch.float64
    record = posterior.diagnostics
    assert (record["process"], record["steps"], len(record["schedule"])) == ("vp", 8, 2)
    assert record["likelihood"] == "UnadjustedLangevin(steps=2, step_size=0.0001)"
    config = json.loads(Path("a/run.json").read_text())["config"] | {"output": "b"}
    Path("replay.yaml").write_text(json.dumps(config))
    main(["--config", "replay.yaml"])
    assert torch.equal(Posterior.load("b").samples, posterior.samples)
    main([*FEW_PNP_DM, "--chains", "1", "--draws", "1", "--output", "c"])  # by its name
    assert json.loads(Path("c/run.json").read_text())["solver"] == "PnPDM"


def test_a_solver_of_ones_own():
    Path("mine.py").write_text(
        "from dpnp_inference.baselines import DPS\n\n"
        "class Mine(DPS):\n"
        "    '''As DPS.'''\n"
        "    def __init__(self, prior, forward_model, *, few: int = 4, dtype):\n"
        "        super().__init__(prior, forward_model, steps=few, dtype=dtype)\n"
    )
    main(["--solver", "mine.py:Mine", "--solver.few", "5", "--chains", "1", "--output", "out"])
    assert json.loads(Path("out/run.json").read_text())["solver"] == "Mine"
    assert json.loads(Path("out/run.json").read_text())["config"]["solver"]["class_path"] == "mine.py:Mine"
    assert Posterior.load("out").diagnostics["steps"] == 5


def test_dpnp_is_the_default_and_has_its_own_name():
    parser = _parser()
    assert parser.parse_args([]).solver == parser.parse_args(["--solver", "DPnP"]).solver == "DPnP"


def test_the_help_lists_the_solvers_and_their_settings(capsys):
    for arguments, words in [
        (["--help"], ["--solver.help", "dpnp_inference.baselines.PnPDM", "DPnP"]),
        (["--solver.help", "PnPDM"], ["--solver.process", "--solver.restarts"]),
    ]:
        with pytest.raises(SystemExit):
            main(arguments)
        printed = capsys.readouterr().out
        assert all(word in printed for word in words)


def test_what_does_not_go_together_is_one_error_and_leaves_nothing_behind(capsys):
    image = ["--image", str(ROOT / "priors" / "fashion_mnist" / "test_images.npz"), "--output", "out"]
    for arguments, words in [
        (["--solver", "DPS", "--dds", "ddpm"], "dds: of the solver DPnP alone; leave it out"),
        (
            ["--solver", "DPS", "--population", "true", "--annealing", "dpnp_inference.Annealing"],
            "annealing, population: of",
        ),
        (["--solver", "DPS", "--proximal", "dpnp_inference.MALA"], "proximal: of the solver DPnP alone"),
        (
            ["--solver", "DDRM", *image, *NONLINEAR],
            "DDRM needs a linear operator and Gaussian noise, got PhaseRetrieval",
        ),
        (["--solver", "DPS", "--solver.zeta", "-1"], "zeta = -1"),
        (["--solver", "DPS", "--draws", "2", "--solver.steps", "4"], "draws = 2; DPS gives one draw a chain"),
        (["--solver", "DPS", "--solver.colour", "3"], "colour"),
        (["--solver", "Nothing"], "Nothing"),
        (["--solver.steps", "3"], "solver"),
    ]:
        assert words in failed(arguments, capsys)


def test_a_check_of_another_solver(capsys):
    few = ["--pairs", "2", "--draws_per_pair", "2", "--output", "check", "--solver", "DDRM", "--solver.steps", "3"]
    main(["check", *few])
    assert "2 truths drawn from the prior" in capsys.readouterr().out
    run = json.loads(Path("check/run.json").read_text())
    assert run["solver"] == "DDRM"
    more = ["--pairs", "3", *few[2:], "--overwrite", "true"]
    main(["check", *more])
    assert len(json.loads(Path("check/pairs.json").read_text())["pairs"]) == 3
    with pytest.raises(SystemExit, match="needs a DPnP, and DDRM is none"):
        main(["check", *few[:4], "--output", "other", *few[6:], "--truths", "sampler"])


@pytest.mark.parametrize("problem", PUBLISHED)
def test_the_configs_of_pnp_dm_have_the_published_settings(problem):
    config = str(ROOT / "configs" / "inference" / "pnp_dm" / f"{problem}.yaml")
    solver = _parser().parse_args(["--config", config]).solver
    published = _parser().parse_args(["--solver", "PnPDM"]).solver
    settings = solver.init_args.as_dict()
    likelihood = PUBLISHED[problem].get("likelihood", "auto")
    expected = published.init_args.as_dict() | {k: v for k, v in PUBLISHED[problem].items() if k != "likelihood"}
    if likelihood != "auto":
        assert settings.pop("likelihood")["init_args"] == {"steps": likelihood.steps, "step_size": likelihood.step_size}
        expected.pop("likelihood")
    assert solver.class_path.endswith(PnPDM.__name__)
    assert settings == expected


@pytest.mark.parametrize(
    ("option", "word", "one"),
    [
        ("solver", "DSP", "DPS"),
        ("operator", "Blur", "GaussianBlur"),
        ("noise", "Gauss", "GaussianNoise"),
        ("dds", "x", "ddpm"),
    ],
)
def test_a_word_that_names_nothing_gets_one_line_with_what_there_is(option, word, one, capsys):
    expected = f"{option} = '{word}'; allowed are "
    for arguments in ([f"--{option}", word], [f"--{option}={word}"]):
        message = failed([*arguments, "--output", "out"], capsys)
        assert expected in message
        assert f" {one}," in message
        assert "\n" not in message.strip()
    Path("mine.yaml").write_text(yaml.safe_dump({option: {"class_path": word}}))
    assert expected in failed(["--config", "mine.yaml", "--output", "out"], capsys)


def test_words_of_other_options_are_not_taken_for_solvers():
    given = ["--dds", "dpnp_inference.dds.DDSDDIM", "--dds.init_args", "{solver: heun}"]
    options, _ = read_options("reconstruct", given)
    assert options.dds.solver == "heun"
    Path("mine.yaml").write_text("dds: {class_path: dpnp_inference.dds.DDSDDIM, init_args: {solver: heun}}")
    options, _ = read_options("reconstruct", ["--config=mine.yaml"])
    assert options.dds.solver == "heun"


@pytest.mark.parametrize("name", ["PCN", "FunctionSpaceLangevin"])
def test_samplers_of_functions_are_known_by_name(name, capsys):
    message = failed(["--solver", name, "--output", "out"], capsys)
    assert "allowed are" not in message
    assert name in message
