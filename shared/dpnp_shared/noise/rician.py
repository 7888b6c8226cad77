"""Noise of magnitudes: Rice's, as in magnitude MRI."""

from __future__ import annotations

import torch
from torch import Tensor

from dpnp_shared.noise.base import (
    Entries,
    Noise,
    check_real,
    drawing_device,
    entries_argument,
    match_real,
    spread,
    widen,
)


class RicianNoise(Noise):
    r""":math:`y = |\bar y + \sigma (w_1 + i w_2)|`, the magnitude of a complex signal with noise in both parts.

    Its density is :math:`\frac{y}{\sigma^2} e^{-(y^2 + \bar y^2)/(2 \sigma^2)} I_0(y \bar y/\sigma^2)` (Gudbjartsson and
    Patz 1995, Magn. Reson. Med. 34, 910). It knows of the signal's magnitude only: a negative noiseless value is the same
    as a positive one, and the gradient at 0 is 0.

    Args:
        sigma: standard deviation of the real and of the imaginary part, each, in the units of ``y``: a number, or one an
            entry (a tensor, a list, or the path of a ``.npy`` file; it must broadcast to ``y_shape``).

    Raises:
        ValueError: an entry of ``sigma`` is not positive and finite.
    """

    sigma: Tensor

    def __init__(self, sigma: Entries) -> None:
        super().__init__()
        self.register_buffer("sigma", entries_argument(sigma, "sigma"))

    @property
    def resolution(self) -> float:
        r"""The least ``sigma``: the Fisher information grows with the signal, from 0 up to :math:`1/\sigma^2`."""
        return float(self.sigma.min())

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw magnitudes; see :meth:`Noise.sample`."""
        wide = widen(check_real(clean, "clean"))
        device = drawing_device(clean, generator)
        w = torch.randn(*clean.shape, 2, generator=generator, dtype=wide.dtype, device=device).to(clean.device)
        sigma = spread(self.sigma, wide, "sigma")
        return torch.hypot(wide + sigma * w[..., 0], sigma * w[..., 1]).to(clean.dtype)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`\log\frac{y}{\sigma^2} - \frac{(y - |\bar y|)^2}{2 \sigma^2} + \log(e^{-a} I_0(a))`, :math:`a = y|\bar y|/\sigma^2`.

        See :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: an entry of ``y`` is not positive (the density at 0 is 0 whatever the signal), or the shapes do not
                fit.
        """
        y, clean = match_real(y, clean)
        bad = y[~(y > 0)]
        if bad.numel():
            raise ValueError(f"y holds {bad.numel()} entries like {float(bad[0])}; allowed are positive magnitudes")
        sigma, signal = spread(self.sigma, clean, "sigma"), clean.abs()
        gauss = -0.5 * ((y - signal) / sigma) ** 2
        terms: Tensor = (y / sigma**2).log() + gauss + torch.special.i0e(y * signal / sigma**2).log()
        return terms
