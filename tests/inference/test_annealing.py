"""Where the annealing ends: the noise in image units, against dense linear algebra."""

import math

import pytest
import torch

from dpnp_inference.annealing import Annealing, jacobian_norm, noise_through
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import (
    GaussianNoise,
    JointNoise,
    LogPoissonNoise,
    Noise,
    TransmissionNoise,
)
from dpnp_shared.operators import (
    FunctionOperator,
    GaussianBlur,
    Operator,
    ParallelBeamCT,
    PhysicalUnits,
    RandomInpainting,
    Stack,
)

SHAPE = (1, 8, 8)
MEAN = 0.2
PRIOR = GaussianPrior(MEAN, 0.01, SHAPE)  # so narrow that all of it is near the mean image
BLANK = torch.zeros(1, *SHAPE, dtype=torch.float64)


def lines() -> PhysicalUnits:
    """Line integrals of up to some 3, of pixels in [-1, 1]."""
    return PhysicalUnits(ParallelBeamCT(SHAPE, 12), physical_range=(0.0, 0.5)).double()


def dense(operator: Operator, information) -> float:
    """The same by all columns of the Jacobian, at the mean image."""
    x = torch.full_like(BLANK, MEAN)
    J = torch.autograd.functional.jacobian(lambda x: operator(x[None])[0].flatten(), x[0]).flatten(1)
    weight = information(operator(x))[0].flatten()
    return float(torch.linalg.eigvalsh(J.T @ (weight[:, None] * J))[-1]) ** -0.5


ABSORBERS = {
    "transmission": (lambda: lines(), TransmissionNoise(1000.0, 5.0)),
    "line integrals": (lambda: lines(), LogPoissonNoise(1000.0, mu=0.7)),
}


@pytest.mark.parametrize("name", ABSORBERS)
def test_noise_that_depends_on_the_signal_is_that_of_the_mean_image(name):
    make, noise = ABSORBERS[name]
    operator = make()
    found = noise_through(ForwardModel(operator, noise), PRIOR, BLANK)
    assert found == pytest.approx(dense(operator, noise.fisher_information), rel=0.03)


def test_an_absorber_hides_more_than_its_brightest_ray():
    noise, thick = TransmissionNoise(1000.0), lines()
    thin = PhysicalUnits(ParallelBeamCT(SHAPE, 12), physical_range=(0.0, 1e-3)).double()
    of_thin, of_thick = (noise_through(ForwardModel(rays, noise), PRIOR, BLANK) for rays in (thin, thick))
    assert of_thin == pytest.approx(noise.resolution / jacobian_norm(thin, PRIOR, BLANK), rel=0.03)
    assert of_thick > 1.3 * noise.resolution / jacobian_norm(thick, PRIOR, BLANK)


def test_parts_of_a_stack_keep_their_own_noise():
    blur, mask = GaussianBlur(SHAPE, 1.0).double(), RandomInpainting(SHAPE, missing=0.5, seed=0).double()
    fine, coarse = (
        FunctionOperator(lambda x: 0.01 * blur(x)),
        FunctionOperator(lambda x: torch.complex(mask(x), mask(x))),
    )
    noise = JointNoise([TransmissionNoise(1000.0), GaussianNoise(0.1)])
    operator = Stack([FunctionOperator(lambda x: fine(x) + 1), coarse], image_shape=SHAPE)
    model = ForwardModel(operator, noise)
    found = noise_through(model, PRIOR, BLANK)
    assert isinstance(model.noise, JointNoise)
    assert found == pytest.approx(dense(operator, model.noise.fisher_information), rel=0.03)
    assert found == pytest.approx(0.1 / math.sqrt(2), rel=0.05)  # the finely told part hardly depends on the image


def test_a_model_without_gradient_gives_the_least_it_can_be():
    operator, noise = lines(), TransmissionNoise(1000.0)
    black_box = FunctionOperator(lambda x: operator(x), differentiable=False)
    squared = []
    for v in torch.eye(64, dtype=torch.float64).reshape(64, *SHAPE):
        x = torch.full_like(BLANK, MEAN)
        weight = noise.fisher_information(operator(x))
        squared.append(float((weight * (operator(x + v) - operator(x)) ** 2).sum()))
    least = math.sqrt(sum(squared) / 64)
    found = jacobian_norm(black_box, PRIOR, BLANK, iterations=2000, information=noise.fisher_information)
    assert found == pytest.approx(least, rel=0.03)


def test_a_linear_map_and_one_sigma_need_no_power_iteration(monkeypatch):
    monkeypatch.setattr("dpnp_inference.annealing.jacobian_norm", None)
    model = ForwardModel(RandomInpainting(SHAPE, missing=0.5, seed=0), GaussianNoise(0.3))
    assert noise_through(model, PRIOR, BLANK) == 0.3


class Silent(Noise):
    """Says nothing of itself."""

    def sample(self, clean, generator=None):
        return clean

    def log_prob(self, y, clean):
        return (y - clean).flatten(1).sum(1)


class Half(Silent):
    """Says its resolution and takes its information back."""

    resolution = 0.5

    def fisher_information(self, clean):
        return None


def test_noise_that_says_nothing_asks_for_eta_min():
    with pytest.raises(ValueError, match=r"Half does not say its resolution.*give eta_min"):
        Annealing().schedule(PRIOR, ForwardModel(lines(), Half()), BLANK)
    assert Silent().fisher_information(BLANK) is None
    joint = ForwardModel(Stack([lines(), lines()]), JointNoise([GaussianNoise(1.0), Silent()]))
    with pytest.raises(ValueError, match=r"JointNoise does not say its resolution.*give eta_min"):
        Annealing().schedule(PRIOR, joint, BLANK)
