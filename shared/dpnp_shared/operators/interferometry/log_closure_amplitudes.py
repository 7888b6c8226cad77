"""Logarithms of closure amplitudes of quadrangles of stations.

Twiss, Carter and Little 1960, Observatory 80, 153; Blackburn et al. 2020, ApJ 894, 31, arXiv 1910.02062.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from dpnp_shared.operators.interferometry.closure import Closures, Term


class LogClosureAmplitudes(Closures):
    r""":math:`\ln \frac{|V_{ij}|\, |V_{kl}|}{|V_{ik}|\, |V_{jl}|}` ``(B, closure amplitudes)``.

    Of each scan an independent set of quadrangles: with all baselines of N stations :math:`N(N-3)/2`, which hold the two
    stations of the lowest numbers. It goes with :class:`~dpnp_shared.noise.GaussianNoise`, of a covariance by
    :meth:`covariance` say. Stations' gains, the total flux and a shift of the source leave it unchanged. An amplitude of 0 is taken
    as the smallest positive number, with gradient 0, so that a blank image has the values of a point.

    Args:
        image_shape: ``(1, H, W)``.
        coverage: the frequencies, with their stations and scans.
        field_of_view: width of the image in microarcseconds; pixels are squares.
        pulse: ``"square"``, ``"triangle"`` or ``"point"``; see :class:`~dpnp_shared.operators.Visibilities`.

    Raises:
        ValueError: ``coverage`` does not know its stations, or no scan has a quadrangle of them; or as for visibilities.
    """

    reversal = 1

    @classmethod
    def candidates(cls, stations: Sequence[int]) -> Iterable[tuple[tuple[int, ...], list[Term]]]:
        """All quadrangles, of every four stations the three in which their six baselines can form one."""
        for a, b, c, d in combinations(stations, 4):
            for path in ((a, b, c, d), (a, b, d, c), (a, c, d, b)):
                i, j, k, m = path
                yield path, [(i, j, 1), (k, m, 1), (i, k, -1), (j, m, -1)]

    @staticmethod
    def part(V: Tensor) -> Tensor:
        """Log amplitudes ``(B, m)``."""
        return V.abs().clamp_min(torch.finfo(V.real.dtype).tiny).log()
