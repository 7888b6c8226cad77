"""The head-to-head counts what it should: the tuner, failures, the weights of modes, scores."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise
from dpnp_shared.operators import DitheredQuantisation, MatrixOperator

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import head_to_head

    return head_to_head


def problem():
    prior = GaussianMixturePrior(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.tensor([0.25, 0.75]), 0.01, (1, 1, 2))
    model = ForwardModel(MatrixOperator(torch.tensor([[0.0, 1.0]]), (1, 1, 2)), GaussianNoise(0.1))
    return prior, model, torch.zeros(1)


def test_every_space_has_six_different_settings_and_the_published_ones_first(bench):
    for contender in bench.SOLVERS.values():
        for part in ("mixture", "images"):
            space = contender.space(part)
            assert len({str(settings) for settings in space}) in (6, 0)
            assert not space or space[0] in ({}, {"zeta": 0.15})
    assert all(contender.mixture for contender in bench.SOLVERS.values())


def test_mode_weights_are_compared(bench):
    prior, *_ = problem()
    draws = prior.means[[0, 1, 1, 1]].reshape(-1, 1, 1, 2)
    assert bench.mode_weight_error(prior, torch.tensor([0.25, 0.75]), draws) == 0
    assert bench.mode_weight_error(prior, torch.tensor([1.0, 0.0]), draws) == pytest.approx(0.75)


def test_the_tuner_takes_the_better_setting_and_not_one_that_fails(bench):
    prefix = "tuning/images/blur/DPS"
    results = {f"{prefix}/{trial}/0": {"crps": crps} for trial, crps in enumerate((0.3, 0.2, 0.25))}
    results[f"{prefix}/3/0"] = {"failed": "not finite"}
    assert bench.best(results, "images", "blur", "DPS") == 1
    results[f"{prefix}/1/0"] = {"failed": "not finite"}
    assert bench.best(results, "images", "blur", "DPS") == 2
    # if nothing works the published settings are run
    assert bench.best({name: {"failed": ""} for name in results}, "images", "blur", "DPS") == 0


def test_a_real_tuning_picks_the_step_that_does_not_diverge(bench, monkeypatch):
    contender = bench.Contender(bench.make_daps, ({"steps": 4, "step_size": 1e9}, {"steps": 4, "step_size": 1e-4}), ())
    monkeypatch.setitem(bench.SOLVERS, "DAPS", contender)
    monkeypatch.setitem(bench.MIXTURE_TUNING, "8", ((8, 1, 1000),))
    options = Namespace(solvers=["DAPS"], cells=["8,1"], image_problems=[], problems=1, images=1, budget="400")
    results = {}
    for name, (part, solver, settings, where, _) in bench.tuning_cells(options, None).items():
        results[name] = bench.run_cell(part, solver, settings, where, 8)
    assert "no longer finite" in results["tuning/mixture/8/DAPS/0/0"]["failed"]
    assert bench.best(results, "mixture", "8", "DAPS") == 1
    assert '| mixture, d = 8 | DAPS | `{"steps": 4, "step_size": 0.0001}` | failed |' in bench.tables(results, options)


def test_failures_are_counted_and_solvers_that_do_not_apply_are_shown(bench, monkeypatch):
    prior, model, y = problem()
    settings = {"draws": 2, "seed": 0, "budget": None}
    result, cost = bench.attempt("DAPS", prior, model, y, {"steps": 4, "step_size": 1e9}, **settings)
    assert result is None
    assert "no longer finite" in cost["failed"]
    result, cost = bench.attempt("DDRM", prior, model, y, {}, **settings)
    assert result.flat.shape == (2, 1, 1, 2)
    assert cost["network_calls"] > 0
    quantised = ForwardModel(DitheredQuantisation((1, 1, 2), looks=1, dither=0.5), DitheredLogisticNoise(0.2))
    result, refused = bench.attempt("DDRM", prior, quantised, y, {}, **settings)
    assert result is None
    assert "linear" in refused["inapplicable"]

    good = {"psnr": 20.0, "crps": 0.1} | dict.fromkeys(bench.COSTS, 1.0)
    results = {"images/blur/DPS/0": good, "images/blur/DPS/1": {"failed": "diverged"}, "images/blur/DDRM/0": refused}
    solvers = ["DPnP population", "DDRM", "DPS"]
    lines = bench.table_of(results, "images", "blur", solvers, {"psnr": ("PSNR", 1), "crps": ("CRPS", 2)})
    assert "not run" in lines[2]
    assert "not applicable" in lines[3]
    assert lines[4] == "| DPS | 20.0 | 0.10 | 1 | 1 | 1 | 1.0 | 1 | 1 of 2 |"


def test_the_score_is_unbiased_for_few_draws(bench):
    generator = torch.Generator().manual_seed(0)
    draws, truth = torch.randn(3, 20000, 1, generator=generator), torch.zeros(20000, 1)
    # CRPS of N(0, 1) at 0: 2 φ(0) - 1/√π; standard error below 0.005
    assert bench.energy_score(draws, truth) == pytest.approx(0.7979 - 0.5642, abs=0.02)


def test_settings_keep_within_the_budget(bench):
    prior, model, y = problem()
    for solver, contender in bench.SOLVERS.items():
        quick = {"langevin_steps": 1} if solver == "DAPS" else {}
        for settings in contender.space("images")[-1:]:
            _, cost = bench.attempt(solver, prior, model, y, settings | quick, draws=2, seed=0, budget=150)
            calls = cost["network_calls"] + (bench.GRADIENT - 1) * cost["network_gradients"]
            assert 15 < calls <= 150, (solver, settings)
