"""Reconstructions for ``dpnp_training.callbacks.Reconstruction``, which names them by class path: training imports nothing from here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dpnp_inference.annealing import Annealing
from dpnp_inference.dpnp import DPnP
from dpnp_inference.metrics import coverage, psnr
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, Noise
from dpnp_shared.operators import Operator, RandomInpainting, as_operator
from dpnp_shared.prior import Prior


class HeldOutReconstruction:
    """Simulates a measurement of a clean image, draws from its posterior by DPnP, and scores the draws against the image.

    The measurement of an image is the same each time, and so is the randomness of the sampler; what changes is the prior.

    Args:
        operator: noiseless forward map; by default half of the pixels are missing at random.
        noise: noise model; Gaussian noise of standard deviation 0.05 by default, in the prior's units.
        dds: denoising sampler, ``ddim`` or ``ddpm``.
        annealing: coupling schedule.
        chains: independent chains of one draw each; 19 is the least that has 90% intervals.
        level: of the intervals whose coverage is reported.
        seed: of noise and chains.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        operator: Operator | Callable | None = None,  # type: ignore[type-arg] # jsonargparse wants it bare
        noise: Noise | None = None,
        dds: Literal["ddim", "ddpm"] = "ddim",
        annealing: Literal["auto"] | Annealing = "auto",
        chains: int = 19,
        level: float = 0.9,
        seed: int = 0,
    ) -> None:
        if not 0 < level < 1 or seed < 0:
            raise ValueError(f"level = {level} must be in (0, 1), and seed = {seed} not negative")
        if chains < (least := math.ceil(2 / (1 - level) - 1e-9) - 1):
            raise ValueError(f"chains = {chains} are too few for level = {level}; at least {least} are needed")
        self.operator, self.noise = operator, noise if noise is not None else GaussianNoise(0.05)
        self.dds, self.annealing, self.chains, self.level, self.seed = dds, annealing, chains, level, seed

    def __call__(self, prior: Prior, truth: Tensor) -> tuple[dict[str, float], Tensor]:
        """Measure and reconstruct.

        Args:
            prior: as trained so far.
            truth: clean image ``(C, H, W)`` in the prior's value range, on the prior's device.

        Returns:
            ``psnr`` of the posterior mean in dB, ``coverage`` of the intervals, ``coverage_expected``, which these have by construction,
            ``std``, the mean posterior standard deviation of a pixel; and a picture ``(1 or 3, H, 4 W)`` in [0, 1]: truth, mean,
            one draw, and the standard deviation, white at a quarter of the value range; of images that are neither gray nor RGB the
            first channel.

        Raises:
            ValueError: the forward model does not fit the image.
        """
        operator = self.operator if self.operator is not None else RandomInpainting(prior.image_shape)
        forward_model = ForwardModel(as_operator(operator, prior.image_shape), self.noise).to(truth.device)
        generator = torch.Generator(truth.device).manual_seed(self.seed)
        y = forward_model.simulate(truth[None], generator=generator)[0]
        sampler = DPnP(prior, forward_model, dds=self.dds, annealing=self.annealing)
        posterior = sampler.sample(y, chains=self.chains, seed=self.seed)
        mean, std, truth = posterior.mean, posterior.std, truth.cpu()
        low, high = prior.card.value_range
        covered, expected = coverage(posterior, truth, self.level)
        figures = {
            "psnr": psnr(mean, truth, (low, high)),
            "coverage": covered,
            "coverage_expected": expected,
            "std": float(std.mean()),
        }
        shown = [(x - low) / (high - low) for x in (truth, mean, posterior.flat[0])] + [4 * std / (high - low)]
        picture = torch.cat(shown, dim=2).clamp(0, 1)
        return figures, picture if len(picture) in (1, 3) else picture[:1]
