import pytest
import torch

from dpnp_shared.networks import DiT


def small(channels: int = 1, **kwargs) -> DiT:
    torch.manual_seed(0)
    network = DiT(channels, **{"width": 16, "depth": 2, "head_channels": 8, "embedding": 16, **kwargs})
    for parameter in network.parameters():  # wake what starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (2, 3, 16, 24), (3, 5, 7, 9), (1, 2, 1, 3)])
def test_output_has_the_input_shape(shape, positions):
    x = torch.randn(shape)
    y = small(shape[1], positions=positions, patch=4)(x, torch.randn(shape[0]))
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_images_of_a_batch_do_not_see_each_other(separation):
    separation(small())


def test_noise_level_and_attention_reach_the_output(reach):
    reach(small())


def test_patches_are_put_back_where_they_came_from():
    # without blocks to speak of, a patch of the output depends on the same patch of the input alone
    network = small(3, patch=2)
    for block in network.blocks:
        torch.nn.init.zeros_(block.condition.weight)
        torch.nn.init.zeros_(block.condition.bias)
    x = torch.randn(1, 3, 6, 10)
    moved = x.clone()
    moved[0, 1, 4, 3] += 1.0
    changed = (network(moved, torch.zeros(1)) - network(x, torch.zeros(1))).abs().sum(1)[0] > 1e-6
    expected = torch.zeros(6, 10, dtype=torch.bool)
    expected[4:6, 2:4] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_positions_matter_and_rotary_ones_are_relative(positions):
    network = small(positions=positions, patch=2)
    x, t = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    here, there = x.clone(), x.clone()
    here[..., 0:2, 0:2], here[..., 4:6, 0:2] = 1.0, -2.0
    there[..., 0:2, 0:2], there[..., 0:2, 4:6] = 1.0, -2.0  # the second patch in another place
    assert not torch.allclose(network(here, t)[..., 0:2, 0:2], network(there, t)[..., 0:2, 0:2], rtol=1e-3)
    # equal patches look the same to each other, unless positions are absolute
    twin = x + torch.randn(1, 1, 2, 2).repeat(1, 1, 4, 4)
    out = network(twin, t)
    same = torch.allclose(out[..., 0:2, 0:2], out[..., 6:8, 6:8], rtol=1e-3, atol=1e-4)
    assert same == (positions == "rotary")


def test_a_new_network_is_zero_its_blocks_the_identity_and_it_trains():
    torch.manual_seed(0)
    network = DiT(1, width=16, depth=2, head_channels=8)
    x = torch.randn(2, 1, 8, 8)
    assert float(network(x, torch.zeros(2)).detach().abs().max()) == 0.0
    tokens, condition = torch.randn(2, 5, 16), torch.randn(2, 16)
    assert torch.equal(network.blocks[0](tokens, condition, None), tokens)
    (network(x, torch.zeros(2)) - x).square().mean().backward()
    assert float(network.head.weight.grad.abs().max()) > 0


def test_dropout_only_in_training(dropout):
    dropout(small(dropout=0.5))


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_recomputation_changes_nothing_but_memory(recomputation, positions):
    recomputation(
        lambda **k: DiT(2, width=16, depth=6, head_channels=8, embedding=8, dropout=0.3, positions=positions, **k),
        torch.randn(2, 2, 12, 8),
    )


def test_augmentation_vector(augmentation):
    augmentation(lambda **k: DiT(1, width=16, depth=1, head_channels=8, embedding=8, **k))


def test_channels_last_and_compilation(layouts):
    layouts(small(2, positions="rotary"), torch.randn(2, 2, 12, 16))


def test_hyperparameters_rebuild_the_network():
    network = small(dropout=0.1, positions="rotary", augmentation=3)
    twin = DiT(**network.hyperparameters)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert twin.hyperparameters == network.hyperparameters


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"channels": 0}, "channels"),
        ({"depth": 0}, "depth"),
        ({"patch": 0}, "patch"),
        ({"width": 30}, "width"),
        ({"head_channels": 60}, "head_channels"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"embedding": 3}, "embedding"),
        ({"dropout": 1.0}, "dropout"),
        ({"positions": "learned"}, "'learned'"),
        ({"augmentation": -1}, "augmentation"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        DiT(**arguments)


def test_wrong_channels_are_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\)"):
        small()(torch.zeros(1, 3, 8, 8), torch.zeros(1))
