r"""Priors over functions: what is particular about their training, and a data set to try it on.

The forward process is :math:`dX = -\tfrac12 X\, dt + \sqrt C\, dW` with a trace-class covariance C. Seen as :math:`e^{t/2} X_t`, it is
:math:`x_0 + \sigma w` with :math:`\sigma = \sqrt{e^t - 1}` and :math:`w \sim N(0, C)`, so that the loss is denoising score matching under
that noise,

.. math:: E\; \lambda(\sigma)\, \| D_\theta(x_0 + \sigma w; \sigma) - x_0 \|_{L^2}^2 ,

and the usual training does it all: :class:`~dpnp_shared.preconditioning.FieldEDM` as preconditioning names C, and noise in training and
validation is then drawn from it; :class:`~dpnp_shared.networks.FNO` is the network. C and the network are exported with the prior.

    python -m dpnp_training.function_space --output fields.npy

writes draws of a Gaussian random field, whose posteriors are known by other means.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jsonargparse import ArgumentParser

from dpnp_shared.gaussian_field import Basis, GaussianField


def write_fields(
    output: str,
    functions: int = 8192,
    grid: int = 32,
    std: float = 1.0,
    length: float = 0.2,
    smoothness: float = 2.5,
    basis: Basis = "neumann",
    seed: int = 0,
) -> Path:
    """Write draws of a Gaussian random field as a data set for training.

    Args:
        output: a ``.npy`` file, ``(functions, grid, grid)`` in float32; it is overwritten.
        functions: how many.
        grid: pixels along a side.
        std: of the field, as are the next three; see :class:`~dpnp_shared.gaussian_field.GaussianField`.
        length: correlation length, as a part of the side.
        smoothness: above 1.
        basis: ``neumann`` or ``periodic``.
        seed: not negative.

    Returns:
        The file.

    Raises:
        ValueError: an argument out of range.
    """
    if Path(output).suffix != ".npy":
        raise ValueError(f"output = {output!r}; it must be a .npy file")
    if functions < 2 or grid < 2 or seed < 0:
        raise ValueError(f"functions = {functions} and grid = {grid} must be at least 2, seed = {seed} not negative")
    field = GaussianField(std, length, smoothness, basis)
    generator = torch.Generator().manual_seed(seed)
    parts = [
        field.sample(min(512, functions - first), (grid, grid), generator=generator, dtype=torch.float32)[:, 0].numpy()
        for first in range(0, functions, 512)
    ]
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(".part.npy")
    np.save(staged, np.concatenate(parts))
    staged.replace(file)
    return file


def main(args: Sequence[str] | None = None) -> None:
    """Run ``python -m dpnp_training.function_space``.

    Args:
        args: command-line arguments; those of the process by default.
    """
    parser = ArgumentParser(prog="python -m dpnp_training.function_space")
    parser.add_function_arguments(write_fields)
    settings = parser.parse_args(None if args is None else list(args))
    write_fields(**settings.as_dict())


if __name__ == "__main__":
    main()
