import os

import arviz
import pytest
import torch

from dpnp_inference import ChainGenerators, Posterior
from dpnp_inference.metrics import coverage, psnr, ssim


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
