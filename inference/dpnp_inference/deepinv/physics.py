r"""A deepinv physics as operator.

What a physics claims is tried on random images when the operator is built, and only what it keeps is used. All tensors of a physics
have one precision, mostly single; an image of another one meets a copy of the physics in that precision, where the physics can have it.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from deepinv.physics import DecomposablePhysics, Inpainting, LinearPhysics, Physics, StackedPhysics, ZeroNoise
from torch import Tensor, nn

from dpnp_shared.operators import LinearOperator, Operator, PhysicalUnits, Stack
from dpnp_shared.operators.base import check_image_shape

log = logging.getLogger(__name__)

ImageAs = Literal["auto", "real", "complex", "pair"]
TRIALS = 3  # images that a physics is tried on
TOLERANCE = 1e-4  # relative, of what must agree up to the rounding of single precision


class PhysicsOperator(PhysicalUnits):
    r"""Any ``deepinv.physics.Physics`` as operator: the noiseless ``physics.A`` of the image in the physics' units.

    When it is built, random images show whether ``A`` takes such images, gives the same measurement twice, and takes each image of a batch
    by itself; whether a ``LinearPhysics`` is linear; whether its ``A_adjoint`` is the transpose (else automatic differentiation takes
    its place, and the log says so); and whether the singular values of a ``DecomposablePhysics`` are those of ``A`` (else there are no
    closed forms, and the log says so). A linear physics is affine here, since the prior's value range is not [0, 1]; closed forms and
    conjugate gradients stay available (see :attr:`~dpnp_shared.operators.Operator.linear_part`).

    The measurements of a stack are flattened into one vector, as by :class:`~dpnp_shared.operators.Stack`;
    :func:`~dpnp_inference.deepinv.measurement` does that for deepinv's ``TensorList``. The physics' noise is not looked at; see
    :func:`~dpnp_inference.deepinv.from_physics`.

    Args:
        physics: of which a copy is taken. A configuration file gives its ``class_path`` and ``init_args``; see :func:`build_physics`.
        image_shape: ``(C, H, W)`` of the prior's images; by default the physics' ``img_size``.
        value_range: of the prior's images.
        physical_range: what the ends of ``value_range`` are to the physics.
        clamp: replace physical values beyond the first end of ``physical_range`` by it; see
            :class:`~dpnp_shared.operators.PhysicalUnits`.
        image_as: ``real``: images go to the physics as they are; ``complex``: as complex numbers without imaginary part;
            ``pair``: an image of one channel as two, real and imaginary part, the latter 0, as deepinv's MRI takes them. ``auto`` is
            complex where the physics says that its ``dtype`` is, else real.
        arguments: keyword arguments of ``physics.A`` and ``physics.A_adjoint``, for one image and with a batch dimension of 1 (a mask, a
            filter): tensors, numbers, lists, or ``.npy`` paths.
        seed: of what a physics from a configuration file draws when it is built.

    Raises:
        TypeError: ``physics`` is no Physics, or a measurement is not a tensor.
        ValueError: no image shape is known, ``A`` fails on images of that shape, or it does not keep what it claims.
    """

    def __init__(
        self,
        physics: dict[str, Any] | Physics,
        image_shape: tuple[int, int, int] | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        physical_range: tuple[float, float] = (0.0, 1.0),
        clamp: bool = False,
        image_as: ImageAs = "auto",
        arguments: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(physics, dict):
            physics = build_physics(physics, seed)
            if not isinstance(physics.noise_model, ZeroNoise):
                log.info("the noise of %s is not looked at, but the noise given beside it", type(physics).__name__)
        check_physics(physics)
        shape = known_shape(physics, image_as) if image_shape is None else check_image_shape(image_shape)
        if shape is None:
            raise ValueError(
                f"image_shape = None, and {type(physics).__name__} has no img_size (C, H, W); give image_shape"
            )
        super().__init__(_operator(physics, shape, image_as, arguments or {}), value_range, physical_range, clamp)


class PhysicsMap(Operator):
    """``A`` of a physics, in the physics' own units.

    Args:
        physics: of which a copy is taken.
        image_shape: ``(C, H, W)``.
        image_as: see :class:`PhysicsOperator`.
        arguments: likewise.

    Raises:
        TypeError: a measurement is not a tensor.
        ValueError: ``A`` fails, is random, or mixes the images of a batch.
    """

    def __init__(
        self, physics: Physics, image_shape: tuple[int, int, int], image_as: ImageAs, arguments: dict[str, Any]
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        if image_as not in ("auto", "real", "complex", "pair"):
            raise ValueError(f"image_as = {image_as!r}; allowed are 'auto', 'real', 'complex' and 'pair'")
        if image_as == "auto":
            dtype = getattr(physics, "dtype", None)
            image_as = "complex" if isinstance(dtype, torch.dtype) and dtype.is_complex else "real"
        if image_as == "pair" and self.image_shape[0] != 1:
            raise ValueError(f"image_as = 'pair' takes images of one channel, and image_shape = {self.image_shape}")
        self.image_as, self.name = image_as, type(physics).__name__
        self.physics = copy.deepcopy(physics).requires_grad_(False)
        self.arguments = nn.Module()
        for name, value in arguments.items():
            self.arguments.register_buffer(name, _tensor(value, name))
        self._copies: dict[torch.dtype, tuple[Physics, torch.dtype]] = {}
        self._try()
        self.differentiable = self._has_gradient()

    def forward(self, x: Tensor) -> Tensor:
        """``A(x)``, ``(B, *y_shape)``, of ``x`` ``(B, C, H, W)``."""
        self._check_image(x)
        physics, dtype = self._at(x.dtype)
        return _as_precise_as(x, self._call(physics, "A", self._embed(x.to(dtype))))

    def display(self, y: Tensor) -> Tensor | None:
        """The measurement itself where it has the image's shape; else, where it has 1 or 3 channels, scaled to [0, 1]."""
        y = y.abs() if y.is_complex() else y
        if tuple(y.shape) == self.image_shape:
            return y
        if y.ndim != 3 or y.shape[0] not in (1, 3):
            return None
        low, high = y.aminmax()
        return (y - low) / (high - low).clamp_min(torch.finfo(y.dtype).tiny)

    @property
    def unseen(self) -> Tensor | None:
        """Pixels that deepinv's ``Inpainting`` takes out; None for any other physics."""
        if not isinstance(self.physics, Inpainting) or self.image_as != "real":
            return None
        unseen: Tensor = self.physics.mask[0] == 0
        return unseen if bool(unseen.any()) else None

    def _call(self, physics: Physics, method: str, value: Tensor) -> Any:
        arguments = {name: _as_precise_as(value, argument) for name, argument in self.arguments.named_buffers()}
        return getattr(physics, method)(value, **arguments)

    def _embed(self, x: Tensor) -> Tensor:
        if self.image_as == "complex":
            return torch.complex(x, torch.zeros_like(x))
        return torch.cat([x, torch.zeros_like(x)], dim=1) if self.image_as == "pair" else x

    def _at(self, dtype: torch.dtype) -> tuple[Physics, torch.dtype]:
        """The physics in a precision, or in the nearest one that it can have, and that precision."""
        if dtype not in self._copies:
            for candidate in (dtype, torch.float32, torch.float64):
                physics = _cast(self.physics, candidate)
                try:
                    self._use(physics, self._images(candidate)[:1])
                except Exception as error:  # whatever a physics may raise
                    log.debug("%s in %s: %s", self.name, candidate, error)
                    continue
                if candidate != dtype:
                    log.warning("%s works in %s and not in %s", self.name, candidate, dtype)
                self._copies[dtype] = physics, candidate
                break
            else:
                raise ValueError(f"{self.name} no longer works, neither in {dtype} nor in single or double precision")
        return self._copies[dtype]

    def _use(self, physics: Physics, x: Tensor) -> None:
        """Use everything that will be used of a physics in another precision."""
        with torch.no_grad():
            self._call(physics, "A", self._embed(x))

    def _images(self, dtype: torch.dtype) -> Tensor:
        """Random images ``(TRIALS, C, H, W)``, uniform in [0, 1]."""
        shape = (TRIALS, *(self.image_shape or ()))
        images = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return images.to(dtype).to(device_of(self))

    @torch.no_grad()
    def _try(self) -> None:
        """Whether ``A`` is what an operator is."""
        dtype = _precision(self.physics)
        x = self._images(dtype)
        y = self._attempt(x)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{self.name}.A gives a {type(y).__name__}; allowed are a tensor, and stacks as the outermost physics"
            )
        if y.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"{self.name}.A gives {tuple(y.shape)} for images {tuple(x.shape)}; its first dimension must be the batch. "
                "A physics that holds the parameters of several images takes them as arguments, one image's at a time"
            )
        if not _close(y, self._attempt(x)):
            raise ValueError(f"{self.name}.A gives different measurements of the same images; it must not be random")
        first = self._attempt(x[:1])
        if first.shape[1:] != y.shape[1:] or not _close(first, y[:1]):
            raise ValueError(f"{self.name}.A of an image depends on the other images of its batch")
        self._copies = {dtype: (self.physics, dtype)}

    def _attempt(self, x: Tensor) -> Any:
        try:
            return self._call(self.physics, "A", self._embed(x))
        except Exception as error:  # whatever a physics may raise
            raise ValueError(
                f"{self.name}.A fails on images {tuple(x.shape)} taken as {self.image_as} numbers (image_shape, image_as): "
                f"{type(error).__name__}: {error}"
            ) from error

    def _has_gradient(self) -> bool:
        x = self._images(_precision(self.physics))[:1].requires_grad_(True)
        try:
            with torch.enable_grad():
                y = self(x)
                torch.autograd.grad(torch.view_as_real(y).sum() if y.is_complex() else y.sum(), x)
        except RuntimeError as error:
            log.warning("%s has no gradient by automatic differentiation: %s", self.name, error)
            return False
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PhysicsMap:
        """Move and cast: complex tensors stay complex, and modules that the physics keeps in lists come along."""
        self._copies = {}
        super()._apply(_keeping_complex(fn), recurse)  # type: ignore[no-untyped-call]
        for module in _hidden_modules(self.physics):
            module._apply(_keeping_complex(fn))  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._copies = {}  # of the old values
        super()._load_from_state_dict(*args, **kwargs)


class LinearPhysicsMap(PhysicsMap, LinearOperator):
    r"""A linear ``A``, in the physics' own units.

    ``A_adjoint`` is used where :math:`\langle v, A x\rangle = \langle A^* v, x\rangle` for random x and v, else the transpose is
    taken by automatic differentiation.

    With the :math:`V` and the singular values s of a ``DecomposablePhysics``, :math:`f(A^T A) = f(0) + V (f(s^2) - f(0)) V^T`, also
    where V has fewer columns than the image has entries. That holds for any f if :math:`V s^2 V^T` and :math:`V s^4 V^T` are
    :math:`A^T A` and its square, which is tried.

    Args:
        physics: a ``LinearPhysics``.
        image_shape: ``(C, H, W)``.
        image_as: see :class:`PhysicsOperator`.
        arguments: likewise.

    Raises:
        TypeError: as :class:`PhysicsMap`.
        ValueError: as :class:`PhysicsMap`, or ``A`` is not linear, or has neither a right adjoint nor a gradient.
    """

    own_adjoint = False  # whether the physics' A_adjoint is the transpose
    own_gradient = False  # whether automatic differentiation follows A
    diagonal = False  # whether the physics' singular values are those of A

    def __init__(
        self, physics: Physics, image_shape: tuple[int, int, int], image_as: ImageAs, arguments: dict[str, Any]
    ) -> None:
        super().__init__(physics, image_shape, image_as, arguments)
        x = self._images(_precision(self.physics)) - 0.5
        self._check_linear(x)
        self.own_gradient, self.differentiable = self.differentiable, True
        self._choose_adjoint(x)
        self.diagonal = isinstance(physics, DecomposablePhysics) and self.image_as == "real" and self._is_diagonal(x)

    def forward(self, x: Tensor) -> Tensor:
        """``A x``, ``(B, *y_shape)``, of ``x`` ``(B, C, H, W)``."""
        if self.own_gradient or not self.own_adjoint:
            return super().forward(x)
        y: Tensor = _LinearMap.apply(x, super().forward, self.adjoint)
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``, ``(B, C, H, W)``, of ``y`` ``(B, *y_shape)``."""
        if not self.own_adjoint:
            return super().adjoint(y)
        physics, dtype = self._at(y.real.dtype)
        image = self._call(physics, "A_adjoint", y.to(dtype.to_complex() if y.is_complex() else dtype))
        image = image.real if image.is_complex() else image
        return _as_precise_as(y.real, image[:, :1] if self.image_as == "pair" else image)

    @property
    def has_gram_function(self) -> bool:
        """Whether the physics' singular values are those of A."""
        return self.diagonal

    def gram_function(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """See :meth:`LinearOperator.gram_function <dpnp_shared.operators.LinearOperator.gram_function>`."""
        if not self.diagonal:
            return super().gram_function(f, x)
        self._check_image(x)
        physics, dtype = self._at(x.dtype)
        s = _square(physics.mask).to(dtype)
        f_0 = f(s.new_zeros(()))
        return _as_precise_as(x, f_0 * x + physics.V((f(s) - f_0) * physics.V_adjoint(x.to(dtype))))

    def norm(self) -> float:
        """Largest singular value, by power iteration where the physics does not know it."""
        return float(_square(self.physics.mask).max().sqrt()) if self.diagonal else super().norm()

    def _use(self, physics: Physics, x: Tensor) -> None:
        with torch.no_grad():
            y = self._call(physics, "A", self._embed(x))
            if self.own_adjoint:
                self._call(physics, "A_adjoint", y)
            if self.diagonal:
                physics.V(physics.V_adjoint(x))

    @torch.no_grad()
    def _check_linear(self, x: Tensor) -> None:
        y, scale = self(x), self(x).norm()
        together = self(x[:1] - 2 * x[1:2])
        if not float(self(torch.zeros_like(x[:1])).norm()) <= TOLERANCE * float(scale) or not _close(
            together, y[:1] - 2 * y[1:2]
        ):
            raise ValueError(
                f"{self.name} is a LinearPhysics and its A is not linear; give deepinv.physics.Physics(A=physics.A)"
            )

    def _choose_adjoint(self, x: Tensor) -> None:
        """Take the physics' own adjoint if it is one, else the gradient's."""
        if type(self.physics).A_adjoint is LinearPhysics.A_adjoint and self.physics.A_adj is None:
            reason = "has none"  # deepinv's default is automatic differentiation as well, but in single precision only
        else:
            self.own_adjoint = True
            try:
                error = self._adjoint_error(x)
            except Exception as failure:  # whatever a physics may raise
                reason = f"fails ({type(failure).__name__}: {failure})"
            else:
                if error <= TOLERANCE:
                    return
                reason = f"is not the transpose of its A (relative error {error:.1e})"
            self.own_adjoint = False
            log.warning("%s.A_adjoint %s; the transpose is taken by automatic differentiation", self.name, reason)
        if not self.own_gradient or not self._adjoint_error(x) <= TOLERANCE:
            raise ValueError(f"{self.name}.A_adjoint {reason}, and automatic differentiation gives no transpose of A")

    def _adjoint_error(self, x: Tensor) -> float:
        r"""Largest :math:`|\langle v, A x\rangle - \langle A^* v, x\rangle|` over what it would be for an unrelated pair."""
        with torch.no_grad():
            y = self(x)
        v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype).to(y.device)
        image = self.adjoint(v).detach()
        if image.shape != x.shape:
            raise ValueError(f"its shape is {tuple(image.shape)} and not {tuple(x.shape)}")
        left, right = _rows(v.conj() * y).real.sum(1), _rows(image * x).sum(1)
        scale = torch.maximum(_rows(y).abs().square().sum(1), _rows(image).square().sum(1)).sqrt()
        return float((left - right).abs().div(scale.clamp_min(torch.finfo(torch.float64).tiny)).max())

    @torch.no_grad()
    def _is_diagonal(self, x: Tensor) -> bool:
        self.diagonal = True
        gram = self.adjoint(self(x))
        try:
            right = _close(self.gram_function(lambda s: s, x), gram) and _close(
                self.gram_function(torch.square, x), self.adjoint(self(gram))
            )
        except Exception as error:  # whatever a physics may raise
            log.debug("%s: %s", self.name, error)
            right = False
        if not right:
            log.warning("%s: V and mask are no singular value decomposition of A; there are no closed forms", self.name)
        return right


class _LinearMap(torch.autograd.Function):
    """A linear map whose gradient is its adjoint, for maps that automatic differentiation cannot follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.maps = linear, adjoint
        return linear(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        linear, adjoint = ctx.maps
        return _LinearMap.apply(gradient, adjoint, linear), None, None


def check_physics(physics: Any) -> Physics:
    """``physics`` itself, where it is one.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(physics, Physics):
        raise TypeError(f"physics is a {type(physics).__name__}; allowed is a deepinv.physics.Physics")
    return physics


def known_shape(physics: Physics, image_as: ImageAs) -> tuple[int, int, int] | None:
    """Shape of the images by the ``img_size`` of a physics, where that is ``(C, H, W)``; a pair is one channel."""
    size = getattr(physics, "img_size", None) or getattr(physics, "imsize", None)  # the latter of Downsampling
    if isinstance(size, tuple | list) and len(size) == 3:
        c, h, w = check_image_shape(size)
        return (1, h, w) if image_as == "pair" else (c, h, w)
    parts = physics.physics_list if isinstance(physics, StackedPhysics) else []
    return next((shape for part in parts if (shape := known_shape(part, image_as)) is not None), None)


def build_physics(description: dict[str, Any], seed: int) -> Physics:
    """A physics from plain values.

    deepinv's constructors do not say enough of their types for a parser.

    Args:
        description: ``class_path`` and ``init_args``. Within the arguments, a list of numbers becomes a tuple; a list of lists, or
            a ``.npy`` path, a float32 tensor; and what has a ``class_path`` is built likewise, by a class or a function.
        seed: of what is drawn meanwhile, by PyTorch's global generator (which is as before afterwards) or by an argument ``rng``.

    Returns:
        The physics.

    Raises:
        ValueError: a path or an argument does not fit.
        TypeError: it is no physics.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return check_physics(_build(description, seed))


def _build(value: Any, seed: int) -> Any:
    if isinstance(value, str) and value.endswith(".npy"):
        return torch.from_numpy(np.load(value, allow_pickle=False)).float()
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, list):
        items = [_build(item, seed) for item in value]
        return tuple(items) if all(isinstance(item, int | float) for item in items) else items
    if not (isinstance(value, dict) and "class_path" in value):
        return value
    unknown = value.keys() - {"class_path", "init_args"}
    path, arguments = value["class_path"], value.get("init_args") or {}
    if unknown or not isinstance(path, str) or not isinstance(arguments, dict):
        raise ValueError(f"physics: {value}; allowed are a class_path and init_args")
    module, _, name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
        built = {key: _build(item, seed) for key, item in arguments.items()}
        if "rng" in inspect.signature(make).parameters:
            built.setdefault("rng", torch.Generator().manual_seed(seed))
        return make(**built)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"physics: {path}: {type(error).__name__}: {error}") from error


def _operator(
    physics: Physics, image_shape: tuple[int, int, int], image_as: ImageAs, arguments: dict[str, Any]
) -> Operator:
    if isinstance(physics, StackedPhysics) and type(physics).A is StackedPhysics.A:
        return Stack([_operator(part, image_shape, image_as, arguments) for part in physics.physics_list], image_shape)
    kind = LinearPhysicsMap if isinstance(physics, LinearPhysics) else PhysicsMap
    return kind(physics, image_shape, image_as, arguments)


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's tensors; the CPU for one that has none."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _tensor(value: Any, name: str) -> Tensor:
    """An argument as a tensor."""
    if isinstance(value, str):
        if not value.endswith(".npy"):
            raise ValueError(f"arguments: {name} = {value!r}; a file must be .npy")
        return torch.from_numpy(np.load(value, allow_pickle=False))
    return torch.as_tensor(value).detach().clone()


def _precision(physics: Physics) -> torch.dtype:
    """Double where a tensor of the physics is, else single."""
    tensors = [*physics.parameters(), *physics.buffers()]
    double = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if double else torch.float32


def _cast(physics: Physics, dtype: torch.dtype) -> Physics:
    """A copy in a precision, or the physics itself if that is its own."""
    if dtype == _precision(physics):
        return physics
    copied = copy.deepcopy(physics)
    fn = _keeping_complex(lambda t: t.to(dtype) if t.is_floating_point() else t)
    for module in (copied, *_hidden_modules(copied)):
        module._apply(fn)
    return copied


def _keeping_complex(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A cast or move that is applied to real and imaginary parts, since a cast to a real dtype drops the latter."""
    return lambda t: torch.view_as_complex(fn(torch.view_as_real(t.resolve_conj()))) if t.is_complex() else fn(t)


def _hidden_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in plain lists and tuples, which PyTorch does not know of."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, list | tuple):
                for item in value:
                    if isinstance(item, nn.Module):
                        yield item
                        yield from _hidden_modules(item)


def _as_precise_as(like: Tensor, value: Tensor) -> Tensor:
    """``value`` in the precision of ``like``, complex where it was; whole numbers as they are."""
    if value.is_complex():
        return value.to(like.real.dtype.to_complex())
    return value.to(like.real.dtype) if value.is_floating_point() else value


def _square(mask: Any) -> Tensor:
    value = torch.as_tensor(mask)
    return value.abs().square()


def _rows(value: Tensor) -> Tensor:
    """``(B, n)`` in double precision, on the CPU, since not every device has it."""
    return value.flatten(1).cpu().to(torch.complex128 if value.is_complex() else torch.float64)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two batches agree up to the tolerance, relative to the norm of the second; also where that is 0."""
    return float((a - b).norm()) <= TOLERANCE * max(float(b.norm()), math.sqrt(torch.finfo(torch.float32).tiny))
