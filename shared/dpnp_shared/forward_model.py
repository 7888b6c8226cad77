r"""The measurement model :math:`p(y \mid x)`: an operator followed by noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators.base import LinearOperator, Operator, as_operator, check_image_shape


class ForwardModel(nn.Module):
    r""":math:`y \sim p(\,\cdot \mid A(x))`.

    Args:
        operator: an :class:`~dpnp_shared.operators.Operator`, or any module or function that maps images
            ``(B, C, H, W)`` to ``(B, *y_shape)``.
        noise: the law of ``y`` given the operator's output. It is bound to the operator (see
            :meth:`~dpnp_shared.noise.Noise.bind`): several measurements of one image may have noise of several kinds.

    Raises:
        TypeError: an argument is of another kind, or the noise is for another kind of operator.
        ValueError: the noise does not fit the operator's measurements.
    """

    def __init__(self, operator: Operator | nn.Module | Callable[[Tensor], Tensor], noise: Noise) -> None:
        super().__init__()
        if not isinstance(noise, Noise):
            raise TypeError(f"noise is a {type(noise).__name__}; allowed is a dpnp_shared.noise.Noise")
        self.operator = as_operator(operator)
        self.noise = noise.bind(self.operator)

    @property
    def differentiable(self) -> bool:
        """Whether autograd gives the gradient of :meth:`log_likelihood` in the image."""
        return self.operator.differentiable and self.noise.differentiable

    @property
    def pixelwise(self) -> bool:
        """Whether the likelihood is a product of one factor a pixel, as :meth:`pixel_log_likelihood` gives them."""
        return self.operator.pixelwise and self.noise.independent

    @property
    def linear_gaussian(self) -> bool:
        r"""Whether :math:`y = Ax + N(0, R)`, so that a Gaussian prior has a Gaussian posterior."""
        return isinstance(self.operator, LinearOperator) and isinstance(self.noise, GaussianNoise)

    @property
    def homogeneous(self) -> ForwardModel:
        r"""The model of :math:`y - A(0)` where the operator is affine and the noise Gaussian, else the model itself.

        It is linear Gaussian, so that the closed forms apply.
        """
        linear = self.operator.linear_part
        if linear is None or linear is self.operator or not isinstance(self.noise, GaussianNoise):
            return self
        return ForwardModel(linear, self.noise)

    @torch.no_grad()
    def homogeneous_measurement(self, y: Tensor, blank: Tensor) -> Tensor:
        r"""The measurement that goes with :attr:`homogeneous`: :math:`y - A(0)`, or ``y`` where that is the model itself.

        Args:
            y: ``(*y_shape)``.
            blank: an image ``(1, C, H, W)`` of zeros.

        Returns:
            ``(*y_shape)``.
        """
        if self.homogeneous is self:
            return y
        offset: Tensor = self.operator(blank)[0]
        return y - offset.to(y)

    def simulate(self, x: Tensor, *, generator: torch.Generator | None) -> Tensor:
        """Draw a measurement of each image.

        Args:
            x: ``(B, C, H, W)``.
            generator: source of the random numbers; None takes PyTorch's global one.

        Returns:
            ``(B, *y_shape)``.

        Raises:
            ValueError: the operator's output is not finite.
        """
        clean: Tensor = self.operator(x)
        bad = int((~clean.isfinite()).sum())
        if bad:
            raise ValueError(f"the operator gave {bad} entries of {clean.numel()} that are not finite")
        return self.noise.sample(clean, generator)

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Exact :math:`\log p(y \mid x)`, constants included.

        Args:
            x: ``(B, C, H, W)``.
            y: one measurement ``(*y_shape)`` for all images, or one for each ``(B, *y_shape)``.

        Returns:
            ``(B,)``.

        Raises:
            ValueError: ``y`` does not have the shape of the operator's output, or the noise's log density is
                not one number an image.
        """
        clean: Tensor = self.operator(x)
        if clean.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"the operator gave {tuple(clean.shape)} for images {tuple(x.shape)}; "
                "its first dimension must be the batch"
            )
        if y.shape not in (clean.shape[1:], clean.shape):
            raise ValueError(f"y has shape {tuple(y.shape)}; the operator gives {tuple(clean.shape[1:])} for one image")
        log_prob = self.noise.log_prob(y, clean)
        if log_prob.shape != x.shape[:1]:
            raise ValueError(
                f"{type(self.noise).__name__}.log_prob gave shape {tuple(log_prob.shape)} for a batch of "
                f"{x.shape[0]}; it must be ({x.shape[0]},)"
            )
        return log_prob

    def pixel_log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        r"""What each pixel contributes to :meth:`log_likelihood` where the model is :attr:`pixelwise`.

        Args:
            x: ``(B, C, H, W)``.
            y: one measurement ``(…, C, H, W)`` for all images, or one for each ``(B, …, C, H, W)``.

        Returns:
            ``(B, C, H, W)``.

        Raises:
            NotImplementedError: the noise of an entry depends on others.
            ValueError: the measurement does not have the image's dimensions last.
        """
        clean: Tensor = self.operator(x)
        if clean.shape[:1] + clean.shape[-3:] != x.shape:
            raise ValueError(
                f"the operator is pixelwise and gave {tuple(clean.shape)} for images {tuple(x.shape)}; "
                "it must give (B, …, C, H, W)"
            )
        return self.noise.entry_log_prob(y, clean).reshape(len(x), -1, *x.shape[1:]).sum(1)

    @torch.no_grad()
    def check_measurement(
        self,
        y: Tensor,
        image_shape: tuple[int, int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Try the model on two blank images, so that a measurement that does not fit fails early.

        Args:
            y: one measurement ``(*y_shape)``.
            image_shape: ``(C, H, W)``.
            dtype: of the images.
            device: of the images; by default that of ``y``.

        Raises:
            TypeError: ``y`` is not a tensor, or only one of ``y`` and the operator's output is complex.
            ValueError: ``y`` holds NaN or infinities or has another shape than the operator's output; that
                output has no batch dimension or is not finite; or the noise refuses ``y``.
        """
        if not isinstance(y, Tensor):
            raise TypeError(f"y is a {type(y).__name__}; it must be a torch.Tensor")
        nan, infinite = int(y.isnan().sum()), int(y.isinf().sum())
        if nan or infinite:
            raise ValueError(f"y holds {nan} NaN and {infinite} infinite entries of {y.numel()}; all must be finite")
        blank = torch.zeros(
            2, *check_image_shape(image_shape), dtype=dtype, device=y.device if device is None else device
        )
        clean = self.operator(blank)
        if not isinstance(clean, Tensor):
            raise TypeError(f"the operator gave a {type(clean).__name__}; it must give a torch.Tensor")
        if clean.shape[:1] != (2,):
            raise ValueError(
                f"the operator gave shape {tuple(clean.shape)} for two images {tuple(blank.shape)}; "
                "it must keep the batch as first dimension"
            )
        if y.shape != clean.shape[1:]:
            raise ValueError(
                f"y has shape {tuple(y.shape)}; for an image of shape {tuple(image_shape)} the operator "
                f"gives {tuple(clean.shape[1:])}. y is one measurement, without a batch dimension"
            )
        if y.is_complex() != clean.is_complex():
            raise TypeError(f"y has dtype {y.dtype}, the operator's output {clean.dtype}; one of them is complex")
        bad = int((~clean.isfinite()).sum())
        if bad:
            raise ValueError(
                f"the operator gave {bad} entries of {clean.numel()} that are not finite for a blank image"
            )
        self.log_likelihood(blank, y)

    @torch.no_grad()
    def linear_gaussian_dense(self, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        r"""Write out :math:`A` and :math:`R` of :math:`y = A\,\mathrm{vec}(x) + N(0, R)`, in float64.

        The operator is applied to the identity, so that this is for small images. Complex measurements are written as
        twice as many reals; see :func:`real_entries`.

        Args:
            image_shape: ``(C, H, W)``.

        Returns:
            ``A`` ``(m, C·H·W)`` and ``R`` ``(m, m)``.

        Raises:
            TypeError: the model is not linear Gaussian.
            ValueError: complex measurements have noise of a full covariance.
        """
        if not isinstance(self.operator, LinearOperator) or not isinstance(self.noise, GaussianNoise):
            raise TypeError(
                "a closed form needs a LinearOperator and GaussianNoise, got "
                f"{type(self.operator).__name__} and {type(self.noise).__name__}"
            )
        c, h, w = check_image_shape(image_shape)
        device = next(self.buffers()).device
        columns = self.operator(torch.eye(c * h * w, dtype=torch.float64, device=device).reshape(-1, c, h, w))
        A = real_entries(columns).T.contiguous()
        R = self.noise.covariance_matrix(columns.shape[1:])
        if columns.is_complex():
            if self.noise.sigma is None:
                raise ValueError("covariance is for real measurements, and the operator's are complex; give sigma")
            R = torch.kron(R, torch.eye(2, dtype=R.dtype, device=R.device))
        return A, R


def real_entries(y: Tensor) -> Tensor:
    """Measurements as real numbers, a complex entry as its real and its imaginary part, one after the other.

    Args:
        y: ``(B, *y_shape)``.

    Returns:
        ``(B, m)`` with as many entries as ``y`` has for one image, or twice as many where it is complex.
    """
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1)
