r"""UCoS: posterior sampling by a task-dependent denoiser, without the forward map (Schneider et al. 2024, arXiv 2405.15643).

For :math:`y = A x_0 + N(0, \Gamma)` and the Ornstein-Uhlenbeck process :math:`dx_t = -\tfrac12 x_t\,dt + dw_t`, the score of the
noised posterior is

.. math::

    \nabla \log p_t(x \mid y) = \frac{D(m_t, t) - e^{t/2} x}{e^{t/2} - e^{-t/2}}, \qquad
    m_t = A^T \Gamma^{-1} y + \frac{e^{t/2}}{e^t - 1}\, x ,

where :math:`D(m, t) = E[x_0 \mid m]` was trained for A and :math:`\Gamma` (:mod:`dpnp_shared.task`). From :math:`x_T`, in reversed
time :math:`\tau = T - t`, draws are carried by

.. math::

    \text{reverse SDE} \quad dx = \big(\tfrac12 x + \nabla \log p_t(x \mid y)\big)\,d\tau + d\bar w, \qquad
    \text{probability flow} \quad dx = \tfrac12 \big(x + \nabla \log p_t(x \mid y)\big)\,d\tau .

Only :math:`A^T \Gamma^{-1} y` is needed of the forward model, once a measurement.

Both equations are integrated in :math:`x_\sigma = e^{t/2} x_t`, :math:`\sigma^2 = e^t - 1`, in which the linear parts are exact: with
:math:`r = \sigma'/\sigma`, a step takes :math:`x_\sigma` to :math:`r^2 x_\sigma + (1 - r^2) \tilde D + \sigma' \sqrt{1 - r^2}\, w`
(SDE) or to :math:`r x_\sigma + (1 - r) \tilde D` (flow). :math:`\tilde D` is extrapolated from the last two denoised images (second
order; Lu et al. 2022, arXiv 2211.01095).

At T the law is :math:`N(e^{-T/2} E[x_0 \mid y],\ I)` up to the posterior's spread times :math:`e^{-T/2}`; its mean is a denoised
image, for one network call more, so that no more than the spread has to be negligible. The released code starts from
:math:`N(0, (1 - e^{-T}) I)` at T = 2, where :math:`e^{-T/2}` = 0.37, and takes :math:`\Gamma = \sigma I` for noise of standard
deviation σ; neither is done here.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, check_range
from dpnp_inference.proximal import ProximalInfo
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.prior import Prior
from dpnp_shared.solvers import karras_levels
from dpnp_shared.task import Task, TaskDenoiser, TrainedTaskDenoiser

LARGEST_REMAINDER = 0.2
"""Largest allowed ratio of the prior's spread to the noise at T."""


class UCoS(Baseline):
    r"""Draws by a task-dependent denoiser, one independent draw a chain.

    The forward model's adjoint and its operator are called once each when the sampler is made, to see whether the denoiser was made for
    them. A measurement costs one call of the adjoint, however many chains; the operator is not called.

    Args:
        prior: of the same images; it is not called. Its value range must be the denoiser's.
        forward_model: the one that the denoiser was trained for: linear or affine, Gaussian noise.
        denoiser: a task-dependent denoiser, or the folder of a trained one.
        steps: network calls; one more is made at the start.
        stochastic: the reverse SDE, or else the probability flow.
        horizon: T; by default such that the noise is ten times the prior's spread, or the denoiser's largest noise level where that is
            less.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, a denoiser of another task or for other images, or a T at which the prior's spread is not
            negligible.
        TypeError: the forward model is not linear Gaussian.
        PriorError: the folder cannot be loaded.
    """

    advice = "check the denoiser's training"
    calls_forward_map = False

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        denoiser: TaskDenoiser | str,
        steps: int = 50,
        stochastic: bool = True,
        horizon: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("steps", steps, 1)
        self.denoiser = TrainedTaskDenoiser.from_pretrained(denoiser) if isinstance(denoiser, str) else denoiser
        self.denoiser.to(self.device)
        self._check_images(prior)
        self.task = Task(forward_model, self.image_shape, dtype=dtype)
        self.denoiser.check_task(self.task)
        self.stochastic = stochastic
        self.schedule = self._levels(steps, horizon)
        self.horizon = math.log1p(self.schedule[0] ** 2)
        self.settings = {"steps": steps, "stochastic": stochastic, "horizon": self.horizon}

    def _check_images(self, prior: Denoiser) -> None:
        """Refuse a denoiser of other images."""
        if self.denoiser.image_shape != self.image_shape:
            raise ValueError(
                f"denoiser is for images {self.denoiser.image_shape}, the sampler's are {self.image_shape}"
            )
        if isinstance(prior, Prior) and isinstance(self.denoiser, TrainedTaskDenoiser):
            own, other = self.denoiser.card.value_range, prior.card.value_range
            if own != other:
                raise ValueError(f"denoiser is for pixel values in {own}, the prior for {other}")

    def _levels(self, steps: int, horizon: float | None) -> list[float]:
        """The noise levels, from that of T to the least positive one."""
        low, high, spread = self.denoiser.sigma_min, self.denoiser.sigma_max, self.denoiser.spread
        if horizon is not None:
            check_range("horizon", horizon, 0, open_low=True)
        top = min(high, 10 * spread) if horizon is None else math.sqrt(math.expm1(horizon))
        if not spread <= LARGEST_REMAINDER * top or top > high * (1 + 1e-5):
            limit = (
                "" if high == math.inf else f" and at most {math.log1p(high**2):.3g}, that of the denoiser's largest"
            )
            least = math.log1p((spread / LARGEST_REMAINDER) ** 2)
            raise ValueError(
                f"horizon = {math.log1p(top**2):.3g}; the prior's spread {spread:.3g} asks for at least {least:.3g}{limit}"
            )
        return karras_levels(top, min(top, max(low, 1e-3 * spread)), steps)[:-1]

    def _measured(self, y: Tensor) -> Tensor:
        r""":math:`A^T \Gamma^{-1} y`, ``(C, H, W)``; the operator is not called."""
        if not isinstance(y, Tensor):
            raise TypeError(f"y is a {type(y).__name__}; it must be a torch.Tensor")
        expected = self.task.offset
        if y.shape != expected.shape:
            raise ValueError(
                f"y has shape {tuple(y.shape)}; the operator gives {tuple(expected.shape)} for one image. y is one measurement, without "
                "a batch dimension"
            )
        if y.is_complex() != expected.is_complex():
            raise TypeError(f"y has dtype {y.dtype}, the operator's output {expected.dtype}; one of them is complex")
        bad = int((~y.isfinite()).sum())
        if bad:
            raise ValueError(f"y holds {bad} entries of {y.numel()} that are NaN or infinite; all must be finite")
        y = y.to(device=self.device, dtype=self.dtype.to_complex() if y.is_complex() else self.dtype)
        with torch.no_grad():
            return self.task.back_projection(y[None])[0]

    def score(self, x_t: Tensor, t: float, back_projection: Tensor) -> Tensor:
        r""":math:`\nabla \log p_t(x \mid y)`, the identity at the top of this file.

        Args:
            x_t: ``(B, C, H, W)``, of the Ornstein-Uhlenbeck process at time ``t``.
            t: positive.
            back_projection: :math:`A^T \Gamma^{-1} y`, ``(C, H, W)``.

        Returns:
            ``(B, C, H, W)``.
        """
        m = back_projection + math.exp(t / 2) / math.expm1(t) * x_t
        denoised: Tensor = self.denoiser(m, math.sqrt(math.expm1(t)))
        return (denoised - math.exp(t / 2) * x_t) / (2 * math.sinh(t / 2))

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`; ``y`` is the back-projection ``(C, H, W)``."""
        if run.chains.start == 0:
            run.forward_calls += 1  # the adjoint of _measured

        def denoise(x: Tensor, sigma: float) -> Tensor:
            run.network_calls += 1
            denoised: Tensor = self.denoiser(x / sigma**2 + y, sigma)
            return denoised

        top = self.schedule[0]
        mean = denoise(self.blank(), top)  # at T it depends on y alone
        x = mean + top * run.generator.normal_like(self.blank(len(run.chains)))
        d_previous, h_previous = None, math.inf
        for sigma, sigma_next in itertools.pairwise([*self.schedule, 0.0]):
            d = denoise(x, sigma)
            r = sigma_next / sigma
            h = -math.log(r) if r > 0 else math.inf
            d_tilde = d if d_previous is None or r == 0 else d + (d - d_previous) * (h / (2 * h_previous))
            if self.stochastic:
                x = r**2 * x + (1 - r**2) * d_tilde
                if r > 0:
                    x = x + sigma_next * math.sqrt(1 - r**2) * run.generator.normal_like(x)
            else:
                x = r * x + (1 - r) * d_tilde
            d_previous, h_previous = d, h
            run.report(x, sigma, ProximalInfo(0))
        return x[:, None]
