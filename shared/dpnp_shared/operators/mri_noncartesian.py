r"""Magnetic resonance imaging along any trajectory in k-space, with one or several receive coils.

Pruessmann, Weiger, Börnert and Boesiger 2001, Magn. Reson. Med. 46, 638. The non-uniform Fourier transforms are those of
FINUFFT (Barnett, Magland and af Klinteberg 2019, SIAM J. Sci. Comput. 41, C479).
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from dpnp_shared.operators.base import array_argument, check_image_shape
from dpnp_shared.operators.coils import CoilOperator
from dpnp_shared.operators.mri_masks import GOLDEN_ANGLE

PRECISION = {torch.complex64: 1e-6, torch.complex128: 1e-12}  # relative error asked of the transforms


class NonCartesianMRI(CoilOperator):
    r"""Samples of each coil's Fourier transform at arbitrary points :math:`k_j` of k-space.

    .. math:: y_{cj} = \frac{1}{\sqrt{HW}} \sum_{r} S_c(r)\, u(r)\, e^{-2\pi i\, (k_{j1} r_1/H + k_{j2} r_2/W)}

    over the pixels :math:`r`, counted from the pixel ``(H // 2, W // 2)``: at whole numbers :math:`k_j` these are the
    entries of the centred orthonormal transform of :class:`~dpnp_shared.operators.MRI`. ``y`` is complex, ``(B, coils,
    n)``. See :class:`~dpnp_shared.operators.coils.CoilOperator` for real and complex images and for the coils.

    The sums are computed to a relative error of about 1e-6 for float32 images (some 1e-5 for hundreds of pixels a side,
    where the points' own rounding counts) and 1e-12 for float64; the adjoint is that of what is computed, up to rounding.
    They are computed on the CPU, whatever the device of the images.

    Args:
        image_shape: ``(C, H, W)``; one channel is a real image, two are its real and imaginary parts.
        trajectory: the points, vertical frequency first, in cycles per field of view, that is between :math:`\mp H/2` and
            :math:`\mp W/2` (cycles per pixel times ``H`` and ``W``; radians per pixel times :math:`H/2\pi` and
            :math:`W/2\pi`): ``(n, 2)``, or ``(spokes, readout, 2)`` and the like, which are taken as one list. A tensor,
            lists, or the path of a ``.npy`` file.
        coils: 1, a number of simulated coils, or coil maps ``(coils, H, W)``.
        normalise: make the coil maps' sum of squares 1.

    Raises:
        ImportError: the package finufft is missing.
        ValueError: an argument has another shape or range.
    """

    trajectory: Tensor  # (n, 2), in cycles per field of view

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        trajectory: str | list[list[float]] | Tensor,
        coils: int | str | list[list[list[float]]] | Tensor = 1,
        normalise: bool = True,
    ) -> None:
        super().__init__(image_shape, coils, normalise)
        _finufft()
        _, h, w = self._known_image_shape("__init__")
        points = array_argument(trajectory, "trajectory")
        if points.ndim < 2 or points.shape[-1] != 2 or points.numel() == 0:
            raise ValueError(f"trajectory has shape {tuple(points.shape)}; allowed are (n, 2) and (…, n, 2)")
        points = points.flatten(0, -2)
        for i, (name, n) in enumerate((("vertical", h), ("horizontal", w))):
            furthest = float(points[:, i].abs().max())
            if furthest > n / 2 * (1 + 1e-6):
                raise ValueError(
                    f"trajectory has a {name} frequency of {furthest:g} cycles per field of view; allowed are at most "
                    f"half of the {n} pixels, {n / 2:g}"
                )
        self.register_buffer("trajectory", points)

    def encode(self, images: Tensor) -> Tensor:
        """Samples ``(B, coils, n)`` of the coils' complex images ``(B, coils, H, W)``."""
        _, h, w = self._known_image_shape("forward")
        y: Tensor = _NonUniform.apply(images.flatten(0, 1), self.trajectory, (h, w), False)
        return y.reshape(*images.shape[:2], -1)

    def encode_adjoint(self, y: Tensor) -> Tensor:
        """Coil images ``(B, coils, H, W)`` of samples ``(B, coils, n)``, without density compensation."""
        _, h, w = self._known_image_shape("adjoint")
        images: Tensor = _NonUniform.apply(y.flatten(0, 1), self.trajectory, (h, w), True)
        return images.reshape(*y.shape[:2], h, w)

    def as_measurement(self, stored: Tensor) -> Tensor:
        """Samples ``(coils, n)``, of a file that may hold them as ``(coils, spokes, readout)`` and, for one coil, without it.

        Raises:
            TypeError: they are real.
            ValueError: their number is another one.
        """
        n = len(self.trajectory)
        if self.coils == 1 and stored.numel() == n:
            stored = stored.reshape(1, n)
        allowed = f"({self.coils}, {n}) and ({self.coils}, …) with {n} samples a coil"
        self._check_stored(stored, allowed)
        if stored[0].numel() != n:
            raise ValueError(f"k-space data has shape {tuple(stored.shape)}; allowed are {allowed}")
        return stored.flatten(1)

    @torch.no_grad()
    def density_compensation(self, iterations: int = 20) -> Tensor:
        r"""The area of k-space that each sample stands for, in squared cycles per field of view.

        By the fixed point :math:`w_j \leftarrow w_j / \sum_i K(k_j - k_i) w_i` of Pipe and Menon 1999 (Magn. Reson. Med.
        41, 179) with :math:`K(k) = \mathrm{sinc}^2(k_1)\, \mathrm{sinc}^2(k_2)`, the transform of a pyramid over twice the
        field of view. Samples without neighbours get 1, as on the Cartesian grid.

        Args:
            iterations: how many.

        Returns:
            ``(n,)``, float64.
        """
        _, h, w = self._known_image_shape("density_compensation")
        rows, columns = (1 - (torch.arange(2 * n, dtype=torch.float64) - n).abs() / n for n in (h, w))
        pyramid, points = rows[:, None] * columns, 2 * self.trajectory.double().cpu()
        weights = torch.ones(1, len(points), dtype=torch.complex128)
        for _ in range(iterations):
            image = _NonUniform.apply(weights, points, (2 * h, 2 * w), True)
            around = 4 * _NonUniform.apply(pyramid * image, points, (2 * h, 2 * w), False).real
            weights = weights / around
        area: Tensor = weights[0].real
        return area

    def display(self, y: Tensor) -> Tensor:
        """The gridding reconstruction, with density compensation, combined over the coils, ``(C, H, W)``."""
        y = y.to(self.trajectory.device)
        weights = self.density_compensation().to(y.real)
        return self._combine(self.encode_adjoint((weights * y)[None])[0])


class RadialMRI(NonCartesianMRI):
    r"""Spokes through the middle of k-space.

    Spoke :math:`j` runs along the angle :math:`\theta_j` from the horizontal, :math:`\theta_j = j\,\pi(\sqrt5 - 1)/2` (the
    golden angle of 111.25 degrees; Winkelmann et al. 2007, IEEE Trans. Med. Imaging 26, 68) or :math:`\theta_j = j\pi/`
    spokes. Its samples lie at :math:`(i - R // 2)/R` cycles per pixel, :math:`i = 0, \dots, R - 1`, up to half the sampling
    rate of the pixels. ``y`` is ``(B, coils, spokes · readout)``, spoke by spoke.

    Args:
        image_shape: ``(C, H, W)``; one channel is a real image, two are its real and imaginary parts.
        spokes: how many.
        readout: samples R of a spoke; by default twice the longer side, the usual oversampling of 2.
        angles: ``"golden"`` or ``"uniform"``.
        coils: 1, a number of simulated coils, or coil maps ``(coils, H, W)``.
        normalise: make the coil maps' sum of squares 1.

    Raises:
        ImportError: the package finufft is missing.
        ValueError: an argument has another shape or range.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        spokes: int,
        readout: int | None = None,
        angles: Literal["golden", "uniform"] = "golden",
        coils: int | str | list[list[list[float]]] | Tensor = 1,
        normalise: bool = True,
    ) -> None:
        _, h, w = check_image_shape(image_shape)
        if spokes < 1:
            raise ValueError(f"spokes = {spokes}; allowed is a positive whole number")
        if readout is not None and readout < 2:
            raise ValueError(f"readout = {readout}; allowed are whole numbers of at least 2")
        if angles not in ("golden", "uniform"):
            raise ValueError(f"angles = {angles!r}; allowed are 'golden' and 'uniform'")
        R = 2 * max(h, w) if readout is None else readout
        theta = torch.arange(spokes, dtype=torch.float64) * (GOLDEN_ANGLE if angles == "golden" else math.pi / spokes)
        radius = (torch.arange(R, dtype=torch.float64) - R // 2) / R  # cycles per pixel
        rows, columns = h * torch.outer(theta.sin(), radius), w * torch.outer(theta.cos(), radius)
        super().__init__(image_shape, torch.stack([rows, columns], dim=-1), coils, normalise)


class _NonUniform(torch.autograd.Function):
    """The orthonormally scaled transform of images ``(B, H, W)`` to ``(B, n)``, or its adjoint; linear, so each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, points: Tensor, shape: tuple[int, int], adjoint: bool) -> Tensor:
        ctx.save_for_backward(points)
        ctx.shape, ctx.adjoint = shape, adjoint
        finufft, (h, w) = _finufft(), shape
        rows, columns = (
            (2 * math.pi / n * points[:, i]).to(device="cpu", dtype=values.real.dtype).contiguous().numpy()
            for i, n in enumerate(shape)
        )
        array = values.detach().resolve_conj().cpu().contiguous().numpy()
        eps = PRECISION[values.dtype]
        if adjoint:
            result = finufft.nufft2d1(rows, columns, array, shape, eps=eps, isign=1)
        else:
            result = finufft.nufft2d2(rows, columns, array, eps=eps, isign=-1)
        transformed = torch.from_numpy(result).reshape(len(values), *(shape if adjoint else (len(points),)))
        return (transformed / math.sqrt(h * w)).to(values.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (points,) = ctx.saved_tensors
        return _NonUniform.apply(gradient, points, ctx.shape, not ctx.adjoint), None, None, None


def _finufft() -> ModuleType:
    """The package finufft, which is an optional one.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module("finufft")
    except ImportError as error:
        raise ImportError(
            "NonCartesianMRI and RadialMRI need the package finufft; install it with pip install 'dpnp-imaging[mri]'"
        ) from error
