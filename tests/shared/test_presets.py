import functools

import pytest
import torch

from dpnp_shared.networks import DiT, UNet
from dpnp_shared.networks.presets import PRESETS, measure, preset, presets


class Flat(torch.nn.Module):
    """A network whose cost can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Conv2d(5, 3, 1)

    def forward(self, x, noise):
        return self.second(self.first(x).relu())


def test_the_cost_of_a_small_network_by_hand():
    cost = measure(Flat, (3, 7, 9))
    assert cost.parameters == 5 * 3 * 9 + 5 + 5 * 3 + 3
    assert cost.flops == 2 * 63 * (5 * 3 * 9 + 5 * 3)
    assert cost.activations == 4 * 63 * (3 + 5)  # the input and the rectified features
    assert cost.recomputed == cost.activations


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(UNet, 2, (8, 12), 2, (), embedding=8, resample="residual"),
        functools.partial(DiT, 2, width=16, depth=2, head_channels=16, embedding=8),
    ],
    ids=["unet", "dit"],
)
def test_counted_memory_is_what_a_real_call_stores(make):
    network, cost = make(), measure(make, (2, 12, 8))
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(1, 2, 12, 8), torch.zeros(1))
    assert cost.activations == pytest.approx(sum(sizes.values()), rel=0.02)  # attention keeps a few numbers a pixel
    assert cost.recomputed < 0.7 * cost.activations


def test_attention_is_counted_without_its_matrix():
    make = functools.partial(DiT, 1, width=8, depth=1, head_channels=8, patch=1)
    small, large = (measure(make, (1, n, 10)).activations for n in (10, 100))
    assert large < 10.1 * small
    flops = [measure(make, (1, n, 10)).flops for n in (10, 100)]
    assert flops[1] > 20 * flops[0]  # but computed it is


@pytest.mark.parametrize("name", PRESETS)
def test_names_tell_the_number_of_parameters(name):
    with torch.device("meta"):
        network = preset(name, 3)
    assert isinstance(network, {"unet": UNet, "dit": DiT}[name.split("-")[0]])
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    assert millions == pytest.approx(float(name.split("-")[1].removesuffix("m")), rel=0.08)


def test_a_preset_passes_its_options_on():
    network = preset("unet-0.3m", 2, dropout=0.1, augmentation=3, checkpoint_activations=True)
    assert network.hyperparameters.items() >= {"channels": 2, "dropout": 0.1, "augmentation": 3}.items()
    assert network.checkpoint_activations
    assert network(torch.zeros(1, 2, 9, 8), torch.zeros(1), torch.zeros(1, 3)).shape == (1, 2, 9, 8)
    with pytest.raises(ValueError, match=r"'unet-1g'.*unet-0\.3m"):
        preset("unet-1g")


def test_the_table(capsys):
    presets((1, 28, 28), ["unet-1m", "dit-0.3m"])
    lines = capsys.readouterr().out.splitlines()
    assert "1 x 28 x 28" in lines[0]
    assert lines[2].startswith("| unet-1m | 0.96 M | 0.246 | 18.4 MiB | ")
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 4
    with pytest.raises(ValueError, match=r"image_shape = \(1, 0, 28\)"):
        presets((1, 0, 28))
