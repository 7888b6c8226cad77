"""Operators outside of PyTorch: NumPy functions, SciPy's linear operators, and programs."""

import copy
import os
import pickle
import sys
import time

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from scipy import ndimage, sparse
from scipy.sparse.linalg import LinearOperator as ScipyLinear
from scipy.sparse.linalg import aslinearoperator

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import (
    ExternalProgram,
    LinearOperator,
    NumpyOperator,
    Operator,
    ScipyLinearOperator,
    ScipyOperator,
    as_operator,
)
from dpnp_shared.operators.external_program import ProgramError

SHAPE = (2, 3, 4)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def square_sums(x):
    return (x**2).sum(axis=(1, 2))  # (B, C, H, W) -> (B, W)


def square_sums_vjp(x, v):
    return 2 * x * v[:, None, None, :]


def spectrum(x):
    return np.fft.fft2(x) ** 2


def spectrum_vjp(x, v):  # J u = 2 F(x) F(u), J^H v = F^H(2 conj(F(x)) v)
    return np.fft.ifft2(2 * np.conj(np.fft.fft2(x)) * v) * x.shape[-1] * x.shape[-2]


# NumPy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_numpy_function_gives_its_values_in_the_images_precision(dtype):
    x = normal(3, *SHAPE, dtype=dtype)
    batched = NumpyOperator(square_sums)
    one_by_one = NumpyOperator(lambda image: ndimage.gaussian_filter(image, 0.7), per_image=True)
    assert batched(x).dtype == one_by_one(x).dtype == dtype
    torch.testing.assert_close(batched(x), x.square().sum((1, 2)))
    expected = np.stack([ndimage.gaussian_filter(image, 0.7) for image in x.numpy()])
    torch.testing.assert_close(one_by_one(x), torch.from_numpy(expected))
    assert NumpyOperator(spectrum)(x).dtype == dtype.to_complex()
    levels = NumpyOperator(lambda image: np.floor(image).astype(np.int64), per_image=True)(x[:1])
    torch.testing.assert_close(levels, x[:1].floor(), rtol=0, atol=0)
    scalars = NumpyOperator(np.max, per_image=True)(x)
    assert scalars.tolist() == x.amax((1, 2, 3)).tolist()


def test_a_numpy_function_may_write_into_its_argument_and_reuse_its_result():
    kept = np.empty((2, 24))

    def careless(x):
        x *= 2
        kept[:] = x.reshape(len(x), -1)
        return kept

    x = normal(2, *SHAPE)
    before, operator = x.clone(), NumpyOperator(careless)
    first = operator(x)
    assert torch.equal(x, before)
    operator(-x)
    torch.testing.assert_close(first, 2 * before.flatten(1))


@pytest.mark.parametrize(("function", "vjp"), [(square_sums, square_sums_vjp), (spectrum, spectrum_vjp)])
@pytest.mark.parametrize("per_image", [False, True])
def test_a_vector_jacobian_product_makes_it_differentiable(function, vjp, per_image):
    def of_image(f):
        return lambda *arrays: f(*(array[None] for array in arrays))[0]

    functions = [of_image(f) if per_image else f for f in (function, vjp)]
    operator = NumpyOperator(functions[0], SHAPE, per_image, functions[1])
    assert operator.differentiable
    assert not NumpyOperator(function).differentiable
    x = normal(2, *SHAPE).requires_grad_(True)
    assert torch.autograd.gradcheck(operator, x)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.gradgradcheck(operator, x)
    model = ForwardModel(operator, GaussianNoise(0.3))
    y = model.simulate(x.detach()[:1], generator=torch.Generator().manual_seed(1))[0]
    (gradient,) = torch.autograd.grad(model.log_likelihood(x, y).sum(), x)
    assert gradient.shape == x.shape


def test_what_a_numpy_function_gives_is_checked():
    x = normal(3, *SHAPE)
    with pytest.raises(ValueError, match=r"sum gave shape \(\) for 3 images.*per_image"):
        NumpyOperator(np.sum)(x)
    with pytest.raises(TypeError, match="gave an array of dtype <U1"):
        NumpyOperator(lambda x: ["a"] * len(x))(x)
    with pytest.raises(ValueError, match=r"gave the shapes \[\(1,\), \(2,\)\]"):
        NumpyOperator(lambda image: np.zeros(1 + int(image.max() > 9)), per_image=True)(x + 9 * (x == x.amax()))
    with pytest.raises(ValueError, match=r"\(3, 2, 3, 4\).*\(B, 1, 3, 4\)"):
        NumpyOperator(square_sums, (1, 3, 4))(x)
    with pytest.raises(TypeError, match="function is 'square_sums'"):
        NumpyOperator("square_sums")
    bad = NumpyOperator(square_sums, vjp=lambda x, v: v)
    with pytest.raises(ValueError, match=r"vjp gave shape \(3, 4\)"):
        bad(x.requires_grad_(True)).sum().backward()


def test_not_a_number_is_a_likelihood_of_zero_for_samplers():
    operator = NumpyOperator(lambda x: np.where(x > 1, np.nan, x))
    x = torch.tensor([0.5, 1.5]).reshape(2, 1, 1, 1)
    log_l = ForwardModel(operator, GaussianNoise(1.0)).log_likelihood(x, torch.zeros(1, 1, 1))
    assert log_l.isfinite().tolist() == [True, False]


# SciPy


def matrix(complex_valued=False):
    real, imaginary = normal(5, 24), normal(5, 24, seed=1)
    dense = (real + 1j * imaginary if complex_valued else real).numpy()
    return np.where(real.abs().numpy() > 0.5, dense, 0)


def kinds(dense):
    """The same matrix as all that SciPy has."""
    yield sparse.csr_array(dense)
    yield sparse.coo_matrix(dense)
    yield aslinearoperator(sparse.csc_array(dense))
    yield ScipyLinear(dense.shape, matvec=lambda v: dense @ v, rmatvec=lambda u: dense.conj().T @ u, dtype=dense.dtype)


@pytest.mark.parametrize("complex_valued", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipys_operators_apply_their_matrix_and_its_adjoint(complex_valued, dtype):
    dense, x = matrix(complex_valued), normal(3, *SHAPE, dtype=dtype)
    full = dtype.to_complex() if complex_valued else dtype
    A = torch.from_numpy(dense).to(full)
    for kind in kinds(dense):
        operator = ScipyOperator(kind, SHAPE, y_shape=(5, 1))
        assert type(operator) is ScipyLinearOperator
        assert isinstance(operator, LinearOperator)
        assert operator.differentiable
        y = operator(x)
        assert y.dtype == full
        torch.testing.assert_close(y, (x.flatten(1).to(full) @ A.T)[..., None])
        adjoint = operator.adjoint(y)
        assert adjoint.dtype == dtype
        expected = y.flatten(1) @ A.conj()
        torch.testing.assert_close(adjoint.flatten(1), expected.real if complex_valued else expected)
    assert operator.norm() == pytest.approx(
        float(torch.linalg.matrix_norm(torch.cat([A.real, A.imag]) if complex_valued else A, 2)), rel=1e-4
    )


@pytest.mark.parametrize("complex_valued", [False, True])
def test_the_gradient_of_scipys_operators_is_their_adjoint_at_every_order(complex_valued):
    operator = ScipyOperator(sparse.csr_array(matrix(complex_valued)), SHAPE)
    x = normal(2, *SHAPE).requires_grad_(True)
    assert torch.autograd.gradcheck(operator, x)
    assert torch.autograd.gradgradcheck(operator, x)
    y = operator(x).detach().requires_grad_(True)
    assert torch.autograd.gradcheck(operator.adjoint, y)


def test_scipys_operator_without_an_adjoint_gives_values_only():
    dense, x = matrix(), normal(2, *SHAPE)
    for kind in (
        ScipyLinear(dense.shape, matvec=lambda v: dense @ v),
        aslinearoperator(dense) @ ScipyLinear((24, 24), matvec=lambda v: 2 * v, dtype=float),
    ):
        operator = ScipyOperator(kind, SHAPE)
        assert type(operator) is ScipyOperator
        assert not operator.differentiable
        assert not operator(x.requires_grad_(True)).requires_grad
        with pytest.raises(TypeError, match="without rmatvec"):
            ScipyLinearOperator(kind, SHAPE)
    torch.testing.assert_close(operator(x), 2 * x.flatten(1) @ torch.from_numpy(dense).T)


def test_scipys_operators_come_from_files_and_survive_copies(tmp_path):
    A = sparse.csr_array(matrix())
    sparse.save_npz(tmp_path / "A.npz", A)
    operator, x = ScipyOperator(str(tmp_path / "A.npz"), SHAPE), normal(2, *SHAPE)
    assert isinstance(operator, ScipyLinearOperator)
    torch.testing.assert_close(operator(x), ScipyOperator(A, SHAPE)(x), rtol=0, atol=0)
    for other in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        torch.testing.assert_close(other(x), operator(x), rtol=0, atol=0)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--operator", type=Operator)
    config = {
        "class_path": "dpnp_shared.operators.ScipyOperator",
        "init_args": {"A": str(tmp_path / "A.npz"), "image_shape": [2, 3, 4]},
    }
    built = parser.instantiate(parser.parse_object({"operator": config})).operator
    torch.testing.assert_close(built(x), operator(x), rtol=0, atol=0)


def test_what_scipys_operator_is_given_is_checked(tmp_path):
    A = sparse.csr_array(matrix())
    for build, kind, words in [
        (lambda: ScipyOperator(A, (1, 3, 4)), ValueError, r"A has shape \(5, 24\).*\(m, 12\)"),
        (lambda: ScipyOperator(A, SHAPE, y_shape=(2, 2)), ValueError, r"y_shape = \(2, 2\) holds 4 entries; A gives 5"),
        (lambda: ScipyOperator(matrix(), SHAPE), TypeError, "MatrixOperator"),
        (lambda: ScipyOperator([[1.0]], SHAPE), TypeError, "A is a list"),
        (lambda: ScipyOperator("A.mat", SHAPE), ValueError, "'A.mat'.*npz"),
        (lambda: ScipyOperator(str(tmp_path / "A.npz"), SHAPE), FileNotFoundError, "A.npz"),
        (lambda: ScipyOperator(A * np.nan, SHAPE), ValueError, "NaN or infinite"),
        (lambda: ScipyOperator(A, SHAPE)(normal(1, 2, 4, 4)), ValueError, r"\(1, 2, 4, 4\)"),
        (lambda: ScipyOperator(A, SHAPE).adjoint(normal(1, 4)), ValueError, r"\(1, 4\).*\(B, 5\)"),
        (lambda: as_operator(A), ValueError, "csr_array of SciPy; give ScipyOperator"),
    ]:
        with pytest.raises(kind, match=words):
            build()
    assert isinstance(as_operator(A, SHAPE), ScipyLinearOperator)


# programs

ECHO = """
import sys
receive, send = sys.stdin.buffer, sys.stdout.buffer
while length := receive.read(8):
    content = receive.read(int.from_bytes(length, "little"))
    send.write(length + content)
    send.flush()
"""
ONCE = ECHO.replace("while length :=", "if length :=")


def python(source, tmp_path):
    file = tmp_path / f"program_{abs(hash(source))}.py"
    file.write_text(source)
    return [sys.executable, "-S", "-E", str(file)]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert not any(folder.iterdir())


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("way", ["files", "pipes", "persistent"])
def test_programs_give_their_values(per_image, workers, way, tmp_path, temporary):
    command = {"files": "cp '{input}' {output}", "pipes": "cat", "persistent": python(ECHO, tmp_path)}[way]
    operator = ExternalProgram(
        command, SHAPE, per_image=per_image, workers=workers, persistent=way == "persistent", timeout=30
    )
    assert not operator.differentiable
    for x in (normal(5, *SHAPE), normal(1, *SHAPE, dtype=torch.float32)):
        assert torch.equal(operator(x), x)
    operator.close()


def test_words_of_a_command_are_no_shells(tmp_path, temporary):
    marker = tmp_path / "marker"
    operator = ExternalProgram(f"cp {{input}} {{output}} ; touch {marker}")
    with pytest.raises(ProgramError, match="status 1"):
        operator(normal(1, *SHAPE))
    assert not marker.exists()
    assert operator.words[3:] == [";", "touch", str(marker)]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sh -c 'for i in $(seq 30); do echo line $i >&2; done; exit 3'", r"status 3\n  line 21\n(.*\n)*  line 30$"),
        ("sh -c 'kill -9 $$'", "status -9"),
        ("sleep 30", r"took more than 0\.2 s"),
        ("sh -c 'sleep 30 & sleep 30'", r"took more than 0\.2 s"),
        ("echo hello", r"gave 6 bytes that are no \.npy array"),
        ("true {input} {output}", "ended well, but has not written {output}"),
        ("sh -c 'echo x > $1' sh {output} {input}", r"no \.npy array"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_program_that_fails_is_one_message(command, words, workers, temporary):
    operator = ExternalProgram(command, timeout=0.2 if "sleep" in command else 30, workers=workers)
    start = time.perf_counter()
    with pytest.raises(ProgramError, match=words):
        operator(normal(2, *SHAPE))
    assert time.perf_counter() - start < 10


def test_what_a_program_gives_is_checked(tmp_path):
    np.save(tmp_path / "fixed.npy", np.zeros((2, 7)))
    fixed = f"cp {tmp_path}/fixed.npy {{output}} {{input}}"
    with pytest.raises(ProgramError, match="status 1"):  # cp takes the last as a folder
        ExternalProgram(fixed)(normal(2, *SHAPE))
    fixed = f"sh -c 'cp {tmp_path}/fixed.npy $1' sh {{output}} {{input}}"
    with pytest.raises(ValueError, match=r"'sh' gave shape \(2, 7\) for 3 images"):
        ExternalProgram(fixed, per_image=False)(normal(3, *SHAPE))
    assert ExternalProgram(fixed, per_image=False)(normal(2, *SHAPE)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 4\).*\(B, 1, 3, 4\)"):
        ExternalProgram("cat", (1, 3, 4))(normal(1, *SHAPE))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"command": ""}, ValueError, "command is empty"),
        ({"command": "no_such_program_here -x"}, FileNotFoundError, "no program 'no_such_program_here'"),
        ({"command": "cp {input} there"}, ValueError, "both of {input} and {output}"),
        ({"command": "cp {input} {output}", "persistent": True}, ValueError, "uses its pipes"),
        ({"command": "cat", "timeout": 0}, ValueError, "timeout = 0"),
        ({"command": "cat", "workers": 0}, ValueError, "workers = 0"),
        ({"command": "cat", "image_shape": (1, 2)}, ValueError, "image_shape"),
    ],
)
def test_arguments_of_a_program_are_checked(arguments, kind, words):
    with pytest.raises(kind, match=words):
        ExternalProgram(**arguments)


def alive(operator):
    return [p.process.pid for p in operator._processes if p.process is not None and p.process.poll() is None]


def test_a_persistent_program_is_started_once_and_ends_with_its_operator(tmp_path):
    operator, x = ExternalProgram(python(ECHO, tmp_path), persistent=True, timeout=30), normal(2, *SHAPE)
    operator(x)
    (pid,) = alive(operator)
    operator(x)
    assert alive(operator) == [pid]
    other = copy.deepcopy(operator)
    assert torch.equal(other(x), x)
    (second,) = alive(other)
    assert second != pid
    other.close()
    assert alive(other) == []
    assert torch.equal(other(x), x)
    process = operator._processes[0].process
    del operator
    assert process.wait(10) == 0  # its input has ended, and it has stopped by itself


def test_a_persistent_program_that_has_died_is_started_again_once(tmp_path):
    operator, x = ExternalProgram(python(ECHO, tmp_path), persistent=True, timeout=30), normal(1, *SHAPE)
    operator(x)
    os.kill(alive(operator)[0], 9)
    assert torch.equal(operator(x), x)
    once = ExternalProgram(python(ONCE, tmp_path), persistent=True, timeout=30)  # ends after each answer
    for _ in range(3):
        assert torch.equal(once(x), x)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import sys\nsys.exit('no licence')", r"status 1 before it had answered\n  no licence"),
        ("import time\ntime.sleep(30)", r"took more than 0\.3 s"),
        ("import os, time\nos.close(1)\ntime.sleep(30)", "closed its standard"),
        ("print('Loading the model', flush=True)\nimport time\ntime.sleep(30)", "b'Loading '.*standard error"),
        (ECHO.replace("length + content", "length + bytes(len(content))"), r"no \.npy array"),
    ],
)
def test_a_persistent_program_that_fails_is_one_message(source, words, tmp_path, monkeypatch):
    monkeypatch.setattr("dpnp_shared.operators.external_program.CLOSING_TIME", 0.2)
    timeout = 0.3 if "took" in words else 30
    operator = ExternalProgram(python(source, tmp_path), persistent=True, timeout=timeout)
    with pytest.raises(ProgramError, match=words):
        operator(normal(1, *SHAPE))
    operator.close()
    assert alive(operator) == []


def test_programs_are_built_from_plain_values():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--operator", type=Operator)
    arguments = {"command": "cat", "image_shape": [1, 2, 2], "per_image": False, "workers": 2, "timeout": 5}
    config = {"operator": {"class_path": "dpnp_shared.operators.ExternalProgram", "init_args": arguments}}
    operator = parser.instantiate(parser.parse_object(config)).operator
    x = torch.ones(3, 1, 2, 2)
    assert torch.equal(operator(x), x)
    assert "'cat'" in repr(operator)
    again = pickle.loads(pickle.dumps(operator))
    assert torch.equal(again(x), x)
