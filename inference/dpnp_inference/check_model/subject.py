"""What all checks look at: the model, images to try it on, and a copy of it in double precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dpnp_inference.annealing import Annealing
from dpnp_inference.check import ExactPrior
from dpnp_inference.check_model.finding import Finding
from dpnp_inference.dds import DenoisingSampler
from dpnp_inference.proximal import ProximalSampler
from dpnp_shared.denoiser import Denoiser
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import Noise
from dpnp_shared.operators import Operator
from dpnp_shared.prior import Prior
from dpnp_shared.randomness import derive_seed
from dpnp_shared.solvers import denoise_noise

TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-6,
}  # of identities, relative; numbers of the model may be rounded to 1e-7
TINY = 1e-300  # in place of 0 where something is divided by a size
PRIOR_CALLS = 20


@dataclass
class Subject:
    """What all checks look at.

    Attributes:
        prior: gives the images.
        forward_model: is checked.
        images: ``(n, C, H, W)``, draws from the prior in the precision that is sampled in.
        values: of a pixel, ``(low, high)``.
        y: the measurement to come, if there is one.
        proximal: ``auto`` or a sampler.
        annealing: ``auto`` or a schedule.
        dds: denoising sampler.
        chains: of the run to come.
        seed: of all random numbers.
        eta_max: coupling at which the annealing starts, in image units.
        spread: standard deviation of the pixels.
        precise: the model in double precision, or itself where that does not work.
        exact: dtype of the images that it takes.
        precision: that it really computes in.
    """

    prior: Denoiser
    forward_model: ForwardModel
    images: Tensor
    values: tuple[float, float]
    y: Tensor | None
    proximal: Literal["auto"] | ProximalSampler
    annealing: Literal["auto"] | Annealing
    dds: Literal["ddim", "ddpm"] | DenoisingSampler
    chains: int
    seed: int

    def __post_init__(self) -> None:
        given = self.annealing.eta_max if isinstance(self.annealing, Annealing) else None
        self.eta_max = min(self.prior.spread, self.prior.sigma_max) if given is None else given
        self.spread = max(float(self.images.std()), 1e-3 * self.eta_max)
        self.precise, self.exact, self.precision = self._precise()

    @property
    def operator(self) -> Operator:
        """The forward map."""
        return self.forward_model.operator

    @property
    def noise(self) -> Noise:
        """The noise model."""
        return self.forward_model.noise

    @property
    def tolerance(self) -> float:
        """Of an identity that is tried on the precise model."""
        return TOLERANCE[self.precision]

    def generator(self, purpose: int) -> torch.Generator:
        """Random numbers of one check."""
        return torch.Generator().manual_seed(derive_seed(self.seed, purpose))

    def normal(self, like: Tensor, purpose: int) -> Tensor:
        """Standard normal numbers like ``like``, which may be complex."""
        return torch.randn(like.shape, generator=self.generator(purpose), dtype=like.dtype).to(like.device)

    def noisy_images(self, n: int, purpose: int, sigma: float) -> Tensor:
        """Draws with noise of standard deviation ``sigma``, for the precise model, ``(n, C, H, W)``."""
        x = self.images[torch.arange(n) % len(self.images)].to(self.exact)
        return x + sigma * self.normal(x, purpose)

    def special_images(self) -> dict[str, Tensor]:
        """Images of one value each."""
        blank = torch.zeros_like(self.images[:1])
        low, high = self.values
        constant = {f"an image of {value:.3g} everywhere": torch.full_like(blank, value) for value in (low, high)}
        return {"a blank image": blank, **constant}

    def differ(self, found: Tensor, expected: Tensor) -> tuple[float, float]:
        """The share of entries that differ by more than rounding, and the largest difference over the largest entry."""
        if found.shape != expected.shape:
            return 1.0, math.inf
        same = (found == expected) | (found.isnan() & expected.isnan())
        largest = expected.abs().nan_to_num(0.0, 0.0, 0.0).max() if expected.numel() else 0.0
        relative = torch.where(same, 0.0, (found - expected).abs().double() / max(float(largest), TINY))
        relative = relative.nan_to_num(math.inf, math.inf)
        return float((relative > TOLERANCE[self.images.dtype]).double().mean()), float(relative.max())

    def _precise(self) -> tuple[ForwardModel, torch.dtype, torch.dtype]:
        """The model in double precision, or itself where that does not work; the dtype of its images; its real precision."""
        model, x = self.forward_model, self.images[:2]
        if x.device.type == "mps":
            return model, x.dtype, torch.float32
        step = 1e-3 * self.spread
        exact = x.double() + step * self.normal(x.double(), 1)  # of which no number is in single precision by chance
        try:
            double, y = in_double(model, exact)
            if y.real.dtype != torch.float64:
                return model, x.dtype, torch.float32
            with torch.no_grad():
                changed = rows(double.operator(exact + step)) != rows(y)
        except Exception:  # the user's code; the check of the dtype says what it is
            return model, x.dtype, x.dtype
        parts = real(rows(y))
        rounded = (parts.float().double() == parts) & (parts != 0)
        # numbers that change with the image, unlike levels, and are all in single precision
        single = float(changed.double().mean()) > 0.5 and float(rounded.double().mean()) > 0.99
        return double, torch.float64, torch.float32 if single else torch.float64


Check = Callable[[Subject], Iterator[Finding]]


def in_double(forward_model: ForwardModel, x: Tensor) -> tuple[ForwardModel, Tensor]:
    """A copy of the model in double precision (the model itself where it has no numbers to cast), and its output for ``x``."""
    numbers = [*forward_model.parameters(), *forward_model.buffers()]
    model = copy.deepcopy(forward_model).double() if numbers else forward_model
    with torch.no_grad():
        y: Tensor = model.operator(x)
    return model, y


@torch.no_grad()
def draw_images(prior: Denoiser, shape: tuple[int, int, int], n: int, *, seed: int, dtype: torch.dtype) -> Tensor:
    """Draws from a prior, those of a trained one within the range of a pixel.

    Args:
        prior: an analytic prior draws exactly, a trained one by its probability flow.
        shape: ``(C, H, W)``.
        n: how many.
        seed: not negative.
        dtype: of the images.

    Returns:
        ``(n, C, H, W)`` on the prior's device.
    """
    device = next((t.device for t in (*prior.parameters(), *prior.buffers())), torch.device("cpu"))
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    if isinstance(prior, ExactPrior) and shape == prior.image_shape:
        return prior.sample(n, generator=generator, dtype=dtype).to(device)
    noise = torch.randn((n, *shape), generator=generator, dtype=dtype).to(device)
    x = denoise_noise(prior, noise, PRIOR_CALLS)
    return x.clamp(*prior.card.value_range) if isinstance(prior, Prior) else x


def size(v: Tensor) -> float:
    """Euclidean norm of all entries."""
    return float(torch.linalg.vector_norm(v.detach().flatten()))


def rows(y: Tensor) -> Tensor:
    """Measurements ``(B, *y_shape)`` as ``(B, m)``."""
    return y.reshape(len(y), -1)


def real(y: Tensor) -> Tensor:
    """Real and imaginary parts as entries of their own."""
    return torch.view_as_real(y) if y.is_complex() else y


def span(y: Tensor) -> str:
    """Smallest and largest entry, in words."""
    parts = real(y)
    return f"{float(parts.min()):.3g} to {float(parts.max()):.3g}"


def shape_of(x: Tensor) -> str:
    """``(C, H, W)``, in words."""
    return str(tuple(x.shape))


def name_of(dtype: torch.dtype) -> str:
    """``float32``, in words."""
    return str(dtype).removeprefix("torch.")
