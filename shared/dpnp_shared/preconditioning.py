r"""From a raw network ``F`` to the denoiser ``D(x; σ)``: one formula, several parametrisations.

.. math:: D(x; \sigma) = c_{skip}(\sigma)\, x + c_{out}(\sigma)\, F(c_{in}(\sigma)\, x;\ c_{noise}(\sigma))

(Karras et al. 2022, arXiv 2206.00364, equation 7 and Table 1.) A network that was trained on the
variance-preserving process :math:`x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, w` sees the same noisy image after a
change of variables, :math:`\sigma^2 = (1 - \bar\alpha_t)/\bar\alpha_t` and :math:`x_t = x_\sigma / \sqrt{1 + \sigma^2}`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpnp_shared.gaussian_field import GaussianField


class Coefficients(NamedTuple):
    """The four functions of σ of Karras et al. 2022, Table 1, each shaped like σ."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning(nn.Module, ABC):
    """A rule that turns σ into :class:`Coefficients`.

    Attributes:
        hyperparameters: the constructor's arguments as JSON-able values, which is what a prior's folder stores.
        sigma_min: smallest noise level of the parametrisation, in image units.
        sigma_max: largest noise level of the parametrisation, in image units.
    """

    hyperparameters: dict[str, Any]
    sigma_min: float
    sigma_max: float

    @property
    def noise_field(self) -> GaussianField | None:
        """The law of the noise where it is not white."""
        return None

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at noise levels ``sigma`` of any shape, positive."""


def _check_range(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; needed is 0 < sigma_min < sigma_max < inf")


class EDM(Preconditioning):
    """Preconditioning with unit variance of input and target at every σ (Karras et al. 2022, Table 1, "Ours").

    Args:
        sigma_data: standard deviation of a pixel of the data.
        sigma_min: smallest noise level the network is to be trusted at.
        sigma_max: largest noise level the network is to be trusted at.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data = {sigma_data}; it must be positive and finite")
        _check_range(sigma_min, sigma_max)
        self.sigma_data, self.sigma_min, self.sigma_max = sigma_data, sigma_min, sigma_max
        self.hyperparameters = {"sigma_data": sigma_data, "sigma_min": sigma_min, "sigma_max": sigma_max}

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :class:`Preconditioning`."""
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data / total.sqrt(),
            c_in=1 / total.sqrt(),
            c_noise=sigma.log() / 4,
        )


class FieldEDM(EDM):
    r"""EDM's preconditioning for noise that is a random field: ``x_0 + σ w``, ``w ~ N(0, C)``.

    With the forward process :math:`dX = -\tfrac12 X\, dt + \sqrt C\, dW` the noise level of time t is :math:`\sigma = \sqrt{e^t -
    1}`, seen in :math:`e^{t/2} X_t`. What EDM asks of variances is asked at a point, where that of the noise is :math:`\sigma^2
    \mathrm{std}^2`. A network that is trained with it is trained under this noise, and a prior's folder that names it holds C.

    Args:
        field: :math:`N(0, C)`; its ``std`` in image units, so that σ is a plain number.
        sigma_data: standard deviation of a pixel of the data.
        sigma_min: smallest noise level the network is to be trusted at.
        sigma_max: largest noise level the network is to be trusted at.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, field: GaussianField, sigma_data: float = 0.5, sigma_min: float = 0.05, sigma_max: float = 20.0
    ) -> None:
        super().__init__(sigma_data, sigma_min, sigma_max)
        self.field = field
        self.hyperparameters = {"field": field, **self.hyperparameters}

    @property
    def noise_field(self) -> GaussianField:
        """The law of the noise."""
        return self.field

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :class:`Preconditioning`."""
        return super().coefficients(self.field.std * sigma)


class VE(Preconditioning):
    """Variance-exploding: the network predicts the scaled score (Song et al. 2021; Karras et al. 2022, Table 1, "VE").

    Args:
        sigma_min: smallest noise level the network is to be trusted at.
        sigma_max: largest noise level the network is to be trusted at.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0) -> None:
        super().__init__()
        _check_range(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.hyperparameters = {"sigma_min": sigma_min, "sigma_max": sigma_max}

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :class:`Preconditioning`."""
        one = torch.ones_like(sigma)
        return Coefficients(c_skip=one, c_out=sigma, c_in=one, c_noise=(sigma / 2).log())


class VPSchedule(nn.Module, ABC):
    """Time of a variance-preserving process as a function of σ.

    Attributes:
        hyperparameters: the constructor's arguments as JSON-able values.
        sigma_min: noise level at the earliest time.
        sigma_max: noise level at the latest time.
    """

    hyperparameters: dict[str, Any]
    sigma_min: float
    sigma_max: float

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The number the network takes as its time input at noise level ``sigma``."""


class DiscreteVP(VPSchedule):
    r"""A DDPM table of β's (Ho et al. 2020): :math:`\sigma_t^2 = (1 - \bar\alpha_t)/\bar\alpha_t`, t = 0 … T-1.

    Between two entries the time is interpolated linearly in log σ, so that at each σ_t it is exactly t.

    Args:
        steps: T, the length of the table.
        beta_start: first β of the ``linear`` table.
        beta_end: last β of the ``linear`` table.
        schedule: ``linear`` (Ho et al. 2020) or ``cosine`` (Nichol & Dhariwal 2021, equation 17).
        betas: the table itself, when it is none of these.

    Raises:
        ValueError: an unknown schedule, or a β outside of (0, 1).
    """

    def __init__(
        self,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        schedule: str = "linear",
        betas: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if betas is not None:
            table = torch.as_tensor(betas, dtype=torch.float64)
        elif schedule == "linear":
            table = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        elif schedule == "cosine":
            t = torch.arange(steps + 1, dtype=torch.float64) / steps
            bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            table = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule = {schedule!r}; allowed are 'linear' and 'cosine'")
        if table.ndim != 1 or len(table) < 2 or not bool(((table > 0) & (table < 1)).all()):
            raise ValueError(f"betas must be at least two numbers in (0, 1), got {table.tolist()[:4]} …")
        alpha_bar = (1 - table).cumprod(0)
        self.log_sigmas = ((1 - alpha_bar) / alpha_bar).log() / 2  # no buffer: a cast of the network must not touch it
        self.sigma_min, self.sigma_max = float(self.log_sigmas[0].exp()), float(self.log_sigmas[-1].exp())
        self.hyperparameters = (
            {"betas": [float(b) for b in betas]}
            if betas is not None
            else {"steps": steps, "beta_start": beta_start, "beta_end": beta_end, "schedule": schedule}
        )

    def time(self, sigma: Tensor) -> Tensor:
        """Fractional index into the table, in ``[0, T-1]``."""
        dtype = torch.float32 if sigma.device.type == "mps" else torch.float64
        table = self.log_sigmas.to(device=sigma.device, dtype=dtype)
        log_sigma = sigma.to(dtype).log()
        right = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, len(table) - 1)
        left = right - 1
        fraction = (log_sigma - table[left]) / (table[right] - table[left])
        return (left + fraction).clamp(0, len(table) - 1).to(sigma.dtype)


class ContinuousVP(VPSchedule):
    r"""Linear β(t) in continuous time (Song et al. 2021): :math:`\sigma(t)^2 = e^{\beta_d t^2/2 + \beta_{min} t} - 1`.

    Args:
        beta_d: slope of β(t); Karras et al. 2022, Table 1, use 19.9.
        beta_min: β(0); they use 0.1.
        time_scale: factor from t in (0, 1] to the network's time input; they use 999.
        epsilon_s: the earliest time the network was trained at.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self, beta_d: float = 19.9, beta_min: float = 0.1, time_scale: float = 999.0, epsilon_s: float = 1e-5
    ) -> None:
        super().__init__()
        if not (beta_d > 0 and beta_min > 0 and time_scale > 0 and 0 < epsilon_s < 1):
            raise ValueError(
                f"beta_d = {beta_d}, beta_min = {beta_min}, time_scale = {time_scale} must be positive and "
                f"epsilon_s = {epsilon_s} in (0, 1)"
            )
        self.beta_d, self.beta_min, self.time_scale = beta_d, beta_min, time_scale
        self.sigma_min, self.sigma_max = self._sigma(epsilon_s), self._sigma(1.0)
        self.hyperparameters = {
            "beta_d": beta_d,
            "beta_min": beta_min,
            "time_scale": time_scale,
            "epsilon_s": epsilon_s,
        }

    def _sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

    def time(self, sigma: Tensor) -> Tensor:
        """``time_scale · t(σ)``."""
        log1p = (sigma**2).log1p()
        t = 2 * log1p / (self.beta_min + (self.beta_min**2 + 2 * self.beta_d * log1p).sqrt())
        return (self.time_scale * t).to(sigma.dtype)


class VP(Preconditioning):
    """What the parametrisations of a variance-preserving process share: its schedule.

    Args:
        schedule: the table or the continuous-time β(t) the network was trained with; the DDPM table by default.
    """

    def __init__(self, schedule: VPSchedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule if schedule is not None else DiscreteVP()
        self.sigma_min, self.sigma_max = self.schedule.sigma_min, self.schedule.sigma_max
        self.hyperparameters = {"schedule": self.schedule}


class VPEpsilon(VP):
    """A DDPM network that predicts the noise (Ho et al. 2020): ``D = x - σ F(x/√(1+σ²); t(σ))``."""

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :class:`Preconditioning`."""
        return Coefficients(
            c_skip=torch.ones_like(sigma),
            c_out=-sigma,
            c_in=(1 + sigma**2).rsqrt(),
            c_noise=self.schedule.time(sigma),
        )


class VPrediction(VP):
    r"""A network that predicts :math:`v = \sqrt{\bar\alpha}\, w - \sqrt{1-\bar\alpha}\, x_0` (Salimans & Ho 2022, appendix D)."""

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :class:`Preconditioning`."""
        c_in = (1 + sigma**2).rsqrt()
        return Coefficients(c_skip=c_in**2, c_out=-sigma * c_in, c_in=c_in, c_noise=self.schedule.time(sigma))


class FlowMatching(Preconditioning):
    r"""A network that predicts the velocity of the straight path from data to noise (Lipman et al. 2023; Liu et al. 2023).

    Flow matching with the linear (rectified-flow) path sees :math:`x_t = (1-t)\,x_0 + t\,w`, :math:`t \in (0, 1)`, and learns
    :math:`F(x_t; t) \approx v = dx_t/dt = w - x_0`. Divided by its signal's factor the same noisy image is

    .. math:: x = \frac{x_t}{1-t} = x_0 + \sigma w, \qquad \sigma = \frac{t}{1-t}, \quad t = \frac{\sigma}{1+\sigma}

    so that :math:`1-t = 1/(1+\sigma)` and :math:`x_t = x/(1+\sigma)`, which is :math:`c_{in}`.
    From :math:`x_t = x_0 + t\,v` follows :math:`x_0 = x_t - t\,v`, hence

    .. math:: D(x; \sigma) = \frac{1}{1+\sigma}\,x - \frac{\sigma}{1+\sigma}\,F\!\left(\frac{x}{1+\sigma};\ t\right)

    Because :math:`|D - x_0|^2 = t^2\,|F - v|^2`, flow matching's own loss is denoising score matching with the weighting
    :math:`\lambda(\sigma) = t^{-2} = ((1+\sigma)/\sigma)^2` (``flow`` in training).

    Args:
        time_scale: factor from t to the network's time input.
        sigma_min: smallest noise level the network is to be trusted at.
        sigma_max: largest noise level the network is to be trusted at; t = 1 would be an infinite one.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, time_scale: float = 1000.0, sigma_min: float = 0.002, sigma_max: float = 500.0) -> None:
        super().__init__()
        if not 0 < time_scale < math.inf:
            raise ValueError(f"time_scale = {time_scale}; it must be positive and finite")
        _check_range(sigma_min, sigma_max)
        self.time_scale, self.sigma_min, self.sigma_max = time_scale, sigma_min, sigma_max
        self.hyperparameters = {"time_scale": time_scale, "sigma_min": sigma_min, "sigma_max": sigma_max}

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """See :class:`Preconditioning`."""
        one_minus_t = 1 / (1 + sigma)
        t = sigma * one_minus_t
        return Coefficients(c_skip=one_minus_t, c_out=-t, c_in=one_minus_t, c_noise=self.time_scale * t)
