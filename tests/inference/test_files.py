"""Measurements from files, in the units that the forward model's likelihood takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dpnp_inference.cli import main
from dpnp_inference.files import read_measurement
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, JointNoise, PoissonNoise
from dpnp_shared.operators import MRI, PhysicalUnits, Stack, SuperResolution
from dpnp_shared.prior import PriorCard

SHAPE = (1, 4, 4)
CARD = PriorCard("test", SHAPE)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(name: str, array: np.ndarray) -> str:
    np.save(name, array)
    return name


def test_integers_are_pixels_unless_they_are_counts():
    y = save("y.npy", np.array([[[0, 255, 51, 102]] * 4], dtype=np.uint8))
    pixels = read_measurement(y, None, ForwardModel(SuperResolution(SHAPE, 1), GaussianNoise(0.1)), CARD)
    torch.testing.assert_close(pixels[0, 0], torch.tensor([-1.0, 1.0, -0.6, -0.2]))
    counting = ForwardModel(PhysicalUnits(clamp=True), PoissonNoise(background=1.0))
    counts = read_measurement(y, None, counting, CARD)
    assert counts[0, 0].tolist() == [0, 255, 51, 102]


def test_a_list_of_files_is_a_stacks_measurement_each_part_in_its_own_units():
    coils = PhysicalUnits(MRI(SHAPE, "equispaced", 2))
    stack = Stack([PhysicalUnits(SuperResolution(SHAPE, 1), clamp=True), coils], SHAPE)
    model = ForwardModel(stack, JointNoise([PoissonNoise(background=1.0), GaussianNoise(0.1)]))
    counts = np.arange(16, dtype=np.uint16).reshape(SHAPE)
    samples = (np.arange(8) + 1j * np.arange(8)[::-1]).reshape(1, 8).astype(np.complex64)
    y = read_measurement([save("a.npy", counts), save("b.npy", samples)], None, model, CARD)
    assert y.dtype == torch.float64
    first, second = stack.split(y)
    assert first.flatten().tolist() == list(range(16))
    torch.testing.assert_close(second, torch.from_numpy(samples).to(second))
    for files, message in ((["a.npy"], "lists 1 files; Stack has 2 parts"), (["a.npy"] * 3, "lists 3 files")):
        with pytest.raises(ValueError, match=message):
            read_measurement(files, None, model, CARD)
    with pytest.raises(ValueError, match="MRI has 1 parts"):
        read_measurement(["a.npy", "b.npy"], None, ForwardModel(MRI(SHAPE, "equispaced", 2), GaussianNoise(1.0)), CARD)


def test_a_list_of_files_on_the_command_line():
    picture, part = np.zeros((1, 7, 7), dtype=np.float32), np.zeros((1, 28, 28), dtype=np.float32)
    stack = {
        "class_path": "dpnp_shared.operators.Stack",
        "init_args": {
            "operators": [
                {
                    "class_path": "dpnp_shared.operators.SuperResolution",
                    "init_args": {"image_shape": [1, 28, 28], "factor": 4},
                },
                {"class_path": "dpnp_shared.operators.RandomInpainting", "init_args": {"image_shape": [1, 28, 28]}},
            ]
        },
    }
    noise = {
        "class_path": "dpnp_shared.noise.JointNoise",
        "init_args": {
            "noises": [{"class_path": "dpnp_shared.noise.GaussianNoise", "init_args": {"sigma": s}} for s in (0.1, 0.2)]
        },
    }
    few = [
        "--annealing",
        "dpnp_inference.Annealing",
        "--annealing.constant=0",
        "--annealing.decay=2",
        "--annealing.final=0",
    ]
    files = f"[{save('a.npy', picture)}, {save('b.npy', part)}]"
    main(["--prior", "fashion_mnist", "--measurement", files, f"--operator={json.dumps(stack)}", f"--noise={json.dumps(noise)}",
          *few, "--chains", "2", "--output", "out"])  # fmt: skip
    assert np.load("out/measurement.npy").shape == (7 * 7 + 28 * 28,)
