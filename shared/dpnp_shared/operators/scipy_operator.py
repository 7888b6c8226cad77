"""Sparse matrices and linear operators of SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import linalg
from torch import Tensor

from dpnp_shared.operators.base import LinearOperator, Operator, check_image_shape
from dpnp_shared.operators.numpy_operator import to_array, to_tensor


class ScipyOperator(Operator):
    r""":math:`y = A\,\mathrm{vec}(x)` with a sparse matrix or a linear operator of SciPy; vec runs over ``(C, H, W)``.

    If ``A`` has an adjoint (``rmatvec``; a sparse matrix always has one), the object is a :class:`ScipyLinearOperator`, a
    linear operator whose gradient is the adjoint. If it has none, this class gives its values only. ``A`` is applied in
    the memory of the CPU. For a dense matrix see :class:`~dpnp_shared.operators.MatrixOperator`.

    Args:
        A: a ``scipy.sparse`` matrix or array ``(m, C·H·W)``, real or complex; the path of an ``.npz`` file that
            ``scipy.sparse.save_npz`` has written; a ``scipy.sparse.linalg.LinearOperator``, or anything that
            ``scipy.sparse.linalg.aslinearoperator`` takes. In YAML also ``path/to/file.py:Name`` of such an object.
        image_shape: ``(C, H, W)``.
        y_shape: of one measurement, with ``m`` entries; ``(m,)`` by default.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: ``A`` is of another kind.
        ValueError: the shapes do not fit, or a matrix has an entry that is not finite.
    """

    def __new__(
        cls,
        A: Callable[..., Any] | str,
        image_shape: tuple[int, int, int],
        y_shape: Sequence[int] | None = None,
    ) -> ScipyOperator:
        """Choose :class:`ScipyLinearOperator` where there is an adjoint."""
        return super().__new__(ScipyLinearOperator if cls is ScipyOperator and _has_adjoint(A) else cls)

    def __getnewargs__(self) -> tuple[None, None]:
        """For copies and pickles, which know the class already."""
        return None, None

    def __init__(
        self,
        A: Callable[..., Any] | str,
        image_shape: tuple[int, int, int],
        y_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.differentiable = isinstance(self, LinearOperator)
        c, h, w = self.image_shape = check_image_shape(image_shape)
        self.A = _as_scipy(A)
        m, d = (int(n) for n in self.A.shape)
        if d != c * h * w:
            raise ValueError(f"A has shape {(m, d)}; images of shape {(c, h, w)} need (m, {c * h * w})")
        self.y_shape = (m,) if y_shape is None else tuple(int(n) for n in y_shape)
        if math.prod(self.y_shape) != m:
            raise ValueError(f"y_shape = {self.y_shape} holds {math.prod(self.y_shape)} entries; A gives {m}")

    def forward(self, x: Tensor) -> Tensor:
        """``A vec(x)``, ``(B, *y_shape)``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        return self._multiply(self.A.matmat, x, self.y_shape)

    def extra_repr(self) -> str:
        """For ``repr``."""
        return f"{self.A!r}, image_shape={self.image_shape}, y_shape={self.y_shape}"

    def _multiply(self, matmat: Callable[[Any], Any], v: Tensor, shape: Sequence[int]) -> Tensor:
        """A product with each row of a batch."""
        product = np.asarray(matmat(to_array(v.flatten(1)).T))
        return to_tensor(product.T.reshape(len(v), *shape), v, type(self.A).__name__)


class ScipyLinearOperator(ScipyOperator, LinearOperator):
    r"""As :class:`ScipyOperator`, which gives this by itself where ``A`` has an adjoint.

    Of a complex ``A`` the adjoint is :math:`\mathrm{Re}\, A^H y`, since images are real.

    Raises:
        TypeError: ``A`` has no adjoint.
    """

    def __init__(
        self,
        A: Callable[..., Any] | str,
        image_shape: tuple[int, int, int],
        y_shape: Sequence[int] | None = None,
    ) -> None:
        if not _has_adjoint(A):
            raise TypeError(f"A is a {type(A).__name__} without rmatvec; ScipyOperator takes it, without an adjoint")
        super().__init__(A, image_shape, y_shape)

    def forward(self, x: Tensor) -> Tensor:
        """``A vec(x)``, ``(B, *y_shape)``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        y: Tensor = _Forward.apply(x, self)
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """``Re A^H y`` as images ``(B, C, H, W)``, of ``y`` ``(B, *y_shape)``."""
        if tuple(y.shape[1:]) != self.y_shape:
            raise ValueError(f"y has shape {tuple(y.shape)}; measurements are (B, {', '.join(map(str, self.y_shape))})")
        x: Tensor = _Adjoint.apply(y, self)
        return x


class _Forward(torch.autograd.Function):
    """The product with A, whose backward pass is the one with its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: ScipyLinearOperator) -> Tensor:
        ctx.operator = operator
        return ScipyOperator.forward(operator, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return ctx.operator.adjoint(v), None


class _Adjoint(torch.autograd.Function):
    """The product with the adjoint of A, whose backward pass is the one with A."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, operator: ScipyLinearOperator) -> Tensor:
        ctx.operator = operator
        shape = operator._known_image_shape("adjoint")
        x = operator._multiply(operator.A.rmatmat, y, shape)
        return x.real if x.is_complex() else x

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return ctx.operator(v), None


def _as_scipy(A: Any) -> Any:
    """``A`` as SciPy's linear operator, a matrix in the format that is fast at products."""
    if isinstance(A, str):
        if not A.endswith(".npz"):
            raise ValueError(f"A = {A!r}; a file must be .npz, written by scipy.sparse.save_npz")
        A = sparse.load_npz(A)
    if sparse.issparse(A):
        bad = int((~np.isfinite(A.data)).sum())
        if bad:
            raise ValueError(f"A holds {bad} entries that are NaN or infinite; all must be finite")
        A = A.tocsr()
    if isinstance(A, np.ndarray | Tensor):
        raise TypeError(f"A is a {type(A).__name__}; MatrixOperator takes dense matrices")
    try:
        return linalg.aslinearoperator(A)
    except TypeError as error:
        raise TypeError(
            f"A is a {type(A).__name__}; allowed are sparse matrices and linear operators of SciPy"
        ) from error


def _has_adjoint(A: Any) -> bool:
    """Whether the adjoint of ``A`` can be applied; SciPy says so only when it is tried."""
    if A is None:  # a copy or a pickle
        return False
    if isinstance(A, str) or sparse.issparse(A):
        return True
    operator = _as_scipy(A)
    try:
        operator.rmatvec(np.zeros(operator.shape[0], np.result_type(operator.dtype, np.float64)))
    except NotImplementedError:
        return False
    return True
