r"""What closure phases and closure amplitudes have in common.

A station's unknown gain turns :math:`V_{ij}` into :math:`g_i \overline{g_j} V_{ij}`. Phases summed around a triangle of stations, and
ratios of amplitudes around a quadrangle, do not depend on gains. Of the many that can be formed in a scan only few are
independent of each other; with those, nothing is counted twice (Blackburn et al. 2020, ApJ 894, 31, arXiv 1910.02062).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator
from dpnp_shared.operators.interferometry.array import Coverage
from dpnp_shared.operators.interferometry.visibilities import Pulse, as_complex, fourier_matrix

Baselines = tuple[tuple[int, int], ...]  # of a scan, in the order of its visibilities
Term = tuple[int, int, int]  # two stations, and the sign with which their baseline enters


class Closures(Operator):
    """Sums and differences of phases or of log amplitudes of visibilities, over closed paths of stations.

    Args:
        image_shape: ``(1, H, W)``.
        coverage: the frequencies, with their stations and scans.
        field_of_view: width of the image in microarcseconds; pixels are squares.
        pulse: ``"square"``, ``"triangle"`` or ``"point"``; see :class:`~dpnp_shared.operators.Visibilities`.

    Attributes:
        design: ``(n, m)``, the sign with which each of the m visibilities enters each of the n closure quantities, or 0.
        paths: for each closure quantity the scan and the stations.

    Raises:
        ValueError: ``coverage`` does not know its stations, or no scan has a closure quantity; or as for visibilities.
    """

    matrix: Tensor  # (2 m, H W), see fourier_matrix
    design: Tensor
    reversal: int  # the factor of a phase or log amplitude where its baseline is turned round

    def __init__(
        self, image_shape: tuple[int, int, int], coverage: Coverage, field_of_view: float, pulse: Pulse = "square"
    ) -> None:
        super().__init__()
        self.register_buffer("matrix", fourier_matrix(image_shape, coverage, field_of_view, pulse))
        self.image_shape = (1, image_shape[1], image_shape[2])
        if coverage.stations is None or coverage.scan is None:
            raise ValueError(
                "coverage: closure quantities need the stations and the scan of each visibility; allowed are points with rows of "
                "(u, v, first station, second station, scan), and EarthRotation"
            )
        self.paths: list[tuple[int, tuple[int, ...]]] = []
        blocks, known = [], dict[Baselines, tuple[list[tuple[int, ...]], Tensor]]()
        for scan in sorted(set(coverage.scan.tolist())):
            members = (coverage.scan == scan).nonzero()[:, 0]
            baselines = tuple((int(i), int(j)) for i, j in coverage.stations[members])
            if baselines not in known:
                known[baselines] = self._independent(baselines)
            paths, rows = known[baselines]
            self.paths += [(scan, path) for path in paths]
            blocks.append(rows.new_zeros(len(rows), len(coverage)).index_copy_(1, members, rows))
        if not self.paths:
            raise ValueError(f"coverage: no scan has a closed path of stations, as {type(self).__name__} need one")
        self.register_buffer("design", torch.cat(blocks))

    @classmethod
    @abstractmethod
    def candidates(cls, stations: Sequence[int]) -> Iterable[tuple[tuple[int, ...], list[Term]]]:
        """All closed paths over ``stations``, the preferred ones first, each with its baselines."""

    @staticmethod
    @abstractmethod
    def part(V: Tensor) -> Tensor:
        """What is added up, of visibilities ``(B, m)``: real ``(B, m)``."""

    def visibilities(self, x: Tensor) -> Tensor:
        """Complex ``(B, m)``, of ``x`` ``(B, 1, H, W)``; see :class:`~dpnp_shared.operators.Visibilities`."""
        self._check_image(x)
        return as_complex(x.flatten(1) @ self.matrix.to(x.dtype).T)

    def of(self, V: Tensor) -> Tensor:
        """The closure quantities ``(B, n)`` of visibilities ``(B, m)``, measured ones say."""
        return self.part(V) @ self.design.to(V.real.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        """Closure quantities ``(B, n)`` of ``x`` ``(B, 1, H, W)``."""
        return self.of(self.visibilities(x))

    def covariance(self, V: Tensor, sigma: float | Tensor) -> Tensor:
        r"""Covariance of the closure quantities under thermal noise of the visibilities, where the latter stand out of it.

        Phase and log amplitude of a visibility each have the variance :math:`\sigma^2/|V|^2` to first order, so that the
        covariance is :math:`D\, \mathrm{diag}(\sigma^2/|V|^2)\, D^T` with the signs D (Blackburn et al. 2020). It is for
        :class:`~dpnp_shared.noise.GaussianNoise`, and good to a few per cent for :math:`|V| > 5 \sigma`.

        Args:
            V: visibilities ``(m,)``, measured ones or those of a reference image.
            sigma: standard deviation of their real and of their imaginary part, each; a number or ``(m,)``.

        Returns:
            ``(n, n)``, in float64.

        Raises:
            ValueError: the shapes do not fit, ``sigma`` is not positive, or a visibility is 0.
        """
        m = self.design.shape[1]
        std = torch.as_tensor(sigma, dtype=torch.float64, device=V.device)
        if V.shape != (m,) or std.shape not in ((), (m,)):
            raise ValueError(f"V has shape {tuple(V.shape)} and sigma {tuple(std.shape)}; allowed are ({m},) for both")
        amplitude = V.abs().double()
        if not (bool((std > 0).all()) and bool((amplitude > 0).all())):
            raise ValueError(
                f"sigma = {float(std.min())} and |V| = {float(amplitude.min())} at the least; both must be positive"
            )
        D = self.design.double()
        return (D * (std / amplitude) ** 2) @ D.T

    def _independent(self, baselines: Baselines) -> tuple[list[tuple[int, ...]], Tensor]:
        """A largest set of independent paths, and their signs ``(n, baselines)``: each candidate that adds to the ones before."""
        place = {pair: (k, 1) for k, pair in enumerate(baselines)}
        place |= {(j, i): (k, self.reversal) for k, (i, j) in enumerate(baselines)}
        stations = sorted({station for pair in baselines for station in pair})
        # a closed path is orthogonal to every station's gain; so no more can be independent of each other than this
        gains = torch.zeros(len(stations), len(baselines), dtype=torch.float64)
        for k, (i, j) in enumerate(baselines):
            gains[stations.index(i), k], gains[stations.index(j), k] = 1, self.reversal
        most = len(baselines) - int(torch.linalg.matrix_rank(gains))
        paths: list[tuple[int, ...]] = []
        rows: list[Tensor] = []
        basis = torch.zeros(0, len(baselines), dtype=torch.float64)  # orthonormal, of the same span as the rows
        for path, terms in self.candidates(stations):
            if len(rows) == most:
                break
            if any((i, j) not in place for i, j, _ in terms):
                continue
            row = torch.zeros(len(baselines), dtype=torch.float64)
            for i, j, sign in terms:
                k, turned = place[i, j]
                row[k] = sign * turned
            rest = row - basis.T @ (basis @ row)
            rest = rest - basis.T @ (basis @ rest)
            if float(rest.norm()) > 1e-6:
                basis = torch.cat([basis, rest[None] / rest.norm()])
                paths.append(path)
                rows.append(row)
        return paths, torch.stack(rows) if rows else basis
