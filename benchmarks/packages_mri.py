"""MRI operators against sigpy, which has to be installed for it (pip install sigpy), and their time beside sigpy's.

    python benchmarks/packages_mri.py

Measurements and adjoints of random complex images through coil maps, in single precision. On the Cartesian grid the
reference is ``sigpy.mri.linop.Sense`` with the mask as weights, to a relative difference of 1e-6. Along radial spokes it is
``Sense`` with the trajectory as coordinates, to 1e-2, and ``sigpy.nufft`` with an oversampling of 2 and a kernel of width 8,
to 1e-4: sigpy's own defaults (1.25 and 4) err by some 1e-3. A larger difference ends the command with status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpnp_shared.operators import MRI, RadialMRI
from dpnp_shared.operators.coils import CoilOperator, birdcage_maps

SIZES = ((64, 64, 4), (65, 48, 3), (256, 256, 8))  # H, W, coils
FINE = {"oversamp": 2, "width": 8}


class Pair(NamedTuple):
    """An operator, and sigpy's of the same measurement.

    Attributes:
        operator: ours.
        name: sigpy's.
        forward: of a complex image ``(H, W)``.
        adjoint: of samples ``(coils, n)``.
        tolerance: relative difference that is allowed.
    """

    operator: CoilOperator
    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    adjoint: Callable[[np.ndarray], np.ndarray]
    tolerance: float


def pairs(sigpy: Any, sense: Any, h: int, w: int, coils: int) -> Iterator[Pair]:
    """All comparisons at one size."""
    maps = birdcage_maps(coils, h, w)
    maps = (maps / maps.abs().square().sum(0).sqrt()).to(torch.complex64)
    S = maps.numpy()

    grid = MRI((2, h, w), "poisson_disc", 4, coils=maps)
    seen = grid.mask.numpy()
    whole = sense(S, weights=seen.astype(np.float32))
    zero_filled = lambda y: grid.zero_filled(torch.from_numpy(y)).numpy()  # noqa: E731
    yield Pair(grid, "Sense", lambda u: (whole * u)[:, seen], lambda y: whole.H * zero_filled(y), 1e-6)

    radial = RadialMRI((2, h, w), spokes=h // 2, coils=maps)
    k = radial.trajectory.numpy().astype(np.float32)
    along = sense(S, coord=k)
    yield Pair(radial, "Sense", lambda u: along * u, lambda y: along.H * y, 1e-2)
    yield Pair(
        radial,
        "nufft, finer",
        lambda u: sigpy.nufft(S * u, k, **FINE),
        lambda y: (S.conj() * sigpy.nufft_adjoint(y, k, S.shape, **FINE)).sum(0),
        1e-4,
    )


def timed(run: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    """The result, and the milliseconds of the second of two runs."""
    run()
    start = time.perf_counter()
    result = run()
    return result, 1e3 * (time.perf_counter() - start)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Relative, in the Euclidean norm."""
    return float(np.linalg.norm(a.ravel() - b.ravel()) / np.linalg.norm(b.ravel()))


def as_complex(x: Tensor) -> np.ndarray:
    """``(1, 2, H, W)`` as a complex image ``(H, W)``."""
    return torch.complex(x[0, 0], x[0, 1]).numpy()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        import sigpy
        from sigpy.mri.linop import Sense
    except ImportError:
        sys.exit("packages_mri: the package sigpy is missing; pip install sigpy")
    good = True
    print("| operator | H x W, coils | against | y | adjoint | allowed | ms | sigpy's ms |\n" + "|---" * 8 + "|")
    for size in SIZES:
        for A, name, forward, adjoint, tolerance in pairs(sigpy, Sense, *size):
            x = torch.randn(1, 2, *size[:2], generator=torch.Generator().manual_seed(0))
            u = as_complex(x)
            y, ours = timed(lambda A=A, x=x: A(x)[0].numpy())
            expected, theirs = timed(lambda forward=forward, u=u: forward(u))
            back = as_complex(A.adjoint(torch.from_numpy(y)[None]))
            errors = difference(y, expected), difference(back, adjoint(y))
            good = good and max(errors) <= tolerance
            shape = f"{size[0]} x {size[1]}, {size[2]}"
            figures = f"{errors[0]:.1e} | {errors[1]:.1e} | {tolerance:g} | {ours:.2f} | {theirs:.2f}"
            print(f"| {type(A).__name__} | {shape} | {name} | {figures} |")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
