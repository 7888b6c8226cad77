"""Closure phases of triangles of stations.

Jennison 1958, MNRAS 118, 276; Blackburn et al. 2020, ApJ 894, 31, arXiv 1910.02062.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import torch
from torch import Tensor

from dpnp_shared.operators.interferometry.closure import Closures, Term


class ClosurePhases(Closures):
    r""":math:`\psi_{ijk} = \arg(V_{ij} V_{jk} V_{ki})`, in radians in :math:`(-\pi, \pi]`, ``(B, closure phases)``.

    Of each scan an independent set of triangles: with all baselines of N stations the :math:`(N-1)(N-2)/2` that hold the
    station of the lowest number. It goes with :class:`~dpnp_shared.noise.VonMisesNoise`, for angles. Stations' gains, the total
    flux and a shift of the source leave it unchanged. Where a visibility is 0 its phase is taken as 0, with gradient 0.

    Args:
        image_shape: ``(1, H, W)``.
        coverage: the frequencies, with their stations and scans.
        field_of_view: width of the image in microarcseconds; pixels are squares.
        pulse: ``"square"``, ``"triangle"`` or ``"point"``; see :class:`~dpnp_shared.operators.Visibilities`.

    Raises:
        ValueError: ``coverage`` does not know its stations, or no scan has a triangle of them; or as for visibilities.
    """

    reversal = -1

    @classmethod
    def candidates(cls, stations: Sequence[int]) -> Iterable[tuple[tuple[int, ...], list[Term]]]:
        """All triangles."""
        for i, j, k in combinations(stations, 3):
            yield (i, j, k), [(i, j, 1), (j, k, 1), (i, k, -1)]

    @staticmethod
    def part(V: Tensor) -> Tensor:
        """Phases ``(B, m)``."""
        # a phase does not depend on the modulus: dividing by it as by a constant changes no derivative, and nothing underflows
        modulus = V.abs().detach()
        unit = torch.where(modulus == 0, 1.0, V / modulus.clamp_min(torch.finfo(modulus.dtype).tiny))
        return torch.atan2(unit.imag, unit.real)

    def of(self, V: Tensor) -> Tensor:
        """The closure phases ``(B, n)`` of visibilities ``(B, m)``, measured ones say."""
        return math.pi - torch.remainder(math.pi - super().of(V), 2 * math.pi)
