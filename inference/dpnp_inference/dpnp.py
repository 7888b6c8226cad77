r"""DPnP: posterior sampling by alternating a proximal and a denoising sampler (Xu & Chi 2024, arXiv 2403.17042, algorithm 1).

For couplings :math:`\eta_1 \ge \eta_2 \ge \dots` repeat

1. proximal consistency: :math:`z \sim L(z; y)\, N(z; x, \eta^2 I)`,
2. denoising diffusion: :math:`x \sim p(x_0 \mid x_0 + \eta w = z)`.

At fixed η this is Gibbs sampling of :math:`\propto p(x) L(z; y) N(z; x, \eta^2 I)`. Its bias vanishes with the last η, or at once where the
proximal sampler splits exactly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpnp_inference.annealing import Annealing
from dpnp_inference.dds import DenoisingSampler, make_dds
from dpnp_inference.posterior import Posterior
from dpnp_inference.proximal import ProximalInfo, ProximalSampler, choose_proximal
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.solvers import karras_levels, solve

log = logging.getLogger(__name__)

START_CALLS = 20


class SamplingError(RuntimeError):
    """Sampling broke down: a chain has left the finite numbers."""


class Sweep(NamedTuple):
    """What is reported after each iteration, for progress displays.

    Attributes:
        chains: indices of the chains of this batch.
        iteration: number of the iteration, from 1.
        iterations: how many there will be.
        eta: coupling, in image units.
        network_calls: calls made for this batch so far.
        info: what the proximal sampler did.
    """

    chains: range
    iteration: int
    iterations: int
    eta: float
    network_calls: int
    info: ProximalInfo


class DPnP:
    """Draws from the posterior of an image given a measurement.

    Args:
        prior: a trained :class:`~dpnp_shared.prior.Prior` or an analytic one.
        forward_model: operator and noise.
        dds: denoising sampler: ``ddim``, ``ddpm``, or an object.
        proximal: proximal sampler; ``auto`` takes the most exact one that the forward model allows and logs which.
        annealing: coupling schedule; ``auto`` takes its ends from the prior and the noise.
        dtype: of images and kernels; a trained network computes in its own.

    Prior and forward model must be on one device.

    Raises:
        ValueError: an unknown name, or an operator for another number of channels than the prior's.
        TypeError: ``proximal="auto"`` and the forward model allows no sampler.
    """

    def __init__(
        self,
        prior: Denoiser,
        forward_model: ForwardModel,
        *,
        dds: Literal["ddim", "ddpm"] | DenoisingSampler = "ddim",
        proximal: Literal["auto"] | ProximalSampler = "auto",
        annealing: Literal["auto"] | Annealing = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.prior, self.forward_model, self.dtype = prior, forward_model, dtype
        self.device = next((t.device for t in (*prior.parameters(), *prior.buffers())), torch.device("cpu"))
        self.image_shape = image_shape_of(prior, forward_model)
        self.dds = make_dds(dds)
        if isinstance(proximal, str):
            if proximal != "auto":
                raise ValueError(f"proximal = {proximal!r}; allowed are 'auto' and a ProximalSampler")
            self.proximal, reason = choose_proximal(forward_model)
            log.info("proximal sampler: %s", reason)
        else:
            self.proximal = proximal
        if isinstance(annealing, str):
            if annealing != "auto":
                raise ValueError(f"annealing = {annealing!r}; allowed are 'auto' and an Annealing")
            annealing = Annealing()
        self.schedule = annealing.schedule(
            prior, forward_model, self.blank(), exact_splitting=self.proximal.exact_splitting
        )
        prior.check_sigma(torch.tensor(self.schedule))

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
        on_sweep: Callable[[Sweep], None] | None = None,
    ) -> Posterior:
        """Run independent chains.

        Args:
            y: one measurement, without a batch dimension.
            chains: how many chains.
            seed: not negative; chain i's randomness depends on ``(seed, i)`` only.
            draws: draws of each chain; the first ends the annealing, the others follow at the last coupling.
            thin: iterations from one draw to the next.
            batch_size: chains that run together, all by default; it changes memory and speed, not the draws (up to the
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
        start = time.perf_counter()
        batches = [range(first, min(first + size, chains)) for first in range(0, chains, size)]
        results = [self._run(y, batch, seed, draws, thin, on_sweep) for batch in batches]
        samples = torch.cat([samples for samples, _ in results])
        diagnostics = {
            "sampler": "DPnP",
            "dds": repr(self.dds),
            "proximal": repr(self.proximal),
            "schedule": self.schedule,
            "chains": chains,
            "draws": draws,
            "thin": thin,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            **_merge([record for _, record in results]),
        }
        posterior = Posterior(samples, diagnostics)
        posterior.diagnostics["convergence"] = posterior.convergence()
        return posterior

    @torch.no_grad()
    def _run(
        self,
        y: Tensor,
        chains: range,
        seed: int,
        draws: int,
        thin: int,
        on_sweep: Callable[[Sweep], None] | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Draws ``(chains, draws, C, H, W)`` of one batch of chains."""
        generator = ChainGenerators(seed, chains)
        x, network_calls = self._start(self.blank(len(chains)), generator)
        state = self.proximal.init(self.forward_model, y, x)
        schedule = self.schedule + [self.schedule[-1]] * (thin * (draws - 1))
        kept, record = [], _Record()
        for iteration, eta in enumerate(schedule, 1):
            state, z, info = self.proximal.step(state, x, eta, generator=generator)
            x, dds_info = self.dds(self.prior, z, eta, generator=generator)
            network_calls += dds_info.network_calls
            if not bool(torch.isfinite(x).all()):
                broken = [chain for chain, row in zip(chains, x, strict=True) if not bool(torch.isfinite(row).all())]
                raise SamplingError(
                    f"chains {broken} are no longer finite after iteration {iteration} at eta = {eta:g}; "
                    "check the forward model's scale and gradient, or raise eta_min"
                )
            record.add(eta, info)
            past = iteration - len(self.schedule)
            if past >= 0 and past % thin == 0:
                kept.append(x.cpu())
            if on_sweep is not None:
                on_sweep(Sweep(chains, iteration, len(schedule), eta, network_calls, info))
        return torch.stack(kept, dim=1), {"network_calls": network_calls, **record.summary()}

    def _start(self, like: Tensor, generator: ChainGenerators) -> tuple[Tensor, int]:
        """One draw from the prior for each chain, by its probability flow, and what it cost."""
        top = min(self.prior.sigma_max, 10 * self.prior.spread)
        low = min(top, max(self.prior.sigma_min, 1e-2 * self.prior.spread))
        levels = karras_levels(top, low, START_CALLS)
        return solve(self.prior, top * generator.normal_like(like), levels), START_CALLS


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


class _Record:
    """What the proximal sampler did, iteration by iteration."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.forward_calls = 0

    def add(self, eta: float, info: ProximalInfo) -> None:
        row = {"eta": eta}
        if info.acceptance is not None:
            row |= {"acceptance": float(info.acceptance.mean()), "acceptance_min": float(info.acceptance.min())}
        if info.residual is not None:
            row["residual"] = float(info.residual.max())
        if info.non_finite is not None:
            row["non_finite"] = float(info.non_finite.sum())
        self.rows.append(row)
        self.forward_calls += info.forward_calls

    def summary(self) -> dict[str, Any]:
        return {"forward_calls": self.forward_calls, "iterations": self.rows}


def _merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Records of several batches: calls are summed, iterations kept batch by batch."""
    return {
        "batches": len(records),
        "network_calls": sum(record["network_calls"] for record in records),
        "forward_calls": sum(record["forward_calls"] for record in records),
        "iterations": [record["iterations"] for record in records],
    }
