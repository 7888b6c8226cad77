r"""Training of a task-dependent denoiser (UCoS; Schneider et al. 2024, arXiv 2405.15643).

For a linear Gaussian measurement :math:`y = A x_0 + \Gamma^{1/2} \varepsilon_2` the network sees, with :math:`\sigma^2 = e^t - 1`,

.. math:: m = \frac{x_0}{\sigma^2} + A^T \Gamma^{-1} A x_0 + \frac{\varepsilon_1}{\sigma} + A^T \Gamma^{-1/2} \varepsilon_2
            = \frac{x_0 + \sigma \varepsilon_1}{\sigma^2} + A^T \Gamma^{-1} y

and learns :math:`x_0` by least squares, :math:`\lambda(\sigma) |D_\theta(m; \sigma) - x_0|^2`. The second form shows that this is
denoising score matching of the posterior's denoiser :math:`x_\sigma \mapsto D_\theta(x_\sigma/\sigma^2 + A^T \Gamma^{-1} y; \sigma)`:
distributions of σ, weightings and validation figures are those of any prior's training. The minimiser is :math:`E[x_0 \mid m]`
whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpnp_shared.denoiser import expand_sigma
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import Noise
from dpnp_shared.operators import Operator
from dpnp_shared.preconditioning import EDM, Preconditioning
from dpnp_shared.prior import PriorCard
from dpnp_shared.task import Gram, Task, TaskCard, TrainedTaskDenoiser, denoise_task
from dpnp_training.share import Share


@dataclass
class MeasurementTask:
    """What a task-dependent denoiser is trained for.

    Args:
        operator: linear or affine, with an image shape of its own.
        noise: Gaussian.
        rank: eigenvectors of ``A^T Γ^-1 A`` that the preconditioning knows, the leading ones; all by default, which images of more than
            4096 pixels do not allow.
    """

    operator: Operator
    noise: Noise
    rank: int | None = None


class TaskObjective(nn.Module):
    """The task while it is being learned.

    Args:
        settings: operator, noise and rank.
        preconditioning: must be EDM.

    Raises:
        TypeError: the preconditioning is another one, or the forward model is not linear Gaussian.
        ValueError: the operator does not say the shape of its images, or the rank is out of range.
    """

    def __init__(self, settings: MeasurementTask, preconditioning: Preconditioning) -> None:
        super().__init__()
        if not isinstance(preconditioning, EDM):
            raise TypeError(f"preconditioning is {type(preconditioning).__name__}; a measurement task takes EDM")
        if settings.operator.image_shape is None:
            raise ValueError(f"task.operator: {type(settings.operator).__name__} has no image_shape; give it one")
        model = ForwardModel(settings.operator, settings.noise)
        self.preconditioning = preconditioning
        self.task = Task(model, settings.operator.image_shape, dtype=torch.float64)
        self.gram = Gram.of(self.task, settings.rank)
        self.words = {"operator": repr(settings.operator), "noise": repr(settings.noise), "rank": self.gram.rank}
        self.task.float()

    @torch.no_grad()
    def measure(self, x_0: Tensor, *, generator: torch.Generator, share: Share) -> Tensor:
        r""":math:`A^T \Gamma^{-1} y` of a measurement of each image.

        Args:
            x_0: clean images ``(B, C, H, W)``.
            generator: of the noise, on the device of ``x_0``; the same for all shares of a batch.
            share: which images of the whole batch these are.

        Returns:
            ``(B, C, H, W)``.
        """
        y = self.task.operator(x_0)
        w = share.normal_like(y, generator)
        if y.is_complex():
            w = w * 2**0.5  # PyTorch's complex normal has variance 1/2 in each part
        noise, adjoint = self.task.noise, self.task.operator.adjoint
        return adjoint(noise.precision_mul(y + noise.sqrt_mul(w)))

    def denoiser(
        self, network: nn.Module, x_0: Tensor, *, generator: torch.Generator, share: Share
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser of each image's own posterior, given a measurement as :meth:`measure` draws it, from the same arguments.

        Args:
            network: that is trained.
            x_0: clean images ``(B, C, H, W)``.
            generator: of the noise.
            share: which images of the whole batch these are.

        Returns:
            ``D(x; σ)`` of ``x`` ``(B, C, H, W)``, noisy versions of these images in the same order, and σ ``(B,)``.
        """
        back = self.measure(x_0, generator=generator, share=share)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            m = x / expand_sigma(sigma, x) ** 2 + back
            return denoise_task(network, self.preconditioning, self.gram, m, sigma)

        return denoise

    def card(self, card: PriorCard) -> TaskCard:
        """A prior's card as that of this task."""
        task: dict[str, Any] = {**self.words, "measurement": list(self.task.offset_entries.shape)}
        return TaskCard(**vars(card), task=task)

    def export(self, network: nn.Module, card: TaskCard) -> TrainedTaskDenoiser:
        """The portable denoiser; it shares the tensors."""
        return TrainedTaskDenoiser(
            network, self.preconditioning, self.gram, self.task.offset_entries, self.task.probe, card
        )
