"""Runs of DPnP that go on one iteration at a time, and whose state can be kept in between.

There is one for each way to sample: chains on their own, populations, and chains with replicas. Each knows where it is in its schedule,
gives its draws to a store as they come, and begins from its own start or from a state alike, so that a run that was interrupted does
what it would have done. A state leaves out what follows from the settings: models, factorisations, and the tensors of a proximal
sampler's state that its ``init`` has made.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpnp_inference.acceleration import in_batches
from dpnp_inference.gibbs import Gibbs, OnSweep
from dpnp_inference.population import Level, Path, Population, systematic_resampling
from dpnp_inference.proximal import MarkovKernel, TemperedForwardModel
from dpnp_inference.randomness import ChainGenerators
from dpnp_inference.replica_exchange import ReplicaExchange, Replicas, level_of, level_state, start_replicas
from dpnp_inference.state import State, changes, restored
from dpnp_inference.streaming import DrawStore
from dpnp_shared.randomness import derive_seed

if TYPE_CHECKING:
    from dpnp_inference.dpnp import DPnP

NOT_A_CHAIN = 2**32  # no chain has an index from here on: 2^32 is the simulated measurement's


@dataclass(frozen=True)
class Task:
    """What is to be drawn, and how.

    Attributes:
        sampler: prior, models, kernels and schedule.
        y: the measurement as kernels see it ``(*y_shape)``.
        chains: their indices.
        seed: of all randomness.
        draws: of each chain.
        thin: iterations from one draw to the next.
        batch_size: chains that run together, and the most images in a network call.
        store: takes the draws.
        on_sweep: called after each iteration.
        fit_memory: whether network calls are split further, so that they fit the memory.
    """

    sampler: DPnP
    y: Tensor
    chains: range
    seed: int
    draws: int
    thin: int
    batch_size: int
    store: DrawStore
    on_sweep: OnSweep | None = None
    fit_memory: bool = False

    @property
    def after_first(self) -> int:
        """Iterations after the first draw."""
        return self.thin * (self.draws - 1)

    def gibbs(self, chains: range, iterations: int | None = None) -> Gibbs:
        """The two conditional draws for some of the chains."""
        sampler = self.sampler
        prior = in_batches(sampler.prior, "auto" if self.fit_memory else self.batch_size, len(chains))
        generator = ChainGenerators(self.seed, chains)
        return Gibbs(prior, sampler.proximal, sampler.dds, generator, chains, iterations, self.on_sweep)

    def path(self, settings: Population, gibbs: Gibbs, number: int) -> Path:
        """The path of a population, whose resampling has a stream of its own."""
        return Path(
            settings,
            gibbs,
            self.sampler.kernel_model,
            self.y,
            self.sampler.blank(len(gibbs.chains)),
            self.sampler.schedule[0],
            self.sampler.schedule[-1],
            torch.Generator().manual_seed(derive_seed(self.seed, number)),
        )


class Run(ABC):
    """A run that goes on one iteration at a time.

    Attributes:
        task: what it is to draw.
        iterations: how many there will be; None where that is decided as it goes.
        seconds: that a run which is done has taken, over all its interruptions.
    """

    task: Task
    iterations: int | None
    seconds: float = 0.0

    @property
    @abstractmethod
    def iteration(self) -> int:
        """How many iterations are done."""

    @property
    @abstractmethod
    def done(self) -> bool:
        """Whether all draws are made."""

    @abstractmethod
    def advance(self) -> None:
        """Do one iteration.

        Raises:
            SamplingError: a chain has left the finite numbers.
        """

    @abstractmethod
    def state_dict(self) -> State:
        """All that a later iteration depends on, without the store; see :mod:`~dpnp_inference.state`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called, on a run that has not begun; it may ask for more than that one did."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """How the draws came about, JSON-able."""


def make_run(task: Task) -> Run:
    """The run of a sampler's kind."""
    settings = task.sampler.population
    if isinstance(settings, Population):
        return PopulationRun(task, settings)
    return ReplicaRun(task, settings) if isinstance(settings, ReplicaExchange) else ChainRun(task)


class ChainRun(Run):
    """Independent chains, a batch after the other."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.batches = [Batch(task, chains) for chains in batches_of(task.chains, task.batch_size)]

    @property
    def iterations(self) -> int:  # type: ignore[override] # it is known here
        """How many there will be, in all batches together."""
        return len(self.batches) * self._each

    @property
    def _each(self) -> int:
        return len(self.task.sampler.schedule) + self.task.after_first

    @property
    def iteration(self) -> int:
        """How many iterations are done, in all batches together."""
        return sum(batch.position for batch in self.batches)

    @property
    def done(self) -> bool:
        """Whether all draws are made."""
        return all(batch.position == self._each for batch in self.batches)

    def advance(self) -> None:
        """See :class:`Run`."""
        batch = next(batch for batch in self.batches if batch.position < self._each)
        batch.advance()
        if batch.position == self._each:
            batch.put_away()

    def state_dict(self) -> State:
        """See :class:`Run`."""
        return {"batches": [batch.state_dict() for batch in self.batches if batch.position]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Run`; batches stay as they were, and further chains make further ones."""
        begun = [Batch(self.task, range(*saved["chains"]), saved) for saved in state["batches"]]
        rest = range(begun[-1].chains.stop if begun else self.task.chains.start, self.task.chains.stop)
        self.batches = begun + [Batch(self.task, chains) for chains in batches_of(rest, self.task.batch_size)]

    def record(self) -> dict[str, Any]:
        """See :class:`Run`."""
        return merged([batch.record() for batch in self.batches])


def batches_of(chains: range, size: int) -> list[range]:
    """Chains in groups of a size, the last of which may be smaller."""
    return [range(first, min(first + size, chains.stop)) for first in range(chains.start, chains.stop, size)]


class Batch:
    """Some chains on their way through the schedule. It is set up when it first goes on, and put away when it is through.

    Args:
        task: what it is part of.
        chains: their indices.
        saved: where it is to go on from.
    """

    def __init__(self, task: Task, chains: range, saved: Mapping[str, Any] | None = None) -> None:
        self.task, self.chains, self.saved = task, chains, saved
        self.position: int = saved["position"] if saved else 0
        self.gibbs: Gibbs | None = None

    def _set_up(self) -> Gibbs:
        sampler = self.task.sampler
        gibbs = self.task.gibbs(self.chains, len(sampler.schedule) + self.task.after_first)
        like = sampler.blank(len(self.chains))
        self.model, self.power = sampler.kernel_model, 1.0
        if self.saved is None:
            self.x = gibbs.start(like)
            self.state = self.initial = sampler.proximal.init(self.model, self.task.y, self.x)
        else:
            gibbs.load_state_dict(self.saved["gibbs"])
            self.x = self.saved["x"].to(like.device)
            self.state = self.initial = sampler.proximal.init(self.model, self.task.y, like)
            self._temper(self.saved["power"])
            self.state = restored(self.state, self.saved["proximal"], like.device)
        self.gibbs, self.saved = gibbs, None
        return gibbs

    def advance(self) -> None:
        """One iteration, and a draw for the store where one is due."""
        gibbs, sampler = self.gibbs or self._set_up(), self.task.sampler
        past = self.position + 1 - len(sampler.schedule)
        eta, power = (sampler.schedule[-1], 1.0) if past > 0 else (sampler.schedule[past - 1], sampler.powers[past - 1])
        self._temper(power)
        self.state, self.x, _ = gibbs.sweep(self.state, self.x, eta)
        self.position += 1
        if past >= 0 and past % self.task.thin == 0:
            self.task.store.add(self.x, self.chains)

    def _temper(self, power: float) -> None:
        """Give the likelihood a power, if it is another than it has, and the kernel goes on from draw to draw."""
        kernel = self.task.sampler.proximal
        if power != self.power and isinstance(kernel, MarkovKernel):
            target = TemperedForwardModel(self.model, power) if power < 1 else self.model
            self.state, self.power = kernel.retarget(self.state, target), power

    def put_away(self) -> None:
        """Leave the device to the batches that follow, if the state can be kept."""
        with contextlib.suppress(TypeError):
            self.saved, self.gibbs = on_cpu(self.state_dict()), None
            del self.x, self.state, self.initial

    def record(self) -> Mapping[str, Any]:
        """The account of what it has cost so far."""
        return self.gibbs.record() if self.gibbs is not None else (self.saved or {})["gibbs"]

    def state_dict(self) -> State:
        """Where it is."""
        if self.gibbs is None:
            return dict(self.saved or {})
        return {
            "chains": [self.chains.start, self.chains.stop],
            "position": self.position,
            "power": self.power,
            "x": self.x,
            "proximal": changes(self.state, self.initial),
            "gibbs": self.gibbs.state_dict(),
        }


class PopulationRun(Run):
    """Populations, each weighted by its evidence.

    All of them are annealed before the first draw is given out, since the evidence of each says how many of the draws are its own.
    """

    iterations = None

    def __init__(self, task: Task, settings: Population) -> None:
        self.task, self.settings = task, settings
        self.groups = settings.divide(len(task.chains))
        self.parts = [PopulationPart(task, settings, group, i) for i, group in enumerate(self.groups)]
        self.shares: list[Tensor] = []  # of each population, which of its particles give a draw, once that is known

    @property
    def iteration(self) -> int:
        """How many steps along the paths and sweeps for further draws are done."""
        return sum(part.steps + part.sweeps for part in self.parts)

    @property
    def done(self) -> bool:
        """Whether all draws are made."""
        return bool(self.shares) and all(part.sweeps == self.task.after_first for part in self.parts)

    def advance(self) -> None:
        """See :class:`Run`."""
        if not self.shares:
            next(part for part in self.parts if part.log_evidence is None).anneal()
            if all(part.log_evidence is not None for part in self.parts):
                self._share()
                for i in range(len(self.parts)):
                    self._draw(i)
            return
        i = next(i for i, part in enumerate(self.parts) if part.sweeps < self.task.after_first)
        self.parts[i].sweep()
        if self.parts[i].sweeps % self.task.thin == 0:
            self._draw(i)

    @property
    def _evidence(self) -> Tensor:
        return torch.tensor([part.log_evidence for part in self.parts], dtype=torch.float64)

    def _share(self) -> None:
        """Resample all particles, each population with the weight of its evidence."""
        total = len(self.task.chains)
        index = torch.arange(total)
        if len(self.parts) > 1:
            sizes = torch.tensor([len(group) for group in self.groups])
            log_w = (self._evidence - sizes.log()).repeat_interleave(sizes)
            generator = torch.Generator().manual_seed(derive_seed(self.task.seed, NOT_A_CHAIN))
            u = torch.rand((), generator=generator, dtype=torch.float64)
            index = systematic_resampling(log_w, total, float(u))  # in ascending order
        self.shares = [index[(index >= g.start) & (index < g.stop)] - g.start for g in self.groups]

    def _draw(self, i: int) -> None:
        """Give a population's share of a draw to the store."""
        share, first = self.shares[i], sum(len(share) for share in self.shares[:i])
        if len(share):
            x = self.parts[i].path.x
            self.task.store.add(x[share.to(x.device)], range(first, first + len(share)))

    def state_dict(self) -> State:
        """See :class:`Run`."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Run`."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        if all(part.log_evidence is not None for part in self.parts):
            self._share()

    def record(self) -> dict[str, Any]:
        """See :class:`Run`."""
        evidence, n = self._evidence, len(self.parts)
        log_mean = float(evidence.logsumexp(0)) - math.log(n)
        relative = (evidence - log_mean).exp()  # of the evidence itself, whose mean has no bias
        return merged([part.gibbs.record() for part in self.parts]) | {
            "log_evidence": log_mean,
            "log_evidence_se": float(relative.std() / math.sqrt(n)) if n > 1 else None,
            "populations": [part.path.record for part in self.parts],
        }


class PopulationPart:
    """One population: first along its path, then sweep by sweep at the last coupling. It is set up when it first goes on."""

    def __init__(self, task: Task, settings: Population, chains: range, number: int) -> None:
        self.task, self.settings, self.chains, self.number = task, settings, chains, number
        self.steps = self.sweeps = 0
        self.log_evidence: float | None = None

    @cached_property
    def gibbs(self) -> Gibbs:
        """Its conditional draws."""
        return self.task.gibbs(self.chains)

    @cached_property
    def path(self) -> Path:
        """Its particles."""
        return self.task.path(self.settings, self.gibbs, NOT_A_CHAIN + 1 + self.number)

    def anneal(self) -> None:
        """One step along the path, and after the last one the evidence."""
        if self.steps == 0:
            self.path.start()
        self.path.step()
        self.steps += 1
        if self.path.done:
            self.log_evidence = self.path.finish()

    def sweep(self) -> None:
        """One sweep at the last coupling."""
        path = self.path
        path.state, path.x, path.z = self.gibbs.sweep(path.state, path.x, path.eta_min)
        self.sweeps += 1

    def state_dict(self) -> State:
        """Where it is; nothing if it has not begun."""
        if self.steps == 0:
            return {}
        return {
            "steps": self.steps,
            "sweeps": self.sweeps,
            "log_evidence": self.log_evidence,
            "path": self.path.state_dict(),
            "gibbs": self.gibbs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called."""
        if state:
            self.steps, self.sweeps, self.log_evidence = state["steps"], state["sweeps"], state["log_evidence"]
            self.path.load_state_dict(state["path"])
            self.gibbs.load_state_dict(state["gibbs"])


class ReplicaRun(Run):
    """Chains with replicas: a small population finds the ladder, then the replicas move and are exchanged."""

    iterations = None

    def __init__(self, task: Task, settings: ReplicaExchange) -> None:
        self.task, self.settings = task, settings
        self.gibbs = task.gibbs(task.chains)
        self.steps = 0
        self.levels: list[Level] = []
        self.replicas: Replicas | None = None

    @cached_property
    def path(self) -> Path:
        """Of the population that finds the ladder."""
        return self.task.path(self.settings.ladder, self.gibbs, NOT_A_CHAIN)

    @property
    def iteration(self) -> int:
        """How many steps along the path and sweeps of all replicas are done."""
        return self.steps + (self.replicas.sweeps if self.replicas else 0)

    @property
    def done(self) -> bool:
        """Whether all draws are made."""
        needed = self.settings.burn_in + self.task.thin * self.task.draws
        return self.replicas is not None and self.replicas.sweeps == needed

    def advance(self) -> None:
        """See :class:`Run`."""
        if self.replicas is None:
            if self.steps == 0:
                self.path.start()
            level = self.path.step()
            self.levels += [level] if level.power == 1 else []
            self.steps += 1
            if self.path.done:
                self.replicas = start_replicas(self.settings, self.path, self.levels)
            return
        x = self.replicas.sweep()
        past = self.replicas.sweeps - self.settings.burn_in
        if past > 0 and past % self.task.thin == 0:
            self.task.store.add(x, self.task.chains)

    def state_dict(self) -> State:
        """See :class:`Run`."""
        state: State = {"steps": self.steps, "gibbs": self.gibbs.state_dict()}
        if self.replicas is not None:
            return state | {"replicas": self.replicas.state_dict(self.path.initial)}
        levels = [level_state(level, self.path.initial) for level in self.levels]
        return state | {"levels": levels, "path": self.path.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Run`."""
        self.steps = state["steps"]
        self.gibbs.load_state_dict(state["gibbs"])
        initial, device = self.path.initial, self.task.sampler.device
        if "replicas" in state:
            levels = [level_of(level, initial, device) for level in state["replicas"]["levels"]]
            self.replicas = Replicas(levels, self.path.targets, self.gibbs)
            self.replicas.load_state_dict(state["replicas"])
        else:
            self.levels = [level_of(level, initial, device) for level in state["levels"]]
            self.path.load_state_dict(state["path"])

    def record(self) -> dict[str, Any]:
        """See :class:`Run`."""
        assert self.replicas is not None
        return merged([self.gibbs.record()]) | {"replica_exchange": self.replicas.record()}


def merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Records of several batches: calls are summed, iterations kept batch by batch."""
    return {
        "batches": len(records),
        "network_calls": sum(record["network_calls"] for record in records),
        "forward_calls": sum(record["forward_calls"] for record in records),
        "iterations": [record["iterations"] for record in records],
    }


def on_cpu(state: Any) -> Any:
    """A state whose tensors are in the computer's own memory."""
    if isinstance(state, dict):
        return {name: on_cpu(part) for name, part in state.items()}
    if isinstance(state, list):
        return [on_cpu(part) for part in state]
    return state.cpu() if isinstance(state, Tensor) else state
