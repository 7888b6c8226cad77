"""Noise with outliers: Student's t."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpnp_shared.noise.base import (
    Entries,
    Noise,
    check_real,
    drawing_device,
    entries_argument,
    match_real,
    positive,
    spread,
    widen,
)


class StudentTNoise(Noise):
    r""":math:`y = \bar y + s\, t_\nu`, independent in each entry: bell-shaped, with tails :math:`\sim |y|^{-\nu-1}`.

    Args:
        scale: :math:`s`, in the units of ``y``: a number, or one an entry (a tensor, a list, or the path of a ``.npy``
            file; it must broadcast to ``y_shape``).
        dof: degrees of freedom :math:`\nu`; 1 is Cauchy's law, many are nearly Gaussian of standard deviation ``scale``.

    Raises:
        ValueError: an entry of ``scale``, or ``dof``, is not positive and finite.
    """

    scale: Tensor

    def __init__(self, scale: Entries, dof: float) -> None:
        super().__init__()
        self.register_buffer("scale", entries_argument(scale, "scale"))
        self.dof = positive(dof, "dof")

    @property
    def resolution(self) -> float:
        r""":math:`s \sqrt{(\nu + 3)/(\nu + 1)}` of the least scale; the Fisher information is the same everywhere."""
        return float(self.scale.min()) * math.sqrt((self.dof + 3) / (self.dof + 1))

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw by the polar method, :math:`t = \sqrt{\nu (u^{-2/\nu} - 1)} \cos 2 \pi v`.

        Bailey 1994, Math. Comp. 62, 779. See :meth:`Noise.sample`.
        """
        wide = widen(check_real(clean, "clean"))
        device = drawing_device(clean, generator)
        u = torch.rand(*clean.shape, 2, generator=generator, dtype=wide.dtype, device=device).to(clean.device)
        square = self.dof * torch.expm1(-2 / self.dof * torch.log1p(-u[..., 0]))  # 1 - u is in (0, 1]
        t = square.sqrt() * (2 * math.pi * u[..., 1]).cos()
        return (wide + spread(self.scale, wide, "scale") * t).to(clean.dtype)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`\log\frac{\Gamma((\nu+1)/2)}{\Gamma(\nu/2)\sqrt{\nu\pi}\,s} - \frac{\nu+1}{2}\log(1+\frac{(y-\bar y)^2}{\nu s^2})`.

        See :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        scale = spread(self.scale, clean, "scale")
        kernel = -(self.dof + 1) / 2 * torch.log1p(((y - clean) / scale) ** 2 / self.dof)
        return kernel - scale.log() + _log_height(self.dof)


def _log_height(dof: float) -> float:
    r""":math:`\log\frac{\Gamma((\nu+1)/2)}{\Gamma(\nu/2)\sqrt{\nu\pi}}`, the log density at the centre."""
    x = dof / 2
    if x < 50:
        return math.lgamma(x + 0.5) - math.lgamma(x) - 0.5 * math.log(dof * math.pi)
    # the ratio's asymptotic series, where the two logarithms would cancel
    return -0.5 * math.log(2 * math.pi) - 1 / (8 * x) + 1 / (192 * x**3) - 1 / (640 * x**5)
