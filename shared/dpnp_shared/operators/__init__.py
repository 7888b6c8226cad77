"""Forward operators ``A`` of measurements ``y = A(x)`` + noise, one file a kind."""

from dpnp_shared.operators.base import FunctionOperator, LinearOperator, Operator, as_operator
from dpnp_shared.operators.beer_lambert import BeerLambert
from dpnp_shared.operators.bicubic import BicubicSuperResolution
from dpnp_shared.operators.blur import CircularConvolution, GaussianBlur, KernelBlur, MotionBlur
from dpnp_shared.operators.coded_diffraction import CodedDiffraction
from dpnp_shared.operators.combine import Compose, LinearCompose, LinearStack, Stack
from dpnp_shared.operators.compressed_sensing import CompressedSensing
from dpnp_shared.operators.convolution import Convolution
from dpnp_shared.operators.high_dynamic_range import HighDynamicRange
from dpnp_shared.operators.inpainting import BoxInpainting, Inpainting, RandomInpainting
from dpnp_shared.operators.matrix import MatrixOperator
from dpnp_shared.operators.nonlinear_blur import NonlinearBlur
from dpnp_shared.operators.phase_retrieval import PhaseRetrieval
from dpnp_shared.operators.physical_units import Identity, PhysicalUnits, Scaled
from dpnp_shared.operators.ptychography import Ptychography
from dpnp_shared.operators.quantisation import DitheredQuantisation
from dpnp_shared.operators.super_resolution import SuperResolution
from dpnp_shared.operators.tomography import FanBeamCT, ParallelBeamCT, RayTransform
from dpnp_shared.operators.uniform_quantisation import Quantisation

__all__ = [
    "BeerLambert",
    "BicubicSuperResolution",
    "BoxInpainting",
    "CircularConvolution",
    "CodedDiffraction",
    "Compose",
    "CompressedSensing",
    "Convolution",
    "DitheredQuantisation",
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
    "MatrixOperator",
    "MotionBlur",
    "NonlinearBlur",
    "Operator",
    "ParallelBeamCT",
    "PhaseRetrieval",
    "PhysicalUnits",
    "Ptychography",
    "Quantisation",
    "RandomInpainting",
    "RayTransform",
    "Scaled",
    "Stack",
    "SuperResolution",
    "as_operator",
]
