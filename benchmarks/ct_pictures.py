r"""Pictures for transmission tomography: slices of a head CT and phantoms of ellipses, 32 x 32, for a prior of both and to test it.

    apt-get install invesalius-examples
    python benchmarks/ct_pictures.py                                         # data/ct_pictures/{train,head,phantoms}.npy
    python training/train.py fit --config configs/training/ct_pictures.yaml  # runs/ct_pictures/prior
    for on in head phantoms; do
        python benchmarks/transmission_ct.py --prior runs/ct_pictures/prior --images data/ct_pictures/$on.npy \
            --width 24.5 --attenuation 0.6 --pictures 0 1 2 --skip steps timing --output benchmarks/results/transmission_ct_$on.json \
            --scans "60 views, 100,000 photons" "60 views, 300 photons" "60 views, 30 photons" \
            --methods poisson linearised subsets dpnp "dpnp, linearised" fbp
    done

Half of the training pictures are slices of the volume of ``benchmarks/head_ct.py``, of which nothing is part of this
project; the slices in ``head.npy`` and their neighbours are kept out. The others, and those of ``phantoms.npy``, are
bodies of an ellipse with others in it. Values are as there: -1 is air, 1 three times the attenuation of water.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from head_ct import MU_TOP, split, to_uint16, vary
from torch import Tensor

from dpnp_shared.phantoms import Ellipses

DATA = Path("data/ct_pictures")
SIZE = 32
PHANTOMS = 3  # to test on


def phantom(generator: torch.Generator, size: int = SIZE) -> Tensor:
    """A random body of an ellipse, every other one with a shell, with two to six ellipses in it; ``(1, size, size)`` in [-1, 1]."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    a, b, angle = between(0.55, 0.9), between(0.55, 0.9), between(0, 180)
    rows = [(between(0.8, 1.2), 0.0, 0.0, a, b, angle)]
    if between(0, 1) < 0.5:
        shell, thickness = between(0.5, 1.5), between(0.8, 0.93)
        rows += [(shell, 0.0, 0.0, a, b, angle), (-shell, 0.0, 0.0, thickness * a, thickness * b, angle)]
    for _ in range(int(between(2, 7))):
        value = between(-0.7, 0.9)
        rows.append(
            (value, between(-0.4, 0.4), between(-0.4, 0.4), between(0.06, 0.3), between(0.06, 0.3), between(0, 180))
        )
    water = Ellipses(tuple(rows)).image(size, size, 2 / size)
    return (2 * water / MU_TOP - 1).clamp(-1, 1).float()


def prepare(images: int, folder: Path) -> None:
    """Write so many training pictures, half of each kind in turn, and the test pictures."""
    slices, head = split(SIZE)
    generator = torch.Generator().manual_seed(0)
    phantoms = torch.stack([phantom(generator) for _ in range(PHANTOMS)])
    train = [to_uint16(vary(slices, generator) if i % 2 else phantom(generator)) for i in range(images)]
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.npy", np.concatenate(train))
    np.save(folder / "head.npy", head.numpy())
    np.save(folder / "phantoms.npy", phantoms.numpy())
    print(f"{images} training pictures, {len(head)} slices and {len(phantoms)} phantoms to test: {folder}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=20000, help="training pictures to make")
    options.add_argument("--folder", type=Path, default=DATA)
    arguments = options.parse_args()
    prepare(arguments.images, arguments.folder)


if __name__ == "__main__":
    main()
