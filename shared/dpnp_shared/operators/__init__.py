"""Forward operators ``A`` of measurements ``y = A(x)`` + noise, one file a kind."""

from dpnp_shared.operators.base import FunctionOperator, LinearOperator, Operator, as_operator
from dpnp_shared.operators.beer_lambert import BeerLambert
from dpnp_shared.operators.bicubic import BicubicSuperResolution
from dpnp_shared.operators.blur import CircularConvolution, GaussianBlur, KernelBlur, MotionBlur
from dpnp_shared.operators.coded_diffraction import CodedDiffraction
from dpnp_shared.operators.combine import Compose, LinearCompose, LinearStack, Stack
from dpnp_shared.operators.compressed_sensing import CompressedSensing
from dpnp_shared.operators.convolution import Convolution
from dpnp_shared.operators.darcy import DarcyFlow
from dpnp_shared.operators.external_program import ExternalProgram
from dpnp_shared.operators.high_dynamic_range import HighDynamicRange
from dpnp_shared.operators.inpainting import BoxInpainting, Inpainting, RandomInpainting
from dpnp_shared.operators.interferometry import (
    EHT_2017,
    ClosurePhases,
    Coverage,
    EarthRotation,
    LogClosureAmplitudes,
    TotalFlux,
    Visibilities,
)
from dpnp_shared.operators.local_averages import CubicAverages, LocalAverages
from dpnp_shared.operators.matrix import MatrixOperator
from dpnp_shared.operators.mri import MRI
from dpnp_shared.operators.mri_noncartesian import NonCartesianMRI, RadialMRI
from dpnp_shared.operators.nonlinear_blur import NonlinearBlur
from dpnp_shared.operators.numpy_operator import NumpyOperator
from dpnp_shared.operators.phase_retrieval import PhaseRetrieval
from dpnp_shared.operators.physical_units import Identity, PhysicalUnits, Scaled
from dpnp_shared.operators.ptychography import Ptychography
from dpnp_shared.operators.quantisation import DitheredQuantisation
from dpnp_shared.operators.scipy_operator import ScipyLinearOperator, ScipyOperator
from dpnp_shared.operators.super_resolution import SuperResolution
from dpnp_shared.operators.tomography import FanBeamCT, ParallelBeamCT, RayTransform
from dpnp_shared.operators.uniform_quantisation import Quantisation
from dpnp_shared.operators.zero_padding import ZeroPadding

__all__ = [
    "EHT_2017",
    "MRI",
    "BeerLambert",
    "BicubicSuperResolution",
    "BoxInpainting",
    "CircularConvolution",
    "ClosurePhases",
    "CodedDiffraction",
    "Compose",
    "CompressedSensing",
    "Convolution",
    "Coverage",
    "CubicAverages",
    "DarcyFlow",
    "DitheredQuantisation",
    "EarthRotation",
    "ExternalProgram",
    "FanBeamCT",
    "FunctionOperator",
    "GaussianBlur",
    "HighDynamicRange",
    "Identity",
    "Inpainting",
    "KernelBlur",
    "LinearCompose",
    "LinearOperator",
    "LinearStack",
    "LocalAverages",
    "LogClosureAmplitudes",
    "MatrixOperator",
    "MotionBlur",
    "NonCartesianMRI",
    "NonlinearBlur",
    "NumpyOperator",
    "Operator",
    "ParallelBeamCT",
    "PhaseRetrieval",
    "PhysicalUnits",
    "Ptychography",
    "Quantisation",
    "RadialMRI",
    "RandomInpainting",
    "RayTransform",
    "Scaled",
    "ScipyLinearOperator",
    "ScipyOperator",
    "Stack",
    "SuperResolution",
    "TotalFlux",
    "Visibilities",
    "ZeroPadding",
    "as_operator",
]
