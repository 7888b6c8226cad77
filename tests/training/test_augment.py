from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from dpnp_shared.networks import UNet
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import denoise
from dpnp_training.augment import AUGMENTATION_LENGTH, Augmentation, informed
from dpnp_training.losses import DenoisingScoreMatching

NONE = {
    "horizontal_flip": False,
    "vertical_flip": False,
    "quarter_turns": False,
    "translation": 0.0,
    "scaling": 0.0,
    "anisotropy": 0.0,
}


def smooth(n: int, height: int = 12, width: int = 12, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, height + 4, width + 4, generator=generator)
    return torch.nn.functional.avg_pool2d(x, 5, stride=1).clamp(-1, 1)


def augment(x: torch.Tensor, seed: int = 0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    augmentation = Augmentation(**{"probability": 1.0, **NONE, **options})
    return augmentation(x, generator=torch.Generator().manual_seed(seed))


def test_nothing_is_nothing():
    x = smooth(16)
    for options in ({}, {"probability": 0.0, "quarter_turns": True, "scaling": 1.0, "horizontal_flip": True}):
        y, vector = augment(x, **options)
        assert torch.equal(x, y)
        assert torch.equal(vector, torch.zeros(16, AUGMENTATION_LENGTH))


def test_flips_of_any_shape():
    x = smooth(40, 6, 9, 1)
    y, vector = augment(x, horizontal_flip=True, vertical_flip=True)
    assert len({tuple(row) for row in vector[:, :2].tolist()}) == 4
    for image, changed, (left_right, up_down) in zip(x, y, vector[:, :2].tolist(), strict=True):
        expected = image.flip([d for d, on in ((-1, left_right), (-2, up_down)) if on])
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
    assert torch.equal(vector[:, 2:], torch.zeros(40, 6))


def test_quarter_turns():
    x = smooth(40)
    y, vector = augment(x, quarter_turns=True)
    turns = {(0.0, 0.0): 0, (-1.0, 1.0): 3, (-2.0, 0.0): 2, (-1.0, -1.0): 1}  # (cos - 1, sin) → turns of rot90
    assert len({tuple(row) for row in vector[:, 2:4].tolist()}) == 4
    for image, changed, row in zip(x, y, vector[:, 2:4].tolist(), strict=True):
        torch.testing.assert_close(changed, image.rot90(turns[tuple(row)], (-2, -1)), rtol=0, atol=1e-5)


def test_translations_by_whole_pixels_into_the_mirrored_surroundings():
    x = smooth(20, 10, 16)
    y, vector = augment(x, translation=0.2)
    shifts = (vector[:, 4:6] * torch.tensor([16.0, 10.0])).round().long().tolist()
    assert len(set(map(tuple, shifts))) > 10
    mirrored = torch.cat([x.flip(-1), x, x.flip(-1)], -1)
    mirrored = torch.cat([mirrored.flip(-2), mirrored, mirrored.flip(-2)], -2)
    for image, changed, (right, down) in zip(mirrored, y, shifts, strict=True):
        expected = image[:, 10 - down : 20 - down, 16 - right : 32 - right]
        torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)


def test_scalings_magnify_about_the_centre():
    row = torch.linspace(-1, 1, 33)
    ramp = torch.stack([row.expand(33, 33), row[:, None].expand(33, 33)])  # x and y as images
    y, vector = augment(ramp.repeat(30, 1, 1, 1), scaling=0.2, anisotropy=0.2)
    assert float(vector[:, 6].std()) == pytest.approx(0.2, rel=0.4)
    assert float(vector[:, 7].std()) == pytest.approx(0.2, rel=0.4)
    middle = slice(12, 21)
    for changed, (scale, anisotropy) in zip(y, vector[:, 6:8].tolist(), strict=True):
        expected = (
            ramp[:, middle, middle]
            / torch.tensor([2 ** (scale + anisotropy), 2 ** (scale - anisotropy)])[:, None, None]
        )
        torch.testing.assert_close(changed[:, middle, middle], expected, rtol=0, atol=4e-3)  # a 16th of a pixel


def test_values_stay_in_range_and_changes_are_told():
    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0)).sign()
    augmentation = Augmentation(probability=0.12)
    y, vector = augmentation(x, generator=torch.Generator().manual_seed(1))
    assert float(y.abs().max()) <= 1.0
    assert vector.shape == (200, AUGMENTATION_LENGTH)
    changed = (y != x).flatten(1).any(1)
    told = (vector != 0).any(1)
    assert torch.equal(changed, told)
    assert 0.2 < float(changed.float().mean()) < 0.6
    again = augmentation(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], vector)


class Told(torch.nn.Module):
    """Knows the augmentation only by what it is told, and says which it was."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))
        self.heard = []

    def forward(self, x, noise, augmentation=None):
        self.heard.append(augmentation)
        return self.gain * x


def test_the_loss_tells_the_network_in_training_only():
    network, x = Told(), smooth(8)
    loss = DenoisingScoreMatching(augmentation=Augmentation(probability=1.0))

    def conditioned(x, sigma, augmentation=None):
        return denoise(informed(network, augmentation), EDM(), x, sigma)

    loss(conditioned, x, generator=torch.Generator().manual_seed(0)).backward()
    _, vector = loss.augmentation(x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network.heard.pop(), vector)
    assert float(network.gain.grad.abs()) > 0
    loss.eval()
    loss(conditioned, x, generator=torch.Generator().manual_seed(0))
    assert network.heard.pop() is None


def test_the_recipe_fits_its_network():
    recipe = Path(__file__).parents[2] / "configs" / "training" / "recipes" / "augmentation.yaml"
    parser = ArgumentParser()
    parser.add_argument("--network", type=torch.nn.Module)
    parser.add_argument("--loss", type=DenoisingScoreMatching)
    described = yaml.safe_load(recipe.read_text())["model"]
    described["network"]["init_args"] |= {"channels": 3, "widths": [8], "blocks": 1, "attention": [], "embedding": 8}
    built = parser.instantiate(parser.parse_object(described))
    assert isinstance(built.network, UNet)
    assert isinstance(built.loss, DenoisingScoreMatching)
    value = built.loss(
        lambda x, sigma, augmentation: denoise(informed(built.network, augmentation), EDM(), x, sigma),
        smooth(4),
        generator=torch.Generator().manual_seed(0),
    )
    value.backward()
    assert built.network.augment.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"probability": 1.5}, "probability = 1.5"),
        ({"translation": -0.1}, "translation"),
        ({"scaling": float("inf")}, "scaling"),
        ({"anisotropy": -1.0}, "anisotropy"),
    ],
)
def test_bad_arguments_are_named(options, word):
    with pytest.raises(ValueError, match=word):
        Augmentation(**options)
    with pytest.raises(ValueError, match="6 x 9"):
        augment(smooth(1, 6, 9), quarter_turns=True)
