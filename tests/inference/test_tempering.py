"""Markov kernels on the way down: the likelihood is tempered until the last coupling, and a kernel that stands still says so."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor

from dpnp_inference import Annealing, DPnP
from dpnp_inference.dpnp import movement_warnings
from dpnp_inference.proximal import HMC, MALA, ClosedForm, EllipticalSlice, MarkovKernel, PerturbAndSolve
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import FunctionOperator, Identity, RandomInpainting

SHAPE = (1, 6, 6)
KERNELS = [MALA(), HMC(), EllipticalSlice()]


def smooth_prior(spread: float = 5.0) -> GaussianPrior:
    """Pixels that are strongly correlated with their neighbours."""
    i = torch.arange(36, dtype=torch.float64)
    row, column = i.div(6, rounding_mode="floor"), i % 6
    square = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    covariance = spread**2 * torch.exp(-square / 8) + 0.01 * torch.eye(36, dtype=torch.float64)
    return GaussianPrior(torch.zeros(SHAPE, dtype=torch.float64), covariance, SHAPE)


def test_only_the_way_is_tempered():
    prior, model = smooth_prior(), ForwardModel(Identity(SHAPE), GaussianNoise(0.1))
    for kernel in KERNELS:
        assert isinstance(kernel, MarkovKernel)
        dpnp = DPnP(prior, model, proximal=kernel)
        assert dpnp.powers == sorted(dpnp.powers)
        last = [power for eta, power in zip(dpnp.schedule, dpnp.powers, strict=True) if eta == dpnp.schedule[-1]]
        assert set(last) == {1.0}
        assert len(last) == 5
        # the law's condition number: 1 + power eta^2 / sigma^2
        numbers = [1 + power * eta**2 / 0.1**2 for eta, power in zip(dpnp.schedule, dpnp.powers, strict=True)]
        assert max(numbers) < 11
        assert f"power from {dpnp.powers[0]:.2g} to 1" in dpnp.plan
        assert set(DPnP(prior, model, proximal=kernel, annealing=Annealing(temper=0.0)).powers) == {1.0}
        assert set(DPnP(prior, model, proximal=kernel, population=True).powers) == {1.0}
    for kernel in (ClosedForm(), PerturbAndSolve()):
        assert not isinstance(kernel, MarkovKernel)
        assert set(DPnP(prior, model, proximal=kernel).powers) == {1.0}


def test_tempering_brings_chains_to_the_posterior_that_a_sharp_likelihood_keeps_them_from():
    prior = smooth_prior(spread=2.0)
    model = ForwardModel(RandomInpainting(SHAPE, missing=0.5, seed=0), GaussianNoise(0.02))
    truth = prior.sample(1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = model.simulate(truth, generator=torch.Generator().manual_seed(2))[0]
    exact = prior.posterior(model, y)
    std = exact.covariance.diagonal().sqrt().reshape(SHAPE)
    errors = []  # 1 for draws from the posterior
    for settings in ({}, {"proximal": MALA()}, {"proximal": MALA(), "annealing": Annealing(temper=0.0)}):
        x = DPnP(prior, model, dtype=torch.float64, **settings).sample(y, chains=40, seed=0).flat
        errors.append(float(((x - exact.mean) / std).square().mean().sqrt()))
    closed_form, tempered, sharp = errors
    assert tempered < 1.2 * closed_form
    assert sharp > 3 * closed_form


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_retargeted_chains_go_on_under_the_new_likelihood(kernel):
    x = torch.ones(3, *SHAPE)
    first, second = (ForwardModel(Identity(), GaussianNoise(sigma)) for sigma in (0.1, 0.2))
    state = kernel.init(first, x[0], x)
    if hasattr(state, "log_s"):
        state = state._replace(log_s=state.log_s - 1, eta=0.3)
    new = kernel.retarget(state, second)
    assert new.forward_model is second
    assert new.z is state.z
    if hasattr(state, "log_s"):
        assert new.log_s is state.log_s
        assert math.isnan(new.eta)  # the next step adapts


class Treacherous(Noise):
    """A density that is defined at blank images only."""

    resolution = 0.1

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return clean

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        size = clean.flatten(1).abs().amax(1)
        return torch.where(size == 0, 0.0, torch.nan * size)


@pytest.mark.parametrize(
    ("kernel", "noise", "remedy"),
    [
        (MALA(first_step=1e-8, warmup=0), GaussianNoise(0.1), "give it more steps"),
        (HMC(first_step=1e-6, warmup=0), GaussianNoise(0.1), "give it more steps"),
        (MALA(), Treacherous(), "look at the forward model"),
        (EllipticalSlice(steps=2, most_proposals=5), Treacherous(), "look at the forward model"),
    ],
)
def test_a_kernel_that_stands_still_names_the_remedy(kernel, noise, remedy, caplog):
    operator = FunctionOperator(lambda x: x)
    dpnp = DPnP(smooth_prior(), ForwardModel(operator, noise), proximal=kernel, annealing=Annealing(decay=3))
    with caplog.at_level(logging.WARNING):
        posterior = dpnp.sample(torch.zeros(SHAPE), chains=3, seed=0)
    (warning,) = posterior.diagnostics["warnings"]
    assert warning in caplog.messages
    assert remedy in warning
    assert type(kernel).__name__ in warning


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"], ids=lambda kernel: type(kernel).__name__)
def test_a_kernel_that_moves_says_nothing(kernel):
    model = ForwardModel(Identity(SHAPE), GaussianNoise(0.1))
    dpnp = DPnP(smooth_prior(), model, proximal=kernel, annealing=Annealing(decay=6))
    posterior = dpnp.sample(torch.zeros(SHAPE), chains=3, seed=0)
    assert posterior.diagnostics["warnings"] == []


def test_the_last_coupling_counts():
    row = {"acceptance": 0.5, "non_finite": 0.0, "jump": 1e-5, "still": 0.0}
    good = row | {"jump": 0.5, "eta": 0.1}
    assert movement_warnings("K", [[row | {"eta": 1.0}, good]]) == []
    assert "0.00% of the way" in movement_warnings("K", [[good | {"eta": 1.0}, row | {"eta": 0.1}]])[0]
    assert "20% of the draws stay" in movement_warnings("K", [[good | {"still": 0.2}]])[0]


def test_tempering_is_checked():
    with pytest.raises(ValueError, match=r"temper = -1"):
        Annealing(temper=-1)
