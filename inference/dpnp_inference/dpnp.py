r"""DPnP: posterior sampling by alternating a proximal and a denoising sampler (Xu & Chi 2024, arXiv 2403.17042, algorithm 1).

For couplings :math:`\eta_1 \ge \eta_2 \ge \dots` repeat

1. proximal consistency: :math:`z \sim L(z; y)\, N(z; x, \eta^2 I)`,
2. denoising diffusion: :math:`x \sim p(x_0 \mid x_0 + \eta w = z)`.

At fixed η this is Gibbs sampling of :math:`\propto p(x) L(z; y) N(z; x, \eta^2 I)`. Its bias vanishes with the last η, or at once where the
proximal sampler splits exactly.

Chains may run on their own, each annealed by itself; as a population of weighted particles (:mod:`dpnp_inference.population`); or each with
replicas that are exchanged (:mod:`dpnp_inference.replica_exchange`). The latter two give well separated modes their right weights.
"""

from __future__ import annotations

import logging
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dpnp_inference.acceleration import BatchSize, chains_together
from dpnp_inference.annealing import Annealing
from dpnp_inference.checkpoint import Checkpoints, FolderLock, RunError
from dpnp_inference.dds import DenoisingSampler, make_dds
from dpnp_inference.fingerprint import describe, differences
from dpnp_inference.fit import record_fit
from dpnp_inference.gibbs import START_CALLS, OnSweep, SamplingError, Sweep
from dpnp_inference.population import Population
from dpnp_inference.posterior import Posterior
from dpnp_inference.proximal import MarkovKernel, ProximalSampler, choose_proximal
from dpnp_inference.randomness import ChainGenerators
from dpnp_inference.replica_exchange import ReplicaExchange
from dpnp_inference.runs import Run, Task, make_run, on_cpu
from dpnp_inference.state import State
from dpnp_inference.streaming import DrawStore, Keep
from dpnp_shared.denoiser import Denoiser, check_white
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.solvers import denoise_noise

__all__ = ["DPnP", "SamplingError", "Sweep", "image_shape_of"]

log = logging.getLogger(__name__)

LEAST_JUMP = 0.1  # at the last coupling, where the likelihood does not dominate, a kernel that mixes has a jump near 1
LEAST_ACCEPTANCE = 0.01  # below it, with proposals that are not finite, the forward model is to blame
MOST_STILL = 0.05  # part of the draws that repeat the one before
CHECKPOINT_EVERY = 60.0  # seconds
GROWING = ("chains", "draws", "batch_size")  # what an extended run may have more of, or otherwise


class DPnP:
    """Draws from the posterior of an image given a measurement.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: operator and noise.
        dds: denoising sampler: ``ddim``, ``ddpm``, or an object.
        proximal: proximal sampler; ``auto`` takes the most exact one that the forward model allows and logs which.
        annealing: coupling schedule; ``auto`` takes its ends from the prior and the noise. With a population or with replicas
            only the ends count, and the steps between them follow from the particles.
        population: False for single chains; True for particles that are weighted and resampled, which gives separated modes
            their right weights and the evidence; a :class:`Population` or :class:`ReplicaExchange` for settings of one's own.
        dtype: of images and kernels; a trained network computes in its own.

    Prior and forward model must be on one device.

    Raises:
        ValueError: an unknown name, or an operator for another number of channels than the prior's.
        TypeError: ``proximal="auto"`` and the forward model allows no sampler; or the prior is for noise that is not white.
    """

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        dds: Literal["ddim", "ddpm"] | DenoisingSampler = "ddim",
        proximal: Literal["auto"] | ProximalSampler = "auto",
        annealing: Literal["auto"] | Annealing = "auto",
        population: bool | Population | ReplicaExchange = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_white(prior, "DPnP")
        self.prior, self.forward_model, self.dtype = prior, forward_model, dtype
        self.device = next((t.device for t in (*prior.parameters(), *prior.buffers())), torch.device("cpu"))
        self.image_shape = image_shape_of(prior, forward_model)
        self.kernel_model = forward_model.homogeneous  # what kernels see, with y less what a blank image gives
        self.dds = make_dds(dds)
        self.population = Population() if population is True else population
        if isinstance(proximal, str):
            if proximal != "auto":
                raise ValueError(f"proximal = {proximal!r}; allowed are 'auto' and a ProximalSampler")
            self.proximal, reason = choose_proximal(self.kernel_model)
            log.info("proximal sampler: %s", reason)
        else:
            self.proximal = proximal
        if isinstance(annealing, str):
            if annealing != "auto":
                raise ValueError(f"annealing = {annealing!r}; allowed are 'auto' and an Annealing")
            annealing = Annealing()
        self.schedule = annealing.schedule(
            prior, self.kernel_model, self.blank(), exact_splitting=self.proximal.exact_splitting
        )
        prior.check_sigma(torch.tensor(self.schedule))
        tempered = isinstance(self.proximal, MarkovKernel) and not self.population  # which has a path of its own
        self.powers = [annealing.power(eta, self.schedule[-1]) if tempered else 1.0 for eta in self.schedule]

    @property
    def plan(self) -> str:
        """What is going to happen to the coupling, in one sentence for the log."""
        high, low = self.schedule[0], self.schedule[-1]
        if isinstance(self.population, Population):
            return f"a population from the prior to eta = {low:.3g}, in steps that its weights decide"
        if isinstance(self.population, ReplicaExchange):
            return f"replicas between eta = {high:.3g} and {low:.3g}, on a ladder that a small population finds"
        tempering = f", likelihood's power from {self.powers[0]:.2g} to 1" if self.powers[0] < 1 else ""
        return f"{len(self.schedule)} iterations, eta from {high:.3g} to {low:.3g}{tempering}"

    def blank(self, chains: int = 1) -> Tensor:
        """Zeros ``(chains, C, H, W)`` of the dtype and on the device that sampling uses."""
        return torch.zeros((chains, *self.image_shape), dtype=self.dtype, device=self.device)

    def sample(
        self,
        y: Tensor,
        *,
        chains: int,
        seed: int,
        draws: int = 1,
        thin: int = 1,
        batch_size: BatchSize = None,
        on_sweep: OnSweep | None = None,
        keep: Keep = "all",
        checkpoint: str | Path | None = None,
        checkpoint_every: float = CHECKPOINT_EVERY,
        extend: Posterior | str | Path | None = None,
        keep_state: bool = True,
    ) -> Posterior:
        """Draw from the posterior.

        Args:
            y: one measurement, without a batch dimension.
            chains: how many chains, or particles.
            seed: not negative; the randomness of chain i depends on ``(seed, i)`` only. (Particles of a population and chains
                with replicas share their resampling.)
            draws: draws of each chain; the first ends the annealing, the others follow at the last coupling.
            thin: iterations from one draw to the next.
            batch_size: images in a network call, all by default, or ``auto`` for as many as fit the memory; it changes memory and
                speed, not the draws (up to the rounding of floating-point sums, which may depend on the batch).
            on_sweep: called after each iteration.
            keep: ``"all"`` draws; ``"statistics"`` of all draws and the last draw of each chain; or statistics and so many draws of each
                chain. But for ``"all"`` the memory does not grow with ``draws``.
            checkpoint: folder for the state of the run. If a run of the same settings was interrupted, the same call goes on from there
                and gives the same draws. The state of a finished run stays until the folder is removed.
            checkpoint_every: seconds from one state to the next; 0 for each iteration.
            extend: a posterior of fewer chains or draws but otherwise the same settings, or its folder, that is gone on with.
            keep_state: keep what the posterior can be extended with, some 25 kB a chain and the images where chains have arrived.

        Returns:
            The draws and the record of how they came about.

        Raises:
            ValueError: an argument out of range, or a measurement that does not fit the forward model.
            RunError: what is to be gone on with is of other settings (says which), cannot be extended in this way, or another process is
                at it. It is a ValueError.
            SamplingError: a chain has left the finite numbers.
        """
        if isinstance(extend, str | Path):
            extend = Posterior.load(extend)
        task = self.task(y, chains, seed, draws, thin, batch_size, keep, on_sweep)
        if checkpoint is None:
            return self.finish(self.advance(task, None, extend), keep_state=keep_state)
        folder = Path(checkpoint)
        with FolderLock(folder):
            checkpoints = Checkpoints(folder, self.settings(task), every=checkpoint_every)
            return self.finish(self.advance(task, checkpoints, extend), keep_state=keep_state)

    def task(
        self,
        y: Tensor,
        chains: int,
        seed: int,
        draws: int = 1,
        thin: int = 1,
        batch_size: BatchSize = None,
        keep: Keep = "all",
        on_sweep: OnSweep | None = None,
    ) -> Task:
        """What :meth:`sample` is to do, checked; arguments and errors as there."""
        for name, value, least in (("chains", chains, 1), ("draws", draws, 1), ("thin", thin, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        together = chains_together(batch_size, chains)
        self.forward_model.check_measurement(y, self.image_shape, dtype=self.dtype, device=self.device)
        y = y.to(device=self.device, dtype=self.dtype.to_complex() if y.is_complex() else self.dtype)
        y = self.forward_model.homogeneous_measurement(y, self.blank(1))
        store = DrawStore(keep, self.image_shape, chains=chains, draws=draws, dtype=self.dtype)
        return Task(
            self, y, range(chains), seed, draws, thin, together, store, on_sweep, fit_memory=batch_size == "auto"
        )

    def settings(self, task: Task) -> State:
        """All that the draws of a task depend on, JSON-able; to be compared with those that a state was written under."""
        return {
            "chains": [task.chains.start, task.chains.stop],
            "draws": task.draws,
            "thin": task.thin,
            "seed": task.seed,
            "batch_size": "auto" if task.fit_memory else task.batch_size,
            "keep": task.store.keep,
            "measurement": describe(task.y),
            "prior": describe(self.prior),
            "forward_model": describe(self.forward_model),
            "dds": describe(self.dds),
            "proximal": describe(self.proximal),
            "population": describe(self.population),
            "schedule": describe(self.schedule),
            "powers": describe(self.powers),
            "precision": str(self.dtype),
            "device": self.device.type,
            "dpnp-imaging": version("dpnp-imaging"),
            "torch": torch.__version__,
        }

    @torch.no_grad()
    def advance(self, task: Task, checkpoints: Checkpoints | None = None, extend: Posterior | None = None) -> Run:
        """Do a task, from its beginning or from where a state says.

        Args:
            task: what is to be drawn; its store takes the draws.
            checkpoints: where states are, and go to.
            extend: what to go on with, where there is no state of its extension yet.

        Returns:
            The run, done.

        Raises:
            RunError, SamplingError: as for :meth:`sample`.
        """
        start, run = time.perf_counter(), make_run(task)
        state = checkpoints.load() if checkpoints is not None else None
        earlier = extending(extend, self.settings(task), task.store) if extend is not None else None
        if state is not None:
            run.load_state_dict(state["run"])
            task.store.load_state_dict(state["store"])
            run.seconds = state["seconds"]
        elif extend is not None and earlier is not None:
            run.load_state_dict(earlier["run"])
            run.seconds = extend.diagnostics["seconds"]
        if run.iteration:
            of = f" of {run.iterations}" if run.iterations else ""
            log.info("going on after iteration %d%s", run.iteration, of)
        before = run.seconds

        while not run.done:
            run.advance()
            run.seconds = before + time.perf_counter() - start
            if checkpoints is not None and (checkpoints.due or run.done):
                try:
                    checkpoints.save(
                        {"run": run.state_dict(), "store": task.store.state_dict(), "seconds": run.seconds}
                    )
                except TypeError as error:
                    log.warning("this run could not be gone on with if it were interrupted: %s", error)
                    checkpoints = None
        return run

    def finish(self, run: Run, *, keep_state: bool = True, judge: bool = True) -> Posterior:
        """The posterior of a run that is done.

        Args:
            run: it.
            keep_state: as for :meth:`sample`.
            judge: whether R-hat and effective sample sizes are worked out.
        """
        task = run.task
        diagnostics = {
            "sampler": "DPnP",
            "dds": repr(self.dds),
            "proximal": repr(self.proximal),
            "exact_splitting": self.proximal.exact_splitting,
            "schedule": self.schedule,
            "powers": self.powers,
            "chains": len(task.chains),
            "draws": task.draws,
            "thin": task.thin,
            "seed": task.seed,
            "seconds": run.seconds,
            **run.record(),
        }
        diagnostics["warnings"] = movement_warnings(diagnostics["proximal"], diagnostics["iterations"])
        for warning in diagnostics["warnings"]:
            log.warning("%s", warning)
        state = None
        if keep_state:
            try:
                state = {"run": on_cpu(run.state_dict()), "settings": self.settings(task)}
            except TypeError as error:
                log.warning("this run cannot be extended: %s", error)
        posterior = Posterior(task.store.samples, diagnostics, task.store.statistics, state)
        draws = posterior.flat.to(device=self.device, dtype=self.dtype)
        diagnostics["fit"] = record_fit(self.kernel_model, task.y, draws, seed=task.seed)
        posterior.diagnostics["convergence"] = posterior.convergence() if judge else None
        return posterior

    @torch.no_grad()
    def sample_prior(self, n: int, *, seed: int) -> Tensor:
        r"""What this sampler draws when nothing is measured: the schedule with :math:`z = x + \eta w` as proximal step.

        With an exact score and many network calls these are draws from the prior. Else it is the prior that the sampler works with: it has
        the denoising sampler's discretisation, and the noise levels of a trained network may contradict each other, so that it need not be
        the law of the network's probability flow.

        Args:
            n: number of images.
            seed: not negative; image i depends on ``(seed, i)`` only.

        Returns:
            ``(n, C, H, W)``.

        Raises:
            ValueError: an argument out of range.
        """
        for name, value, least in (("n", n, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        generator = ChainGenerators(seed, range(n))
        x = denoise_noise(self.prior, generator.normal_like(self.blank(n)), START_CALLS)
        for eta in self.schedule:
            x, _ = self.dds(self.prior, x + eta * generator.normal_like(x), eta, generator=generator)
        return x


def extending(posterior: Posterior, settings: State, store: DrawStore) -> State:
    """Put a posterior's draws into the store of a run that goes on from it.

    Args:
        posterior: of fewer chains or draws.
        settings: of the new run.
        store: of the new run, empty.

    Returns:
        The posterior's state.

    Raises:
        RunError: it has no state, or is of other settings; says which.
    """
    if posterior.state is None:
        raise RunError("this posterior was kept without the state of its run, so that it cannot be extended")
    before: State = posterior.state["settings"]
    same = [{name: value for name, value in s.items() if name not in GROWING} for s in (before, settings)]
    if found := differences(*same):
        raise RunError(f"a run can be extended by chains and draws only; these differ: {'; '.join(found)}")
    (_, chains), draws = before["chains"], before["draws"]
    more_chains, more_draws = settings["chains"][1] - chains, settings["draws"] - draws
    if min(more_chains, more_draws) < 0 or more_chains == more_draws == 0:
        raise RunError(
            f"the run has {chains} chains of {draws} draws, asked for are {settings['chains'][1]} of {settings['draws']}; one of the two "
            "must be more, and none fewer"
        )
    if more_chains and settings["population"] is not False:
        raise RunError(
            "particles of a population and chains with replicas depend on each other: only draws can be added to them"
        )
    store.take(posterior.samples, posterior.statistics, range(chains), draws)
    return posterior.state


def image_shape_of(prior: Denoiser, forward_model: ForwardModel) -> tuple[int, int, int]:
    """``(C, H, W)`` of the images to draw: what the operator takes if it says so, else what the prior was trained at.

    Raises:
        ValueError: the operator takes images of another number of channels than the prior's.
    """
    shape = forward_model.operator.image_shape
    if shape is None:
        return prior.image_shape
    if shape[0] != prior.image_shape[0]:
        raise ValueError(
            f"the operator takes images of shape {shape}, the prior was trained at {prior.image_shape} (C, H, W)"
        )
    return shape


def movement_warnings(kernel: str, batches: list[list[dict[str, float]]]) -> list[str]:
    """What to do about a proximal sampler whose chains hardly move at the last coupling.

    Args:
        kernel: what it is called.
        batches: the record of each batch's iterations.

    Returns:
        One sentence for each trouble; none for a sampler that moves or whose draws are independent.
    """
    last = min(row["eta"] for rows in batches for row in rows)
    rows = [row for rows in batches for row in rows if row["eta"] == last and "jump" in row]
    if not rows:
        return []
    jump, still = (sum(row[name] for row in rows) / len(rows) for name in ("jump", "still"))
    acceptance = sum(row["acceptance"] for row in rows) / len(rows)
    non_finite = sum(row["non_finite"] for row in rows) / len(rows)
    if jump >= LEAST_JUMP and still <= MOST_STILL:
        return []
    remedy = (
        "the likelihood is NaN or zero at most proposals: look at the forward model with 'dpnp-reconstruct check-model'"
        if non_finite > 0 and acceptance < LEAST_ACCEPTANCE
        else "give it more steps (proximal.steps) or a smaller eta_min; for a differentiable model try HMC, for one that is not "
        "see whether it can be made so; 'dpnp-reconstruct check-model' finds a wrong gradient or scale"
    )
    what = "hardly moves" if jump < LEAST_JUMP else "often stands still"
    return [
        f"{kernel} {what} at eta = {last:.3g}: a draw goes {jump:.2%} of the way of an independent one, {still:.0%} of the "
        f"draws stay where they were, acceptance {acceptance:.1%}. The draws do not cover the posterior; {remedy}"
    ]
