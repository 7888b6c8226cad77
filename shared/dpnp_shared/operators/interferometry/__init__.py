"""Radio interferometry: what an array of telescopes measures of a source, with and without knowing the telescopes' gains."""

from dpnp_shared.operators.interferometry.array import EHT_2017, Coverage, EarthRotation
from dpnp_shared.operators.interferometry.closure_phases import ClosurePhases
from dpnp_shared.operators.interferometry.log_closure_amplitudes import LogClosureAmplitudes
from dpnp_shared.operators.interferometry.total_flux import TotalFlux
from dpnp_shared.operators.interferometry.visibilities import Visibilities

__all__ = [
    "EHT_2017",
    "ClosurePhases",
    "Coverage",
    "EarthRotation",
    "LogClosureAmplitudes",
    "TotalFlux",
    "Visibilities",
]
