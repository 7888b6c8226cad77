"""What a sampler returns: the draws, their statistics, and how they came about."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SAMPLES, DIAGNOSTICS = "samples.safetensors", "diagnostics.json"


class Interval(NamedTuple):
    """A pointwise interval between two order statistics of the draws.

    Attributes:
        low: ``(C, H, W)``.
        high: ``(C, H, W)``.
        level: probability that it contains a further, independent draw: ``(n + 1 - 2k)/(n + 1)``.
        k: it reaches from the k-th smallest to the k-th largest draw.
    """

    low: Tensor
    high: Tensor
    level: float
    k: int


@dataclass
class Posterior:
    """Posterior draws.

    Attributes:
        samples: ``(chains, draws, C, H, W)`` on the CPU, in the prior's value range.
        diagnostics: JSON-able record: schedule, network and forward calls, acceptance, residuals, seconds, warnings.
    """

    samples: Tensor
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples.ndim != 5 or 0 in self.samples.shape:
            raise ValueError(
                f"samples has shape {tuple(self.samples.shape)}; needed is (chains, draws, C, H, W), none empty"
            )

    @property
    def flat(self) -> Tensor:
        """All draws as one list ``(chains · draws, C, H, W)``."""
        return self.samples.flatten(0, 1)

    @property
    def mean(self) -> Tensor:
        """Posterior mean ``(C, H, W)``."""
        return self.flat.mean(0)

    @property
    def std(self) -> Tensor:
        """Posterior standard deviation of each pixel ``(C, H, W)``.

        Raises:
            ValueError: there is only one draw.
        """
        if len(self.flat) < 2:
            raise ValueError("a standard deviation needs at least 2 draws, there is 1")
        return self.flat.std(0)

    @property
    def log_evidence(self) -> float | None:
        """Estimate of log p(y), of a population; None for other samplers."""
        value: float | None = self.diagnostics.get("log_evidence")
        return value

    @property
    def log_evidence_se(self) -> float | None:
        """Its standard error, from independent populations; None where there is only one."""
        value: float | None = self.diagnostics.get("log_evidence_se")
        return value

    def quantile(self, q: float) -> Tensor:
        """Empirical quantile of each pixel ``(C, H, W)``, linearly interpolated.

        For intervals that cover what they say, also with few draws, use :meth:`interval`.

        Raises:
            ValueError: ``q`` is outside of [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q = {q}; it must be in [0, 1]")
        return torch.quantile(self.flat, q, dim=0)

    def interval(self, level: float = 0.9) -> Interval:
        """The narrowest interval of order statistics that covers at least ``level``.

        If truth and n draws are exchangeable, the k-th smallest and k-th largest draw enclose the truth with probability
        exactly ``(n + 1 - 2k)/(n + 1)``. With 39 draws and k = 2 that is 0.9.

        Args:
            level: wanted coverage.

        Raises:
            ValueError: ``level`` is outside of (0, 1), or there are too few draws for it; says how many are needed.
        """
        if not 0 < level < 1:
            raise ValueError(f"level = {level}; it must be in (0, 1)")
        n = len(self.flat)
        k = math.floor((n + 1) * (1 - level) / 2 + 1e-9)
        if k < 1:
            raise ValueError(
                f"{n} draws are too few for level = {level}; at least {math.ceil(2 / (1 - level) - 1e-9) - 1} are needed"
            )
        low = self.flat.kthvalue(k, dim=0).values
        high = self.flat.kthvalue(n + 1 - k, dim=0).values
        return Interval(low, high, (n + 1 - 2 * k) / (n + 1), k)

    def to_arviz(self) -> Any:
        """The draws as ``arviz.InferenceData`` with one variable ``x`` of dimensions (chain, draw, c, h, w)."""
        arviz = _arviz()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "More chains")  # than draws: here that is usual
            return arviz.from_dict(posterior={"x": self.samples.numpy()}, dims={"x": ["c", "h", "w"]})

    def convergence(self) -> dict[str, float] | None:
        """Worst split R-hat and smallest bulk and tail effective sample size over the pixels, by ArviZ.

        Returns:
            ``r_hat``, ``ess_bulk``, ``ess_tail``, or ``None`` for fewer than 4 draws a chain, where they do not exist.
        """
        if self.samples.shape[1] < 4:
            return None
        arviz, data = _arviz(), self.to_arviz()
        return {
            "r_hat": float(np.nanmax(arviz.rhat(data)["x"].values)),
            "ess_bulk": float(np.nanmin(arviz.ess(data, method="bulk")["x"].values)),
            "ess_tail": float(np.nanmin(arviz.ess(data, method="tail")["x"].values)),
        }

    def save(self, directory: str | Path) -> Path:
        """Write ``samples.safetensors`` and ``diagnostics.json``, both or neither.

        Args:
            directory: the folder; files of these names in it are replaced.

        Returns:
            The folder.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".posterior.", dir=target))
        try:
            save_file({"samples": self.samples.contiguous()}, staging / SAMPLES)
            (staging / SAMPLES).chmod(0o644)  # safetensors makes files that only their owner can read
            (staging / DIAGNOSTICS).write_text(json.dumps(self.diagnostics, indent=2) + "\n", encoding="utf-8")
            for name in (SAMPLES, DIAGNOSTICS):
                os.replace(staging / name, target / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    @classmethod
    def load(cls, directory: str | Path) -> Posterior:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
        """
        folder = Path(directory)
        for name in (SAMPLES, DIAGNOSTICS):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} is missing; a posterior's folder holds {SAMPLES} and {DIAGNOSTICS}"
                )
        diagnostics = json.loads((folder / DIAGNOSTICS).read_text(encoding="utf-8"))
        return cls(load_file(folder / SAMPLES)["samples"], diagnostics)


def _arviz() -> Any:
    """ArviZ, whose announcement of its own future is kept out of the user's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz
