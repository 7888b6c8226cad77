"""The benchmark of transmission tomography: what it counts, and the linear model that it compares with."""

from pathlib import Path

import pytest
import torch

from dpnp_inference.baselines import NonlinearCT
from dpnp_inference.baselines.nonlinear_ct import Scan
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import TransmissionNoise
from dpnp_shared.operators import ParallelBeamCT, PhysicalUnits

IMAGE = (1, 12, 12)
LINES = PhysicalUnits(ParallelBeamCT(IMAGE, 12), physical_range=(0.0, 0.3))
PRIOR = GaussianPrior(0.0, 0.25, IMAGE)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import transmission_ct

    return transmission_ct


def counts(model: ForwardModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return model.simulate(PRIOR.sample(1, generator=generator), generator=generator)[0]


def test_projections_are_counted_by_image_and_by_share_of_the_views(benchmark):
    matrix, x = LINES.operator.matrix, torch.zeros(3, *IMAGE, requires_grad=True)
    with benchmark.Projections() as count:
        LINES(x).sum().backward()
        part, _ = Scan(LINES, torch.tensor(1.0), torch.tensor(0.0)).subset(1, 3, torch.zeros(1, 12, 17))
        part.lines(x)
    assert count.entries / matrix.weights.numel() == pytest.approx(
        2 * 3 + 3 / 3, rel=0.05
    )  # there, back, a third there
    LINES(x)
    with benchmark.Projections() as again:
        pass
    assert again.entries == 0


def test_the_count_is_the_solvers_own(benchmark):
    model, chains = ForwardModel(LINES, TransmissionNoise(100.0)), 4
    for subsets in (1, 3):
        with benchmark.Projections() as count:
            posterior = NonlinearCT(PRIOR, model, steps=9, subsets=subsets).sample(counts(model), chains=chains, seed=0)
        counted = count.entries / LINES.operator.matrix.weights.numel() / chains
        # beside its steps' the solver projects an image of ones and a blank one, once for all chains
        assert counted == pytest.approx(posterior.diagnostics["forward_calls"] + 2 / chains, rel=0.1)


def test_the_linear_model_has_the_weights_of_the_linearised_likelihood(benchmark):
    noise = TransmissionNoise(20.0, 2.0)
    y = counts(ForwardModel(LINES, noise))
    y[0, 0, :4] = torch.tensor([0.0, 1.0, 2.0, 3.0])
    model, logarithm = benchmark.linearised(LINES, noise, y)
    p = torch.full((1, *y.shape), 0.7, requires_grad=True)
    model.noise.log_prob(logarithm, p).sum().backward()
    slope, _ = Scan(LINES, noise.photons, noise.background).slope(p.detach(), y, "linearised")
    assert slope[0, 0, 0, :3].abs().max() == 0
    torch.testing.assert_close(p.grad, slope, rtol=1e-4, atol=1e-4)  # a ray that is left out has noise of 1,000
