"""What every noise model has, and what their densities share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dpnp_shared.operators.base import Operator, array_argument

Entries = float | list[float] | str | Tensor  # a number, or one an entry of the measurement; see entries_argument


class Noise(nn.Module, ABC):
    r"""The law :math:`p(y \mid \bar y)` of a measurement given its noiseless value :math:`\bar y = A(x)`.

    Attributes:
        counts: whether measurements are counts: whole numbers that a file gives as they are, never pixel values.
        differentiable: whether autograd gives the gradient of :meth:`log_prob` in the noiseless value.
    """

    counts: bool = False
    differentiable: bool = True

    @property
    def resolution(self) -> float | None:
        r"""The finest difference of a noiseless entry that one measurement can tell.

        That is :math:`1/\sqrt{I}` with the largest Fisher information :math:`I`. It sets the default end of
        a sampler's annealing; None where a noise model does not know it.
        """
        return None

    def fisher_information(self, clean: Tensor) -> Tensor | None:
        r"""What an entry tells about its noiseless value, :math:`I = E[(\partial_{\bar y} \log p(y \mid \bar y))^2]`.

        By default it is the :attr:`resolution`'s, whatever the value. A noise model defines it where the value decides about all of the
        image alike, as for an absorber; the default end of a sampler's annealing is then that for the prior's mean image. (Counts of
        single pixels leave it: what one photon tells is reached in the image's dark parts, of which the mean image has none.)

        Args:
            clean: noiseless values ``(B, *y_shape)``.

        Returns:
            ``(B, *y_shape)``, real and not negative, in the dtype of ``clean``; of complex entries that of each of both parts. None where
            a noise model does not know it.
        """
        return None if self.resolution is None else torch.full_like(clean.real, self.resolution**-2)

    @abstractmethod
    def sample(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw measurements.

        Args:
            clean: noiseless values ``(B, *y_shape)``.
            generator: source of the random numbers, drawn on its device and then moved to that of ``clean``.

        Returns:
            ``y``, ``(B, *y_shape)``.
        """

    @property
    def independent(self) -> bool:
        """Whether the entries of a measurement are independent of each other, so that :meth:`entry_log_prob` gives theirs."""
        kind = type(self)
        return kind.entry_log_prob is not Noise.entry_log_prob and kind.log_prob is Noise.log_prob

    def entry_log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        """Exact log density (or log probability, where ``y`` is discrete) of each entry, constants included.

        A noise model defines it where its entries are independent, and :meth:`log_prob` where they are not.

        Args:
            y: one measurement ``(*y_shape)``, or one for each noiseless value ``(B, *y_shape)``.
            clean: noiseless values ``(B, *y_shape)``.

        Returns:
            ``(B, *y_shape)``. Minus infinity where ``clean`` is outside of what the model allows, which samplers reject.

        Raises:
            NotImplementedError: the entries depend on each other.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define entry_log_prob, or log_prob where entries depend on each other"
        )

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        """Exact log density of measurements; see :meth:`entry_log_prob` for arguments and errors.

        Returns:
            ``(B,)``, summed in float64 where the device has it: samplers need small differences of large sums.
        """
        return sum_entries(self.entry_log_prob(y, clean))

    def bind(self, operator: Operator) -> Noise:
        """The noise model of an operator's measurements, as a forward model holds it.

        Args:
            operator: gives the noiseless measurements.

        Returns:
            The model itself, or a copy that knows what it has to know of the operator.
        """
        return self


def match(y: Tensor, clean: Tensor) -> Tensor:
    """Let ``y`` ``(*y_shape)`` or ``(B, *y_shape)`` broadcast against ``clean`` over the batch only.

    Args:
        y: one measurement, or one for each noiseless value.
        clean: noiseless values ``(B, *y_shape)``.

    Returns:
        ``(1, *y_shape)`` or ``(B, *y_shape)``, on the device of ``clean``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if y.shape == clean.shape[1:]:
        y = y[None]
    elif y.shape != clean.shape:
        raise ValueError(
            f"y has shape {tuple(y.shape)}; allowed are {tuple(clean.shape[1:])} and {tuple(clean.shape)}, "
            "the shape of the operator's output without and with its batch"
        )
    return y.to(clean.device)


def match_real(y: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`match`, for a law of real numbers, with both in float64 where the device has it.

    Args:
        y: one measurement ``(*y_shape)``, or one for each noiseless value ``(B, *y_shape)``.
        clean: noiseless values ``(B, *y_shape)``.

    Returns:
        ``y``, ``(1, *y_shape)`` or ``(B, *y_shape)``, and ``clean``.

    Raises:
        TypeError: one of them is complex.
        ValueError: the shapes do not fit.
    """
    y = match(y, clean)
    return widen(check_real(y, "y")), widen(check_real(clean, "clean"))


def check_real(value: Tensor, name: str) -> Tensor:
    """``value`` itself, where it is real.

    Args:
        value: of any shape.
        name: the argument's name, for errors.

    Returns:
        ``value``.

    Raises:
        TypeError: it is complex.
    """
    if value.is_complex():
        raise TypeError(f"{name} has dtype {value.dtype}; it must be real")
    return value


def widen(value: Tensor) -> Tensor:
    """``value`` in float64 where its device has it: a log density is a small difference of large terms."""
    return value if value.device.type == "mps" else value.double()


def drawing_device(clean: Tensor, generator: torch.Generator | None) -> torch.device:
    """Where the random numbers for ``clean`` are drawn: on the generator's device."""
    return clean.device if generator is None else generator.device


def sum_entries(terms: Tensor) -> Tensor:
    """Sum ``(B, *y_shape)`` to ``(B,)``, in float64 where the device has it."""
    dtype = terms.dtype if terms.device.type == "mps" else torch.float64
    return terms.reshape(terms.shape[0], -1).sum(1, dtype=dtype)


def positive(value: float, name: str) -> float:
    """``value`` itself, where it is a positive number.

    Args:
        value: a constructor's argument.
        name: the argument's name, for errors.

    Returns:
        ``value``.

    Raises:
        ValueError: it is not positive and finite.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value}; allowed is a positive number")
    return value


def entries_argument(value: Entries, name: str, *, zero: bool = False) -> Tensor:
    """A parameter that is positive, or not negative: a number, or one an entry of the measurement.

    Args:
        value: a number, a tensor, a list, or the path of a ``.npy`` file.
        name: the argument's name, for errors.
        zero: whether 0 is allowed.

    Returns:
        A tensor in float64, 0-d or to be spread over the entries by :func:`spread`.

    Raises:
        ValueError: it holds no entry, or one that is out of range or not finite.
    """
    parameter = array_argument(value, name)
    if not parameter.numel():
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}; it must hold at least one entry")
    least = float(parameter.min())
    if least < 0 or (least == 0 and not zero):
        raise ValueError(f"{name} = {least}; allowed are {'numbers of at least 0' if zero else 'positive numbers'}")
    return parameter


def spread(parameter: Tensor, like: Tensor, name: str) -> Tensor:
    """A parameter for measurements ``(B, *y_shape)``; never one that would broadcast them to more entries.

    Args:
        parameter: 0-d, or one an entry.
        like: measurements or noiseless values ``(B, *y_shape)``.
        name: the argument's name, for errors.

    Returns:
        The parameter in the real dtype of ``like``; it broadcasts to ``y_shape``.

    Raises:
        ValueError: it does not broadcast to ``y_shape``.
    """
    shape, y_shape = tuple(parameter.shape), tuple(like.shape[1:])
    tail = y_shape[len(y_shape) - len(shape) :]
    if len(shape) > len(y_shape) or any(s not in (1, n) for s, n in zip(shape, tail, strict=True)):
        raise ValueError(f"{name} has shape {shape}; it must broadcast to measurements of shape {y_shape}")
    return parameter.to(like.real.dtype)
