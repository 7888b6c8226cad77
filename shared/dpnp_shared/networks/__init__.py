"""Score networks. Each takes ``(c_in·x, c_noise)`` and gives a tensor shaped like ``x``."""

from dpnp_shared.networks.dit import DiT
from dpnp_shared.networks.unet import UNet

__all__ = ["DiT", "UNet"]
