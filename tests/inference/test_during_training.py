"""Reconstructions by which a training is watched."""

import pytest
import torch

from dpnp_inference import Annealing
from dpnp_inference.during_training import HeldOutReconstruction
from dpnp_shared.networks import UNet
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import BoxInpainting
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import Prior, PriorCard

FEW = Annealing(constant=0, decay=4, final=1)


def tiny(channels: int) -> Prior:
    torch.manual_seed(0)
    network = UNet(channels=channels, widths=[8], blocks=1, attention=[], embedding=8)
    card = PriorCard("tiny", (channels, 6, 5), sigma_range=(0.01, 50.0))
    return Prior(network, EDM(sigma_min=0.005, sigma_max=80.0), card).eval().requires_grad_(False)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_figures_and_picture(channels):
    prior, truth = tiny(channels), torch.linspace(-0.9, 0.9, channels * 30).reshape(channels, 6, 5)
    sampler = HeldOutReconstruction(annealing=FEW)
    figures, picture = sampler(prior, truth)
    assert set(figures) == {"psnr", "coverage", "coverage_expected", "std"}
    assert figures["coverage_expected"] == pytest.approx(0.9)
    assert 0 < figures["coverage"] <= 1
    assert picture.shape == (3 if channels == 3 else 1, 6, 20)
    torch.testing.assert_close(picture[0, :, :5], (truth[0] + 1) / 2)
    assert 0 <= float(picture.min()) <= float(picture.max()) <= 1
    again, _ = sampler(prior, truth)
    assert again == figures  # the same measurement and the same random numbers


def test_own_forward_model():
    prior, truth = tiny(1), torch.linspace(-0.9, 0.9, 30).reshape(1, 6, 5)
    nothing_missing = HeldOutReconstruction(lambda x: x, GaussianNoise(0.01), annealing=FEW)(prior, truth)[0]
    operator = BoxInpainting((1, 6, 5), 1, 1, 4, 3)
    box = HeldOutReconstruction(operator, GaussianNoise(0.01), annealing=FEW)(prior, truth)[0]
    assert nothing_missing["psnr"] > 35  # noise of 0.01 in a range of 2 has 46 dB
    assert box["psnr"] < nothing_missing["psnr"] - 5
    assert box["std"] > 2 * nothing_missing["std"]
    with pytest.raises(ValueError, match=r"BoxInpainting takes images \(B, 3, 6, 5\)"):
        HeldOutReconstruction(BoxInpainting((3, 6, 5), 1, 1, 4, 3))(prior, truth)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"chains": 18}, "at least 19"), ({"level": 1.0}, r"level = 1\.0"), ({"seed": -1}, "seed = -1")],
)
def test_bad_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        HeldOutReconstruction(**options)
