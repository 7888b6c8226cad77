"""Denoising error of a prior at fixed noise levels, on held-out images.

    python benchmarks/denoising.py --prior fashion_mnist --data data

prints the root-mean-square error of ``D(x_0 + σ w; σ)`` over pixels and images as a Markdown table. With ``--update-card`` the figures are
written into the prior's card as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import torch

from dpnp_shared.prior import Prior, locate
from dpnp_training.data import ImageData

SIGMAS = (0.05, 0.1, 0.3, 1.0, 3.0, 10.0)


@torch.no_grad()
def rmse(prior: Prior, x_0: torch.Tensor, sigma: float, *, seed: int = 0) -> float:
    """Root-mean-square denoising error of images ``(N, C, H, W)`` at one noise level, in image units."""
    w = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
    error = torch.cat([prior(x + sigma * n, sigma) - x for x, n in zip(x_0.split(100), w.split(100), strict=True)])
    return math.sqrt(float(error.square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="fashion_mnist")
    parser.add_argument("--source", default="torchvision:FashionMNIST")
    parser.add_argument("--data", default="data", help="folder of torchvision's data sets")
    parser.add_argument("--images", type=int, default=300, help="the first so many test images")
    parser.add_argument("--update-card", action="store_true")
    arguments = parser.parse_args()
    prior = Prior.from_pretrained(arguments.prior)
    data = ImageData(arguments.source, split="test", validation_split="test", root=arguments.data)
    data.setup("validate")
    images = data.validation_set
    x_0 = torch.stack([images[i] for i in range(min(arguments.images, len(images)))])
    print(f"| σ | RMSE on {len(x_0)} test images |\n|---|---|")
    metrics = {}
    for sigma in SIGMAS:
        metrics[f"denoising RMSE at σ = {sigma:g}, first {len(x_0)} test images"] = value = rmse(prior, x_0, sigma)
        print(f"| {sigma:g} | {value:.4f} |")
    if arguments.update_card:
        prior.card = dataclasses.replace(prior.card, metrics={**prior.card.metrics, **metrics})
        prior.save_pretrained(locate(arguments.prior))


if __name__ == "__main__":
    main()
