r"""Magnetic resonance imaging on a Cartesian grid, with one or several receive coils.

Pruessmann, Weiger, Scheidegger and Boesiger 1999, Magn. Reson. Med. 42, 952 (SENSE).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dpnp_shared.operators.base import array_argument
from dpnp_shared.operators.coils import CoilOperator
from dpnp_shared.operators.mri_masks import PATTERNS, draw_mask


class MRI(CoilOperator):
    r""":math:`y_c = M F (S_c \odot u)`: the sampled part of each coil's k-space.

    :math:`F` is the orthonormal, centred 2-D transform that sigpy, BART and fastMRI use: image and k-space have their
    origins at ``(H // 2, W // 2)``. :math:`M` keeps the samples of the mask, row by row, so that only what was measured
    carries noise and enters the likelihood: ``y`` is complex, ``(B, coils, samples)``. :meth:`sample` makes it from
    full or zero-filled k-space ``(coils, H, W)``, which a ``measurement`` file may hold as well, and :meth:`zero_filled`
    goes back. See :class:`~dpnp_shared.operators.coils.CoilOperator` for real and complex images and for the coils.

    Noise of standard deviation :math:`\sigma` in the real and in the imaginary part of each sample is
    ``GaussianNoise(sigma)``; one number a coil is given as ``(coils, 1)``. Noise that is correlated between coils has to be
    whitened first, data and maps alike.

    Functions of :math:`A^T A` have a closed form for one coil of uniform sensitivity: it is diagonal in Fourier space
    with the mask :math:`m(k)` as eigenvalues, or :math:`(m(k) + m(-k))/2` on real images, whose transform at
    :math:`-k` is the conjugate of that at :math:`k`.

    Args:
        image_shape: ``(C, H, W)``; one channel is a real image, two are its real and imaginary parts.
        mask: a pattern to draw, of those in :func:`~dpnp_shared.operators.mri_masks.draw_mask`: ``"equispaced"`` and
            ``"random"`` columns, ``"poisson_disc"`` or ``"radial_lines"``; or the mask itself, whose non-zero entries are
            sampled: ``(H, W)``, ``(W,)`` for columns, or ``(coils, H, W)``, where an entry is sampled if any coil has it (so
            that zero-filled k-space is its own mask). A tensor, lists, or the path of a ``.npy`` file.
        acceleration: of a drawn mask, grid points over samples.
        centre_fraction: of a drawn mask, side of the fully sampled centre over that of k-space.
        seed: of a drawn mask.
        coils: 1, a number of simulated coils, or coil maps ``(coils, H, W)``.
        normalise: make the coil maps' sum of squares 1.

    Raises:
        ValueError: an argument has another shape or range, or the mask samples nothing.
    """

    mask: Tensor  # (H, W), bool
    sampled: Tensor  # (samples,), indices into H·W

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        mask: str | list[float] | list[list[float]] | Tensor = "equispaced",
        acceleration: float = 4.0,
        centre_fraction: float = 0.08,
        seed: int = 0,
        coils: int | str | list[list[list[float]]] | Tensor = 1,
        normalise: bool = True,
    ) -> None:
        super().__init__(image_shape, coils, normalise)
        _, h, w = self._known_image_shape("__init__")
        if isinstance(mask, str) and not mask.endswith(".npy"):
            if mask not in PATTERNS:
                raise ValueError(f"mask = {mask!r}; allowed are {', '.join(PATTERNS)}, a .npy file or an array")
            seen = draw_mask(mask, h, w, acceleration, centre_fraction, seed)
        else:
            values = array_argument(mask, "mask", allow_complex=True) != 0
            seen = values.any(0) if values.ndim == 3 else values
            if seen.ndim not in (1, 2) or any(s not in (1, n) for s, n in zip(seen.shape[::-1], (w, h), strict=False)):
                raise ValueError(
                    f"mask has shape {tuple(values.shape)}; allowed are ({h}, {w}), ({w},) and (coils, {h}, {w})"
                )
            seen = seen.broadcast_to(h, w).clone()
        if not bool(seen.any()):
            raise ValueError("mask samples nothing; at least one entry must not be zero")
        self.register_buffer("mask", seen)
        self.register_buffer("sampled", seen.flatten().nonzero()[:, 0])

    def encode(self, images: Tensor) -> Tensor:
        """Samples ``(B, coils, samples)`` of the coils' complex images ``(B, coils, H, W)``."""
        return self._samples(_centred(torch.fft.fft2, images))

    def encode_adjoint(self, y: Tensor) -> Tensor:
        """Zero-filled coil images ``(B, coils, H, W)`` of ``(B, coils, samples)``."""
        return _centred(torch.fft.ifft2, self.zero_filled(y))

    def sample(self, kspace: Tensor) -> Tensor:
        """The sampled entries of k-space.

        Args:
            kspace: ``(coils, H, W)``, complex; for one coil also ``(H, W)``. Entries that the mask leaves out are not
                looked at.

        Returns:
            ``(coils, samples)``.

        Raises:
            TypeError: it is real.
            ValueError: it has another shape.
        """
        _, h, w = self._known_image_shape("sample")
        if self.coils == 1 and tuple(kspace.shape) == (h, w):
            kspace = kspace[None]
        allowed = f"({self.coils}, {h}, {w}), or ({self.coils}, {len(self.sampled)}) for the samples alone"
        self._check_stored(kspace, allowed)
        if tuple(kspace.shape[1:]) != (h, w):
            raise ValueError(f"k-space data has shape {tuple(kspace.shape)}; allowed are {allowed}")
        return self._samples(kspace)

    def zero_filled(self, y: Tensor) -> Tensor:
        """K-space ``(…, coils, H, W)`` of samples ``(…, coils, samples)``, with zeros where nothing was sampled."""
        _, h, w = self._known_image_shape("zero_filled")
        kspace = y.new_zeros(*y.shape[:-1], h * w).index_copy(-1, self.sampled.to(y.device), y)
        return kspace.reshape(*y.shape[:-1], h, w)

    def as_measurement(self, stored: Tensor) -> Tensor:
        """The samples ``(coils, samples)`` of a file with these, or with full or zero-filled k-space; see :meth:`sample`.

        Raises:
            TypeError: it is real.
            ValueError: it has another shape, or an entry that the mask calls sampled is exactly 0 in all coils: it was not
                measured.
        """
        if tuple(stored.shape) == (self.coils, len(self.sampled)) and stored.is_complex():
            return stored
        y = self.sample(stored)
        empty = int((y == 0).all(0).sum())
        if empty:
            raise ValueError(
                f"mask samples {empty} entries, of {len(self.sampled)}, where the measurement is exactly 0 in all coils; if they "
                "were not measured, give the measurement's file as mask"
            )
        return y

    @property
    def has_gram_function(self) -> bool:
        """Whether there is one coil of uniform sensitivity."""
        return self.maps is None

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r""":math:`F^* f(m) F x`, with the mask made even for real images; for one coil of uniform sensitivity."""
        if not self.has_gram_function:
            return super().gram_function(f, x)
        self._check_image(x)
        m = self._eigenvalues(x.dtype)
        if x.shape[1] == 1:
            half = m[:, : m.shape[1] // 2 + 1]
            filtered: Tensor = torch.fft.irfft2(f(half) * torch.fft.rfft2(x), s=x.shape[-2:])
            return filtered
        u = torch.fft.ifft2(f(m) * torch.fft.fft2(torch.complex(x[:, 0], x[:, 1])))
        return torch.stack([u.real, u.imag], dim=1)

    def norm(self) -> float:
        """Largest singular value; in closed form where :attr:`has_gram_function`."""
        return math.sqrt(float(self._eigenvalues(torch.float64).max())) if self.maps is None else super().norm()

    def display(self, y: Tensor) -> Tensor:
        """The zero-filled reconstruction, combined over the coils, ``(C, H, W)``."""
        return self._combine(self.encode_adjoint(y[None].to(self.mask.device))[0])

    def _samples(self, kspace: Tensor) -> Tensor:
        return kspace.flatten(-2).index_select(-1, self.sampled.to(kspace.device))

    def _eigenvalues(self, dtype: torch.dtype) -> Tensor:
        """Of ``A^T A`` for one uniform coil, ``(H, W)`` with the frequency 0 at the corner."""
        m: Tensor = torch.fft.ifftshift(self.mask.to(dtype))
        even = (m + m.flip(0, 1).roll((1, 1), (0, 1))) / 2
        return m if self._known_image_shape("gram_function")[0] == 2 else even


def _centred(transform: Callable[..., Tensor], v: Tensor) -> Tensor:
    """An orthonormal 2-D transform with the origins of both spaces at ``(H // 2, W // 2)``."""
    dims = (-2, -1)
    centred: Tensor = torch.fft.fftshift(transform(torch.fft.ifftshift(v, dim=dims), norm="ortho"), dim=dims)
    return centred
