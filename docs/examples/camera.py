"""A camera whose pixels are twice as wide as those of the prior, whose lens is dark at its rim, and whose sensor saturates."""

import torch
from torch import Tensor
from torch.nn import functional

from dpnp_shared.operators import Operator


class Camera(Operator):
    """From images (B, 1, 28, 28) in [-1, 1] to what the sensor reads, (B, 1, 14, 14) in [0, 1]."""

    def __init__(self, exposure: float = 2.0) -> None:
        super().__init__()
        self.exposure = exposure

    def forward(self, x: Tensor) -> Tensor:
        """The readings of a batch of images."""
        light = functional.avg_pool2d((x + 1) / 2, 2)
        r = torch.linspace(-1, 1, 14, dtype=x.dtype, device=x.device)
        lens = 1 - 0.3 * (r[:, None] ** 2 + r**2)
        return 1 - torch.exp(-self.exposure * lens * light)

    def display(self, y: Tensor) -> Tensor:
        """How a report shows a measurement, in [-1, 1]."""
        return 2 * y - 1
