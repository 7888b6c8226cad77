"""Whether draws explain their measurement: right in numbers where the posterior is known, and silent or loud where it should be."""

import json
import math

import pytest
import torch

import dpnp_shared.noise
from dpnp_inference import Annealing, DPnP, Posterior
from dpnp_inference.baselines import DPS
from dpnp_inference.diagnostics import diagnose
from dpnp_inference.fit import DRAWS, FIT_ERRORS, REPLICATES, Fit, measure_fit, record_fit
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import (
    CensoredGaussianNoise,
    DitheredLogisticNoise,
    GaussianNoise,
    JointNoise,
    LaplaceNoise,
    LogPoissonNoise,
    Noise,
    PoissonGaussianNoise,
    PoissonNoise,
    RicianNoise,
    StudentTNoise,
    TransmissionNoise,
    VonMisesNoise,
)
from dpnp_shared.operators import FunctionOperator, RandomInpainting, Stack

SHAPE = (1, 12, 10)


def identity(x):
    return x


def double(x):
    return 2 * x


def fourier(x):
    return torch.fft.fft2(x, norm="ortho")


def model(noise: Noise, function=identity) -> ForwardModel:
    return ForwardModel(FunctionOperator(function), noise)


def conjugate(sigma: float, seed: int, draws: int = DRAWS) -> tuple[ForwardModel, torch.Tensor, torch.Tensor]:
    """Noise on an image of independent normal pixels: the model, a measurement and draws from the posterior."""
    generator = torch.Generator().manual_seed(seed)
    blurred = model(GaussianNoise(sigma))
    truth = torch.randn(1, *SHAPE, generator=generator)
    y = blurred.simulate(truth, generator=generator)[0]
    variance = sigma**2 / (1 + sigma**2)
    x = y / (1 + sigma**2) + math.sqrt(variance) * torch.randn(draws, *SHAPE, generator=generator)
    return blurred, y, x


def test_gaussian_residuals_give_their_reduced_chi_square():
    blurred, y, x = conjugate(0.5, seed=0)
    fit = measure_fit(blurred, y, x, seed=0)
    m = y.numel()
    expected = float(((y - x) ** 2).mean()) / 0.5**2
    error = math.sqrt(2 / m) / math.sqrt(REPLICATES)  # of the simulated measurements' mean
    assert fit.chi_square == pytest.approx(expected, abs=5 * error)
    assert fit.chance == pytest.approx(math.sqrt(2 / m), rel=0.4)
    assert (fit.draws, fit.impossible) == (DRAWS, 0)
    assert fit == measure_fit(blurred, y, x, seed=0)
    assert fit != measure_fit(blurred, y, x, seed=1)


def test_over_the_models_measurements_draws_from_the_posterior_fit():
    fits = [measure_fit(*conjugate(0.5, seed), seed=seed) for seed in range(60)]
    errors = torch.tensor([fit.errors for fit in fits])
    # the law is that of the truth's own deviance less its mean: variance at most 1, here less, since draws share y
    assert abs(float(errors.mean())) < 4 / math.sqrt(60)
    assert 0.3 < float(errors.std()) < 1.2
    assert all(not objection(fit) for fit in fits)


def objection(fit: Fit) -> str:
    """What a diagnosis says of such a fit."""
    found = diagnose(Posterior(torch.randn(24, 1, *SHAPE), {"fit": json.loads(json.dumps(vars(fit)))}))
    assert found.fit == fit
    assert (found.verdict == "misfit") == bool(found.reasons)
    return found.reasons[0] if found.reasons else ""


NOISES = {
    "Laplace": (LaplaceNoise(0.3), LaplaceNoise(0.12)),
    "Student": (StudentTNoise(0.3, 3.0), StudentTNoise(0.1, 3.0)),
    "Rice": (RicianNoise(0.5), RicianNoise(0.2)),
    "von Mises": (VonMisesNoise(10.0), VonMisesNoise(60.0)),
    "Poisson": (PoissonNoise(20.0), PoissonNoise(40.0)),
    "Poisson and Gauss": (PoissonGaussianNoise(0.1, 0.05), PoissonGaussianNoise(0.02, 0.02)),
    "transmission": (TransmissionNoise(50.0), TransmissionNoise(120.0)),
    "logarithm of counts": (LogPoissonNoise(50.0), LogPoissonNoise(50.0)),
    "censored": (CensoredGaussianNoise(0.3, 0.0, 1.0), CensoredGaussianNoise(0.1, 0.0, 1.0)),
    "bits": (DitheredLogisticNoise(0.3), DitheredLogisticNoise(0.1)),
}


def test_all_noise_models_are_tried():
    exported = {getattr(dpnp_shared.noise, name) for name in dpnp_shared.noise.__all__}
    assert {type(noise) for noise, _ in NOISES.values()} == exported - {Noise, GaussianNoise, JointNoise}


def test_parts_of_a_stack_are_taken_together():
    stack = Stack([FunctionOperator(identity), FunctionOperator(fourier)], image_shape=SHAPE)
    joint = ForwardModel(stack, JointNoise([PoissonNoise(20.0), GaussianNoise(0.3)]))
    truth = 0.2 + torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = joint.simulate(truth, generator=torch.Generator().manual_seed(1))[0]
    assert abs(measure_fit(joint, y, truth, seed=0).errors) < FIT_ERRORS
    wrong = ForwardModel(stack, JointNoise([PoissonNoise(20.0), GaussianNoise(0.1)]))
    assert "do not explain the measurement" in objection(measure_fit(wrong, y, truth, seed=0))


@pytest.mark.parametrize("name", NOISES)
def test_the_truth_fits_under_every_noise_and_not_under_another(name):
    noise, other = NOISES[name]
    truth = 0.2 + torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    errors = []
    for seed in range(12):
        y = model(noise).simulate(truth, generator=torch.Generator().manual_seed(seed))[0]
        errors.append(measure_fit(model(noise), y, truth, seed=seed).errors)
    assert max(map(abs, errors)) < FIT_ERRORS
    assert abs(sum(errors)) / len(errors) < 4 / math.sqrt(len(errors))
    wrong = model(other, double if name == "logarithm of counts" else identity)
    assert "do not explain the measurement" in objection(measure_fit(wrong, y, truth, seed=0))


def test_draws_that_do_not_fit_are_told_from_those_that_fit_too_well():
    _, y, x = conjugate(0.5, seed=0)
    far = objection(measure_fit(model(GaussianNoise(0.25)), y, x, seed=0))
    assert far.startswith("the draws do not explain the measurement (reduced chi-square of the draws ")
    near = objection(measure_fit(model(GaussianNoise(1.0)), y, x, seed=0))
    assert "closer to the measurement than its noise allows" in near
    assert not objection(measure_fit(model(GaussianNoise(0.55)), y, x, seed=0))  # 20% are within what is tolerated


def test_few_entries_are_given_the_benefit_of_chance():
    few = ForwardModel(FunctionOperator(lambda x: x[:, 0, 0, :2]), GaussianNoise(0.5))
    x = torch.zeros(4, *SHAPE)
    fit = measure_fit(few, torch.tensor([1.0, 0.9]), x, seed=0)
    assert fit.chi_square > 2
    assert not objection(fit)


def test_complex_and_single_measurements():
    fourier_model = model(GaussianNoise(0.3), fourier)
    truth = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = fourier_model.simulate(truth, generator=torch.Generator().manual_seed(1))[0]
    fit = measure_fit(fourier_model, y, truth, seed=0)
    assert abs(fit.errors) < FIT_ERRORS
    assert fit.chance == pytest.approx(math.sqrt(2 / (2 * y.numel())), rel=0.4)
    assert fit.draws == 1


def test_draws_under_which_the_measurement_is_impossible():
    poisson, y = model(PoissonNoise(10.0)), torch.full(SHAPE, 3.0)
    x = torch.full((6, *SHAPE), 0.3)
    x[4:] = -0.1
    some = measure_fit(poisson, y, x, seed=0)
    assert (some.draws, some.impossible) == (6, 2)
    assert abs(some.errors - measure_fit(poisson, y, x[:4], seed=0).errors) < 1  # of the simulated measurements
    found = diagnose(Posterior(torch.randn(24, 1, *SHAPE), {"fit": vars(some)}))
    assert any("under 2 of 6 draws" in note for note in found.notes)
    none = measure_fit(poisson, y, x[4:], seed=0)
    assert none == Fit(None, None, 2, 2)
    assert "under none of the draws" in objection(none)


class AnyOf(Noise):
    """Uniform: every measurement that is possible has one density."""

    def sample(self, clean, generator=None):
        return clean + torch.rand(clean.shape, generator=generator)

    def entry_log_prob(self, y, clean):
        r = y - clean
        return torch.where((r >= 0) & (r <= 1), 0.0, -math.inf)


def test_a_law_without_preferences_has_no_chi_square():
    x = torch.zeros(3, *SHAPE)
    fit = measure_fit(model(AnyOf()), torch.full(SHAPE, 0.5), x, seed=0)
    assert fit == Fit(None, None, 3, 0)
    assert fit.errors == 0
    assert not objection(fit)
    assert "all measurements are alike" in fit.describe()


def test_what_goes_wrong_loses_nothing(caplog):
    class Broken(AnyOf):
        def sample(self, clean, generator=None):
            raise RuntimeError("no simulation today")

    assert record_fit(model(Broken()), torch.zeros(SHAPE), torch.zeros(3, *SHAPE), seed=0) is None
    assert "whether the draws explain the measurement is not known: RuntimeError: no simulation today" in caplog.text
    found = diagnose(Posterior(torch.randn(24, 1, *SHAPE), {"fit": None}))
    assert found.fit is None
    assert "whether the draws explain the measurement could not be found out; the log says why" in found.notes
    assert not any("measurement" in note for note in diagnose(Posterior(torch.randn(24, 1, *SHAPE), {})).notes)


def test_samplers_record_it():
    prior, noise = GaussianPrior(0.0, 1.0, SHAPE), GaussianNoise(0.5)
    inpainting = ForwardModel(RandomInpainting(SHAPE, missing=0.5, seed=0), noise)
    truth = prior.sample(1, generator=torch.Generator().manual_seed(0))
    y = inpainting.simulate(truth, generator=torch.Generator().manual_seed(1))[0]
    annealing = Annealing(eta_max=2.0, constant=0, decay=4)
    posterior = DPnP(prior, inpainting, annealing=annealing).sample(y, chains=20, seed=0)
    fit = Fit.of(posterior.diagnostics)
    assert fit is not None
    assert abs(fit.errors) < FIT_ERRORS
    assert fit == measure_fit(inpainting, y, posterior.flat, seed=0)
    assert posterior.diagnose().fit == fit
    assert posterior.diagnose().describe().endswith(f"\nfit: {fit.describe()}")
    assert "fit" not in posterior[:5].diagnostics
    sharp = ForwardModel(inpainting.operator, GaussianNoise(0.05))
    y = sharp.simulate(truth, generator=torch.Generator().manual_seed(1))[0]
    arrived, stopped = (
        DPnP(prior, sharp, annealing=Annealing(eta_max=2.0, eta_min=eta_min, decay=20)).sample(y, chains=20, seed=0)
        for eta_min in (None, 0.5)
    )
    assert arrived.diagnose().verdict == "no objection"
    assert stopped.diagnose().verdict == "misfit"
    assert Fit.of(DPS(prior, sharp, steps=20).sample(y, chains=3, seed=0).diagnostics).draws == 3
