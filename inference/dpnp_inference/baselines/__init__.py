"""Methods that people compare with, behind the same ``sample(y, chains, seed) -> Posterior`` as DPnP."""

from dpnp_inference.baselines.common import Baseline
from dpnp_inference.baselines.daps import DAPS
from dpnp_inference.baselines.ddrm import DDRM
from dpnp_inference.baselines.diffpir import DiffPIR
from dpnp_inference.baselines.dps import DPS
from dpnp_inference.baselines.lgd_mc import LGDMC
from dpnp_inference.baselines.nonlinear_ct import NonlinearCT
from dpnp_inference.baselines.pigdm import PiGDM
from dpnp_inference.baselines.pnp_dm import PnPDM, UnadjustedLangevin
from dpnp_inference.baselines.ucos import UCoS

__all__ = [
    "DAPS", "DDRM", "DPS", "LGDMC", "Baseline", "DiffPIR", "NonlinearCT", "PiGDM", "PnPDM", "UCoS", "UnadjustedLangevin",
]  # fmt: skip
