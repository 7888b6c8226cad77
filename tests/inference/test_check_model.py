"""Every broken forward model is caught by the check that is for it, and the right ones pass all of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import sparse
from torch import Tensor, nn

from dpnp_inference.annealing import Annealing
from dpnp_inference.check_model import Finding, check_model, has_problem, print_findings, run
from dpnp_inference.cli import main
from dpnp_inference.proximal import MALA
from dpnp_shared.analytic import GaussianPrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import DitheredLogisticNoise, GaussianNoise, Noise, PoissonNoise
from dpnp_shared.operators import (
    CodedDiffraction,
    Compose,
    CompressedSensing,
    Convolution,
    DitheredQuantisation,
    ExternalProgram,
    FunctionOperator,
    GaussianBlur,
    HighDynamicRange,
    LinearOperator,
    NumpyOperator,
    Operator,
    PhaseRetrieval,
    PhysicalUnits,
    Quantisation,
    RandomInpainting,
    ScipyOperator,
    SuperResolution,
)

SHAPE = (1, 6, 4)
PRIOR = GaussianPrior(0.2, 0.16, SHAPE)


def found(operator, noise=None, y=None, **settings) -> dict[str, Finding]:
    """The findings of a model, by name."""
    model = ForwardModel(operator, GaussianNoise(0.1) if noise is None else noise)
    return {finding.name: finding for finding in check_model(PRIOR, model, y, **settings)}


def statuses(findings: dict[str, Finding]) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings.values() if finding.status != "OK"}


# right ones

RIGHT = {
    "function": (lambda: lambda x: torch.tanh(x[:, 0]), None),
    "inpainting": (lambda: RandomInpainting(SHAPE), None),
    "super_resolution": (lambda: SuperResolution(SHAPE, 2), None),
    "blur": (lambda: GaussianBlur(SHAPE, 0.8), None),
    "compressed_sensing": (lambda: CompressedSensing(SHAPE, 9), None),
    "convolution": (lambda: Convolution(SHAPE, [[1.0, 2.0]]), None),
    "compose": (lambda: Compose([GaussianBlur(SHAPE, 0.8), SuperResolution(SHAPE, 2)]), None),
    "physical_units": (lambda: PhysicalUnits(GaussianBlur(SHAPE, 0.8), (-1, 1), (0, 3)), None),
    "high_dynamic_range": (lambda: HighDynamicRange(2.0), None),
    "phase_retrieval": (lambda: PhaseRetrieval(SHAPE), None),
    "coded_diffraction": (lambda: CodedDiffraction(SHAPE, masks=2), None),
    "quantisation": (lambda: Quantisation(8), None),
    "dithered": (lambda: DitheredQuantisation(SHAPE, 4, 0.5), lambda: DitheredLogisticNoise(0.2)),
    "poisson": (lambda: FunctionOperator(lambda x: 20 * torch.exp(x), pixelwise=True), lambda: PoissonNoise()),
    "sparse": (lambda: ScipyOperator(sparse.random_array((9, 24), density=0.3, rng=0), SHAPE), None),
    "complex_sparse": (lambda: ScipyOperator((1 + 2j) * sparse.random_array((9, 24), density=0.3, rng=0), SHAPE), None),
    "numpy": (lambda: NumpyOperator(lambda x: np.sort(x[:, 0], axis=1)), None),
    "numpy_vjp": (lambda: NumpyOperator(np.sin, vjp=lambda x, v: np.cos(x) * v, pixelwise=True), None),
    "program": (lambda: ExternalProgram("cp {input} {output}", SHAPE, per_image=False), None),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_models_pass_all_checks(name):
    operator, noise = RIGHT[name]
    findings = found(operator(), None if noise is None else noise())
    notes = {"linearity": "NOTE", "pixelwise": "NOTE"} if name == "program" else {}  # which copies, and does not say so
    assert statuses(findings) == notes
    assert {"output", "independence", "values", "linearity", "gradient", "noise density", "sampler", "time"} <= {
        *findings
    }
    assert ("pixelwise" in findings) == (
        name in ("inpainting", "program", "high_dynamic_range", "quantisation", "dithered", "poisson", "numpy_vjp")
    )
    assert ("adjoint" in findings) == (name in ("inpainting", "super_resolution", "blur", "compressed_sensing", "convolution", "compose",
                                                "physical_units", "sparse", "complex_sparse"))  # fmt: skip
    assert all("OK" in finding.status or finding.remedy for finding in findings.values())


def test_findings_are_the_same_in_double_precision_and_on_images_of_ones_own():
    findings = found(
        PhysicalUnits(GaussianBlur(SHAPE, 0.8)), dtype=torch.float64, images=torch.zeros(2, *SHAPE), proximal=MALA()
    )
    assert statuses(findings) == {}
    assert "MALA, as was chosen" in findings["sampler"].message


# wrong ones


class Linear(LinearOperator):
    """A linear operator that is made wrong by its parts."""

    def __init__(self, forward=lambda x: 3 * x, **parts):
        super().__init__(SHAPE)
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(x)


class WrongNorm(Linear):
    def norm(self):
        return self.given


class WrongGram(Linear):
    def gram_function(self, f, x):
        return f(torch.full_like(x, 3.0)) * x  # the singular value, not its square

    def adjoint(self, y):
        return 3 * y


class WrongParts(Operator):
    def __init__(self, **parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return x + 1

    @property
    def unseen(self):
        return self.parts.get("unseen")

    @property
    def linear_part(self):
        return self.parts.get("linear_part")

    def display(self, y):
        return self.parts.get("display")


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.BatchNorm2d(1)

    def forward(self, x):
        return self.layer(x)


class SingleInside(nn.Module):
    def forward(self, x):
        return torch.nn.functional.pad(torch.sin(x.float()), (3, 3)).to(x.dtype)  # zeros tell nothing of the precision


def in_place(x):
    x *= 2
    return x + 0.0


def no_images_beyond(x):
    if x.abs().max() > 1.6:
        raise ValueError("the simulator takes images in [-1.6, 1.6].")
    return x


def straight_through(x):
    return x + (x.round() - x).detach()


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, v):
        return v * ctx.saved_tensors[0].cos() / 2


def complex_linear(**parts):
    phase = torch.exp(1j * torch.arange(24).reshape(SHAPE))
    return Linear(lambda x: x * phase.to(x.dtype.to_complex()), **parts), phase


@pytest.mark.parametrize(
    ("operator", "name", "status", "words"),
    [
        (lambda x: x.numpy(), "output", "PROBLEM", "numpy.ndarray.*NumpyOperator"),
        (lambda x: x.mean(), "output", "PROBLEM", r"shape \(\) for images.*\(3, 1, 6, 4\).*batch"),
        (lambda x: x.sum((1, 2, 3)).squeeze(), "output", "PROBLEM", r"shape \(\).*\(1, 1, 6, 4\).*squeeze"),
        (lambda x: x[:, :, : len(x)], "output", "PROBLEM", "another shape in a batch of three"),
        (lambda x: x.no_such_method(), "output", "PROBLEM", r"AttributeError.*test_check_model.py, line \d+"),
        (lambda x: (x > 0).long(), "dtype", "PROBLEM", r"float32 images give int64.*y.to\(x.dtype\)"),
        (lambda x: x.double(), "dtype", "NOTE", "give float64"),
        (lambda x: x.float(), "dtype", "NOTE", "float64 images give float32"),
        (SingleInside(), "dtype", "NOTE", "single precision"),
        (nn.Conv2d(1, 1, 1).requires_grad_(False), None, None, None),  # its copy is in double precision
        (in_place, "input", "PROBLEM", r"x.clone\(\)"),
        (lambda x: x + torch.randn_like(x), "repeatability", "PROBLEM", "another measurement each time.*noise"),
        (lambda x: x - x.mean(), "independence", "PROBLEM", "other images change|another order|alone"),
        (lambda x: x + torch.arange(len(x))[:, None, None, None], "independence", "PROBLEM", "alone|another order"),
        (BatchNorm(), "independence", "PROBLEM", r"eval\(\)"),
        (lambda x: x.log(), "values", "PROBLEM", r"not finite for draws from the prior.*everywhere.*clamp"),
        (lambda x: torch.where(x.abs().amax((1, 2, 3), True) > 1.6, math.nan, x), "values", "NOTE", "of 8.*rejected"),
        (no_images_beyond, "values", "PROBLEM", r"takes images in \[-1\.6, 1\.6\] \(test_check_model.py, line \d+\).*NaN"),
        (lambda x: 0 * x + 1, "values", "PROBLEM", "All draws give the same measurement"),
        (Linear(lambda x: x.abs()), "linearity", "PROBLEM", "is not linear"),
        (Linear(lambda x: x + 1), "linearity", "PROBLEM", "blank image gives a measurement that is not 0"),
        (lambda x: 2 * x, "linearity", "NOTE", "is linear.*Subclass LinearOperator"),
        (lambda x: 2 * x + 1, "linearity", "NOTE", "is affine.*linear_part"),
        (WrongParts(linear_part=Linear()), "linearity", "PROBLEM", "linear_part is not"),
        (Linear(adjoint=lambda y: 2.7 * y), "adjoint", "PROBLEM", "is 0.9 times"),
        (Linear(adjoint=lambda y: 3 * y.flatten(1)), "adjoint", "PROBLEM", r"gives \(3, 24\)"),
        (WrongNorm(given=1.0), "norm", "PROBLEM", "norm.. is 1, .*3 times as large.*Exact splitting"),
        (WrongNorm(given=10.0), "norm", "NOTE", "norm.. is 10"),
        (WrongGram(), "gram function", "PROBLEM", r"f\(s\) = s does not give A\^T A x"),
        (lambda x: torch.tanh(x.detach()), "gradient", "PROBLEM", "no way through.*detach"),
        (lambda x: torch.tanh(x) * x.detach(), "gradient", "PROBLEM", "not that of the values.*ratio"),
        (HalfGradient.apply, "gradient", "PROBLEM", r"ratio 0\.5\)"),
        (lambda x: x.round() + 0 * x, "gradient", "PROBLEM", "0 everywhere.*Set differentiable = False"),
        (lambda x: (255 * x).round() / 255 + 0 * x, "gradient", "PROBLEM", "0 everywhere"),
        (straight_through, "gradient", "PROBLEM", "straight-through"),
        (lambda x: x.square().sum((1, 2, 3)).sqrt(), "gradient", "NOTE", "not finite for a blank image"),
        (lambda x: torch.where(x > 0, x.sqrt(), x), "gradient", "PROBLEM", "not finite for draws"),
        (FunctionOperator(torch.tanh, differentiable=False), "gradient", "NOTE", "Set differentiable = True"),
        (FunctionOperator(lambda x: x.sin() + x.cumsum(2), pixelwise=True), "pixelwise", "PROBLEM", "change with other pixels"),
        (FunctionOperator(lambda x: x.sin().mean(1), pixelwise=True), "pixelwise", "PROBLEM", r"\(6, 4\) does not end"),
        (lambda x: torch.stack([x.sin(), x.cos()], 1), "pixelwise", "NOTE", "does not say so.*pixelwise = True"),
        (WrongParts(unseen=torch.ones(SHAPE, dtype=torch.bool)), "unseen", "PROBLEM", "change the measurement"),
        (WrongParts(display=torch.zeros(6, 4)), "display", "PROBLEM", r"gives \(6, 4\).*y\[None\]"),
        (WrongParts(display=3), "display", "PROBLEM", "gives a int"),
    ],
)  # fmt: skip
def test_wrong_operators_are_caught(operator, name, status, words):
    findings = found(operator)
    if name is None:
        assert "dtype" not in statuses(findings)
        return
    assert findings[name].status == status, findings[name]
    assert findings[name].remedy
    assert_words(words, findings[name])


def assert_words(words: str, finding: Finding) -> None:
    import re

    text = f"{finding.message} {finding.remedy}"
    assert re.search(words, text, re.DOTALL), text


def test_complex_adjoints_are_told_from_their_conjugates():
    right, phase = complex_linear()
    assert statuses(found(right)) == {}
    wrong, _ = complex_linear(adjoint=lambda y: (y * phase.to(y.dtype)).real)
    assert statuses(found(wrong))["adjoint"] == "PROBLEM"
    not_real, _ = complex_linear(adjoint=lambda y: y * phase.conj().to(y.dtype))
    assert_words("complex.*real part", found(not_real)["adjoint"])


class Law(Noise):
    """Gaussian noise that is made wrong by its parts."""

    resolution = 0.1

    def __init__(self, sample=None, log_prob=None):
        super().__init__()
        self.given_sample, self.given_log_prob = sample, log_prob

    def sample(self, clean, generator=None):
        w = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        return clean + 0.1 * w if self.given_sample is None else self.given_sample(clean, w)

    def log_prob(self, y, clean):
        y = y.expand_as(clean)
        log_p = torch.distributions.Normal(clean, 0.1).log_prob(y).flatten(1).sum(1, dtype=torch.float64)
        return log_p if self.given_log_prob is None else self.given_log_prob(y, clean, log_p)


class Unknown(Law):
    resolution = None


def widening(clean):
    return 0.1 + 0.1 * clean.abs()


def widening_density(y, clean, log_p):
    return -0.5 * ((y - clean) / widening(clean)).square().flatten(1).sum(1)  # and no log of the width


@pytest.mark.parametrize(
    ("noise", "name", "status", "words"),
    [
        (Law(), None, None, None),
        (Law(sample=lambda clean, w: clean[:, 0]), "noise", "PROBLEM", r"sample gives \(4, 6, 4\)"),
        (Law(sample=lambda clean, w: clean / 0), "noise", "PROBLEM", "96 of 96 simulated entries are not finite"),
        (Law(sample=lambda clean, w: clean + 0.1 * torch.randn_like(w)), "noise", "PROBLEM", "does not use the generator"),
        (Law(log_prob=lambda y, clean, log_p: log_p.sum()), "noise", "PROBLEM", r"shape \(\) for a batch of 4"),
        (Law(log_prob=lambda y, clean, log_p: log_p - log_p.mean()), "noise", "PROBLEM", "changes with the batch"),
        (Law(log_prob=lambda y, clean, log_p: log_p / 0), "noise", "PROBLEM", "is -?inf"),
        (Law(sample=lambda clean, w: clean + 0.2 * w), "noise density", "PROBLEM", "wider"),
        (Law(sample=lambda clean, w: clean + 0.05 * w), "noise density", "PROBLEM", "narrower"),
        (Law(sample=lambda clean, w: clean + 0.1 * w + 0.1), "noise density", "PROBLEM", "shifted"),
        (
            Law(sample=lambda clean, w: clean + widening(clean) * w, log_prob=widening_density),
            "noise density", "PROBLEM", "lacks a term",
        ),
        (
            Law(log_prob=lambda y, clean, log_p: torch.where((y - clean).abs().amax((1, 2, 3)) < 0.36, 0.0, -math.inf),
                sample=lambda clean, w: clean + 0.35 * w.clamp(-1, 1)),
            "noise density", "NOTE", "Not tried",
        ),
        (Law(log_prob=lambda y, clean, log_p: log_p.detach()), "noise gradient", "PROBLEM", "no gradient in clean"),
        (Law(log_prob=lambda y, clean, log_p: (log_p + log_p.detach()) / 2), "noise gradient", "PROBLEM", "not that of its values"),
        (Law(log_prob=lambda y, clean, log_p: -log_p), "likelihood", "PROBLEM", "less probable under its own image"),
        (Law(log_prob=lambda y, clean, log_p: torch.where(log_p > 0, log_p, math.nan)), "likelihood", "PROBLEM", "NaN"),
        (GaussianNoise(50.0), "likelihood", "NOTE", "hardly tells images apart"),
        (Unknown(), "sampler", "PROBLEM", "resolution.*eta_min"),
    ],
)  # fmt: skip
def test_wrong_noise_is_caught(noise, name, status, words):
    findings = found(torch.tanh, noise)
    if name is None:
        assert statuses(findings) == {}
        return
    assert findings[name].status == status, findings[name]
    assert_words(words, findings[name])


# the measurement


def measured(seed: int = 4) -> Tensor:
    model = ForwardModel(torch.tanh, GaussianNoise(0.1))
    x = PRIOR.sample(1, generator=torch.Generator().manual_seed(seed))
    return model.simulate(x, generator=torch.Generator().manual_seed(seed))[0]


@pytest.mark.parametrize(
    ("y", "name", "status", "words"),
    [
        (measured(), "plausibility", "OK", "of 32 are further off"),
        (measured()[0], "measurement", "PROBLEM", r"y has shape \(6, 4\).*batch dimension"),
        (measured() * math.nan, "measurement", "PROBLEM", "24 NaN"),
        (measured() + 0j, "measurement", "PROBLEM", "complex"),
        (255 * measured(), "plausibility", "PROBLEM", "would never give it.*units"),
        (measured() + 0.6, "plausibility", "NOTE", "further than all of them .1 time in 33 by chance"),
        (torch.full(SHAPE, 0.19), "plausibility", "NOTE", "closer than all of them.*averaged"),
    ],
)
def test_measurements_are_compared_with_simulated_ones(y, name, status, words):
    findings = found(torch.tanh, y=y)
    assert findings[name].status == status, findings[name]
    assert_words(words, findings[name])


def test_a_measurement_that_the_noise_never_gives_is_a_problem():
    impossible = Law(log_prob=lambda y, clean, log_p: torch.where(y.amax((1, 2, 3)) > 5, -math.inf, log_p))
    finding = found(torch.tanh, impossible, y=torch.full(SHAPE, 9.0))["measurement"]
    assert finding.status == "PROBLEM"
    assert "probability 0" in finding.message


def test_plausibility_is_an_exact_test_for_a_measurement_of_the_model():
    """Of measurements that the model gave, 1 in n + 1 is further than all n others, up to five standard errors."""
    generator, runs, n = torch.Generator().manual_seed(0), 600, 9
    y = torch.randn(runs, n + 1, 5, generator=generator) ** 3  # of any law
    far = sum("further than all" in run.plausibility(each[:n], each[n]).message for each in y)
    assert abs(far / runs - 1 / (n + 1)) < 5 * math.sqrt(0.1 * 0.9 / runs)


# the run to come


def test_a_sampler_that_does_not_fit_is_a_problem():
    finding = found(Quantisation(8), proximal=MALA())["sampler"]
    assert finding.status == "PROBLEM"
    assert "differentiable" in finding.message
    finding = found(torch.tanh, annealing=Annealing(eta_max=0.3, eta_min=0.1, decay=3))["sampler"]
    assert "6 to 0.1" not in finding.message
    assert "eta from 0.3 to 0.1" in finding.message


def test_a_derivative_that_is_not_finite_leaves_no_end_of_the_annealing():
    finding = found(lambda x: (-x.square() - 1).sqrt())["sampler"]
    assert finding.status == "PROBLEM"
    assert "not finite at the prior's mean image; give eta_min" in finding.message


def test_images_that_do_not_fit_are_a_problem():
    assert has_problem(check_model(PRIOR, ForwardModel(GaussianBlur((3, 6, 4), 1.0), GaussianNoise(0.1))))


def test_a_long_run_is_worth_a_note(monkeypatch):
    monkeypatch.setattr(run, "LONG", 0.0)
    finding = found(torch.tanh)["time"]
    assert finding.status == "NOTE"
    assert "Fewer chains" in finding.remedy
    for seconds, words in [
        (2e-6, "2 µs"),
        (0.0123, "12 ms"),
        (1.0, "1 s"),
        (119, "119 s"),
        (300, "5 minutes"),
        (9e3, "2 hours"),
    ]:
        assert run.duration(seconds) == words


def test_a_slow_operator_is_timed_by_a_part_of_a_draw(monkeypatch):
    monkeypatch.setattr(run, "SLOW", 0.0)
    for operator in (torch.tanh, Quantisation(8), RandomInpainting(SHAPE)):
        assert found(operator)["time"].status == "OK"


def test_arguments_are_checked():
    model = ForwardModel(torch.tanh, GaussianNoise(0.1))
    for settings, words in [
        ({"draws": 3}, "draws = 3"),
        ({"chains": 0}, "chains = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"dtype": torch.half}, "float16"),
    ]:
        with pytest.raises(ValueError, match=words):
            check_model(PRIOR, model, **settings)


def test_findings_are_printed_and_counted(capsys):
    findings = [Finding("values", "OK", "Fine."), Finding("gradient", "PROBLEM", "Wrong.", "Repair it.")]
    console = Console(width=60, record=True)
    print_findings(findings, console)
    text = console.export_text()
    assert "OK       values    Fine." in text
    assert "-> Repair it." in text
    assert "1 OK, 0 NOTE, 1 PROBLEM" in text


# the command line

MODELS = """
import torch

def good(x):
    return torch.tanh(x)

def bad(x):
    return torch.tanh(x) + x.mean()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prior = {"mean": 0.2, "covariance": 0.16, "image_shape": [*SHAPE]}
    config = {
        "prior": {"class_path": "dpnp_shared.analytic.GaussianPrior", "init_args": prior},
        "noise": {"class_path": "dpnp_shared.noise.GaussianNoise", "init_args": {"sigma": 0.1}},
        "device": "cpu", "chains": 2, "draws": 7, "output": "out",
    }  # fmt: skip
    Path("run.yaml").write_text(json.dumps(config))
    Path("models.py").write_text(MODELS)
    np.save("y.npy", measured().numpy())
    np.save("x.npy", np.zeros(SHAPE, np.float32))
    return tmp_path


def test_the_command_prints_findings_and_says_by_its_status_whether_there_is_a_problem(folder, capsys, caplog):
    check = ["check-model", "--config", "run.yaml", "--json", "found.json"]
    with caplog.at_level("INFO"):
        main([*check, "--operator", "models.py:good", "--measurement", "y.npy"])
    printed = capsys.readouterr().out
    assert ", 0 PROBLEM" in printed
    assert "plausibility" in printed
    assert "draws: for a reconstruction" in caplog.text
    record = json.loads(Path("found.json").read_text())
    assert record["problem"] is False
    assert {"name", "status", "message", "remedy"} == {*record["findings"][0]}
    with pytest.raises(SystemExit) as stop:
        main([*check, "--operator", "models.py:bad", "--image", "x.npy"])
    assert stop.value.code == 1
    assert "PROBLEM  independence" in capsys.readouterr().out
    assert json.loads(Path("found.json").read_text())["problem"] is True
    assert not Path("out").exists()


def test_the_command_refuses_what_a_reconstruction_refuses(folder, capsys):
    for arguments, words in [
        (["--operator", "models.py:good", "--measurement", "no.npy"], "no.npy does not exist"),
        (["--operator", "models.py:none"], "defines no none"),
        (["--measurement", "y.npy"], "operator and noise"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["check-model", "--config", "run.yaml", *arguments])
        assert words in f"{stop.value.code} {capsys.readouterr().err}"
    with pytest.raises(SystemExit):
        main(["check-model", "--help"])
    printed = capsys.readouterr().out
    assert "--measurement" in printed
    assert "--thin" not in printed
