r"""A prior over functions with a closed form: a mixture of Gaussian random fields, under noise that is a random field too.

:math:`x_0 \sim \sum_j w_j N(m_j, Q)` and noise :math:`N(0, \sigma^2 C)`, with Q and C diagonal in the same basis, eigenvalues :math:`q_k`
and :math:`c_k`. In that basis everything happens coefficient by coefficient:

.. math:: D(x; \sigma)_k = \sum_j r_j \Big(m_{jk} + \frac{q_k}{q_k + \sigma^2 c_k}(x_k - m_{jk})\Big), \qquad
          r_j \propto w_j \exp\Big(-\tfrac12 \sum_k \frac{(x_k - m_{jk})^2}{q_k + \sigma^2 c_k}\Big)

On a grid the sums run over its modes. The responsibilities :math:`r_j` have a limit as it is refined, because the means are smooth: their
differences are made of finitely many modes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpnp_shared.denoiser import Denoiser, expand_sigma
from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.operators.base import array_argument, check_image_shape


class FieldPrior(Denoiser):
    """A Gaussian random field, or a mixture of several that differ in their mean; usable on any grid.

    Args:
        field: law of each component about its mean, ``N(0, Q)``.
        noise: law of the noise, ``N(0, C)``, in the same basis.
        image_shape: ``(1, H, W)``, the grid where none is asked for.
        means: of the components, ``(J, a, b)``: each by its coefficients of the lowest ``a x b`` cosines (basis ``neumann``), in image
            units; a single mean of 0 by default.
        weights: of the components, of sum 1; equal by default.

    Raises:
        ValueError: an argument of another shape or value, or fields in different bases.
    """

    means: Tensor  # (J, a, b), in float64
    log_weights: Tensor  # (J,)

    def __init__(
        self,
        field: GaussianField,
        noise: GaussianField,
        image_shape: tuple[int, int, int],
        means: Sequence[Sequence[Sequence[float]]] | Tensor | None = None,
        weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        if self.image_shape[0] != 1:
            raise ValueError(f"image_shape = {image_shape}; a field prior is over functions of one channel (1, H, W)")
        if field.basis != noise.basis:
            raise ValueError(f"field is {field.basis} and noise {noise.basis}; they must have the same basis")
        if means is not None and field.basis != "neumann":
            raise ValueError(
                f"means: only with basis 'neumann', whose modes are products of cosines; it is {field.basis!r}"
            )
        m = torch.zeros(1, 1, 1, dtype=torch.float64) if means is None else array_argument(means, "means")
        if m.ndim != 3 or m.numel() == 0:
            raise ValueError(f"means has shape {tuple(m.shape)}; allowed is (J, a, b)")
        w = m.new_full((len(m),), 1 / len(m)) if weights is None else array_argument(weights, "weights")
        if w.shape != m.shape[:1] or bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-4:
            raise ValueError(f"weights = {w.tolist()}; allowed are {len(m)} numbers, not negative, of sum 1")
        self.field, self.noise = field, noise
        self.register_buffer("means", m)
        self.register_buffer("log_weights", (w / w.sum()).log())
        self.sigma_min, self.sigma_max = 0.0, math.inf
        ratio = field.eigenvalues(self.image_shape[1:]) / noise.eigenvalues(self.image_shape[1:])
        self.spread = (
            math.sqrt(float(ratio.max())) + float((m - m.mean(0)).square().sum((1, 2)).max().sqrt()) / noise.std
        )

    @property
    def noise_field(self) -> GaussianField:
        """The law of the noise."""
        return self.noise

    @property
    def gaussian(self) -> bool:
        """Whether it is a single Gaussian field."""
        return len(self.means) == 1

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Exact ``D(x; sigma)`` for ``x`` ``(B, 1, H, W)`` on any grid that holds the means."""
        self.check_sigma(sigma)
        if x.ndim != 4 or x.shape[1] != 1:
            raise ValueError(f"x has shape {tuple(x.shape)}; this prior takes (B, 1, H, W)")
        q, c = (f.eigenvalues((x.shape[2], x.shape[3])).to(x) for f in (self.field, self.noise))
        v = expand_sigma(sigma, x) ** 2 * c
        m = self.mean_coefficients((x.shape[2], x.shape[3])).to(x)  # (J, H, W)
        r = self.field.coefficients(x) - m  # (B, J, H, W), by broadcasting over the channel
        logits = self.log_weights.to(x) - 0.5 * (r.square() / (q + v)).sum((2, 3))
        denoised = m + q / (q + v) * r
        mixed = (logits.softmax(1)[:, :, None, None] * denoised).sum(1, keepdim=True)
        return self.field.function(mixed)

    def mean_coefficients(self, grid: tuple[int, int]) -> Tensor:
        """Coefficients of the means on a grid ``(H, W)``: ``(J, H, W)`` in float64.

        Raises:
            ValueError: the grid does not hold their modes.
        """
        j, a, b = self.means.shape
        if a > grid[0] or b > grid[1]:
            raise ValueError(f"a grid {grid} does not hold means of {a} x {b} modes")
        m = self.means.new_zeros(j, *grid)
        m[:, :a, :b] = self.means
        return m

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator,
        grid: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw functions; the same generator gives the same ones on all square grids.

        Args:
            n: how many.
            generator: source of the random numbers.
            grid: ``(H, W)``; by default that of ``image_shape``.
            dtype: of the images, by default PyTorch's.

        Returns:
            ``(n, 1, H, W)``.
        """
        grid = grid or self.image_shape[1:]
        x = self.field.sample(n, grid, generator=generator, dtype=dtype)
        weights = self.log_weights.exp().to(generator.device)
        component = torch.multinomial(weights, n, replacement=True, generator=generator)
        return x + self.field.function(self.mean_coefficients(grid)[component.to(self.means.device)])[:, None].to(x)
