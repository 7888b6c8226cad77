r"""DPnP with replica exchange (parallel tempering; Geyer 1991): exact in running time, as a population is in the number of particles.

Each chain keeps a replica at every coupling of a ladder. Gibbs sweeps move the replicas; then those of neighbouring couplings are
exchanged with probability :math:`\min(1, e^{\Delta})`, with the joint targets

.. math:: \Delta = \tfrac12 (|x_i - z_i|^2 - |x_j - z_j|^2) (1/\eta_i^2 - 1/\eta_j^2) .

The replica at the last coupling hops between modes by way of the first, where they mix. No exchange needs a network call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpnp_inference.gibbs import Gibbs
from dpnp_inference.population import Level, Path, Population
from dpnp_inference.state import changes, restored
from dpnp_inference.targets import Targets


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

    def state_dict(self, initial: Any) -> dict[str, Any]:
        """Where the replicas are; ``initial`` is what the proximal sampler's ``init`` gives."""
        return {
            "levels": [
                level_state(Level(*level), initial)
                for level in zip(self.etas, [1.0] * len(self.etas), self.states, self.x, self.z, strict=True)
            ],
            "accepted": list(self.accepted),
            "tried": list(self.tried),
            "sweeps": self.sweeps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counts of :meth:`state_dict`; its levels make the replicas."""
        self.accepted, self.tried, self.sweeps = list(state["accepted"]), list(state["tried"]), state["sweeps"]

    def record(self) -> dict[str, Any]:
        """Couplings and how often neighbours were exchanged, JSON-able."""
        rates = [a / t if t else None for a, t in zip(self.accepted, self.tried, strict=True)]
        return {"etas": self.etas, "exchange_rates": rates, "sweeps": self.sweeps}


def level_state(level: Level, initial: Any) -> dict[str, Any]:
    """A level as a state; ``initial`` is what the proximal sampler's ``init`` gives."""
    return {"eta": level.eta, "x": level.x, "z": level.z, "proximal": changes(level.state, initial)}


def level_of(state: Mapping[str, Any], initial: Any, device: torch.device) -> Level:
    """The level of :func:`level_state`."""
    x, z = state["x"].to(device), state["z"].to(device)
    return Level(state["eta"], 1.0, restored(initial, state["proximal"], device), x, z)


def start_replicas(settings: ReplicaExchange, path: Path, levels: list[Level]) -> Replicas:
    """Replicas on the ladder that a population has found.

    Args:
        settings: how.
        path: of the population.
        levels: what it came by, at the likelihood's full power.
    """
    path.gibbs.standing = {}
    first = levels[0]
    added = max(0, math.ceil(math.log(path.eta_max / first.eta) / math.log(settings.step)))
    rungs = [first._replace(eta=path.eta_max * (first.eta / path.eta_max) ** (i / added)) for i in range(added)]
    return Replicas([*rungs, *levels], path.targets, path.gibbs)
