"""CT and MRI of real anatomy: a head CT's slices, with a prior trained on other slices of the same head.

The volume is the example of Debian's package ``invesalius-examples`` (108 slices of 256 x 256, 0.96 mm pixels, 1.5 mm apart);
nothing of it is part of this project. Three blocks of five slices and two neighbours on either side are kept out of the training
set, and the middle slice of each block is reconstructed. It is one head, so that the figures tell how well the samplers use a
prior that fits, not how a prior of one patient does on another.

    apt-get install invesalius-examples
    python benchmarks/head_ct.py prepare                                    # data/head_ct/{train,test}.npy
    python training/train.py fit --config configs/training/head_ct.yaml     # runs/head_ct/prior, two hours on two cores
    python benchmarks/head_ct.py run                                        # table, benchmarks/results/head_ct.json

The low-dose scan has the exact likelihood of its counts, by HMC; the others are linear and drawn exactly.

Beside each reconstruction stands what is usually taken: filtered back-projection, or zero-filled k-space. Lengths are in cm, attenuation
in units of 0.2/cm (water's is 1). ``--picture FILE`` draws the first slice of each problem; it shows anatomy, and is for one's own use.
"""

from __future__ import annotations

import argparse
import io
import plistlib
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from runner import parser, run_cells, write_table
from torch import Tensor
from torch.nn import functional

from dpnp_inference import HMC, DPnP, Posterior
from dpnp_inference.metrics import coverage, psnr, ssim
from dpnp_inference.report import draw_picture
from dpnp_shared.forward_model import ForwardModel
from dpnp_shared.noise import GaussianNoise, PoissonNoise
from dpnp_shared.operators import MRI, BeerLambert, ParallelBeamCT, PhysicalUnits
from dpnp_shared.prior import Prior

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


def split(size: int) -> tuple[Tensor, Tensor]:
    """Training and test slices ``(slices, 1, size, size)`` in [-1, 1]; neighbours of test slices are in neither."""
    slices = functional.interpolate(to_pixels(read_volume())[:, None], (size, size), mode="area")
    held_out = {z for first in TEST_BLOCKS for z in range(first - 2, first + 7)}
    train = slices[[z for z in range(len(slices)) if z not in held_out]]
    return train, slices[[first + 2 for first in TEST_BLOCKS]]


def vary(slices: Tensor, generator: torch.Generator) -> Tensor:
    """One of the slices ``(slices, 1, H, W)``, turned, shifted, scaled and mirrored at random, ``(1, H, W)`` in [-1, 1]."""
    u = 2 * torch.rand(4, generator=generator) - 1
    angle, zoom = 0.2 * u[0], 1 + 0.1 * u[1]
    mirror = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
    c, s = zoom * torch.cos(angle), zoom * torch.sin(angle)
    theta = torch.stack([mirror * c, -s, 0.08 * u[2], mirror * s, c, 0.08 * u[3]]).reshape(1, 2, 3)
    z = int(torch.randint(len(slices), (), generator=generator))
    grid = functional.affine_grid(theta, [1, *slices.shape[1:]], align_corners=False)
    image = functional.grid_sample(slices[z : z + 1], grid, mode="bicubic", padding_mode="border", align_corners=False)
    return image[0].clamp(-1, 1)


def to_uint16(image: Tensor) -> np.ndarray:
    """An image in [-1, 1] as whole numbers from 0 to 65535."""
    return ((image + 1) / 2 * 65535).round().numpy().astype(np.uint16)


def prepare(images: int) -> None:
    """Write turned, shifted, scaled and mirrored training slices, and the test slices as they are."""
    train, test = split(SIZE)
    generator = torch.Generator().manual_seed(0)
    DATA.mkdir(parents=True, exist_ok=True)
    np.save(DATA / "train.npy", np.concatenate([to_uint16(vary(train, generator)) for _ in range(images)]))
    np.save(DATA / "test.npy", test.numpy())
    print(f"{images} training images of {len(train)} slices, {len(test)} test slices: {DATA}")


PIXEL = 256 / SIZE * 0.0957  # cm
WATER = 0.2  # 1/cm
SHAPE = (1, SIZE, SIZE)
CHAINS = 19  # with as many draws, order statistics give 90% exactly
PHOTONS = 2000.0
PROBLEMS = ("ct, 20 views", "ct, 60 views of few photons", "mri, every fourth column", "mri, a tenth, 4 coils")
PRIOR: Prior
IMAGES: Tensor


def forward_model(problem: str) -> ForwardModel:
    """The forward model of a problem; MRI takes the picture for a density of protons."""
    attenuation = (0.0, MU_TOP * WATER)
    if problem == "ct, 20 views":
        return ForwardModel(PhysicalUnits(projections(20), physical_range=attenuation), GaussianNoise(0.02))
    if problem == "ct, 60 views of few photons":
        lines = PhysicalUnits(projections(60), physical_range=attenuation)
        return ForwardModel(BeerLambert(lines, PHOTONS), PoissonNoise(background=1.0))
    if problem == "mri, every fourth column":
        mri = MRI(SHAPE, "equispaced", 4, centre_fraction=0.08)
        return ForwardModel(PhysicalUnits(mri), GaussianNoise(0.02))
    if problem == "mri, a tenth, 4 coils":
        return ForwardModel(PhysicalUnits(MRI(SHAPE, "poisson_disc", 10, coils=4)), GaussianNoise(0.02))
    raise ValueError(f"problem = {problem!r}; allowed are {', '.join(PROBLEMS)}")


def projections(views: int) -> ParallelBeamCT:
    """Parallel beams all around."""
    return ParallelBeamCT(SHAPE, views, pixel_size=PIXEL)


def usual(problem: str, model: ForwardModel, y: Tensor) -> Tensor:
    """Filtered back-projection of a sinogram, the zero-filled picture of k-space; ``(1, SIZE, SIZE)`` in the prior's units."""
    if problem.startswith("ct"):
        if problem.endswith("photons"):
            lines, y = projections(60), -((y - 1).clamp(min=1) / PHOTONS).log()
        else:
            lines = projections(20)
        return 2 * lines.fbp(y[None].float())[0] / (MU_TOP * WATER) - 1
    picture = model.operator.display(y)
    assert picture is not None
    return picture.reshape(SHAPE)


def start(prior: str) -> None:
    """Prepare a worker process."""
    global PRIOR, IMAGES
    PRIOR = Prior.from_pretrained(prior)
    IMAGES = torch.from_numpy(np.load(DATA / "test.npy"))


def reconstruct(problem: str, index: int) -> tuple[Posterior, Tensor, ForwardModel, Tensor]:
    """Draws, the usual picture, the model and the measurement of one test slice."""
    model = forward_model(problem)
    y = model.simulate(IMAGES[index][None], generator=torch.Generator().manual_seed(index))[0]
    proximal = "auto" if model.homogeneous.linear_gaussian else HMC(steps=6, leapfrogs=8, warmup=6)
    posterior = DPnP(PRIOR, model, proximal=proximal).sample(y, chains=CHAINS, seed=index)
    return posterior, usual(problem, model, y), model, y


def run_cell(problem: str, index: int) -> dict[str, float]:
    """Figures of one test slice."""
    posterior, beside, _, _ = reconstruct(problem, index)
    truth, value_range = IMAGES[index], PRIOR.card.value_range
    return {
        "psnr": psnr(posterior.mean, truth, value_range),
        "ssim": ssim(posterior.mean, truth, value_range),
        "usual_psnr": psnr(beside, truth, value_range),
        "usual_ssim": ssim(beside, truth, value_range),
        "coverage": coverage(posterior, truth)[0],
        "coverage_not_air": coverage(posterior, truth, where=truth > -0.9)[0],
        "calls": posterior.diagnostics["network_calls"],
        "seconds": posterior.diagnostics["seconds"],
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Means over the slices as Markdown."""
    lines = [
        f"{len(TEST_BLOCKS)} slices of one head, {SIZE} x {SIZE}; prior of other slices of that head. PSNR (dB) and SSIM of the "
        "posterior mean, and of filtered back-projection or the zero-filled picture; then how many pixels the 90% intervals cover.\n",
        "| problem | PSNR | SSIM | PSNR, usual | SSIM, usual | covered | covered, not air | network calls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for problem in PROBLEMS:
        rows = [figures for name, figures in results.items() if name.rsplit("/", 1)[0] == problem]
        if not rows:
            continue
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        lines.append(
            f"| {problem} | {mean['psnr']:.2f} | {mean['ssim']:.3f} | {mean['usual_psnr']:.2f} | {mean['usual_ssim']:.3f} "
            f"| {mean['coverage']:.3f} | {mean['coverage_not_air']:.3f} | {mean['calls']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["prepare"]:
        preparation = argparse.ArgumentParser(prog="head_ct.py prepare")
        preparation.add_argument("--images", type=int, default=20000, help="training images to make")
        prepare(preparation.parse_args(sys.argv[2:]).images)
        return
    options = parser(__doc__, "head_ct")
    options.add_argument("command", choices=["prepare", "run"])
    options.add_argument("--prior", default="runs/head_ct/prior")
    options.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    options.add_argument("--slices", type=int, default=len(TEST_BLOCKS), help="the first so many test slices")
    options.add_argument(
        "--picture", type=Path, help="instead of the table, a picture of the first slice of each problem"
    )
    arguments = options.parse_args()
    if arguments.picture is not None:
        start(arguments.prior)
        for problem in arguments.problems:
            posterior, beside, _, _ = reconstruct(problem, 0)
            name = f"{arguments.picture.stem}_{PROBLEMS.index(problem)}{arguments.picture.suffix}"
            draw_picture(
                arguments.picture.with_name(name),
                posterior,
                value_range=PRIOR.card.value_range,
                measurement=beside,
                truth=IMAGES[0],
                title=problem,
            )
        return
    cells = {f"{problem}/{i}": (problem, i) for i in range(arguments.slices) for problem in arguments.problems}
    header = {
        "prior": Path(arguments.prior).name,
        "chains": CHAINS,
    }  # the prior is trained anew: its figures differ a little
    results = run_cells(run_cell, cells, arguments, header=header, start=start, start_arguments=(arguments.prior,))
    write_table(arguments, table(results))


if __name__ == "__main__":
    main()
