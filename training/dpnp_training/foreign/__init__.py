"""Other projects' networks as priors, by explicit conversion: every key of their files is accounted for, and nothing in them is run."""

from dpnp_training.foreign.adm import ADMOptions
from dpnp_training.foreign.edm import EDMOptions
from dpnp_training.foreign.importer import import_prior

__all__ = ["ADMOptions", "EDMOptions", "import_prior"]
