"""How close a synthesised power-function average comes to one that was not taken, by the number of snapshots.

    python benchmarks/ema_profiles.py                  # the table of docs/ema.md, in a second
    python benchmarks/ema_profiles.py --profiles 0.1   # with other profiles kept in training

The distance of the profiles relative to the norm of the wanted one (Karras et al. 2024, arXiv 2312.02696, algorithm 3). The snapshots
are evenly spaced, and followed by the checkpoint itself. No network is needed.
"""

from __future__ import annotations

import argparse

from dpnp_training.post_hoc import coefficients

IMAGES = 1_000_000


def main() -> None:
    """Print the table as Markdown."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--profiles", type=float, nargs="+", default=[0.05, 0.1], help="σ_rel that training keeps")
    options.add_argument("--wanted", type=float, nargs="+", default=[0.02, 0.03, 0.07, 0.15, 0.2, 0.25])
    options.add_argument("--snapshots", type=int, nargs="+", default=[5, 10, 20, 60], help="besides the checkpoint")
    given = options.parse_args()
    print(f"| snapshots | {' | '.join(f'σ_rel {width:g}' for width in given.wanted)} |")
    print("|---" * (1 + len(given.wanted)) + "|")
    for n in given.snapshots:
        times = [IMAGES * (i + 1) // (n + 1) for i in range(n + 1) for _ in given.profiles]
        errors = [coefficients(times, given.profiles * (n + 1), IMAGES, width)[1] for width in given.wanted]
        print(f"| {n} | {' | '.join(f'{error:.2%}' for error in errors)} |")


if __name__ == "__main__":
    main()
