"""The one object that a sampler sees of a prior: its minimum-mean-square-error denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dpnp_shared.gaussian_field import GaussianField


class Denoiser(nn.Module, ABC):
    r"""The posterior mean :math:`D(x; \sigma) = E[x_0 \mid x_0 + \sigma w = x]`, :math:`w \sim N(0, I)`.

    Every prior, trained or analytic, is used through this interface, in one noise parametrisation: the
    standard deviation σ that was added to the clean image ("VE" or "EDM" form, Karras et al. 2022).

    Attributes:
        image_shape: ``(C, H, W)`` of one image. ``H`` and ``W`` may differ at use where the network allows it.
        sigma_min: smallest noise level at which the denoiser may be trusted, in image units.
        sigma_max: largest noise level at which the denoiser may be trusted, in image units.
        spread: standard deviation of the prior along its widest direction, in image units (the square root
            of the covariance's largest eigenvalue). A sampler that starts at this noise level sees every mode.
    """

    image_shape: tuple[int, int, int]
    sigma_min: float
    sigma_max: float
    spread: float

    @property
    def noise_field(self) -> GaussianField | None:
        r"""The law of the noise w where it is not white, :math:`w \sim N(0, C)` with a trace-class covariance; None for white noise.

        The score of such a denoiser, :math:`(D(x; \sigma) - x)/\sigma^2`, is :math:`C \nabla \log p_\sigma(x)`. Samplers that take white
        noise for granted refuse it (:func:`check_white`).
        """
        return None

    def colour(self, w: Tensor) -> Tensor:
        """Noise of this denoiser's kind, at level 1, out of standard normal numbers ``w`` ``(B, C, H, W)``."""
        return w if self.noise_field is None else self.noise_field.colour(w)

    @abstractmethod
    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Denoise ``x``.

        Args:
            x: noisy images ``(B, C, H, W)``, in the prior's own value range.
            sigma: noise level, a float, a 0-d tensor or one value an image ``(B,)``, in image units.

        Returns:
            ``D(x; sigma)``, shaped like ``x``.
        """

    def score(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Score of the noised prior by Tweedie's formula, :math:`(D(x; \sigma) - x)/\sigma^2`.

        Args:
            x: ``(B, C, H, W)``.
            sigma: as in :meth:`forward`; must be positive.

        Returns:
            :math:`\nabla \log p_\sigma(x)`, shaped like ``x``.
        """
        denoised: Tensor = self(x, sigma)
        return (denoised - x) / expand_sigma(sigma, x) ** 2

    def check_sigma(self, sigma: float | Tensor) -> None:
        """Refuse a noise level outside of ``[sigma_min, sigma_max]``.

        Raises:
            ValueError: names the value and the range.
        """
        values = torch.as_tensor(sigma, dtype=torch.float64)
        slack = 1e-5  # a level that went through float32 is still the same level
        low, high = self.sigma_min * (1 - slack), self.sigma_max * (1 + slack)
        # written so that NaN fails as well
        if not bool(((values >= low) & (values <= high)).all()):
            raise ValueError(
                f"sigma = {values.flatten().tolist()[:4]} is outside of the noise levels this prior was made for, "
                f"[{self.sigma_min:g}, {self.sigma_max:g}]"
            )


def check_white(prior: Denoiser, who: str) -> None:
    """Refuse a prior whose noise is a random field.

    Args:
        prior: any.
        who: needs white noise.

    Raises:
        TypeError: names the prior's noise.
    """
    if prior.noise_field is not None:
        raise TypeError(
            f"{who} needs a prior for white noise, this one is for noise that is a {prior.noise_field}; "
            "dpnp_inference.function_space.FunctionSpaceLangevin takes such priors"
        )


def expand_sigma(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Noise level as a tensor that broadcasts against ``x``.

    Args:
        sigma: float, 0-d tensor or ``(B,)``.
        x: ``(B, C, H, W)``.

    Returns:
        ``(1, 1, 1, 1)`` or ``(B, 1, 1, 1)``, with the dtype and device of ``x``.

    Raises:
        ValueError: ``sigma`` has another shape.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}; allowed are a float, () and ({x.shape[0]},)")
    return sigma.reshape(-1, *[1] * (x.ndim - 1))
