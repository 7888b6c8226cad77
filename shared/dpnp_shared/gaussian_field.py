r"""Gaussian random fields on the unit square whose covariance is trace-class and diagonal in cosines or waves.

.. math:: x = \sum_k \sqrt{\lambda_k}\, \xi_k\, \varphi_k, \qquad \xi_k \sim N(0, 1), \qquad
          \lambda_k \propto (\ell^{-2} + |\omega_k|^2)^{-s}, \qquad \sum_k \lambda_k = \text{std}^2

is a draw from :math:`N(0, C)`, :math:`C \propto (-\Delta + \ell^{-2})^{-s}` (the Whittle-Matérn covariance; Lindgren, Rue & Lindström
2011). The :math:`\varphi_k` are orthonormal in :math:`L^2([0, 1]^2)`:

- ``neumann``: products of :math:`\cos(\pi k u)`, no flow through the boundary. Pixels are cells: pixel i is at :math:`(i + 1/2)/n`.
- ``periodic``: :math:`\cos + \sin` of :math:`2\pi k \cdot u`, the Hartley basis. Pixel i is at :math:`i/n`.

An image is such a function's values. A grid of n pixels along a side holds n modes along that side, and only what is above them differs
from the function on a finer grid: eigenvalues are those of the continuum, not of the grid. As a matrix on pixel values the covariance is
:math:`\Sigma = N T^\top \mathrm{diag}(\lambda)\, T` with the orthogonal transform T and N pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Basis = Literal["neumann", "periodic"]
SHORT = 128  # sides up to it are transformed by a matrix


class GaussianField(nn.Module):
    r"""The law :math:`N(0, C)` of a random function on the unit square, on any grid of it.

    Args:
        std: square root of the variance at a point, averaged over the square, in image units.
        length: correlation length ℓ, as a part of the square's side.
        smoothness: s; above 1, so that C is trace-class. Draws have almost ``s - 1`` derivatives.
        basis: ``neumann`` or ``periodic``, see above.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self, std: float = 1.0, length: float = 0.25, smoothness: float = 2.0, basis: Basis = "neumann"
    ) -> None:
        super().__init__()
        for name, value in (("std", std), ("length", length)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}; it must be positive and finite")
        if not 1 < smoothness < math.inf:
            raise ValueError(
                f"smoothness = {smoothness}; it must be above 1 and finite: in two dimensions the covariance is trace-class only then"
            )
        check_basis(basis)
        self.std, self.length, self.smoothness, self.basis = std, length, smoothness, basis
        self.hyperparameters: dict[str, Any] = {
            "std": std,
            "length": length,
            "smoothness": smoothness,
            "basis": basis,
        }
        self._scale = std**2 / self._trace()
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def extra_repr(self) -> str:
        """The arguments."""
        return ", ".join(f"{key}={value!r}" for key, value in self.hyperparameters.items())

    def eigenvalues(self, grid: tuple[int, int]) -> Tensor:
        r""":math:`\lambda_k` of the modes that a grid ``(H, W)`` holds, ``(H, W)`` in float64, in the order of :meth:`coefficients`."""
        return self._modes(grid)[0]

    def coefficients(self, x: Tensor) -> Tensor:
        r"""Coefficients :math:`\langle x, \varphi_k\rangle` of images ``(…, H, W)``, of that shape: lowest modes first (FFT order)."""
        return forward_transform(x, self.basis) / math.sqrt(x.shape[-2] * x.shape[-1])

    def function(self, coefficients: Tensor) -> Tensor:
        r"""The inverse of :meth:`coefficients`: :math:`\sum_k c_k \varphi_k` on the grid ``(…, H, W)``."""
        root = math.sqrt(coefficients.shape[-2] * coefficients.shape[-1])
        return root * inverse_transform(coefficients, self.basis)

    def filter(self, x: Tensor, multiplier: Tensor) -> Tensor:
        """Multiply the coefficients of ``x`` ``(…, H, W)`` by ``multiplier``, which broadcasts against them."""
        return inverse_transform(multiplier * forward_transform(x, self.basis), self.basis)

    def covariance(self, x: Tensor) -> Tensor:
        r""":math:`\Sigma x` for ``x`` ``(…, H, W)``: of the gradient of Φ in pixel values it is :math:`C \nabla \Phi`."""
        grid = (x.shape[-2], x.shape[-1])
        return self.filter(x, grid[0] * grid[1] * self.eigenvalues(grid).to(x))

    def colour(self, w: Tensor) -> Tensor:
        r"""A draw from :math:`N(0, C)` out of white noise.

        The numbers of ``w`` are the :math:`\xi_k`, lowest modes first, so that the first ``n²·C`` of them give on a grid of ``n x n`` the
        same function as on a finer one, less what the coarse grid cannot hold.

        Args:
            w: ``(B, C, H, W)``, standard normal; a function for each image and channel.

        Returns:
            ``(B, C, H, W)``, in image units.
        """
        b, c, h, w_ = w.shape
        values, place = self._modes((h, w_))
        xi = w.reshape(b, h * w_, c).transpose(1, 2)[:, :, place.to(w.device)].reshape(w.shape)
        return self.function(values.sqrt().to(w) * xi)

    def sample(
        self,
        n: int,
        grid: tuple[int, int],
        *,
        generator: torch.Generator,
        channels: int = 1,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw functions on a grid; the same generator gives the same functions on all square grids (see :meth:`colour`).

        Args:
            n: how many.
            grid: ``(H, W)``.
            generator: its seed counts, one stream a function; it is moved by one number.
            channels: independent functions an image.
            dtype: of the images, by default PyTorch's.

        Returns:
            ``(n, channels, H, W)``, in image units.
        """
        dtype = dtype or torch.get_default_dtype()
        seeds = torch.randint(2**62, (n,), generator=generator, device=generator.device).tolist()
        stream = torch.Generator(generator.device)
        size = (channels, *grid)
        numbers = [
            torch.randn(math.prod(size), generator=stream.manual_seed(seed), dtype=dtype, device=stream.device)
            for seed in seeds
        ]
        return self.colour(torch.stack(numbers).reshape(n, *size))

    def resample(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The same function on another grid, by its modes: those above a coarser grid's are left off.

        Args:
            x: ``(…, H, W)``.
            grid: ``(H', W')``.

        Returns:
            ``(…, H', W')``.
        """
        old = (x.shape[-2], x.shape[-1])
        c = self.coefficients(x)
        new = c.new_zeros((*x.shape[:-2], *grid))
        rows, columns = (_shared_modes(n, m, self.basis) for n, m in zip(old, grid, strict=True))
        new[..., rows[1][:, None], columns[1]] = c[..., rows[0][:, None], columns[0]]
        return self.function(new)

    def _modes(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``(H, W)``, and for each mode of the flattened grid the number that drives it."""
        if grid not in self._kept:
            k1, k2 = (wave_numbers(n, self.basis) for n in grid)
            step = math.pi if self.basis == "neumann" else 2 * math.pi
            square = step**2 * (k1[:, None] ** 2 + k2**2)
            values = self._scale * (self.length**-2 + square.double()) ** -self.smoothness
            # shells: the modes of a grid of n x n come before all others of a finer one
            s1, s2 = (torch.where(k < 0, -k - 1, k) for k in (k1, k2))
            top = 2 * max(grid)
            shell = torch.maximum(s1[:, None], s2)
            key = (shell * top + k1[:, None] + top // 2) * top + k2 + top // 2
            place = torch.argsort(torch.argsort(key.flatten()))
            self._kept[grid] = values, place
        return self._kept[grid]

    def _trace(self) -> float:
        r""":math:`\sum_k (\ell^{-2} + |\omega_k|^2)^{-s}`, the modes above the 600th by an integral."""
        most = 600
        step = math.pi if self.basis == "neumann" else 2 * math.pi
        k = torch.arange(most, dtype=torch.float64)
        square = step**2 * (k[:, None] ** 2 + k**2)
        count = (1.0 + (k > 0)) if self.basis == "periodic" else torch.ones_like(k)
        radius = step * (most - 0.5)
        inside = square < radius**2
        total = float((count[:, None] * count * inside * (self.length**-2 + square) ** -self.smoothness).sum())
        tail = (self.length**-2 + radius**2) ** (1 - self.smoothness) / (4 * math.pi * (self.smoothness - 1))
        return total + float(tail)


def check_basis(basis: str) -> None:
    """Refuse an unknown basis.

    Raises:
        ValueError: names the value.
    """
    if basis not in get_args(Basis):
        raise ValueError(f"basis = {basis!r}; allowed are {', '.join(get_args(Basis))}")


def positions(n: int, basis: Basis) -> Tensor:
    """Where the n pixels of a side are, in [0, 1], ``(n,)`` in float64."""
    return (torch.arange(n, dtype=torch.float64) + (0.5 if basis == "neumann" else 0.0)) / n


def wave_numbers(n: int, basis: Basis) -> Tensor:
    """Integer wave number of each coefficient along a side, ``(n,)``."""
    k = torch.arange(n)
    return k if basis == "neumann" else torch.where(k < (n + 1) // 2, k, k - n)


def forward_transform(x: Tensor, basis: Basis) -> Tensor:
    """The orthogonal transform of the last two dimensions: cosine (DCT-II) or Hartley."""
    return _dct(_dct(x).mT).mT if basis == "neumann" else _hartley(x)


def inverse_transform(c: Tensor, basis: Basis) -> Tensor:
    """The inverse of :func:`forward_transform`, which is its transpose."""
    return _idct(_idct(c).mT).mT if basis == "neumann" else _hartley(c)


def _hartley(x: Tensor) -> Tensor:
    """Its own inverse."""
    f: Tensor = torch.fft.fft2(x, norm="ortho")
    return f.real - f.imag


@lru_cache(maxsize=64)
def cosines(n: int, modes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The lowest cosines on n pixels of a side, orthonormal there, ``(modes, n)``: the first rows of the DCT-II's matrix."""
    k = torch.arange(modes, dtype=torch.float64)
    c = math.sqrt(2 / n) * torch.cos(math.pi * k[:, None] * positions(n, "neumann"))
    c[0] /= math.sqrt(2)
    return c.to(dtype=dtype, device=device)


def _dct(x: Tensor) -> Tensor:
    """Orthogonal DCT-II of the last dimension, a product of matrices where that is faster, else by one FFT (Makhoul 1980)."""
    n = x.shape[-1]
    if n <= SHORT:
        short: Tensor = x @ cosines(n, n, x.dtype, x.device).T
        return short
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    turned: Tensor = torch.fft.fft(v) * _phase(n, x)
    return turned.real * _dct_scale(n, x)


def _idct(c: Tensor) -> Tensor:
    """The inverse of :func:`_dct`."""
    n = c.shape[-1]
    if n <= SHORT:
        short: Tensor = c @ cosines(n, n, c.dtype, c.device)
        return short
    y = c / _dct_scale(n, c)
    reverse = torch.cat([torch.zeros_like(y[..., :1]), y[..., 1:].flip(-1)], dim=-1)
    v: Tensor = torch.fft.ifft(torch.complex(y, -reverse) * _phase(n, c).conj()).real
    half = (n + 1) // 2
    x = torch.empty_like(v)
    x[..., ::2], x[..., 1::2] = v[..., :half], v[..., half:].flip(-1)
    return x


def _phase(n: int, like: Tensor) -> Tensor:
    angle = -math.pi / (2 * n) * torch.arange(n, dtype=like.dtype, device=like.device)
    return torch.polar(torch.ones_like(angle), angle)


def _dct_scale(n: int, like: Tensor) -> Tensor:
    scale = torch.full((n,), math.sqrt(2 / n), dtype=like.dtype, device=like.device)
    scale[0] = math.sqrt(1 / n)
    return scale


def _shared_modes(old: int, new: int, basis: Basis) -> tuple[Tensor, Tensor]:
    """Places, among the modes along a side of two grids, of those that both hold."""
    k = wave_numbers(min(old, new), basis)
    return k % old, k % new
