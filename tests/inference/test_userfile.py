"""``path/to/file.py:Name`` as operator and noise, from the command line and from YAML."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from dpnp_inference.annealing import Annealing
from dpnp_inference.cli import _parser, _resolve_argument, main
from dpnp_inference.commands.reconstruct import Reconstruction as Settings
from dpnp_inference.dpnp import DPnP
from dpnp_inference.proximal import MALA, EllipticalSlice, PerturbAndSolve
from dpnp_inference.userfile import hash_user_files, name_user_files, resolve_user_files
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import ExternalProgram, NumpyOperator, ScipyLinearOperator, ScipyOperator

SOURCE = """
import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator as ScipyLinear
from torch import nn

from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import NumpyOperator, Operator
from neighbour import FACTOR


class Gain(Operator):
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * x


class Module(nn.Module):
    def __init__(self, gain: float = 1.0):
        super().__init__()
        self.gain = gain

    def forward(self, x):
        return self.gain * x


class Plain:
    def __init__(self, gain: float = 1.0):
        self.gain = gain

    def __call__(self, x):
        return self.gain * x


class Projector(ScipyLinear):
    def __init__(self, rows: int = 3):
        super().__init__(np.dtype(float), (rows, 16))

    def _matvec(self, v):
        return v[: self.shape[0]]

    def _rmatvec(self, u):
        return np.concatenate([u.ravel(), np.zeros(16 - self.shape[0])])


def double(x):
    return FACTOR * x


def make(gain: float = 1.0) -> Operator:
    return Gain(gain)


def numpy_double(x):
    return 2 * np.asarray(x)


def numpy_vjp(x, v):
    return 2 * v


operator, module, values = Gain(2.0), Module(2.0), NumpyOperator(numpy_double)
thin = sparse.eye_array(16).tocsr()[:5]
dense = np.eye(16)[:5]
black_box = ScipyLinear((5, 16), matvec=lambda v: v[:5])
number = 3


class Wide(GaussianNoise):
    def __init__(self, factor: float = 1.0):
        super().__init__(factor * 0.1)


def make_noise(factor: float = 1.0) -> Noise:
    return Wide(factor)


noise = Wide(2.0)
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mine.py").write_text(SOURCE)
    Path("neighbour.py").write_text("FACTOR = 2\n")
    yield
    sys.modules.pop("neighbour", None)


def forward_model(arguments: list[str]) -> ForwardModel:
    """What the command line makes of its arguments."""
    parser = _parser()
    parser.exit_on_error = False
    built = parser.instantiate(parser.parse_args([_resolve_argument(argument) for argument in arguments]))
    prior = GaussianPrior(0.0, 1.0, (1, 4, 4))
    settings = Settings(prior=prior, operator=built.operator, noise=built.noise, device="cpu")
    return settings.models(demo=False)[2]


def arguments_of(how: str, operator: str, noise: str, **init_args: object) -> list[str]:
    """The same on the command line, in YAML, and in YAML with ``class_path``."""
    if how == "command":
        given = [f"--operator.{key}={value}" for key, value in init_args.items()]
        return ["--operator", operator, *given, f"--noise={noise}"]
    described: object = operator
    if init_args or how == "class_path":
        described = {"class_path": operator, "init_args": init_args}
    Path("own.yaml").write_text(json.dumps({"operator": described, "noise": noise}))
    return ["--config", "own.yaml"]


@pytest.mark.parametrize("how", ["command", "yaml", "class_path"])
@pytest.mark.parametrize("name", ["Gain", "Module", "Plain", "make"])
def test_classes_and_functions_that_make_operators(how, name):
    model = forward_model(arguments_of(how, f"mine.py:{name}", "mine.py:Wide", gain=3))
    assert torch.equal(model.operator(torch.ones(2, 1, 4, 4)), torch.full((2, 1, 4, 4), 3.0))
    model = forward_model(arguments_of(how, f"mine.py:{name}", "mine.py:Wide"))
    assert torch.equal(model.operator(torch.ones(2, 1, 4, 4)), torch.ones(2, 1, 4, 4))


@pytest.mark.parametrize("how", ["command", "yaml"])
@pytest.mark.parametrize("name", ["double", "operator", "module", "values"])
def test_functions_and_objects_of_the_file(how, name):
    model = forward_model(arguments_of(how, f"mine.py:{name}", "mine.py:Wide"))
    assert torch.equal(model.operator(torch.ones(2, 1, 4, 4)), torch.full((2, 1, 4, 4), 2.0))
    assert model.operator.differentiable == (name != "values")


@pytest.mark.parametrize("how", ["command", "yaml"])
@pytest.mark.parametrize("name", ["thin", "dense", "black_box", "Projector"])
def test_operators_of_scipy(how, name):
    model = forward_model(arguments_of(how, f"mine.py:{name}", "mine.py:Wide"))
    assert type(model.operator) is (ScipyOperator if name == "black_box" else ScipyLinearOperator)
    x = torch.arange(32.0).reshape(2, 1, 4, 4)
    rows = 3 if name == "Projector" else 5
    assert torch.equal(model.operator(x), x.flatten(1)[:, :rows])
    if name == "Projector":
        again = forward_model(arguments_of(how, f"mine.py:{name}", "mine.py:Wide", rows=4))
        assert torch.equal(again.operator(x), x.flatten(1)[:, :4])


@pytest.mark.parametrize("how", ["command", "yaml"])
@pytest.mark.parametrize(("name", "sigma"), [("Wide", 0.1), ("make_noise", 0.1), ("noise", 0.2)])
def test_noise_of_the_file(how, name, sigma):
    model = forward_model(arguments_of(how, "mine.py:double", f"mine.py:{name}"))
    assert isinstance(model.noise, Noise)
    assert float(model.noise.sigma) == pytest.approx(sigma)
    if name == "Wide":
        model = forward_model(["--operator=mine.py:double", "--noise=mine.py:Wide", "--noise.factor=3"])
        assert float(model.noise.sigma) == pytest.approx(0.3)


def test_names_of_the_file_within_other_operators():
    numpy_arguments = {"function": "mine.py:numpy_double", "vjp": "mine.py:numpy_vjp"}
    described = {"class_path": "dpnp_shared.operators.NumpyOperator", "init_args": numpy_arguments}
    Path("own.yaml").write_text(json.dumps({"operator": described, "noise": "mine.py:noise"}))
    operator = forward_model(["--config", "own.yaml"]).operator
    assert isinstance(operator, NumpyOperator)
    assert operator.differentiable
    named = {"A": "mine.py:thin", "image_shape": [1, 4, 4], "y_shape": [5, 1]}
    stacked = [{"class_path": "dpnp_shared.operators.ScipyOperator", "init_args": named}, "mine.py:operator"]
    described = {"class_path": "dpnp_shared.operators.Compose", "init_args": {"operators": stacked}}
    Path("own.yaml").write_text(json.dumps({"operator": described, "noise": "mine.py:noise"}))
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(forward_model(["--config", "own.yaml"]).operator(x), 2 * torch.ones(1, 5, 1))
    command = ["--operator=dpnp_shared.operators.ExternalProgram", "--operator.command=cat", "--noise=mine.py:noise"]
    assert isinstance(forward_model(command).operator, ExternalProgram)


def test_what_cannot_be_an_operator_or_a_noise_is_refused(capsys):
    for arguments, words in [
        (["--operator", "mine.py:number", "--noise", "mine.py:noise"], "operator"),
        (["--operator", "mine.py:double", "--noise", "mine.py:double"], "subclass of Noise"),
        (["--operator", "mine.py:nothing", "--noise", "mine.py:noise"], "defines no nothing"),
        (["--operator", "nowhere.py:double", "--noise", "mine.py:noise"], "nowhere.py does not exist"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["--image", "x.npy", *arguments])
        assert words in f"{stop.value.code} {capsys.readouterr().err}"


def test_a_configuration_names_the_file_as_it_was_given():
    given = {"operator": {"class_path": "mine.py:Gain"}, "A": ["mine.py:thin", "other.py", 3], "noise": "a.b.C"}
    resolved = resolve_user_files(given)
    assert resolved["operator"]["class_path"].startswith("user_mine_")
    assert resolved["A"][1:] == ["other.py", 3]
    assert name_user_files(resolved) == given
    before = hash_user_files(given)
    assert before.keys() == {"mine.py"}
    Path("mine.py").write_text(SOURCE + "# edited\n")
    assert hash_user_files(given) != before


def test_files_are_looked_for_from_the_working_directory_and_beside_the_configuration():
    noise = {"class_path": "dpnp_shared.noise.GaussianNoise", "init_args": {"sigma": 0.1}}
    Path("below").mkdir()
    Path("below/beside.py").write_text("def A(x):\n    return 3 * x\n")
    x = torch.ones(1, 1, 4, 4)
    for name, factor in [("mine.py:double", 2), ("below/beside.py:A", 3), ("beside.py:A", 3)]:
        Path("below/own.yaml").write_text(json.dumps({"operator": name, "noise": noise}))
        operator = forward_model(["--config", "below/own.yaml"]).operator
        assert torch.equal(operator(x), factor * x)
        assert name_user_files(resolve_user_files(name, Path("below"))) == name.replace("below/", "").replace(
            "beside", "below/beside"
        )


def test_a_run_with_ones_own_file_can_be_replayed_by_another_process():
    few = {
        "annealing": {"class_path": "dpnp_inference.Annealing", "init_args": {"decay": 1, "constant": 0, "final": 0}}
    }
    flat = {"mean": 0, "covariance": 1, "image_shape": [1, 4, 4]}
    prior = {"class_path": "dpnp_shared.analytic.GaussianPrior", "init_args": flat}
    np.save("x.npy", np.zeros((1, 4, 4), np.float32))
    Path("few.yaml").write_text(json.dumps({**few, "prior": prior, "chains": 2, "device": "cpu", "image": "x.npy"}))
    own = ["--operator", "mine.py:Module", "--operator.gain=2", "--noise", "mine.py:Wide"]
    main(["--config", "few.yaml", *own, "--output", "out"])
    config = json.loads(Path("out/run.json").read_text())["config"]
    assert config["operator"] == {"class_path": "mine.py:Module", "init_args": {"gain": 2.0}}
    Path("replay.yaml").write_text(json.dumps({key: config[key] for key in ("operator", "noise")}))
    for module in [name for name in sys.modules if name.startswith("user_mine_")]:
        del sys.modules[module]  # as in another process
    model = forward_model(["--config", "replay.yaml"])
    assert model.operator.function.gain == 2.0
    assert type(model.noise).__name__ == "Wide"


def test_samplers_take_what_operators_outside_of_pytorch_can_do():
    prior, y = GaussianPrior(0.5, 0.1, (1, 2, 2)), torch.full((1, 2, 2), 0.75)
    settings = {"annealing": Annealing(constant=0, decay=4, final=0), "dtype": torch.float64}

    def sampler(A):
        return DPnP(prior, ForwardModel(A, GaussianNoise(0.1)), **settings)

    inside, outside = sampler(lambda x: x**2 + x), sampler(NumpyOperator(squared, vjp=squared_vjp))
    assert isinstance(outside.proximal, MALA)
    # its backward pass cannot be differentiated: a difference takes the place of the second derivative
    assert outside.schedule == pytest.approx(inside.schedule, rel=1e-4)
    outside.schedule = inside.schedule
    torch.testing.assert_close(outside.sample(y, chains=2, seed=0).mean, inside.sample(y, chains=2, seed=0).mean)
    values = sampler(NumpyOperator(squared))
    assert isinstance(values.proximal, EllipticalSlice)
    assert float(values.sample(y, chains=8, seed=0).mean.mean()) == pytest.approx(0.5, abs=0.1)
    assert isinstance(sampler(ScipyOperator(sparse.eye_array(4), (1, 2, 2))).proximal, PerturbAndSolve)


SAMPLER = """
class Mine:
    exact_splitting = False

    def __init__(self, steps: int = 1):
        self.steps = steps

    def init(self, forward_model, y, x):
        return x

    def step(self, state, x, eta, *, generator):
        return state, x, None

    def select(self, state, index):
        return state[index]

    def split_variance(self, state):
        return 0.0
"""


@pytest.mark.parametrize("name", ["MALA", "HMC", "EllipticalSlice", "ClosedForm", "PerturbAndSolve", "mine.py:Mine"])
def test_samplers_are_named_as_well(name):
    Path("mine.py").write_text(SAMPLER)
    path = name if ":" in name else f"dpnp_inference.{name}"
    parser = _parser()
    steps = [] if name in ("ClosedForm", "PerturbAndSolve") else ["--proximal.steps=7"]
    arguments = [_resolve_argument(argument) for argument in ("--proximal", path, *steps)]
    proximal = parser.instantiate(parser.parse_args(arguments)).proximal
    assert type(proximal).__name__ == name.split(":")[-1]
    assert getattr(proximal, "steps", 7) == 7


def squared(x):
    return x**2 + x


def squared_vjp(x, v):
    return (2 * x + 1) * v
