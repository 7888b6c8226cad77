"""A function of NumPy arrays as operator, with or without its own vector-Jacobian product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpnp_shared.operators.base import Operator, check_image_shape

Array = npt.NDArray[Any]


class NumpyOperator(Operator):
    r"""``A(x) = function(x)``, where the function takes and gives NumPy arrays (SciPy, scikit-image, Numba, ...).

    The arrays have the dtype of the images, and the measurement is cast to it (to its complex counterpart where the
    function gives complex numbers). The function gets a copy, so that it may write into its argument. NaN is passed on:
    samplers take it as a likelihood of 0, so that a function may say in this way that it has no value for an image.

    Args:
        function: maps ``(B, C, H, W)`` to ``(B, *y_shape)``; or, with ``per_image``, ``(C, H, W)`` to ``(*y_shape)``.
            In YAML and on the command line ``path/to/file.py:Name``.
        image_shape: ``(C, H, W)`` that it takes; None where it takes several.
        per_image: call the function once an image instead of once a batch.
        vjp: maps ``x`` and ``v``, shaped like the function's argument and result, to :math:`J(x)^H v` shaped like
            ``x``, with the Jacobian :math:`J` of the function; of a complex result the real part is taken. With it the
            operator is differentiable, once.
        pixelwise: True where every entry depends on its own pixel only; see :class:`~dpnp_shared.operators.Operator`.

    Raises:
        TypeError: ``function`` or ``vjp`` is not a function.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        image_shape: tuple[int, int, int] | None = None,
        per_image: bool = False,
        vjp: Callable[..., Any] | None = None,
        pixelwise: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("function", function), ("vjp", vjp)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} is {value!r}; allowed is a function of NumPy arrays")
        self.function, self.vjp, self.per_image = function, vjp, per_image
        self.image_shape = None if image_shape is None else check_image_shape(image_shape)
        self.differentiable, self.pixelwise = vjp is not None, pixelwise

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to ``x`` ``(B, C, H, W)``.

        Raises:
            TypeError: the function gives something that is not numbers.
            ValueError: its result has no batch dimension, or images give results of different shapes.
        """
        self._check_image(x)
        if self.vjp is None:
            return self._evaluate(self.function, x)
        y: Tensor = _Differentiable.apply(x, self)
        return y

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"{name_of(self.function)}, per_image={self.per_image}, differentiable={self.differentiable}"

    def _evaluate(self, function: Callable[..., Any], *arguments: Tensor) -> Tensor:
        """The function or its vector-Jacobian product, of the batch or of one image after the other."""
        arrays, name = [to_array(argument) for argument in arguments], name_of(function)
        if self.per_image:
            results = [function(*images) for images in zip(*arrays, strict=True)]
            return to_tensor(stack(results, name), arguments[0], name)
        return to_tensor(check_batch(function(*arrays), len(arrays[0]), name), arguments[0], name)


class _Differentiable(torch.autograd.Function):
    """The function with its vector-Jacobian product as backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: NumpyOperator) -> Tensor:
        ctx.save_for_backward(x)
        ctx.operator = operator
        return operator._evaluate(operator.function, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("vjp has no derivative of its own: a NumpyOperator cannot be differentiated twice")
        (x,), operator = ctx.saved_tensors, ctx.operator
        gradient = operator._evaluate(operator.vjp, x, v)
        if gradient.shape != x.shape:
            raise ValueError(
                f"vjp gave shape {tuple(gradient.shape)} for images {tuple(x.shape)}; it must give the shape of x"
            )
        return gradient.real if gradient.is_complex() else gradient, None


def to_array(x: Tensor) -> Array:
    """A copy of ``x`` as NumPy array, in the memory of the CPU."""
    return np.array(x.detach().cpu().numpy())


def to_tensor(array: Array, like: Tensor, source: str) -> Tensor:
    """Numbers of any kind in the precision and on the device of ``like``.

    Args:
        array: of any shape; complex numbers stay complex.
        like: a real or complex tensor.
        source: where they come from, for errors.

    Raises:
        TypeError: they are not numbers.
    """
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{source} gave an array of dtype {array.dtype}; it must give numbers")
    dtype = like.real.dtype
    if array.dtype.kind == "c":
        dtype = dtype.to_complex()
    native = array.astype(array.dtype.newbyteorder("="))  # a copy: the source may reuse its memory
    return torch.from_numpy(native).to(dtype).to(like.device)


def check_batch(result: Any, batch: int, source: str) -> Array:
    """What was given for a batch of images as array ``(B, *y_shape)``.

    Raises:
        ValueError: it has no batch dimension.
    """
    array = np.asarray(result)
    if array.shape[:1] != (batch,):
        raise ValueError(
            f"{source} gave shape {array.shape} for {batch} images; it must keep the batch as first dimension "
            "(per_image=True calls it with one image at a time)"
        )
    return array


def stack(results: list[Any], source: str) -> Array:
    """What was given for each image of a batch as array ``(B, *y_shape)``.

    Raises:
        ValueError: the shapes differ.
    """
    arrays = [np.asarray(result) for result in results]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"{source} gave the shapes {sorted(shapes)} for images of one shape; they must be the same")
    return np.stack(arrays)


def name_of(function: object) -> str:
    """A function's name, for messages."""
    return str(getattr(function, "__name__", type(function).__name__))
