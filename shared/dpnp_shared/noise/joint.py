"""Noise of several measurements of one image, each with its own law."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dpnp_shared.noise.base import Noise
from dpnp_shared.noise.gaussian import GaussianNoise
from dpnp_shared.operators.base import Operator
from dpnp_shared.operators.combine import Layout, stack_of


class JointNoise(Noise):
    r"""The parts of a :class:`~dpnp_shared.operators.Stack`'s measurement, independent, each with its own noise.

    A :class:`~dpnp_shared.forward_model.ForwardModel` binds it to its operator: it takes a copy that knows the parts' shapes.
    If all parts are Gaussian, that copy is one :class:`GaussianNoise` of the whole measurement, so that everything that is
    closed for linear Gaussian models stays so. Else measurements are not :attr:`counts` as a whole, even if
    some :attr:`parts` are.

    Args:
        noises: one for each operator of the stack, in its order.

    Raises:
        TypeError: an entry is no noise model.
        ValueError: ``noises`` is empty.
    """

    layout: Layout | None = None

    def __init__(self, noises: list[Noise]) -> None:
        super().__init__()
        if not noises:
            raise ValueError("noises is empty; allowed is a list of at least one noise model")
        for noise in noises:
            if not isinstance(noise, Noise):
                raise TypeError(f"noises holds a {type(noise).__name__}; allowed are noise models")
        self.noises = nn.ModuleList(noises)
        self.differentiable = all(noise.differentiable for noise in noises)

    @property
    def parts(self) -> list[Noise]:
        """The noise of each part."""
        return [noise for noise in self.noises if isinstance(noise, Noise)]

    @property
    def resolution(self) -> float | None:
        """The finest of all parts', each in the units of its own; None if one of them does not know it."""
        resolutions = [noise.resolution for noise in self.parts]
        known = [resolution for resolution in resolutions if resolution is not None]
        return min(known) if len(known) == len(resolutions) else None

    def fisher_information(self, clean: Tensor) -> Tensor | None:
        """That of each part, None if one of them does not know it; see :meth:`Noise.fisher_information`.

        Raises:
            RuntimeError: the noise is not bound to an operator.
        """
        layout = self._bound()
        parts = []
        for noise, part in zip(self.parts, layout.split(clean), strict=True):
            found = noise.fisher_information(part)
            if found is None:
                return None
            parts.append(torch.complex(found, found) if part.is_complex() else found)
        return layout.join(parts)

    def bind(self, operator: Operator) -> Noise:
        """A copy for the measurements of a stack.

        Args:
            operator: a :class:`~dpnp_shared.operators.Stack` with as many operators as there are noises, or one that gives
                a stack's measurements: a composition that ends in one, or :class:`~dpnp_shared.operators.PhysicalUnits`
                around one.

        Returns:
            One :class:`GaussianNoise` if all parts are Gaussian, else a bound copy of this noise (itself, if it is bound to
            such a stack already).

        Raises:
            TypeError: the operator is no stack, or a covariance is given for a complex part.
            ValueError: there is another number of parts, or a parameter does not fit its part's shape.
        """
        stack = stack_of(operator)
        if stack is None:
            raise TypeError(f"JointNoise needs a Stack of operators, got {type(operator).__name__}")
        if self.layout == stack.layout:
            return self
        parts = [A for A in stack.operators if isinstance(A, Operator)]
        if len(parts) != len(self.noises):
            raise ValueError(f"JointNoise holds {len(self.noises)} noises and the Stack {len(parts)} operators")
        bound = [copy.deepcopy(noise).bind(A) for noise, A in zip(self.parts, parts, strict=True)]
        if all(isinstance(noise, GaussianNoise) for noise in bound):
            return _one_gaussian([noise for noise in bound if isinstance(noise, GaussianNoise)], stack.layout)
        joint = JointNoise(bound)
        joint.layout = stack.layout
        return joint

    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the parts, one after the other; see :meth:`Noise.sample`.

        Raises:
            RuntimeError: the noise is not bound to an operator.
            ValueError: the shapes do not fit.
        """
        layout = self._bound()
        parts = zip(self.parts, layout.split(clean), strict=True)
        return layout.join([noise.sample(part, generator) for noise, part in parts])

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        """The sum of the parts' log densities; see :meth:`Noise.log_prob`.

        Raises:
            RuntimeError: the noise is not bound to an operator.
            TypeError: ``y`` is complex.
            ValueError: the shapes do not fit, or a part's noise refuses its part.
        """
        layout = self._bound()
        parts = zip(self.parts, layout.split(y), layout.split(clean), strict=True)
        return torch.stack([noise.log_prob(y_part, clean_part) for noise, y_part, clean_part in parts]).sum(0)

    def _bound(self) -> Layout:
        if self.layout is None:
            raise RuntimeError(
                "this JointNoise does not know its parts' shapes; a ForwardModel binds it to its operator"
            )
        return self.layout


def _one_gaussian(noises: list[GaussianNoise], layout: Layout) -> GaussianNoise:
    """The noise of the flat measurement; the real and the imaginary part of a complex entry have one sigma each."""
    if all(noise.is_scalar for noise in noises) and len({noise.resolution for noise in noises}) == 1:
        return noises[0]
    blocks = []  # standard deviations (m_i,) of a part, or its covariance (m_i, m_i)
    for i, (noise, shape, pairs) in enumerate(zip(noises, layout.shapes, layout.complex, strict=True)):
        if noise.sigma is None and pairs:
            raise TypeError(f"part {i} is complex; its GaussianNoise takes sigma and no covariance")
        try:
            std = noise.sqrt_mul(torch.ones(1, *shape, dtype=torch.float64, device=next(noise.buffers()).device))
        except ValueError as error:
            raise ValueError(f"part {i}: {error}") from None
        entries = std.flatten().repeat_interleave(2 if pairs else 1)
        blocks.append(entries if noise.sigma is not None else noise.covariance_matrix(shape))
    if all(block.ndim == 1 for block in blocks):
        return GaussianNoise(torch.cat(blocks))
    blocks = [torch.diag(block**2) if block.ndim == 1 else block for block in blocks]
    return GaussianNoise(covariance=torch.block_diag(*blocks))  # type: ignore[no-untyped-call]
