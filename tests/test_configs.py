"""Every shipped config runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
TRAINING = sorted((ROOT / "configs" / "training").glob("*.yaml"))
INFERENCE = sorted((ROOT / "configs" / "inference").rglob("*.yaml"))
# of callbacks, which all work on the one step that is taken
FEW = {
    "SampleGrid": {"images": 4, "calls": 3},
    "SampleQuality": {"samples": 16, "calls": 3},
    "Memorisation": {"samples": 16, "calls": 3},
}


def test_there_are_configs():
    assert TRAINING
    assert INFERENCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", TRAINING, ids=lambda path: path.stem)
def test_training_config_takes_a_step(config, tmp_path, monkeypatch):
    from dpnp_training.cli import main

    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(config.read_text())
    network, callbacks = settings["model"]["network"]["init_args"], settings["trainer"]["callbacks"]
    for callback in callbacks:
        callback.setdefault("init_args", {}).update(FEW.get(callback["class_path"].rpartition(".")[2], {}))
    Path("small.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    shape = (16, 32, 32) if network["channels"] == 1 else (16, 32, 32, network["channels"])
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    small = {
        "data.source": "x.npy", "data.validation_split": "null", "data.batch_size": 2, "data.workers": 0,
        "data.size": 16, "trainer.max_steps": 1, "trainer.accelerator": "cpu", "trainer.devices": 1,
        "trainer.limit_val_batches": 1, "trainer.default_root_dir": "run",
    }  # fmt: skip
    main(
        [
            "fit",
            "--config",
            str(config),
            "--config",
            "small.yaml",
            *(f"--{key}={value}" for key, value in small.items()),
        ]
    )
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    assert Path("run/prior/model.safetensors").is_file()


@pytest.mark.parametrize("config", INFERENCE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_inference_config_draws(config, tmp_path, monkeypatch):
    from dpnp_inference import gibbs
    from dpnp_inference.cli import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(gibbs, "START_CALLS", 3)
    solver = yaml.safe_load(config.read_text()).get("solver")
    if solver:
        few = ["--chains=4", "--solver.iterations=3", "--solver.steps=8"]
        few += ["--solver.likelihood.steps=5"] * ("likelihood" in solver["init_args"])
    else:
        few = ["--chains=4", "--annealing=dpnp_inference.Annealing"]
        few += [f"--annealing.{key}={value}" for key, value in {"constant": 0, "decay": 2, "final": 0}.items()]
    if config.stem in {"population", "replica_exchange"}:  # their sweeps are many
        few += ["--dds=dpnp_inference.DDSDDIM", "--dds.calls=2"]
    if config.stem == "replica_exchange":
        few += ["--population.burn_in=1", "--draws=2"]
    main(["--config", str(config), *few, "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert (tmp_path / "out" / "picture.png").is_file()
