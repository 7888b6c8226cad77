"""Training for a measurement task: what the network sees, what minimises the loss, and the way from the command line to draws."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dpnp_inference.baselines import UCoS
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.networks import UNet
from dpnp_shared.noise import GaussianNoise, LaplaceNoise
from dpnp_shared.operators import MRI, GaussianBlur, MatrixOperator
from dpnp_shared.preconditioning import EDM, VPEpsilon
from dpnp_shared.prior import PriorError
from dpnp_shared.task import AnalyticTaskDenoiser, Task, TrainedTaskDenoiser
from dpnp_training import ScoreMatching
from dpnp_training.augment import Augmentation
from dpnp_training.cli import main
from dpnp_training.export import prior_from_checkpoint, task_from_checkpoint
from dpnp_training.losses import DenoisingScoreMatching, LogUniform, squared_error
from dpnp_training.share import Share
from dpnp_training.ucos import MeasurementTask, TaskObjective

SHAPE = (1, 2, 3)
MATRIX = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MEANS = 2 * torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PRIOR = GaussianMixturePrior(MEANS, torch.tensor([0.1, 0.2, 0.3, 0.4]), 0.2, SHAPE)
CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu", "devices": 1, "max_epochs": 4, "log_every_n_steps": 1, "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "dpnp_training.callbacks.Checkpoints", "init_args": {"every_n_train_steps": 100}},
            {"class_path": "dpnp_training.callbacks.ExportPrior", "init_args": {"name": "a task"}},
        ],
    },
    "model": {
        "task": {
            "operator": {"class_path": "dpnp_shared.operators.GaussianBlur", "init_args": {"image_shape": [1, 8, 8], "sigma": 0.7}},
            "noise": {"class_path": "dpnp_shared.noise.GaussianNoise", "init_args": {"sigma": 0.1}},
        },
        "network": {
            "class_path": "dpnp_shared.networks.UNet",
            "init_args": {"widths": [8, 8], "blocks": 1, "attention": [1], "head_channels": 4, "embedding": 8},
        },
        "learning_rate": 1e-2, "warmup_steps": 2, "decay": "constant", "ema": {"beta": 0.9},
    },
    "data": {"source": "x.npy", "batch_size": 8, "name": "test images"},
}  # fmt: skip


def objective(operator=None, noise=None, preconditioning=None, rank=None):
    task = MeasurementTask(operator or MatrixOperator(MATRIX, SHAPE), noise or GaussianNoise(0.3), rank)
    return TaskObjective(task, preconditioning or EDM())


@pytest.mark.parametrize("operator", [MatrixOperator(MATRIX, SHAPE), MRI((1, 2, 4))])
def test_what_the_network_sees_has_the_right_law(operator):
    """Of A^T Γ^-1 y given x_0: mean G x_0 and covariance G, within four standard errors of 20,000 draws."""
    learned, n = objective(operator), 20000
    shape = operator.image_shape
    d = math.prod(shape)
    x_0 = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).expand(n, *shape)
    back = learned.measure(x_0, generator=torch.Generator().manual_seed(1), share=Share.all(n)).flatten(1).double()
    G = learned.task.gram(torch.eye(d).reshape(-1, *shape)).flatten(1).double()
    std = G.diag().sqrt()
    mean = x_0[0].flatten().double() @ G
    assert ((back.mean(0) - mean).abs() <= 4 * std / math.sqrt(n) + 1e-4).all()
    spread = (G**2 + torch.outer(G.diag(), G.diag())).sqrt()
    assert ((torch.cov(back.T) - G).abs() <= 4 * spread / math.sqrt(n) + 1e-3).all()


def test_the_exact_denoiser_minimises_the_loss():
    """Any change of it costs more than three standard errors, on 40,000 common draws."""
    learned, n = objective(), 40000
    x_0 = PRIOR.sample(n, generator=torch.Generator().manual_seed(0))
    back = learned.measure(x_0, generator=torch.Generator().manual_seed(1), share=Share.all(n))
    sigma = LogUniform(0.05, 20.0).sample(n, generator=torch.Generator().manual_seed(2))
    levels = torch.logspace(math.log10(0.05), math.log10(20.0), 9)  # the closed form costs a factorisation a level
    sigma = levels[(sigma[:, None].log() - levels.log()).abs().argmin(1)]
    w = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))

    def error(denoiser, change=lambda x: x):
        def denoise(x, sigma):
            return change(denoiser(x / sigma[:, None, None, None] ** 2 + back, sigma))

        return squared_error(denoise, x_0, sigma, w) / sigma.clamp(max=0.3)

    def of(std, prior=PRIOR):
        return AnalyticTaskDenoiser(prior, ForwardModel(MatrixOperator(MATRIX, SHAPE), GaussianNoise(std)))

    best = error(of(0.3))
    others = {
        "larger": error(of(0.3), lambda x: 1.05 * x),
        "smaller": error(of(0.3), lambda x: 0.95 * x),
        "shifted": error(of(0.3), lambda x: x + 0.05),
        "noise taken for less": error(of(0.2)),
        "variance in place of the standard deviation": error(of(0.3**0.5)),
        "one component": error(of(0.3, GaussianPrior(0.0, 1.0, SHAPE))),
    }
    for name, other in others.items():
        difference = other - best
        assert float(difference.mean()) > 3 * float(difference.std()) / math.sqrt(n), name


def test_shares_of_a_batch_are_measured_as_the_whole():
    learned, x_0 = objective(), torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    whole = learned.measure(x_0, generator=torch.Generator().manual_seed(1), share=Share.all(4))
    part = learned.measure(x_0[1::2], generator=torch.Generator().manual_seed(1), share=Share(2, 4, 1, 2))
    torch.testing.assert_close(part, whole[1::2])


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(TypeError, match="preconditioning is VPEpsilon"):
        objective(preconditioning=VPEpsilon())
    with pytest.raises(TypeError, match="GaussianNoise, got MatrixOperator and LaplaceNoise"):
        objective(noise=LaplaceNoise(0.1))
    with pytest.raises(ValueError, match="rank = 7"):
        objective(rank=7)
    task = MeasurementTask(MatrixOperator(MATRIX, SHAPE), GaussianNoise(0.3))
    network = UNet(widths=[8, 8], blocks=1, attention=[1], head_channels=4, embedding=8, augmentation=6)
    with pytest.raises(ValueError, match=r"loss\.augmentation"):
        ScoreMatching(network, task=task, loss=DenoisingScoreMatching(augmentation=Augmentation()))
    with pytest.raises(TypeError, match="without a measurement"):
        ScoreMatching(network, task=task).denoise_ema(torch.zeros(1, *SHAPE), 1.0)


@pytest.fixture
def _data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.linspace(0, 255, 64 * 64).reshape(64, 8, 8)
    np.save("x.npy", np.random.default_rng(0).permutation(x).astype(np.uint8))
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))


def fit(root: str, *options: str) -> dict:
    main(["fit", "--config", "config.yaml", f"--trainer.default_root_dir={root}", *options])
    return torch.load(f"{root}/checkpoints/last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.usefixtures("_data")
@pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge
def test_from_the_command_line_to_draws(capsys):
    straight = fit("straight", "--trainer.max_epochs=8")
    fit("run", "--trainer.max_epochs=3")
    checkpoint = fit("run", "--trainer.max_epochs=8")
    # an interruption changes nothing
    assert checkpoint["global_step"] == straight["global_step"] == 56
    for key, value in straight["state_dict"].items():
        if key.startswith(("network.", "ema.")):
            assert torch.equal(checkpoint["state_dict"][key], value), key
    assert "prior written to run/prior" in capsys.readouterr().out
    denoiser = TrainedTaskDenoiser.from_pretrained("run/prior")
    assert denoiser.card.name == "a task"
    assert denoiser.card.task["rank"] == 64
    assert "GaussianBlur" in denoiser.card.task["operator"]
    assert denoiser.card.metrics["val/loss"] > 0
    again = task_from_checkpoint("run/checkpoints/last.ckpt")
    m = 10 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(m, 1.0), denoiser(m, 1.0))
    with pytest.raises(PriorError, match="task_from_checkpoint"):
        prior_from_checkpoint("run/checkpoints/last.ckpt")

    model = ForwardModel(GaussianBlur((1, 8, 8), 0.7), GaussianNoise(0.1))
    truth = torch.from_numpy(np.load("x.npy")[:1, None] / 127.5 - 1).float()
    y = model.simulate(truth, generator=torch.Generator().manual_seed(0))[0]
    prior = GaussianPrior(0.0, 1.0, (1, 8, 8))
    posterior = UCoS(prior, model, denoiser="run/prior", steps=10).sample(y, chains=4, seed=0)
    assert float((posterior.mean - truth[0]).abs().mean()) < 0.3
    # it was trained for this task: better than the untrained network, which knows white images only
    learned, raw = denoiser, TrainedTaskDenoiser.from_pretrained("run/prior")
    torch.nn.init.zeros_(raw.network.head[-1].weight)
    torch.nn.init.zeros_(raw.network.head[-1].bias)
    x_0 = torch.from_numpy(np.load("x.npy")[:, None] / 127.5 - 1).float()
    back = Task(model, (1, 8, 8)).back_projection(model.simulate(x_0, generator=torch.Generator().manual_seed(1)))
    noisy = (x_0 + torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2))) + back
    errors = [float((d(noisy, 1.0) - x_0).square().mean()) for d in (learned, raw)]
    assert errors[0] < 0.8 * errors[1]

    with pytest.raises(ValueError, match=r"model\.task\.operator takes images \(1, 8, 8\)"):
        fit("other", "--data.size=4")
    with pytest.raises(SystemExit):
        fit("run", "--trainer.max_epochs=8", "--model.task.noise.init_args.sigma=0.2")
