"""Line integrals against the ASTRA toolbox and exact sinograms, and what they cost.

    pip install astra-toolbox      # GPL, with CUDA libraries of some 400 MB; needed for this command only
    python benchmarks/tomography.py

Errors are relative, in the 2-norm of the sinogram of Shepp and Logan's head: "exact" from the ellipses' own line integrals, which is
mostly what the pixels lose, and "to ASTRA" between the two programs. ASTRA's kernels on the CPU are linear (Joseph's, parallel beams
only), line (lengths of intersection, Siddon 1985) and strip (areas of intersection). Times are of one image in single precision, the
median of five; ASTRA's include the copies in and out. FBP is the PSNR of filtered back-projection from exact data.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dpnp_shared.operators import FanBeamCT, ParallelBeamCT
from dpnp_shared.phantoms import Ellipses

DISTANCE = 1.5  # from source to middle and from middle to detector, in sides of the image


def scanners(size: int, views: int) -> dict[str, ParallelBeamCT | FanBeamCT]:
    """One scanner of each geometry that ASTRA has, pixels of side 1."""
    shape, distance = (1, size, size), DISTANCE * size
    return {"parallel": ParallelBeamCT(shape, views), "fan": FanBeamCT(shape, views, distance, distance)}


def astra_projections(operator: ParallelBeamCT | FanBeamCT, image: Tensor) -> dict[str, tuple[Tensor, float]]:
    """ASTRA's sinograms ``(views, detectors)`` of ``image`` ``(H, W)`` and their seconds, by kernel."""
    import astra

    angles, n = np.deg2rad(operator.angles.numpy()), len(operator.positions)
    spacing = float(operator.positions[1] - operator.positions[0])
    volume = astra.create_vol_geom(*image.shape)
    if isinstance(operator, ParallelBeamCT):
        geometry, suffix, kernels = (
            astra.create_proj_geom("parallel", spacing, n, angles),
            "",
            ("linear", "line", "strip"),
        )
    else:
        distance = operator.source_distance
        geometry = astra.create_proj_geom("fanflat", spacing, n, angles, distance, distance)
        suffix, kernels = "_fanflat", ("line", "strip")
    results = {}
    for kernel in kernels:
        projector = astra.create_projector(kernel + suffix, geometry, volume)

        def project(projector: int = projector) -> Tensor:
            number, sinogram = astra.create_sino(image.numpy().astype(np.float32), projector)
            astra.data2d.delete(number)
            return torch.from_numpy(sinogram).double()

        results[kernel] = timed(project)
        astra.projector.delete(projector)
    return results


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result of a call, and its seconds."""
    call()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def relative(a: Tensor, b: Tensor) -> float:
    """Relative difference in the 2-norm."""
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[28, 64, 128, 256])
    parser.add_argument("--views", type=int, default=180)
    parser.add_argument("--batch", type=int, default=39, help="images of the last column")
    arguments = parser.parse_args()
    print(
        f"| beams | pixels | program | error, exact | to ASTRA | ms | ms of {arguments.batch} images | build, s | FBP, dB |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for size in arguments.sizes:
        phantom = Ellipses.shepp_logan(size / 2)
        image = phantom.image(size, size)
        for name in scanners(4, 1):
            start = time.perf_counter()
            operator = scanners(size, arguments.views)[name]
            build = time.perf_counter() - start
            exact = phantom.line_integrals(operator.points, operator.directions)
            fbp = operator.fbp(exact[None, None])[0]
            figure = 10 * math.log10(float((image.max() - image.min()) ** 2 / (fbp - image).square().mean()))
            theirs = astra_projections(operator, image[0])
            ours = operator(image[None])[0, 0]
            operator.float()
            single = image[None].float()
            several = single.repeat(arguments.batch, 1, 1, 1)
            _, one = timed(lambda operator=operator, x=single: operator(x))
            _, many = timed(lambda operator=operator, x=several: operator(x))
            print(
                f"| {name} | {size} x {size} | this one | {relative(ours, exact):.2e} | | {1e3 * one:.1f} | {1e3 * many:.1f} "
                f"| {build:.1f} | {figure:.1f} |"
            )
            for kernel, (sinogram, seconds) in theirs.items():
                print(
                    f"| {name} | {size} x {size} | ASTRA, {kernel} | {relative(sinogram, exact):.2e} "
                    f"| {relative(ours, sinogram):.1e} | {1e3 * seconds:.1f} | | | |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
