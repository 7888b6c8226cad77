"""Methods that people compare with, behind the same ``sample(y, chains, seed) -> Posterior`` as DPnP."""

from dpnp_inference.baselines.dps import DPS

__all__ = ["DPS"]
