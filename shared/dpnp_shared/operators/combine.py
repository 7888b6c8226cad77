"""Operators made of operators: one after the other, or several measurements of one image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpnp_shared.operators.base import LinearOperator, Operator, as_operator, check_image_shape


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
        self.image_shape = _image_shape(image_shape, _list(self.operators)[:1])

    def forward(self, x: Tensor) -> Tensor:
        """Apply all operators to ``x`` ``(B, C, H, W)``; the shape is that of the last one's measurements."""
        self._check_image(x)
        for A in self.operators:
            x = A(x)
        return x

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

    def adjoint(self, y: Tensor) -> Tensor:
        """The adjoints from right to left, ``(B, C, H, W)``."""
        for A in reversed(_list(self.operators)):
            assert isinstance(A, LinearOperator)
            y = A.adjoint(y)
        return y


class Stack(Operator):
    r"""Several measurements of one image, :math:`y = (A_1(x), \dots, A_n(x))`, flattened, ``(B, m)``.

    :meth:`split` takes the parts apart again. If all operators are linear, the object is a :class:`LinearStack`,
    which is a linear operator.

    Args:
        operators: at least one, with real measurements; a module or a function that keeps the batch is taken as well.
        image_shape: ``(C, H, W)``; by default that of the first operator that has one. The operators are tried on a
            blank image of that shape, to know their measurements' shapes.

    Attributes:
        y_shapes: the shape of each part, without the batch.

    Raises:
        TypeError: an entry is not an operator, a module or a function, or its measurements are complex.
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
        with torch.no_grad():
            parts = [A(torch.zeros(1, *self.image_shape)) for A in self.operators]
        if any(part.is_complex() for part in parts):
            raise TypeError(f"operators give the dtypes {[part.dtype for part in parts]}; all must be real")
        self.y_shapes = [tuple(part.shape[1:]) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        """All measurements of ``x`` ``(B, C, H, W)``, flattened and concatenated, ``(B, m)``."""
        self._check_image(x)
        return torch.cat([A(x).flatten(1) for A in self.operators], dim=1)

    def split(self, y: Tensor) -> list[Tensor]:
        """The parts of a measurement, each in its operator's shape.

        Args:
            y: ``(m,)`` or ``(B, m)``.

        Returns:
            One tensor an operator, ``(*y_shape)`` or ``(B, *y_shape)``.

        Raises:
            ValueError: ``y`` has another number of entries.
        """
        sizes = [math.prod(shape) for shape in self.y_shapes]
        if y.ndim not in (1, 2) or y.shape[-1] != sum(sizes):
            raise ValueError(f"y has shape {tuple(y.shape)}; allowed are ({sum(sizes)},) and (B, {sum(sizes)})")
        parts = torch.split(y, sizes, dim=-1)
        return [part.reshape(*y.shape[:-1], *shape) for part, shape in zip(parts, self.y_shapes, strict=True)]

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

    def adjoint(self, y: Tensor) -> Tensor:
        """The sum of the parts' adjoints, ``(B, C, H, W)``, of ``y`` ``(B, m)``."""
        parts = zip(_list(self.operators), self.split(y), strict=True)
        images = [A.adjoint(part) for A, part in parts if isinstance(A, LinearOperator)]
        return torch.stack(images).sum(0)


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
