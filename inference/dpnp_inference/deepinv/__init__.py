r"""deepinv (0.5 or later), both ways: its physics as forward models here, priors and DPnP from here as its models.

deepinv's images u are in [0, 1], ours in the prior's value range :math:`(v_0, v_1)`. Everything that passes between the two is converted,
noise levels, gradients and variances as well: :math:`u = (x - v_0)/(v_1 - v_0)`.

- :class:`PhysicsOperator` and :func:`from_physics`: any ``deepinv.physics.Physics`` as operator and as forward model;
- :class:`DeepinvDenoiser`: a prior as ``deepinv.models.Denoiser``;
- :class:`DPnPReconstructor`: DPnP as ``deepinv.models.Reconstructor``.

This needs ``pip install dpnp-imaging[deepinv]``. A physics is never changed: all work is done on a copy.
"""

try:
    import deepinv as _deepinv  # noqa: F401  # the installed package, not this one
except ImportError as error:
    raise ImportError(
        f"dpnp_inference.deepinv needs deepinv 0.5 or later, pip install dpnp-imaging[deepinv]: {error}"
    ) from error

from dpnp_inference.deepinv.likelihood import from_physics, measurement
from dpnp_inference.deepinv.models import DeepinvDenoiser, DPnPReconstructor
from dpnp_inference.deepinv.physics import PhysicsOperator

__all__ = ["DPnPReconstructor", "DeepinvDenoiser", "PhysicsOperator", "from_physics", "measurement"]
