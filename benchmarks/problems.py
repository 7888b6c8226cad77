"""Problems whose posterior is known exactly."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import FashionMNIST

from dpnp_shared.analytic import GaussianMixturePrior
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import BoxInpainting, Inpainting, MatrixOperator, Operator, RandomInpainting, SuperResolution

IMAGE_SHAPE = (1, 28, 28)


def mixture(d: int, seed: int | tuple[int, ...]) -> GaussianMixturePrior:
    """25 components of variance 1 in d dimensions, with means ``(8i, 8j, 8i, 8j, …)``, i and j from -2 to 2, and random weights."""
    i, j = torch.meshgrid(torch.arange(-2, 3), torch.arange(-2, 3), indexing="ij")
    means = 8.0 * torch.stack([i.flatten(), j.flatten()], 1).repeat(1, d // 2)
    weights = np.random.default_rng(seed).dirichlet(np.ones(25))
    return GaussianMixturePrior(means, torch.from_numpy(weights), 1.0, (1, 1, d))


def mixture_problem(d: int, m: int, seed: int) -> tuple[GaussianMixturePrior, ForwardModel, Tensor]:
    """A problem of the mixture benchmark of Cardoso et al. (MCGdiff, ICLR 2024): prior, forward model and measurement.

    The m x d matrix is Gaussian with its singular values replaced by sorted uniforms on [0, 1]; the noise's standard deviation is
    uniform between 0 and the largest of them.
    """
    random = np.random.default_rng((d, m, seed))
    prior = mixture(d, (d, m, seed, 1))
    U, _, Vt = np.linalg.svd(random.standard_normal((m, d)), full_matrices=False)
    S = np.sort(random.uniform(size=m))[::-1]
    model = ForwardModel(
        MatrixOperator(torch.from_numpy((U * S) @ Vt), (1, 1, d)), GaussianNoise(random.uniform() * S[0])
    )
    generator = torch.Generator().manual_seed(seed)
    x = prior.sample(1, generator=generator, dtype=torch.float64)
    return prior, model, model.simulate(x, generator=generator)[0]


@functools.cache
def image_mixture(data: str) -> GaussianMixturePrior:
    """Components of variance 0.02 around the first 2,000 images of Fashion-MNIST, in [-1, 1]; downloaded to ``data`` if not there."""
    images = FashionMNIST(data, train=True, download=True).data[:2000]
    return GaussianMixturePrior(images.flatten(1).double() / 127.5 - 1, "equal", 0.02, IMAGE_SHAPE)


def image_operator(name: str, seed: int) -> Operator:
    """A linear operator on 28 x 28 images; the seed chooses which pixels a sparse measurement sees."""
    if name == "lower half":
        mask = torch.ones(28, 28)
        mask[14:] = 0
        return Inpainting(mask)
    if name == "box":
        return BoxInpainting(IMAGE_SHAPE, 7, 7, 14, 14)
    if name == "super-resolution":
        return SuperResolution(IMAGE_SHAPE, 4)
    if name == "sparse":
        return RandomInpainting(IMAGE_SHAPE, missing=0.97, seed=seed)
    raise ValueError(f"name = {name!r}; allowed are {', '.join(IMAGE_OPERATORS)}")


IMAGE_OPERATORS = ("lower half", "box", "super-resolution", "sparse")
