"""Operators made of operators: one after the other, or several measurements of one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpnp_shared.operators.base import LinearOperator, Operator, as_operator, check_image_shape
from dpnp_shared.operators.physical_units import PhysicalUnits


class Compose(Operator):
    r""":math:`A(x) = A_n(\cdots A_2(A_1(x)))`: operators applied from left to right.

    All but the last must give images ``(B, C', H', W')`` where the next one takes images. If all are linear, the
    object is a :class:`LinearCompose`, which is a linear operator.

    Args:
        operators: at least one; a module or a function that keeps the batch is taken as well.
        image_shape: ``(C, H, W)``; by default that of the first operator.

    Raises:
        TypeError: an entry is not an operator, a module or a function.
        ValueError: ``operators`` is empty.
    """

    def __new__(cls, operators: list[Operator], image_shape: tuple[int, int, int] | None = None) -> Compose:
        """Choose :class:`LinearCompose` where all operators are linear."""
        return super().__new__(LinearCompose if cls is Compose and _all_linear(operators) else cls)

    def __getnewargs__(self) -> tuple[list[Operator]]:
        """For copies and pickles, which know the class already."""
        return ([],)

    def __init__(self, operators: list[Operator], image_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.operators = _modules(operators)
        self.differentiable = all(A.differentiable for A in _list(self.operators))
        self.pixelwise = all(A.pixelwise for A in _list(self.operators))
        self.image_shape = _image_shape(image_shape, _list(self.operators)[:1])

    def forward(self, x: Tensor) -> Tensor:
        """Apply all operators to ``x`` ``(B, C, H, W)``; the shape is that of the last one's measurements."""
        self._check_image(x)
        for A in self.operators:
            x = A(x)
        return x

    @property
    def linear_part(self) -> LinearOperator | None:
        """The operators' own, one after the other; None where one of them is not affine."""
        parts = [A.linear_part for A in _list(self.operators)]
        return None if None in parts else LinearCompose(parts, self.image_shape)  # type: ignore[arg-type]

    @property
    def unseen(self) -> Tensor | None:
        """What the first operator does not see."""
        return _list(self.operators)[0].unseen

    def as_measurement(self, stored: Tensor) -> Tensor:
        """As the last operator takes it from files."""
        return _list(self.operators)[-1].as_measurement(stored)

    def display(self, y: Tensor) -> Tensor | None:
        """As the last operator shows its measurements."""
        return _list(self.operators)[-1].display(y)


class LinearCompose(Compose, LinearOperator):
    r"""Linear operators, one after the other: :math:`A = A_n \cdots A_1`, :math:`A^T = A_1^T \cdots A_n^T`.

    There is no closed form of functions of :math:`A^T A`. See :class:`Compose`, which gives this by itself.

    Raises:
        TypeError: an operator is not linear.
    """

    def __init__(self, operators: list[Operator], image_shape: tuple[int, int, int] | None = None) -> None:
        _check_linear(operators, "LinearCompose")
        super().__init__(operators, image_shape)

    @property
    def linear_part(self) -> LinearOperator:
        """The operator itself."""
        return self

    def adjoint(self, y: Tensor) -> Tensor:
        """The adjoints from right to left, ``(B, C, H, W)``."""
        for A in reversed(_list(self.operators)):
            assert isinstance(A, LinearOperator)
            y = A.adjoint(y)
        return y


@dataclass(frozen=True)
class Layout:
    """Where the parts of a stack's measurement are in the flat one.

    Attributes:
        shapes: of each part, without the batch.
        complex: whether it is complex; such a part is kept as real and imaginary part of each entry in turn.
    """

    shapes: tuple[tuple[int, ...], ...]
    complex: tuple[bool, ...]

    @property
    def sizes(self) -> list[int]:
        """Real numbers of each part."""
        return [math.prod(shape) * (2 if pairs else 1) for shape, pairs in zip(self.shapes, self.complex, strict=True)]

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of a flat measurement.

        Args:
            y: ``(m,)`` or ``(B, m)``, real.

        Returns:
            One tensor a part, ``(*y_shape)`` or ``(B, *y_shape)``.

        Raises:
            TypeError: ``y`` is complex.
            ValueError: ``y`` has another number of entries.
        """
        m = sum(self.sizes)
        if y.ndim not in (1, 2) or y.shape[-1] != m:
            raise ValueError(f"y has shape {tuple(y.shape)}; allowed are ({m},) and (B, {m})")
        if y.is_complex():
            raise TypeError(f"y has dtype {y.dtype}; complex parts are kept as pairs of reals")
        parts = []
        for part, shape, pairs in zip(torch.split(y, self.sizes, dim=-1), self.shapes, self.complex, strict=True):
            part = part.reshape(*y.shape[:-1], *shape, *([2] if pairs else []))
            parts.append(torch.complex(part[..., 0], part[..., 1]) if pairs else part)
        return parts

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`split`.

        Args:
            parts: one tensor a part, all ``(*y_shape)`` or all ``(B, *y_shape)``.

        Returns:
            ``(m,)`` or ``(B, m)``.

        Raises:
            TypeError: a part is complex and should not be, or the other way round.
            ValueError: there is another number of parts, or one has another shape.
        """
        if len(parts) != len(self.shapes):
            raise ValueError(f"there are {len(parts)} parts; the stack has {len(self.shapes)}")
        batch = parts[0].shape[: parts[0].ndim - len(self.shapes[0])]
        flat = []
        for i, (part, shape, pairs) in enumerate(zip(parts, self.shapes, self.complex, strict=True)):
            if len(batch) > 1 or tuple(part.shape) != (*batch, *shape):
                raise ValueError(
                    f"part {i} has shape {tuple(part.shape)}; allowed are {shape} and (B, *{shape}), for all parts"
                )
            if part.is_complex() != pairs:
                raise TypeError(f"part {i} has dtype {part.dtype}; it must be {'complex' if pairs else 'real'}")
            flat.append((torch.view_as_real(part) if pairs else part).reshape(*batch, -1))
        return torch.cat(flat, dim=-1)


class Stack(Operator):
    r"""Several measurements of one image, :math:`y = (A_1(x), \dots, A_n(x))`, flattened, ``(B, m)``.

    :meth:`split` takes the parts apart again, :meth:`join` puts them together. Complex parts are kept as pairs of reals.
    :class:`~dpnp_shared.noise.JointNoise` gives each part noise of its own. If all operators are linear, the object is a
    :class:`LinearStack`, which is a linear operator.

    Args:
        operators: at least one; a module or a function that keeps the batch is taken as well.
        image_shape: ``(C, H, W)``; by default that of the first operator that has one. The operators are tried on a
            blank image of that shape, to know their measurements' shapes.

    Attributes:
        layout: shapes of the parts, without the batch, and which of them are complex.

    Raises:
        TypeError: an entry is not an operator, a module or a function.
        ValueError: ``operators`` is empty, or no image shape is known.
    """

    def __new__(cls, operators: list[Operator], image_shape: tuple[int, int, int] | None = None) -> Stack:
        """Choose :class:`LinearStack` where all operators are linear."""
        return super().__new__(LinearStack if cls is Stack and _all_linear(operators) else cls)

    def __getnewargs__(self) -> tuple[list[Operator]]:
        """For copies and pickles, which know the class already."""
        return ([],)

    def __init__(self, operators: list[Operator], image_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.operators = _modules(operators)
        self.differentiable = all(A.differentiable for A in _list(self.operators))
        self.image_shape = _image_shape(image_shape, _list(self.operators))
        if self.image_shape is None:
            raise ValueError("image_shape = None and no operator has one; give image_shape = (C, H, W)")
        device = next((t.device for t in (*self.parameters(), *self.buffers())), torch.device("cpu"))
        with torch.no_grad():
            parts = [A(torch.zeros(1, *self.image_shape, device=device)) for A in self.operators]
        shapes, pairs = (tuple(part.shape[1:]) for part in parts), (part.is_complex() for part in parts)
        self.layout = Layout(tuple(shapes), tuple(pairs))

    @property
    def y_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each part, without the batch."""
        return list(self.layout.shapes)

    def forward(self, x: Tensor) -> Tensor:
        """All measurements of ``x`` ``(B, C, H, W)``, flattened and concatenated, ``(B, m)``."""
        self._check_image(x)
        return self.join([A(x) for A in self.operators])

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of a measurement ``(m,)`` or ``(B, m)``, each in its operator's shape; see :meth:`Layout.split`."""
        return self.layout.split(y)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The measurement ``(m,)`` or ``(B, m)`` that has these parts; see :meth:`Layout.join`."""
        return self.layout.join(parts)

    @property
    def linear_part(self) -> LinearOperator | None:
        """The stack of the operators' own; None where one of them is not affine."""
        parts = [A.linear_part for A in _list(self.operators)]
        return None if None in parts else LinearStack(parts, self.image_shape)  # type: ignore[arg-type]

    @property
    def unseen(self) -> Tensor | None:
        """What none of the operators sees."""
        unseen: Tensor | None = None
        for A in _list(self.operators):
            if A.unseen is None:
                return None
            unseen = A.unseen if unseen is None else unseen & A.unseen
        return unseen


class LinearStack(Stack, LinearOperator):
    r"""Several linear measurements of one image: :math:`A^T y = \sum_i A_i^T y_i`.

    There is no closed form of functions of :math:`A^T A = \sum_i A_i^T A_i`. See :class:`Stack`, which gives this by
    itself.

    Raises:
        TypeError: an operator is not linear.
    """

    def __init__(self, operators: list[Operator], image_shape: tuple[int, int, int] | None = None) -> None:
        _check_linear(operators, "LinearStack")
        super().__init__(operators, image_shape)

    @property
    def linear_part(self) -> LinearOperator:
        """The operator itself."""
        return self

    def adjoint(self, y: Tensor) -> Tensor:
        """The sum of the parts' adjoints, ``(B, C, H, W)``, of ``y`` ``(B, m)``."""
        parts = zip(_list(self.operators), self.split(y), strict=True)
        images = [A.adjoint(part) for A, part in parts if isinstance(A, LinearOperator)]
        return torch.stack(images).sum(0)


def stack_of(operator: Operator) -> Stack | None:
    """The stack whose measurements an operator gives: itself, the last of a composition, or the one in physical units.

    Args:
        operator: any.

    Returns:
        The stack, or None where there is none.
    """
    if isinstance(operator, Compose):
        return stack_of(_list(operator.operators)[-1])
    if isinstance(operator, PhysicalUnits):
        return stack_of(operator.operator)
    return operator if isinstance(operator, Stack) else None


def _modules(operators: Sequence[Operator | nn.Module | Callable[[Tensor], Tensor]]) -> nn.ModuleList:
    if not operators:
        raise ValueError("operators is empty; allowed is a list of at least one operator")
    return nn.ModuleList(as_operator(A) for A in operators)


def _list(modules: nn.ModuleList) -> list[Operator]:
    return [A for A in modules if isinstance(A, Operator)]


def _all_linear(operators: Sequence[Any]) -> bool:
    return bool(operators) and all(isinstance(A, LinearOperator) for A in operators)


def _check_linear(operators: Sequence[Any], name: str) -> None:
    for A in operators:
        if not isinstance(A, LinearOperator):
            raise TypeError(f"operators holds a {type(A).__name__}; {name} takes linear operators only")


def _image_shape(given: tuple[int, int, int] | None, operators: list[Operator]) -> tuple[int, int, int] | None:
    """The shape given, else the first one known."""
    if given is not None:
        return check_image_shape(given)
    return next((A.image_shape for A in operators if A.image_shape is not None), None)
