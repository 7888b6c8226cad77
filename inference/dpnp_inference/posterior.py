"""What a sampler returns: the draws, their statistics, and how they came about."""

from __future__ import annotations

import json
import math
import operator
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpnp_inference.state import read_state, write_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dpnp_inference.diagnostics import Diagnosis
    from dpnp_inference.state import State
    from dpnp_inference.streaming import RunningPosterior

SAMPLES, DIAGNOSTICS, STATISTICS = "samples.safetensors", "diagnostics.json", "statistics.safetensors"
STATE = "state.safetensors"
OF_ALL_DRAWS = (
    "convergence",
    "fit",
    "chains",
    "draws",
)  # entries of the record that are not those of a part of the draws
LEAST_DRAWS = 4  # of a chain, below which ArviZ's R-hat and effective sample sizes do not exist

Index = int | slice | Sequence[int]
Functional = Callable[[Tensor], Tensor]
Floats = npt.NDArray[np.float64]


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
        statistics: of a run that did not keep all its draws, those of all of them; then mean, standard deviation, quantiles, intervals
            and the mean's Monte Carlo error are theirs, and ``samples`` are the draws that were kept.
        state: of the run at its end, with which it can be extended; None if it was not kept.
    """

    samples: Tensor
    diagnostics: dict[str, Any] = field(default_factory=dict)
    statistics: RunningPosterior | None = None
    state: State | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.samples.ndim != 5 or 0 in self.samples.shape:
            raise ValueError(
                f"samples has shape {tuple(self.samples.shape)}; needed is (chains, draws, C, H, W), none empty"
            )
        if self.statistics is not None and self.statistics.image_shape != tuple(self.samples.shape[2:]):
            raise ValueError(
                f"statistics are of images {self.statistics.image_shape}, samples of {tuple(self.samples.shape[2:])}; they must be equal"
            )

    def __getitem__(self, index: Index | tuple[Index, Index]) -> Posterior:
        """``posterior[chains]`` or ``posterior[chains, draws]``; see :meth:`select`."""
        if not isinstance(index, tuple):
            return self.select(index)
        if len(index) != 2:
            raise IndexError(
                f"posterior[...] takes chains and draws, got {len(index)} indices; slice .samples for pixels"
            )
        return self.select(*index)

    def select(self, chains: Index = slice(None), draws: Index = slice(None)) -> Posterior:
        """The posterior of some of the chains and draws.

        Args:
            chains: a number, a slice or a list of numbers, from 0; negative ones count from the end.
            draws: likewise.

        Returns:
            A posterior of its own, whose record is that of the run without what was said of all draws, and without their statistics.

        Raises:
            IndexError: a number out of range, or nothing is selected.
        """
        kept = [
            _positions(name, i, n)
            for name, i, n in zip(("chains", "draws"), (chains, draws), self.samples.shape, strict=False)
        ]
        samples = self.samples[torch.tensor(kept[0])[:, None], torch.tensor(kept[1])]
        record = {key: value for key, value in self.diagnostics.items() if key not in OF_ALL_DRAWS}
        return Posterior(samples, record | {"chains": len(kept[0]), "draws": len(kept[1])})

    @property
    def flat(self) -> Tensor:
        """All draws that were kept as one list ``(chains · draws, C, H, W)``."""
        return self.samples.flatten(0, 1)

    @property
    def mean(self) -> Tensor:
        """Posterior mean ``(C, H, W)``."""
        if self.statistics is not None:
            return self.statistics.mean
        return self.flat.mean(0)

    @property
    def std(self) -> Tensor:
        """Posterior standard deviation of each pixel ``(C, H, W)``.

        Raises:
            ValueError: there is only one draw.
        """
        if self.statistics is not None:
            return self.statistics.std
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
        if self.statistics is not None:
            return self.statistics.quantile(q)
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
        if self.statistics is not None:
            return self.statistics.interval(level)
        n = len(self.flat)
        k = interval_order(n, level)
        low = self.flat.kthvalue(k, dim=0).values
        high = self.flat.kthvalue(n + 1 - k, dim=0).values
        return Interval(low, high, (n + 1 - 2 * k) / (n + 1), k)

    @property
    def mcse_mean(self) -> Tensor:
        r"""Monte Carlo standard error of :attr:`mean` ``(C, H, W)``.

        From 4 draws a chain on it is ArviZ's, which allows for the draws' dependence. Of fewer, the chains are taken as independent,
        which the chains of DPnP are: :math:`s/\sqrt{n}` with the standard deviation s of the n chains' means. The particles of a
        population share ancestors; for them it is a lower bound.

        Raises:
            ValueError: there is one chain of fewer than 4 draws.
        """
        if self.statistics is not None:
            return self.statistics.mcse_mean
        return self._monte_carlo_errors("mcse_mean")

    @property
    def mcse_std(self) -> Tensor:
        r"""Monte Carlo standard error of :attr:`std` ``(C, H, W)``, as for :attr:`mcse_mean`.

        Of single draws it is :math:`\sqrt{(m_4 - m_2^2)/n}/(2 \sqrt{m_2})`, with central moments :math:`m_k`; 0 where nothing varies.

        Raises:
            ValueError: there is one chain of fewer than 4 draws, or not all draws were kept.
        """
        if self.statistics is not None:
            raise ValueError("mcse_std needs all draws, of which only statistics were kept")
        return self._monte_carlo_errors("mcse_std")

    def _monte_carlo_errors(self, name: str) -> Tensor:
        x = self.samples.flatten(2).numpy()
        return (
            torch.from_numpy(monte_carlo_errors(x, name)[name]).to(self.samples.dtype).reshape(self.samples.shape[2:])
        )

    def functional(self, f: Functional) -> Tensor:
        """A number of each draw, for example ``lambda x: x.amax(dim=(1, 2, 3))``.

        Args:
            f: takes images ``(n, C, H, W)`` to numbers ``(n,)``.

        Returns:
            ``(chains, draws)``.

        Raises:
            ValueError: ``f`` returns something else, or a number that is not finite.
        """
        flat = self.flat
        value = f(flat)
        name = getattr(f, "__name__", type(f).__name__)
        if not isinstance(value, Tensor) or value.shape != flat.shape[:1]:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"functional {name}: returned {found} for images {tuple(flat.shape)}; needed is ({len(flat)},)"
            )
        if value.is_complex() or not bool(torch.isfinite(value).all()):
            raise ValueError(f"functional {name}: returned numbers that are complex or not finite")
        return value.detach().cpu().reshape(self.samples.shape[:2])

    def to_xarray(self) -> Any:
        """The draws as ``xarray.DataArray`` named ``x``, of dimensions (chain, draw, c, h, w); shares their memory."""
        from xarray import DataArray

        chains, draws = self.samples.shape[:2]
        coordinates = {"chain": np.arange(chains), "draw": np.arange(draws)}
        return DataArray(self.samples.numpy(), coordinates, ("chain", "draw", "c", "h", "w"), name="x")

    def to_arviz(self) -> Any:
        """The draws as ``arviz.InferenceData`` with one variable ``x`` of dimensions (chain, draw, c, h, w)."""
        arviz = _arviz()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "More chains")  # than draws: here that is usual
            return arviz.from_dict(posterior={"x": self.samples.numpy()}, dims={"x": ["c", "h", "w"]})

    def convergence(self) -> dict[str, float] | None:
        """Worst split R-hat and smallest bulk and tail effective sample size of the kept draws over the pixels that vary, by ArviZ.

        Returns:
            ``r_hat`` (NaN for a single chain, infinite where every chain stands still at a value of its own), ``ess_bulk``, ``ess_tail``;
            or ``None`` where they do not exist: for fewer than 4 draws a chain, and where no pixel varies. For what they mean see
            :meth:`diagnose`.
        """
        if self.samples.shape[1] < LEAST_DRAWS:
            return None
        x = self.samples.flatten(2).numpy()
        x = x[..., np.ptp(x, axis=(0, 1)) > 0]
        if x.shape[-1] == 0:
            return None
        found = arviz_statistics(x, "r_hat", "ess_bulk", "ess_tail")
        return {
            "r_hat": float(found["r_hat"].max()),
            "ess_bulk": float(found["ess_bulk"].min()),
            "ess_tail": float(found["ess_tail"].min()),
        }

    def diagnose(self, functionals: Mapping[str, Functional] | Sequence[str] = ()) -> Diagnosis:
        """Everything that is known about how far these draws can be trusted, with a verdict in words.

        Args:
            functionals: see :func:`dpnp_inference.diagnostics.diagnose`, also for errors.
        """
        from dpnp_inference.diagnostics import diagnose

        return diagnose(self, functionals)

    def plot(self, value_range: tuple[float, float] | None = None, *, draws: int = 5) -> Figure:
        """Mean, standard deviation and some draws; see :func:`dpnp_inference.plots.plot_images`."""
        from dpnp_inference.plots import plot_images

        return plot_images(self, value_range, draws=draws)

    def plot_traces(self, functionals: Mapping[str, Functional] | None = None) -> Figure:
        """Functionals of each chain's draws in turn; see :func:`dpnp_inference.plots.plot_traces`."""
        from dpnp_inference.plots import plot_traces

        return plot_traces(self, functionals)

    def plot_ranks(self, functionals: Mapping[str, Functional] | None = None) -> Figure:
        """Ranks of each chain's draws among all; see :func:`dpnp_inference.plots.plot_ranks`."""
        from dpnp_inference.plots import plot_ranks

        return plot_ranks(self, functionals)

    def save(self, directory: str | Path) -> Path:
        """Write ``samples.safetensors``, ``diagnostics.json`` and, if there are, ``statistics.safetensors`` and ``state.safetensors``.

        Args:
            directory: the folder; files of these names in it are replaced.

        Returns:
            The folder.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".posterior.", dir=target))
        try:
            tensors = {SAMPLES: {"samples": self.samples.contiguous()}}
            if self.statistics is not None:
                tensors[STATISTICS] = self.statistics.state_dict()
            for name, content in tensors.items():
                save_file(content, staging / name)
                (staging / name).chmod(0o644)  # safetensors makes files that only their owner can read
            self._write_record(staging)
            if self.state is not None:
                write_state(staging / STATE, self.state, {})
            written = {*tensors, DIAGNOSTICS, *([] if self.state is None else [STATE])}
            for name in sorted(written):
                os.replace(staging / name, target / name)
            for name in {STATISTICS, STATE} - written:
                (target / name).unlink(missing_ok=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def save_record(self, directory: str | Path) -> None:
        """Write ``diagnostics.json`` again, into a folder that :meth:`save` has made."""
        target = Path(directory)
        with tempfile.TemporaryDirectory(prefix=".posterior.", dir=target) as staging:
            os.replace(self._write_record(Path(staging)), target / DIAGNOSTICS)

    def _write_record(self, folder: Path) -> Path:
        (folder / DIAGNOSTICS).write_text(json.dumps(self.diagnostics, indent=2) + "\n", encoding="utf-8")
        return folder / DIAGNOSTICS

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
        statistics = None
        if (folder / STATISTICS).is_file():
            from dpnp_inference.streaming import RunningPosterior

            statistics = RunningPosterior.from_state_dict(load_file(folder / STATISTICS))
        state = read_state(folder / STATE)[0] if (folder / STATE).is_file() else None
        return cls(load_file(folder / SAMPLES)["samples"], diagnostics, statistics, state)


def arviz_statistics(x: npt.NDArray[Any], *names: str) -> dict[str, Floats]:
    """ArviZ's statistics of several quantities.

    Args:
        x: ``(chains, draws, m)``, of at least 4 draws.
        names: of ``r_hat`` (rank-normalised, split), ``ess_bulk``, ``ess_tail``, ``mcse_mean``, ``mcse_std``.

    Returns:
        ``(m,)`` for each name. A quantity that varies, but in no chain, has infinite R-hat.
    """
    arviz = _arviz()
    compute = {
        "r_hat": arviz.rhat,
        "ess_bulk": lambda data: arviz.ess(data, method="bulk"),
        "ess_tail": lambda data: arviz.ess(data, method="tail"),
        "mcse_mean": lambda data: arviz.mcse(data, method="mean"),
        "mcse_std": lambda data: arviz.mcse(data, method="sd"),
    }
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.filterwarnings("ignore", "More chains")
        data = arviz.from_dict(posterior={"x": x})
        found = {name: np.asarray(compute[name](data)["x"].values, np.float64).reshape(x.shape[2:]) for name in names}
    if "r_hat" in found and len(x) > 1:
        found["r_hat"][np.isnan(found["r_hat"]) & (np.ptp(x, axis=(0, 1)) > 0)] = np.inf
    return found


def monte_carlo_errors(x: npt.NDArray[Any], *names: str) -> dict[str, Floats]:
    """``mcse_mean`` and ``mcse_std`` of several quantities, as :attr:`Posterior.mcse_mean` says.

    Args:
        x: ``(chains, draws, m)``.
        names: which of the two.

    Returns:
        ``(m,)`` for each name, 0 where nothing varies.

    Raises:
        ValueError: there is one chain of fewer than 4 draws.
    """
    chains, draws, _ = x.shape
    x = x.astype(np.float64)
    varies = np.ptp(x, axis=(0, 1)) > 0
    found = {name: np.zeros(x.shape[2]) for name in names}
    if draws >= LEAST_DRAWS:
        if varies.any():
            for name, value in arviz_statistics(x[..., varies], *names).items():
                found[name][varies] = value
        return found
    if chains < 2:
        raise ValueError(
            f"a Monte Carlo error needs several chains or {LEAST_DRAWS} draws of one; there is 1 chain of {draws}"
        )
    centred = x - x.mean((0, 1))
    of_mean = centred.mean(1).std(0, ddof=1) / math.sqrt(chains)
    square = centred**2
    of_square = square.mean(1).std(0, ddof=1) / math.sqrt(chains)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_std = of_square / (2 * np.sqrt(square.mean((0, 1))))
    for name, value in (("mcse_mean", of_mean), ("mcse_std", of_std)):
        if name in found:
            found[name][varies] = value[varies]
    return found


def interval_order(n: int, level: float) -> int:
    """The largest k for which the k-th smallest and k-th largest of n draws cover at least ``level``.

    Raises:
        ValueError: ``level`` is outside of (0, 1), or there are too few draws for it; says how many are needed.
    """
    if not 0 < level < 1:
        raise ValueError(f"level = {level}; it must be in (0, 1)")
    k = math.floor((n + 1) * (1 - level) / 2 + 1e-9)
    if k < 1:
        raise ValueError(
            f"{n} draws are too few for level = {level}; at least {math.ceil(2 / (1 - level) - 1e-9) - 1} are needed"
        )
    return k


def _positions(name: str, index: Index, length: int) -> list[int]:
    """Numbers from 0 that an index selects out of so many."""
    if isinstance(index, slice):
        found = list(range(length))[index]
    else:
        found = [operator.index(i) for i in ([index] if isinstance(index, int) else index)]
        wrong = [i for i in found if not -length <= i < length]
        if wrong:
            raise IndexError(f"{name} = {wrong[0]}; there are {length}, numbered from 0")
    if not found:
        raise IndexError(f"{name} = {index} selects none of {length}")
    return found


def _arviz() -> Any:
    """ArviZ, whose announcement of its own future is kept out of the user's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz
