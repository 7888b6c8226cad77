"""CT and MRI of real anatomy: a head CT's slices, with a prior trained on other slices of the same head.

The volume is the example of Debian's package ``invesalius-examples`` (108 slices of 256 x 256, 0.96 mm pixels, 1.5 mm apart);
nothing of it is part of this project. Three blocks of five slices and two neighbours on either side are kept out of the training
set, and the middle slice of each block is reconstructed. It is one head, so that the figures tell how well the samplers use a
prior that fits, not how a prior of one patient does on another.

    apt-get install invesalius-examples
    python benchmarks/head_ct.py prepare                                    # data/head_ct/{train,test}.npy
    python training/train.py fit --config configs/training/head_ct.yaml     # runs/head_ct/prior, two hours on two cores
    python benchmarks/head_ct.py run                                        # table, benchmarks/results/head_ct.json
"""

from __future__ import annotations

import argparse
import io
import plistlib
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

VOLUME = Path("/usr/share/doc/invesalius-examples/examples/Cranium.inv3")
DATA = Path("data/head_ct")
SIZE = 64
TEST_BLOCKS = (20, 33, 50)  # first of five slices that are held out
MU_TOP = 3.0  # attenuation of a pixel of value 1, in units of water's; a pixel of value -1 is air


def read_volume(file: Path = VOLUME) -> Tensor:
    """The volume in Hounsfield units, ``(slices, H, W)``."""
    with tarfile.open(file) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers()}
        files = {}
        for name in ("main.plist", "matrix.dat"):
            member = archive.extractfile(members[name])
            assert member is not None
            files[name] = io.BytesIO(member.read())
    shape = plistlib.load(files["main.plist"])["matrix"]["shape"]
    return torch.from_numpy(np.frombuffer(files["matrix.dat"].read(), dtype="<i2").reshape(shape).astype(np.float32))


def to_pixels(hounsfield: Tensor) -> Tensor:
    """Attenuation in [-1, 1]: air -1, ``MU_TOP`` times water 1."""
    return (2 * (1 + hounsfield / 1000) / MU_TOP - 1).clamp(-1, 1)


def prepare(images: int) -> None:
    """Write turned, shifted, scaled and mirrored training slices, and the test slices as they are."""
    slices = functional.interpolate(to_pixels(read_volume())[:, None], (SIZE, SIZE), mode="area")
    held_out = {z for first in TEST_BLOCKS for z in range(first - 2, first + 7)}
    train = slices[[z for z in range(len(slices)) if z not in held_out]]
    generator = torch.Generator().manual_seed(0)
    out = np.empty((images, SIZE, SIZE), dtype=np.uint16)
    for i in range(images):
        u = 2 * torch.rand(4, generator=generator) - 1
        angle, zoom = 0.2 * u[0], 1 + 0.1 * u[1]
        mirror = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
        c, s = zoom * torch.cos(angle), zoom * torch.sin(angle)
        theta = torch.stack([mirror * c, -s, 0.08 * u[2], mirror * s, c, 0.08 * u[3]]).reshape(1, 2, 3)
        grid = functional.affine_grid(theta, [1, 1, SIZE, SIZE], align_corners=False)
        z = int(torch.randint(len(train), (), generator=generator))
        image = functional.grid_sample(
            train[z : z + 1], grid, mode="bicubic", padding_mode="border", align_corners=False
        )
        out[i] = ((image[0, 0].clamp(-1, 1) + 1) / 2 * 65535).round().numpy().astype(np.uint16)
    DATA.mkdir(parents=True, exist_ok=True)
    np.save(DATA / "train.npy", out)
    np.save(DATA / "test.npy", slices[[first + 2 for first in TEST_BLOCKS]].numpy())
    print(f"{images} training images of {len(train)} slices, {len(TEST_BLOCKS)} test slices: {DATA}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparation = commands.add_parser("prepare", help="extract the slices")
    preparation.add_argument("--images", type=int, default=20000, help="training images to make")
    arguments = parser.parse_args()
    prepare(arguments.images)


if __name__ == "__main__":
    main()
