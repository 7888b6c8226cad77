r"""Circular convolution, diagonal in the discrete Fourier basis: :math:`A = F^* \mathrm{diag}(\hat k) F`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator, array_argument, check_image_shape


class CircularConvolution(LinearOperator):
    r""":math:`y = k * x` on the torus, the same kernel for every channel; ``y`` has the image's shape.

    .. math:: y_{ij} = \sum_{ab} k_{ab}\, x_{(i - a + k_h // 2) \bmod H,\ (j - b + k_w // 2) \bmod W}

    Args:
        kernel: ``(kh, kw)``, or the path of a ``.npy`` file. Its centre is at ``(kh // 2, kw // 2)``. It may
            be larger than the image; it is then wrapped around and summed. It is used as it is, not
            normalised.
        image_shape: ``(C, H, W)``; ``H`` and ``W`` may be odd.

    Raises:
        ValueError: ``kernel`` is not two-dimensional, or an entry is not finite.
    """

    torus_kernel: Tensor  # (H, W), its centre at (0, 0)

    def __init__(self, kernel: Tensor | list[list[float]] | str, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape)
        values = array_argument(kernel, "kernel")
        if values.ndim != 2 or values.numel() == 0:
            raise ValueError(f"kernel has shape {tuple(values.shape)}; allowed is (kh, kw)")
        _, h, w = self._known_image_shape("__init__")
        kh, kw = values.shape
        rows = (torch.arange(kh) - kh // 2) % h
        columns = (torch.arange(kw) - kw // 2) % w
        torus_kernel = torch.zeros(h, w, dtype=torch.float64)
        torus_kernel.index_put_((rows[:, None], columns[None, :]), values.cpu(), accumulate=True)
        self.register_buffer("torus_kernel", torus_kernel)

    def _k_hat(self, dtype: torch.dtype) -> Tensor:
        """Eigenvalues ``(H, W//2 + 1)``; a complex buffer of them would not survive ``.to(float32)``."""
        k_hat: Tensor = torch.fft.rfft2(self.torus_kernel.to(dtype))
        return k_hat

    def _filter(self, multiplier: Tensor, x: Tensor) -> Tensor:
        self._check_image(x)
        filtered: Tensor = torch.fft.irfft2(multiplier * torch.fft.rfft2(x), s=x.shape[-2:])
        return filtered

    def forward(self, x: Tensor) -> Tensor:
        """``k * x``, ``(B, C, H, W)``."""
        return self._filter(self._k_hat(x.dtype), x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Convolution with the mirrored kernel, ``(B, C, H, W)``."""
        return self._filter(self._k_hat(y.dtype).conj(), y)

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r""":math:`F^* f(|\hat k|^2) F x`."""
        k_hat = self._k_hat(x.dtype)
        return self._filter(f(k_hat.real**2 + k_hat.imag**2), x)

    def norm(self) -> float:
        r""":math:`\max |\hat k|`."""
        return float(self._k_hat(self.torus_kernel.dtype).abs().max())

    def display(self, y: Tensor) -> Tensor:
        """The measurement is an image already."""
        return y


class GaussianBlur(CircularConvolution):
    """Circular convolution with a Gaussian of sum 1, sampled at the pixels of the torus.

    Args:
        image_shape: ``(C, H, W)``.
        sigma: standard deviation of the kernel, in pixels.

    Raises:
        ValueError: ``sigma`` is not positive and finite.
    """

    def __init__(self, image_shape: tuple[int, int, int], sigma: float) -> None:
        if not 0 < sigma < math.inf:
            raise ValueError(f"sigma = {sigma}; allowed is a positive number of pixels")
        _, h, w = check_image_shape(image_shape)
        super().__init__(torch.outer(_wrapped_gaussian(h, sigma), _wrapped_gaussian(w, sigma)), image_shape)
        self.sigma = sigma


class KernelBlur(CircularConvolution):
    """Circular convolution with a blur kernel: not negative, and divided by its sum.

    A :class:`CircularConvolution` takes any kernel and uses it as it is.

    Args:
        image_shape: ``(C, H, W)``.
        kernel: ``(kh, kw)``, its centre at ``(kh // 2, kw // 2)``: a tensor, nested lists, or the path of a
            ``.npy`` file.

    Raises:
        ValueError: ``kernel`` is not two-dimensional, or it has an entry that is negative or not finite, or its sum is 0.
    """

    def __init__(self, image_shape: tuple[int, int, int], kernel: Tensor | list[list[float]] | str) -> None:
        values = array_argument(kernel, "kernel")
        if values.numel() and not (float(values.min()) >= 0 and float(values.sum()) > 0):
            raise ValueError(
                f"kernel has the smallest entry {float(values.min())} and the sum {float(values.sum())}; "
                "allowed are entries that are not negative, with a positive sum"
            )
        super().__init__(values / values.sum(), image_shape)


class MotionBlur(CircularConvolution):
    r"""Circular blur by a straight motion at constant speed, of sum 1.

    .. math:: k_{ab} = \frac1L \int_{-L/2}^{L/2} \Lambda(a + t \sin\theta)\, \Lambda(b - t \cos\theta)\, dt

    with :math:`\Lambda(s) = \max(0, 1 - |s|)`, so that a point between pixels is shared among its four
    neighbours as in bilinear interpolation. The integral is exact.

    Args:
        image_shape: ``(C, H, W)``.
        length: :math:`L` of the path, in pixels.
        angle: :math:`\theta` in degrees, from the horizontal, counterclockwise as the image is seen (rows
            count downwards).

    Raises:
        ValueError: ``length`` is not positive and finite, or ``angle`` is not finite.
    """

    def __init__(self, image_shape: tuple[int, int, int], length: float, angle: float) -> None:
        if not 0 < length < math.inf:
            raise ValueError(f"length = {length}; allowed is a positive number of pixels")
        if not math.isfinite(angle):
            raise ValueError(f"angle = {angle}; allowed is a finite number of degrees")
        super().__init__(_motion_kernel(length, angle), image_shape)
        self.length, self.angle = length, angle


def _motion_kernel(length: float, angle: float) -> Tensor:
    """Kernel of :class:`MotionBlur`, ``(n, n)`` with odd ``n``.

    Between the path's crossings of pixel rows and columns the integrand is a quadratic in ``t``, where
    Simpson's rule is exact.
    """
    half = length / 2
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    reach = math.ceil(half)
    lines = torch.arange(-reach, reach + 1, dtype=torch.float64)
    crossings = [lines / slope for slope in (sine, cosine) if abs(slope) * half >= 1e-12]
    ends = torch.tensor([-half, 0.0, half], dtype=torch.float64)
    t = torch.cat([*crossings, ends]).clamp(-half, half).sort().values
    width = t.diff() / length
    middle = (t[1:] + t[:-1]) / 2
    t = torch.cat([t[:-1], middle, t[1:]])
    weights = torch.cat([width, 4 * width, width]) / 6
    pixels = torch.arange(-reach, reach + 1, dtype=torch.float64)
    rows = (1 - (pixels[:, None] + t * sine).abs()).clamp_min(0)  # (n, nodes)
    columns = (1 - (pixels[:, None] - t * cosine).abs()).clamp_min(0)
    return (rows * weights) @ columns.T


def _wrapped_gaussian(n: int, sigma: float) -> Tensor:
    """Gaussian on a circle of ``n`` pixels, ``(n,)``, centred at ``n // 2``, of sum 1."""
    turns = math.ceil(10 * sigma / n) + 1
    offsets = torch.arange(n, dtype=torch.float64) - n // 2
    wraps = n * torch.arange(-turns, turns + 1, dtype=torch.float64)
    values = torch.exp(-((offsets[:, None] + wraps) ** 2) / (2 * sigma**2)).sum(1)
    return values / values.sum()
