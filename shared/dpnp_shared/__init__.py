"""What training and inference share: priors, forward models, and the interfaces they are used through."""

from dpnp_shared.denoiser import Denoiser
from dpnp_shared.prior import Prior, PriorCard, PriorError

__all__ = ["Denoiser", "Prior", "PriorCard", "PriorError"]
