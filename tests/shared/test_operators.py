"""One suite over all operators. A new one is one entry of ``OPERATORS``; its equation is tested in a file beside this."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import pickle
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dpnp_shared import operators
from dpnp_shared.operators import (
    MRI,
    BeerLambert,
    BicubicSuperResolution,
    BoxInpainting,
    CircularConvolution,
    ClosurePhases,
    CodedDiffraction,
    Compose,
    CompressedSensing,
    Convolution,
    CubicAverages,
    DarcyFlow,
    DitheredQuantisation,
    ExternalProgram,
    FanBeamCT,
    FunctionOperator,
    GaussianBlur,
    HighDynamicRange,
    Identity,
    Inpainting,
    KernelBlur,
    LinearCompose,
    LinearOperator,
    LinearStack,
    LocalAverages,
    LogClosureAmplitudes,
    MatrixOperator,
    MotionBlur,
    NonCartesianMRI,
    NonlinearBlur,
    NumpyOperator,
    Operator,
    ParallelBeamCT,
    PhaseRetrieval,
    PhysicalUnits,
    Ptychography,
    Quantisation,
    RadialMRI,
    RandomInpainting,
    RayTransform,
    Scaled,
    ScipyLinearOperator,
    ScipyOperator,
    Stack,
    SuperResolution,
    TotalFlux,
    Visibilities,
    ZeroPadding,
    as_operator,
)


class VerticalDifference(LinearOperator):
    """A user's operator: forward only, everything else by default."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :, 1:] - 2 * x[:, :, :-1]).flatten(1)


class Pairs(LinearOperator):
    """Likewise, with complex measurements."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x[..., 1:], 2 * x[..., :-1])


def bend(x: Tensor) -> Tensor:
    """A user's function."""
    return x.sin()


def simulate(x: Tensor) -> Tensor:
    """A user's simulator outside of PyTorch."""
    return torch.from_numpy(np.cumsum(np.tanh(x.numpy()), axis=-1))


def shift(x: np.ndarray) -> np.ndarray:
    """A user's NumPy function."""
    return np.tanh(x[..., 1:] - x[..., :-1])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DENSE = normal(7, 24, seed=5).numpy()


def apply_dense(v: np.ndarray) -> np.ndarray:
    """A matrix that a user has no transpose of."""
    return DENSE @ v


SPARSE = scipy.sparse.linalg.aslinearoperator(scipy.sparse.csr_array(DENSE))
ONE_WAY = scipy.sparse.linalg.LinearOperator((7, 24), matvec=apply_dense, dtype=np.float64)
ECHO = "import sys, numpy; numpy.save(sys.argv[2], numpy.load(sys.argv[1])[..., ::-1])"


class Case(NamedTuple):
    """An operator as a config gives it, on images of few pixels, and what it is known not to do.

    The shape must not be square and must have several channels in one case of each class at least, unless the
    class refuses such images.
    """

    operator: type[Operator]
    init_args: dict[str, Any]
    image_shape: tuple[int, int, int] | None = None  # where init_args has none
    gram_function: bool = True  # of a linear operator: functions of A^T A in closed form
    differentiable: bool = True
    checks_shape: bool = True  # refuses images of another shape
    cpu_only: bool = False  # leaves PyTorch, or has as many iterations as the data need
    norm_error: float = 1e-5  # relative, of the norm; larger where two singular values are close


def part(operator: type[Operator], **init_args: Any) -> dict[str, Any]:
    """An operator within another one's arguments."""
    return {"class_path": f"dpnp_shared.operators.{operator.__name__}", "init_args": init_args}


SHAPE = [2, 6, 4]
POINTS = {  # four stations at one time
    "class_path": "dpnp_shared.operators.Coverage",
    "init_args": {
        "points": [
            [1e9, 2e9, 0, 1, 0],
            [-2e9, 1e9, 0, 2, 0],
            [3e9, -1e9, 0, 3, 0],
            [-3e9, -1e9, 1, 2, 0],
            [2e9, -3e9, 1, 3, 0],
            [5e9, -2e9, 2, 3, 0],
        ]
    },
}
OPERATORS = {
    "matrix_wide": Case(MatrixOperator, {"A": normal(4, 6).tolist(), "image_shape": [2, 1, 3]}),
    "matrix_tall": Case(MatrixOperator, {"A": normal(8, 6).tolist(), "image_shape": [2, 1, 3]}),
    "matrix_rank_deficient": Case(
        MatrixOperator, {"A": (normal(4, 2) @ normal(2, 6, seed=1)).tolist(), "image_shape": [2, 1, 3]}
    ),
    "mask": Case(Inpainting, {"mask": [[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 1]]}, (2, 3, 4)),
    "mask_per_channel": Case(Inpainting, {"mask": [[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]]}, (2, 2, 3)),
    "random": Case(RandomInpainting, {"image_shape": [2, 5, 4], "missing": 0.3, "seed": 1}),
    "random_per_channel": Case(RandomInpainting, {"image_shape": [2, 5, 4], "missing": 0.3, "per_channel": True}),
    "box": Case(BoxInpainting, {"image_shape": [2, 5, 4], "top": 1, "left": 0, "height": 2, "width": 3}),
    "super_resolution_2": Case(SuperResolution, {"image_shape": SHAPE, "factor": 2}),
    "super_resolution_3": Case(SuperResolution, {"image_shape": [1, 6, 9], "factor": 3}),
    "blur_odd": Case(GaussianBlur, {"image_shape": [2, 5, 7], "sigma": 0.8}),
    "blur_even": Case(GaussianBlur, {"image_shape": SHAPE, "sigma": 1.5}),
    "circular": Case(CircularConvolution, {"image_shape": [2, 5, 4], "kernel": normal(3, 2).tolist()}),
    "circular_wrapped": Case(CircularConvolution, {"image_shape": [1, 5, 4], "kernel": normal(9, 7).tolist()}),
    "kernel_blur": Case(KernelBlur, {"image_shape": [2, 5, 4], "kernel": normal(3, 2).abs().tolist()}),
    "motion_blur": Case(MotionBlur, {"image_shape": [2, 5, 8], "length": 3.7, "angle": 25}),
    "motion_blur_wrapped": Case(MotionBlur, {"image_shape": [1, 4, 3], "length": 6, "angle": -90}),
    "convolution_valid": Case(
        Convolution, {"image_shape": [2, 5, 6], "kernel": normal(3, 2).tolist()}, gram_function=False
    ),
    "convolution_reflect": Case(
        Convolution,
        {"image_shape": [2, 5, 4], "kernel": normal(4, 3).tolist(), "boundary": "reflect"},
        gram_function=False,
    ),
    "convolution_reflect_large": Case(
        Convolution,
        {"image_shape": [1, 3, 4], "kernel": normal(9, 6).tolist(), "boundary": "reflect"},
        gram_function=False,
    ),
    "bicubic_2": Case(BicubicSuperResolution, {"image_shape": SHAPE, "factor": 2}),
    "bicubic_3": Case(BicubicSuperResolution, {"image_shape": [1, 6, 9], "factor": 3}),
    "sensing_gaussian": Case(CompressedSensing, {"image_shape": [2, 3, 4], "measurements": 7}),
    "sensing_gaussian_tall": Case(CompressedSensing, {"image_shape": [2, 3, 4], "measurements": 30}),
    "sensing_hadamard": Case(
        CompressedSensing, {"image_shape": [3, 2, 4], "measurements": 9, "transform": "hadamard", "seed": 1}
    ),
    "sensing_dct": Case(CompressedSensing, {"image_shape": [2, 3, 5], "measurements": 11, "transform": "dct"}),
    "sensing_dct_full": Case(CompressedSensing, {"image_shape": [2, 3, 5], "measurements": 30, "transform": "dct"}),
    "linear_compose": Case(
        LinearCompose,
        {
            "operators": [
                part(GaussianBlur, image_shape=SHAPE, sigma=0.8),
                part(SuperResolution, image_shape=SHAPE, factor=2),
            ]
        },
        gram_function=False,
    ),
    "linear_stack": Case(
        LinearStack,
        {
            "operators": [
                part(SuperResolution, image_shape=SHAPE, factor=2),
                part(BoxInpainting, image_shape=SHAPE, top=1, left=0, height=2, width=3),
            ]
        },
        gram_function=False,
    ),
    "defaults": Case(VerticalDifference, {"image_shape": [2, 4, 3]}, gram_function=False, checks_shape=False),
    "defaults_complex": Case(Pairs, {"image_shape": [2, 4, 3]}, gram_function=False, checks_shape=False),
    "function": Case(FunctionOperator, {"function": f"{__name__}.bend"}, (2, 3, 4), checks_shape=False),
    "simulator": Case(
        FunctionOperator,
        {"function": f"{__name__}.simulate", "differentiable": False},
        (2, 3, 4),
        differentiable=False,
        checks_shape=False,
        cpu_only=True,
    ),
    "high_dynamic_range": Case(HighDynamicRange, {"gain": 1.5, "low": -1, "high": 0.5}, (2, 3, 4), checks_shape=False),
    "nonlinear_blur": Case(
        NonlinearBlur, {"image_shape": [2, 3, 4], "kernel": [[1, 2], [3, 4]], "gamma": 1, "saturation": 0.5}
    ),
    "nonlinear_blur_gamma": Case(
        NonlinearBlur,
        {"image_shape": [2, 3, 4], "kernel": [[1, 2]], "gamma": 2.2, "saturation": 0, "value_range": [0, 1]},
    ),
    "diffraction_octanary": Case(CodedDiffraction, {"image_shape": [2, 3, 4], "masks": 2, "seed": 1}),
    "diffraction_phase": Case(CodedDiffraction, {"image_shape": [2, 3, 4], "masks": 2, "kind": "phase"}),
    "ptychography": Case(Ptychography, {"image_shape": [2, 3, 4], "probe_size": 3, "step": 1}),
    "ptychography_disk": Case(Ptychography, {"image_shape": [2, 6, 9], "probe_size": 4, "step": 3, "probe": "disk"}),
    "phase_retrieval": Case(PhaseRetrieval, {"image_shape": [2, 3, 4], "oversampling": 1.5, "value_range": [-1, 1]}),
    "one_bit": Case(DitheredQuantisation, {"image_shape": [2, 3, 4], "looks": 3, "dither": 0.5}),
    "quantisation": Case(Quantisation, {"levels": 8}, (2, 3, 4), differentiable=False, checks_shape=False),
    "compose": Case(
        Compose, {"operators": [part(GaussianBlur, image_shape=[2, 3, 4], sigma=0.8), part(HighDynamicRange)]}
    ),
    "compose_quantised": Case(
        Compose,
        {"operators": [part(GaussianBlur, image_shape=[2, 3, 4], sigma=0.8), part(Quantisation, levels=8)]},
        differentiable=False,
    ),
    "stack": Case(
        Stack,
        {"operators": [part(HighDynamicRange), part(CodedDiffraction, image_shape=[2, 3, 4], masks=1)]},
    ),
    "local_averages": Case(
        LocalAverages, {"image_shape": [1, 5, 4], "points": [[0.2, 0.3], [0.5, 0.9]], "width": 0.2}, gram_function=False
    ),
    "cubic_averages": Case(
        CubicAverages, {"image_shape": [1, 5, 4], "points": [[0.2, 0.3], [0.5, 0.9]], "width": 0.2, "cubic": 0.5}
    ),
    "darcy": Case(
        DarcyFlow, {"image_shape": [1, 5, 4], "points": [[0.2, 0.3], [0.5, 0.9]], "tolerance": 1e-12}, cpu_only=True
    ),
    "identity": Case(Identity, {"image_shape": [2, 3, 4]}),
    "zero_padding": Case(ZeroPadding, {"image_shape": [2, 3, 4], "padding": [1, 0, 2, 3]}),
    "scaled": Case(Scaled, {"operator": part(GaussianBlur, image_shape=[2, 3, 4], sigma=0.8), "scale": -2}),
    "physical_units": Case(
        PhysicalUnits,
        {
            "operator": part(GaussianBlur, image_shape=[2, 3, 4], sigma=0.8),
            "value_range": [0, 1],
            "physical_range": [3, 1],
        },
    ),
    "physical_units_clamped": Case(PhysicalUnits, {"clamp": True}, (2, 3, 4), checks_shape=False),
    "parallel_beam": Case(
        ParallelBeamCT, {"image_shape": [2, 5, 6], "angles": 4, "pixel_size": 0.5}, gram_function=False
    ),
    "parallel_beam_arc": Case(
        ParallelBeamCT, {"image_shape": [1, 6, 5], "angles": 3, "arc": 60, "detectors": 7}, gram_function=False
    ),
    "fan_beam": Case(
        FanBeamCT,
        {"image_shape": [2, 5, 6], "angles": 4, "source_distance": 20, "detector_distance": 10},
        gram_function=False,
    ),
    "rays": Case(
        RayTransform,
        {"image_shape": [2, 3, 4], "points": [[0, 0], [0.3, -0.2]], "directions": [[1, 0.2], [0.1, 1]]},
        gram_function=False,
    ),
    "beer_lambert": Case(
        BeerLambert, {"operator": part(ParallelBeamCT, image_shape=[2, 4, 5], angles=3, pixel_size=0.1), "photons": 100}
    ),
    "mri": Case(MRI, {"image_shape": [1, 6, 8], "mask": "random", "acceleration": 2}),
    "mri_complex": Case(MRI, {"image_shape": [2, 5, 6], "mask": "poisson_disc", "acceleration": 2}),
    "mri_coils": Case(
        MRI,
        {"image_shape": [1, 6, 5], "mask": "equispaced", "acceleration": 2, "coils": 3},
        gram_function=False,
        norm_error=1e-4,
    ),
    "mri_radial_complex": Case(
        RadialMRI, {"image_shape": [2, 6, 7], "spokes": 3, "angles": "uniform"}, gram_function=False, cpu_only=True
    ),
    "mri_radial": Case(
        RadialMRI, {"image_shape": [1, 6, 7], "spokes": 3, "coils": 2}, gram_function=False, cpu_only=True
    ),
    "mri_trajectory": Case(
        NonCartesianMRI,
        {"image_shape": [2, 5, 6], "trajectory": [[0.0, 0.0], [1.3, -2.1], [0.4, 2.2]]},
        gram_function=False,
        cpu_only=True,
    ),
    "visibilities": Case(Visibilities, {"image_shape": [1, 5, 6], "coverage": POINTS, "field_of_view": 100}),
    "total_flux": Case(TotalFlux, {"image_shape": [2, 3, 4]}),
    "closure_phases": Case(ClosurePhases, {"image_shape": [1, 5, 6], "coverage": POINTS, "field_of_view": 100}),
    "log_closure_amplitudes": Case(
        LogClosureAmplitudes, {"image_shape": [1, 5, 6], "coverage": POINTS, "field_of_view": 100}
    ),
    "numpy": Case(
        NumpyOperator,
        {"function": f"{__name__}.shift", "image_shape": [2, 3, 4]},
        differentiable=False,
        cpu_only=True,
    ),
    "scipy_linear": Case(
        ScipyLinearOperator, {"A": f"{__name__}.SPARSE", "image_shape": [2, 3, 4]}, gram_function=False, cpu_only=True
    ),
    "scipy_one_way": Case(
        ScipyOperator, {"A": f"{__name__}.ONE_WAY", "image_shape": [2, 3, 4]}, differentiable=False, cpu_only=True
    ),
    "program": Case(
        ExternalProgram,
        {"command": [sys.executable, "-c", ECHO, "{input}", "{output}"], "image_shape": [2, 3, 4], "per_image": False},
        differentiable=False,
        cpu_only=True,
    ),
}
LINEAR = [name for name, case in OPERATORS.items() if issubclass(case.operator, LinearOperator)]


def build(case: Case, **changed: Any) -> Operator:
    """As the command line does, from the text of a config."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--operator", type=Operator)
    shipped = case.operator.__name__ in operators.__all__
    module = "dpnp_shared.operators" if shipped else case.operator.__module__
    config = {"class_path": f"{module}.{case.operator.__name__}", "init_args": {**case.init_args, **changed}}
    text = yaml.safe_dump({"operator": config})
    operator = parser.instantiate(parser.parse_string(text)).operator
    assert isinstance(operator, case.operator)
    return operator


@functools.cache
def built(name: str) -> tuple[Operator, tuple[int, int, int]]:
    """The operator of a case, and its image shape."""
    case = OPERATORS[name]
    operator = build(case)
    shape = case.image_shape or operator.image_shape or case.init_args["image_shape"]
    return operator, tuple(shape)


@functools.cache
def matrix(name: str) -> Tensor:
    """The matrix (m, d) of a linear operator; complex measurements as pairs of reals."""
    operator, shape = built(name)
    d = math.prod(shape)
    return flat(operator(torch.eye(d, dtype=torch.float64).reshape(d, *shape))).T


def flat(y: Tensor) -> Tensor:
    """(B, *y_shape) as (B, m); complex entries as pairs of reals."""
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1)


def unflat(y: Tensor, like: Tensor) -> Tensor:
    """The inverse of flat, in the shape and kind of ``like``."""
    return torch.view_as_complex(y.reshape(*like.shape, 2)) if like.is_complex() else y.reshape(like.shape)


@pytest.fixture(params=OPERATORS)
def case(request: pytest.FixtureRequest) -> tuple[Case, Operator, tuple[int, int, int]]:
    """An entry of the list, its operator (one's own), and its image shape."""
    operator, shape = built(request.param)
    return OPERATORS[request.param], copy.deepcopy(operator), shape


@pytest.fixture(params=LINEAR)
def linear_case(request: pytest.FixtureRequest) -> tuple[Case, LinearOperator, tuple[int, int, int], Tensor]:
    """An entry of the list, its linear operator, its image shape, and its matrix (m, d)."""
    operator, shape = built(request.param)
    return OPERATORS[request.param], copy.deepcopy(operator), shape, matrix(request.param)


def test_every_exported_operator_is_in_the_list():
    exported = [getattr(operators, name) for name in operators.__all__]
    classes = {c for c in exported if isinstance(c, type) and issubclass(c, Operator) and not inspect.isabstract(c)}
    assert len(classes) > 20
    assert sorted(c.__name__ for c in classes - {case.operator for case in OPERATORS.values()}) == []


@pytest.mark.parametrize("kind", sorted({case.operator for case in OPERATORS.values()}, key=lambda c: c.__name__))
def test_cases_are_not_square_and_have_several_channels(kind):
    names = [name for name, case in OPERATORS.items() if case.operator is kind]
    shapes = [built(name)[1] for name in names]
    if not any(c > 1 for c, _, _ in shapes):
        with pytest.raises(ValueError, match=r"image_shape|channel"):
            build(OPERATORS[names[0]], image_shape=[2, *shapes[0][1:]])
    if not any(h != w for _, h, w in shapes):
        with pytest.raises(ValueError, match=r"image_shape|square"):
            build(OPERATORS[names[0]], image_shape=[shapes[0][0], shapes[0][1], 2 * shapes[0][2]])


def test_linear_operator_applies_its_matrix(linear_case):
    _, operator, shape, A = linear_case
    x = normal(3, *shape)
    torch.testing.assert_close(flat(operator(x)), x.flatten(1) @ A.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator(2 * x[:1] - x[1:2]), 2 * operator(x[:1]) - operator(x[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_adjoint_is_the_transpose(linear_case, dtype, tolerance):
    _, operator, shape, A = linear_case
    x = normal(3, *shape, seed=3).to(dtype)
    Ax = operator(x)
    y = unflat(normal(3, A.shape[0], seed=2), Ax).to(Ax.dtype)
    back = operator.adjoint(y)
    assert back.shape == (3, *shape)
    assert back.dtype == dtype
    torch.testing.assert_close(back.flatten(1).double(), flat(y).double() @ A, rtol=0, atol=10 * tolerance)
    # Re <Ax, y> = <x, A^T y>
    left, right = (flat(Ax) * flat(y)).double().sum(1), (x * back).double().flatten(1).sum(1)
    scale = flat(Ax).double().norm(dim=1) * flat(y).double().norm(dim=1)
    assert bool(((left - right).abs() <= tolerance * scale).all())


def test_norm_is_the_largest_singular_value(linear_case):
    case, operator, _, A = linear_case
    largest = float(torch.linalg.matrix_norm(A, 2))
    assert operator.norm() == pytest.approx(largest, rel=case.norm_error)
    assert operator.to(torch.float32).norm() == pytest.approx(largest, rel=10 * case.norm_error)


def test_gram_function_matches_dense_algebra(linear_case):
    case, operator, shape, A = linear_case
    x = normal(3, *shape, seed=4)
    assert operator.has_gram_function == case.gram_function
    if not case.gram_function:
        with pytest.raises(NotImplementedError, match="has_gram_function"):
            operator.gram_function(lambda s: s, x)
        return
    torch.testing.assert_close(
        operator.gram_function(lambda s: s, x), operator.adjoint(operator(x)), rtol=0, atol=1e-10
    )
    eigenvalues, V = torch.linalg.eigh(A.T @ A)
    for f in (lambda s: 1 / (1 + s), lambda s: (1 + s) ** -0.5, lambda s: torch.exp(-s)):
        expected = x.flatten(1) @ V * f(eigenvalues.clamp_min(0)) @ V.T
        torch.testing.assert_close(operator.gram_function(f, x).flatten(1), expected, rtol=0, atol=1e-11)
        assert operator.gram_function(f, x.float()).dtype == torch.float32


def test_linear_operators_are_declared_so(case):
    entry, operator, _ = case
    assert isinstance(operator, LinearOperator) == issubclass(entry.operator, LinearOperator)


def derivatives(operator: Operator, x: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Jv by autograd and by differences, (B, m) both, and J^T u by autograd, (B, C, H, W)."""
    step = 1e-5
    with torch.no_grad():
        difference = flat(operator(x + step * v) - operator(x - step * v)) / (2 * step)
    _, jvp = torch.autograd.functional.jvp(lambda x: flat(operator(x)), x, v)
    x = x.clone().requires_grad_()
    (vjp,) = torch.autograd.grad(flat(operator(x)), x, u)
    return jvp, difference, vjp


def test_gradient_matches_differences(case):
    entry, operator, shape = case
    assert operator.differentiable == entry.differentiable
    x, v = normal(4, *shape, seed=5), normal(4, *shape, seed=6)
    u = normal(*flat(operator(x)).shape, seed=7)
    if not entry.differentiable:  # autograd has nothing, zeros, or something that is not the derivative
        try:
            y = operator(x.clone().requires_grad_())
        except RuntimeError:
            assert entry.cpu_only
            return
        if y.requires_grad:
            jvp, difference, _ = derivatives(operator, x, v, u)
            assert not bool(jvp.any()) or not torch.allclose(jvp, difference, rtol=1e-3)
        return
    jvp, difference, vjp = derivatives(operator, x, v, u)
    assert bool(difference.any(dim=1).all())  # a piecewise constant operator is not differentiable to any use
    torch.testing.assert_close(jvp, difference, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((vjp * v).flatten(1).sum(1), (jvp * u).sum(1), rtol=1e-10, atol=1e-10)


def test_images_of_a_batch_do_not_touch(case):
    _, operator, shape = case
    x = normal(3, *shape)
    kept = x.clone()
    y = operator(x)
    assert torch.equal(x, kept)
    assert y.shape[0] == 3
    for one, alone in zip(y, x[:, None], strict=True):
        torch.testing.assert_close(operator(alone)[0], one, rtol=0, atol=1e-13)
    blank = operator(torch.zeros_like(x))
    assert blank.shape == y.shape
    assert bool(blank.isfinite().all())
    if isinstance(operator, LinearOperator):
        torch.testing.assert_close(operator.adjoint(y[1:2])[0], operator.adjoint(y)[1], rtol=0, atol=1e-13)
        assert not bool(blank.any())


def test_pixelwise_operators_see_every_pixel_by_itself(case):
    _, operator, shape = case
    x = normal(1, *shape)
    if not operator.pixelwise:
        return
    unseen = torch.zeros(shape, dtype=torch.bool) if operator.unseen is None else operator.unseen.expand(shape)
    c, i, j = (~unseen).nonzero()[-1].tolist()
    x[0, c, i, j], other = -0.6, x.clone()
    other[0, c, i, j] = 0.2
    other[0, unseen] += 1
    entries, changed = (operator(images).reshape(-1, *shape) for images in (x, other))
    assert (changed != entries).any(0).nonzero().tolist() == [[c, i, j]]


def test_these_operators_are_pixelwise():
    pixelwise = {case.operator.__name__ for name, case in OPERATORS.items() if built(name)[0].pixelwise}
    assert {"Quantisation", "HighDynamicRange", "DitheredQuantisation", "Identity"} <= pixelwise
    assert Scaled(Identity((1, 4, 4)), 3.0).pixelwise
    assert Compose([HighDynamicRange(), Quantisation(4)]).pixelwise
    assert not Compose([HighDynamicRange(), GaussianBlur((1, 4, 4), 0.8)]).pixelwise
    assert PhysicalUnits(HighDynamicRange()).pixelwise
    assert not PhysicalUnits(PhaseRetrieval((1, 4, 4))).pixelwise


def test_an_empty_batch_stays_empty_or_is_refused(case):
    _, operator, shape = case
    try:
        y = operator(torch.zeros(0, *shape))
    except ValueError as error:
        assert str((0, *shape)) in str(error)  # noqa: PT017
    else:
        assert y.shape == (0, *operator(torch.zeros(1, *shape)).shape[1:])


def test_precision_follows_the_images(case):
    _, operator, shape = case
    x = normal(3, *shape)
    y = operator(x)
    assert y.dtype in (torch.float64, torch.complex128)
    single = operator(x.float())
    assert single.dtype in (torch.float32, torch.complex64)
    # an entry that falls on a step may go to the other side
    far = (flat(single).double() - flat(y)).abs() > 1e-4 * (1 + flat(y).abs())
    assert not bool(far.any())
    for dtype in (torch.float32, torch.float64):
        operator = operator.to(dtype)
        for images in (x, x.float()):
            again = operator(images)
            assert again.dtype == (y.dtype if images is x else single.dtype)
            torch.testing.assert_close(again.to(y.dtype), y, rtol=1e-4, atol=1e-5)


def test_state_dict_brings_back_all_values(case):
    entry, operator, shape = case
    x = normal(2, *shape)
    other = build(entry)
    if "seed" in inspect.signature(entry.operator.__init__).parameters:
        seeded = build(entry, seed=entry.init_args.get("seed", 0) + 1)
        assert not torch.equal(flat(seeded(x)), flat(operator(x)))
        if all(operator.state_dict()[key].shape == value.shape for key, value in seeded.state_dict().items()):
            other = seeded  # else the number of measurements hangs on the seed
    other(x)
    for value in other.state_dict().values():  # the operator's own memory
        value.copy_(~value if value.dtype == torch.bool else torch.zeros_like(value))
    file = io.BytesIO()
    torch.save(operator.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert_same(other, operator, x)


def test_copies_and_pickles_are_the_same(case):
    _, operator, shape = case
    x = normal(2, *shape)
    for again in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert type(again) is type(operator)
        assert again.image_shape == operator.image_shape
        assert again.differentiable == operator.differentiable
        assert_same(again, operator, x)


def assert_same(first: Operator, second: Operator, x: Tensor) -> None:
    assert torch.equal(first(x), second(x))
    if isinstance(first, LinearOperator) and isinstance(second, LinearOperator):
        assert torch.equal(first.adjoint(first(x)), second.adjoint(second(x)))
        if first.has_gram_function:
            assert torch.equal(*(A.gram_function(lambda s: 1 / (1 + s), x) for A in (first, second)))


def test_building_is_repeatable_and_leaves_the_global_generator(case):
    entry, operator, shape = case
    before = torch.get_rng_state()
    again = build(entry)
    x = normal(2, *shape)
    assert_same(again, operator, x)
    assert torch.equal(torch.get_rng_state(), before)


def use_on_another_device(operator: Operator, shape: tuple[int, int, int]) -> None:
    """Move away from the CPU and use it there. There is no other device: PyTorch follows devices and shapes only.

    ``norm`` and ``unseen`` read values and are left to the other tests.
    """
    expected = operator(torch.zeros(2, *shape)).shape
    with FakeTensorMode(allow_non_fake_inputs=True):  # what is left behind stays on the CPU, and PyTorch refuses it
        operator.to("meta")
        x = torch.zeros(2, *shape, device="meta")
        y = operator(x)
        assert y.device.type == "meta"
        assert y.shape == expected
        if isinstance(operator, LinearOperator):
            assert operator.adjoint(y).device.type == "meta"
            if operator.has_gram_function:
                assert operator.gram_function(lambda s: 1 / (1 + s), x).device.type == "meta"


def test_operator_works_on_another_device(case):
    entry, operator, shape = case
    if entry.cpu_only:
        with pytest.raises((RuntimeError, TypeError)):
            use_on_another_device(operator, shape)
    else:
        use_on_another_device(operator, shape)


def test_nan_is_not_lost(case):
    _, operator, shape = case
    d = math.prod(shape)
    x = normal(d, *shape)
    x.view(d, d).fill_diagonal_(math.nan)  # image p with NaN as its pixel p
    try:
        y = operator(x)
    except ValueError as error:
        assert "NaN" in str(error) or "finite" in str(error)  # noqa: PT017
        return
    lost = ~flat(y).isnan().any(1).reshape(shape)
    unseen = False if operator.unseen is None else operator.unseen
    assert not bool((lost & ~torch.as_tensor(unseen)).any())


def test_unseen_pixels_do_not_matter(case):
    _, operator, shape = case
    x = normal(2, *shape)
    if operator.unseen is not None:
        assert operator.unseen.dtype == torch.bool
        changed = x + 5 * operator.unseen.expand(shape)
        assert not torch.equal(changed, x)
        torch.testing.assert_close(operator(changed), operator(x), rtol=0, atol=1e-12)


def test_wrong_image_shape_is_named(case):
    entry, operator, (c, h, w) = case
    wrong = [normal(1, c, h + 1, w + 1), normal(c, h, w)]
    if not entry.checks_shape:  # any shape is taken, or a user's forward does not check
        assert operator(wrong[0]).shape[0] == 1
        return
    for x in wrong:
        with pytest.raises(ValueError, match=str(tuple(x.shape)).replace("(", r"\(").replace(")", r"\)")):
            operator(x)


def test_display_is_a_picture_or_none(case):
    _, operator, shape = case
    for x in (normal(1, *shape).clamp(-1, 1), torch.zeros(1, *shape)):
        picture = operator.display(operator(x)[0])
        if picture is not None:
            assert picture.ndim == 3
            assert picture.is_floating_point()
            assert bool(picture.isfinite().all())


class Broken(LinearOperator):
    """Twice the identity, with one mistake."""

    def __init__(self, mistake: str) -> None:
        super().__init__((2, 3, 4))
        self.mistake = mistake
        self.two = torch.full((3, 4), 2.0, dtype=torch.float64)
        if mistake != "constant":
            self.register_buffer("factor", self.two)

    def forward(self, x: Tensor) -> Tensor:
        if self.mistake != "shape":
            self._check_image(x)
        if self.mistake == "constant":
            return self.two.to(x.dtype) * x
        y = self.factor.to(x.dtype).mean() * x
        changed = {
            "nan": y.nan_to_num(),
            "batch": y + 0.01 * x.mean(0),
            "gradient": y + 0.01 * (x**2).detach(),
            "steps": (100 * y).round() / 100,
            "double": y.double(),
            "in place": x.mul_(2) if self.mistake == "in place" else y,
        }
        return changed.get(self.mistake, y)

    def adjoint(self, y: Tensor) -> Tensor:
        return (2.0001 if self.mistake == "adjoint" else 2) * y

    def norm(self) -> float:
        return 2.001 if self.mistake == "norm" else 2.0

    def display(self, y: Tensor) -> Tensor:
        return y[None] if self.mistake == "display" else y


CHECKS = {
    "adjoint": lambda *case: test_adjoint_is_the_transpose(case, torch.float32, 1e-5),
    "norm": lambda *case: test_norm_is_the_largest_singular_value(case),
    "gradient": lambda *case: test_gradient_matches_differences(case[:3]),
    "steps": lambda *case: test_gradient_matches_differences(case[:3]),
    "batch": lambda *case: test_images_of_a_batch_do_not_touch(case[:3]),
    "in place": lambda *case: test_images_of_a_batch_do_not_touch(case[:3]),
    "double": lambda *case: test_precision_follows_the_images(case[:3]),
    "constant": lambda *case: test_operator_works_on_another_device(case[:3]),
    "nan": lambda *case: test_nan_is_not_lost(case[:3]),
    "shape": lambda *case: test_wrong_image_shape_is_named(case[:3]),
    "display": lambda *case: test_display_is_a_picture_or_none(case[:3]),
}


@pytest.mark.parametrize("mistake", CHECKS)
def test_the_suite_finds_mistakes(mistake):
    shape = (2, 3, 4)
    case = (Case(Broken, {}), Broken("none"), shape, 2 * torch.eye(24, dtype=torch.float64))
    CHECKS[mistake](*case)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        CHECKS[mistake](case[0], Broken(mistake), *case[2:])


def test_default_adjoint_works_in_inference_mode_and_needs_a_shape():
    y = normal(2, 18)
    with torch.inference_mode():
        inside = VerticalDifference((2, 4, 3)).adjoint(y)
    torch.testing.assert_close(inside, VerticalDifference((2, 4, 3)).adjoint(y), rtol=0, atol=0)
    for call in (lambda: VerticalDifference().adjoint(y), lambda: VerticalDifference().norm()):
        with pytest.raises(ValueError, match="image_shape is None"):
            call()


def test_as_operator():
    blur = GaussianBlur((1, 4, 4), 1.0)
    assert as_operator(blur) is blur
    module = torch.nn.Linear(3, 2)
    wrapped = as_operator(module)
    assert isinstance(wrapped, FunctionOperator)
    assert list(wrapped.parameters()) == list(module.parameters())
    assert as_operator(torch.abs)(torch.tensor([-1.0])) == 1
    assert not FunctionOperator(torch.abs, differentiable=False).differentiable
    for wrong, message in ((3, "a int"), (GaussianBlur, "the class GaussianBlur")):
        with pytest.raises(TypeError, match=message):
            as_operator(wrong)
