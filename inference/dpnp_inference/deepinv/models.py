"""Priors and DPnP as deepinv's models."""

from __future__ import annotations

from typing import Any, Literal

import torch
from deepinv import models
from deepinv.physics import Physics
from deepinv.utils import TensorList
from torch import Tensor

from dpnp_inference.acceleration import BatchSize
from dpnp_inference.annealing import Annealing
from dpnp_inference.dds import DenoisingSampler
from dpnp_inference.deepinv.likelihood import from_physics, measurement
from dpnp_inference.deepinv.physics import ImageAs, device_of, known_shape
from dpnp_inference.dpnp import DPnP
from dpnp_inference.population import Population
from dpnp_inference.posterior import Posterior
from dpnp_inference.proximal import ProximalSampler
from dpnp_inference.replica_exchange import ReplicaExchange
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.noise import Noise
from dpnp_shared.prior import Prior
from dpnp_shared.randomness import derive_seed


class DeepinvDenoiser(models.Denoiser):  # type: ignore[misc]  # deepinv has no type information
    r"""A prior as ``deepinv.models.Denoiser``, for deepinv's own algorithms.

    With :math:`s = v_1 - v_0` it is :math:`\big(D(v_0 + s u;\ s \sigma) - v_0\big)/s`, the same denoiser in [0, 1] units. Gradients
    in u pass through.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        value_range: :math:`(v_0, v_1)`; by default the card's, and (-1, 1) for an analytic prior.
        clamp_sigma: take the nearest noise level that the prior may be used at instead of refusing others. deepinv's schedules often begin
            or end beyond them.
    """

    def __init__(
        self, prior: Denoiser, value_range: tuple[float, float] | None = None, clamp_sigma: bool = False
    ) -> None:
        super().__init__()
        self.prior, self.clamp_sigma = prior, clamp_sigma
        self.low, self.scale = _units(prior, value_range)

    def forward(self, x: Tensor, sigma: float | Tensor, **_: Any) -> Tensor:
        """Denoise.

        Args:
            x: ``(B, C, H, W)``, in [0, 1] up to the noise.
            sigma: noise level in the units of ``x``: a number, or a tensor of one or of B entries.

        Returns:
            Shaped like ``x``.

        Raises:
            ValueError: a noise level is outside of the prior's range, and ``clamp_sigma`` is False.
        """
        level = self.scale * torch.as_tensor(sigma, dtype=x.dtype, device=x.device).flatten()
        if self.clamp_sigma:
            level = level.clamp(self.prior.sigma_min, self.prior.sigma_max)
        denoised: Tensor = self.prior(self.low + self.scale * x, level)
        return (denoised - self.low) / self.scale


class DPnPReconstructor(models.Reconstructor):  # type: ignore[misc]  # deepinv has no type information
    """DPnP as ``deepinv.models.Reconstructor``.

    Each measurement of a batch is reconstructed by itself, with randomness that depends on ``seed`` and on its place in the batch.
    No gradient passes through.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        value_range: of its images; by default the card's, and (-1, 1) for an analytic prior.
        chains: of each measurement.
        draws: of each chain.
        thin: iterations from one draw to the next.
        seed: not negative.
        batch_size: images in a network call; all by default.
        image_shape: ``(C, H, W)`` of the images; by default the physics' ``img_size``, else what the prior was trained at.
        physical_range: see :func:`from_physics`, as the next four.
        noise: the law of the measurement given ``physics.A(x)``, to take the place of the physics' own.
        clamp: replace physical values beyond the first end of ``physical_range`` by it.
        background: photons that an entry counts without any signal.
        image_as: how the physics takes an image.
        dds: see :class:`~dpnp_inference.dpnp.DPnP`, as the next four.
        proximal: proximal sampler.
        annealing: coupling schedule.
        population: single chains, or chains that work together.
        dtype: of images and kernels.
    """

    def __init__(
        self,
        prior: Denoiser,
        *,
        value_range: tuple[float, float] | None = None,
        chains: int = 16,
        draws: int = 1,
        thin: int = 1,
        seed: int = 0,
        batch_size: BatchSize = None,
        image_shape: tuple[int, int, int] | None = None,
        physical_range: tuple[float, float] = (0.0, 1.0),
        noise: Noise | None = None,
        clamp: bool | None = None,
        background: float = 0.0,
        image_as: ImageAs = "auto",
        dds: Literal["ddim", "ddpm"] | DenoisingSampler = "ddim",
        proximal: Literal["auto"] | ProximalSampler = "auto",
        annealing: Literal["auto"] | Annealing = "auto",
        population: bool | Population | ReplicaExchange = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.prior, self.image_shape, self.seed = prior, image_shape, seed
        self.low, self.scale = _units(prior, value_range)
        self.sampling: dict[str, Any] = {"chains": chains, "draws": draws, "thin": thin, "batch_size": batch_size}
        self.modelling: dict[str, Any] = {
            "value_range": (self.low, self.low + self.scale),
            "physical_range": physical_range,
            "noise": noise,
            "clamp": clamp,
            "background": background,
            "image_as": image_as,
        }
        self.settings: dict[str, Any] = {
            "dds": dds,
            "proximal": proximal,
            "annealing": annealing,
            "population": population,
            "dtype": dtype,
        }

    def forward(self, y: Any, physics: Physics, **arguments: Tensor) -> Tensor:
        """Posterior means.

        Args:
            y: measurements ``(B, *y_shape)``, or the ``TensorList`` of a stack.
            physics: with its noise; copies are taken.
            arguments: of ``physics.A``; a tensor of B rows has one for each measurement.

        Returns:
            ``(B, C, H, W)`` in [0, 1] units, on the device of ``y``.

        Raises:
            ValueError: the physics, an argument or a measurement does not fit.
            TypeError: the physics' noise has no likelihood here.
        """
        return self._means(self.posteriors(y, physics, None, **arguments), y)

    def sample(self, y: Any, physics: Physics, seed: int | None = None, **arguments: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior means and variances, as deepinv's samplers give them.

        Args:
            y: as in :meth:`forward`.
            physics: likewise.
            seed: by default the reconstructor's.
            arguments: as in :meth:`forward`.

        Returns:
            Both ``(B, C, H, W)``, in [0, 1] units and in their square.

        Raises:
            ValueError: as :meth:`forward`, or there is only one draw.
            TypeError: as :meth:`forward`.
        """
        posteriors = self.posteriors(y, physics, seed, **arguments)
        variances = [(posterior.std / self.scale).square() for posterior in posteriors]
        return self._means(posteriors, y), torch.stack(variances).to(y[0].device)

    def posteriors(self, y: Any, physics: Physics, seed: int | None = None, **arguments: Tensor) -> list[Posterior]:
        """The draws for each measurement, in the prior's value range; arguments as in :meth:`sample`."""
        batch = y[0].shape[0] if isinstance(y, TensorList) else y.shape[0]
        if batch == 0:
            raise ValueError("y holds no measurement")
        rows = {name: value.shape[0] for name, value in arguments.items() if value.ndim and value.shape[0] != 1}
        if any(n != batch for n in rows.values()):
            raise ValueError(
                f"arguments have {rows} rows and there are {batch} measurements; allowed are 1 and {batch}"
            )
        seed, dpnp, posteriors = self.seed if seed is None else seed, None, []
        for i in range(batch):
            if dpnp is None or rows:
                dpnp = self._sampler(physics, {k: v[i : i + 1] if k in rows else v for k, v in arguments.items()})
            y_i = measurement([part[i] for part in y] if isinstance(y, TensorList) else y[i], dpnp.forward_model)
            posteriors.append(dpnp.sample(y_i, seed=derive_seed(seed, i), **self.sampling))
        return posteriors

    def _sampler(self, physics: Physics, arguments: dict[str, Tensor]) -> DPnP:
        shape = self.image_shape or known_shape(physics, self.modelling["image_as"]) or self.prior.image_shape
        model = from_physics(physics, shape, arguments=arguments, **self.modelling)
        return DPnP(self.prior, model.to(device_of(self.prior)), **self.settings)

    def _means(self, posteriors: list[Posterior], y: Any) -> Tensor:
        means = torch.stack([posterior.mean for posterior in posteriors])
        return (means.to(y[0].device) - self.low) / self.scale


def _units(prior: Denoiser, value_range: tuple[float, float] | None) -> tuple[float, float]:
    """Start and length of a prior's value range."""
    if value_range is None:
        value_range = prior.card.value_range if isinstance(prior, Prior) else (-1.0, 1.0)
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range = {value_range}; allowed is (low, high) with low < high")
    return low, high - low
