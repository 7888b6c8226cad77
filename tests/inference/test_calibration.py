import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dpnp_inference.calibration import (
    PROJECTED,
    UNCERTAIN_PIXELS,
    Ranks,
    assess,
    binomial_interval,
    calibrate,
    draw_calibration,
    draws_needed,
    rank_pair,
    rank_pairs,
)
from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import RandomInpainting

SHAPE = (1, 6, 6)
MEANS = torch.randn(5, 36, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PRIOR = GaussianMixturePrior(MEANS, "equal", 0.1, SHAPE)
MODEL = ForwardModel(RandomInpainting(SHAPE, missing=0.5, seed=0), GaussianNoise(0.3))


def pairs(n: int, draws: int, seed: int, *, spread: float = 1.0, shift: float = 0.0):
    """Truths and exact posterior draws, made narrower or wider around the mean, or moved by a multiple of the standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    truths = PRIOR.sample(n, generator=generator, dtype=torch.float64)
    sets = []
    for x in truths:
        posterior = PRIOR.posterior(MODEL, MODEL.simulate(x[None], generator=generator)[0])
        exact = posterior.sample(draws, generator=generator, dtype=torch.float64)
        std = posterior.covariance.diagonal().sqrt().reshape(SHAPE)
        sets.append(posterior.mean + spread * (exact - posterior.mean) + shift * std)
    return truths, torch.stack(sets)


@pytest.mark.parametrize("seed", range(10))
def test_exact_draws_pass(seed):
    assert calibrate(*pairs(100, 39, seed), seed=seed).verdict == "fine"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"spread": 0.7}, "too narrow"),
        ({"spread": 1.5}, "too wide"),
        ({"shift": 0.4}, "biased"),
        ({"shift": -0.4}, "biased"),
    ],
)
def test_wrong_draws_are_called_what_they_are(change, verdict, seed):
    result = calibrate(*pairs(100, 39, seed, **change), seed=seed)
    assert result.verdict == verdict
    assert f"verdict: {verdict}" in result.describe()
    if "shift" in change:
        assert ("below" if change["shift"] > 0 else "above") in result.describe()


def test_coverage_is_what_a_gaussian_says():
    # scaled by 0.7, an interval of level 0.95 covers P(|w| < 0.7 q), with w normal and q the 0.975 quantile (of 39 draws only about)
    result = calibrate(*pairs(200, 39, 0, spread=0.7))
    covered = {c.level: c for c in result.quantities[1].coverages}
    assert list(covered) == [0.5, 0.8, 0.95]
    assert covered[0.5].covered == pytest.approx(math.erf(0.7 * 0.6745 / math.sqrt(2)), abs=0.02)
    assert covered[0.8].covered == pytest.approx(math.erf(0.7 * 1.2816 / math.sqrt(2)), abs=0.02)


def test_a_shift_of_single_pixels_to_both_sides_is_a_bias():
    # the pooled histogram is symmetric then, which alone would look like intervals that are too narrow
    truths, draws = pairs(100, 39, 0)
    sign = torch.where(torch.arange(36).reshape(SHAPE) % 2 == 0, 1.0, -1.0)
    draws = draws + 0.6 * sign * draws.std(1, keepdim=True)
    assert abs(rank_pairs(truths, draws).pixels.mean() / 39 - 0.5) < 0.02
    uncertain = next(q for q in calibrate(truths, draws).quantities if q.name == UNCERTAIN_PIXELS)
    assert uncertain.verdict == "biased"


def test_tarp_sees_what_no_single_pixel_shows():
    # independent pixels in the truth, equal ones in the draws: every pixel has the right law, no image has
    generator = torch.Generator().manual_seed(0)
    truths = torch.randn(100, 1, 4, 4, generator=generator)
    draws = torch.randn(100, 39, 1, 1, 1, generator=generator).expand(-1, -1, 1, 4, 4)
    result = calibrate(truths, draws)
    assert abs(result.tarp_deviation) > 2 * result.coverage_band
    assert result.verdict != "fine"
    assert result.quantities[0].verdict == "fine"


def test_ties_are_broken_at_random():
    # black images everywhere: ranks are uniform, and nothing is called wrong
    black = rank_pairs(torch.zeros(200, 1, 3, 3), torch.zeros(200, 19, 1, 3, 3))
    counts = np.bincount(black.pixels.ravel(), minlength=20)
    assert counts.size == 20
    assert abs(counts / counts.sum() - 0.05).max() < 0.02  # 4 standard errors
    assert not black.uncertain.any()
    # a truth at the point mass that half of the draws have
    x = torch.full((1, 1, 1), -1.0)
    draws = torch.cat([torch.full((10, 1, 1, 1), -1.0), torch.zeros(9, 1, 1, 1)])
    ranks = {int(rank_pair(x, draws, seed=s).pixels.item()) for s in range(200)}
    assert ranks == set(range(11))


def test_ranks_of_numbers_one_can_count():
    ranks = rank_pair(
        torch.tensor([[[0.5, 9.0]]]), torch.tensor([[[[0.0, 0.0]]], [[[1.0, 1.0]]], [[[0.2, 3.0]]]]), seed=0
    )
    assert ranks.draws == 3
    assert ranks.pixels.tolist() == [[[[2, 3]]]]
    assert ranks.summaries[0, 0] == 3
    assert ranks.summaries.shape == (1, 17)
    assert ranks.distances.shape == (1, 8)


def test_ranks_survive_json_and_joining(tmp_path):
    truths, draws = pairs(30, 39, 0)
    whole = rank_pairs(truths, draws, seed=5)
    text = json.dumps(whole.to_json())
    back = Ranks.from_json(json.loads(text))
    halves = Ranks.join([whole_part(whole, 0, 13), whole_part(whole, 13, 30)])
    for other in (back, halves):
        assert other.draws == 39
        for name in ("pixels", "uncertain", "summaries", "distances"):
            np.testing.assert_array_equal(getattr(other, name), getattr(whole, name))
    assert json.loads(json.dumps(assess(back).to_json())) == json.loads(json.dumps(assess(whole).to_json()))
    many = rank_pair(torch.zeros(SHAPE), torch.randn(300, *SHAPE), seed=0)  # ranks that need two bytes
    np.testing.assert_array_equal(Ranks.from_json(many.to_json()).pixels, many.pixels)
    with pytest.raises(ValueError, match="joined"):
        Ranks.join([whole, many])


def whole_part(ranks: Ranks, first: int, last: int) -> Ranks:
    names = ("pixels", "uncertain", "summaries", "distances")
    return Ranks(ranks.draws, *(getattr(ranks, name)[first:last] for name in names))


def test_few_draws_get_the_intervals_that_exist():
    assert draws_needed(0.95) == 39
    assert draws_needed(0.8) == 9
    assert draws_needed(0.5) == 3
    result = calibrate(*pairs(25, 19, 0))
    assert [c.level for c in result.quantities[0].coverages] == [0.5, 0.8, 0.9]
    assert "19 draws have no 95% interval, which needs 39" in result.describe()
    one = calibrate(*pairs(25, 1, 0))
    assert one.quantities[0].coverages == []


def test_few_pairs_get_no_verdict():
    result = calibrate(*pairs(5, 39, 0, spread=0.3))
    assert result.verdict == "too few pairs"
    assert "at least 20 pairs" in result.describe()
    assert "too little" not in result.describe()
    calibrate(*pairs(1, 39, 0)).describe()


def test_error_bars_are_those_of_repeated_experiments():
    rows = [calibrate(*pairs(40, 19, seed)).quantities for seed in range(60)]
    for index in (1, 3):
        covered = np.array([row[index].coverages[0].covered for row in rows])
        error = np.array([row[index].coverages[0].error for row in rows])
        assert covered.mean() == pytest.approx(0.5, abs=4 * covered.std() / math.sqrt(60))
        assert error.mean() == pytest.approx(covered.std(), rel=0.35)  # 60 experiments know a spread to 9%


def test_the_binomial_interval_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for n, p in [(100, 0.05), (7, 0.5), (1000, 0.9)]:
        assert binomial_interval(n, p, 0.99) == tuple(int(k) for k in stats.binom.interval(0.99, n, p))
    assert binomial_interval(10, 1.0, 0.99) == (10, 10)


def test_the_picture_shows_something(tmp_path):
    file = draw_calibration(tmp_path / "a.png", calibrate(*pairs(30, 39, 0)), title="test")
    with Image.open(file) as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    draw_calibration(tmp_path / "b.png", calibrate(*pairs(2, 4, 0)))


def test_bad_arguments_are_named():
    x = torch.zeros(2, 1, 3, 3)
    for truths, draws, words in [
        (x, torch.zeros(3, 5, 1, 3, 3), "3 sets"),
        (x, torch.zeros(2, 5, 1, 3, 4), r"\(1, 3, 3\)"),
        (x, torch.zeros(2, 0, 1, 3, 3), r"\(0, 1, 3, 3\)"),
        (x * math.nan, torch.zeros(2, 5, 1, 3, 3), "finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            calibrate(truths, draws)
    with pytest.raises(ValueError, match=r"level = 1\.5"):
        calibrate(x, torch.zeros(2, 5, 1, 3, 3), levels=[1.5])
    assert PROJECTED == "random projections"
