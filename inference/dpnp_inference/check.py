"""Simulated pairs of truth and measurement, on which a configuration of the sampler is checked."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from rich.console import Console
from torch import Tensor

from dpnp_inference.acceleration import BatchSize
from dpnp_inference.calibration import Ranks, rank_pair
from dpnp_inference.dpnp import DPnP, Sweep
from dpnp_inference.files import check_output
from dpnp_inference.posterior import Posterior
from dpnp_inference.progress import Live, describe_sweep
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.folders import staged_folder
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.randomness import derive_seed
from dpnp_shared.solvers import sample_unconditional

log = logging.getLogger(__name__)

PAIRS, CONFIGURATION = "pairs.json", "configuration.json"
Truths = Literal["flow", "sampler"]
TRUTH, MEASUREMENT, CHAINS, RANKS, CHOICE = range(5)  # what a pair's seed is for


@runtime_checkable
class ExactPrior(Protocol):
    """A prior that draws from itself exactly, as analytic ones do."""

    def sample(self, n: int, *, generator: torch.Generator | None, dtype: torch.dtype | None = None) -> Tensor:
        """Draw ``(n, C, H, W)``."""
        ...


def pair_seed(seed: int, pair: int, purpose: int) -> int:
    """The seed of one pair for one of ``TRUTH``, ``MEASUREMENT``, ``CHAINS``, ``RANKS`` and ``CHOICE``.

    Args:
        seed: the user's.
        pair: number of the pair.
        purpose: what it is for.
    """
    return derive_seed(seed, pair, purpose)


@torch.no_grad()
def simulate_pair(
    prior: Denoiser,
    forward_model: ForwardModel,
    *,
    seed: int,
    pair: int,
    calls: int = 40,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    sampler: DPnP | None = None,
) -> tuple[Tensor, Tensor]:
    """A truth from the prior, and a measurement of it.

    An analytic prior is drawn from exactly, a trained one by its probability flow; or both as a sampler sees them.

    Args:
        prior: gives the truth.
        forward_model: gives the measurement.
        seed: the user's, not negative.
        pair: number of the pair; the result depends on ``(seed, pair)`` only.
        calls: network calls of the probability flow.
        dtype: of the images.
        device: where prior and forward model are.
        sampler: takes the truth from :meth:`DPnP.sample_prior <dpnp_inference.dpnp.DPnP.sample_prior>` of this sampler.

    Returns:
        ``x`` ``(C, H, W)`` and ``y`` ``(*y_shape)``.
    """
    generator = torch.Generator().manual_seed(pair_seed(seed, pair, TRUTH))
    if sampler is not None:
        x = sampler.sample_prior(1, seed=pair_seed(seed, pair, TRUTH))
    elif isinstance(prior, ExactPrior):
        x = prior.sample(1, generator=generator, dtype=dtype).to(device)
    else:
        x = sample_unconditional(prior, 1, generator=generator, steps=calls, dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(pair_seed(seed, pair, MEASUREMENT))
    return x[0], forward_model.simulate(x, generator=generator)[0]


class Sampler(Protocol):
    """What is checked: :class:`~dpnp_inference.dpnp.DPnP`, :class:`~dpnp_inference.baselines.DPS`, or anything like them."""

    prior: Denoiser
    forward_model: ForwardModel
    dtype: torch.dtype
    device: torch.device

    def sample(
        self,
        y: Tensor,
        *,
        chains: int,
        seed: int,
        batch_size: BatchSize = None,
        on_sweep: Callable[[Sweep], None] | None = None,
    ) -> Posterior:
        """Independent draws from the posterior of a measurement."""
        ...


class PairStore:
    """Finished pairs of a check on disk, so that nothing is done twice.

    Until the check is finished each pair has a file in a folder beside the output, ``<output>.unfinished``; then all of them are
    ``pairs.json`` of the output, from where a check of more pairs goes on.

    Args:
        output: the folder that the check will make.
        same: what the pairs depend on, as JSON; pairs of anything else are refused.
        overwrite: replace an earlier run in ``output``; its pairs are taken over if they are of the same configuration.

    Attributes:
        done: JSON of the finished pairs, by number.

    Raises:
        FileExistsError: ``output`` is taken, or there are unfinished pairs of another configuration; says which part differs.
    """

    def __init__(self, output: Path, same: dict[str, Any], *, overwrite: bool) -> None:
        check_output(output, overwrite=overwrite)
        self.output, self.same = output, json.loads(json.dumps(same))
        self.folder = output.with_name(f"{output.name}.unfinished")
        self.done: dict[int, dict[str, Any]] = {}
        if (output / PAIRS).is_file():
            earlier = json.loads((output / PAIRS).read_text(encoding="utf-8"))
            if earlier["configuration"] == self.same:
                self.done = {int(pair): record for pair, record in earlier["pairs"].items()}
        if self.folder.exists():
            found = json.loads((self.folder / CONFIGURATION).read_text(encoding="utf-8"))
            if found != self.same:
                differ = [key for key in {*found, *self.same} if found.get(key) != self.same.get(key)]
                raise FileExistsError(
                    f"{self.folder} holds unfinished pairs of another configuration ({', '.join(sorted(differ))}); "
                    "remove it or choose another output"
                )
            for file in self.folder.glob("pair_*.json"):
                self.done[int(file.stem.removeprefix("pair_"))] = json.loads(file.read_text(encoding="utf-8"))

    def add(self, pair: int, record: dict[str, Any]) -> None:
        """Keep a finished pair; a process that is killed meanwhile leaves the whole file or none."""
        if not self.folder.exists():
            with staged_folder(self.folder) as staging:
                (staging / CONFIGURATION).write_text(json.dumps(self.same, indent=1) + "\n", encoding="utf-8")
        staged = self.folder / f".pair_{pair}.tmp"
        staged.write_text(json.dumps(record) + "\n", encoding="utf-8")
        os.replace(staged, self.folder / f"pair_{pair:05d}.json")
        self.done[pair] = record

    @contextmanager
    def finish(self) -> Iterator[Path]:
        """The output folder, which is there as a whole when the block ends well; the unfinished one then goes."""
        with staged_folder(self.output) as staging:
            record = {"configuration": self.same, "pairs": {str(pair): self.done[pair] for pair in sorted(self.done)}}
            (staging / PAIRS).write_text(json.dumps(record) + "\n", encoding="utf-8")
            yield staging
        shutil.rmtree(self.folder, ignore_errors=True)


class PairProgress(Live):
    """Pairs done, and what the present one does; lines of the log where there is no terminal.

    Args:
        pairs: how many there will be.
        console: where to draw; standard error by default.
    """

    def __init__(self, pairs: int, console: Console | None = None) -> None:
        super().__init__(console)
        self.pairs = pairs
        self._task = self.progress.add_task("pairs", total=pairs, state="")

    def sweep(self, sweep: Sweep) -> None:
        """Show one iteration of the present pair."""
        iterations = "" if sweep.iterations is None else f"/{sweep.iterations}"
        state = f"iteration {sweep.iteration}{iterations} · {describe_sweep(sweep)}"
        self.progress.update(self._task, state=state)

    def pair(self, done: int) -> None:
        """Show how many pairs are done."""
        self.progress.update(self._task, completed=done)
        if not self.is_live and (done == self.pairs or done % max(1, self.pairs // 10) == 0):
            log.info("%d of %d pairs", done, self.pairs)


def check_pairs(
    sampler: Sampler,
    *,
    pairs: int,
    draws: int,
    seed: int,
    chains: int | None = None,
    batch_size: BatchSize = None,
    truths: Truths = "flow",
    store: PairStore | None = None,
    progress: PairProgress | None = None,
) -> Ranks:
    """Simulate pairs, draw from the posterior of each, and rank each truth among its draws.

    The ranks go to :func:`~dpnp_inference.calibration.assess`. Truths come from the sampler's own prior, so that they tell of the sampler
    and its configuration, and nothing of whether the prior knows the user's images.

    Args:
        sampler: prior, forward model and configuration.
        pairs: how many.
        draws: posterior draws of each pair, one a chain; 39 is the least that has 95% intervals.
        seed: not negative; a pair depends on ``(seed, its number)`` only.
        chains: chains that are run for each pair, of which so many draws are taken at random; as many as draws by default. More
            make sense where chains work together, as the particles of a population do.
        batch_size: chains that run together.
        truths: ``flow`` draws them from the prior, a trained one by its probability flow; ``sampler`` by the sampler's own schedule without
            a measurement. Where a check with the former finds fault and one with the latter does not, the measurement enters rightly, and
            the prior as the sampler draws it is not that of the flow: by the discretisation of the denoising sampler, which more calls
            lessen, or since the noise levels of a network contradict each other.
        store: where finished pairs are kept and found.
        progress: is told of every iteration and pair.

    Returns:
        The ranks of all pairs.

    Raises:
        ValueError: there are fewer chains than draws.
        TypeError: ``truths="sampler"`` of a sampler that has no ``sample_prior``.
        SamplingError: a chain has left the finite numbers; pairs before it are kept.
    """
    chains = draws if chains is None else chains
    if chains < draws:
        raise ValueError(f"chains = {chains} are fewer than draws = {draws}")
    if truths == "sampler" and not isinstance(sampler, DPnP):
        raise TypeError(f"truths = 'sampler' needs a DPnP, and {type(sampler).__name__} is none")
    found: dict[int, dict[str, Any]] = {} if store is None else store.done
    ranks = []
    for pair in range(pairs):
        if pair in found:
            ranks.append(Ranks.from_json(found[pair]["ranks"]))
        else:
            x, y = simulate_pair(
                sampler.prior,
                sampler.forward_model,
                seed=seed,
                pair=pair,
                dtype=sampler.dtype,
                device=sampler.device,
                sampler=sampler if truths == "sampler" and isinstance(sampler, DPnP) else None,
            )
            posterior = sampler.sample(
                y,
                chains=chains,
                seed=pair_seed(seed, pair, CHAINS),
                batch_size=batch_size,
                on_sweep=None if progress is None else progress.sweep,
            )
            generator = torch.Generator().manual_seed(pair_seed(seed, pair, CHOICE))
            chosen = posterior.flat[torch.randperm(chains, generator=generator)[:draws]]
            ranks.append(rank_pair(x, chosen, seed=pair_seed(seed, pair, RANKS)))
            if store is not None:
                figures = {key: posterior.diagnostics[key] for key in ("network_calls", "seconds")}
                store.add(pair, {"ranks": ranks[-1].to_json(), **figures})
        if progress is not None:
            progress.pair(pair + 1)
    return Ranks.join(ranks)
