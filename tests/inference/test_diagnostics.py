import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from dpnp_inference import MALA, Annealing, DPnP, Population, Posterior
from dpnp_inference.diagnostics import (
    ERROR,
    ESS,
    R_HAT,
    compare,
    diagnose,
    find_groups,
    load_functionals,
    main,
    persistence,
    r_hat_limit,
    stages_of,
)
from dpnp_inference.posterior import _arviz
from dpnp_inference.streaming import RunningPosterior
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import MatrixOperator, RandomInpainting

arviz = _arviz()  # which once a day announces its future by a warning

SHAPE = (3, 2, 4)


def noise(chains, draws, shape=SHAPE, seed=0):
    return torch.randn(chains, draws, *shape, generator=torch.Generator().manual_seed(seed))


def autoregressive(chains, draws, a, shape=SHAPE):
    x = noise(chains, draws, shape)
    for t in range(1, draws):
        x[:, t] = a * x[:, t - 1] + math.sqrt(1 - a * a) * x[:, t]
    return x


def bumped(x, chains, by=8.0):
    """Some of the chains live in another mode of two columns of pixels."""
    x = x.clone()
    x[:chains, ..., 1:3] += by
    return x


def peak(x):
    return x.amax(dim=(1, 2, 3))


class Corner:
    def __call__(self, x):
        return x[:, 0, 0, 0]


def test_r_hat_and_effective_sample_sizes_are_arviz_own():
    posterior = Posterior(autoregressive(4, 60, 0.5))
    found = diagnose(posterior, {"peak": peak})
    x = posterior.samples.double().numpy()
    for c, h, w in np.ndindex(SHAPE):
        one = x[:, :, c, h, w]
        for name, value in (
            ("r_hat", arviz.rhat(one)),
            ("ess_bulk", arviz.ess(one, method="bulk")),
            ("ess_tail", arviz.ess(one, method="tail")),
            ("mcse_mean", arviz.mcse(one, method="mean")),
            ("mcse_std", arviz.mcse(one, method="sd")),
        ):
            assert float(found.maps[name][c, h, w]) == pytest.approx(float(value), rel=1e-9), name
    values = posterior.functional(peak).double().numpy()
    mine = {f.name: f for f in found.functionals}["peak"]
    assert mine.r_hat == pytest.approx(float(arviz.rhat(values)), rel=1e-9)
    assert mine.ess_bulk == pytest.approx(float(arviz.ess(values, method="bulk")), rel=1e-9)
    assert mine.ess_tail == pytest.approx(float(arviz.ess(values, method="tail")), rel=1e-9)
    assert mine.mcse_mean == pytest.approx(float(arviz.mcse(values, method="mean")), rel=1e-9)
    assert mine.mcse_std == pytest.approx(float(arviz.mcse(values, method="sd")), rel=1e-9)
    assert found.pixels.r_hat == pytest.approx(posterior.convergence()["r_hat"], rel=1e-6)
    assert found.pixels.ess_bulk == pytest.approx(posterior.convergence()["ess_bulk"], rel=1e-6)


def test_chains_that_mix_have_converged():
    found = diagnose(Posterior(noise(4, 300)))
    assert found.verdict == "converged", found.describe()
    assert found.reasons == []
    assert [f.name for f in found.functionals] == [
        "mean intensity", *(f"projection {i}" for i in range(1, 5)), *(f"component {i}" for i in range(1, 5))
    ]  # fmt: skip
    assert found.halves.mean == pytest.approx(found.halves.mean_expected, rel=0.5)
    assert found.halves.std == pytest.approx(found.halves.std_expected, rel=0.5)


def test_too_short_a_run_is_to_go_on_and_says_for_how_long():
    found = diagnose(Posterior(autoregressive(4, 200, 0.9)))
    assert found.verdict == "run longer"
    assert any("effective sample size of" in reason and "draws a chain would do" in reason for reason in found.reasons)
    few = diagnose(Posterior(noise(8, 6)))  # independent draws, and few: nothing but their number speaks against them
    assert few.verdict == "run longer"
    assert all("effective sample size" in reason for reason in few.reasons)


def test_chains_that_stay_in_modes_disagree_and_the_pixels_are_named():
    found = diagnose(Posterior(bumped(noise(6, 100), 2)))
    assert found.verdict == "chains disagree"
    there = found.maps["disagree"].bool()
    assert bool(there[..., 1:3].all())
    assert not bool(there[..., [0, 3]].any())
    assert found.pixels.disagree == 12
    assert {row["w"] for row in found.pixels.worst} == {1, 2}
    assert "chains disagree about 12 of 24 pixels" in found.describe()
    assert "then a population is recommended" in found.describe()
    # a mode of a single pixel: no functional sees it
    x = noise(6, 60, (1, 8, 9))
    x[:3, :, 0, 5, 7] += 8
    alone = diagnose(Posterior(x))
    assert alone.verdict == "chains disagree"
    assert alone.maps["disagree"].nonzero().tolist() == [[0, 5, 7]]


def test_chains_that_wander_slowly_are_not_taken_for_modes():
    found = diagnose(Posterior(autoregressive(12, 300, 0.97, (1, 2, 4))))  # nine relaxation times
    assert found.verdict == "run longer"
    assert any("R-hat of" in reason for reason in found.reasons)


def test_two_chains_are_not_enough_and_one_has_no_r_hat():
    two = diagnose(Posterior(noise(2, 500)))
    assert two.verdict == "run longer"
    assert two.reasons == ["R-hat compares chains, and there are 2; give at least 4"]
    one = diagnose(Posterior(noise(1, 500)))
    assert one.verdict == "run longer"
    assert one.pixels.r_hat is None
    assert one.functionals[0].r_hat is None
    assert one.functionals[0].ess_bulk > ESS
    json.dumps(one.to_json(), allow_nan=False)


def test_single_draws_have_a_monte_carlo_error_and_no_r_hat():
    posterior = Posterior(noise(64, 1))
    found = diagnose(posterior)
    assert found.verdict == "no objection"
    assert found.pixels.r_hat is None
    assert set(found.maps) == {"mcse_mean", "mcse_std"}
    torch.testing.assert_close(found.maps["mcse_mean"], (posterior.flat.double().std(0) / 8))
    assert found.pixels.mcse_mean == pytest.approx(1 / 8)
    # √((m₄ - m₂²)/n) / (2 √m₂), of a normal law σ/√(2n)
    assert found.pixels.mcse_std == pytest.approx(1 / math.sqrt(128), rel=0.3)
    text = found.describe()
    assert "each chain has one draw, R-hat needs 4" in text
    assert f"{math.ceil(1 / ERROR**2)} chains would bring it to {ERROR}" in text
    assert "would bring it" not in diagnose(Posterior(noise(101, 1))).describe()


def test_monte_carlo_errors_of_few_draws_are_those_of_independent_chains():
    posterior = Posterior(autoregressive(30, 2, 0.8, (1, 1, 2000)))
    # 2,000 pixels are as many repetitions of one experiment
    assert float(posterior.mcse_mean.mean()) == pytest.approx(float(posterior.mean.std()), rel=0.05)
    assert float(posterior.mcse_std.mean()) == pytest.approx(float(posterior.std.std()), rel=0.1)


def test_groups_of_single_draws_hint_at_modes():
    found = diagnose(Posterior(bumped(noise(40, 1), 13)))
    assert found.verdict == "chains disagree"
    assert {f.name: f.groups for f in found.functionals}["mean intensity"] == (27, 13)
    assert "groups of 27 and 13" in found.reasons[0]
    assert "population is recommended" in found.reasons[0]


def test_groups_are_found_where_there_are_such_and_hardly_elsewhere():
    random = np.random.default_rng(0)
    for n in (20, 39, 200):
        for law in (random.normal, random.random, random.exponential):
            false = sum(find_groups(law(size=n)) is not None for _ in range(500))
            assert false <= 5, (n, law)
        mixed = [np.concatenate([random.normal(size=n - n // 4), 12 + random.normal(size=n // 4)]) for _ in range(100)]
        assert sum(find_groups(x) == (n - n // 4, n // 4) for x in mixed) >= 95
    assert find_groups(np.zeros(50)) is None
    assert find_groups(np.arange(19.0) > 9) is None


def test_few_draws_and_equal_ones_have_a_verdict_too():
    for chains, draws in ((1, 1), (1, 3), (19, 1), (5, 3)):
        found = diagnose(Posterior(noise(chains, draws)))
        assert found.verdict == "too few draws"
        json.dumps(found.to_json(), allow_nan=False)
        Console(quiet=True).print(found)
    for chains, draws in ((1, 1), (30, 1), (4, 100), (1, 50)):
        found = diagnose(
            Posterior(torch.linspace(-0.9, 0.7, 24).reshape(SHAPE).expand(chains, draws, *SHAPE).contiguous())
        )
        assert found.pixels.judged == 0
        assert found.pixels.constant == 24
        assert found.verdict != "chains disagree"
        json.dumps(found.to_json(), allow_nan=False)


def test_constant_pixels_decide_nothing():
    x = noise(4, 300)
    x[..., 0] = 0.7
    x[..., 1] *= 1e-4  # numbers that hardly move decide nothing either
    x[:2, ..., 1] += 1e-3
    posterior = Posterior(x)
    found = diagnose(posterior)
    assert found.verdict == "converged", found.describe()
    assert found.pixels.constant == 6
    assert found.pixels.judged == 12
    assert bool(found.maps["r_hat"][..., :2].isnan().all())
    assert bool((posterior.mcse_mean[..., 0] == 0).all())
    assert bool((posterior.mcse_std[..., 0] == 0).all())
    assert math.isfinite(posterior.convergence()["r_hat"])
    assert Posterior(torch.zeros(4, 9, *SHAPE)).convergence() is None


def test_pixels_at_which_every_chain_stands_still_are_infinitely_far():
    x = noise(5, 80)
    x[..., 0, 0] = torch.arange(5.0).reshape(5, 1, 1)
    found = diagnose(Posterior(x))
    assert found.verdict == "chains disagree"
    assert math.isinf(found.pixels.r_hat)
    assert found.to_json()["pixels"]["r_hat"] is None
    assert "R-hat up to ∞" in found.describe()
    assert Posterior(x).convergence()["r_hat"] == math.inf


def test_of_many_pixels_the_worst_are_looked_at(monkeypatch):
    monkeypatch.setattr("dpnp_inference.diagnostics.MOST_PIXELS", 10)
    x = noise(4, 120, (1, 10, 10))
    x[0, :, 0, 3, 4] += 3
    found = diagnose(Posterior(x))
    assert found.pixels.evaluated == 10
    assert int((~found.maps["r_hat"].isnan()).sum()) == 10
    assert (found.pixels.worst[0]["h"], found.pixels.worst[0]["w"]) == (3, 4)
    assert any("10 of 100 pixels were looked at" in note for note in found.notes)


@pytest.mark.parametrize(("chains", "draws"), [(4, 4), (39, 4), (4, 101), (8, 40)])
def test_the_limit_of_r_hat_is_rarely_exceeded_by_independent_draws(chains, draws):
    x = noise(chains, draws, (1, 10, 20)).double().flatten(2).numpy()
    r_hat = np.array([arviz.rhat(x[:, :, i]) for i in range(200)])
    above = (r_hat > r_hat_limit(chains, draws)).sum()
    assert above <= 2 + 4 * 1.4  # 1% of 200, and four standard errors
    assert r_hat.max() < r_hat_limit(chains, draws, 200)
    assert (r_hat > 1 + 0.5 * (r_hat_limit(chains, draws) - 1)).sum() > 5 or r_hat_limit(chains, draws) == R_HAT


def test_persistence_is_one_for_chains_apart_and_that_of_its_length_for_slow_ones():
    x = noise(40, 50, (1, 1, 200)).double().flatten(2).numpy()
    assert abs(persistence(x).mean()) < 0.05
    assert persistence(x + 100 * np.arange(40)[:, None, None]).min() > 0.99
    steps = 200  # in one relaxation time: 2 (1 - e^-1/2)²/... = 0.727
    slow = autoregressive(3000, steps, math.exp(-1 / steps), (1, 1, 1)).double().flatten(2).numpy()
    half = 0.5
    expected = (1 - math.exp(-half)) ** 2 / (2 * (half - 1 + math.exp(-half)))
    assert persistence(slow)[0] == pytest.approx(expected, abs=0.04)
    assert persistence(np.ones((3, 4, 2))).tolist() == [0, 0]


def test_functionals_by_path_by_name_and_in_error(tmp_path):
    posterior = Posterior(noise(25, 1))
    file = tmp_path / "mine.py"
    file.write_text("def largest(x):\n    return x.amax(dim=(1, 2, 3))\n\n\nclass Zero:\n    pass\n\n\nnumber = 3\n")
    found = diagnose(posterior, [f"{file}:largest", "dpnp_inference.plots.mean_intensity"])
    by_name = {f.name: f for f in found.functionals}
    assert by_name["largest"].mean == pytest.approx(float(peak(posterior.flat).mean()))
    assert by_name["mean_intensity"].mean == pytest.approx(by_name["mean intensity"].mean)
    assert diagnose(posterior, {"corner": Corner()}).functionals[-1].name == "corner"
    assert list(load_functionals([])) == []
    for path, word in [
        ("nowhere.to.be_found", "cannot be found"),
        ("peak", "cannot be found"),
        ("dpnp_inference.plots.nothing", "cannot be found"),
        (f"{file}:nothing", "nothing"),
        (f"{file}:number", "int; it must be callable"),
        (f"{file}:Zero", "Zero; it must be callable"),
    ]:
        with pytest.raises(ValueError, match=word):
            load_functionals([path])
    with pytest.raises(ValueError, match="two are named 'largest'"):
        load_functionals([f"{file}:largest"] * 2)
    with pytest.raises(ValueError, match="built-in"):
        diagnose(posterior, {"mean intensity": peak})
    for f, word in [
        (lambda x: x, r"\(25, 3, 2, 4\)"),
        (lambda x: 0.0, "float"),
        (lambda x: peak(x) * math.nan, "not finite"),
    ]:
        with pytest.raises(ValueError, match=word):
            diagnose(posterior, {"bad": f})
    with pytest.raises(ValueError, match="not finite"):
        diagnose(Posterior(torch.full((4, 4, *SHAPE), math.nan)))


def test_projections_do_not_change_and_components_find_the_modes():
    posterior = Posterior(bumped(noise(30, 1), 10))
    a, b = (diagnose(posterior).functionals for _ in range(2))
    assert a == b
    component = next(f for f in a if f.name == "component 1")
    assert component.groups is not None
    assert sorted(component.groups) == [10, 20]
    assert component.std == max(f.std for f in a)


ROWS = [
    {"eta": 1.0, "acceptance": 0.5, "acceptance_min": 0.1, "jump": 0.9, "still": 0.0, "non_finite": 2.0},
    {"eta": 0.1, "acceptance": 0.6, "acceptance_min": 0.2, "jump": 0.8, "still": 0.1, "non_finite": 0.0},
    {"eta": 0.1, "acceptance": 0.8, "acceptance_min": 0.3, "jump": 0.6, "still": 0.3, "non_finite": 1.0},
]


def test_stages_sum_up_the_iterations_of_all_batches():
    timed = [[dict(row, network_calls=10, forward_calls=4, seconds=0.5, residual=1e-6) for row in ROWS]] * 2
    first, last = stages_of({"iterations": timed})
    assert (first.eta, first.sweeps, first.network_calls, first.forward_calls) == (1.0, 2, 20, 8)
    assert (last.eta, last.sweeps, last.network_calls, last.seconds) == (0.1, 4, 40, 2.0)
    assert last.acceptance == pytest.approx(0.7)
    assert last.acceptance_min == 0.2
    assert (last.jump, last.still) == (pytest.approx(0.7), pytest.approx(0.2))
    assert (first.non_finite, last.non_finite) == (4, 2)
    assert last.residual == 1e-6
    untimed = stages_of({"iterations": [ROWS]})[0]
    assert (untimed.network_calls, untimed.seconds, untimed.residual) == (None, None, None)
    assert stages_of({}) == []


def test_what_the_run_recorded_counts():
    warned = diagnose(Posterior(noise(40, 1), {"warnings": ["MALA hardly moves"]}))
    assert (warned.verdict, warned.reasons) == ("run longer", ["MALA hardly moves"])
    unsolved = [[{"eta": 1.0, "residual": 1e-6}, {"eta": 0.1, "residual": 0.02}]]
    assert "residual of 2.0e-02" in diagnose(Posterior(noise(40, 1), {"iterations": unsolved})).reasons[0]
    early = [[{"eta": 1.0, "residual": 0.02}, {"eta": 0.1, "residual": 1e-6}]]
    assert diagnose(Posterior(noise(40, 1), {"iterations": early})).verdict == "no objection"
    exchange = {"replica_exchange": {"exchange_rates": [0.4, 0.01, None]}}
    frozen = diagnose(Posterior(noise(4, 300), exchange))
    assert (frozen.kind, frozen.verdict) == ("replica exchange", "run longer")
    assert "0.010" in frozen.reasons[0]
    apart = diagnose(Posterior(bumped(noise(6, 100), 2), exchange))
    assert apart.verdict == "chains disagree"
    assert "replicas did not carry" in apart.notes[-1]


def test_populations_are_judged_by_their_evidence():
    def verdict(error, samples=None, chains=40):
        record = {"populations": [{"levels": [{"founders": 7}]}] * 2, "log_evidence_se": error}
        return diagnose(Posterior(noise(chains, 1) if samples is None else samples, record))

    assert verdict(0.1).verdict == "converged"
    assert verdict(None).verdict == "no objection"
    apart = verdict(0.9)
    assert apart.verdict == "run longer"
    assert "relative standard error 0.90" in apart.reasons[0]
    assert any("descend from 7 draws" in note for note in apart.notes)
    # modes that particles weigh are what a population is for
    assert verdict(0.1, bumped(noise(40, 1), 13)).verdict == "converged"
    assert verdict(0.1, bumped(noise(40, 8), 13)).verdict == "converged"
    assert verdict(0.1, chains=3).verdict == "too few draws"


def test_it_is_json_and_prints_and_says_it_in_one_line(tmp_path, capsys):
    record = {"iterations": [ROWS], "network_calls": 90, "forward_calls": 12, "seconds": 3.5}
    posterior = Posterior(bumped(noise(6, 100), 2), record)
    main(
        [str(posterior.save(tmp_path / "run")), "--functional", f"{__file__}:peak", "--json", str(tmp_path / "d.json")]
    )
    printed = capsys.readouterr().out
    for words in ("6 chains, 100 draws each", "mean intensity", "peak", "verdict: chains disagree", "coupling η"):
        assert words in printed
    written = json.loads((tmp_path / "d.json").read_text())
    found = diagnose(posterior, {"peak": peak})
    assert written == found.to_json()
    assert written["network_calls"] == 90
    assert found.sentence.startswith("chains disagree: each chain keeps to its own")
    assert "maps" not in written
    assert set(written) == {f.name for f in dataclasses.fields(found)} - {"maps"}
    with pytest.raises(SystemExit, match=r"samples\.safetensors"):
        main([str(tmp_path)])


def test_a_sampler_that_mixes_and_one_that_cannot():
    shape = (1, 2, 2)
    prior = GaussianPrior(0.0, 1.0, shape)
    inpainting = ForwardModel(RandomInpainting(shape, missing=0.5), GaussianNoise(2.5))
    y = inpainting.simulate(torch.zeros(1, *shape), generator=torch.Generator().manual_seed(0))[0]
    annealing = Annealing(
        eta_max=2.0, eta_min=2.0, constant=1, decay=1, final=0
    )  # so large that successive draws are nearly independent
    found = DPnP(prior, inpainting, annealing=annealing).sample(y, chains=8, seed=0, draws=120).diagnose()
    assert found.verdict == "converged", found.describe()
    assert [stage.sweeps for stage in found.stages] == [121]
    # two modes, far apart: chains stay where annealing has left them
    means = torch.tensor([[8.0, 8.0, 0.0, 0.0], [-8.0, -8.0, 0.0, 0.0]])
    mixture = GaussianMixturePrior(means, torch.tensor([0.5, 0.5]), 1.0, shape)
    last = ForwardModel(MatrixOperator(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), shape), GaussianNoise(0.3))
    sampler = DPnP(mixture, last, annealing=Annealing(eta_max=8.0, eta_min=0.27, constant=2, decay=6, final=1))
    y = torch.zeros(1)
    apart = sampler.sample(y, chains=8, seed=0, draws=30).diagnose()
    assert apart.verdict == "chains disagree"
    assert apart.maps["disagree"].flatten().tolist() == [1, 1, 0, 0]
    single = sampler.sample(y, chains=30, seed=0).diagnose()
    assert single.verdict == "chains disagree"
    weighed = DPnP(mixture, last, population=Population(populations=2)).sample(y, chains=60, seed=0).diagnose()
    assert (weighed.kind, weighed.verdict) == ("population", "converged")


def test_acceptance_is_in_the_table():
    shape = (1, 1, 3)
    model = ForwardModel(RandomInpainting(shape, missing=0.5), GaussianNoise(0.3))
    sampler = DPnP(
        GaussianPrior(0.0, 1.0, shape), model, proximal=MALA(steps=4), annealing=Annealing(constant=0, decay=3, final=0)
    )
    y = model.simulate(torch.zeros(1, *shape), generator=torch.Generator().manual_seed(0))[0]
    found = sampler.sample(y, chains=20, seed=0).diagnose()
    assert all(0 < stage.acceptance_min <= stage.acceptance <= 1 for stage in found.stages)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(found)
    assert "acceptance" in console.export_text()


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        (noise(4, 300), "converged"),
        (bumped(noise(6, 100), 2), "chains disagree"),
        (autoregressive(12, 300, 0.97), "run longer"),
        (noise(2, 50), "run longer"),
        (noise(1, 50), "run longer"),
        (torch.zeros(4, 50, *SHAPE), "converged"),
    ],
    ids=["mixed", "modes", "slow", "two", "one", "constant"],
)
def test_statistics_without_draws_give_the_same_verdict(samples, verdict):
    chains, draws = samples.shape[:2]
    running = RunningPosterior(SHAPE, draws=draws)
    for t in range(draws):
        running.update(samples[:, t], range(chains))
    found, stored = diagnose(Posterior(samples[:, -1:], {}, running)), diagnose(Posterior(samples))
    assert found.verdict == verdict, found.describe()
    assert stored.verdict == verdict, stored.describe()
    assert (found.chains, found.draws) == (chains, draws)
    assert (found.pixels.constant, found.pixels.judged) == (stored.pixels.constant, stored.pixels.judged)
    if "disagree" in stored.maps:
        assert torch.equal(found.maps["disagree"], stored.maps["disagree"])
        assert found.pixels.disagree == stored.pixels.disagree
    if chains > 1:
        exact = torch.from_numpy(persistence(samples.flatten(2).double().numpy())).reshape(SHAPE)
        torch.testing.assert_close(running.persistence.double(), exact, rtol=1e-4, atol=1e-5)
    assert "these, and not judged" in found.notes[0]
    json.dumps(found.to_json(), allow_nan=False)
    Console(quiet=True).print(found)


def test_statistics_of_single_draws_are_judged_by_the_draws():
    x = bumped(noise(40, 1), 13)
    running = RunningPosterior(SHAPE)
    running.update(x[:, 0], range(40))
    assert diagnose(Posterior(x, {}, running)).verdict == "chains disagree"


def test_runs_of_one_law_rarely_differ_and_those_of_two_do():
    def singles(seed, n=39):
        return Posterior(noise(n, 1, seed=seed))

    false = [bool(compare(singles(2 * i), singles(2 * i + 1)).differ) for i in range(30)]
    assert sum(false) <= 2  # one in a hundred is expected
    shifted = Posterior(singles(0).samples + 1.0)
    found = compare(shifted, singles(1))
    assert "mean intensity" in {d.name for d in found.differ}
    assert {d.name: d.mean for d in found.differences}["mean intensity"] > 1
    assert "the runs differ" in found.describe()
    wider = compare(Posterior(noise(100, 1) * 1.8), singles(1, 100))
    assert {"projection 1", "projection 2"} < {d.name for d in wider.differ}
    assert {d.name: d.std for d in wider.differences}["projection 1"] == pytest.approx(math.log(1.8), abs=0.3)
    chains = compare(Posterior(noise(4, 200)), Posterior(noise(5, 100, seed=3)), {"peak": peak})
    assert not chains.differ
    assert chains.differences[-1].name == "peak"
    assert chains.pixels == pytest.approx(chains.pixels_expected, rel=0.4)
    assert "no difference found; one of the means by 0.2" in chains.describe()


def test_a_comparison_s_errors_are_arviz_own_and_those_of_independent_chains():
    a, b = Posterior(autoregressive(4, 60, 0.5)), Posterior(noise(30, 1, seed=5))
    row = compare(a, b, {"corner": Corner()}).differences[-1]
    values = [run.functional(Corner()).double().numpy() for run in (a, b)]
    spread = np.concatenate([v.ravel() for v in values]).std(ddof=1)
    expected = math.hypot(float(arviz.mcse(values[0])), values[1].std(ddof=1) / math.sqrt(30)) / spread
    assert row.mean == pytest.approx((values[0].mean() - values[1].mean()) / spread)
    assert row.mean_error == pytest.approx(expected)
    assert row.std == pytest.approx(math.log(values[0].std(ddof=1) / values[1].std(ddof=1)))
    assert row.errors == max(abs(row.mean) / row.mean_error, abs(row.std) / row.std_error)


def test_comparisons_on_the_command_line_of_constants_and_in_error(tmp_path, capsys):
    same, other = Posterior(noise(25, 1), {"seed": 0}), Posterior(noise(25, 1, seed=1), {"seed": 0, "populations": []})
    folders = [str(run.save(tmp_path / name)) for name, run in (("a", same), ("b", other))]
    main([folders[0], "--against", folders[1], "--json", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert "no difference found" in printed
    assert "both runs have seed 0" in printed
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["differ"] == []
    assert len(written["differences"]) == 9
    assert any("particles share ancestors" in note for note in written["notes"])
    still = [Posterior(torch.full((4, 9, *SHAPE), value)) for value in (0.0, 0.0, 1.0)]
    assert not compare(*still[:2]).differ
    apart = compare(*still[1:])
    assert all(math.isinf(d.errors) for d in apart.differ)
    assert "mean intensity" in {d.name for d in apart.differ}
    json.dumps(apart.to_json(), allow_nan=False)
    with pytest.raises(ValueError, match=r"\(3, 2, 4\) and \(1, 2, 4\) cannot be compared"):
        compare(same, Posterior(noise(25, 1, (1, 2, 4))))
    with pytest.raises(ValueError, match="several chains or 4 draws"):
        compare(same, same[0])
