"""Ptychography: diffraction patterns of overlapping parts of the image.

Rodenburg and Faulkner 2004, Appl. Phys. Lett. 85, 4795.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator, check_image_shape


class Ptychography(Operator):
    r""":math:`y_j = |F(p \odot u_j)|`, Fourier magnitudes of the image under a probe at scan positions :math:`j`.

    :math:`u = (x - \text{low})/(\text{high} - \text{low})` is the physical intensity, :math:`u_j` its square of
    ``probe_size`` pixels at position :math:`j`, :math:`p` the known, real probe, and :math:`F` the orthonormal 2-D
    transform of that size. Positions are ``step`` pixels apart in both directions, the last one of each at the
    image's border. The probe is, at the distance :math:`\rho` from the middle of its square,

    - ``"gaussian"``: :math:`e^{-\rho^2 / (2 s^2)}` with :math:`s = \text{probe_size}/4`;
    - ``"disk"``: 1 for :math:`\rho \le \text{probe_size}/2`, else 0. It may leave pixels in the dark; see
      :attr:`unseen`.

    ``y`` is real, ``(B, positions, C, probe_size, probe_size)``, positions row by row, the frequency 0 at the corner.
    Where a magnitude is 0 its gradient is taken as 0.

    Args:
        image_shape: ``(C, H, W)``.
        probe_size: side of the probe's square, in pixels.
        step: of the scan, in pixels; under ``probe_size``, so that neighbours overlap.
        probe: ``"gaussian"`` or ``"disk"``.
        value_range: ``(low, high)`` of ``x``, dark and bright.

    Raises:
        ValueError: the probe does not fit into the image, ``step`` leaves no overlap, ``probe`` is another word, or
            ``value_range`` is empty.
    """

    probe: Tensor  # (probe_size, probe_size)
    rows: Tensor  # (vertical positions, probe_size), image rows under the probe
    columns: Tensor  # (horizontal positions, probe_size)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        probe_size: int,
        step: int,
        probe: Literal["gaussian", "disk"] = "gaussian",
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        _, h, w = self.image_shape
        if not 2 <= probe_size <= min(h, w):
            raise ValueError(f"probe_size = {probe_size}; allowed are 2 to min(H, W) = {min(h, w)} pixels")
        if not 1 <= step < probe_size:
            raise ValueError(f"step = {step}; allowed are 1 to probe_size - 1 = {probe_size - 1} pixels")
        if probe not in ("gaussian", "disk"):
            raise ValueError(f"probe = {probe!r}; allowed are 'gaussian' and 'disk'")
        self.low, self.high = value_range
        if not self.low < self.high:
            raise ValueError(f"value_range = {value_range}; allowed is (low, high) with low < high")
        offsets = torch.arange(probe_size, dtype=torch.float64) - (probe_size - 1) / 2
        square = offsets[:, None] ** 2 + offsets**2
        disk, gaussian = square <= (probe_size / 2) ** 2, torch.exp(-square / (2 * (probe_size / 4) ** 2))
        self.register_buffer("probe", gaussian if probe == "gaussian" else disk.double())
        for name, n in (("rows", h), ("columns", w)):
            starts = sorted({*range(0, n - probe_size + 1, step), n - probe_size})
            self.register_buffer(name, torch.tensor(starts)[:, None] + torch.arange(probe_size))

    def forward(self, x: Tensor) -> Tensor:
        """Magnitudes ``(B, positions, C, probe_size, probe_size)`` of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        u = (x - self.low) / (self.high - self.low)
        squares = u[:, :, self.rows][..., self.columns]  # (B, C, vertical, p, horizontal, p)
        squares = squares.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        spectrum: Tensor = torch.fft.fft2(self.probe.to(x.dtype) * squares, norm="ortho")
        return spectrum.abs()

    @property
    def unseen(self) -> Tensor | None:
        """Pixels that no position of the probe lights, ``(1, H, W)``; None if there are none."""
        lit = self.probe.new_zeros(int(self.rows.max()) + 1, int(self.columns.max()) + 1)
        for rows in self.rows:
            for columns in self.columns:
                lit[rows[:, None], columns] += self.probe
        return (lit == 0)[None] if bool((lit == 0).any()) else None

    def display(self, y: Tensor) -> Tensor:
        """``log(1 + |y|)`` of all positions, laid out as they were scanned, scaled to [-1, 1].

        Each pattern has its frequency 0 in the middle; the picture is ``(C, vertical·p, horizontal·p)``.
        """
        picture: Tensor = torch.fft.fftshift(torch.log1p(y.abs()), dim=(-2, -1))
        picture = picture.reshape(self.rows.shape[0], self.columns.shape[0], *picture.shape[1:])
        picture = picture.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        low, high = picture.aminmax()
        return 2 * (picture - low) / (high - low).clamp_min(torch.finfo(picture.dtype).tiny) - 1
