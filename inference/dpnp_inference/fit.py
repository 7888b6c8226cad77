r"""Do the draws explain the measurement? A posterior predictive check (Rubin 1984; Gelman, Meng & Stern 1996).

With the deviance :math:`D(y, x) = -2 \log p(y \mid x)`, draws x from the posterior and measurements :math:`y'` that they would give,
:math:`D(y, x)` and :math:`D(y', x)` have one law over all measurements of the model. What is compared is their difference,

.. math:: \chi^2 = 1 + \frac{\overline{D(y, x) - D(y', x)}}{\tfrac12 \mathrm{Var}(D(y', x) \mid x)}

For Gaussian noise the variance is twice the number of entries of y, and this is the reduced chi-square of the residuals; else half of it is
the number of Gaussian entries that would vary as much. It needs no knowledge of the truth, and one call of the forward map a draw.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.randomness import derive_seed

log = logging.getLogger(__name__)

DRAWS, REPLICATES = 16, 64  # of the posterior at most, and measurements simulated of them all together at least
FIT, FIT_ERRORS = 1.5, 4.0  # how far chi-square may be from 1, as a ratio, or in its standard deviations
STREAM = 2**33  # of the simulated measurements, apart from chains and simulated data


@dataclass(frozen=True)
class Fit:
    r"""How well draws explain a measurement.

    Attributes:
        chi_square: reduced :math:`\chi^2`, 1 in the mean for draws from the posterior; None where no draw, or no law, has one.
        chance: standard deviation of it over measurements, :math:`\sqrt{2/m}` for Gaussian noise on m real entries; None likewise.
        draws: how many were looked at.
        impossible: those of them under which the measurement has probability 0. They are left out of ``chi_square``.
    """

    chi_square: float | None
    chance: float | None
    draws: int
    impossible: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Fit | None:
        """That of a run's record, ``Posterior.diagnostics``; None where it has none."""
        found = record.get("fit")
        return None if found is None else cls(**found)

    def describe(self) -> str:
        """In plain words, for one line."""
        if self.chi_square is None:
            known = "the measurement is impossible" if self.impossible == self.draws else "all measurements are alike"
            return f"no reduced chi-square: under the draws {known}"
        return f"reduced chi-square of the draws {self.chi_square:.3g}, 1 ± {self.chance:.2g} expected"

    @property
    def objection(self) -> str | None:
        """What it says against the draws, None if nothing."""
        if self.impossible == self.draws:
            return "under none of the draws that were looked at is the measurement possible; see 'dpnp-reconstruct check-model'"
        if self.chi_square is None or abs(self.errors) <= FIT_ERRORS or 1 / FIT <= self.chi_square <= FIT:
            return None
        if self.chi_square < 1:
            return (
                f"the draws are closer to the measurement than its noise allows ({self.describe()}): the noise is less than the noise "
                "model says, which makes the intervals too wide, or the draws follow the noise, which makes them too narrow"
            )
        return (
            f"the draws do not explain the measurement ({self.describe()}): they have not arrived (more annealing.decay or "
            "proximal.steps), or operator, noise or prior are not those of the measurement (see 'dpnp-reconstruct check-model')"
        )

    @property
    def errors(self) -> float:
        """By how many ``chance`` the reduced chi-square differs from 1, with its sign; 0 where it is not known."""
        return 0.0 if self.chi_square is None or not self.chance else (self.chi_square - 1) / self.chance


@torch.no_grad()
def measure_fit(forward_model: ForwardModel, y: Tensor, x: Tensor, *, seed: int) -> Fit:
    """How well draws explain a measurement; of many draws :data:`DRAWS` are looked at, evenly spaced.

    Args:
        forward_model: operator and noise.
        y: the measurement ``(*y_shape)``, on the device of the forward model.
        x: draws ``(n, C, H, W)``, likewise.
        seed: not negative, of the measurements that are simulated.

    Returns:
        The figures.

    Raises:
        ValueError: the operator's output or the measurement does not fit the noise model.
    """
    chosen = torch.linspace(0, len(x) - 1, min(len(x), DRAWS)).round().long().tolist()
    each = max(2, math.ceil(REPLICATES / len(chosen)))
    generator = torch.Generator().manual_seed(derive_seed(seed, STREAM))
    noise = forward_model.noise
    excess, variances = [], []
    for i in chosen:
        clean: Tensor = forward_model.operator(x[i : i + 1])
        deviance = -2 * noise.log_prob(y, clean)[0]
        if bool(deviance.isfinite()):
            others = torch.stack([-2 * noise.log_prob(noise.sample(clean, generator), clean)[0] for _ in range(each)])
            excess.append(float(deviance - others.mean()))
            variances.append(float(others.var()))
    impossible = len(chosen) - len(excess)
    variance = statistics.fmean(variances) if variances else 0.0
    if not 0 < variance < math.inf:  # as of a law that gives all possible measurements one density
        return Fit(None, None, len(chosen), impossible)
    return Fit(1 + 2 * statistics.fmean(excess) / variance, 2 / math.sqrt(variance), len(chosen), impossible)


def record_fit(forward_model: ForwardModel, y: Tensor, x: Tensor, *, seed: int) -> dict[str, Any] | None:
    """:func:`measure_fit` for the record of a run, JSON-able; None, and a warning, where it fails: the draws are there all the same."""
    try:
        return asdict(measure_fit(forward_model, y, x, seed=seed))
    except Exception as error:
        log.warning("whether the draws explain the measurement is not known: %s: %s", type(error).__name__, error)
        return None
