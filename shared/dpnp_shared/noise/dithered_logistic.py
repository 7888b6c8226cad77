"""The noise of one-bit cameras."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dpnp_shared.noise.base import Noise, check_real, drawing_device, match_real, positive


class DitheredLogisticNoise(Noise):
    r"""One bit an entry: :math:`y = \mathrm{sign}(\bar y + s\,\varepsilon)`.

    :math:`\varepsilon` is standard logistic, hence :math:`P(y \mid \bar y) = \mathrm{sigmoid}(y \bar y /
    s)`. Goes with :class:`~dpnp_shared.operators.DitheredQuantisation`.

    Args:
        scale: :math:`s`, in the units of the noiseless measurement.

    Raises:
        ValueError: ``scale`` is not positive and finite.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = positive(scale, "scale")

    @property
    def resolution(self) -> float:
        r"""Twice the scale: the Fisher information of :math:`\bar y` is at most :math:`1/(4 s^2)`, at 0."""
        return 2 * self.scale

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw bits ±1, with the dtype of ``clean``; see :meth:`Noise.sample`."""
        device = drawing_device(check_real(clean, "clean"), generator)
        u = torch.rand(clean.shape, generator=generator, dtype=clean.dtype, device=device).to(clean.device)
        return 2 * (u < torch.sigmoid(clean / self.scale)).to(clean.dtype) - 1

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        r""":math:`\log \mathrm{sigmoid}(y \bar y / s)`; see :meth:`Noise.entry_log_prob`.

        Raises:
            TypeError: ``y`` or ``clean`` is complex.
            ValueError: an entry of ``y`` is neither -1 nor +1, or the shapes do not fit.
        """
        y, clean = match_real(y, clean)
        bad = y[(y != 1) & (y != -1)]
        if bad.numel():
            raise ValueError(f"y holds {bad.numel()} entries like {bad[0].item()}; allowed are -1 and +1")
        return functional.logsigmoid(y * clean / self.scale)
