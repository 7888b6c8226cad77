r"""Preconditioned Langevin dynamics with a function-space score (Baldassari et al. 2024, arXiv 2405.15676).

The prior is learned under the forward process :math:`dX = -\tfrac12 X\, dt + \sqrt C\, dW` with a trace-class covariance C, whose score

.. math:: S(t, x) = -\frac{x - e^{-t/2}\, E[X_0 \mid X_t = x]}{1 - e^{-t}}, \qquad
          E[X_0 \mid X_t = x] = D(e^{t/2} x;\ \sqrt{e^t - 1})

is :math:`C \nabla \log p_t` on a grid and has a limit as the grid is refined. With the potential :math:`\Phi(x; y) = -\log p(y \mid x)`,
repeat

.. math:: X \leftarrow X + \gamma_k \big[ -C \nabla \Phi(X; y) + \alpha_k S(\tau_k, X) \big] + \sqrt{2 \gamma_k}\; \xi_k,
          \qquad \xi_k \sim N(0, C)

C preconditions likelihood and noise alike, so that neither the steps nor their number depend on the grid. Weighted annealing:
:math:`\tau_k` falls geometrically to a small floor and :math:`\alpha_k` to 1, which lets early steps move on a smooth and strong prior.

**Steps.** The slope of the drift is at most :math:`\alpha_k/(1 - e^{-\tau_k}) + L` in the norm that C defines, with L the largest
eigenvalue of :math:`C \nabla^2 \Phi`; steps above 2 over it diverge. They are ``rate`` over it, in each chain by itself; L follows from a
power iteration on differences of gradients as the chain goes, and is kept fixed (at the largest value of the burn-in's second half) once
draws are taken.

**Bias.** There is no Metropolis step, and none is possible: a learned score is not the gradient of a known density, so that no ratio of
densities can be formed. What remains is of three kinds. The prior is that of noise level :math:`\tau` at the floor, not 0: for a Gaussian
prior of covariance Q it is :math:`e^{-\tau} Q + (1 - e^{-\tau}) C`, nearly Q where C resembles Q. The score has the network's error,
divided by :math:`\sqrt{1 - e^{-\tau}}`, so that a lower floor is not always better. And steps are finite: a direction of slope h has its
variance multiplied by :math:`1/(1 - \gamma h/2)`, at most ``1/(1 - rate/2)``. ``averaged`` takes :math:`(\xi_k + \xi_{k+1})/2` as noise
(Leimkuhler & Matthews 2013), which removes this last bias where the posterior is Gaussian and leaves a second-order one elsewhere, at no
cost; False is the plain step above.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, check_differentiable, check_range
from dpnp_inference.proximal import ProximalInfo
from dpnp_inference.proximal.likelihood import as_column, value_and_gradient
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.gaussian_field import GaussianField

DIFFERENCE = 0.02  # length, in the norm that C defines, of the differences that give the curvature
START_ITERATIONS = 15  # of the power iteration; later ones go on from where it was
EVERY = 20  # steps between two of them, after the first so many steps


class FunctionSpaceLangevin(Baseline):
    r"""Draws by preconditioned Langevin steps, each chain a Markov chain after its annealing.

    Args:
        prior: for noise that is a random field: a :class:`~dpnp_shared.prior.Prior` trained with
            :class:`~dpnp_shared.preconditioning.FieldEDM`, or a :class:`~dpnp_shared.field_prior.FieldPrior`. The grid is the operator's.
        forward_model: operator and noise, with a gradient.
        tau_max: first time of the annealing.
        tau_min: the floor; its noise level :math:`\sqrt{e^\tau - 1}` must be one that the prior may be used at.
        alpha: first weight of the prior.
        annealing: steps from ``tau_max`` and ``alpha`` to ``tau_min`` and 1.
        burn_in: further steps before draws are taken.
        rate: step times the largest slope, see above; below 2, or steps diverge. Autocorrelation is over some ``1/rate`` steps times the
            ratio of the largest slope to the smallest.
        averaged: see "Bias" above.
        dtype: of the images; a trained network computes in its own.

    Raises:
        ValueError: an argument out of range, a noise level that the prior may not be used at, or an operator for another number of
            channels than the prior's.
        TypeError: the prior is for white noise, or the forward model has no gradient.
    """

    advice = "lower rate, raise alpha or annealing, or check the forward model's scale and gradient"
    takes_field = True

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        tau_max: float = 3.0,
        tau_min: float = 0.05,
        alpha: float = 2.0,
        annealing: int = 200,
        burn_in: int = 1000,
        rate: float = 0.5,
        averaged: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        check_range("tau_min", tau_min, 0, open_low=True)
        check_range("tau_max", tau_max, tau_min)
        check_range("alpha", alpha, 1)
        check_range("annealing", annealing, 1)
        check_range("burn_in", burn_in, 0)
        check_range("rate", rate, 0, 2, open_low=True)
        self.field = field_of(prior, "FunctionSpaceLangevin")
        check_differentiable(forward_model, "FunctionSpaceLangevin")
        parts = [k / annealing for k in range(annealing)] + [1.0] * (burn_in + 1)
        self.taus = [tau_max * (tau_min / tau_max) ** part for part in parts]
        self.alphas = [alpha ** (1 - part) for part in parts]
        self.schedule = [noise_level_of(tau) for tau in self.taus]
        prior.check_sigma(torch.tensor(self.schedule, dtype=torch.float64))
        self.annealing, self.burn_in, self.rate, self.averaged = annealing, burn_in, rate, averaged
        self.settings = {
            "tau_max": tau_max,
            "tau_min": tau_min,
            "alpha": alpha,
            "annealing": annealing,
            "burn_in": burn_in,
            "rate": rate,
            "averaged": averaged,
            "acceptance": None,  # no proposals, see the module
        }

    def _check_draws(self, draws: int, thin: int) -> None:
        """A Markov chain gives any number."""

    def score(self, tau: float, x: Tensor, run: Run) -> Tensor:
        r""":math:`S(\tau, x)`, see the module, for ``x`` ``(B, C, H, W)``."""
        return (math.exp(-tau / 2) * run.denoise(math.exp(tau / 2) * x, noise_level_of(tau)) - x) / -math.expm1(-tau)

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        before = self.annealing + self.burn_in
        run.steps = before + run.draws * run.thin
        blank = self.blank(len(run.chains))

        def noise() -> Tensor:
            return self.field.colour(run.generator.normal_like(blank))

        x, xi = noise(), noise()
        w = run.generator.normal_like(blank)
        v = self.field.colour(w) / as_column(w.flatten(1).norm(dim=1), w)
        curvature, v, calls = self._curvature(x, y, v, START_ITERATIONS)
        seen, kept = [curvature], []
        for k in range(run.steps):
            tau, alpha = self.taus[min(k, before)], self.alphas[min(k, before)]
            if k and k < before and (k < EVERY or k % EVERY == 0):
                curvature, v, more = self._curvature(x, y, v, 1)
                calls += more
                seen = [*seen, curvature] if k >= self.annealing + self.burn_in // 2 else [curvature]
            if k == before:
                curvature = torch.stack(seen).amax(0)
            step = self.rate / (alpha / -math.expm1(-tau) + curvature)
            drift = self.field.covariance(value_and_gradient(self.forward_model, x, y)[1]) + alpha * self.score(
                tau, x, run
            )
            following = noise()
            kick = (xi + following) / 2 if self.averaged else following
            x, xi = x + step * drift + (2 * step).sqrt() * kick, following
            run.report(x, noise_level_of(tau), ProximalInfo(2 + calls))
            calls = 0
            if k >= before and (k - before + 1) % run.thin == 0:
                kept.append(x.cpu())
        return torch.stack(kept, dim=1)

    def _curvature(self, x: Tensor, y: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor, int]:
        r"""Largest eigenvalue of :math:`C \nabla^2 \Phi` at ``x``, by a power iteration that starts at ``v``.

        Returns:
            The eigenvalue ``(B, 1, 1, 1)``, the eigenvector of length 1 in C's norm, and the calls of the forward map.
        """
        for _ in range(iterations):
            ahead, behind = (
                value_and_gradient(self.forward_model, x + sign * DIFFERENCE * v, y)[1] for sign in (1, -1)
            )
            slope = (behind - ahead) / (2 * DIFFERENCE)
            image = self.field.covariance(slope)
            eigenvalue = (slope * image).flatten(1).sum(1).clamp(min=0).sqrt()
            moved = as_column(eigenvalue, x) > torch.finfo(x.dtype).tiny
            v = torch.where(moved, image / as_column(eigenvalue, x), v)
        return as_column(eigenvalue, x), v, 4 * iterations


def noise_level_of(tau: float) -> float:
    r""":math:`\sigma = \sqrt{e^\tau - 1}`, the noise level of time τ in :math:`e^{\tau/2} X_\tau`."""
    return math.sqrt(math.expm1(tau))


def field_of(prior: Denoiser, who: str) -> GaussianField:
    """The law of a prior's noise.

    Raises:
        TypeError: it is white.
    """
    if prior.noise_field is None:
        raise TypeError(
            f"{who} needs a prior for noise that is a random field (dpnp_shared.field_prior.FieldPrior, or one trained with "
            f"dpnp_shared.preconditioning.FieldEDM); this {type(prior).__name__} is for white noise"
        )
    return prior.noise_field
