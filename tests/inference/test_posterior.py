import os

import pytest
import torch

from dpnp_inference import ChainGenerators, Posterior
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_inference.posterior import _arviz

arviz = _arviz()  # which once a day announces its future by a warning


def make(chains=13, draws=3, shape=(1, 2, 4)) -> Posterior:
    samples = torch.randn(chains, draws, *shape, generator=torch.Generator().manual_seed(0))
    return Posterior(samples, {"seed": 0})


def test_statistics_are_over_all_draws():
    posterior = make()
    flat = posterior.samples.reshape(39, 1, 2, 4)
    torch.testing.assert_close(posterior.mean, flat.mean(0))
    torch.testing.assert_close(posterior.std, flat.std(0))
    torch.testing.assert_close(posterior.quantile(0.5), flat.median(0).values)


def test_interval_is_the_order_statistics():
    low, high, level, k = make().interval(0.9)
    ordered = make().flat.sort(0).values
    assert k == 2
    assert level == pytest.approx(0.9)
    assert torch.equal(low, ordered[1])
    assert torch.equal(high, ordered[-2])


def test_interval_covers_an_exchangeable_truth_at_its_level():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 20_000, generator=generator)
    posterior = Posterior(x[1:].reshape(19, 1, 1, 100, 200))
    fraction, level = coverage(posterior, x[0].reshape(1, 100, 200), 0.8)
    assert level == pytest.approx(0.8)
    assert fraction == pytest.approx(0.8, abs=4 * (0.16 / 20_000) ** 0.5)
    where = torch.zeros(1, 100, 200, dtype=torch.bool)
    where[0, 0, 0] = True
    assert coverage(posterior, x[0].reshape(1, 100, 200), 0.8, where)[0] in (0.0, 1.0)


def test_too_few_draws_say_how_many_are_needed():
    with pytest.raises(ValueError, match="at least 19"):
        make(3, 1).interval(0.9)
    make(19, 1).interval(0.9)
    with pytest.raises(ValueError, match="at least 2"):
        _ = make(1, 1).std
    with pytest.raises(ValueError, match="level"):
        make().interval(1.0)
    with pytest.raises(ValueError, match="q = 2"):
        make().quantile(2)
    with pytest.raises(ValueError, match=r"\(0, 1, 1, 2, 2\)"):
        Posterior(torch.zeros(0, 1, 1, 2, 2))


def test_round_trip(tmp_path):
    posterior = make()
    loaded = Posterior.load(posterior.save(tmp_path / "run"))
    assert torch.equal(loaded.samples, posterior.samples)
    assert loaded.diagnostics == posterior.diagnostics
    assert sorted(os.listdir(tmp_path / "run")) == ["diagnostics.json", "samples.safetensors"]
    (tmp_path / "run" / "diagnostics.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"diagnostics\.json"):
        Posterior.load(tmp_path / "run")


def test_convergence_is_arviz_own():
    posterior = make(4, 100)
    x = posterior.samples.numpy()
    found = posterior.convergence()
    assert found["r_hat"] == pytest.approx(max(float(arviz.rhat(x[:, :, 0, i, j])) for i in range(2) for j in range(4)))
    assert found["ess_bulk"] == pytest.approx(
        min(float(arviz.ess(x[:, :, 0, i, j], method="bulk")) for i in range(2) for j in range(4))
    )
    assert make(4, 3).convergence() is None
    assert posterior.to_arviz().posterior["x"].dims == ("chain", "draw", "c", "h", "w")


def test_scores():
    truth = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert psnr(truth + 0.2 * (truth < 0), truth, (-1.0, 1.0)) == pytest.approx(
        float(10 * torch.log10(4 / (0.04 * (truth < 0)).mean())), rel=1e-5
    )
    assert psnr(truth * 0 + 5, truth * 0 + 1, (-1.0, 1.0)) > 100  # clipped to the range
    assert ssim(truth, truth, (-1.0, 1.0)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(truth[:, :8], truth[:, :8], (-1.0, 1.0))


def test_generators_are_streams_of_seed_and_chain():
    x = torch.zeros(3, 2, 2)
    a = ChainGenerators(5, range(3)).normal_like(x)
    assert torch.equal(ChainGenerators(5, [2]).normal_like(x[:1])[0], a[2])
    assert not torch.equal(ChainGenerators(6, range(3)).normal_like(x), a)
    # (seed 0, chain 1) and (seed 1, chain 0) are different streams
    assert not torch.equal(ChainGenerators(0, [1]).normal_like(x[:1]), ChainGenerators(1, [0]).normal_like(x[:1]))
    many = ChainGenerators(0, range(50)).normal_like(torch.zeros(50, 1000, dtype=torch.complex64))
    assert float(many.real.var()) == pytest.approx(1.0, abs=0.03)
    assert float(many.imag.var()) == pytest.approx(1.0, abs=0.03)
    with pytest.raises(ValueError, match="2 generators"):
        ChainGenerators(0, range(2)).normal_like(x)
    with pytest.raises(ValueError, match="negative"):
        ChainGenerators(-1, range(2))


def test_chains_and_draws_are_selected():
    posterior = make(5, 7)
    posterior.diagnostics |= {"convergence": {"r_hat": 1.0}, "chains": 5, "draws": 7}
    for part, samples in [
        (posterior[2], posterior.samples[2:3]),
        (posterior[-1, 3], posterior.samples[4:, 3:4]),
        (posterior[1:3], posterior.samples[1:3]),
        (posterior[:, 2::2], posterior.samples[:, 2::2]),
        (posterior[[0, 4], [6, 1, 1]], posterior.samples[[0, 4]][:, [6, 1, 1]]),
        (posterior.select(draws=slice(0, 2)), posterior.samples[:, :2]),
    ]:
        assert torch.equal(part.samples, samples)
        assert part.diagnostics == {"seed": 0, "chains": len(samples), "draws": samples.shape[1]}
    assert posterior.diagnostics["chains"] == 5
    for index, word in [
        (5, "chains = 5; there are 5"),
        ((0, [0, -8]), "draws = -8; there are 7"),
        ((slice(3, 3), 0), "chains = .* selects none"),
        ((0, 0, 0), "3 indices"),
        ([], "selects none"),
    ]:
        with pytest.raises(IndexError, match=word):
            posterior[index]
    with pytest.raises(TypeError):
        posterior["a"]


def test_functionals_keep_chains_and_draws_apart():
    posterior = make(4, 5)
    assert torch.equal(posterior.functional(lambda x: x[:, 0, 1, 2]), posterior.samples[:, :, 0, 1, 2])
    with pytest.raises(ValueError, match=r"returned \(20, 1, 2, 4\) for images \(20, 1, 2, 4\); needed is \(20,\)"):
        posterior.functional(lambda x: x)


def test_to_xarray_has_named_dimensions_and_shares_memory():
    posterior = make(4, 5)
    array = posterior.to_xarray()
    assert array.dims == ("chain", "draw", "c", "h", "w")
    assert float(array.sel(chain=3, draw=2)[0, 1, 3]) == float(posterior.samples[3, 2, 0, 1, 3])
    posterior.samples[0, 0, 0, 0, 0] = 7
    assert float(array[0, 0, 0, 0, 0]) == 7


def test_monte_carlo_errors_are_arviz_own_from_four_draws_on():
    posterior = make(3, 50)
    x = posterior.samples.numpy()
    assert float(posterior.mcse_mean[0, 1, 2]) == pytest.approx(float(arviz.mcse(x[:, :, 0, 1, 2])), rel=1e-5)
    assert float(posterior.mcse_std[0, 1, 2]) == pytest.approx(
        float(arviz.mcse(x[:, :, 0, 1, 2], method="sd")), rel=1e-5
    )
    single = make(30, 1)
    torch.testing.assert_close(single.mcse_mean, single.std / 30**0.5)
    for draws in (1, 3):
        with pytest.raises(ValueError, match="several chains or 4 draws"):
            _ = make(1, draws).mcse_mean


def test_plots_are_figures_of_the_draws_and_show_nothing():
    for shape in ((2, 6, 9), (3, 5, 4)):
        posterior = make(4, 12, shape)
        figure = posterior.plot((-2, 2), draws=3)
        images = [axis.get_images()[0] for axis in figure.axes if axis.get_images()]
        assert [tuple(i.get_array().shape[:2]) for i in images] == [shape[1:]] * 5
        expected = ((posterior.mean + 2) / 4).clamp(0, 1)
        shown = torch.from_numpy(images[0].get_array().data)
        torch.testing.assert_close(shown, (expected.movedim(0, -1) if shape[0] == 3 else expected.mean(0)).double())
        assert [axis.get_title() for axis in figure.axes][2:5] == [
            "chain 0, draw 0",
            "chain 1, draw 0",
            "chain 2, draw 0",
        ]
        assert figure._repr_png_().startswith(b"\x89PNG")
    traces = posterior.plot_traces({"first": lambda x: x[:, 0, 0, 0], "mean": lambda x: x.mean((1, 2, 3))})
    lines = traces.axes[0].get_lines()
    assert len(lines) == 4
    torch.testing.assert_close(torch.from_numpy(lines[2].get_ydata()), posterior.samples[2, :, 0, 0, 0].double())
    assert traces.axes[0].get_title() == "first"
    ranks = posterior.plot_ranks()
    assert len(ranks.axes[0].patches) == 4
    apart = Posterior(torch.arange(40.0).reshape(2, 20, 1, 1, 1)).plot_ranks()
    heights = [patch.get_data().values for patch in apart.axes[0].patches]  # all low ranks, then all high ones
    assert [h[0] > 0 and h[-1] == 0 for h in heights] == [True, False]
    assert sum(h.mean() for h in heights) == pytest.approx(2)
    single = make(4, 1)
    assert len(single.plot().axes) == 6 + 1  # mean, standard deviation and its bar, four draws
    assert len(make(1, 1).plot().axes) == 2
    assert len(single.plot_traces().axes[0].get_lines()[0].get_ydata()) == 4
    assert make(1, 1).plot(draws=0)._repr_png_()


def test_bad_plots_are_named():
    posterior = make(4, 5)
    with pytest.raises(ValueError, match="draws = -1"):
        posterior.plot(draws=-1)
    with pytest.raises(ValueError, match="value_range"):
        posterior.plot((1, 1))
    with pytest.raises(ValueError, match="functionals is empty"):
        posterior.plot_traces({})
    with pytest.raises(ValueError, match="1 draw of each"):
        posterior[:, 0].plot_ranks()
