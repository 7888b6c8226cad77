"""The order of the training images: a function of seed and epoch, which neither interruptions nor the number of processes change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dpnp_shared.randomness import derive_seed


class EpochSampler(DistributedSampler[Tensor]):
    """Shuffled indices that depend on seed and epoch only, dealt out to the processes in turn.

    Image ``i`` of process ``r`` among ``W`` is image ``i W + r`` of the order, so that the images of a global batch are the
    same however many processes share it.

    Args:
        data: the training images.
        num_replicas: processes W.
        rank: this process.
        seed: of the order.
        images_per_step: images of this process in one optimiser step; what does not fill a step at the end of the epoch is left
            out, if there is at least one full step.

    Raises:
        ValueError: ``images_per_step`` is not positive.
    """

    def __init__(
        self, data: Dataset[Tensor], *, num_replicas: int = 1, rank: int = 0, seed: int = 0, images_per_step: int = 1
    ) -> None:
        if images_per_step < 1:
            raise ValueError(f"images_per_step = {images_per_step}; at least 1 is needed")
        super().__init__(data, num_replicas=num_replicas, rank=rank, seed=seed)
        whole = self.num_samples - self.num_samples % images_per_step
        self._length = whole if whole else self.num_samples
        self._first, self._first_epoch = 0, 0

    def __len__(self) -> int:
        """Images of this process in one epoch."""
        return self._length

    def start_at(self, epoch: int, first: int) -> None:
        """Leave out the ``first`` images of this process in ``epoch``; other epochs are whole."""
        self._first, self._first_epoch = first, epoch
        self.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(super().__iter__(), self.first, self._length)

    @property
    def first(self) -> int:
        """Images of this process that are left out at the beginning of the present epoch."""
        return self._first if self.epoch == self._first_epoch else 0


class ResumableLoader(DataLoader[Tensor]):
    """A loader whose position Lightning stores in checkpoints and restores from them.

    Args:
        data: the training images.
        sampler: their order.
        start_epoch: told the epoch that begins, before any of its images is asked for.
        batch_size: images of this process in a batch.
        kwargs: further arguments of :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        data: Dataset[Tensor],
        sampler: EpochSampler,
        start_epoch: Callable[[int], None] = lambda epoch: None,
        *,
        batch_size: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(data, sampler=sampler, batch_size=batch_size, **kwargs)
        self.order, self.start_epoch = sampler, start_epoch
        self._images = batch_size
        self._epoch, self._batches = 0, 0

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        """Lazy: Lightning makes the iterator first and tells the sampler its epoch afterwards."""
        self._epoch, self._batches = self.order.epoch, self.order.first // self._images
        self.start_epoch(self._epoch)
        # the workers' own seeds must not depend on how often training was interrupted
        self.generator = torch.Generator().manual_seed(derive_seed(self.order.seed, self._epoch))
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and the number of its batches that were handed out."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches of ``state``."""
        self._epoch, self._batches = state["epoch"], state["batches"]
        self.order.start_at(self._epoch, self._batches * self._images)
