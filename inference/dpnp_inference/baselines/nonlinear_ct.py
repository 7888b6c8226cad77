r"""Transmission tomography by diffusion posterior sampling with the nonlinear model (Li et al. 2023, arXiv 2312.01464).

A ray of line integral :math:`p = (P x)_i` counts :math:`y \sim \mathrm{Poisson}(\lambda)`, :math:`\lambda = \bar y + b`,
:math:`\bar y = I_0 e^{-p}` (Beer and Lambert's law, with a background b). Diffusion posterior sampling needs the gradient of
:math:`\log p(y \mid x)` at the denoised image :math:`\hat x_0`, :math:`P^T u`, with one of

=============  ==================================================  =================================================================
likelihood     :math:`u = \partial \log p(y \mid x)/\partial p`    what it is
=============  ==================================================  =================================================================
``poisson``    :math:`\bar y\,(1 - y/\lambda)`                     exact; without background :math:`\bar y - y`
``gaussian``   :math:`\bar y\,(\lambda - y)/\max(y, 1)`            nonlinear, with Gaussian noise of the variance that was counted
``linearised`` :math:`\omega\,(l - p)`                             weighted least squares of :math:`l = -\log((y - b)/I_0)`,
                                                                   :math:`\omega = (y - b)_+^2/\max(y, 1)`, what people compare with
=============  ==================================================  =================================================================

Each ancestral (DDPM) step goes from :math:`\hat x_0 + \lambda_t\, (\partial \hat x_0/\partial x)^T \Lambda\, P^T u` in place of
:math:`\hat x_0`, with x the noisy image in image units. The papers leave the step to tuning. Here it follows the model, as in ΠGDM with
:math:`x_0 \mid x \approx N(\hat x_0, r^2 I)`, :math:`r^2 = \sigma^2 s^2/(\sigma^2 + s^2)`, for a curvature w of each ray (for ``poisson``
:math:`\max(\bar y, y)`):

.. math:: \Lambda = \sigma^2 \big(I + r^2 P^T \mathrm{diag}(w) P\big)^{-1}

by a few iterations of conjugate gradients. They are preconditioned by the separable bound of statistical reconstruction (Erdoğan & Fessler
1999), :math:`D = P^T(w \cdot P \mathbf 1)` in place of the Hessian, which alone is the cheap way, ``inner=0``: it bounds fine detail so
loosely that :math:`\lambda_t` has to be tuned. At small noise the step is the gradient added to the score, at large noise no dose makes it
too long.

**Ordered subsets**: step t uses every S-th view only, :math:`P^T u \approx S P_s^T u_s`, and the subsets take turns. **Jump start** (the
follow-up, arXiv 2407.12956): begin with the noised filtered back-projection at a level below the highest.

The likelihood of the denoised image stands in for that of the noisy one, so that no number of steps makes the draws exact. DPnP has the
same exact likelihood with a Metropolis step.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dpnp_inference.baselines.common import TIMESTEPS, Baseline, Run, check_range, ddim_step, noise_level, time_steps
from dpnp_inference.proximal import ProximalInfo
from dpnp_inference.proximal.perturb_and_solve import conjugate_gradients
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import PoissonNoise, TransmissionNoise
from dpnp_shared.operators import BeerLambert, Operator, PhysicalUnits, RayTransform

Likelihood = Literal["poisson", "gaussian", "linearised"]


class Scan(NamedTuple):
    """A transmission scan, or every S-th view of one.

    Attributes:
        lines: images ``(B, C, H, W)`` to line integrals ``(B, *y_shape)``.
        photons: counts without an object, broadcast to ``y_shape``.
        background: counts without primary photons, likewise.
    """

    lines: Operator
    photons: Tensor
    background: Tensor

    @classmethod
    def of(cls, forward_model: ForwardModel) -> Scan:
        """What a forward model says of a scan.

        Raises:
            TypeError: it is none.
        """
        operator, noise = forward_model.operator, forward_model.noise
        if isinstance(operator, BeerLambert) and isinstance(noise, PoissonNoise):
            return cls(operator.operator, operator.photons * noise.gain, noise.background)
        if isinstance(noise, TransmissionNoise):
            return cls(operator, noise.photons, noise.background)
        raise TypeError(
            "NonlinearCT needs a BeerLambert operator with PoissonNoise, or line integrals with TransmissionNoise, got "
            f"{type(operator).__name__} and {type(noise).__name__}"
        )

    def subset(self, first: int, every: int, y: Tensor) -> tuple[Scan, Tensor]:
        """The scan of every ``every``-th view from ``first`` on, and its counts, of ``y`` ``(C, views, detectors)``."""
        if every == 1:
            return self, y
        parts = (self.photons.to(y), self.background.to(y), y)
        photons, background, counts = (v.expand(y.shape)[:, first::every].contiguous() for v in parts)
        return Scan(_views(self.lines, first, every), photons, background), counts

    def slope(self, p: Tensor, y: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
        r"""Derivative u of the log-likelihood in the line integrals, and its curvature w.

        Args:
            p: ``(B, *y_shape)``.
            y: counts ``(*y_shape)``.
            likelihood: which one.

        Returns:
            Both shaped like ``p``.
        """
        photons, background = self.photons.to(p), self.background.to(p)
        counted = y.clamp(min=1)
        if likelihood == "linearised":
            net = y - background
            weight = (net.clamp(min=0) ** 2 / counted).expand_as(p)
            return weight * (-(net.clamp(min=0.5) / photons).log() - p), weight
        primary = photons * torch.exp(-p)
        total = primary + background
        if likelihood == "gaussian":
            return primary * (total - y) / counted, torch.maximum(primary**2 / counted, y)
        return primary * (1 - y / total), torch.maximum(primary, y)


class NonlinearCT(Baseline):
    r"""Draws by diffusion posterior sampling of a transmission scan, one independent draw a chain.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: :class:`~dpnp_shared.operators.BeerLambert` with Poisson noise, or line integrals with
            :class:`~dpnp_shared.noise.TransmissionNoise`.
        likelihood: ``poisson`` (exact), ``gaussian`` or ``linearised``, see above.
        steps: how many of DDPM's 1000 time steps are used, evenly spaced. Those whose noise level is outside of the prior's range
            are left out.
        subsets: S; more than one needs lines ``(views, detectors)``, as of :class:`~dpnp_shared.operators.ParallelBeamCT` and
            :class:`~dpnp_shared.operators.FanBeamCT`, with or without :class:`~dpnp_shared.operators.PhysicalUnits`.
        jump_start: noise level to start at from the filtered back-projection, in image units; None starts from noise.
        step: factor :math:`\lambda_t` of the likelihood's step, the same for all.
        inner: conjugate-gradient iterations for Λ; 0 for the diagonal bound alone, which line integrals that are not affine in the
            image need (``PhysicalUnits`` with ``clamp``).
        prior_std: the prior's standard deviation s in r, in image units.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, no time step within the prior's noise levels and under ``jump_start``, or an operator
            for another number of channels than the prior's.
        TypeError: the model is no transmission scan, or one without views where there are subsets.
    """

    advice = "lower step, or check the forward model's units"

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        likelihood: Likelihood = "poisson",
        steps: int = TIMESTEPS,
        subsets: int = 1,
        jump_start: float | None = None,
        step: float = 1.0,
        inner: int = 5,
        prior_std: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        if likelihood not in get_args(Likelihood):
            raise ValueError(f"likelihood = {likelihood!r}; allowed are {', '.join(get_args(Likelihood))}")
        check_range("step", step, 0)
        check_range("inner", inner, 0)
        check_range("prior_std", prior_std, 0, open_low=True)
        self.scan = Scan.of(forward_model)
        check_range("subsets", subsets, 1, 1 if subsets == 1 else _number_of_views(self.scan.lines))
        self.likelihood, self.subsets, self.jump_start = likelihood, subsets, jump_start
        if inner and self.scan.lines.linear_part is None:
            raise TypeError(
                f"inner = {inner}: it needs line integrals that are affine in the image; for these give inner = 0"
            )
        self.step, self.inner, self.prior_std = step, inner, prior_std
        self.alpha_bars = time_steps(prior, steps)
        if jump_start is not None:
            check_range("jump_start", jump_start, noise_level(self.alpha_bars[-1]))
            self.alpha_bars = [a for a in self.alpha_bars if noise_level(a) <= jump_start]
        self.schedule = [noise_level(a) for a in self.alpha_bars]
        self.settings = {
            "likelihood": likelihood,
            "steps": steps,
            "subsets": subsets,
            "jump_start": jump_start,
            "step": step,
            "inner": inner,
            "prior_std": prior_std,
        }

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        scans = [self.scan.subset(first, self.subsets, y) for first in range(self.subsets)]
        blank = self.blank()
        thickness = [scan.lines(torch.ones_like(blank)) - scan.lines(blank) for scan, _ in scans]  # P 1
        x = run.generator.normal_like(self.blank(len(run.chains)))
        if self.jump_start is not None:
            a = self.alpha_bars[0]
            x = math.sqrt(a) * self.filtered_back_projection(y) + math.sqrt(1 - a) * x
        views = 0  # calls of a subset that are not yet accounted for
        for i, (alpha_bar, alpha_bar_next) in enumerate(itertools.pairwise([*self.alpha_bars, 1.0])):
            sigma, s = noise_level(alpha_bar), i % self.subsets
            scan, counts = scans[s]
            with torch.enable_grad():
                x_ve = (x / math.sqrt(alpha_bar)).detach().requires_grad_(True)
                x_0 = run.denoise(x_ve, sigma)
                step, calls = self._step(x_0.detach(), sigma, scan, counts, thickness[s])
                (step,) = torch.autograd.grad(x_0, x_ve, step)
            run.network_gradients += 1
            x = ddim_step(x, x_0.detach() + self.step * step, alpha_bar, alpha_bar_next, 1.0, run.generator)
            views += calls
            run.report(x, sigma, ProximalInfo(views // self.subsets))  # calls of the whole scan
            views %= self.subsets
        return x[:, None]

    def _step(self, x_0: Tensor, sigma: float, scan: Scan, counts: Tensor, thickness: Tensor) -> tuple[Tensor, int]:
        r""":math:`\Lambda P^T u` at the denoised images ``x_0`` ``(B, C, H, W)``, and the calls of the (part of the) scan."""
        x_0 = x_0.requires_grad_(True)
        p = scan.lines(x_0)
        u, w = scan.slope(p.detach(), counts, self.likelihood)
        (gradient,) = torch.autograd.grad(p, x_0, self.subsets * u, retain_graph=True)
        (bound,) = torch.autograd.grad(p, x_0, self.subsets * w * thickness)
        r_2 = 1 / (1 / sigma**2 + 1 / self.prior_std**2)
        if not self.inner:
            return sigma**2 / (1 + r_2 * bound) * gradient, 3
        lines = scan.lines.linear_part
        assert lines is not None
        solution, _, iterations = conjugate_gradients(
            lambda v: v + r_2 * lines.adjoint(self.subsets * w * lines(v)),
            gradient,
            lambda v: v / (1 + r_2 * bound),
            tolerance=1e-3,
            most_iterations=self.inner,
        )
        return sigma**2 * solution, 3 + 2 * iterations

    def filtered_back_projection(self, y: Tensor) -> Tensor:
        """The classical reconstruction in the prior's units, ``(1, C, H, W)``, of counts ``y`` ``(*y_shape)``.

        Raises:
            TypeError: the operator has none.
        """
        net = (y - self.scan.background.to(y)).clamp(min=0.5)
        image = self.scan.lines.display(-(net / self.scan.photons.to(y)).log())
        if image is None or tuple(image.shape) != self.image_shape:
            raise TypeError(
                f"jump_start needs an operator with a filtered back-projection, {type(self.scan.lines).__name__} has none"
            )
        return image.to(self.dtype)[None]


def _ray_transform(lines: Operator) -> RayTransform:
    """The rays of a scan with views.

    Raises:
        TypeError: there are none.
    """
    rays = lines.operator if isinstance(lines, PhysicalUnits) else lines
    if not isinstance(rays, RayTransform) or len(rays.rays) != 2:
        raise TypeError(
            "subsets: lines of the shape (views, detectors) are needed, as of ParallelBeamCT and FanBeamCT, got "
            f"{type(rays).__name__}; allowed is 1"
        )
    return rays


def _number_of_views(lines: Operator) -> int:
    return _ray_transform(lines).rays[0]


def _views(lines: Operator, first: int, every: int) -> Operator:
    """The operator for every ``every``-th view from ``first`` on."""
    rays = _ray_transform(lines)
    assert rays.image_shape is not None
    points, directions = rays.points[first::every], rays.directions[first::every]
    some = RayTransform(rays.image_shape, points, directions, rays.pixel_size).to(points.device, points.dtype)
    if not isinstance(lines, PhysicalUnits):
        return some
    start, end = lines.start, lines.start + lines.scale
    return PhysicalUnits(some, (lines.value_start, lines.value_start + 1), (start, end), lines.clamp)
