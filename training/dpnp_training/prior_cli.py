"""``dpnp-prior``: what is done with priors outside of training and inference."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import auto_cli

from dpnp_shared.prior import Prior, PriorError
from dpnp_training.export import prior_from_checkpoint


def export(checkpoint: str, directory: str, name: str | None = None, trusted_modules: list[str] | None = None) -> None:
    """Turn a training checkpoint into a portable prior.

    Args:
        checkpoint: a .ckpt file written by training.
        directory: the folder to write.
        name: title of the card; the data's name by default.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    prior = prior_from_checkpoint(checkpoint, trusted_modules=trusted_modules or ())
    if name is not None:
        prior.card.name = name
    print(f"prior written to {prior.save_pretrained(directory)}")


def inspect(prior: str, trusted_modules: list[str] | None = None) -> None:
    """Check a prior's folder (version, hash, keys, shapes) and print its card.

    Args:
        prior: a folder, the name of a bundled prior, or a Hub id.
        trusted_modules: modules outside of this package whose network classes may be imported.
    """
    print(Prior.from_pretrained(prior, trusted_modules=trusted_modules or ()).card.markdown())


def main(args: Sequence[str] | None = None) -> None:
    """Run ``dpnp-prior``.

    Args:
        args: command-line arguments; those of the process by default.
    """
    try:
        auto_cli({"export": export, "inspect": inspect}, as_positional=True, args=None if args is None else list(args))
    except PriorError as error:
        sys.exit(f"dpnp-prior: {error}")
