r"""DPnP with replica exchange (parallel tempering; Geyer 1991): exact in running time, as a population is in the number of particles.

Each chain keeps a replica at every coupling of a ladder. Gibbs sweeps move the replicas; then those of neighbouring couplings are
exchanged with probability :math:`\min(1, e^{\Delta})`, with the joint targets

.. math:: \Delta = \tfrac12 (|x_i - z_i|^2 - |x_j - z_j|^2) (1/\eta_i^2 - 1/\eta_j^2) .

The replica at the last coupling hops between modes by way of the first, where they mix. No exchange needs a network call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpnp_inference.gibbs import Gibbs
from dpnp_inference.population import Level, Path, Population
from dpnp_inference.targets import Targets, choose_targets
from dpnp_shared.forward_model import ForwardModel


@dataclass(frozen=True)
class ReplicaExchange:
    """How replicas are exchanged.

    The ladder is the path that a population of as many particles as there are chains takes, and its particles are the first replicas.
    Where that path begins below the largest coupling, rungs are added up to it, so that the first replicas see all modes.

    Attributes:
        ladder: the population that finds the couplings; a smaller ``ess`` gives fewer of them.
        burn_in: sweeps of all replicas before the first draw.
        step: largest ratio of neighbouring couplings among the rungs that are added.
    """

    ladder: Population = field(default_factory=lambda: Population(start=1, ess=0.5, final=1, populations=1))
    burn_in: int = 50
    step: float = 1.5

    def __post_init__(self) -> None:
        if self.burn_in < 0:
            raise ValueError(f"burn_in = {self.burn_in}; it must be at least 0")
        if not self.step > 1:
            raise ValueError(f"step = {self.step}; it must be above 1")


class Replicas:
    """The replicas of a batch of chains.

    Args:
        levels: couplings from the largest to the last, and the replicas at each.
        targets: give the probabilities of exchange.
        gibbs: the sweeps.
    """

    def __init__(self, levels: list[Level], targets: Targets, gibbs: Gibbs) -> None:
        self.etas = [level.eta for level in levels]
        self.states = [level.state for level in levels]
        self.x, self.z = [level.x for level in levels], [level.z for level in levels]
        self.targets, self.gibbs = targets, gibbs
        self.accepted = [0.0] * (len(levels) - 1)
        self.tried = [0] * (len(levels) - 1)
        self.sweeps = 0

    def sweep(self) -> Tensor:
        """Move all replicas, then try to exchange every other pair of neighbours.

        Returns:
            Images ``(B, C, H, W)`` at the last coupling.
        """
        for k, eta in enumerate(self.etas):
            self.states[k], self.x[k], self.z[k] = self.gibbs.sweep(self.states[k], self.x[k], eta)
        for k in range(self.sweeps % 2, len(self.etas) - 1, 2):
            self._exchange(k)
        self.sweeps += 1
        return self.x[-1]

    def _exchange(self, k: int) -> None:
        upper, lower = (self.targets.at(self.x[i], self.z[i]) for i in (k, k + 1))
        eta, eta_next = self.etas[k], self.etas[k + 1]
        delta = upper(eta_next) + lower(eta) - upper(eta) - lower(eta_next)
        u = self.gibbs.generator.uniform(dtype=torch.float64, device=delta.device)
        swap = u.log() < delta
        self.accepted[k] += float(swap.double().mean())
        self.tried[k] += 1
        where = swap.reshape(-1, 1, 1, 1)
        for v in (self.x, self.z):
            v[k], v[k + 1] = torch.where(where, v[k + 1], v[k]), torch.where(where, v[k], v[k + 1])
        for i in (k, k + 1):  # a kernel that goes on from the draw before has to go on from the replica's own
            if hasattr(self.states[i], "z"):
                self.states[i] = self.states[i]._replace(z=self.z[i])

    def record(self) -> dict[str, Any]:
        """Couplings and how often neighbours were exchanged, JSON-able."""
        rates = [a / t if t else None for a, t in zip(self.accepted, self.tried, strict=True)]
        return {"etas": self.etas, "exchange_rates": rates, "sweeps": self.sweeps}


def start_replicas(
    settings: ReplicaExchange,
    gibbs: Gibbs,
    forward_model: ForwardModel,
    y: Tensor,
    like: Tensor,
    eta_max: float,
    eta_min: float,
    generator: torch.Generator,
) -> Replicas:
    """Find the ladder and the first replicas; arguments as of :class:`~dpnp_inference.population.Path`."""
    levels: list[Level] = []
    Path(settings.ladder, gibbs, forward_model, y, like, eta_max, eta_min, generator).run(levels.append)
    gibbs.standing = {}
    levels = [level for level in levels if level.power == 1]
    first = levels[0]
    added = max(0, math.ceil(math.log(eta_max / first.eta) / math.log(settings.step)))
    levels[:0] = [first._replace(eta=eta_max * (first.eta / eta_max) ** (i / added)) for i in range(added)]
    split = gibbs.proximal.split_variance(levels[-1].state)
    targets, _ = choose_targets(forward_model, y, split)
    replicas = Replicas(levels, targets, gibbs)
    for _ in range(settings.burn_in):
        replicas.sweep()
    return replicas
