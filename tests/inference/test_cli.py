import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpnp_inference.cli import main
from dpnp_inference.files import read_tensor
from dpnp_inference.posterior import Posterior
from dpnp_shared.prior import Prior

IMAGES = str(Path(__file__).parents[2] / "priors" / "fashion_mnist" / "test_images.npz")
FAST = [
    "--annealing",
    "dpnp_inference.Annealing",
    "--annealing.constant=0",
    "--annealing.decay=3",
    "--annealing.final=0",
    "--dds",
    "dpnp_inference.DDSDDIM",
    "--dds.calls=2",
]
NOISE = ["--noise", "dpnp_shared.noise.GaussianNoise", "--noise.sigma", "0.05"]
INPAINTING = ["--operator", "dpnp_shared.operators.RandomInpainting", "--operator.image_shape", "[1,28,28]"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dpnp_inference.gibbs.START_CALLS", 3)


def failed(arguments: list[str], capsys) -> str:
    """The message of a run that must fail and must leave nothing behind."""
    before = sorted(os.listdir())
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    assert sorted(os.listdir()) == before
    return f"{stop.value.code} {capsys.readouterr().err}"


@pytest.mark.pictures
def test_the_demo_writes_everything_it_should(capsys):
    main([*FAST, "--chains", "19", "--output", "out"])
    printed = capsys.readouterr().out
    assert "PSNR of the mean" in printed
    assert "90% intervals cover" in printed
    assert "unseen pixels" in printed
    assert "picture: out/picture.png" in printed
    files = {
        "picture.png",
        "report.html",
        "display.npy",
        "run.json",
        "samples.safetensors",
        "diagnostics.json",
        "mean.npy",
        "std.npy",
        "truth.npy",
    }
    assert set(os.listdir("out")) == files | {"measurement.npy", "state.safetensors"}
    assert os.listdir() == ["out"]
    run = json.loads(Path("out/run.json").read_text())
    assert run["prior"]["sha256"] == Prior.from_pretrained("fashion_mnist").card.sha256
    assert run["seed"] == 0
    assert 3 < run["network_calls"] == json.loads(Path("out/diagnostics.json").read_text())["network_calls"]
    assert run["config"]["chains"] == 19
    assert run["versions"].keys() == {"dpnp-imaging", "torch", "python"}
    posterior = Posterior.load("out")
    assert posterior.samples.shape == (19, 1, 1, 28, 28)
    np.testing.assert_array_equal(np.load("out/mean.npy"), posterior.mean.numpy())
    with Image.open("out/picture.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_the_same_seed_gives_the_same_samples_and_replay_from_run_json(capsys):
    main([*FAST, "--chains", "2", "--output", "a"])
    main([*FAST, "--chains", "2", "--output", "b"])
    assert torch.equal(Posterior.load("a").samples, Posterior.load("b").samples)
    main([*FAST, "--chains", "2", "--output", "c", "--seed", "1"])
    assert not torch.equal(Posterior.load("a").samples, Posterior.load("c").samples)
    config = {**json.loads(Path("a/run.json").read_text())["config"], "output": "d"}
    with open("replay.yaml", "w") as stream:
        json.dump(config, stream)
    main(["--config", "replay.yaml"])
    assert torch.equal(Posterior.load("a").samples, Posterior.load("d").samples)


def test_a_measurement_of_ones_own():
    truth = read_tensor(IMAGES)[3].float() / 127.5 - 1
    np.save("y.npy", truth[None].numpy())
    main(
        [
            "--measurement",
            "y.npy",
            *INPAINTING,
            *NOISE,
            *FAST,
            "--chains",
            "1",
            "--output",
            "out",
            "--precision",
            "float64",
        ]
    )
    assert Posterior.load("out").samples.dtype == torch.float64
    assert not os.path.exists("out/truth.npy")
    assert not os.path.exists("out/std.npy")  # there is no standard deviation of one draw


@pytest.mark.parametrize("kind", ["png", "npy", "npz", "pt"])
def test_images_of_every_kind_are_the_same_image(kind):
    pixels = read_tensor(IMAGES)[1].numpy()
    {
        "png": lambda: Image.fromarray(pixels).save("x.png"),
        "npy": lambda: np.save("x.npy", pixels),
        "npz": lambda: np.savez("x.npz", image=pixels, other=pixels[:2]),
        "pt": lambda: torch.save(torch.from_numpy(pixels), "x.pt"),
    }[kind]()
    key = ["--key", "image"] if kind == "npz" else []
    main(["--image", f"x.{kind}", *key, *INPAINTING, *NOISE, *FAST, "--chains", "1", "--output", "out"])
    np.testing.assert_allclose(np.load("out/truth.npy")[0], pixels / 127.5 - 1, atol=1e-6)


OWN = """
import torch
from torch import nn
from dpnp_shared.noise import GaussianNoise

def row_sums(x):
    return x.sum(dim=(1, 2))

class Camera(nn.Module):
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * torch.tanh(x[:, 0, ::2, ::2])

class Broken(nn.Module):
    def forward(self, x):
        return x / 0
"""


def test_ones_own_forward_model_in_a_file():
    with open("mine.py", "w") as stream:
        stream.write(OWN)
    camera = ["--operator", "mine.py:Camera", "--operator.gain", "2"]
    main(["--image", IMAGES, "--index", "2", *camera, *NOISE, *FAST, "--chains", "2", "--output", "a"])
    assert np.load("a/measurement.npy").shape == (14, 14)
    with open("own.yaml", "w") as stream:
        stream.write(
            "operator: mine.py:row_sums\nnoise: {class_path: mine.py:GaussianNoise, init_args: {sigma: 0.1}}\n"
        )
    main(["--config", "own.yaml", "--image", IMAGES, *FAST, "--chains", "2", "--output", "b"])
    assert np.load("b/measurement.npy").shape == (28,)


def test_errors_are_one_message_and_leave_nothing_behind(capsys):
    with open("mine.py", "w") as stream:
        stream.write(OWN)
    np.save("nan.npy", np.full((1, 28, 28), np.nan, np.float32))
    np.save("wrong.npy", np.zeros((1, 20, 28), np.float32))
    np.save("complex.npy", np.zeros((1, 28, 28), np.complex64))
    with open("not_an_image.png", "w") as stream:
        stream.write("hello")
    run = [*INPAINTING, *NOISE, *FAST, "--output", "out"]
    for arguments, words in [
        (["--measurement", "nan.npy", *run], "784 NaN"),
        (["--measurement", "wrong.npy", *run], "(1, 20, 28)"),
        (["--measurement", "complex.npy", *run], "complex"),
        (["--measurement", "nothing.npy", *run], "nothing.npy does not exist"),
        (["--image", "wrong.npy", *run], "(1, 20, 28)"),
        (["--image", "not_an_image.png", *run], "cannot be read"),
        (["--image", IMAGES, "--index", "99", *run], "index = 99"),
        (["--image", IMAGES, "--measurement", "nan.npy", *run], "both given"),
        (["--image", IMAGES, *NOISE, *FAST, "--output", "out"], "operator"),
        (["--image", IMAGES, "--operator", "mine.py:Broken", *NOISE, *FAST, "--output", "out"], "not finite"),
        (["--image", IMAGES, "--operator", "mine.py:Nothing", *NOISE], "no Nothing"),
        (["--image", IMAGES, "--operator", "nowhere.py:Camera", *NOISE], "nowhere.py does not exist"),
        (["--colour", "red"], "colour"),
        (["--chains", "many"], "chains"),
        (["--chains", "0", *FAST], "chains = 0"),
        (["--precision", "float8"], "float8"),
        (["--prior", "nothing"], "no bundled prior"),
        (["--annealing", "dpnp_inference.Annealing", "--annealing.eta_max", "200"], "[0.005, 80]"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
    ]:
        assert words in failed(arguments, capsys)


def test_an_earlier_run_is_not_lost_by_accident(capsys):
    main([*FAST, "--chains", "1", "--output", "out"])
    kept = Path("out/run.json").read_text()
    assert "overwrite" in failed([*FAST, "--chains", "1", "--output", "out", "--seed", "1"], capsys)
    assert Path("out/run.json").read_text() == kept
    main([*FAST, "--chains", "1", "--output", "out", "--seed", "1", "--overwrite", "true"])
    assert json.loads(Path("out/run.json").read_text())["seed"] == 1
    os.mkdir("precious")
    assert "not the folder of a run" in failed([*FAST, "--output", "precious", "--overwrite", "true"], capsys)


def test_a_tampered_prior_is_refused(capsys):
    shutil.copytree(Path(IMAGES).parent, "prior")
    weights = Path("prior/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "SHA-256" in failed(["--prior", "prior", *FAST], capsys)
    weights.unlink()
    assert "model.safetensors is missing" in failed(["--prior", "prior", *FAST], capsys)


@pytest.mark.parametrize("launcher", ["inference/reconstruct.py", "training/train.py"])
def test_the_launchers_run_as_scripts(launcher):
    script = Path(__file__).parents[2] / launcher
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--config" in done.stdout or "fit" in done.stdout
