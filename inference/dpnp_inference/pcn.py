r"""Preconditioned Crank-Nicolson (Cotter, Roberts, Stuart & White 2013, arXiv 1202.0709), the reference for Gaussian prior fields.

For the prior :math:`N(m, Q)` over functions and :math:`\Phi = -\log p(y \mid x)`, propose and accept with probability a

.. math:: x' = m + \sqrt{1 - \beta^2}\, (x - m) + \beta\, \xi, \quad \xi \sim N(0, Q), \qquad a = \min\{1, \exp(\Phi(x) - \Phi(x'))\}

The proposal leaves the prior as it is, so that the acceptance knows nothing of the grid, and the chain's law is exactly the posterior,
for any likelihood, with or without gradient. β is adapted during the burn-in and fixed afterwards, in each chain by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpnp_inference.baselines.common import Baseline, Run, check_range
from dpnp_inference.proximal import ProximalInfo
from dpnp_inference.proximal.likelihood import as_column
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.field_prior import FieldPrior
from dpnp_shared.forward_model import ForwardModel


class PCN(Baseline):
    """Draws by a Metropolis chain that is exact for a Gaussian random field as prior.

    Args:
        prior: a :class:`~dpnp_shared.field_prior.FieldPrior` of a single component. The grid is the operator's.
        forward_model: operator and noise.
        burn_in: steps before draws are taken, in which β is adapted.
        beta: first β.
        acceptance: aimed at by the adaptation.
        dtype: of the images.

    Raises:
        ValueError: an argument out of range, or an operator for another number of channels than the prior's.
        TypeError: the prior is no Gaussian random field.
    """

    advice = "check the forward model"
    takes_field = True

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        burn_in: int = 2000,
        beta: float = 0.2,
        acceptance: float = 0.25,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(prior, forward_model, dtype)
        if not isinstance(prior, FieldPrior) or not prior.gaussian:
            raise TypeError(
                f"PCN needs a dpnp_shared.field_prior.FieldPrior of one component, got {type(prior).__name__}"
                + (f" of {len(prior.means)}" if isinstance(prior, FieldPrior) else "")
            )
        check_range("burn_in", burn_in, 0)
        check_range("beta", beta, 0, 1, open_low=True)
        check_range("acceptance", acceptance, 0, 0.99, open_low=True)
        self.field = prior.field
        grid = (self.image_shape[1], self.image_shape[2])
        self.mean = self.field.function(prior.mean_coefficients(grid)).to(self.blank())
        self.burn_in, self.beta, self.acceptance = burn_in, beta, acceptance
        self.schedule = [0.0] * (burn_in + 1)
        self.settings = {"burn_in": burn_in, "beta": beta, "acceptance": acceptance}

    @property
    def plan(self) -> str:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        return f"PCN: {self.burn_in} steps of burn-in"

    def _check_draws(self, draws: int, thin: int) -> None:
        """A Markov chain gives any number."""

    def _run(self, y: Tensor, run: Run) -> Tensor:
        """See :class:`~dpnp_inference.baselines.common.Baseline`."""
        run.steps = self.burn_in + run.draws * run.thin
        blank = self.blank(len(run.chains))
        x = self.mean + self.field.colour(run.generator.normal_like(blank))
        log_l = self.forward_model.log_likelihood(x, y)
        beta = torch.full_like(log_l, self.beta)
        kept, calls = [], 1
        for k in range(run.steps):
            b = as_column(beta, x)
            xi = self.field.colour(run.generator.normal_like(blank))
            proposal = self.mean + (1 - b**2).sqrt() * (x - self.mean) + b * xi
            proposed = self.forward_model.log_likelihood(proposal, y)
            proposed = torch.where(proposed.isfinite(), proposed, -torch.inf)
            chance = torch.where(log_l.isfinite(), (proposed - log_l).exp().clamp(max=1), 1.0)
            accept = run.generator.uniform(dtype=x.dtype, device=x.device) < chance
            x, log_l = torch.where(as_column(accept, x), proposal, x), torch.where(accept, proposed, log_l)
            if k < self.burn_in:
                beta = (beta * torch.exp((chance - self.acceptance) / (k + 1) ** 0.6)).clamp(max=1)
            run.report(x, 0.0, ProximalInfo(1 + calls, acceptance=chance))
            calls = 0
            if k >= self.burn_in and (k - self.burn_in + 1) % run.thin == 0:
                kept.append(x.cpu())
        return torch.stack(kept, dim=1)
