import math

import pytest
import torch

from dpnp_shared.preconditioning import (
    EDM,
    VE,
    ContinuousVP,
    DiscreteVP,
    FlowMatching,
    Preconditioning,
    VPEpsilon,
    VPrediction,
)
from dpnp_shared.prior import denoise

EVERY = [
    EDM(),
    VE(),
    VPEpsilon(),
    VPEpsilon(DiscreteVP(schedule="cosine")),
    VPEpsilon(ContinuousVP()),
    VPrediction(),
    VPrediction(ContinuousVP()),
    FlowMatching(),
]


class Target(torch.nn.Module):
    """The network that a Gaussian prior N(0, s²) would teach, for the parametrisation at hand."""

    def __init__(self, preconditioning: Preconditioning, s: float) -> None:
        super().__init__()
        self.preconditioning, self.s = preconditioning, s
        self.anchor = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.sigma = torch.tensor(1.0)

    def forward(self, x_in: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        s, sigma = self.s, self.sigma.reshape(-1, 1, 1, 1)
        scales = {EDM: (sigma**2 + 0.25).sqrt(), VE: 1.0, FlowMatching: 1 + sigma}
        x = x_in * scales.get(type(self.preconditioning), (1 + sigma**2).sqrt())
        clean = x * s**2 / (s**2 + sigma**2)
        w = (x - clean) / sigma
        if isinstance(self.preconditioning, VE):
            return -w  # σ times the score
        if isinstance(self.preconditioning, VPEpsilon):
            return w
        if isinstance(self.preconditioning, FlowMatching):
            return w - clean  # the velocity
        if isinstance(self.preconditioning, VPrediction):
            alpha, beta = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
            return alpha * w - beta * clean
        return (clean - 0.25 / (sigma**2 + 0.25) * x) * (sigma**2 + 0.25).sqrt() / (sigma * 0.5)


@pytest.mark.parametrize("preconditioning", EVERY, ids=lambda p: type(p).__name__)
def test_every_parametrisation_is_the_same_denoiser(preconditioning):
    network = Target(preconditioning, s=0.7)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network.sigma = sigma = torch.tensor([0.05, 0.6, 7.0], dtype=torch.float64)
    expected = x * 0.49 / (0.49 + sigma.reshape(-1, 1, 1, 1) ** 2)
    torch.testing.assert_close(denoise(network, preconditioning, x, sigma), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma_data", [0.5, 2.0])
def test_edm_keeps_unit_variance(sigma_data):
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    c = EDM(sigma_data).coefficients(sigma)
    torch.testing.assert_close(c.c_in**2 * (sigma**2 + sigma_data**2), torch.ones_like(sigma))
    # variance of (x_0 - c_skip x)/c_out for independent x_0 and noise
    target = ((1 - c.c_skip) ** 2 * sigma_data**2 + c.c_skip**2 * sigma**2) / c.c_out**2
    torch.testing.assert_close(target, torch.ones_like(sigma))


def test_flow_matching_sees_its_own_path():
    t = torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64).reshape(3, 1, 1, 1)
    x_0, w = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = {}

    class Velocity(torch.nn.Linear):
        def forward(self, x_t, time):
            seen.update(x_t=x_t, time=time)
            return w - x_0

    sigma = t / (1 - t)
    clean = denoise(Velocity(1, 1).double(), FlowMatching(time_scale=10.0), x_0 + sigma * w, sigma.flatten())
    torch.testing.assert_close(seen["x_t"], (1 - t) * x_0 + t * w)
    torch.testing.assert_close(seen["time"], 10 * t.flatten())
    torch.testing.assert_close(clean, x_0)


def test_discrete_times_are_the_table_indices():
    schedule = DiscreteVP()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    sigma = ((1 - bar) / bar).sqrt()
    torch.testing.assert_close(schedule.time(sigma), torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-6)
    between = (sigma[500] * sigma[501]).sqrt()
    assert float(schedule.time(between[None])) == pytest.approx(500.5, abs=1e-6)
    assert schedule.sigma_max == pytest.approx(float(sigma[-1]))


def test_continuous_time_inverts_sigma():
    schedule = ContinuousVP()
    t = torch.tensor([1e-5, 1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    sigma = torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()
    torch.testing.assert_close(schedule.time(sigma), 999 * t, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: EDM(sigma_data=0), "sigma_data"),
        (lambda: EDM(sigma_min=2, sigma_max=1), "sigma_min"),
        (lambda: VE(sigma_max=math.inf), "sigma_max"),
        (lambda: FlowMatching(time_scale=0), "time_scale"),
        (lambda: FlowMatching(sigma_max=math.inf), "sigma_max"),
        (lambda: DiscreteVP(schedule="square"), "square"),
        (lambda: DiscreteVP(betas=[0.1, 1.5]), "betas"),
        (lambda: ContinuousVP(beta_min=-1), "beta_min"),
    ],
)
def test_bad_arguments_are_named(make, word):
    with pytest.raises(ValueError, match=word):
        make()
