"""Random numbers of a batch that do not depend on how it is divided between processes or accumulated parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpnp_shared.gaussian_field import GaussianField
from dpnp_shared.randomness import derive_seed


@dataclass(frozen=True)
class Share:
    """The images of a whole batch that a process has at hand: every ``stride``-th, ``count`` of them, from ``first`` on.

    The noise of an image depends on the batch's generator and on the image's place in the whole batch, on nothing else.

    Attributes:
        count: how many images these are.
        whole: images of the whole batch, over all processes and accumulated parts.
        first: place of the first of them.
        stride: from one to the next.
        field: law of the noise where it is not white.
    """

    count: int
    whole: int
    first: int = 0
    stride: int = 1
    field: GaussianField | None = None

    @classmethod
    def all(cls, count: int) -> Share:
        """A whole batch."""
        return cls(count, count)

    @property
    def places(self) -> range:
        """Of these images in the whole batch."""
        return range(self.first, self.first + self.count * self.stride, self.stride)

    def of(self, numbers: Tensor) -> Tensor:
        """The rows ``(count, ...)`` of these images among those of the whole batch, ``(whole, ...)``."""
        return numbers[self.first : self.places.stop : self.stride]

    def normal_like(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, those of each image from a stream of its own; or a draw from ``field`` made of them.

        Args:
            x: these images ``(count, C, H, W)``; gives shape, dtype and device.
            generator: of the whole batch, on the device of ``x``; its seed counts, it is not moved.
        """
        w = torch.empty_like(x, memory_format=torch.contiguous_format)
        stream = torch.Generator(x.device)
        for row, place in zip(w, self.places, strict=True):
            row.normal_(generator=stream.manual_seed(derive_seed(generator.initial_seed(), place)))
        return w if self.field is None else self.field.colour(w)
