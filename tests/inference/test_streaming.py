import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpnp_inference import Posterior
from dpnp_inference.posterior import _arviz
from dpnp_inference.streaming import DrawStore, RunningPosterior, extremes_needed

arviz = _arviz()  # which once a day announces its future by a warning

CHAINS, DRAWS, SHAPE = 5, 51, (3, 4, 6)


def make(chains=CHAINS, draws=DRAWS, dtype=torch.float32) -> Posterior:
    """Autocorrelated draws of pixels from 0.001 to 1000 wide, off zero, one of them constant."""
    noise = torch.randn(chains, draws, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = noise.clone()
    for t in range(1, draws):
        x[:, t] = 0.6 * x[:, t - 1] + 0.8 * noise[:, t]
    scale = torch.logspace(-3, 3, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    x = x * scale + torch.linspace(-9, 9, math.prod(SHAPE)).reshape(SHAPE)
    x[..., 0, 0, 0] = 0.3
    return Posterior(x.to(dtype))


def run(posterior: Posterior, chains=None, batch=2, **arguments) -> RunningPosterior:
    """As a sampler would call it: a batch of chains after the other, a draw of each chain at a time."""
    draws = posterior.samples.shape[1]
    chains = range(len(posterior.samples)) if chains is None else chains
    running = RunningPosterior(SHAPE, **{"draws": draws, "dtype": posterior.samples.dtype, **arguments})
    for first in range(0, len(chains), batch):
        some = chains[first : first + batch]
        for t in range(draws):
            running.update(posterior.samples[list(some), t], some)
    return running


STORED = make()
RUNNING = run(STORED)


def test_moments_are_those_of_the_stored_draws():
    exact = STORED.flat.double()
    assert RUNNING.count == CHAINS * DRAWS
    assert RUNNING.chains == dict.fromkeys(range(CHAINS), DRAWS)
    torch.testing.assert_close(RUNNING.mean, exact.mean(0).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(RUNNING.std, exact.std(0).float(), rtol=1e-6, atol=0)
    assert RUNNING.std[0, 0, 0] == 0


def test_moments_are_stable_far_from_zero():
    x = 1e6 + torch.randn(400, 1, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    running = RunningPosterior((1, 2, 2), dtype=torch.float64)
    for i in range(400):
        running.update(x[i], [i])
    torch.testing.assert_close(running.std, x.flatten(0, 1).std(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("q", [0.0, 0.003, 0.02, 0.98, 1.0])
def test_outer_quantiles_are_exact(q):
    torch.testing.assert_close(RUNNING.quantile(q), STORED.quantile(q), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bins", [2, 7, 64, 500])
@pytest.mark.parametrize("q", [0.05, 0.25, 0.5, 0.8])
def test_inner_quantiles_are_off_by_less_than_a_bin(q, bins):
    running = run(STORED, bins=bins, extremes=1)
    error = (running.quantile(q).double() - torch.quantile(STORED.flat.double(), q, dim=0)).abs()
    assert bool((error <= running.quantile_error * (1 + 1e-6) + 1e-6).all())  # and float32 rounding
    spread = (STORED.flat.amax(0) - STORED.flat.amin(0)).flatten()[1:]
    width = running.quantile_error.flatten()[1:]
    assert bool((width > spread / bins * 0.999).all())
    assert bool((width < 2.001 * spread / (bins - 1)).all())
    if bins == 500:  # finer bins than draws: the bound is not loose
        assert float((error / STORED.flat.std(0).clamp(min=1e-9)).median()) < 0.01


def test_intervals_are_exact_while_the_extremes_reach_and_contain_the_exact_ones_beyond():
    k = extremes_needed(CHAINS * DRAWS, 0.9)
    exact, reaching = STORED.interval(0.9), run(STORED, extremes=k, bins=0).interval(0.9)
    assert k == exact.k == reaching.k
    assert torch.equal(exact.low, reaching.low)
    assert torch.equal(exact.high, reaching.high)
    assert exact.level == reaching.level
    wide = RUNNING.interval(0.9)
    assert RUNNING.extremes < k
    for outer, inner in ((exact.low - wide.low, wide.low), (wide.high - exact.high, wide.high)):
        assert bool((outer >= 0).all())
        assert bool((outer <= RUNNING.quantile_error + 1e-6 * inner.abs()).all())


@pytest.mark.parametrize("draws", [4, 7, DRAWS])
def test_split_r_hat_is_arviz_own(draws):
    stored = make(draws=draws)
    found = run(stored).r_hat
    x = stored.samples.double().numpy()
    assert math.isnan(found[0, 0, 0])
    for c, h, w in ((0, 0, 1), (1, 2, 3), (2, 3, 5)):
        assert float(found[c, h, w]) == pytest.approx(float(arviz.rhat(x[:, :, c, h, w], method="split")), rel=1e-6)


def test_chains_that_stand_still_have_infinite_r_hat_and_few_effective_draws():
    x = torch.arange(4.0).reshape(4, 1, 1, 1, 1).expand(4, 20, *SHAPE).contiguous()
    running = run(Posterior(x))
    assert bool(torch.isinf(running.r_hat).all())
    assert bool((running.ess < 25).all())  # of 80


def test_batch_means_find_about_arviz_effective_sample_size():
    stored = make(8, 900)
    running = run(stored, batch=8)
    found, some = running.ess.flatten()[1:].double(), range(0, 71, 4)
    x = stored.samples.flatten(2).numpy()[..., 1:]
    own = torch.tensor([float(arviz.ess(x[..., i], method="mean")) for i in some])
    ratio = found[list(some)] / own  # batch means are a few per cent high
    assert float(ratio.log().mean().exp()) == pytest.approx(1.0, abs=0.15)
    assert float(ratio.log().abs().max()) < 0.5  # five times √(2/a), a = 240 batches
    error = running.mcse_mean
    assert error[0, 0, 0] == 0
    torch.testing.assert_close(error.flatten()[1:].double(), stored.std.flatten()[1:] / found.sqrt(), rtol=1e-5, atol=0)


def test_single_draws_count_in_full():
    running = run(make(40, 1))
    torch.testing.assert_close(running.ess.flatten()[1:], torch.full((71,), 40.0))
    assert not running._work
    with pytest.raises(ValueError, match="at least 4 kept draws"):
        _ = running.r_hat


def test_burn_in_and_thinning():
    running = run(STORED, burn_in=9, thin=5)
    kept = Posterior(STORED.samples[:, 9::5])
    assert running.count == len(kept.flat)
    torch.testing.assert_close(running.mean, kept.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running.quantile(1.0), kept.quantile(1.0))
    plain = run(kept)
    for name, value in running.state_dict().items():
        if name not in ("arguments", "seen"):
            assert torch.equal(value, plain.state_dict()[name]), name


def same(a: RunningPosterior, b: RunningPosterior) -> None:
    """Equal up to the rounding of sums; extremes and histograms to the bit."""
    theirs = b.state_dict()
    for name, value in a.state_dict().items():
        if name in ("seen", "count", "arguments", "low", "high", "histogram", "exponent", "first", "work_chains"):
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("parts", [(range(0, 2), range(2, 5)), (range(3, 5), range(1, 3), range(0, 1))])
def test_workers_results_merge_to_that_of_one(parts):
    first, *others = [run(STORED, chains=part, batch=3) for part in parts]
    before = others[0].state_dict()
    for other in others:
        first.merge(other)
    same(first, RUNNING)
    assert all(torch.equal(value, before[name]) for name, value in others[0].state_dict().items())
    with pytest.raises(ValueError, match=r"chains \[\d.*\] are in both"):
        first.merge(others[0])
    with pytest.raises(ValueError, match="equal"):
        first.merge(RunningPosterior(SHAPE, draws=2))


def test_merging_with_one_that_has_seen_nothing():
    empty = RunningPosterior(SHAPE, draws=DRAWS)
    empty.merge(RunningPosterior(SHAPE, draws=DRAWS))
    assert empty.count == 0
    empty.merge(RUNNING)
    same(empty, RUNNING)


@pytest.mark.parametrize("stop", [3, 25, 26, DRAWS])
def test_a_run_goes_on_from_a_file_bit_for_bit(stop, tmp_path):
    def update(running, draws):
        for t in draws:
            running.update(STORED.samples[:, t], range(CHAINS))

    whole, part = (RunningPosterior(SHAPE, draws=DRAWS) for _ in range(2))
    update(whole, range(DRAWS))
    update(part, range(stop))
    save_file(part.state_dict(), tmp_path / "state.safetensors")
    resumed = RunningPosterior.from_state_dict(load_file(tmp_path / "state.safetensors"))
    update(part, range(stop, DRAWS))
    update(resumed, range(stop, DRAWS))
    for running in (part, resumed):
        for name, value in whole.state_dict().items():
            assert torch.equal(value, running.state_dict()[name]), name


def test_more_draws_and_more_chains_may_follow():
    running = run(Posterior(STORED.samples[:, :20]), batch=5)
    for t in range(20, 30):
        running.update(STORED.samples[:, t], range(CHAINS))
    x = STORED.samples[:, :30]
    torch.testing.assert_close(running.mean, Posterior(x).mean, rtol=1e-5, atol=1e-5)
    thirds = x.reshape(CHAINS * 3, 10, *SHAPE).double()
    expected = (thirds.mean(1).var(0) / thirds.var(1).mean(0) + 0.9).sqrt().float()
    torch.testing.assert_close(running.r_hat, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    for t in range(20):
        running.update(STORED.samples[:1, t], [CHAINS])
    assert running.count == 30 * CHAINS + 20


def test_memory_does_not_grow_with_draws_or_finished_chains():
    assert run(make(3, 60)).nbytes - run(make(3, 10)).nbytes == 0
    assert run(make(9, 10)).nbytes - run(make(3, 10)).nbytes == 6 * 16  # a chain's index and its number of draws


def test_a_posterior_takes_its_statistics_from_all_draws(tmp_path):
    posterior = Posterior(STORED.samples[:, -1:], {"seed": 0}, RUNNING)
    assert torch.equal(posterior.mean, RUNNING.mean)
    assert torch.equal(posterior.std, RUNNING.std)
    assert torch.equal(posterior.mcse_mean, RUNNING.mcse_mean)
    assert torch.equal(posterior.quantile(0.3), RUNNING.quantile(0.3))
    assert torch.equal(posterior.interval(0.5).low, RUNNING.interval(0.5).low)
    loaded = Posterior.load(posterior.save(tmp_path))
    assert torch.equal(loaded.mean, RUNNING.mean)
    assert loaded.statistics is not None
    same(loaded.statistics, RUNNING)
    Posterior(posterior.samples).save(tmp_path)  # nothing of the earlier run stays
    assert Posterior.load(tmp_path).statistics is None
    with pytest.raises(ValueError, match="needs all draws"):
        _ = posterior.mcse_std
    with pytest.raises(ValueError, match=r"\(3, 4, 6\)"):
        Posterior(torch.zeros(1, 1, 1, 4, 6), {}, RUNNING)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"draws": 0}, "draws = 0"),
        ({"draws": 4, "burn_in": 4}, "burn_in = 4"),
        ({"burn_in": -1}, "burn_in = -1"),
        ({"thin": 0}, "thin = 0"),
        ({"extremes": 0}, "extremes = 0"),
        ({"bins": 1}, "bins = 1"),
        ({"bins": -1}, "bins = -1"),
        ({"dtype": torch.int32}, "int32"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        RunningPosterior(SHAPE, **arguments)


def test_bad_calls_are_named():
    running = RunningPosterior(SHAPE, draws=2, bins=0)
    x = torch.zeros(2, *SHAPE)
    with pytest.raises(ValueError, match=r"image_shape = \(4, 6\)"):
        RunningPosterior(SHAPE[1:])
    for name in ("mean", "std", "ess", "quantile_error"):
        with pytest.raises(ValueError, match=r"needs|bins"):
            getattr(running, name)
    for draws, chains, word in [
        (x, [0], "for 1 chains"),
        (x.double(), [0, 1], "float64"),
        (x, [1, 1], "differ"),
        (x, [-1, 1], "negative"),
        (x * math.nan, [0, 1], "not finite"),
    ]:
        with pytest.raises(ValueError, match=word):
            running.update(draws, chains)
    assert running.chains == {}
    running.update(x[:1], [0])
    with pytest.raises(ValueError, match=r"\[0, 1\] draws"):
        running.update(x, [0, 1])
    for i in range(1, 40):
        running.update(x[:1], [i])
    with pytest.raises(ValueError, match="extremes = 8"):
        running.quantile(0.5)
    with pytest.raises(ValueError, match="extremes = 8"):
        running.interval(0.5)
    with pytest.raises(ValueError, match="q = 2"):
        running.quantile(2)
    with pytest.raises(ValueError, match="too few"):
        running.interval(0.999)


def test_a_state_that_does_not_fit_changes_nothing():
    running = run(STORED)
    for state, word in [
        ({}, "needed are"),
        (RunningPosterior(SHAPE, draws=3).state_dict(), r"\[3, 0, 1, 8, 64\]"),
        (RunningPosterior((1, 4, 6), draws=DRAWS).state_dict(), r"low is torch.float32 \(8, 1, 4, 6\)"),
        (RunningPosterior(SHAPE, draws=DRAWS, dtype=torch.float64).state_dict(), "low is torch.float64"),
    ]:
        with pytest.raises(ValueError, match=word):
            running.load_state_dict(state)
    same(running, RUNNING)
    with pytest.raises(ValueError, match="no arguments and no low"):
        RunningPosterior.from_state_dict({})


def fill(store: DrawStore, batch: int = 2, draws=range(DRAWS)) -> DrawStore:
    for first in range(0, CHAINS, batch):
        chains = range(first, min(first + batch, CHAINS))
        for t in draws:
            store.add(STORED.samples[chains.start : chains.stop, t], chains)
    return store


@pytest.mark.parametrize(
    ("keep", "kept"), [("all", range(DRAWS)), ("statistics", [50]), (1, [50]), (3, [16, 33, 50]), (DRAWS, range(DRAWS))]
)
def test_a_store_keeps_what_it_is_asked_for(keep, kept):
    store = fill(DrawStore(keep, SHAPE, chains=CHAINS, draws=DRAWS))
    assert torch.equal(store.samples, STORED.samples[:, list(kept)])
    posterior = Posterior(store.samples, {}, store.statistics)
    torch.testing.assert_close(posterior.mean, STORED.mean, rtol=1e-5, atol=1e-5)
    assert (store.statistics is None) == (keep == "all")
    if store.statistics is not None:  # made for the interval that is shown by default
        assert torch.equal(posterior.interval(0.9).low, STORED.interval(0.9).low)


@pytest.mark.parametrize("keep", ["all", "statistics", 5])
def test_a_store_goes_on_from_a_file(keep, tmp_path):
    whole = fill(DrawStore(keep, SHAPE, chains=CHAINS, draws=DRAWS), batch=CHAINS)
    part = fill(DrawStore(keep, SHAPE, chains=CHAINS, draws=DRAWS), batch=CHAINS, draws=range(31))
    with pytest.raises(ValueError, match="5 of 5 chains have not had all of their 51 draws"):
        _ = part.samples
    save_file(part.state_dict(), tmp_path / "state.safetensors")
    resumed = DrawStore(keep, SHAPE, chains=CHAINS, draws=DRAWS)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    fill(resumed, batch=CHAINS, draws=range(31, DRAWS))
    found = resumed.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.state_dict().items())
    for other in (DrawStore(keep, SHAPE, chains=CHAINS, draws=DRAWS + 1), DrawStore("all", SHAPE, chains=1, draws=1)):
        with pytest.raises(ValueError, match="state"):
            other.load_state_dict(part.state_dict())


def test_bad_stores_and_draws_are_named():
    for keep, word in [("some", "keep = 'some'"), (0, "keep = 0"), (4, "from 1 to draws = 3")]:
        with pytest.raises(ValueError, match=word):
            DrawStore(keep, SHAPE, chains=2, draws=3)
    store = DrawStore(2, SHAPE, chains=2, draws=1 + 1)
    x = torch.zeros(2, *SHAPE)
    for draws, chains in ((x, range(1, 3)), (x, range(0, 1)), (x[:0], range(0, 0)), (x[:, :1], range(0, 2))):
        with pytest.raises(ValueError, match="there are 2 chains"):
            store.add(draws, chains)
    store.add(x[:1], range(0, 1))
    with pytest.raises(ValueError, match=r"\[0, 1\] of 2 draws"):
        store.add(x, range(0, 2))
    store.add(x[:1], range(0, 1))
    with pytest.raises(ValueError, match=r"\[2\] of 2 draws"):
        store.add(x[:1], range(0, 1))
    with pytest.raises(ValueError, match="draws_seen is missing"):
        store.load_state_dict({"samples": store.state_dict()["samples"]})


def test_what_never_changes_does_not_vary_by_rounding():
    running = run(Posterior(torch.full((5, 49, *SHAPE), 0.1)), batch=5)
    assert bool((running.std == 0).all())
    assert bool((running.mcse_mean == 0).all())
    assert bool((running.persistence == 0).all())
    assert bool(running.r_hat.isnan().all())
    assert bool(running.ess.isnan().all())
    torch.testing.assert_close(running.quantile(0.5), torch.full(SHAPE, 0.1))
