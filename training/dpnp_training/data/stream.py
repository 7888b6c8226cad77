"""Tables of ``datasets`` read as a stream: shared out without duplicates, shuffled by seed, continued where they were left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dpnp_shared.randomness import derive_seed
from dpnp_training.data.images import Images
from dpnp_training.data.tables import choose_column, table_files

READ_AHEAD = 16  # examples read at once


class Position(NamedTuple):
    """Where a reader is: after ``offset`` examples of the block that begins at ``row`` of its shard number ``shard``, in pass ``turn``."""

    turn: int = 0
    shard: int = 0
    row: int = 0
    offset: int = 0


class StreamBatch(NamedTuple):
    """Images ``(B, C, H, W)``, the loader process they come from, and where its reader is after them."""

    images: Tensor
    worker: int
    position: Position


class StreamedTable:
    """A table that is read from its beginning only, one shard (file) at a time; images stay encoded until they are needed.

    Args:
        source: a ``.parquet`` or ``.arrow`` file, a folder of them, or the Hub id of a data set.
        split: of the Hub's data set.
        column: of the images.
        held_out: so many examples, spread evenly over the beginnings of the shards, are kept for validation.

    Raises:
        ValueError: the table is shorter than ``held_out``, or has no such column.
    """

    def __init__(self, source: str, split: str, column: str | None, held_out: int) -> None:
        import datasets

        path = Path(source).expanduser()
        self.source = source
        if path.exists():
            files = table_files(path)
            table = datasets.load_dataset(
                Path(files[0]).suffix[1:], data_files={split: files}, split=split, streaming=True
            )
        else:
            table = datasets.load_dataset(source, split=split, streaming=True)
        if table.features is None:
            table = table._resolve_features()
        self.column = choose_column(table.features, column)
        self._feature = table.features[self.column]
        self._decodes = isinstance(self._feature, datasets.Image)
        if self._decodes:
            table = table.cast_column(self.column, datasets.Image(decode=False))
        self.table = table.select_columns([self.column])
        self.shards = int(table.num_shards)
        self.held_out = [held_out // self.shards + (s < held_out % self.shards) for s in range(self.shards)]
        self.validation = [
            value
            for s in range(self.shards)
            for _, value in zip(range(self.held_out[s]), self.read(s, 0), strict=False)
        ]
        if len(self.validation) < held_out:
            raise ValueError(
                f"validation_images = {held_out}: the {self.shards} shards of {source!r} hold too few, {len(self.validation)} were found"
            )

    def read(self, shard: int, start: int) -> Iterator[Any]:
        """Encoded examples of one shard from a row on."""
        part = self.table.shard(num_shards=self.shards, index=shard)
        # in batches: a plain iteration would share the shard out between the loader's processes once more
        for batch in part.skip(start).iter(batch_size=READ_AHEAD):
            yield from batch[self.column]

    def decode(self, value: Any) -> Any:
        """An example as PIL image or array."""
        return self._feature.decode_example(value) if self._decodes else value


class HeldOut:
    """The examples kept for validation, as rows."""

    def __init__(self, table: StreamedTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table.validation)

    def __getitem__(self, index: int) -> Any:
        return self.table.decode(self.table.validation[index])


class Stream(IterableDataset[tuple[Tensor, int, Position]]):
    """The table without what is held out, over and over.

    With at least as many shards as readers (ranks x loader processes), each reader has shards of its own, otherwise several take
    turns within one; in each pass every example is seen by exactly one reader. The order of the shards depends on seed and pass.
    Within a reader, ``buffer`` examples at a time are shuffled.

    Args:
        table: the stream.
        images: how an example becomes a tensor.
        buffer: examples that are shuffled together.
        rank: of this process.
        world_size: number of ranks.
        seed: of all orders.
        start: where each reader goes on, ``(world_size * workers)``; from the beginning by default.
        first_worker: the loader process whose turn it is.
    """

    def __init__(
        self,
        table: StreamedTable,
        images: Images,
        buffer: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        start: list[Position] | None = None,
        first_worker: int = 0,
    ) -> None:
        self.table, self.images, self.buffer, self.seed = table, images, buffer, seed
        self.rank, self.world_size, self.start, self.first_worker = rank, world_size, start, first_worker

    def __iter__(self) -> Iterator[tuple[Tensor, int, Position]]:
        info = get_worker_info()
        workers, worker = (
            (1, 0) if info is None else (info.num_workers, (info.id + self.first_worker) % info.num_workers)
        )
        reader, readers = self.rank * workers + worker, self.world_size * workers
        position = self.start[reader] if self.start is not None else Position()
        while True:
            empty = True
            for key, value, after in self._turn(reader, readers, position):
                empty = False
                self.images.set_epoch(after.turn)
                yield self.images.transform(self.images.array(self.table.decode(value), key), key), worker, after
            if empty and position == Position(position.turn):
                raise ValueError(f"{self.table.source!r} has no training images for reader {reader} of {readers}")
            position = Position(position.turn + 1)

    def _turn(self, reader: int, readers: int, start: Position) -> Iterator[tuple[int, Any, Position]]:
        """One pass, from a position on: a number of the example, the example, the position after it."""
        block: list[tuple[int, Any]] = []
        begin = start
        for place, row, key, value in self._examples(reader, readers, start):
            if not block:
                begin = Position(start.turn, place, row)
            block.append((key, value))
            if len(block) == self.buffer:
                yield from self._shuffled(block, begin, reader, start)
                block = []
        yield from self._shuffled(block, begin, reader, start)

    def _shuffled(
        self, block: list[tuple[int, Any]], begin: Position, reader: int, start: Position
    ) -> Iterator[tuple[int, Any, Position]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, reader, *begin))
        order = torch.randperm(len(block), generator=generator).tolist()
        seen = start.offset if begin[:3] == start[:3] else 0
        for offset in range(seen, len(block)):
            yield *block[order[offset]], begin._replace(offset=offset + 1)

    def _examples(self, reader: int, readers: int, start: Position) -> Iterator[tuple[int, int, int, Any]]:
        """The reader's examples in the order of the files: shard's place in its list, row, a number, the example."""
        shards = self.table.shards
        generator = torch.Generator().manual_seed(derive_seed(self.seed, start.turn))
        order = torch.randperm(shards, generator=generator).tolist()
        if shards >= readers:
            own, stride, share = order[reader::readers], 1, 0
        else:
            own = [order[reader % shards]]
            stride, share = len(range(reader % shards, readers, shards)), reader // shards
        for place in range(start.shard, len(own)):
            shard = own[place]
            begin = max(self.table.held_out[shard], start.row if place == start.shard else 0)
            for row, value in enumerate(self.table.read(shard, begin), begin):
                if (row - self.table.held_out[shard]) % stride == share:
                    yield place, row, (shard << 32) + row, value


def collate(items: list[tuple[Tensor, int, Position]]) -> StreamBatch:
    """Stack images; the last one's position is the batch's."""
    return StreamBatch(torch.stack([x for x, _, _ in items]), items[-1][1], items[-1][2])
