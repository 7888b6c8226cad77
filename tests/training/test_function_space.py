"""Training under noise that is a random field: its law, a run from the command line to the exported prior."""

import numpy as np
import pytest
import torch
import yaml

from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.prior import Prior
from dpnp_shared.solvers import sample_unconditional
from dpnp_training import function_space
from dpnp_training.cli import main
from dpnp_training.share import Share

FIELD = {"std": 1.0, "length": 0.3, "smoothness": 2.0, "basis": "neumann"}


def test_noise_is_the_field():
    field = GaussianField(**FIELD)
    x = torch.zeros(4000, 1, 8, 8, dtype=torch.float64)
    w = Share(4000, 4000, field=field).normal_like(x, torch.Generator().manual_seed(0)).flatten(1)
    expected = field.covariance(torch.eye(64, dtype=torch.float64).reshape(64, 1, 8, 8)).reshape(64, 64)
    assert float((w.T @ w / 4000 - expected).abs().max()) < 5 * float(expected.max()) / 4000**0.5
    white = Share(4000, 4000).normal_like(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(field.colour(white).flatten(1), w)


@pytest.mark.filterwarnings("ignore")
def test_from_fields_to_an_exported_prior(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function_space.main(["--output=fields.npy", "--functions=256", "--grid=8", "--length=0.3", "--smoothness=4"])
    fields = np.load("fields.npy")
    assert fields.shape == (256, 8, 8)
    assert fields.std() == pytest.approx(1, abs=0.1)
    config = {
        "trainer": {
            "max_steps": 60, "accelerator": "cpu", "devices": 1, "default_root_dir": "run", "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "dpnp_training.callbacks.Checkpoints"}, {"class_path": "dpnp_training.callbacks.ExportPrior"}],
        },
        "model": {
            "network": {
                "class_path": "dpnp_shared.networks.FNO",
                "init_args": {"width": 8, "modes": 4, "layers": 2, "embedding": 8},
            },
            "preconditioning": {
                "class_path": "dpnp_shared.preconditioning.FieldEDM",
                "init_args": {
                    "field": {"class_path": "dpnp_shared.gaussian_field.GaussianField", "init_args": FIELD},
                    "sigma_data": 1.0, "sigma_min": 0.1, "sigma_max": 10.0,
                },
            },
            "loss": {
                "class_path": "dpnp_training.losses.DenoisingScoreMatching",
                "init_args": {
                    "sigma_data": 1.0,
                    "noise": {"class_path": "dpnp_training.losses.LogUniform", "init_args": {"low": 0.1, "high": 10.0}},
                },
            },
            "ema": {"beta": 0.9}, "learning_rate": 0.01, "warmup_steps": 5, "noise_bands": [0.3, 1.0, 3.0],
        },
        "data": {"source": "fields.npy", "value_range": [-1, 1], "batch_size": 32},
    }  # fmt: skip
    with open("config.yaml", "w") as file:
        yaml.safe_dump(config, file)
    main(["fit", "--config", "config.yaml"])
    prior = Prior.from_pretrained("run/prior")
    field = prior.noise_field
    assert field is not None
    assert field.hyperparameters == FIELD
    assert "length=0.3" in prior.card.notes
    # it has learned something: better than the best scalar at any grid, which a new network would be
    x_0 = GaussianField(1.0, 0.3, 4.0).sample(200, (16, 16), generator=torch.Generator().manual_seed(1))
    x = x_0 + 1.0 * field.sample(200, (16, 16), generator=torch.Generator().manual_seed(2))
    learned, scalar = ((d - x_0).square().mean() for d in (prior(x, 1.0), 0.5 * x))
    assert float(learned) < 0.99 * float(scalar)
    draws = sample_unconditional(prior, 50, generator=torch.Generator().manual_seed(0), steps=10)
    assert 0.3 < float(draws.std()) < 3


def test_bad_output_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a \.npy file"):
        function_space.write_fields(str(tmp_path / "fields.txt"))
    with pytest.raises(ValueError, match="functions = 1"):
        function_space.write_fields(str(tmp_path / "fields.npy"), functions=1)
