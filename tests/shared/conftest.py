"""What every network of ours must hold."""

import pytest
import torch


def stored(run, output) -> int:
    """Bytes kept for the backward pass of ``run``, parameters included; its result is appended to ``output``."""
    sizes: dict[int, int] = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output.append(run())
    return sum(sizes.values())


@pytest.fixture
def separation():
    """Images of a batch do not see each other."""

    def check(network):
        x, t = torch.randn(4, 1, 10, 10), torch.randn(4)
        torch.testing.assert_close(network(x, t)[2:3], network(x[2:3], t[2:3]), rtol=1e-4, atol=1e-5)

    return check


@pytest.fixture
def reach():
    """The noise level reaches the output, and each pixel all others."""

    def check(network):
        x = torch.randn(1, 1, 16, 16)
        assert not torch.allclose(network(x, torch.tensor([0.0])), network(x, torch.tensor([1.0])))
        moved = x.clone()
        moved[0, 0, 0, 0] += 10.0
        difference = (network(moved, torch.zeros(1)) - network(x, torch.zeros(1))).abs()
        assert float(difference[0, 0, -1, -1]) > 1e-6

    return check


@pytest.fixture
def dropout():
    """It is at work in training, and only there."""

    def check(network):
        x, t = torch.randn(1, 1, 8, 8), torch.zeros(1)
        assert torch.equal(network(x, t), network(x, t))
        network.train()
        assert not torch.equal(network(x, t), network(x, t))

    return check


@pytest.fixture
def recomputation():
    """Outputs and gradients with and without recomputation, dropout included, and that memory is saved."""

    def check(make, x):
        results, memory = [], []
        for again in (False, True):
            torch.manual_seed(0)
            network = make(checkpoint_activations=again)
            assert "checkpoint_activations" not in network.hyperparameters
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
            image = x.clone().requires_grad_()
            torch.manual_seed(1)  # of dropout
            output = []
            memory.append(stored(lambda network=network, image=image: network(image, torch.zeros(len(x))), output))
            output[0].square().sum().backward()
            results.append([output[0].detach(), image.grad, *(p.grad for p in network.parameters())])
        for plain, recomputed in zip(*results, strict=True):
            assert torch.equal(plain, recomputed)
        assert memory[1] < 0.5 * memory[0]

    return check


@pytest.fixture
def augmentation():
    """The vector reaches the output, zero is none, and a wrong one is refused."""

    def check(make):
        torch.manual_seed(0)
        network = make(augmentation=3)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        x, t = torch.randn(2, 1, 8, 8), torch.zeros(2)
        assert torch.equal(network(x, t), network(x, t, torch.zeros(2, 3)))
        changed = network(x, t, torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]))
        torch.testing.assert_close(changed[0], network(x, t)[0])
        assert not torch.allclose(changed[1], network(x, t)[1])
        with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
            network(x, t, torch.zeros(2, 4))
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 0\)"):
            make()(x, t, torch.zeros(2, 3))

    return check


@pytest.fixture
def layouts():
    """Channels-last memory, half precision and a compiled graph without breaks give the same output."""

    def check(network, x):
        t = torch.linspace(-1, 1, len(x))
        expected = network(x, t)
        turned = network.to(memory_format=torch.channels_last)
        torch.testing.assert_close(turned(x.to(memory_format=torch.channels_last), t), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(turned, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, t), expected, rtol=1e-4, atol=1e-5)
        half = turned.bfloat16()(x.bfloat16(), t)
        assert half.dtype == torch.bfloat16
        assert float((half.float() - expected).std() / expected.std()) < 0.05

    return check
