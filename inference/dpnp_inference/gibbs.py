"""One iteration of DPnP, and where its chains start. What is done with the chains (anneal, weigh, swap) is decided elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpnp_inference.dds import DenoisingSampler
from dpnp_inference.proximal import ProximalInfo, ProximalSampler
from dpnp_inference.randomness import ChainGenerators
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.solvers import denoise_noise

START_CALLS = 30


class SamplingError(RuntimeError):
    """Sampling broke down: a chain has left the finite numbers."""


class Sweep(NamedTuple):
    """What is reported after each iteration, for progress displays.

    Attributes:
        chains: indices of the chains of this batch.
        iteration: number of the iteration, from 1.
        iterations: how many there will be; None where that is decided as it goes.
        eta: coupling, in image units.
        network_calls: calls made for this batch so far.
        info: what the proximal sampler did.
        standing: of a population its ``level``, and its ``ESS`` (part of the particles) and ``founders`` there.
    """

    chains: range
    iteration: int
    iterations: int | None
    eta: float
    network_calls: int
    info: ProximalInfo
    standing: Mapping[str, float] | None = None


OnSweep = Callable[[Sweep], None]


def describe_step(eta: float, network_calls: int, info: ProximalInfo) -> dict[str, float]:
    """One iteration's row of the record, JSON-able, but for its seconds.

    Args:
        eta: coupling or noise level, in image units.
        network_calls: made in this iteration.
        info: what was done with the likelihood.
    """
    row = {"eta": eta, "network_calls": network_calls, "forward_calls": info.forward_calls}
    if info.acceptance is not None:
        row |= {"acceptance": float(info.acceptance.mean()), "acceptance_min": float(info.acceptance.min())}
    if info.residual is not None:
        row["residual"] = float(info.residual.max())
    if info.non_finite is not None:
        row["non_finite"] = float(info.non_finite.sum())
    if info.jump is not None:
        row |= {"jump": float(info.jump.mean()), "still": float((info.jump == 0).double().mean())}
    return row


@dataclass
class Gibbs:
    """The two conditional draws of DPnP for one batch of chains, and the account of what they cost.

    Args:
        prior: gives the denoising draw.
        proximal: gives the proximal one.
        dds: denoising sampler.
        generator: one stream a chain.
        chains: indices of the chains.
        iterations: how many there will be, if that is known.
        on_sweep: called after each iteration.

    Attributes:
        network_calls: made so far, each on the whole batch.
        forward_calls: likewise.
        rows: one record an iteration, JSON-able.
        standing: where a population is, for whoever is told of each iteration.
    """

    prior: Denoiser
    proximal: ProximalSampler
    dds: DenoisingSampler
    generator: ChainGenerators
    chains: range
    iterations: int | None = None
    on_sweep: OnSweep | None = None
    network_calls: int = 0
    forward_calls: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    standing: dict[str, float] = field(default_factory=dict)

    def start(self, like: Tensor) -> Tensor:
        """One draw from the prior for each chain, by its probability flow, shaped like ``like``."""
        self.network_calls += START_CALLS
        return denoise_noise(self.prior, self.generator.normal_like(like), START_CALLS)

    def sweep(self, state: Any, x: Tensor, eta: float) -> tuple[Any, Tensor, Tensor]:
        """Draw z given x, then x given z.

        Args:
            state: of the proximal sampler.
            x: ``(B, C, H, W)``.
            eta: coupling, in image units.

        Returns:
            The proximal sampler's new state, the new x and its z.

        Raises:
            SamplingError: a chain is no longer finite; names it.
        """
        start = time.perf_counter()
        state, z, info = self.proximal.step(state, x, eta, generator=self.generator)
        x, dds_info = self.dds(self.prior, z, eta, generator=self.generator)
        self.network_calls += dds_info.network_calls
        self.forward_calls += info.forward_calls
        row = describe_step(eta, dds_info.network_calls, info)
        self.rows.append(row)
        finite = bool(torch.isfinite(x).all())  # waits for the device
        row["seconds"] = time.perf_counter() - start
        if not finite:
            broken = [
                chain for chain, image in zip(self.chains, x, strict=True) if not bool(torch.isfinite(image).all())
            ]
            raise SamplingError(
                f"chains {broken} are no longer finite after iteration {len(self.rows)} at eta = {eta:g}; "
                "check the forward model's scale and gradient, or raise eta_min"
            )
        if self.on_sweep is not None:
            told = dict(self.standing)
            self.on_sweep(Sweep(self.chains, len(self.rows), self.iterations, eta, self.network_calls, info, told))
        return state, x, z

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are, and the account."""
        return {**self.record(), "generator": self.generator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was called."""
        self.network_calls, self.forward_calls = state["network_calls"], state["forward_calls"]
        self.rows = list(state["iterations"])
        self.generator.load_state_dict(state["generator"])

    def record(self) -> dict[str, Any]:
        """The account as JSON-able values."""
        return {"network_calls": self.network_calls, "forward_calls": self.forward_calls, "iterations": self.rows}
