"""The interferometry operators against eht-imaging (Chael et al. 2018), an implementation of its own.

    pip install ehtim
    python benchmarks/interferometry.py

observes one image without noise by both, M 87 over a night with the stations of 2017, and prints the largest differences: with each
one's own sidereal time, and with the spatial frequencies of eht-imaging given to both. It takes seconds.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from dpnp_shared.operators import EHT_2017, ClosurePhases, Coverage, EarthRotation, LogClosureAmplitudes, Visibilities

PIXELS, FIELD_OF_VIEW, WAVELENGTH, ELEVATION = 28, 140.0, 1.3e-3, 10.0
RIGHT_ASCENSION, DECLINATION = 12.513729, 12.391123
SPEED_OF_LIGHT = 299792458.0
MODIFIED_JULIAN_DAY = 57854  # 2017-04-11


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the image")
    arguments = parser.parse_args()
    try:
        import ehtim
    except ImportError as error:
        raise SystemExit(f"this comparison needs eht-imaging (pip install ehtim): {error}") from error
    flux = np.random.default_rng(arguments.seed).random((PIXELS, PIXELS)) / PIXELS**2
    observation = observe(ehtim, flux)
    times = sorted({float(hour) for hour in observation.data["time"]})
    rotation = EarthRotation(times, wavelength=WAVELENGTH, min_elevation=ELEVATION)
    given = Coverage(
        [
            # there a baseline points from the second station to the first
            [-d["u"], -d["v"], rotation.names.index(d["t1"]), rotation.names.index(d["t2"]), times.index(d["time"])]
            for d in observation.data
        ]
    )
    print(f"{len(rotation)} visibilities here, {len(given)} there, of {len(times)} scans; total flux {flux.sum():.3f}")
    print("largest difference (of how many)\n| | eht-imaging's frequencies | own sidereal time |\n|---|---|---|")
    found = [differences(observation, flux, times, coverage, rotation.names) for coverage in (given, rotation)]
    for quantity in found[0]:
        print(f"| {quantity} | " + " | ".join(column[quantity] for column in found) + " |")


def observe(ehtim, flux: np.ndarray):
    """eht-imaging's observation of the image, without noise."""
    source = (RIGHT_ASCENSION, DECLINATION)
    frequency = SPEED_OF_LIGHT / WAVELENGTH
    table = [(name, *xyz, 1e4, 1e4, 0, 0, 0, 0, 0) for name, xyz in EHT_2017.items()]
    array = ehtim.array.Array(np.array(table, dtype=ehtim.const_def.DTARR))
    empty = array.obsdata(
        *source,
        frequency,
        2e9,
        60,
        1800,
        0.5,
        9.3,
        mjd=MODIFIED_JULIAN_DAY,
        timetype="UTC",
        elevmin=ELEVATION,
        elevmax=90,
    )
    image = ehtim.image.make_empty(
        PIXELS, FIELD_OF_VIEW * ehtim.RADPERUAS, *source, rf=frequency, mjd=MODIFIED_JULIAN_DAY
    )
    image.imvec = flux.ravel()
    image.pulse = ehtim.observing.pulses.rectPulse2D
    return image.observe_same_nonoise(empty, ttype="direct")


def differences(observation, flux: np.ndarray, times: list[float], coverage: Coverage, names: list[str]) -> dict:
    """Largest difference of each quantity here to the same one there, and of how many."""
    x = torch.from_numpy(flux)[None, None]
    geometry = ((1, PIXELS, PIXELS), coverage, FIELD_OF_VIEW)
    here = Visibilities(*geometry)(x)[0].tolist()
    there = {}
    for d in observation.data:
        there[d["time"], d["t1"], d["t2"]], there[d["time"], d["t2"], d["t1"]] = d["vis"], d["vis"].conjugate()
    rows = zip(coverage.scan.tolist(), coverage.stations.tolist(), here, strict=True)
    gaps = {"visibility": [abs(value - there[times[scan], names[i], names[j]]) for scan, (i, j), value in rows]}

    there = {}
    for d in observation.c_phases(vtype="vis", count="max"):
        a, b, c, phase = d["t1"], d["t2"], d["t3"], np.deg2rad(d["cphase"])
        for turned in ((a, b, c), (b, c, a), (c, a, b)):
            there[d["time"], turned], there[d["time"], turned[::-1]] = phase, -phase
    phases = ClosurePhases(*geometry)
    rows = zip(phases.paths, phases(x)[0].tolist(), strict=True)
    gaps["closure phase"] = [
        abs(np.angle(np.exp(1j * (value - there[times[scan], tuple(names[i] for i in path)]))))
        for (scan, path), value in rows
    ]

    there = {}
    for d in observation.c_amplitudes(vtype="vis", ctype="logcamp", count="max", debias=False):
        a, b, c, e = d["t1"], d["t2"], d["t3"], d["t4"]
        above, below = pairing(a, b, c, e), pairing(a, e, b, c)
        there[d["time"], above, below], there[d["time"], below, above] = d["camp"], -d["camp"]
    amplitudes = LogClosureAmplitudes(*geometry)
    gaps["log closure amplitude"] = []
    for (scan, path), value in zip(amplitudes.paths, amplitudes(x)[0].tolist(), strict=True):
        a, b, c, d = (names[i] for i in path)
        key = (times[scan], pairing(a, b, c, d), pairing(a, c, b, d))
        gaps["log closure amplitude"].append(abs(value - there[key]))
    return {quantity: f"{max(values):.2g} ({len(values)})" for quantity, values in gaps.items()}


def pairing(a: str, b: str, c: str, d: str) -> frozenset[frozenset[str]]:
    """The baselines ab and cd, in any order."""
    return frozenset((frozenset((a, b)), frozenset((c, d))))


if __name__ == "__main__":
    main()
