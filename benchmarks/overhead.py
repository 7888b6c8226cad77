"""What DPnP costs beside its network calls.

    python benchmarks/overhead.py

prints the wall time of a run with a closed-form proximal sampler over (network calls x the time of one call at the same batch).
The two are measured in turn in one process, several times, since machines drift; the median ratio counts.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from dpnp_inference import Annealing, DPnP
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise
from dpnp_shared.operators import GaussianBlur, RandomInpainting, SuperResolution
from dpnp_shared.prior import Prior


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="fashion_mnist")
    parser.add_argument("--chains", type=int, default=39)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prior = Prior.from_pretrained(arguments.prior)
    shape = prior.image_shape
    x = torch.randn(arguments.chains, *shape)
    annealing = Annealing(constant=0, decay=6, final=0)
    print(
        "| forward model | sampler | network calls | s a call | wall time (s) | ratio, median (all) |\n|---|---|---|---|---|---|"
    )
    for operator in (RandomInpainting(shape), SuperResolution(shape, 2), GaussianBlur(shape, 1.5)):
        model = ForwardModel(operator, GaussianNoise(0.05))
        y = model.simulate(torch.zeros(1, *shape), generator=torch.Generator().manual_seed(0))[0]
        for dds in ("ddim", "ddpm"):
            sampler = DPnP(prior, model, dds=dds, annealing=annealing)
            sampler.sample(y, chains=arguments.chains, seed=0)  # warm-up
            ratios, walls, calls_s = [], [], []
            for round_ in range(arguments.rounds):
                start = time.perf_counter()
                posterior = sampler.sample(y, chains=arguments.chains, seed=round_)
                walls.append(time.perf_counter() - start)
                calls = posterior.diagnostics["network_calls"]
                start = time.perf_counter()
                with torch.no_grad():
                    for _ in range(calls):
                        prior(x, 1.0)
                calls_s.append((time.perf_counter() - start) / calls)
                ratios.append(walls[-1] / (calls * calls_s[-1]))
            every = ", ".join(f"{r:.3f}" for r in ratios)
            print(
                f"| {type(operator).__name__} | {dds} | {calls} | {statistics.median(calls_s):.4f} | "
                f"{statistics.median(walls):.2f} | {statistics.median(ratios):.3f} ({every}) |"
            )


if __name__ == "__main__":
    main()
