r"""What a sampler may ask of a forward operator.

An operator is noiseless and batched: it maps images :math:`x` ``(B, C, H, W)`` to measurements :math:`A(x)`
``(B, *y_shape)`` of any shape. What more it can do (a gradient, an adjoint, functions of :math:`A^T A` in
closed form) it says through attributes, and a sampler picks its method by them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import linalg
from torch import Tensor, nn


class Operator(nn.Module, ABC):
    """A noiseless forward operator :math:`A`, linear or not.

    Attributes:
        differentiable: whether autograd gives the gradient of :meth:`forward`.
        pixelwise: whether every entry of the measurement depends on one pixel only, its own: ``y_shape`` is then ``(C, H, W)``, or
            ``(…, C, H, W)`` where several entries see a pixel.
        image_shape: ``(C, H, W)`` of the images it takes, or None where it takes several.
    """

    differentiable: bool = True
    pixelwise: bool = False
    image_shape: tuple[int, int, int] | None = None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the operator.

        Args:
            x: images ``(B, C, H, W)`` in the prior's value range.

        Returns:
            ``A(x)``, ``(B, *y_shape)``; entry ``b`` depends on ``x[b]`` only.
        """

    def display(self, y: Tensor) -> Tensor | None:
        """One measurement as a picture, for reports.

        Args:
            y: ``(*y_shape)``, without a batch dimension.

        Returns:
            ``(C', H', W')`` in [-1, 1] as far as ``y`` is, or None where there is no natural picture.
        """
        return None

    def as_measurement(self, stored: Tensor) -> Tensor:
        """A measurement in the shape that :meth:`forward` gives, from the form in which files hold it.

        Args:
            stored: one measurement, without a batch dimension.

        Returns:
            ``(*y_shape)``; by default ``stored`` itself.
        """
        return stored

    @property
    def unseen(self) -> Tensor | None:
        """Pixels that the measurement says nothing about; None if there are none as such.

        Boolean, broadcastable to ``(C, H, W)``.
        """
        return None

    @property
    def linear_part(self) -> LinearOperator | None:
        """The linear L of an affine operator, ``A(x) = L x + A(0)``; None where it is not affine, or L is not known."""
        return None

    def _check_image(self, x: Tensor) -> None:
        """Refuse images of another shape than ``image_shape``, and a batch of none.

        Raises:
            ValueError: names both shapes.
        """
        if self.image_shape is not None and (x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape or not len(x)):
            c, h, w = self.image_shape
            raise ValueError(
                f"x has shape {tuple(x.shape)}; {type(self).__name__} takes images (B, {c}, {h}, {w}), B > 0"
            )


class FunctionOperator(Operator):
    """Any function or module ``A(x)`` as an operator.

    Args:
        function: maps ``(B, C, H, W)`` to ``(B, *y_shape)``. A module becomes a submodule.
        differentiable: False where autograd cannot follow the function (a simulator outside of PyTorch, say).
        pixelwise: True where every entry depends on its own pixel only; see :class:`Operator`.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], differentiable: bool = True, pixelwise: bool = False
    ) -> None:
        super().__init__()
        self.function = function
        self.differentiable, self.pixelwise = differentiable, pixelwise

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to ``x`` ``(B, C, H, W)``."""
        return self.function(x)


class LinearOperator(Operator):
    r"""A linear operator. Only :meth:`forward` has to be written; the rest has defaults or is optional.

    Args:
        image_shape: ``(C, H, W)``. The default :meth:`adjoint` and :meth:`norm` need it.
    """

    def __init__(self, image_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.image_shape = None if image_shape is None else check_image_shape(image_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Apply :math:`A^T`, by default as the gradient of :math:`\langle Ax, y\rangle` in x.

        Args:
            y: ``(B, *y_shape)``.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            ValueError: the operator was built without ``image_shape``.
        """
        shape = self._known_image_shape("adjoint")
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(y.shape[0], *shape, dtype=y.real.dtype, device=y.device, requires_grad=True)
            (gradient,) = torch.autograd.grad(self(x), x, grad_outputs=y, create_graph=y.requires_grad)
        return gradient

    @property
    def linear_part(self) -> LinearOperator:
        """The operator itself."""
        return self

    @property
    def has_gram_function(self) -> bool:
        """Whether :meth:`gram_function` exists in closed form."""
        return type(self).gram_function is not LinearOperator.gram_function

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r"""Apply :math:`f(A^T A) = V f(S^2) V^T` exactly, where :math:`A = U S V^T`.

        The result carries the rounding of ``x.dtype`` times the largest value of ``f``. Where ``f`` spans
        many orders of magnitude (:math:`1/(\lambda/\sigma^2 + 1/\eta^2)` at :math:`\eta \gg \sigma`), call
        it in float64.

        Args:
            f: maps a tensor of eigenvalues (real, not negative, any shape) elementwise to a real tensor.
            x: ``(B, C, H, W)``.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            NotImplementedError: there is no closed form; :attr:`has_gram_function` is False.
        """
        raise NotImplementedError(f"{type(self).__name__} has no closed form of f(A^T A); see has_gram_function")

    def norm(self) -> float:
        r"""Largest singular value :math:`\|A\|`, by default by power iteration on :math:`A^T A`.

        The iteration starts from a fixed vector and ends at a relative change of 1e-7.

        Raises:
            ValueError: the operator was built without ``image_shape``.
        """
        shape = self._known_image_shape("norm")
        tensors = list(itertools.chain(self.parameters(), self.buffers()))
        device = tensors[0].device if tensors else torch.device("cpu")
        double = any(t.dtype == torch.float64 for t in tensors)
        dtype = torch.float64 if double else torch.float32
        v = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device)
        eigenvalue = 0.0
        with torch.no_grad():
            for _ in range(1000):
                v = self.adjoint(self(v / v.norm()))
                previous, eigenvalue = eigenvalue, float(v.norm())
                if abs(eigenvalue - previous) <= 1e-7 * eigenvalue:  # also where A = 0
                    break
        return float(eigenvalue**0.5)

    def _known_image_shape(self, caller: str) -> tuple[int, int, int]:
        if self.image_shape is None:
            raise ValueError(
                f"{type(self).__name__}.{caller}: image_shape is None; pass image_shape=(C, H, W) to "
                f"LinearOperator.__init__ or override {caller}"
            )
        return self.image_shape


def as_operator(A: Any, image_shape: tuple[int, int, int] | None = None) -> Operator:
    """Take an operator, a module or a function where an operator is wanted.

    Args:
        A: an :class:`Operator` (returned as it is); any module or function that maps ``(B, C, H, W)`` to
            ``(B, *y_shape)`` (wrapped by :class:`FunctionOperator`); or a sparse matrix or linear operator of SciPy
            (wrapped by :class:`~dpnp_shared.operators.ScipyOperator`).
        image_shape: ``(C, H, W)``, which the last kind needs.

    Raises:
        TypeError: ``A`` is none of them.
        ValueError: no ``image_shape`` was given for an operator of SciPy.
    """
    if isinstance(A, Operator):
        return A
    if sparse.issparse(A) or isinstance(A, linalg.LinearOperator):
        from dpnp_shared.operators.scipy_operator import ScipyOperator  # which needs this module

        if image_shape is None:
            raise ValueError(f"operator is a {type(A).__name__} of SciPy; give ScipyOperator(A, image_shape=(C, H, W))")
        return ScipyOperator(A, image_shape)
    if isinstance(A, type) or not callable(A):
        got = f"the class {A.__name__}" if isinstance(A, type) else f"a {type(A).__name__}"
        raise TypeError(f"operator is {got}; allowed are an Operator, an nn.Module or a function A(x)")
    return FunctionOperator(A)


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return ``image_shape`` as a tuple ``(C, H, W)``.

    Raises:
        ValueError: it is not three positive whole numbers.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ValueError(f"image_shape = {image_shape}; allowed are three positive whole numbers (C, H, W)")
    return int(shape[0]), int(shape[1]), int(shape[2])


def array_argument(value: Any, name: str, *, allow_complex: bool = False) -> Tensor:
    """An array given as a tensor, as (nested) lists or numbers, or as the path of a ``.npy`` file.

    Args:
        value: the array, in any of these forms.
        name: the argument's name, for errors.
        allow_complex: take complex numbers as well.

    Returns:
        A tensor in float64, or complex128 where the array is complex, so that nothing is lost before it is cast at
        use.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: the array is complex and may not be.
        ValueError: the file is not ``.npy``, or an entry is not finite.
    """
    if isinstance(value, str | Path):
        if Path(value).suffix != ".npy":
            raise ValueError(f"{name} = {str(value)!r}; a file must be .npy")
        value = np.load(value, allow_pickle=False)
    exact = isinstance(value, Tensor | np.ndarray)
    array = torch.as_tensor(value) if exact else torch.as_tensor(value, dtype=torch.float64)
    if array.is_complex() and not allow_complex:
        raise TypeError(f"{name} has dtype {array.dtype}; it must be real")
    array = array.detach().to(torch.complex128 if array.is_complex() else torch.float64, copy=True)
    bad = int((~array.isfinite()).sum())
    if bad:
        raise ValueError(f"{name} holds {bad} entries that are NaN or infinite; all must be finite")
    return array
