r"""Statistics of posterior draws that are not kept: memory does not grow with their number.

- **Mean and variance** by Welford's and Chan, Golub & LeVeque's updates (1983), in double precision.
- **Extremes**: the few smallest and largest draws of each pixel, exactly. Intervals between them are those of the stored draws.
- **Quantiles** further in, from a histogram of each pixel whose bins are powers of two wide and lie at multiples of their width. As the
  draws spread, bins are joined in pairs, which loses nothing: the histogram is at any time that which all draws would give at once, in
  whatever order they came and however they were shared out. A quantile is off by at most one bin's width,
  :attr:`RunningPosterior.quantile_error`.
- **Split R-hat**, equal to that of the stored draws (Gelman et al. 2013, ``arviz.rhat(method="split")``; ranks cannot be had without all
  draws), and an **effective sample size** by batch means of :math:`\lfloor\sqrt{n}\rfloor` draws (Flegal & Jones 2010).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpnp_inference.posterior import LEAST_DRAWS, Interval, interval_order

SMALLEST_BIN = -100  # exponent of two
BIN_DIGITS = 40  # binary digits of a bin's number, at most
WORK = 4  # images of each chain that is under way
LEVEL, LEAST_EXTREMES, MOST_EXTREMES = (
    0.9,
    8,
    32,
)  # a store's extremes reach to the interval of this level, within limits

Keep = Literal["all", "statistics"] | int


@dataclass
class Moments:
    """Mean and sum of squares about it, in float64, of images that come in batches.

    Attributes:
        count: how many.
        mean: ``(C, H, W)``.
        square: sum of the squares about the mean, likewise.
    """

    count: int
    mean: Tensor
    square: Tensor

    @classmethod
    def none(cls, shape: Sequence[int], device: torch.device) -> Moments:
        """Of no images."""
        mean = torch.zeros(tuple(shape), dtype=torch.float64, device=device)
        return cls(0, mean, torch.zeros_like(mean))

    def add(self, x: Tensor) -> None:
        """Take in images ``(B, C, H, W)``."""
        x = x.to(torch.float64)
        mean = x.mean(0)
        self.merge(Moments(len(x), mean, (x - mean).square().sum(0)))

    def merge(self, other: Moments) -> None:
        """Take in those of others (Chan, Golub & LeVeque 1983)."""
        if other.count == 0:
            return
        total = self.count + other.count
        delta = other.mean.to(self.mean.device) - self.mean
        self.mean += delta * (other.count / total)
        self.square += other.square.to(self.mean.device) + delta.square() * (self.count * other.count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """With one degree of freedom less than images; NaN for fewer than 2."""
        return self.square / (self.count - 1) if self.count > 1 else torch.full_like(self.square, math.nan)


class Histogram:
    r"""Counts in bins that are powers of two wide, for each pixel its own, and as fine as its range allows.

    With the width :math:`2^j` the bins are numbered :math:`\lfloor x/2^j \rfloor`, and j is the smallest with which smallest and largest
    value are less than ``bins`` bins apart. So the state depends on the values and not on their order.

    Args:
        bins: of a pixel, at least 2.
        shape: ``(C, H, W)``.
        device: where it lives.
    """

    def __init__(self, bins: int, shape: Sequence[int], device: torch.device) -> None:
        self.counts = torch.zeros((bins, *shape), dtype=torch.int32, device=device)
        self.exponent = torch.full(tuple(shape), SMALLEST_BIN, dtype=torch.int64, device=device)
        self.first = torch.zeros(tuple(shape), dtype=torch.int64, device=device)

    def add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Take in images.

        Args:
            x: ``(B, C, H, W)``.
            low: smallest value of each pixel ``(C, H, W)``, these images included.
            high: largest, likewise.
        """
        self.fit(low, high)
        number = _number(x.to(torch.float64), self.exponent) - self.first
        self.counts.scatter_add_(0, number, torch.ones_like(number, dtype=torch.int32))

    def merge(self, other: Histogram, low: Tensor, high: Tensor) -> None:
        """Take in another's counts, which is left as it was; ``low`` and ``high`` are those of both."""
        copy = Histogram(0, (), low.device)
        copy.counts = other.counts.to(low.device, copy=True)
        copy.exponent, copy.first = other.exponent.to(low.device), other.first.to(low.device)
        for histogram in (self, copy):
            histogram.fit(low, high)
        self.counts += copy.counts

    def fit(self, low: Tensor, high: Tensor) -> None:
        """Join bins in pairs until they reach from ``low`` to ``high``."""
        low, high = low.to(torch.float64), high.to(torch.float64)
        bins = len(self.counts)
        largest = torch.maximum(low.abs(), high.abs())
        at_least = torch.where(largest > 0, torch.frexp(largest).exponent - BIN_DIGITS, SMALLEST_BIN)
        by_range = torch.where(high > low, torch.frexp((high - low) / bins).exponent - 2, SMALLEST_BIN)
        exponent = torch.maximum(at_least, by_range).clamp(min=SMALLEST_BIN).to(torch.int64)
        for _ in range(
            3
        ):  # the first is at least twice too narrow, and eight times that is wide enough for any two bins or more
            exponent += (_number(high, exponent) - _number(low, exponent) >= bins).to(torch.int64)
        first = _number(low, exponent)
        where = ((exponent != self.exponent) | (first != self.first)).flatten().nonzero()[:, 0]
        if len(where) == 0:
            return
        old = torch.arange(bins, device=low.device)[:, None] + self.first.flatten()[where]
        shift = (exponent - self.exponent).flatten()[where].clamp(max=62)
        new = ((old >> shift) - first.flatten()[where]).clamp(0, bins - 1)  # bins beyond are empty
        flat = self.counts.view(bins, -1)
        counts = flat[:, where]
        flat[:, where] = torch.zeros_like(counts).scatter_add_(0, new, counts)
        self.exponent, self.first = exponent, first

    @property
    def width(self) -> Tensor:
        """Of a bin ``(C, H, W)``, float64."""
        return _power_of_two(self.exponent)

    def find(self, rank: int) -> tuple[Tensor, Tensor]:
        """Where the draw of a rank lies.

        Args:
            rank: from 0, the smallest.

        Returns:
            Lower edge of its bin ``(C, H, W)``, and its place among the bin's draws in (0, 1).
        """
        up_to = self.counts.cumsum(0, dtype=torch.int64)
        number = (up_to <= rank).sum(0, keepdim=True)
        inside = self.counts.gather(0, number)
        place = (rank - (up_to.gather(0, number) - inside) + 0.5) / inside
        return (self.first + number[0]) * self.width, place[0].to(torch.float64)


class RunningPosterior:
    """Statistics of draws as they go by, mergeable and resumable.

    Draws may come in any order of chains, a chain's own in their order. Results do not depend on how chains are grouped or shared out, up
    to the rounding of floating-point sums; extremes and histograms not even by that.

    The memory is that of ``2 extremes + bins`` images in single precision and of 14 in double precision, and of 4 in double precision for
    each chain that is under way (none for single draws). Neither the number of draws nor that of finished chains matters.

    Args:
        image_shape: ``(C, H, W)``.
        draws: of each chain, those that are skipped included; R-hat compares the first half of those kept with the second. More may
            follow later (they make further parts as long as a half).
        burn_in: draws of each chain to skip at first.
        thin: of the others, every so many-th is kept, the first among them.
        extremes: smallest and largest draws of each pixel that are kept exactly, at least 1; :func:`extremes_needed` says how many an
            interval needs.
        bins: of each pixel's histogram; 0 for none, and no quantiles beyond the extremes.
        dtype: of the draws.
        device: where the statistics live; draws are moved there. It needs double precision.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        draws: int = 1,
        burn_in: int = 0,
        thin: int = 1,
        extremes: int = 8,
        bins: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, least in (
            ("burn_in", burn_in, 0),
            ("thin", thin, 1),
            ("extremes", extremes, 1),
            ("bins", bins, 0),
        ):
            if value < least:
                raise ValueError(f"{name} = {value}; it must be at least {least}")
        if draws <= burn_in:
            raise ValueError(f"draws = {draws}; it must be above burn_in = {burn_in}")
        if bins == 1:
            raise ValueError("bins = 1; it must be 0, for no histogram, or at least 2")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape = {tuple(image_shape)}; it must be (C, H, W), none 0")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype = {dtype}; it must be a floating-point type")
        self.image_shape = tuple(image_shape)
        self.draws, self.burn_in, self.thin, self.extremes, self.bins = draws, burn_in, thin, extremes, bins
        self.dtype, self.device = dtype, torch.device(device)
        kept = len(range(burn_in, draws, thin))
        self._kept = kept
        self._half = kept // 2 if kept >= LEAST_DRAWS else 0
        self._batch = math.isqrt(kept)
        self._seen: dict[int, int] = {}
        self._all = Moments.none(self.image_shape, self.device)
        self._halves = Moments.none(self.image_shape, self.device)  # means of the half chains
        self._within = Moments.none(self.image_shape, self.device)  # their variances
        self._batches = Moments.none(self.image_shape, self.device)  # means of the batches
        self._chains = Moments.none(self.image_shape, self.device)  # averages of a chain's two half means
        self._apart = Moments.none(self.image_shape, self.device)  # half the squares of their differences
        # of a chain under way: mean and squares of its half, sum of its batch, mean of its first half
        self._work: dict[int, Tensor] = {}
        edge = torch.full((extremes, *self.image_shape), math.inf, dtype=dtype, device=self.device)
        self._low, self._high = edge, -edge
        self._histogram = Histogram(bins, self.image_shape, self.device)

    def update(self, draws: Tensor, chains: Sequence[int]) -> None:
        """Take in one draw of each of some chains.

        Args:
            draws: ``(B, C, H, W)``.
            chains: their indices, such as a range, all of which have had equally many draws so far.

        Raises:
            ValueError: shape, precision or chains do not fit, or a draw is not finite.
        """
        if draws.shape != (len(chains), *self.image_shape) or len(chains) == 0 or draws.dtype != self.dtype:
            raise ValueError(
                f"draws has shape {tuple(draws.shape)} and type {draws.dtype}; needed is {(len(chains), *self.image_shape)} for "
                f"{len(chains)} chains, and {self.dtype}"
            )
        if len(set(chains)) < len(chains) or min(chains) < 0:
            raise ValueError(f"chains = {list(chains)}; indices must not be negative, and differ")
        before = {self._seen.get(chain, 0) for chain in chains}
        if len(before) > 1:
            raise ValueError(
                f"chains = {list(chains)} have had {sorted(before)} draws; those of one call must have had equally many"
            )
        x = draws.detach().to(self.device)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("draws contains values that are not finite")
        number = before.pop()
        self._seen |= dict.fromkeys(chains, number + 1)
        if number < self.burn_in or (number - self.burn_in) % self.thin:
            return
        self._all.add(x)
        self._low, self._high = self._joined(x, x)
        if self.bins:
            self._histogram.add(x, self._low[0], self._high[-1])
        self._follow(x.to(torch.float64), chains, (number - self.burn_in) // self.thin)

    def _joined(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest of those there are and of more, in ascending order."""
        low, high = torch.cat([self._low, low]), torch.cat([self._high, high])
        return low.sort(0).values[: self.extremes].clone(), high.sort(0).values[-self.extremes :].clone()

    def _follow(self, x: Tensor, chains: Sequence[int], t: int) -> None:
        """Half chains and batches, with each chain's t-th kept draw."""
        if self._batch == 1:  # every draw is a batch; with fewer than 4 there are no halves
            self._batches.add(x)
            return
        zero = torch.zeros((WORK, *self.image_shape), dtype=torch.float64, device=self.device)
        work = torch.stack([self._work.get(chain, zero) for chain in chains])
        mean, square, batch, first = work.unbind(1)  # views
        place = self._place_in_half(t)
        if place is not None:
            delta = x - mean
            mean += delta / (place + 1)
            square += delta * (x - mean)
            if place + 1 == self._half:
                self._halves.add(mean)
                self._within.add(square / (self._half - 1))
                if t + 1 == self._half:
                    first.copy_(mean)
                elif t + 1 == self._kept:
                    self._chains.add((first + mean) / 2)
                    self._apart.add((first - mean).square() / 2)
                mean.zero_()
                square.zero_()
        batch += x
        if ((t if t < self._kept else t - self._kept) + 1) % self._batch == 0:
            self._batches.add(batch / self._batch)
            batch.zero_()
        ended = t + 1 == self._kept
        for chain, state in zip(chains, work, strict=True):
            if ended:
                self._work.pop(chain, None)
            else:
                self._work[chain] = state

    def _place_in_half(self, t: int) -> int | None:
        """Number of a draw within its half, as ArviZ splits: of an odd number the middle one is in none."""
        if t < self._half:
            return t
        if t < self._kept - self._half:
            return None
        return (t - (self._kept - self._half)) % self._half

    def merge(self, other: RunningPosterior) -> None:
        """Take in what another worker has seen, which is left as it was.

        Args:
            other: of other chains of the same posterior.

        Raises:
            ValueError: it was made with other arguments, or has seen a chain that this one has seen as well.
        """
        if (mine := self._arguments()) != (theirs := other._arguments()):
            raise ValueError(f"other was made with {theirs}, this one with {mine}; they must be equal")
        both = sorted(self._seen.keys() & other._seen.keys())
        if both:
            raise ValueError(f"chains {both} are in both; a chain's draws must all go to one")
        self._seen |= other._seen
        for name, moments in self._moments().items():
            moments.merge(other._moments()[name])
        self._low, self._high = self._joined(other._low.to(self.device), other._high.to(self.device))
        if self.bins and self._all.count:
            self._histogram.merge(other._histogram, self._low[0], self._high[-1])
        self._work |= {chain: state.to(self.device, copy=True) for chain, state in other._work.items()}

    def _moments(self) -> dict[str, Moments]:
        return {name: getattr(self, f"_{name}") for name in ("all", "halves", "within", "batches", "chains", "apart")}

    def _arguments(self) -> dict[str, object]:
        names = ("image_shape", "draws", "burn_in", "thin", "extremes", "bins", "dtype")
        return {name: getattr(self, name) for name in names}

    @property
    def count(self) -> int:
        """Number of draws kept so far, of all chains together."""
        return self._all.count

    @property
    def kept_draws(self) -> int:
        """Draws of each chain that are to be kept: ``draws`` less burn-in and thinning."""
        return self._kept

    @property
    def chains(self) -> dict[int, int]:
        """Draws that each chain has given so far, those that were skipped included."""
        return dict(self._seen)

    @property
    def mean(self) -> Tensor:
        """Posterior mean ``(C, H, W)``.

        Raises:
            ValueError: there is no draw.
        """
        self._need(1, "a mean")
        return self._all.mean.to(self.dtype, copy=True)

    @property
    def std(self) -> Tensor:
        """Posterior standard deviation ``(C, H, W)``.

        Raises:
            ValueError: there are fewer than 2 draws.
        """
        self._need(2, "a standard deviation")
        return torch.where(self._varies, self._all.variance.sqrt(), 0.0).to(self.dtype)

    def quantile(self, q: float) -> Tensor:
        """Empirical quantile of each pixel ``(C, H, W)``, linearly interpolated between draws.

        Among the extremes it is that of all draws; further in it is off by at most :attr:`quantile_error`.

        Raises:
            ValueError: ``q`` is outside of [0, 1], there is no draw, or there is no histogram and ``q`` is not among the extremes.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q = {q}; it must be in [0, 1]")
        self._need(1, "a quantile")
        place = q * (self.count - 1)
        low, high = math.floor(place), math.ceil(place)
        return torch.lerp(self._order_statistic(low), self._order_statistic(high), place - low).to(self.dtype)

    @property
    def quantile_error(self) -> Tensor:
        """Largest error of a quantile, and widening of an interval's end, beyond the extremes: the width of a bin ``(C, H, W)``.

        It lies between the pixel's range over ``bins`` and twice its range over ``bins - 1``, or is a millionth of a millionth of the
        largest value, if that is more.

        Raises:
            ValueError: there is no histogram.
        """
        self._need_histogram()
        return self._histogram.width.to(self.dtype)

    def interval(self, level: float = 0.9) -> Interval:
        """The interval of order statistics that :meth:`Posterior.interval <dpnp_inference.posterior.Posterior.interval>` gives.

        It is the same where its k is at most ``extremes``. For larger k each end is moved out to the edge of its bin, so that the
        interval covers what it says at least.

        Args:
            level: wanted coverage.

        Raises:
            ValueError: ``level`` is outside of (0, 1), there are too few draws for it, or k is above ``extremes`` without a histogram.
        """
        n = self.count
        k = interval_order(n, level)
        if k <= self.extremes:
            low, high = self._low[k - 1].clone(), self._high[-k].clone()
        else:
            self._need_histogram(k)
            low, _ = self._histogram.find(k - 1)
            high, _ = self._histogram.find(n - k)
            low = torch.maximum(low.to(self.dtype), self._low[-1])
            high = torch.minimum((high + self._histogram.width).to(self.dtype), self._high[0])
        return Interval(low, high, (n + 1 - 2 * k) / (n + 1), k)

    @property
    def _varies(self) -> Tensor:
        """Where not all draws are equal, which rounding of their means may hide."""
        return self._high[-1] > self._low[0]

    def _order_statistic(self, rank: int) -> Tensor:
        """Of a rank from 0, float64."""
        from_top = self.count - 1 - rank
        if rank < self.extremes:
            return self._low[rank].to(torch.float64)
        if from_top < self.extremes:
            return self._high[-1 - from_top].to(torch.float64)
        self._need_histogram(min(rank, from_top) + 1)
        edge, place = self._histogram.find(rank)
        value = edge + place * self._histogram.width
        return value.clamp(self._low[-1].to(torch.float64), self._high[0].to(torch.float64))

    @property
    def r_hat(self) -> Tensor:
        """Split R-hat without ranks ``(C, H, W)``, of the half chains that are complete.

        It is infinite where every half chain stands still at a value of its own, and NaN where nothing varies.

        Raises:
            ValueError: chains have fewer than 4 draws, or fewer than 2 halves are complete.
        """
        if self._half == 0 or self._halves.count < 2:
            raise ValueError(
                f"R-hat needs at least {LEAST_DRAWS} kept draws a chain and 2 complete halves; there are {self._kept} and "
                f"{self._halves.count}"
            )
        squared = self._halves.variance / self._within.mean + (self._half - 1) / self._half
        return torch.where(self._varies, squared.sqrt(), math.nan).to(self.dtype)

    @property
    def persistence(self) -> Tensor:
        """Correlation of a chain's two halves ``(C, H, W)``, of the complete chains; see :func:`dpnp_inference.diagnostics.persistence`.

        Raises:
            ValueError: chains have fewer than 4 draws, or fewer than 2 are complete.
        """
        if self._half == 0 or self._chains.count < 2:
            raise ValueError(
                f"persistence needs at least {LEAST_DRAWS} kept draws a chain and 2 complete chains; there are {self._kept} and "
                f"{self._chains.count}"
            )
        between, within = 2 * self._chains.variance, self._apart.mean
        return torch.where(self._varies, (between - within) / (between + within), 0.0).nan_to_num(0.0).to(self.dtype)

    @property
    def ess(self) -> Tensor:
        r"""Effective sample size of the mean ``(C, H, W)``, by batch means: :math:`n s^2/(b s_b^2)`, NaN where nothing varies.

        s is the standard deviation of all n draws, :math:`s_b` that of the means of b successive draws of a chain, about the mean of all.
        Chains that disagree have a small one. Of a batches its relative standard error is about :math:`\sqrt{2/a}`, and it is too large
        where chains forget more slowly than within b draws. For single draws of independent chains it is n.

        Raises:
            ValueError: fewer than 2 batches are complete.
        """
        if self._batches.count < 2:
            raise ValueError(
                f"an effective sample size needs 2 complete batches of {self._batch} draws; there are {self._batches.count}"
            )
        ess = self.count * self._all.variance / (self._batch * self._batches.variance)
        return torch.where(self._varies, ess, math.nan).to(self.dtype)

    @property
    def mcse_mean(self) -> Tensor:
        """Monte Carlo standard error of :attr:`mean` ``(C, H, W)``, from :attr:`ess`; 0 where nothing varies.

        Raises:
            ValueError: as for :attr:`ess`.
        """
        ess = self.ess
        return torch.where(self._varies, self.std / ess.sqrt(), 0.0)

    def _need(self, least: int, what: str) -> None:
        if self.count < least:
            raise ValueError(f"{what} needs at least {least} draws, there are {self.count}")

    def _need_histogram(self, k: int | None = None) -> None:
        if not self.bins:
            asked = "this" if k is None else f"the {k}-th smallest or largest draw"
            raise ValueError(f"bins = 0: without a histogram {asked} is not known; extremes = {self.extremes} are kept")

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors that share no memory, for safetensors or a checkpoint."""
        state = {
            "arguments": torch.tensor([self.draws, self.burn_in, self.thin, self.extremes, self.bins]),
            "seen": torch.tensor(sorted(self._seen.items()), dtype=torch.int64).reshape(-1, 2),
            "count": torch.tensor([m.count for m in self._moments().values()]),
            "low": self._low,
            "high": self._high,
            "histogram": self._histogram.counts,
            "exponent": self._histogram.exponent,
            "first": self._histogram.first,
            "work_chains": torch.tensor(list(self._work), dtype=torch.int64),
            "work": torch.stack([*self._work.values()])
            if self._work
            else self._all.mean.new_zeros((0, WORK, *self.image_shape)),
        }
        for name, moments in self._moments().items():
            state |= {f"{name}_mean": moments.mean, f"{name}_square": moments.square}
        return {name: value.clone() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where :meth:`state_dict` was called.

        Args:
            state: of one made with the same arguments; ``device`` may differ.

        Raises:
            ValueError: it is of something else, or of other arguments; nothing is changed then.
        """
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ValueError(f"state has {sorted(state)}; needed are {sorted(mine)}")
        if state["arguments"].tolist() != mine["arguments"].tolist():
            raise ValueError(
                f"state was made with (draws, burn_in, thin, extremes, bins) = {state['arguments'].tolist()}, this is with "
                f"{mine['arguments'].tolist()}"
            )
        for name, value in mine.items():
            free = 1 if name in ("seen", "work", "work_chains") else 0  # leading sizes that may differ
            if state[name].shape[free:] != value.shape[free:] or state[name].dtype != value.dtype:
                raise ValueError(
                    f"state: {name} is {state[name].dtype} {tuple(state[name].shape)}, needed is {value.dtype} {tuple(value.shape)}"
                )
        copy = {name: value.to(self.device, copy=True) for name, value in state.items()}
        self._seen = {int(chain): int(number) for chain, number in copy["seen"].tolist()}
        for (name, moments), count in zip(self._moments().items(), copy["count"].tolist(), strict=True):
            moments.count, moments.mean, moments.square = count, copy[f"{name}_mean"], copy[f"{name}_square"]
        self._low, self._high = copy["low"], copy["high"]
        self._histogram.counts = copy["histogram"]
        self._histogram.exponent, self._histogram.first = copy["exponent"], copy["first"]
        self._work = {
            int(chain): w.clone() for chain, w in zip(copy["work_chains"].tolist(), copy["work"], strict=True)
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> RunningPosterior:
        """One with the arguments and in the state of :meth:`state_dict`.

        Args:
            state: the state.
            device: where it is to live.

        Raises:
            ValueError: it is of something else.
        """
        missing = sorted({"arguments", "low"} - state.keys())
        if missing:
            raise ValueError(f"state has no {' and no '.join(missing)}; it is not that of a RunningPosterior")
        draws, burn_in, thin, extremes, bins = state["arguments"].tolist()
        low = state["low"]
        made = cls(
            low.shape[1:],
            draws=draws,
            burn_in=burn_in,
            thin=thin,
            extremes=extremes,
            bins=bins,
            dtype=low.dtype,
            device=device,
        )
        made.load_state_dict(state)
        return made

    @property
    def nbytes(self) -> int:
        """Memory of the statistics."""
        return sum(value.numel() * value.element_size() for value in self.state_dict().values())


class DrawStore:
    """Takes a sampler's draws one by one and keeps what was asked for.

    Args:
        keep: ``"all"`` draws and no statistics; ``"statistics"`` of all draws and the last draw of each chain; or a number: statistics, and
            so many draws of each chain, evenly spaced and the last among them.
        image_shape: ``(C, H, W)``.
        chains: how many, numbered from 0; or their indices.
        draws: of each chain.
        dtype: of the draws.
        of: how many chains there are in all, where these are some of them; statistics are then made to be merged.

    Attributes:
        statistics: of all draws so far; None if all are kept.

    Raises:
        ValueError: ``keep`` is something else, or more than there are draws.
    """

    def __init__(
        self,
        keep: Keep,
        image_shape: Sequence[int],
        *,
        chains: int | range,
        draws: int,
        dtype: torch.dtype = torch.float32,
        of: int | None = None,
    ) -> None:
        if isinstance(keep, str) and keep not in ("all", "statistics"):
            raise ValueError(f"keep = {keep!r}; allowed are 'all', 'statistics' and a number of draws")
        number = {"all": draws, "statistics": 1}[keep] if isinstance(keep, str) else keep
        if not 1 <= number <= draws:
            raise ValueError(f"keep = {keep}; it must be from 1 to draws = {draws}")
        self.keep, self.draws = keep, draws
        self.chains = range(chains) if isinstance(chains, int) else chains
        self.statistics: RunningPosterior | None = None
        if keep != "all":
            n = (of or len(self.chains)) * draws
            needed = interval_order(n, LEVEL) if n >= 2 / (1 - LEVEL) - 1 else 1
            extremes = min(max(needed, LEAST_EXTREMES), MOST_EXTREMES)
            self.statistics = RunningPosterior(image_shape, draws=draws, extremes=extremes, dtype=dtype)
        self._places = {
            (i + 1) * draws // number - 1: i for i in range(number)
        }  # of a chain's draw among those that are kept
        self._samples = torch.zeros((len(self.chains), number, *image_shape), dtype=dtype)
        self._seen = torch.zeros(len(self.chains), dtype=torch.int64)

    def add(self, x: Tensor, chains: range) -> None:
        """Take in one draw of each of some chains.

        Args:
            x: ``(B, C, H, W)``, on any device.
            chains: their indices, all of which have had equally many draws so far.

        Raises:
            ValueError: shape or chains do not fit, or the chains have all their draws.
        """
        some = self._places_of(chains)
        if x.shape != (len(chains), *self._samples.shape[2:]) or some is None:
            raise ValueError(
                f"x has shape {tuple(x.shape)} for chains {chains}; there are {len(self._seen)} chains of images "
                f"{tuple(self._samples.shape[2:])}"
            )
        before = set(self._seen[some].tolist())
        if len(before) > 1 or max(before) >= self.draws:
            raise ValueError(
                f"chains {chains} have had {sorted(before)} of {self.draws} draws; needed are equally many, and fewer"
            )
        place = self._places.get(before.pop())
        if place is not None:
            self._samples[some, place] = x.detach().to(self._samples)
        if self.statistics is not None:
            self.statistics.update(x, chains)
        self._seen[some] += 1

    def take(self, samples: Tensor, statistics: RunningPosterior | None, chains: range, draws: int) -> None:
        """Take in what another store has kept of some chains, of an earlier run or of another process.

        Args:
            samples: ``(B, kept, C, H, W)``.
            statistics: of all their draws.
            chains: their indices, which have had no draws here.
            draws: how many each of them has had.

        Raises:
            ValueError: it does not fit, or draws that were not kept would be needed.
        """
        some = self._places_of(chains)
        if some is None or bool(self._seen[some].any()) or draws > self.draws or len(samples) != len(chains):
            raise ValueError(f"{draws} draws of chains {chains} do not fit into {self.draws} draws of {self.chains}")
        if (statistics is None) != (self.statistics is None):
            raise ValueError(f"keep = {self.keep!r}; the draws so far were kept in another way")
        if draws == self.draws or self.keep == "all":
            self._samples[some, : samples.shape[1]] = samples.to(self._samples)
        elif self.keep != "statistics":
            raise ValueError(
                f"keep = {self.keep}: {self.draws} draws a chain have other ones to keep than {draws}; needed is 'all' or 'statistics'"
            )
        self._seen[some] = draws
        if self.statistics is not None and statistics is not None:
            if self.statistics.count:
                self.statistics.merge(statistics)
            else:  # with the arguments that it was begun with
                self.statistics = RunningPosterior.from_state_dict(statistics.state_dict())

    def _places_of(self, chains: range) -> slice | None:
        """Rows of some chains; None if there are none, or not all of them are here."""
        first, last = chains.start - self.chains.start, chains.stop - self.chains.start
        return slice(first, last) if 0 <= first < last <= len(self.chains) else None

    @property
    def kept(self) -> Tensor:
        """The draws that are kept so far, ``(chains, kept, C, H, W)``; zeros where they are still to come."""
        return self._samples

    @property
    def samples(self) -> Tensor:
        """The draws that are kept, ``(chains, kept, C, H, W)`` on the CPU.

        Raises:
            ValueError: chains have not had all their draws.
        """
        missing = int((self._seen < self.draws).sum())
        if missing:
            raise ValueError(f"{missing} of {len(self._seen)} chains have not had all of their {self.draws} draws")
        return self._samples

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors that share no memory."""
        state = {"samples": self._samples.clone(), "draws_seen": self._seen.clone()}
        if self.statistics is not None:
            state |= {f"statistics.{name}": value for name, value in self.statistics.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where :meth:`state_dict` was called.

        Args:
            state: of one made with the same arguments.

        Raises:
            ValueError: it is of something else; nothing is changed then.
        """
        for name, value in (("samples", self._samples), ("draws_seen", self._seen)):
            if name not in state or state[name].shape != value.shape or state[name].dtype != value.dtype:
                found = tuple(state[name].shape) if name in state else "missing"
                raise ValueError(f"state: {name} is {found}, needed is {value.dtype} {tuple(value.shape)}")
        prefix = "statistics."
        statistics = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        if self.statistics is not None:
            self.statistics.load_state_dict(statistics)
        elif statistics:
            raise ValueError("state has statistics, and this keeps all draws")
        self._samples, self._seen = state["samples"].cpu().clone(), state["draws_seen"].cpu().clone()


def extremes_needed(draws: int, level: float = 0.9) -> int:
    """How many ``extremes`` keep the interval of a level exact: its k.

    Args:
        draws: of all chains together.
        level: of the interval.

    Raises:
        ValueError: ``level`` is outside of (0, 1), or there are too few draws for it.
    """
    return interval_order(draws, level)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exactly, float64."""
    return (
        torch.ones_like(exponent, dtype=torch.float64)
        if exponent.numel() == 0
        else ((exponent + 1023) << 52).view(torch.float64)
    )


def _number(x: Tensor, exponent: Tensor) -> Tensor:
    """Of the bin that x (float64) lies in."""
    return torch.floor(x * _power_of_two(-exponent)).to(torch.int64)
