r"""Task-dependent denoisers: what UCoS trains, and what it samples with (Schneider et al. 2024, arXiv 2405.15643).

Of a linear Gaussian measurement :math:`y = A x_0 + N(0, \Gamma)` and a noisy image :math:`x_\sigma = x_0 + \sigma w`, all that bears on
:math:`x_0` is in one image (section 3; with the paper's time t, :math:`\sigma^2 = e^t - 1` and :math:`x_\sigma = e^{t/2} x_t`)

.. math:: m = \frac{x_\sigma}{\sigma^2} + A^T \Gamma^{-1} y, \qquad
          m \mid x_0 \sim N(P_\sigma x_0, P_\sigma), \qquad P_\sigma = A^T \Gamma^{-1} A + \sigma^{-2} I .

The task-dependent denoiser :math:`D(m; \sigma) = E[x_0 \mid m]` is therefore the posterior's denoiser, :math:`E[x_0 \mid x_\sigma, y]`. It
knows A and :math:`\Gamma` by its training, so that sampling with it applies :math:`A^T \Gamma^{-1}` once, to y, and A never.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import linalg
from torch import Tensor, nn

from dpnp_shared import model_card
from dpnp_shared.analytic import GaussianMixturePrior, GaussianPrior
from dpnp_shared.denoiser import expand_sigma
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators.base import LinearOperator, check_image_shape
from dpnp_shared.preconditioning import EDM
from dpnp_shared.prior import (
    CONFIG,
    WEIGHTS,
    PriorCard,
    PriorError,
    build,
    describe,
    load_weights,
    locate,
    read_config,
    to_weights,
    write_folder,
)

TOLERANCE = 1e-4
"""Relative difference up to which two tasks are the same one: float32 against float64."""
DENSE_PIXELS = 4096
"""Up to so many pixels all eigenvectors are computed unless fewer are asked for."""
IMAGES_AT_ONCE = 256


class Task(nn.Module):
    r"""A linear Gaussian measurement as UCoS needs it: of an affine operator, its linear part and what it gives for a blank image.

    Args:
        forward_model: a linear or affine operator with Gaussian noise.
        image_shape: ``(C, H, W)``.

    Attributes:
        linear: the forward model of :math:`y - A(0)`.
        probe: :math:`A^T \Gamma^{-1} u` of a fixed measurement u, ``(C, H, W)``; with ``offset`` it is the task's fingerprint.

    The operator and its adjoint are called once each when it is made.

    Raises:
        TypeError: the forward model is not linear Gaussian.
    """

    offset_entries: Tensor  # real, with a last dimension of 2 where the measurement is complex: complex buffers do not survive .to(dtype)
    probe: Tensor

    def __init__(
        self, forward_model: ForwardModel, image_shape: tuple[int, int, int], *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.linear = forward_model.homogeneous
        if not self.linear.linear_gaussian:
            raise TypeError(
                "a task-dependent denoiser needs a linear operator and GaussianNoise, got "
                f"{type(forward_model.operator).__name__} and {type(forward_model.noise).__name__}"
            )
        self.image_shape = check_image_shape(image_shape)
        device = next((t.device for t in forward_model.buffers()), torch.device("cpu"))
        with torch.no_grad():
            offset: Tensor = forward_model.operator(torch.zeros(1, *self.image_shape, dtype=dtype, device=device))
            self.is_complex = offset.is_complex()
            self.register_buffer("offset_entries", _entries(offset[0]))
            self.register_buffer("probe", self.back_projection(_probe_measurement(self.offset)[None] + offset)[0])

    @property
    def offset(self) -> Tensor:
        """:math:`A(0)`, ``(*y_shape)``."""
        return torch.view_as_complex(self.offset_entries) if self.is_complex else self.offset_entries

    @property
    def operator(self) -> LinearOperator:
        """The linear operator A."""
        assert isinstance(self.linear.operator, LinearOperator)  # see linear_gaussian
        return self.linear.operator

    @property
    def noise(self) -> GaussianNoise:
        """The noise, of covariance Γ."""
        assert isinstance(self.linear.noise, GaussianNoise)
        return self.linear.noise

    def back_projection(self, y: Tensor) -> Tensor:
        r""":math:`A^T \Gamma^{-1} (y - A(0))`, ``(B, C, H, W)``, of measurements ``(B, *y_shape)``; one call of the adjoint."""
        back: Tensor = self.operator.adjoint(self.noise.precision_mul(y - self.offset.to(y)))
        return back

    def gram(self, x: Tensor) -> Tensor:
        r""":math:`A^T \Gamma^{-1} A x`, ``(B, C, H, W)``."""
        product: Tensor = self.operator.adjoint(self.noise.precision_mul(self.operator(x)))
        return product


def _entries(y: Tensor) -> Tensor:
    """A measurement as real numbers, ``(*y_shape)`` or ``(*y_shape, 2)``."""
    return torch.view_as_real(y) if y.is_complex() else y


def _probe_measurement(like: Tensor) -> Tensor:
    """A fixed measurement that is like no other: quadratic phases, the same on all devices and releases."""
    k = torch.arange(1, like.numel() + 1, dtype=torch.float64)
    wave = torch.polar(torch.ones_like(k), (k**2 * math.sqrt(2)) % (2 * math.pi)).reshape(like.shape)
    return (wave if like.is_complex() else wave.real).to(like)


class Gram(nn.Module):
    r"""Eigenvectors of :math:`G = A^T \Gamma^{-1} A`, so that functions of it need neither A nor its adjoint.

    Args:
        image_shape: ``(C, H, W)``.
        rank: number of eigenvectors r.

    Attributes:
        eigenvalues: ``(r,)``, not negative.
        eigenvectors: ``(d, r)``, ``d = C·H·W``, orthonormal columns.
        rest: 0-d, the largest eigenvalue of the directions left out, which stands for all of theirs.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    rest: Tensor

    def __init__(self, image_shape: tuple[int, int, int], rank: int) -> None:
        super().__init__()
        d = math.prod(image_shape)
        if not 0 <= rank <= d:
            raise ValueError(f"rank = {rank}; allowed are 0 to {d}, the number of pixels")
        self.rank = rank
        self.register_buffer("eigenvalues", torch.zeros(rank))
        self.register_buffer("eigenvectors", torch.zeros(d, rank))
        self.register_buffer("rest", torch.zeros(()))

    @classmethod
    @torch.no_grad()
    def of(cls, task: Task, rank: int | None = None, *, dtype: torch.dtype = torch.float32) -> Gram:
        """Compute it, in float64.

        Args:
            task: gives G; it is applied to a basis of the images, or some ``2 rank`` times where not all is asked for.
            rank: leading eigenvectors; all by default.
            dtype: of the result.

        Raises:
            ValueError: ``rank`` is out of range, or left out for images of more than 4096 pixels.
        """
        d = math.prod(task.image_shape)
        if rank is None and d > DENSE_PIXELS:
            raise ValueError(
                f"rank = None means all {d} eigenvectors, which are too many; give how many of the leading ones to compute"
            )
        gram = cls(task.image_shape, d if rank is None else rank)

        def multiply(columns: np.ndarray) -> np.ndarray:
            x = torch.as_tensor(columns.T.reshape(-1, *task.image_shape).copy(), device=task.probe.device)
            return np.concatenate(
                [task.gram(part).flatten(1).cpu().numpy() for part in torch.split(x, IMAGES_AT_ONCE)]
            ).T

        if gram.rank >= d - 1:
            matrix = multiply(np.eye(d))
            computed = np.linalg.eigh((matrix + matrix.T) / 2)
        else:
            product = linalg.LinearOperator((d, d), matvec=multiply, matmat=multiply, dtype=np.float64)
            computed = linalg.eigsh(product, k=gram.rank + 1, which="LA", v0=np.cos(np.arange(d) ** 2))
        values, vectors = torch.from_numpy(computed[0]).clamp_min(0), torch.from_numpy(computed[1])
        kept = values.argsort(descending=True)
        gram.eigenvalues, gram.eigenvectors = values[kept[: gram.rank]], vectors[:, kept[: gram.rank]].contiguous()
        gram.rest = values[kept[gram.rank]] if gram.rank < d else values.new_zeros(())
        return gram.to(dtype)

    def apply_functions(self, x: Tensor, *functions: Callable[[Tensor], Tensor]) -> list[Tensor]:
        r""":math:`f(G)\,x` for each function f.

        Args:
            x: ``(B, C, H, W)``.
            functions: each maps eigenvalues ``(1, n)`` to ``(1 or B, n)``.

        Returns:
            One ``(B, C, H, W)`` for each function.
        """
        flat, V = x.flatten(1), self.eigenvectors.to(x.dtype)
        coefficients = flat @ V
        results = []
        for f in functions:
            values = f(self.eigenvalues.to(x.dtype)[None])
            if self.rank == V.shape[0]:
                results.append((coefficients * values) @ V.T)
            else:
                rest = f(self.rest.to(x.dtype)[None, None])
                results.append(rest * flat + (coefficients * (values - rest)) @ V.T)
        return [result.reshape(x.shape) for result in results]


class TaskDenoiser(nn.Module, ABC):
    r""":math:`D(m; \sigma) = E[x_0 \mid m]` of one task.

    Args:
        image_shape: ``(C, H, W)``.
        offset: ``offset_entries`` of the :class:`Task`.
        probe: of the :class:`Task`.

    Attributes:
        sigma_min: least noise level it may be used at, in image units.
        sigma_max: largest one.
        spread: standard deviation of the prior along its widest direction.
    """

    image_shape: tuple[int, int, int]
    sigma_min: float
    sigma_max: float
    spread: float
    offset: Tensor
    probe: Tensor

    def __init__(self, image_shape: tuple[int, int, int], offset: Tensor, probe: Tensor) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.register_buffer("offset", offset)
        self.register_buffer("probe", probe)

    @abstractmethod
    def forward(self, m: Tensor, sigma: float | Tensor) -> Tensor:
        """Denoise.

        Args:
            m: ``(B, C, H, W)``, see the top of this file.
            sigma: noise level, a float, 0-d or ``(B,)``, in image units.

        Returns:
            ``(B, C, H, W)`` in image units.
        """

    def check_task(self, task: Task) -> None:
        """Refuse another task than this denoiser's own.

        Raises:
            ValueError: says how far the two are apart.
        """
        if task.offset_entries.shape != self.offset.shape or task.probe.shape != self.probe.shape:
            raise ValueError(
                f"the denoiser is for images {tuple(self.probe.shape)} with measurements {tuple(self.offset.shape)}, the forward model "
                f"for {tuple(task.probe.shape)} and {tuple(task.offset_entries.shape)} (a last 2: real and imaginary part)"
            )
        for what, own, other in (("A^T Γ^-1", self.probe, task.probe), ("A(0)", self.offset, task.offset_entries)):
            difference = float((other.to(own) - own).abs().square().sum().sqrt())
            scale = float(own.abs().square().sum().sqrt())
            if not difference <= TOLERANCE * max(scale, 1e-6):
                raise ValueError(
                    f"the forward model is not the one this denoiser was made for: {what} differs by {difference:.3g}, where the "
                    f"denoiser's is {scale:.3g}; a task-dependent denoiser holds for one operator and one noise level only"
                )


class AnalyticTaskDenoiser(TaskDenoiser):
    r"""The exact one of a Gaussian or Gaussian mixture prior.

    With :math:`C = S S^T` the covariance of a component k, mean :math:`\mu_k` and :math:`h_k = m - P_\sigma \mu_k`,

    .. math:: E[x_0 \mid m, k] = \mu_k + S (I + S^T P_\sigma S)^{-1} S^T h_k, \qquad
              \log p(k \mid m) = \log w_k + \mu_k^T m - \tfrac12 \mu_k^T P_\sigma \mu_k
                  + \tfrac12 h_k^T S (I + S^T P_\sigma S)^{-1} S^T h_k + \text{const} .

    Args:
        prior: analytic.
        forward_model: linear or affine, Gaussian noise.

    Raises:
        TypeError: the prior is of another kind, or the forward model is not linear Gaussian.
    """

    def __init__(self, prior: GaussianPrior | GaussianMixturePrior, forward_model: ForwardModel) -> None:
        if not isinstance(prior, GaussianPrior | GaussianMixturePrior):
            raise TypeError(f"prior is a {type(prior).__name__}; allowed are GaussianPrior and GaussianMixturePrior")
        task = Task(forward_model, prior.image_shape, dtype=torch.float64)
        super().__init__(prior.image_shape, task.offset_entries, task.probe)
        self.sigma_min, self.sigma_max, self.spread = 0.0, math.inf, prior.spread
        self._means, self._log_weights, self._S = prior.components()
        identity = torch.eye(math.prod(prior.image_shape), dtype=torch.float64)
        with torch.no_grad():
            G = task.gram(identity.reshape(-1, *prior.image_shape)).flatten(1)
        self._G: Tensor = (G + G.T) / 2

    def forward(self, m: Tensor, sigma: float | Tensor) -> Tensor:
        """Exact ``D(m; sigma)`` in float64, given back in the dtype of ``m``; see :class:`TaskDenoiser`."""
        levels = expand_sigma(sigma, m).flatten().expand(len(m))
        out = torch.empty_like(m)
        for level in torch.unique(levels):
            rows = levels == level
            out[rows] = self._at(m[rows].flatten(1).double(), float(level)).to(m.dtype).reshape(-1, *m.shape[1:])
        return out

    def _at(self, m: Tensor, sigma: float) -> Tensor:
        """``(B, d)`` of ``m`` ``(B, d)``."""
        S, means = self._S, self._means
        P = self._G + sigma**-2 * torch.eye(len(self._G), dtype=torch.float64)
        B = torch.linalg.cholesky(torch.eye(S.shape[1], dtype=torch.float64) + S.T @ P @ S)
        half = torch.linalg.solve_triangular(B, S.T, upper=False)  # its square is the posterior covariance
        mean_P = means @ P
        u, v = m @ half.T, mean_P @ half.T  # (B, d), (K, d): h_k in these coordinates is u - v_k
        logits = (m @ means.T + self._log_weights - 0.5 * (mean_P * means).sum(1)) - u @ v.T + 0.5 * (v**2).sum(1)
        r = logits.softmax(1)
        denoised: Tensor = r @ means + (u - r @ v) @ half
        return denoised


@dataclass
class TaskCard(PriorCard):
    """A prior's card, and what it was trained for.

    Attributes:
        task: ``operator`` and ``noise`` in words, ``rank`` of the eigenvectors kept, and shape of a ``measurement``, with a last 2 for real
            and imaginary part.
    """

    task: dict[str, Any] = field(default_factory=dict)

    def markdown(self, picture: str | None = None) -> str:
        """The card as the README of its folder."""
        rows = [(key, f"`{value}`") for key, value in self.task.items()]
        return model_card.markdown(self, weights=WEIGHTS, picture=picture, words=WORDS, rows=rows)


WORDS = model_card.Words(
    intro="A task-dependent denoiser `D(m; σ)` (UCoS, `dpnp-imaging`): it draws from the posterior of images like those it was trained on, "
    "for **one forward operator and one noise level**, without applying the operator. It is no prior.",
    usage="""```python
from dpnp_inference.baselines import UCoS
from dpnp_shared import Prior

prior = Prior.from_pretrained("fashion_mnist")  # of the same images; it is not called
posterior = UCoS(prior, forward_model, denoiser="FOLDER").sample(y, chains=20, seed=0)
```

`forward_model` must be the one it was trained for, which is checked. Nothing in the folder is executed when it is loaded; its hashes are
checked first.""",
    pipeline="image-to-image",
    sizes="are refused",
)


class TrainedTaskDenoiser(TaskDenoiser):
    r"""A network as task-dependent denoiser.

    The entries of m span orders of magnitude, over σ and over the directions that A sees well or not at all. The preconditioning
    is that of EDM in each eigendirection of :math:`G = A^T \Gamma^{-1} A`, with the two functions

    .. math:: K_\sigma = (P_\sigma + s^{-2} I)^{-1}, \qquad C_\sigma = s^{-1} P_\sigma^{-1/2} K_\sigma^{1/2}, \qquad
              D(m; \sigma) = K_\sigma m + K_\sigma^{1/2} F(C_\sigma m;\ \tfrac14 \log \sigma) .

    For white images of standard deviation s, :math:`K_\sigma m` is the posterior mean, :math:`K_\sigma` the posterior covariance, and
    input and target of the network F are white of unit variance. Without a measurement (G = 0) this is EDM's preconditioning itself.

    Args:
        network: F.
        preconditioning: gives s (``sigma_data``) and the noise levels.
        gram: eigenvectors of G.
        offset: ``offset_entries`` of the :class:`Task`.
        probe: of the :class:`Task`.
        card: what it is.
    """

    def __init__(
        self, network: nn.Module, preconditioning: EDM, gram: Gram, offset: Tensor, probe: Tensor, card: TaskCard
    ) -> None:
        super().__init__(card.image_shape, offset, probe)
        self.network, self.preconditioning, self.gram, self.card = network, preconditioning, gram, card
        self.sigma_min, self.sigma_max = card.sigma_range
        self.spread = card.spread
        self.origin = ""

    def forward(self, m: Tensor, sigma: float | Tensor) -> Tensor:
        """See :class:`TaskDenoiser`.

        Raises:
            ValueError: σ is outside of the card's range, or ``m`` has another shape.
        """
        if tuple(m.shape[1:]) != self.image_shape:
            raise ValueError(f"m has shape {tuple(m.shape)}; this denoiser takes (B, *{self.image_shape})")
        levels = torch.as_tensor(sigma, dtype=torch.float64)
        if not bool(((levels >= self.sigma_min * (1 - 1e-5)) & (levels <= self.sigma_max * (1 + 1e-5))).all()):
            raise ValueError(
                f"sigma = {levels.flatten().tolist()[:4]} is outside of the noise levels this denoiser was made for, "
                f"[{self.sigma_min:g}, {self.sigma_max:g}]"
            )
        return denoise_task(self.network, self.preconditioning, self.gram, m, sigma)

    def save_pretrained(self, directory: str | Path, *, files: Mapping[str, bytes] | None = None) -> Path:
        """Write the portable folder, all of it or nothing; as :meth:`Prior.save_pretrained <dpnp_shared.prior.Prior.save_pretrained>`.

        Raises:
            PriorError: ``directory`` exists and holds something else, or a weight is not finite.
        """
        description = {"network": describe(self.network), "preconditioning": describe(self.preconditioning)}
        card = write_folder(Path(directory), description, self.card, to_weights(self), files or {})
        assert isinstance(card, TaskCard)
        self.card = card
        return Path(directory)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        trusted_modules: Sequence[str] = (),
    ) -> TrainedTaskDenoiser:
        """Load it; arguments as for :meth:`Prior.from_pretrained <dpnp_shared.prior.Prior.from_pretrained>`.

        Raises:
            PriorError: the folder is missing, damaged, was edited, or holds a prior; says what is wrong.
        """
        folder = locate(str(path_or_hub_id), revision)
        config = read_config(folder)
        try:
            if "task" not in config["card"]:
                raise PriorError(f"{folder} holds a prior, not a task-dependent denoiser")
            card = TaskCard(**config["card"])
            network = build(config["network"], trusted_modules)
            preconditioning = build(config["preconditioning"], ())
            if not isinstance(preconditioning, EDM):
                raise PriorError(f"{folder / CONFIG}: {config['preconditioning']['class_path']} is not EDM")
            offset = torch.zeros(*card.task["measurement"])
            gram = Gram(card.image_shape, card.task["rank"])
        except (KeyError, TypeError, ValueError) as error:
            raise PriorError(f"{folder / CONFIG}: {type(error).__name__}: {error}") from error
        denoiser = cls(network, preconditioning, gram, offset, torch.zeros(card.image_shape), card)
        load_weights(denoiser, folder / WEIGHTS, card.sha256)
        denoiser.origin = str(folder)
        return denoiser.eval().requires_grad_(False).to(device)


def denoise_task(network: nn.Module, preconditioning: EDM, gram: Gram, m: Tensor, sigma: float | Tensor) -> Tensor:
    """``D(m; σ)`` of a raw network by the preconditioning of :class:`TrainedTaskDenoiser`.

    Args:
        network: ``F``.
        preconditioning: gives ``sigma_data`` and the network's number for σ.
        gram: eigenvectors of G.
        m: ``(B, C, H, W)``.
        sigma: float, 0-d or ``(B,)``.

    Returns:
        ``(B, C, H, W)``, in the dtype of ``m``.
    """
    level = expand_sigma(sigma, m)
    precision, s = level.flatten(1) ** -2, preconditioning.sigma_data  # (1 or B, 1)

    def K(eigenvalues: Tensor) -> Tensor:  # noqa: N802 - the formula's name
        return 1 / (eigenvalues + precision + s**-2)

    def C(eigenvalues: Tensor) -> Tensor:  # noqa: N802
        return (K(eigenvalues) / (eigenvalues + precision)).sqrt() / s

    linear, scaled = gram.apply_functions(m, K, C)
    c_noise = preconditioning.coefficients(level).c_noise.flatten().expand(len(m))
    output: Tensor = network(scaled.to(next(network.parameters()).dtype), c_noise)
    (correction,) = gram.apply_functions(output.to(m.dtype), lambda eigenvalues: K(eigenvalues).sqrt())
    return linear + correction
