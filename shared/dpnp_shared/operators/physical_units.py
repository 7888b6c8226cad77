"""From the prior's pixel values to the physical quantity that an instrument measures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpnp_shared.operators.base import LinearOperator, Operator, as_operator


class PhysicalUnits(Operator):
    r""":math:`A(u)` of the physical image :math:`u = p_0 + (x - v_0)\,\frac{p_1 - p_0}{v_1 - v_0}`.

    A prior lives in its own value range :math:`(v_0, v_1)`, an instrument sees attenuation, flux or photon rates
    between :math:`p_0` and :math:`p_1`. With a linear operator the whole is affine, so that closed forms and conjugate
    gradients stay available (see :attr:`~dpnp_shared.operators.Operator.linear_part`).

    Args:
        operator: takes the physical image; without one the physical image itself is measured.
        value_range: :math:`(v_0, v_1)`, of ``x``.
        physical_range: :math:`(p_0, p_1)`, what these are in the operator's units; :math:`p_1 < p_0` turns the contrast.
        clamp: replace physical values beyond :math:`p_0` by :math:`p_0`, where the other side has no meaning (negative rates).
            The whole is then not affine, and its gradient vanishes there.

    Raises:
        TypeError: ``operator`` is neither an operator, a module nor a function.
        ValueError: a range is empty or not finite.
    """

    def __init__(
        self,
        operator: Operator | nn.Module | Callable[[Tensor], Tensor] | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        physical_range: tuple[float, float] = (0.0, 1.0),
        clamp: bool = False,
    ) -> None:
        super().__init__()
        for name, (low, high) in (("value_range", value_range), ("physical_range", physical_range)):
            if low == high or not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError(f"{name} = {(low, high)}; allowed are two different numbers")
        self.operator = Identity() if operator is None else as_operator(operator)
        self.start, self.clamp = physical_range[0], clamp
        self.scale = (physical_range[1] - physical_range[0]) / (value_range[1] - value_range[0])
        self.value_start = value_range[0]
        self.image_shape, self.differentiable = self.operator.image_shape, self.operator.differentiable
        self.pixelwise = self.operator.pixelwise

    def forward(self, x: Tensor) -> Tensor:
        """``A(u)``, ``(B, *y_shape)``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        measurement: Tensor = self.operator(self.physical(x))
        return measurement

    def physical(self, x: Tensor) -> Tensor:
        """The physical image ``u`` of ``x``, of any shape."""
        step = self.scale * (x - self.value_start)
        if self.clamp:
            step = step.clamp(min=0) if self.scale > 0 else step.clamp(max=0)
        return self.start + step

    @property
    def linear_part(self) -> LinearOperator | None:
        """The operator's own, times the ratio of the ranges; None with ``clamp``."""
        linear = self.operator.linear_part
        return None if self.clamp or linear is None else Scaled(linear, self.scale)

    def as_measurement(self, stored: Tensor) -> Tensor:
        """As the operator takes it from files."""
        return self.operator.as_measurement(stored)

    @property
    def unseen(self) -> Tensor | None:
        """What the operator does not see."""
        return self.operator.unseen

    def display(self, y: Tensor) -> Tensor | None:
        """As the operator shows it, in the prior's units."""
        picture = self.operator.display(y)
        if picture is None:
            return None
        picture = picture.abs() if picture.is_complex() else picture
        return self.value_start + (picture - self.start) / self.scale


class Identity(LinearOperator):
    """:math:`A x = x`: the image itself is measured, with noise (denoising)."""

    pixelwise = True

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``(B, C, H, W)`` itself."""
        self._check_image(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """``y`` ``(B, C, H, W)`` itself."""
        return y

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """All eigenvalues are 1."""
        return f(torch.ones((), dtype=x.dtype, device=x.device)) * x

    def norm(self) -> float:
        """1."""
        return 1.0

    def display(self, y: Tensor) -> Tensor:
        """The measurement."""
        return y


class Scaled(LinearOperator):
    r""":math:`a A`, a linear operator times a number.

    Args:
        operator: A.
        scale: a, not 0.

    Raises:
        ValueError: ``scale`` is 0 or not finite.
    """

    def __init__(self, operator: LinearOperator, scale: float) -> None:
        super().__init__(operator.image_shape)
        if scale == 0 or not math.isfinite(scale):
            raise ValueError(f"scale = {scale}; allowed are numbers other than 0")
        self.operator, self.scale, self.pixelwise = operator, scale, operator.pixelwise

    def forward(self, x: Tensor) -> Tensor:
        """``a A x``, ``(B, *y_shape)``."""
        measurement: Tensor = self.scale * self.operator(x)
        return measurement

    def adjoint(self, y: Tensor) -> Tensor:
        """``a A^T y``, ``(B, C, H, W)``."""
        return self.scale * self.operator.adjoint(y)

    @property
    def has_gram_function(self) -> bool:
        """Whether the operator has one."""
        return self.operator.has_gram_function

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r"""The operator's own, of :math:`s \mapsto f(a^2 s)`."""
        return self.operator.gram_function(lambda s: f(self.scale**2 * s), x)

    def norm(self) -> float:
        r""":math:`|a| \|A\|`."""
        return abs(self.scale) * self.operator.norm()

    @property
    def unseen(self) -> Tensor | None:
        """What the operator does not see."""
        return self.operator.unseen
