"""Noise of phases and angles."""

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
    spread,
    widen,
)


class VonMisesNoise(Noise):
    r"""Phases in radians, :math:`p(y \mid \bar y) = e^{\kappa \cos(y - \bar y)}/(2 \pi I_0(\kappa))` on a circle.

    The noiseless value may be any number (an unwrapped phase); the measurement is wrapped to :math:`(-\pi, \pi]`, and one
    of another period means the same. For large :math:`\kappa` the law is nearly Gaussian of standard deviation
    :math:`1/\sqrt\kappa` radians.

    Args:
        concentration: :math:`\kappa`: a number, or one an entry (a tensor, a list, or the path of a ``.npy`` file; it must
            broadcast to ``y_shape``).

    Raises:
        ValueError: an entry of ``concentration`` is not positive and finite.
    """

    concentration: Tensor

    def __init__(self, concentration: Entries) -> None:
        super().__init__()
        self.register_buffer("concentration", entries_argument(concentration, "concentration"))

    @property
    def resolution(self) -> float:
        r""":math:`(\kappa I_1(\kappa)/I_0(\kappa))^{-1/2}` of the largest :math:`\kappa`; the same for every noiseless value."""
        kappa = widen(self.concentration.max())
        return float((kappa * torch.special.i1e(kappa) / torch.special.i0e(kappa)) ** -0.5)

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw phases in :math:`(-\pi, \pi]`; see :meth:`Noise.sample`.

        By rejection from the wrapped Cauchy law, with the acceptance of Best and Fisher 1979, Appl. Statist. 28, 152.
        """
        wide = widen(check_real(clean, "clean"))
        device = drawing_device(clean, generator)
        kappa = spread(self.concentration, wide, "concentration").to(device).expand(wide.shape[1:])
        errors = [_von_mises(kappa, generator) for _ in wide]  # so that an image does not depend on those behind it
        y = wide + torch.stack(errors).to(wide.device)
        y = y - 2 * math.pi * ((y - math.pi) / (2 * math.pi)).ceil()
        return y.to(clean.dtype)

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`\kappa (\cos(y - \bar y) - 1) - \log(2 \pi e^{-\kappa} I_0(\kappa))`; see :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        kappa = spread(self.concentration, clean, "concentration")
        half = ((y - clean) / 2).sin()  # cos - 1 = -2 sin² of the half, which keeps small differences
        terms: Tensor = -2 * kappa * half**2 - (2 * math.pi * torch.special.i0e(kappa)).log()
        return terms


def _von_mises(kappa: Tensor, generator: torch.Generator | None) -> Tensor:
    r"""Angles of mean 0, shaped like ``kappa``.

    Best and Fisher's envelope in the half angle, where nothing cancels at large :math:`\kappa`. With
    :math:`s = \sin^2(\theta/2)` the target is :math:`\propto e^{-2 \kappa s}` and the wrapped Cauchy density
    :math:`\propto 1/(1 + q s)`, drawn as :math:`\tan(\theta/2) = \tan(\varphi/2)/\sqrt{1 + q}` with :math:`\varphi`
    uniform. Most is accepted at :math:`q = 2\kappa - 1 + \sqrt{4 \kappa^2 + 1}`, and the ratio of the two is largest at
    :math:`s = 1/(2\kappa) - 1/q`.
    """
    root, less = torch.hypot(2 * kappa, torch.ones_like(kappa)), 2 * kappa - 1
    q = torch.where(less > 0, root + less, 4 * kappa / (root - less))  # one number, written so that nothing cancels
    log_most = 2 * kappa / q - 1 + (q / (2 * kappa)).log()
    shape, kappa, q, log_most = kappa.shape, kappa.flatten(), q.flatten(), log_most.flatten()
    theta, waiting = torch.empty_like(kappa), torch.arange(kappa.numel(), device=kappa.device)
    while waiting.numel():
        u, v = torch.rand(2, waiting.numel(), generator=generator, dtype=kappa.dtype, device=kappa.device)
        k, c = kappa[waiting], q[waiting]
        tangent = (math.pi * (u - 0.5)).tan() / (1 + c).sqrt()
        s = tangent**2 / (1 + tangent**2)
        accept = torch.log1p(-v) <= -2 * k * s + torch.log1p(c * s) - log_most[waiting]
        theta[waiting[accept]] = 2 * tangent[accept].atan()
        waiting = waiting[~accept]
    return theta.reshape(shape)
