import pytest
import torch

from dpnp_shared import Prior
from dpnp_shared.networks import UNet


def small(channels: int = 1, **kwargs) -> UNet:
    torch.manual_seed(0)
    network = UNet(channels, widths=(8, 12), blocks=1, attention=(1,), head_channels=4, embedding=16, **kwargs)
    for parameter in network.parameters():  # wake the branches that start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval().requires_grad_(False)


DDPMPP = {"resample": "residual", "scale_residual": True}


@pytest.mark.parametrize("options", [{}, DDPMPP], ids=["ddpm", "ddpm++"])
@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (2, 3, 16, 24), (3, 5, 7, 9), (1, 2, 1, 3)])
def test_output_has_the_input_shape(shape, options):
    x = torch.randn(shape)
    y = small(shape[1], **options)(x, torch.randn(shape[0]))
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_images_of_a_batch_do_not_see_each_other(separation):
    separation(small())


def test_noise_level_and_attention_reach_the_output(reach):
    reach(small())


def test_a_new_network_is_zero_and_trains():
    torch.manual_seed(0)
    network = UNet(1, widths=(8, 8), blocks=1, attention=(), embedding=8)
    x = torch.randn(2, 1, 8, 8)
    assert float(network(x, torch.zeros(2)).detach().abs().max()) == 0.0
    loss = (network(x, torch.zeros(2)) - x).square().mean()
    loss.backward()
    assert float(network.head[2].weight.grad.abs().max()) > 0


def test_dropout_only_in_training(dropout):
    dropout(small(dropout=0.5))


def test_scaled_residuals_keep_the_variance():
    networks = [small(scale_residual=scaled) for scaled in (False, True)]
    x, embedding = torch.randn(1, 8, 8, 8), torch.randn(1, 16)
    plain, scaled = (network.down[0](x, embedding) for network in networks)
    torch.testing.assert_close(scaled, plain / 2**0.5)
    plain, scaled = (network.middle[0].attention(torch.cat([x, x[:, :4]], 1)) for network in networks)
    torch.testing.assert_close(scaled, plain / 2**0.5)


def test_residual_resampling_sees_every_pixel():
    network = UNet(1, widths=(8, 8, 8), blocks=1, attention=(), embedding=8, **DDPMPP)
    assert not any(isinstance(m, torch.nn.Conv2d) and m.stride != (1, 1) for m in network.modules())
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.zeros(1, 1, 12, 12, requires_grad=True)
    network(x, torch.zeros(1))[0, 0, 6, 6].backward()
    assert float(x.grad.abs().min()) > 0


def test_recomputation_changes_nothing_but_memory(recomputation):
    recomputation(
        lambda **k: UNet(2, (8, 12), 2, (1,), head_channels=4, embedding=8, dropout=0.3, **k), torch.randn(2, 2, 12, 8)
    )


def test_augmentation_vector(augmentation):
    augmentation(lambda **k: UNet(1, (8, 8), 1, (), embedding=8, **k))


def test_channels_last_and_compilation(layouts):
    layouts(small(2), torch.randn(2, 2, 12, 16))


def test_the_bundled_prior_loads_and_denoises():
    prior = Prior.from_pretrained("fashion_mnist")
    arguments = {"resample": "conv", "scale_residual": False, "augmentation": 0}
    assert arguments.items() <= prior.network.hyperparameters.items()
    clean = prior(0.1 * torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0)) - 1, 0.1)
    assert float((clean + 1).square().mean()) < 0.03**2  # a flat image is easy


def test_hyperparameters_rebuild_the_network():
    network = small(dropout=0.1, augmentation=3, **DDPMPP)
    twin = UNet(**network.hyperparameters)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"channels": 0}, "channels"),
        ({"widths": []}, "widths"),
        ({"blocks": [1, 2]}, "blocks"),
        ({"attention": [3]}, "attention"),
        ({"head_channels": 7}, "head_channels"),
        ({"embedding": 3}, "embedding"),
        ({"dropout": 1.0}, "dropout"),
        ({"resample": "fir"}, "'fir'"),
        ({"augmentation": -1}, "augmentation"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        UNet(**arguments)


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        small()(torch.zeros(1, 3, 8, 8), torch.zeros(1))
