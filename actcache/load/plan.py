"""Which rows make batch b of epoch e: pure integers, no disk, no threads.

Chunks are permuted over the whole store and dealt into windows of nearly equal size; the rows of each window are
permuted; batches are consecutive stretches of the resulting order. Every part is a function of (seed, epoch, window),
so the order never depends on timing, prefetch depth, or on what was read before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.order import permutation
from actcache.spec import check_positive

_CHUNK_ORDER, _ROW_ORDER = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The sizes that, with a seed, decide the order of a whole training run."""

    rows_per_chunk: int
    """Rows of a full chunk; row id `r` lies in chunk `r // rows_per_chunk`."""
    n_rows: int
    """Rows of an epoch: all of the store, or those that are wanted."""
    chunks_per_window: int
    """Chunks that are held, and shuffled together, at a time."""
    batch_rows: int
    """B, rows of a batch."""
    seed: int
    """Seed of the order."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    chunk_table: NDArray[np.int64] | None = None
    """`(n_chunks, 2)` number and rows of each chunk that has any, in order; None where only the last is not full."""
    wanted: NDArray[np.uint8] | None = None
    """`(n_chunks, bytes)` a bit for each row of the chunks in `chunk_table`, which counts them; None for all rows."""

    def __post_init__(self) -> None:
        names = ("rows_per_chunk", "n_rows", "chunks_per_window", "batch_rows")
        check_positive("loader", **{name: getattr(self, name) for name in names})
        if self.wanted is not None and (self.chunk_table is None or len(self.chunk_table) != len(self.wanted)):
            raise ConfigError("loader: wanted rows need a chunk_table with a line for each line of theirs")
        if self.batch_rows > self.n_rows:
            has = "a store that has" if self.wanted is None else "the rows that are wanted:"
            raise ConfigError(f"batches of {self.batch_rows:,} rows asked of {has} {self.n_rows:,} rows")

    @property
    def n_chunks(self) -> int:
        """Chunks of the store that have rows."""
        return -(-self.n_rows // self.rows_per_chunk) if self.chunk_table is None else len(self.chunk_table)

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.n_chunks // self.chunks_per_window)

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        whole, rest = divmod(self.n_rows, self.batch_rows)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def most_window_rows(self) -> int:
        """Rows of the largest window that there can be."""
        n_chunks = -(-self.n_chunks // self.n_windows)
        if self.chunk_table is None:
            return n_chunks * self.rows_per_chunk
        return int(np.sort(self.chunk_table[:, 1])[-n_chunks:].sum())

    def chunk_rows(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of each of these chunks."""
        if self.chunk_table is not None:
            table: NDArray[np.int64] = self.chunk_table[np.searchsorted(self.chunk_table[:, 0], chunks), 1]
            return table
        rows: NDArray[np.int64] = np.minimum(self.rows_per_chunk, self.n_rows - chunks * self.rows_per_chunk)
        return rows

    def row_ids(self, chunks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row ids of these chunks' rows, chunk by chunk."""
        if self.chunk_table is None or self.wanted is None:
            sizes = self.chunk_rows(chunks)
            offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            rows: NDArray[np.int64] = np.repeat(chunks * self.rows_per_chunk, sizes) + offsets
            return rows
        bits = self.wanted[np.searchsorted(self.chunk_table[:, 0], chunks)]
        line, byte = np.nonzero(bits)  # few, where few rows of many chunks are wanted
        place, bit = np.nonzero(np.unpackbits(bits[line, byte][:, None], axis=1))
        return chunks[line[place]] * self.rows_per_chunk + 8 * byte[place] + bit

    def epoch(self, epoch: int) -> Epoch:
        """The order of one epoch."""
        chunks = permutation(self.n_chunks, self.seed, _CHUNK_ORDER, epoch)
        if self.chunk_table is not None:
            chunks = self.chunk_table[chunks, 0]
        windows = tuple(np.array_split(chunks, self.n_windows))  # sizes differ by one at most
        rows = [int(self.chunk_rows(window).sum()) for window in windows]
        return Epoch(plan=self, epoch=epoch, windows=windows, starts=np.concatenate([[0], np.cumsum(rows)]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of a batch that comes from one window."""

    places: NDArray[np.int64]
    """Which of the window's rows, in batch order."""
    start: int
    """The batch row at which they begin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """One epoch's order: its windows of chunks, and where each window begins in the sequence of rows."""

    plan: Plan
    epoch: int
    windows: tuple[NDArray[np.int64], ...]
    """Chunk numbers of each window."""
    starts: NDArray[np.int64]
    """`(n_windows + 1,)` rows before each window."""

    def window_order(self, window: int) -> NDArray[np.int64]:
        """The permutation of a window's rows; places count through the window's chunks in the order of `windows`."""
        n = int(self.starts[window + 1] - self.starts[window])
        return permutation(n, self.plan.seed, _ROW_ORDER, self.epoch, window)

    def row_ids(self, window: int) -> NDArray[np.int64]:
        """Row id of each place of a window."""
        return self.plan.row_ids(self.windows[window])

    def batch_span(self, batch: int) -> tuple[int, int]:
        """The stretch of the epoch's row sequence that batch `batch` is."""
        begin = batch * self.plan.batch_rows
        return begin, min(begin + self.plan.batch_rows, self.plan.n_rows)

    def batch_windows(self, batch: int) -> range:
        """Windows that a batch takes rows from (mostly one)."""
        begin, end = self.batch_span(batch)
        first = int(np.searchsorted(self.starts, begin, side="right")) - 1
        last = int(np.searchsorted(self.starts, end, side="left")) - 1
        return range(first, last + 1)

    def piece(self, batch: int, window: int, order: NDArray[np.int64]) -> Piece:
        """The part of a batch that comes from a window whose `window_order` is `order`."""
        begin, end = self.batch_span(batch)
        low, high = int(self.starts[window]), int(self.starts[window + 1])
        return Piece(places=order[max(begin, low) - low : min(end, high) - low], start=max(begin, low) - begin)

    def batch_row_ids(self, batch: int) -> NDArray[np.int64]:
        """Global row ids of a batch, from the integers alone; what the loader's batches must equal."""
        parts = ((window, self.piece(batch, window, self.window_order(window))) for window in self.batch_windows(batch))
        return np.concatenate([self.row_ids(window)[piece.places] for window, piece in parts])


def chunk_table(shard_n_rows: NDArray[np.int64], rows_per_shard: int, rows_per_chunk: int) -> NDArray[np.int64] | None:
    """The `chunk_table` of a store whose shards have these numbers of rows; None where only the last is not full."""
    if (shard_n_rows[:-1] == rows_per_shard).all():
        return None
    per_shard = rows_per_shard // rows_per_chunk
    rows = shard_n_rows[:, None] - np.arange(per_shard) * rows_per_chunk
    rows = np.clip(rows, 0, rows_per_chunk).reshape(-1)
    numbers = np.flatnonzero(rows)
    return np.stack([numbers, rows[numbers]], axis=1)
