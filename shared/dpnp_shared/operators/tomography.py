r"""X-ray computed tomography in the plane: line integrals of the image.

Kak and Slaney 1988, "Principles of computerized tomographic imaging", chapter 3 (geometries, filtered back-projection);
Joseph 1982, IEEE Trans. Med. Imaging 1, 192 (line integrals of a pixel image); Parker 1982, Med. Phys. 9, 254 (short scans).

Coordinates: the image's middle is the origin, x goes to the right and y up, so that the pixel in row ``i`` and column ``j`` lies at
:math:`x = (j - \tfrac{W-1}{2})\,p,\ y = (\tfrac{H-1}{2} - i)\,p` with the pixel size :math:`p`. All lengths are in one unit, that of
``pixel_size``. Angles are in degrees and grow anticlockwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dpnp_shared.operators.base import LinearOperator, array_argument, check_image_shape
from dpnp_shared.operators.sparse import SparseMatrix

ENTRIES_AT_ONCE = 2**22  # while the matrix is built


class RayTransform(LinearOperator):
    r"""Integrals of the image along straight lines, :math:`y_k = \int x(o_k + t\,d_k)\,dt`, in units of (pixel value x length).

    Joseph's method: a line is sampled where it crosses the middles of the rows (of the columns, where it is closer to horizontal
    than to vertical), by linear interpolation between the two pixels beside it; the image is 0 outside. The weights are kept as a
    sparse matrix, so that the adjoint is the exact transpose. Any set of lines will do: crosshole tomography, say.

    Args:
        image_shape: ``(C, H, W)``; each channel is projected on its own.
        points: ``(..., 2)``, a point ``(x, y)`` of each line; a tensor, nested lists, or the path of a ``.npy`` file.
        directions: ``(..., 2)``, likewise; of any length but 0.
        pixel_size: side of a pixel.

    Attributes:
        rays: the number of lines as the leading shape of ``points``; ``y`` is ``(B, C, *rays)``.

    Raises:
        ValueError: ``points`` and ``directions`` have other shapes than that, a direction is 0, ``pixel_size`` is not positive, or
            there are too many lines.
    """

    points: Tensor  # (*rays, 2)
    directions: Tensor  # (*rays, 2), of length 1

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        points: Sequence[Sequence[float]] | str | Tensor,
        directions: Sequence[Sequence[float]] | str | Tensor,
        pixel_size: float = 1.0,
    ) -> None:
        super().__init__(image_shape)
        points, directions = array_argument(points, "points").cpu(), array_argument(directions, "directions").cpu()
        if points.ndim < 2 or points.shape[-1] != 2 or points.shape != directions.shape or points.numel() == 0:
            raise ValueError(
                f"points has shape {tuple(points.shape)} and directions {tuple(directions.shape)}; allowed is (..., 2), the same"
            )
        lengths = torch.linalg.vector_norm(directions, dim=-1, keepdim=True)
        if not bool((lengths > 0).all()):
            raise ValueError("directions holds a vector of length 0")
        self.pixel_size = _positive(pixel_size, "pixel_size")
        _, self.height, self.width = self._known_image_shape("__init__")
        self.rays = tuple(points.shape[:-1])
        most = math.prod(self.rays) * 2 * max(self.height, self.width)
        if most >= 2**31:
            raise ValueError(f"{math.prod(self.rays)} lines through {self.height} x {self.width} pixels are too many")
        self.register_buffer("points", points)
        self.register_buffer("directions", directions / lengths)
        self.matrix = self._joseph(points.reshape(-1, 2), self.directions.reshape(-1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Line integrals ``(B, C, *rays)`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        y: Tensor = self.matrix(x.flatten(2).flatten(0, 1))
        return y.reshape(*x.shape[:2], *self.rays)

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``, ``(B, C, H, W)``, of ``y`` ``(B, C, *rays)``: unfiltered back-projection."""
        self._check_measurement(y)
        x = self.matrix.transpose(y.flatten(2).flatten(0, 1))
        return x.reshape(*y.shape[:2], self.height, self.width)

    @property
    def unseen(self) -> Tensor | None:
        """Pixels that no line touches, ``(1, H, W)``; None if there are none."""
        missed = self.matrix.transposed_pointers.diff().reshape(1, self.height, self.width) == 0
        return missed if bool(missed.any()) else None

    def _check_measurement(self, y: Tensor) -> None:
        shape = (self._known_image_shape("adjoint")[0], *self.rays)
        if tuple(y.shape[1:]) != shape or not len(y):
            raise ValueError(f"y has shape {tuple(y.shape)}; allowed is (B, {', '.join(map(str, shape))}), B > 0")

    def _joseph(self, points: Tensor, directions: Tensor) -> SparseMatrix:
        """The weights of all lines ``(rays, 2)``, lines by pixels."""
        h, w = self.height, self.width
        row, column = (h - 1) / 2 - points[:, 1] / self.pixel_size, (w - 1) / 2 + points[:, 0] / self.pixel_size
        steep = directions[:, 1].abs() >= directions[:, 0].abs()  # such a line takes one step a row
        row_step, column_step = -directions[:, 1], directions[:, 0]
        along, across = torch.where(steep, row, column), torch.where(steep, column, row)
        slope = torch.where(steep, column_step, row_step) / torch.where(steep, row_step, column_step)
        length = self.pixel_size / torch.where(steep, row_step, column_step).abs()
        n_along, n_across = torch.where(steep, h, w), torch.where(steep, w, h)
        stride_along, stride_across = torch.where(steep, w, 1), torch.where(steep, 1, w)

        step, side = torch.arange(max(h, w)), torch.arange(2)
        counts, columns, weights = [], [], []
        for k in torch.split(torch.arange(len(points)), max(ENTRIES_AT_ONCE // (2 * max(h, w)), 1)):
            position = across[k, None] + (step - along[k, None]) * slope[k, None]  # (k, steps)
            pixel = (position.floor()[..., None] + side).long()  # (k, steps, 2), the pixels beside the line
            weight = (1 - (position[..., None] - pixel).abs()) * length[k, None, None]
            inside = (step < n_along[k, None])[..., None] & (pixel >= 0) & (pixel < n_across[k, None, None])
            inside &= weight > 1e-12 * self.pixel_size  # of a line through the middle of a pixel, up to rounding
            index = (step * stride_along[k, None])[..., None] + pixel * stride_across[k, None, None]
            counts.append(inside.sum((1, 2)))
            columns.append(index[inside].int())
            weights.append(weight[inside])
        pointers = functional.pad(torch.cat(counts).cumsum(0), (1, 0))
        return SparseMatrix(pointers, torch.cat(columns), torch.cat(weights), h * w)


class CT(RayTransform):
    """What scanners with a rotating detector share: views, detectors and filtered back-projection.

    Attributes:
        angles: of the views, in degrees, ``(views,)``.
        positions: of the detectors along the detector, ``(detectors,)``, from its middle.
    """

    angles: Tensor
    positions: Tensor
    line_weights: Tensor  # what filtered back-projection multiplies the sinogram with, broadcast to (views, detectors)

    def _register(self, angles: Tensor, positions: Tensor, line_weights: Tensor) -> None:
        self.register_buffer("angles", angles)
        self.register_buffer("positions", positions)
        self.register_buffer("line_weights", line_weights)

    def display(self, y: Tensor) -> Tensor:
        """The filtered back-projection, ``(C, H, W)``, in the image's units."""
        return self.fbp(y[None])[0]

    def fbp(self, y: Tensor, window: Literal["ram-lak", "hann"] = "ram-lak") -> Tensor:
        """Filtered back-projection, the classical reconstruction (Kak and Slaney 1988, sections 3.3 and 3.4).

        Each view counts with half of the angle to the view before and after it. A gap of more than three times the median one is
        missing data (limited angle) and counts as much as the median.

        Args:
            y: line integrals ``(B, C, views, detectors)``.
            window: of the ramp filter: ``"ram-lak"`` for none, ``"hann"`` for one that falls to 0 at the detectors' Nyquist
                frequency: smoother, and less noisy.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            ValueError: ``y`` has another shape, or ``window`` is another word.
        """
        self._check_measurement(y)
        if window not in ("ram-lak", "hann"):
            raise ValueError(f"window = {window!r}; allowed are 'ram-lak' and 'hann'")
        n = len(self.positions)
        filtered = self._filter(y * self.line_weights.to(y.dtype), window)
        filtered = functional.pad(filtered.flatten(0, 1), (1, 1))  # (B·C, views, n + 2), 0 beside the detector
        image = y.new_zeros(len(filtered), self.height * self.width)
        for view, theta in enumerate(torch.deg2rad(self.angles)):
            position, weight = self._back(theta)
            position = (position.flatten() + (n + 1) / 2).clamp(0, n + 1)
            lower = position.long().clamp(max=n)
            left, right = (filtered[:, view].index_select(1, lower + side) for side in (0, 1))
            image += weight.flatten().to(y.dtype) * torch.lerp(left, right, (position - lower).to(y.dtype))
        return image.reshape(*y.shape[:2], self.height, self.width)

    def _kernel(self, offset: Tensor) -> Tensor:
        """The ramp filter at whole offsets between detectors, times their distance."""
        raise NotImplementedError

    def _back(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Where a view at the angle sees each pixel, in detectors from their middle, and with which weight; ``(H, W)`` both."""
        raise NotImplementedError

    def _filter(self, y: Tensor, window: str) -> Tensor:
        """Convolve each view of ``y`` ``(..., detectors)`` with the filter."""
        n = y.shape[-1]
        length = 2 ** math.ceil(math.log2(3 * n))
        kernel = self._kernel(torch.arange(1 - n, n, dtype=self.angles.dtype, device=y.device))
        response = torch.fft.rfft(kernel, length)
        if window == "hann":
            response = response * (1 + torch.cos(2 * math.pi * torch.fft.rfftfreq(length, device=y.device))) / 2
        filtered: Tensor = torch.fft.irfft(torch.fft.rfft(y, length) * response.to(y.dtype.to_complex()), length)
        return filtered[..., n - 1 : 2 * n - 1]

    def _pixels(self) -> tuple[Tensor, Tensor]:
        """Coordinates x ``(1, W)`` and y ``(H, 1)`` of the pixels' middles."""
        column = torch.arange(self.width, dtype=self.angles.dtype, device=self.angles.device) - (self.width - 1) / 2
        row = torch.arange(self.height, dtype=self.angles.dtype, device=self.angles.device) - (self.height - 1) / 2
        return column * self.pixel_size, -row[:, None] * self.pixel_size


class ParallelBeamCT(CT):
    r"""Parallel beams: :math:`y(\theta, s) = \int x(s\,n_\theta + t\,n_\theta^\perp)\,dt`, the Radon transform.

    :math:`n_\theta = (\cos\theta, \sin\theta)` is the direction of the detector and
    :math:`n_\theta^\perp = (-\sin\theta, \cos\theta)` that of the beams. At the angle 0 the beams run up along the columns, and
    detectors follow from left to right; at 90° the beams run along the rows, and detectors follow from the bottom to the top.
    ``y`` is ``(B, C, views, detectors)``.

    Args:
        image_shape: ``(C, H, W)``.
        angles: the number of views, evenly over ``arc``, the first at 0, the end left out; or the angles themselves in degrees: a
            list, a tensor, or the path of a ``.npy`` file.
        detectors: how many; by default as many as cover the image's diagonal.
        pixel_size: side of a pixel.
        detector_spacing: distance of neighbouring detectors; by default ``pixel_size``.
        arc: in degrees, with a number of views only; by default 180, and less for limited angle tomography.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        angles: int | list[float] | str | Tensor,
        detectors: int | None = None,
        pixel_size: float = 1.0,
        detector_spacing: float | None = None,
        arc: float | None = None,
    ) -> None:
        degrees = _view_angles(angles, arc, 180)
        radius = _radius(image_shape, pixel_size)
        spacing = _positive(pixel_size if detector_spacing is None else detector_spacing, "detector_spacing")
        positions = _detector_positions(detectors, spacing, 2 * radius)
        theta = torch.deg2rad(degrees)[:, None]
        across = torch.stack([theta.cos(), theta.sin()], -1)  # (views, 1, 2)
        beams = torch.stack([-theta.sin(), theta.cos()], -1)
        points = positions[:, None] * across
        super().__init__(image_shape, points, beams.expand_as(points), pixel_size)
        self.spacing = spacing
        self._register(degrees, positions, _shares(degrees, 180)[0][:, None])

    def _kernel(self, offset: Tensor) -> Tensor:
        return _ramp(offset, self.spacing) * self.spacing

    def _back(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self._pixels()
        s = x * theta.cos() + y * theta.sin()
        return s / self.spacing, torch.ones_like(s)


class FanBeamCT(CT):
    r"""Beams from a point source that turns around the image together with its detector.

    At the angle :math:`\theta` the source is at :math:`R\,(\sin\theta, -\cos\theta)`, below the image for 0; the central beam has the
    direction :math:`(-\sin\theta, \cos\theta)`, and detectors follow along :math:`(\cos\theta, \sin\theta)`, as for
    :class:`ParallelBeamCT`, which is the limit of a far source. A beam at the angle :math:`\gamma` from the central one is that of the
    parallel geometry at :math:`\theta - \gamma` and :math:`s = R \sin\gamma`. With the detector at the distance :math:`R'` behind the
    middle of the image, a detector at the position :math:`u` has :math:`\tan\gamma = u/(R + R')` where it is flat and
    :math:`\gamma = u/(R + R')` where it is an arc around the source. ``y`` is ``(B, C, views, detectors)``.

    Args:
        image_shape: ``(C, H, W)``.
        angles: the number of views, evenly over ``arc``, the first at 0, the end left out; or the angles themselves in degrees: a
            list, a tensor, or the path of a ``.npy`` file.
        source_distance: :math:`R`, from the source to the middle of the image; the source is outside of the circle around the image.
        detector_distance: :math:`R'`, from the middle of the image to the detector; 0 for one that is scaled to the middle.
        detectors: how many; by default as many as cover the circle around the image.
        pixel_size: side of a pixel.
        detector_spacing: distance of neighbouring detectors, along the detector; by default such that their beams are a pixel apart
            in the middle of the image.
        detector_shape: ``"flat"`` or ``"curved"``.
        arc: in degrees, with a number of views only; by default 360. A short scan, 180 plus the angle of the fan, sees each line at
            least once.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        angles: int | list[float] | str | Tensor,
        source_distance: float,
        detector_distance: float,
        detectors: int | None = None,
        pixel_size: float = 1.0,
        detector_spacing: float | None = None,
        detector_shape: Literal["flat", "curved"] = "flat",
        arc: float | None = None,
    ) -> None:
        degrees = _view_angles(angles, arc, 360)
        radius = _radius(image_shape, pixel_size)
        if not radius < source_distance < math.inf:
            raise ValueError(
                f"source_distance = {source_distance}; allowed is more than {radius:g}, half of the image's diagonal"
            )
        if not 0 <= detector_distance < math.inf:
            raise ValueError(f"detector_distance = {detector_distance}; allowed is a number of at least 0")
        if detector_shape not in ("flat", "curved"):
            raise ValueError(f"detector_shape = {detector_shape!r}; allowed are 'flat' and 'curved'")
        reach = source_distance + detector_distance
        if detector_spacing is None:
            detector_spacing = pixel_size * reach / source_distance
        spacing = _positive(detector_spacing, "detector_spacing")
        half_fan = math.asin(radius / source_distance)
        flat = detector_shape == "flat"
        positions = _detector_positions(detectors, spacing, 2 * reach * (math.tan(half_fan) if flat else half_fan))
        if not flat and float(positions[-1]) >= reach * math.pi / 2:
            raise ValueError(
                f"detectors = {len(positions)} reach around the source; allowed is a fan of under 180 degrees"
            )
        theta, fan = torch.deg2rad(degrees)[:, None], (positions / reach).atan() if flat else positions / reach
        source = source_distance * torch.stack([theta.sin(), -theta.cos()], -1)  # (views, 1, 2)
        beams = torch.stack([-(theta - fan).sin(), (theta - fan).cos()], -1)  # (views, detectors, 2)
        super().__init__(image_shape, source.expand_as(beams), beams, pixel_size)
        self.source_distance, self.flat = source_distance, flat
        # between detectors: the length of a flat one scaled to the middle of the image, the angle on a curved one
        self.step = spacing / reach * source_distance if flat else spacing / reach
        shares, past_start, reached = _shares(degrees, 360)
        weights = shares[:, None] * _redundancy(past_start[:, None], fan, half_fan, reached) * fan.cos()
        self._register(degrees, positions, weights if flat else source_distance * weights)

    def _kernel(self, offset: Tensor) -> Tensor:
        ramp = _ramp(offset, self.step) * self.step
        return ramp if self.flat else ramp / torch.sinc(offset * self.step / math.pi) ** 2

    def _back(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self._pixels()
        across = x * theta.cos() + y * theta.sin()
        depth = self.source_distance - x * theta.sin() + y * theta.cos()  # from the source, along the central beam
        if self.flat:
            return self.source_distance * across / depth / self.step, (self.source_distance / depth) ** 2
        return torch.atan2(across, depth) / self.step, 1 / (across**2 + depth**2)


def _shares(degrees: Tensor, period: float) -> tuple[Tensor, Tensor, float]:
    """How much angle each view stands for ``(views,)``, how far past the start of the arc it lies, and the arc; in radians.

    Args:
        degrees: of the views, ``(views,)``.
        period: degrees after which a view sees the same lines again; such views share their angle.
    """
    folded = degrees % period
    folded = torch.where(folded > period - 5e-7, folded - period, folded)
    _, inverse, times = torch.unique((folded * 1e6).round(), return_inverse=True, return_counts=True)
    views = torch.zeros(len(times), dtype=folded.dtype).scatter(0, inverse, folded)  # ascending
    gaps = torch.cat([views[1:], views[:1] + period]) - views  # after each view
    usual = gaps.median()
    missing = gaps > 3 * usual
    gaps_closed = torch.where(missing, usual, gaps)
    shares = (gaps_closed + gaps_closed.roll(1)) / 2
    first = views[(int(gaps.argmax()) + 1) % len(views)] if bool(missing.any()) else views[0]
    past_start = (views - first) % period + usual / 2
    arc = math.radians(float(gaps_closed.sum()))
    return torch.deg2rad(shares / times)[inverse], torch.deg2rad(past_start)[inverse], arc


def _redundancy(beta: Tensor, gamma: Tensor, half_fan: float, arc: float) -> Tensor:
    r"""Weights of a fan beam's lines such that those of a line that is measured twice add up to 1.

    The line of the view :math:`\beta` at the angle :math:`\gamma` comes again at :math:`\beta + \pi - 2\gamma` and
    :math:`-\gamma`. In a full turn both count one half. In a short scan the weights are Parker's (1982), which are smooth, with the
    fan's half angle replaced by that which the arc has room for. Where the arc is shorter still, and some lines are not measured at
    all, both count one half and others 1.

    Args:
        beta: angle of the views past the start of the arc, in radians, ``(views, 1)``.
        gamma: angle of the beams, in radians, ``(detectors,)``.
        half_fan: angle of the outermost beams that can meet the image, in radians.
        arc: reach of the views, in radians.

    Returns:
        ``(views, detectors)``.
    """
    gamma = gamma.clamp(-half_fan, half_fan)
    if arc > 2 * math.pi - 1e-6:
        return torch.full_like(beta + gamma, 0.5)
    if arc < math.pi + 2 * half_fan - 1e-6:
        twice = (beta + math.pi - 2 * gamma < arc) | (beta - math.pi - 2 * gamma > 0)
        return torch.where(twice, 0.5, 1.0).to(beta)
    half = (arc - math.pi) / 2
    rise = (beta / (half + gamma).clamp(min=1e-9)).clamp(0, 2)
    fall = ((arc - beta) / (half - gamma).clamp(min=1e-9)).clamp(0, 2)
    return (math.pi / 4 * torch.minimum(rise, fall)).sin() ** 2


def _ramp(offset: Tensor, spacing: float) -> Tensor:
    """The ramp filter, band-limited to the Nyquist frequency, at whole offsets (Kak and Slaney 1988, section 3.3, equation 61)."""
    odd = -1 / (math.pi * spacing * offset) ** 2
    ramp = torch.where(offset % 2 == 0, 0.0, odd)
    return torch.where(offset == 0, 1 / (4 * spacing**2), ramp)


def _view_angles(angles: int | list[float] | str | Tensor, arc: float | None, full: float) -> Tensor:
    """The views in degrees, ``(views,)`` in float64; by default over the ``full`` arc."""
    if isinstance(angles, int):
        arc = full if arc is None else arc
        if angles < 1:
            raise ValueError(
                f"angles = {angles}; allowed is a positive number of views, or a list of angles in degrees"
            )
        if not 0 < arc <= 360:
            raise ValueError(f"arc = {arc}; allowed are more than 0 and at most 360 degrees")
        return arc / angles * torch.arange(angles, dtype=torch.float64)
    degrees = array_argument(angles, "angles").cpu()
    if degrees.ndim != 1 or len(degrees) == 0:
        raise ValueError(f"angles has shape {tuple(degrees.shape)}; allowed is a list of at least one angle in degrees")
    if arc is not None:
        raise ValueError(f"arc = {arc} goes with a number of views, and angles is a list; give one of them")
    return degrees


def _detector_positions(detectors: int | None, spacing: float, width: float) -> Tensor:
    """Positions from the middle; by default as many as cover the width."""
    if detectors is None:
        detectors = math.ceil(width / spacing)
    if detectors < 1:
        raise ValueError(f"detectors = {detectors}; allowed is a positive whole number")
    return (torch.arange(detectors, dtype=torch.float64) - (detectors - 1) / 2) * spacing


def _radius(image_shape: tuple[int, int, int], pixel_size: float) -> float:
    """Of the circle around the image."""
    _, h, w = check_image_shape(image_shape)
    return math.hypot(h, w) / 2 * _positive(pixel_size, "pixel_size")


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value}; allowed is a positive number")
    return value
