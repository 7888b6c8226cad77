"""Every shipped config runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
TRAINING = sorted((ROOT / "configs" / "training").glob("*.yaml"))
INFERENCE = sorted((ROOT / "configs" / "inference").glob("*.yaml"))


def test_there_are_configs():
    assert TRAINING
    assert INFERENCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", TRAINING, ids=lambda path: path.stem)
def test_training_config_takes_a_step(config, tmp_path, monkeypatch):
    from dpnp_training.cli import main

    monkeypatch.chdir(tmp_path)
    network = yaml.safe_load(config.read_text())["model"]["network"]["init_args"]
    shape = (16, 32, 32) if network["channels"] == 1 else (16, 32, 32, network["channels"])
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    small = {
        "data.source": "x.npy", "data.validation_split": "null", "data.batch_size": 2, "data.workers": 0,
        "data.size": 16, "trainer.max_steps": 1, "trainer.accelerator": "cpu", "trainer.devices": 1,
        "trainer.limit_val_batches": 1, "trainer.default_root_dir": "run",
    }  # fmt: skip
    main(["fit", "--config", str(config), *(f"--{key}={value}" for key, value in small.items())])
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    assert Path("run/prior/model.safetensors").is_file()


@pytest.mark.parametrize("config", INFERENCE, ids=lambda path: path.stem)
def test_inference_config_draws(config, tmp_path, monkeypatch):
    from dpnp_inference.cli import main

    monkeypatch.chdir(ROOT)
    few = [
        "--annealing",
        "dpnp_inference.Annealing",
        "--annealing.constant=0",
        "--annealing.decay=2",
        "--annealing.final=0",
    ]
    main(["--config", str(config), *few, "--chains", "4", "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert (tmp_path / "out" / "picture.png").is_file()
