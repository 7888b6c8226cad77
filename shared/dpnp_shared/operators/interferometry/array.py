r"""Which spatial frequencies an array of radio telescopes measures.

Thompson, Moran and Swenson 2017, Interferometry and Synthesis in Radio Astronomy, 3rd edition, chapter 4. A baseline from
station i to station j, seen from the source, is :math:`(u, v)` wavelengths long towards east and north, and turns with the
Earth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date as calendar_date
from itertools import combinations, pairwise

import torch
from torch import Tensor

from dpnp_shared.operators.base import array_argument

# Stations of the Event Horizon Telescope in April 2017, geocentric metres (Event Horizon Telescope Collaboration 2019, paper II,
# ApJL 875, L2): x towards Greenwich, y towards 90 degrees east, z towards the North Pole. The most sensitive one comes first, since
# the first station of a scan is the reference of its closure quantities.
EHT_2017: dict[str, tuple[float, float, float]] = {
    "ALMA": (2225061.2, -5440057.4, -2481681.2),
    "APEX": (2225039.5, -5441197.6, -2479303.4),
    "JCMT": (-5464584.7, -2493001.2, 2150654.0),
    "LMT": (-768715.6, -5988507.1, 2063354.9),
    "PV": (5088967.7, -301681.2, 3825012.2),
    "SMA": (-5464555.5, -2492928.0, 2150797.2),
    "SMT": (-1828796.2, -5054406.8, 3427865.2),
    "SPT": (0.0, 0.0, -6359609.7),
}


class Coverage:
    """Spatial frequencies as a list, that of observed data say.

    A visibility is that of two stations at a time. Those taken at one time are a scan, within which closure quantities are
    formed; they need to know the stations, :class:`~dpnp_shared.operators.Visibilities` does not.

    Args:
        points: one row a visibility, ``(u, v)`` or ``(u, v, first station, second station, scan)``, with ``u`` and ``v`` in
            wavelengths and whole numbers for the rest: nested lists, a tensor, or the path of a ``.npy`` file. The
            frequency is that of the baseline from the first station to the second.

    Attributes:
        uv: ``(m, 2)``, in wavelengths.
        stations: ``(m, 2)``, whole numbers; None where they are not known.
        scan: ``(m,)``, whole numbers; None likewise.

    Raises:
        ValueError: ``points`` has no rows or another number of columns, a number that is not finite or not whole, a baseline of
            a station with itself, or two rows of one scan with the same two stations.
    """

    def __init__(self, points: Tensor | list[list[float]] | str) -> None:
        rows = array_argument(points, "points").cpu()
        if rows.ndim != 2 or rows.shape[1] not in (2, 5) or rows.shape[0] == 0:
            raise ValueError(
                f"points has shape {tuple(rows.shape)}; allowed are (m, 2), rows of (u, v), and (m, 5), rows of "
                "(u, v, first station, second station, scan)"
            )
        self.uv = rows[:, :2]
        self.stations: Tensor | None = None
        self.scan: Tensor | None = None
        if rows.shape[1] == 5:
            numbers = rows[:, 2:].round().long()
            if not torch.equal(numbers.double(), rows[:, 2:]):
                raise ValueError("points: stations and scans are whole numbers, got others in columns 3 to 5")
            self.stations, self.scan = numbers[:, :2], numbers[:, 2]
            if bool((self.stations[:, 0] == self.stations[:, 1]).any()):
                raise ValueError("points: a baseline joins two different stations, got one from a station to itself")
            keys = torch.cat([self.stations.sort(dim=1).values, self.scan[:, None]], dim=1)
            if len(set(map(tuple, keys.tolist()))) < len(keys):
                raise ValueError("points: two stations have one visibility in a scan, got several")

    def __len__(self) -> int:
        """How many visibilities there are."""
        return len(self.uv)


class EarthRotation(Coverage):
    r"""Spatial frequencies that the Earth's rotation sweeps over, all baselines of the stations that see the source.

    With the source at the Greenwich hour angle H and the declination :math:`\delta`, a baseline :math:`(X, Y, Z)` in
    geocentric coordinates has (equation 4.1 of the book)

    .. math::
        u = (X \sin H + Y \cos H)/\lambda, \qquad
        v = (-X \sin\delta \cos H + Y \sin\delta \sin H + Z \cos\delta)/\lambda .

    Mean sidereal time, without precession, nutation, aberration and refraction: the result is right to a few tenths of a
    degree of rotation and of elevation. The source is M 87 by default, the date one of the campaign of 2017.

    Args:
        times: hours of universal time after 0 h of ``date``, one a scan.
        date: year, month and day.
        right_ascension: of the source, in hours.
        declination: of the source, in degrees.
        wavelength: in metres.
        stations: ``"eht_2017"`` for all of :data:`EHT_2017`, a list of names out of it, or geocentric coordinates ``(n, 3)`` in
            metres as nested lists or as the path of a ``.npy`` file.
        min_elevation: of the source above the horizon of a station that takes part in a scan, in degrees; the zenith is
            geocentric.

    Attributes:
        names: of the stations that :attr:`stations` counts.

    Raises:
        ValueError: an argument out of range, an unknown station, or no time at which two stations see the source.
    """

    def __init__(
        self,
        times: list[float],
        date: tuple[int, int, int] = (2017, 4, 11),
        right_ascension: float = 12.513729,
        declination: float = 12.391123,
        wavelength: float = 1.3e-3,
        stations: str | list[str] | list[list[float]] | Tensor = "eht_2017",
        min_elevation: float = 10.0,
    ) -> None:
        if not times or not all(math.isfinite(t) for t in times) or any(b <= a for a, b in pairwise(times)):
            raise ValueError(f"times = {times}; allowed are increasing hours, at least one")
        if not 0 <= right_ascension < 24:
            raise ValueError(f"right_ascension = {right_ascension}; allowed are hours in [0, 24)")
        if not -90 <= declination <= 90:
            raise ValueError(f"declination = {declination}; allowed are degrees in [-90, 90]")
        if not 0 < wavelength < math.inf:
            raise ValueError(f"wavelength = {wavelength}; allowed is a positive number of metres")
        if not -90 <= min_elevation < 90:
            raise ValueError(f"min_elevation = {min_elevation}; allowed are degrees in [-90, 90)")
        self.names, positions = _stations(stations)
        delta = math.radians(declination)
        rows = []
        for scan, time in enumerate(times):
            H = math.radians(15 * (sidereal_time(date, time) - right_ascension))
            east = torch.tensor([math.sin(H), math.cos(H), 0.0], dtype=torch.float64)
            north = torch.tensor(
                [-math.sin(delta) * math.cos(H), math.sin(delta) * math.sin(H), math.cos(delta)], dtype=torch.float64
            )
            source = torch.linalg.cross(east, north)
            sine = positions @ source / positions.norm(dim=1)
            up = [i for i in range(len(positions)) if float(sine[i]) >= math.sin(math.radians(min_elevation))]
            for i, j in combinations(up, 2):
                baseline = (positions[j] - positions[i]) / wavelength
                rows.append([float(baseline @ east), float(baseline @ north), i, j, scan])
        if not rows:
            raise ValueError(
                f"no two stations of {', '.join(self.names)} see the source {min_elevation} degrees above their horizon at any "
                f"of the times {times} of the date {date}"
            )
        super().__init__(torch.tensor(rows, dtype=torch.float64))


def sidereal_time(date: tuple[int, int, int], hours: float) -> float:
    """Greenwich mean sidereal time, to a tenth of a second in this century.

    The linear part of the expression of Aoki et al. 1982 (Astron. Astrophys. 105, 359).

    Args:
        date: year, month and day.
        hours: of universal time after its beginning.

    Returns:
        Hours in [0, 24).

    Raises:
        ValueError: ``date`` is not a date.
    """
    try:
        days = (calendar_date(*date) - calendar_date(2000, 1, 1)).days - 0.5 + hours / 24
    except (TypeError, ValueError) as error:
        raise ValueError(f"date = {date}; allowed are a year, a month and a day, as in (2017, 4, 11)") from error
    return (280.46061837 + 360.98564736629 * days) / 15 % 24


def _stations(stations: str | Sequence[str] | list[list[float]] | Tensor) -> tuple[list[str], Tensor]:
    """Names and geocentric positions ``(n, 3)``."""
    if isinstance(stations, str) and not stations.endswith(".npy"):
        if stations != "eht_2017":
            raise ValueError(f"stations = {stations!r}; allowed are 'eht_2017', names, coordinates and a .npy file")
        stations = list(EHT_2017)
    if isinstance(stations, list | tuple) and all(isinstance(name, str) for name in stations):
        names = [str(name) for name in stations]
        unknown = [name for name in names if name not in EHT_2017]
        if unknown or len(set(names)) < len(names):
            raise ValueError(f"stations = {names}; allowed are different ones of {', '.join(EHT_2017)}")
        positions = torch.tensor([EHT_2017[name] for name in names], dtype=torch.float64)
    else:
        positions = array_argument(stations, "stations").cpu()
        names = [str(i) for i in range(len(positions))]
    if positions.ndim != 2 or positions.shape[1] != 3 or len(positions) < 2:
        raise ValueError(f"stations has shape {tuple(positions.shape)}; allowed is (n, 3) with at least two stations")
    if not bool((positions.norm(dim=1) > 0).all()):
        raise ValueError("stations: one lies at the Earth's centre; allowed are geocentric coordinates in metres")
    return names, positions
