"""Task-dependent denoisers: closed forms, the eigenvectors of the preconditioning, and the portable folder."""

import json

import pytest
import torch
from torch import nn

from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.networks import UNet
from dpnp_shared.noise import GaussianNoise, LaplaceNoise
from dpnp_shared.operators import MRI, GaussianBlur, MatrixOperator, PhysicalUnits
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import Prior, PriorError, denoise
from dpnp_shared.task import AnalyticTaskDenoiser, Gram, Task, TaskCard, TrainedTaskDenoiser, denoise_task

SHAPE = (1, 4, 4)
MODEL = ForwardModel(GaussianBlur(SHAPE, 0.7), GaussianNoise(0.2))


def mixture(shape=(1, 2, 3), components=4):
    generator = torch.Generator().manual_seed(1)
    d = shape[0] * shape[1] * shape[2]
    means = 2 * torch.randn(components, d, generator=generator, dtype=torch.float64)
    return GaussianMixturePrior(means, torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.2, shape)


def trained(model=MODEL, shape=SHAPE, rank=None, noise_out=True) -> TrainedTaskDenoiser:
    torch.manual_seed(0)
    network = UNet(widths=[8, 8], blocks=1, attention=[1], head_channels=4, embedding=8)
    if noise_out:  # the last layer starts at zero
        nn.init.normal_(network.head[-1].weight)
    task = Task(model, shape)
    gram = Gram.of(Task(model.double(), shape, dtype=torch.float64), rank)
    card = TaskCard(
        "a task", shape, sigma_range=(0.01, 80.0),
        task={"operator": "blur", "noise": "0.2", "rank": gram.rank, "measurement": list(task.offset_entries.shape)},
    )  # fmt: skip
    edm = EDM(sigma_data=0.7, sigma_min=0.01, sigma_max=80.0)
    return TrainedTaskDenoiser(network, edm, gram, task.offset_entries, task.probe, card).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["mixture", "diagonal", "full", "singular"])
def test_the_analytic_denoiser_is_the_posterior_mean(kind):
    # of the two measurements y and x_sigma, by the closed form for one stacked measurement
    shape, sigma = (1, 2, 3), 0.8
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    root = torch.randn(6, 4 if kind == "singular" else 6, generator=generator, dtype=torch.float64)
    prior = {
        "mixture": mixture(),
        "diagonal": GaussianPrior(0.3, torch.arange(6) / 3, shape),
        "full": GaussianPrior(-0.2, root @ root.T, shape),
        "singular": GaussianPrior(-0.2, root @ root.T, shape),
    }[kind]
    model = ForwardModel(MatrixOperator(A, shape), GaussianNoise(0.3))
    stds = torch.tensor([0.3] * 3 + [sigma] * 6, dtype=torch.float64)
    both = ForwardModel(MatrixOperator(torch.cat([A, torch.eye(6).double()]), shape), GaussianNoise(stds))
    y = model.simulate(prior.sample(1, generator=generator, dtype=torch.float64), generator=generator)[0]
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    denoiser = AnalyticTaskDenoiser(prior, model)
    m = x / sigma**2 + Task(model, shape, dtype=torch.float64).back_projection(y[None])
    denoised = denoiser(m, torch.tensor([sigma, sigma, 3.0], dtype=torch.float64))
    for i in range(2):
        exact = prior.posterior(both, torch.cat([y, x[i].flatten()])).mean
        torch.testing.assert_close(denoised[i], exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoised[2:], denoiser(m[2:], 3.0))
    assert float((denoised[2] - denoised[0]).abs().max()) > 1e-3


def test_the_gram_functions_are_those_of_the_matrix():
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = Task(MODEL, SHAPE, dtype=torch.float64)
    G = task.gram(torch.eye(16, dtype=torch.float64).reshape(-1, *SHAPE)).flatten(1)
    expected = (x.flatten(1) @ torch.linalg.inv(G + 2 * torch.eye(16, dtype=torch.float64))).reshape(x.shape)
    identity, inverse = Gram.of(task, dtype=torch.float64).apply_functions(x, torch.ones_like, lambda e: 1 / (e + 2))
    torch.testing.assert_close(identity, x)
    torch.testing.assert_close(inverse, expected)
    # leading eigenvectors by Lanczos iteration; the others count as the largest of them
    part, full = Gram.of(task, 5, dtype=torch.float64), Gram.of(task, dtype=torch.float64)
    torch.testing.assert_close(part.eigenvalues, full.eigenvalues[:5], rtol=1e-8, atol=0)
    torch.testing.assert_close(part.rest, full.eigenvalues[5], rtol=1e-8, atol=0)
    V, values = part.eigenvectors, part.eigenvalues
    expected = x.flatten(1) @ (
        V @ torch.diag(values - part.rest) @ V.T + part.rest * torch.eye(16, dtype=torch.float64)
    )
    torch.testing.assert_close(part.apply_functions(x, lambda e: e)[0], expected.reshape(x.shape))
    for rank in (-1, 17):
        with pytest.raises(ValueError, match=f"rank = {rank}"):
            Gram.of(task, rank)
    with pytest.raises(ValueError, match="rank = None means all 4356"):
        Gram.of(Task(ForwardModel(GaussianBlur((1, 66, 66), 1.0), GaussianNoise(1.0)), (1, 66, 66)))


@pytest.mark.parametrize("sigma", [0.02, 1.0, 70.0])
def test_the_preconditioning_makes_white_images_white(sigma):
    """Exactly, by covariances: input and target of the network are white of unit variance, and uncorrelated with what D keeps."""
    seen = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x, noise):
            seen.append(x)
            return torch.zeros_like(x)

    task, edm = Task(MODEL, SHAPE, dtype=torch.float64), EDM(sigma_data=0.7, sigma_min=0.01, sigma_max=80.0)
    gram, identity = Gram.of(task, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
    G = task.gram(identity.reshape(-1, *SHAPE)).flatten(1)
    P = G + identity / sigma**2
    linear = denoise_task(Network(), edm, gram, identity.reshape(-1, *SHAPE), sigma).flatten(1)  # K, row by row
    C = seen[0].flatten(1)
    torch.testing.assert_close(C @ (0.49 * P @ P + P) @ C.T, identity, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(linear, torch.linalg.inv(P + identity / 0.49), rtol=1e-6, atol=1e-9)


def test_without_a_measurement_the_preconditioning_is_edm():
    network = trained().network
    edm, gram = EDM(sigma_data=0.7), Gram(SHAPE, 0)  # G = 0
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.3, 4.0])
    m = x / sigma[:, None, None, None] ** 2
    torch.testing.assert_close(denoise_task(network, edm, gram, m, sigma), denoise(network, edm, x, sigma))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    for model, rank in ((MODEL, None), (MODEL, 3), (ForwardModel(MRI(SHAPE), GaussianNoise(0.1)), None)):
        denoiser = trained(model, rank=rank)
        folder = denoiser.save_pretrained(tmp_path / "task")
        again = TrainedTaskDenoiser.from_pretrained(folder)
        m = 10 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(again(m, 0.5), denoiser(m, 0.5))
        assert again.card == denoiser.card
        again.check_task(Task(model, SHAPE))
    readme = (folder / "README.md").read_text()
    assert "one forward operator and one noise level" in readme
    assert "unconditional score network" not in readme
    assert not any(file.suffix in {".pt", ".pkl", ".ckpt"} for file in folder.iterdir())


def test_another_task_is_refused():
    denoiser = trained()
    denoiser.check_task(Task(MODEL, SHAPE))
    blur = GaussianBlur(SHAPE, 0.7)
    for other, what in (
        (ForwardModel(blur, GaussianNoise(0.201)), "differs by"),
        (ForwardModel(GaussianBlur(SHAPE, 0.71), GaussianNoise(0.2)), "differs by"),
        (ForwardModel(PhysicalUnits(blur, physical_range=(-0.9, 1.1)), GaussianNoise(0.2)), r"A\(0\) differs by"),
        (ForwardModel(MatrixOperator(torch.eye(16)[:5], SHAPE), GaussianNoise(0.2)), r"measurements \(1, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=what):
            denoiser.check_task(Task(other, SHAPE))
    # an affine operator with the same A(0) and linear part is the same task
    denoiser.check_task(Task(ForwardModel(PhysicalUnits(blur, physical_range=(-1, 1)), GaussianNoise(0.2)), SHAPE))
    with pytest.raises(TypeError, match="linear operator and GaussianNoise, got GaussianBlur and LaplaceNoise"):
        Task(ForwardModel(blur, LaplaceNoise(0.1)), SHAPE)


def test_damaged_folders_and_wrong_kinds_are_refused(tmp_path):
    folder = trained().save_pretrained(tmp_path / "task")
    with pytest.raises(PriorError, match="task-dependent denoiser, which is no prior"):
        Prior.from_pretrained(folder)
    with pytest.raises(PriorError, match="holds a prior, not a task"):
        TrainedTaskDenoiser.from_pretrained("fashion_mnist")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PriorError, match="SHA-256"):
        TrainedTaskDenoiser.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(PriorError, match="missing"):
        TrainedTaskDenoiser.from_pretrained(folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    config["card"]["task"]["rank"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PriorError, match="content_sha256"):
        TrainedTaskDenoiser.from_pretrained(folder)


def test_bad_input_is_named():
    denoiser = trained()
    with pytest.raises(ValueError, match=r"m has shape \(1, 1, 4, 5\)"):
        denoiser(torch.zeros(1, 1, 4, 5), 1.0)
    for sigma in (0.001, 100.0, float("nan")):
        with pytest.raises(ValueError, match="outside of the noise levels"):
            denoiser(torch.zeros(1, *SHAPE), sigma)
    with pytest.raises(TypeError, match="prior is a UNet"):
        AnalyticTaskDenoiser(denoiser.network, MODEL)
    broken = trained()
    broken.network.stem.bias.fill_(float("nan"))
    with pytest.raises(PriorError, match="not finite"):
        broken.save_pretrained("nowhere")
