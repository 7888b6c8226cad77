r"""Transmission of X-rays or light: the Beer-Lambert law."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpnp_shared.operators.base import Operator, array_argument, as_operator


class BeerLambert(Operator):
    r""":math:`A(x) = I_0\, e^{-P x}`, the mean counts behind an object whose line integrals of attenuation are :math:`P x`.

    With Poisson noise these are the raw data of a transmission scan. For many counts :math:`-\log(y/I_0)` is close to
    :math:`P x + N(0, \sigma^2)` with :math:`\sigma^2 = 1/(I_0 e^{-P x})` of each line: then the linear operator with Gaussian noise
    is enough, and faster. An image in a prior's units becomes an attenuation (1/length) by
    :class:`~dpnp_shared.operators.PhysicalUnits` around this operator or inside of it.

    Args:
        operator: :math:`P`, images to line integrals, without a unit.
        photons: :math:`I_0`, mean counts without an object: a number, or one a line (a list, a tensor, or the path of a ``.npy``
            file; it must broadcast to the shape of the line integrals).

    Raises:
        TypeError: ``operator`` is neither an operator, a module nor a function.
        ValueError: an entry of ``photons`` is not positive.
    """

    photons: Tensor

    def __init__(
        self, operator: Operator | nn.Module | Callable[[Tensor], Tensor], photons: float | list[float] | str | Tensor
    ) -> None:
        super().__init__()
        self.operator = as_operator(operator)
        self.image_shape, self.differentiable = self.operator.image_shape, self.operator.differentiable
        counts = array_argument(photons, "photons")
        if not bool((counts > 0).all()):
            raise ValueError(f"photons = {float(counts.min())}; allowed are positive numbers")
        self.register_buffer("photons", counts)

    def forward(self, x: Tensor) -> Tensor:
        """Mean counts ``(B, *y_shape)`` of ``x`` ``(B, C, H, W)``."""
        integrals: Tensor = self.operator(x)
        return self.photons.to(integrals.dtype) * torch.exp(-integrals)

    def line_integrals(self, y: Tensor) -> Tensor:
        r""":math:`-\log(y/I_0)` of counts ``(*y_shape)``, with or without a batch; a count under 1/2 is taken as 1/2."""
        return -(y.clamp(min=0.5) / self.photons.to(y.dtype)).log()

    @property
    def unseen(self) -> Tensor | None:
        """What the operator does not see."""
        return self.operator.unseen

    def display(self, y: Tensor) -> Tensor | None:
        """The line integrals, as the operator shows them."""
        return self.operator.display(self.line_integrals(y))
