"""Score networks. Each takes ``(c_in·x, c_noise)`` and gives a tensor shaped like ``x``."""

from dpnp_shared.networks.adm import ADMUNet
from dpnp_shared.networks.diffusers_unet import DiffusersUNet
from dpnp_shared.networks.dit import DiT
from dpnp_shared.networks.edm_unet import EDMUNet
from dpnp_shared.networks.fno import FNO
from dpnp_shared.networks.unet import UNet

__all__ = ["FNO", "ADMUNet", "DiT", "DiffusersUNet", "EDMUNet", "UNet"]
