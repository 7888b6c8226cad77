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
import math
import time
from typing import Any, Literal

import torch
from torch import Tensor

from dpnp_inference.annealing import Annealing
from dpnp_inference.dds import DenoisingSampler, make_dds
from dpnp_inference.gibbs import Batched, Gibbs, OnSweep, SamplingError, Sweep
from dpnp_inference.population import Particles, Path, Population, systematic_resampling
from dpnp_inference.posterior import Posterior
from dpnp_inference.proximal import MarkovKernel, ProximalSampler, TemperedForwardModel, choose_proximal
from dpnp_inference.randomness import ChainGenerators
from dpnp_inference.replica_exchange import ReplicaExchange, start_replicas
from dpnp_shared.denoiser import Denoiser, check_white
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.randomness import derive_seed

__all__ = ["DPnP", "SamplingError", "Sweep", "image_shape_of"]

log = logging.getLogger(__name__)

LEAST_JUMP = 0.1  # at the last coupling, where the likelihood does not dominate, a kernel that mixes has a jump near 1
LEAST_ACCEPTANCE = 0.01  # below it, with proposals that are not finite, the forward model is to blame
MOST_STILL = 0.05  # part of the draws that repeat the one before
NOT_A_CHAIN = 2**32  # no chain has an index from here on: 2^32 is the simulated measurement's


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
        batch_size: int | None = None,
        on_sweep: OnSweep | None = None,
    ) -> Posterior:
        """Draw from the posterior.

        Args:
            y: one measurement, without a batch dimension.
            chains: how many chains, or particles.
            seed: not negative; the randomness of chain i depends on ``(seed, i)`` only. (Particles of a population and chains
                with replicas share their resampling.)
            draws: draws of each chain; the first ends the annealing, the others follow at the last coupling.
            thin: iterations from one draw to the next.
            batch_size: images in a network call, all by default; it changes memory and speed, not the draws (up to the
                rounding of floating-point sums, which may depend on the batch).
            on_sweep: called after each iteration.

        Returns:
            The draws and the record of how they came about.

        Raises:
            ValueError: an argument out of range, or a measurement that does not fit the forward model.
            SamplingError: a chain has left the finite numbers.
        """
        for name, value, least in (("chains", chains, 1), ("draws", draws, 1), ("thin", thin, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        size = chains if batch_size is None else batch_size
        if size < 1:
            raise ValueError(f"batch_size = {batch_size}; it must be at least 1")
        self.forward_model.check_measurement(y, self.image_shape, dtype=self.dtype, device=self.device)
        y = y.to(device=self.device, dtype=self.dtype.to_complex() if y.is_complex() else self.dtype)
        y = self.forward_model.homogeneous_measurement(y, self.blank(1))
        start = time.perf_counter()
        if isinstance(self.population, Population):
            samples, record = self._run_populations(y, chains, seed, draws, thin, size, on_sweep)
        elif isinstance(self.population, ReplicaExchange):
            samples, record = self._run_replicas(y, chains, seed, draws, thin, size, on_sweep)
        else:
            samples, record = self._run_chains(y, chains, seed, draws, thin, size, on_sweep)
        diagnostics = {
            "sampler": "DPnP",
            "dds": repr(self.dds),
            "proximal": repr(self.proximal),
            "schedule": self.schedule,
            "powers": self.powers,
            "chains": chains,
            "draws": draws,
            "thin": thin,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            **record,
        }
        diagnostics["warnings"] = movement_warnings(diagnostics["proximal"], diagnostics["iterations"])
        for warning in diagnostics["warnings"]:
            log.warning("%s", warning)
        posterior = Posterior(samples, diagnostics)
        posterior.diagnostics["convergence"] = posterior.convergence()
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
        gibbs = self._gibbs(range(n), seed, n, None)
        x = gibbs.start(self.blank(n))
        for eta in self.schedule:
            x, _ = self.dds(self.prior, x + eta * gibbs.generator.normal_like(x), eta, generator=gibbs.generator)
        return x

    def _gibbs(
        self, chains: range, seed: int, size: int, on_sweep: OnSweep | None, iterations: int | None = None
    ) -> Gibbs:
        prior = self.prior if size >= len(chains) else Batched(self.prior, size)
        return Gibbs(prior, self.proximal, self.dds, ChainGenerators(seed, chains), chains, iterations, on_sweep)

    @torch.no_grad()
    def _run_chains(
        self, y: Tensor, chains: int, seed: int, draws: int, thin: int, size: int, on_sweep: OnSweep | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Independent chains, a batch after the other: draws ``(chains, draws, C, H, W)`` and the record."""
        more = thin * (draws - 1)
        schedule, powers = self.schedule + [self.schedule[-1]] * more, self.powers + [1.0] * more
        samples, records = [], []
        for first in range(0, chains, size):
            batch = range(first, min(first + size, chains))
            gibbs = self._gibbs(batch, seed, size, on_sweep, len(schedule))
            x = gibbs.start(self.blank(len(batch)))
            state, kept, power = self.proximal.init(self.kernel_model, y, x), [], 1.0
            for past, (eta, target) in enumerate(zip(schedule, powers, strict=True), 1 - len(self.schedule)):
                if target != power and isinstance(self.proximal, MarkovKernel):
                    model = self.kernel_model
                    state = self.proximal.retarget(state, TemperedForwardModel(model, target) if target < 1 else model)
                    power = target
                state, x, _ = gibbs.sweep(state, x, eta)
                if past >= 0 and past % thin == 0:
                    kept.append(x.cpu())
            samples.append(torch.stack(kept, dim=1))
            records.append(gibbs.record())
        return torch.cat(samples), _merge(records)

    @torch.no_grad()
    def _run_populations(
        self, y: Tensor, chains: int, seed: int, draws: int, thin: int, size: int, on_sweep: OnSweep | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Populations, each weighted by its evidence: draws ``(chains, draws, C, H, W)`` and the record."""
        assert isinstance(self.population, Population)
        samples: list[Tensor] = []
        runs: list[Particles] = []
        records = []
        groups = self.population.divide(chains)
        for number, particles in enumerate(groups):
            gibbs = self._gibbs(particles, seed, size, on_sweep)
            run = Path(
                self.population,
                gibbs,
                self.kernel_model,
                y,
                self.blank(len(particles)),
                self.schedule[0],
                self.schedule[-1],
                torch.Generator().manual_seed(derive_seed(seed, NOT_A_CHAIN + 1 + number)),
            ).run()
            state, x, kept = run.state, run.x, [run.x.cpu()]
            for i in range(1, thin * (draws - 1) + 1):
                state, x, _ = gibbs.sweep(state, x, self.schedule[-1])
                if i % thin == 0:
                    kept.append(x.cpu())
            samples.append(torch.stack(kept, dim=1))
            runs.append(run)
            records.append(gibbs.record())
        evidence = torch.tensor([run.log_evidence for run in runs], dtype=torch.float64)
        log_mean = float(evidence.logsumexp(0)) - math.log(len(runs))
        relative = (evidence - log_mean).exp()  # of the evidence itself, whose mean has no bias
        error = float(relative.std() / math.sqrt(len(runs))) if len(runs) > 1 else None
        x = torch.cat(samples)
        if len(runs) > 1:
            sizes = torch.tensor([len(group) for group in groups])
            log_w = (evidence - sizes.log()).repeat_interleave(sizes)
            u = torch.rand(
                (), generator=torch.Generator().manual_seed(derive_seed(seed, NOT_A_CHAIN)), dtype=torch.float64
            )
            x = x[systematic_resampling(log_w, chains, float(u))]
        record = _merge(records) | {
            "log_evidence": log_mean,
            "log_evidence_se": error,
            "populations": [run.record for run in runs],
        }
        return x, record

    @torch.no_grad()
    def _run_replicas(
        self, y: Tensor, chains: int, seed: int, draws: int, thin: int, size: int, on_sweep: OnSweep | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Chains with replicas: draws ``(chains, draws, C, H, W)`` and the record."""
        assert isinstance(self.population, ReplicaExchange)
        gibbs = self._gibbs(range(chains), seed, size, on_sweep)
        generator = torch.Generator().manual_seed(derive_seed(seed, NOT_A_CHAIN))
        replicas = start_replicas(
            self.population,
            gibbs,
            self.kernel_model,
            y,
            self.blank(chains),
            self.schedule[0],
            self.schedule[-1],
            generator,
        )
        kept = []
        for _ in range(draws):
            for _ in range(thin):
                x = replicas.sweep()
            kept.append(x.cpu())
        return torch.stack(kept, dim=1), _merge([gibbs.record()]) | {"replica_exchange": replicas.record()}


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
    return [
        f"{kernel} hardly moves at eta = {last:.3g}: a draw goes {jump:.2%} of the way of an independent one, {still:.0%} of the "
        f"draws stay where they were, acceptance {acceptance:.1%}. The draws do not cover the posterior; {remedy}"
    ]


def _merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of several batches: calls are summed, iterations kept batch by batch."""
    return {
        "batches": len(records),
        "network_calls": sum(record["network_calls"] for record in records),
        "forward_calls": sum(record["forward_calls"] for record in records),
        "iterations": [record["iterations"] for record in records],
    }
