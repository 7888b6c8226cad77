"""The forward model of a deepinv physics: its operator, and its noise as a likelihood."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from deepinv import physics as theirs
from deepinv.physics import Physics, StackedPhysics
from deepinv.utils import TensorList
from torch import Tensor, nn

from dpnp_inference.deepinv.physics import ImageAs, PhysicsOperator, check_physics, device_of
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import (
    GaussianNoise,
    JointNoise,
    LaplaceNoise,
    LogPoissonNoise,
    Noise,
    PoissonGaussianNoise,
    PoissonNoise,
    RicianNoise,
)
from dpnp_shared.operators import Operator, PhysicalUnits, Stack

COUNTS = (theirs.PoissonNoise, theirs.PoissonGaussianNoise)
# measure as Physics does: y = sensor(noise(A(x))); and put the noise model on A(x), but for entries that a mask sets to 0
FORWARD = (Physics.forward, theirs.PhaseRetrieval.forward)
NOISE = (
    Physics.noise,
    theirs.Inpainting.noise,
    theirs.MRI.noise,
    theirs.MultiCoilMRI.noise,
    theirs.DynamicMRI.noise,
    theirs.NonCartesianMRI.noise,
)


def from_physics(
    physics: Physics,
    image_shape: tuple[int, int, int] | None = None,
    *,
    value_range: tuple[float, float] = (-1.0, 1.0),
    physical_range: tuple[float, float] = (0.0, 1.0),
    noise: Noise | None = None,
    clamp: bool | None = None,
    background: float = 0.0,
    image_as: ImageAs = "auto",
    arguments: dict[str, Any] | None = None,
) -> ForwardModel:
    r"""The forward model of a physics.

    ========================= ===================================================================================
    deepinv                   here
    ========================= ===================================================================================
    ``GaussianNoise``         :class:`GaussianNoise`; for complex measurements :math:`\sigma/\sqrt2` in each part
    ``PoissonNoise``          :class:`PoissonNoise` of the counts, before ``normalize`` multiplies them by the gain
    ``PoissonGaussianNoise``  :class:`PoissonGaussianNoise`
    ``LogPoissonNoise``       :class:`LogPoissonNoise`; :func:`measurement` encodes counts of 0
    ``LaplaceNoise``          :class:`LaplaceNoise`
    ``RicianNoise``           :class:`RicianNoise`
    of a ``StackedPhysics``   :class:`JointNoise` of its parts'
    ========================= ===================================================================================

    All are exact. Where deepinv puts no noise on entries that a mask sets to 0 (``Inpainting``, ``MRI``), these are 0 in the measurement
    and in ``A(x)`` alike, so that our noise there changes no posterior; it changes the evidence by a constant.

    Args:
        physics: of which a copy is taken.
        image_shape: see :class:`PhysicsOperator`, as the other arguments.
        value_range: of the prior's images.
        physical_range: what the ends of ``value_range`` are to the physics.
        noise: the law of the measurement given ``physics.A(x)``, to take the place of the physics' own.
        clamp: replace physical values beyond the first end of ``physical_range`` by it; by default where the physics counts photons, of
            which there cannot be fewer than none.
        background: photons that an entry counts without any signal. deepinv's Poisson laws have none, so that an image that is
            dark where a photon was counted is impossible, and a chain that starts there may hardly find a way out; a hundredth of a photon
            or a tenth help.
        image_as: how the physics takes an image.
        arguments: of ``physics.A`` and ``physics.A_adjoint``.

    Returns:
        The model, on the device of the physics.

    Raises:
        TypeError: the physics' noise has no likelihood here, and ``noise`` does not give one.
        ValueError: as for :class:`PhysicsOperator`, or a noise level is not one positive number.
    """
    check_physics(physics)
    if clamp is None:
        clamp = noise is None and any(type(part.noise_model) in COUNTS for part in _parts(physics))
    operator = PhysicsOperator(physics, image_shape, value_range, physical_range, clamp, image_as, arguments)
    law = _law(physics, operator.operator, background) if noise is None else noise
    return ForwardModel(operator, law).to(device_of(operator))


def measurement(y: Any, forward_model: ForwardModel) -> Tensor:
    """A measurement from deepinv, as the forward model takes it.

    Args:
        y: a tensor, or the ``TensorList`` (or a list) of a stack, with the batch as first dimension or without it.
        forward_model: from :func:`from_physics`.

    Returns:
        ``(B, *y_shape)`` or ``(*y_shape)``. The parts of a stack are joined. An infinite entry of log-Poisson data, a count of 0,
        becomes what :class:`~dpnp_shared.noise.LogPoissonNoise` has for it.

    Raises:
        TypeError: ``y`` is no tensor, and the model no stack's; or the other way round.
        ValueError: the shapes do not fit.
    """
    operator, noise = forward_model.operator, forward_model.noise
    stack = operator.operator if isinstance(operator, PhysicalUnits) else operator
    if not isinstance(stack, Stack):
        if not isinstance(y, Tensor):
            raise TypeError(f"y is a {type(y).__name__}; it must be a tensor, since the physics is no stack")
        return _encode(y, noise)
    if not isinstance(y, TensorList | list | tuple):
        raise TypeError(f"y is a {type(y).__name__}; it must be a TensorList or a list, since the physics is a stack")
    laws = noise.parts if isinstance(noise, JointNoise) else [noise] * len(y)
    if len(laws) != len(y):
        raise ValueError(f"y holds {len(y)} parts; the physics has {len(laws)}")
    return stack.join([_encode(part, law) for part, law in zip(y, laws, strict=True)])


class ScaledNoise(Noise):
    r""":math:`y = c\, y'` with :math:`y' \sim p(\,\cdot \mid \max(\bar y, 0))`, or :math:`p(\,\cdot \mid \bar y)` without ``clip``.

    For deepinv's counts, which are given in the units of the image, and whose means may be cut off at 0.

    Args:
        noise: the law of :math:`y'`.
        scale: c. Where ``noise`` is of counts, an entry of y within single precision of a multiple of c counts as it; y is discrete
            then, and its log probability is that of :math:`y'`. With any other law the scale must be 1.
        clip: replace negative noiseless values by 0.
    """

    def __init__(self, noise: Noise, scale: float, clip: bool) -> None:
        super().__init__()
        self.noise, self.scale, self.clip = noise, scale, clip
        self.counts, self.differentiable = noise.counts and scale == 1, noise.differentiable

    @property
    def resolution(self) -> float | None:
        """That of the law."""
        return self.noise.resolution

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See :meth:`Noise.sample <dpnp_shared.noise.Noise.sample>`."""
        return self.scale * self.noise.sample(self._clipped(clean), generator)

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        """See :meth:`Noise.log_prob <dpnp_shared.noise.Noise.log_prob>`."""
        if self.scale != 1:
            y = y.double() / self.scale
            whole = y.round()
            y = torch.where((y - whole).abs() <= 4 * torch.finfo(torch.float32).eps * whole.abs(), whole, y)
        return self.noise.log_prob(y, self._clipped(clean))

    def _clipped(self, clean: Tensor) -> Tensor:
        return clean.clamp(min=0) if self.clip else clean


def _parts(physics: Physics) -> list[Physics]:
    return list(physics.physics_list) if isinstance(physics, StackedPhysics) else [physics]


def _law(physics: Physics, operator: Operator, background: float) -> Noise:
    """The likelihood of a physics' noise."""
    if isinstance(operator, Stack):
        _check_measuring(physics, (Physics.forward,), (StackedPhysics.noise,), (StackedPhysics.sensor,))
        parts = [A for A in operator.operators if isinstance(A, Operator)]
        return JointNoise([_law(part, A, background) for part, A in zip(physics.physics_list, parts, strict=True)])
    _check_measuring(physics, FORWARD, NOISE, (Physics.sensor,))
    if not _is_identity(physics.sensor_model):
        raise TypeError(
            f"{type(physics).__name__} has a sensor_model; give noise, the law of the measurement given physics.A(x)"
        )
    law, kind = physics.noise_model, type(physics.noise_model)
    if kind is theirs.GaussianNoise:
        return GaussianNoise(_level(law, "sigma") / (math.sqrt(2) if _is_complex(operator) else 1))
    if kind is theirs.PoissonNoise:
        gain = _level(law, "gain")
        counts = PoissonNoise(1 / gain, background)
        scale = gain if bool(law.normalize) else 1.0
        return ScaledNoise(counts, scale, law.clip_positive) if scale != 1 or law.clip_positive else counts
    if kind is theirs.PoissonGaussianNoise:
        gain = max(_level(law, "gain"), float(law.min_gain))
        if _level(law, "sigma") == 0:
            return ScaledNoise(PoissonNoise(1 / gain, background), gain, law.clip_positive)
        sensor = PoissonGaussianNoise(gain, _level(law, "sigma"), background)
        return ScaledNoise(sensor, 1.0, True) if law.clip_positive else sensor
    if kind is theirs.LogPoissonNoise:
        return LogPoissonNoise(_level(law, "N0"), mu=_level(law, "mu"))
    if kind is theirs.LaplaceNoise:
        return LaplaceNoise(_level(law, "b"))
    if kind is theirs.RicianNoise:
        return RicianNoise(_level(law, "sigma"))
    if kind is theirs.ZeroNoise:
        raise TypeError(
            f"{type(physics).__name__} has no noise, and a likelihood needs one; give noise = GaussianNoise(sigma), "
            "or set the physics' noise_model"
        )
    raise TypeError(
        f"the noise_model {kind.__name__} of {type(physics).__name__} has no likelihood here; give noise, a "
        "dpnp_shared.noise.Noise (GaussianNoise, StudentTNoise, … or a class of your own)"
    )


def _check_measuring(physics: Physics, *allowed: tuple[Any, ...]) -> None:
    """Refuse a physics whose measurements are not ``sensor(noise(A(x)))``."""
    for name, methods in zip(("forward", "noise", "sensor"), allowed, strict=True):
        if getattr(type(physics), name) not in methods:
            raise TypeError(
                f"{type(physics).__name__} measures by a {name} of its own, so that its noise_model alone is not the law of the "
                "measurement; give noise, the law of the measurement given physics.A(x)"
            )


def _is_identity(function: Any) -> bool:
    """Whether a function gives back its argument: ``nn.Identity``, or a Python function that does nothing else."""
    if isinstance(function, nn.Identity):
        return True
    return inspect.isfunction(function) and function.__code__.co_code == _itself.__code__.co_code


def _itself(value: Any) -> Any:
    return value


def _level(noise_model: nn.Module, name: str) -> float:
    value = getattr(noise_model, name)
    if value.numel() != 1:
        raise ValueError(
            f"{type(noise_model).__name__}.{name} has shape {tuple(value.shape)}; allowed is one number for all images. Give noise, "
            "or reconstruct images of different noise levels one by one"
        )
    return float(value)


def _is_complex(operator: Operator) -> bool:
    assert operator.image_shape is not None
    with torch.no_grad():
        y: Tensor = operator(torch.zeros(1, *operator.image_shape, device=device_of(operator)))
    return y.is_complex()


def _encode(y: Tensor, noise: Noise) -> Tensor:
    if not isinstance(noise, LogPoissonNoise):
        return y
    none = -(noise.zero / noise.of_counts.photons).log() / noise.mu
    return torch.where(y == math.inf, none.to(y), y)
