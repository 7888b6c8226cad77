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
        "data.size": 28 if "task" in settings["model"] else 16, "trainer.max_steps": 1, "trainer.accelerator": "cpu", "trainer.devices": 1,
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
    settings = yaml.safe_load(config.read_text())
    solver = settings.get("solver")
    if solver and config.parent.name == "function_space":
        few = ["--chains=4", "--draws=2", "--thin=2", "--solver.burn_in=4"]
    elif solver:
        few = ["--chains=4", "--solver.steps=8"]
        few += ["--solver.iterations=3"] * ("iterations" in solver["init_args"])
        few += ["--solver.likelihood.steps=5"] * ("likelihood" in solver["init_args"])
        if "denoiser" in solver["init_args"]:
            few += [f"--solver.denoiser={untrained_denoiser(config, tmp_path / 'denoiser')}"]
    else:
        dds = {"ddim": "DDSDDIM", "ddpm": "DDSDDPM"}[settings.get("dds", "ddim")]
        few = ["--chains=4", "--annealing=dpnp_inference.Annealing", f"--dds=dpnp_inference.{dds}", "--dds.calls=2"]
        few += [f"--annealing.{key}={value}" for key, value in {"constant": 0, "decay": 2, "final": 0}.items()]
    if config.stem == "replica_exchange":
        few += ["--population.burn_in=1", "--draws=2"]
    main(["--config", str(config), *few, "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert (tmp_path / "out" / "picture.png").is_file()


def untrained_denoiser(config, folder):
    """A task-dependent denoiser of a config's forward model, its network as it starts."""
    from jsonargparse import ArgumentParser

    from dpnp_shared.forward_model import ForwardModel
    from dpnp_shared.networks import UNet
    from dpnp_shared.noise import Noise
    from dpnp_shared.operators import Operator
    from dpnp_shared.preconditioning import EDM
    from dpnp_shared.task import Gram, Task, TaskCard, TrainedTaskDenoiser

    parser = ArgumentParser()
    parser.add_argument("--operator", type=Operator)
    parser.add_argument("--noise", type=Noise)
    settings = yaml.safe_load(config.read_text())
    built = parser.instantiate(parser.parse_object({key: settings[key] for key in ("operator", "noise")}))
    task = Task(ForwardModel(built.operator, built.noise), built.operator.image_shape, dtype=torch.float64)
    network, edm = UNet(widths=[8], blocks=1, attention=[], embedding=8), EDM(0.7, 0.005, 90.0)
    words = {"rank": 784, "measurement": list(task.offset_entries.shape)}
    card = TaskCard("untrained", task.image_shape, sigma_range=(0.005, 90.0), spread=8.8, task=words)
    parts = Gram.of(task), task.offset_entries.float(), task.probe.float()
    return TrainedTaskDenoiser(network, edm, *parts, card).save_pretrained(folder)


@pytest.mark.parametrize("name", ["ct", "deblur"])
def test_a_task_is_trained_for_what_it_is_used_for(name):
    trained = yaml.safe_load((ROOT / "configs" / "training" / f"ucos_{name}.yaml").read_text())
    used = yaml.safe_load((ROOT / "configs" / "inference" / "ucos" / f"{name}.yaml").read_text())
    assert trained["model"]["task"] == {key: used[key] for key in ("operator", "noise")}
    assert used["solver"]["init_args"]["denoiser"] == f"{trained['trainer']['default_root_dir']}/prior"
