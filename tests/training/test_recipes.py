"""Every recipe runs over a config of one's own, and what it trains is a prior."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dpnp_shared.prior import Prior
from dpnp_training.cli import main

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "training" / "recipes").glob("*.yaml"))
BASE = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "limit_val_batches": 1,
        "logger": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "default_root_dir": "run",
        "callbacks": [{"class_path": "dpnp_training.callbacks.ExportPrior"}],
    },
    "model": {
        "network": {
            "class_path": "dpnp_shared.networks.UNet",
            "init_args": {"widths": [8], "blocks": 1, "attention": [], "embedding": 8},
        },
        # a recipe must replace these
        "preconditioning": {
            "class_path": "dpnp_shared.preconditioning.EDM",
            "init_args": {"sigma_data": 0.3, "sigma_min": 0.01, "sigma_max": 10.0},
        },
        "loss": {
            "class_path": "dpnp_training.losses.DenoisingScoreMatching",
            "init_args": {
                "weighting": "edm",
                "sigma_data": 0.3,
                "noise": {"class_path": "dpnp_training.losses.LogNormal", "init_args": {"mean": -1.0, "std": 1.4}},
            },
        },
    },
    "data": {"source": "x.npy", "batch_size": 8},
}


def test_there_are_recipes():
    assert {path.stem for path in RECIPES} == {
        "augmentation", "edm", "edm_adaptive", "flow_matching", "improved_ddpm", "v_prediction", "ve", "vp_continuous"
    }  # fmt: skip


def contains(written: dict, wanted: dict) -> bool:
    """Whether all that is wanted was written, at every depth."""
    return all(
        contains(written[key], value) if isinstance(value, dict) else written[key] == value
        for key, value in wanted.items()
        if key != "class_path"
    )


@pytest.mark.filterwarnings("ignore")  # Lightning's own warnings are not ours to judge
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8))
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    main(["fit", "--config", "base.yaml", "--config", str(recipe)])
    prior = Prior.from_pretrained("run/prior")
    model = yaml.safe_load(recipe.read_text())["model"]
    if "preconditioning" in model:
        wanted = model["preconditioning"]
        assert type(prior.preconditioning).__name__ == wanted["class_path"].rpartition(".")[2]
        written = json.loads(Path("run/prior/config.json").read_text())["preconditioning"]
        assert contains(written["init_args"], wanted["init_args"])
    assert prior.card.training["optimiser steps"] == 2
    assert all(math.isfinite(value) for value in prior.card.metrics.values())
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(prior(x, math.sqrt(prior.sigma_min * prior.sigma_max))).all()


@pytest.mark.filterwarnings("ignore")
def test_an_adaptive_distribution_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (24, 8, 8), dtype=np.uint8))
    trainer = {**BASE["trainer"], "max_steps": -1, "callbacks": [{"class_path": "dpnp_training.callbacks.Checkpoints"}]}
    Path("base.yaml").write_text(yaml.safe_dump({**BASE, "trainer": trainer}))
    recipe = next(path for path in RECIPES if path.stem == "edm_adaptive")

    def fit(root: str, *options: str) -> dict:
        constant = ["--model.decay=constant", f"--trainer.default_root_dir={root}"]
        main(["fit", "--config", "base.yaml", "--config", str(recipe), *constant, *options])
        return torch.load(f"{root}/checkpoints/last.ckpt", weights_only=True)["state_dict"]

    straight = fit("straight", "--trainer.max_epochs=2")
    half = fit("resumed", "--trainer.max_epochs=1")
    resumed = fit("resumed", "--trainer.max_epochs=2", "--ckpt_path=resumed/checkpoints/last.ckpt")
    key = "loss.noise._extra_state"
    assert not torch.equal(half[key], straight[key])
    assert [name for name, value in straight.items() if not torch.equal(resumed[name], value)] == []
