r"""Darcy flow: from the logarithm of a permeability to the pressure at sensors.

On the unit square, with zero pressure at the boundary and a uniform source,

.. math:: -\nabla \cdot (e^{x} \nabla p) = f, \qquad p = 0 \text{ at the boundary}, \qquad y_j = p(s_j)

by finite volumes (pixels are cells, the permeability of a face is the harmonic mean of its two cells'), which is of second order. The
linear system is solved by conjugate gradients, preconditioned by :math:`e^{-x/2} (-\Delta)^{-1} e^{-x/2}` with the sine transform (Concus
& Golub 1973): the number of iterations depends on how x varies and hardly on the grid. The gradient takes one more solve (adjoint
method): for :math:`A(x)\, p = f` and :math:`\lambda = A^{-1} \partial L/\partial p` it is :math:`-\lambda^T (\partial A/\partial x)\, p`.
Everything is computed in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor

from dpnp_shared.gaussian_field import forward_transform, inverse_transform
from dpnp_shared.operators.base import Operator, array_argument
from dpnp_shared.operators.local_averages import check_function_shape, check_points


class DarcyFlow(Operator):
    r"""Pressure at sensors, of a log-permeability ``x``; see the module.

    Args:
        image_shape: ``(1, H, W)``, cells of the unit square.
        points: sensors ``(m, 2)`` in the unit square, down and right; or the path of a ``.npy`` file. Between cell centres the pressure is
            interpolated bilinearly.
        source: f, in units of pressure times permeability over length squared: a number, or one for each cell ``(H, W)``.
        tolerance: relative residual at which the solve ends.
        most_iterations: of conjugate gradients.

    Raises:
        ValueError: an argument of another shape or value.
    """

    source: Tensor  # (H, W)
    readout: Tensor  # (m, H·W)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        points: Sequence[Sequence[float]] | Tensor | str,
        source: float | Sequence[Sequence[float]] | Tensor | str = 1.0,
        tolerance: float = 1e-8,
        most_iterations: int = 1000,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)  # type: ignore[assignment] # checked in the next line
        h, w = check_function_shape(self.image_shape)
        if not 0 < tolerance < 1 or most_iterations < 1:
            raise ValueError(
                f"tolerance = {tolerance} must be in (0, 1) and most_iterations = {most_iterations} at least 1"
            )
        self.tolerance, self.most_iterations = tolerance, most_iterations
        f = array_argument(source, "source")
        if f.shape not in ((), (h, w)):
            raise ValueError(f"source has shape {tuple(f.shape)}; allowed are a number and ({h}, {w})")
        self.register_buffer("source", f.expand(h, w).clone())
        where = check_points(points)
        rows, columns = (_hats(n, at) for n, at in ((h, where[:, 0]), (w, where[:, 1])))
        self.register_buffer("readout", (rows[:, :, None] * columns[:, None, :]).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 1, H, W)`` to ``(B, m)``.

        Raises:
            RuntimeError: conjugate gradients did not reach the tolerance.
        """
        p = self.pressure(x)
        return (p.flatten(1) @ self.readout.to(p).T).to(x.dtype)

    def pressure(self, x: Tensor) -> Tensor:
        """The whole pressure, ``(B, H, W)`` in double precision, of ``x`` ``(B, 1, H, W)``; errors as in :meth:`forward`."""
        self._check_image(x)
        u = x[:, 0].double()
        solved: Tensor = _Solve.apply(u, self.source.double().expand_as(u), self.tolerance, self.most_iterations)
        return solved


class _Solve(torch.autograd.Function):
    """``p = A(x)^-1 f`` with the adjoint gradient in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, tolerance: float, most_iterations: int) -> Tensor:
        p = solve(x, f, tolerance, most_iterations)
        ctx.save_for_backward(x, p)
        ctx.settings = (tolerance, most_iterations)
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, p = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # the gradient is itself to be differentiated
        adjoint: Tensor = _Solve.apply(x, g, *ctx.settings)  # A is symmetric
        with torch.enable_grad():
            at = x.clone() if twice and x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(-(adjoint * flow(faces(at), p)).sum(), at, create_graph=twice)
        return gradient, adjoint if ctx.needs_input_grad[1] else None, None, None


Faces = tuple[Tensor, Tensor]


def faces(x: Tensor) -> Faces:
    """Permeability of all faces over the distance they stand for: ``(B, H + 1, W)`` and ``(B, H, W + 1)`` of ``x`` ``(B, H, W)``.

    A face of the boundary is half a cell away from the cell's centre.
    """
    resistance = torch.exp(-x)
    h, w = x.shape[1:]

    def along(r: Tensor, n: int) -> Tensor:  # the last dimension
        inner = 2 / (r[..., 1:] + r[..., :-1])
        ends = 2 / r[..., [0, -1]]
        return n**2 * torch.cat([ends[..., :1], inner, ends[..., 1:]], dim=-1)

    return along(resistance.mT, h).mT, along(resistance, w)


def flow(k: Faces, p: Tensor) -> Tensor:
    r""":math:`A p`: what flows out of each cell, by its volume, for ``p`` ``(B, H, W)``."""
    down = k[0] * torch.diff(F.pad(p, (0, 0, 1, 1)), dim=1)
    right = k[1] * torch.diff(F.pad(p, (1, 1)), dim=2)
    return -(torch.diff(down, dim=1) + torch.diff(right, dim=2))


def solve(x: Tensor, f: Tensor, tolerance: float, most_iterations: int) -> Tensor:
    """Conjugate gradients for ``A(x) p = f``, ``(B, H, W)`` each; an image's result does not depend on the others.

    Raises:
        RuntimeError: the tolerance was not reached.
    """
    k = faces(x)
    inverse, root = _poisson_eigenvalues(x).reciprocal(), torch.exp(-x / 2)

    def precondition(r: Tensor) -> Tensor:
        return root * _sine_filter(root * r, inverse)

    p, r = torch.zeros_like(f), f.clone()
    z = precondition(r)
    direction, rz = z, _dot(r, z)
    least = tolerance**2 * _dot(f, f)
    going = _dot(r, r) > least
    for _ in range(most_iterations):
        if not bool(going.any()):
            return p
        a = flow(k, direction)
        length = torch.where(going, rz / _dot(direction, a), 0.0)
        p, r = p + length * direction, r - length * a
        going = going & (_dot(r, r) > least)
        z = precondition(r)
        rz_new = _dot(r, z)
        direction = torch.where(going, z + rz_new / rz * direction, 0.0)
        rz = rz_new
    if not bool(going.any()):
        return p
    worst = float((_dot(r, r) / _dot(f, f)).max().sqrt())
    raise RuntimeError(
        f"Darcy flow: the relative residual is {worst:.2g} after {most_iterations} iterations, tolerance {tolerance:g}; the permeability "
        f"has a contrast of exp({float(x.max() - x.min()):.3g})"
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _sine_filter(r: Tensor, multiplier: Tensor) -> Tensor:
    """Multiply the coefficients of ``r`` in half-cell sines, which are cosines of the values with alternating signs."""
    h, w = r.shape[1:]
    sign = (1 - 2 * ((torch.arange(h, device=r.device)[:, None] + torch.arange(w, device=r.device)) % 2)).to(r)
    return sign * inverse_transform(multiplier.flip(0, 1) * forward_transform(sign * r, "neumann"), "neumann")


def _poisson_eigenvalues(x: Tensor) -> Tensor:
    """Of A for a permeability of 1, ``(H, W)``."""
    rows, columns = (
        4 * n**2 * torch.sin(math.pi * torch.arange(1, n + 1, dtype=x.dtype, device=x.device) / (2 * n)) ** 2
        for n in x.shape[1:]
    )
    return rows[:, None] + columns


def _hats(n: int, at: Tensor) -> Tensor:
    """Weights ``(m, n)`` of linear interpolation between cell centres; at the boundary the value is 0."""
    place = at * n + 0.5  # 0 is the centre of the cell beyond the first one, whose value is minus that one's
    left = place.floor().clamp(0, n)
    weights = torch.zeros(len(at), n + 2, dtype=at.dtype)
    weights.scatter_(1, left.long()[:, None], (1 - (place - left))[:, None])
    weights.scatter_(1, left.long()[:, None] + 1, (place - left)[:, None])
    inner = weights[:, 1:-1].clone()
    inner[:, 0] -= weights[:, 0]
    inner[:, -1] -= weights[:, -1]
    return inner
