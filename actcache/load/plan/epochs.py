"""Which rows make batch b of epoch e: pure integers, no disk, no threads.

Chunks are permuted over the whole store; the row sequence that they make is cut into lanes of whole batches, one after
another; a lane's chunks are dealt into windows of nearly equal size; the rows of each window are permuted; a lane's
batches are consecutive stretches of the resulting order. Batch b of the epoch is batch `b // lanes` of lane
`b % lanes`, so that a process which is given every n-th batch needs the chunks of some lanes only. Every part is a
function of (seed, epoch, lane, window): the order never depends on timing, prefetch depth, the number of processes, or
on what was read before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.order import CHUNK_ORDER, ROW_ORDER, permutation
from actcache.spec import check_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Whole sequences in reading order: one window is a shard, since its rows are shuffled when it is written."""

    chunks_per_shard: int
    """Chunks of a full shard."""
    batch_starts: NDArray[np.int64]
    """`(n_batches + 1,)` rows before each batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The sizes that, with a seed, decide the order of a whole training run."""

    rows_per_chunk: int
    """Rows of a full chunk; row id `r` lies in chunk `r // rows_per_chunk`."""
    n_rows: int
    """Rows of an epoch: all of the store, or those that are wanted."""
    chunks_per_window: int
    """Chunks of a lane that are held, and shuffled together, at a time."""
    batch_rows: int
    """B, rows of a batch."""
    seed: int
    """Seed of the order."""
    drop_last: bool = True
    """Leave out the last, smaller batch of an epoch."""
    lanes: int = 1
    """L, stretches of the row sequence from which batches are taken in turn."""
    reading: Reading | None = None
    """Rows in reading order instead of shuffled ones."""
    chunk_table: NDArray[np.int64] | None = None
    """`(n_chunks, 2)` number and rows of each chunk that has any, in order; None where only the last is not full."""
    wanted: NDArray[np.uint8] | None = None
    """`(n_chunks, bytes)` a bit for each row of the chunks in `chunk_table`, which counts them; None for all rows."""

    def __post_init__(self) -> None:
        names = ("rows_per_chunk", "n_rows", "chunks_per_window", "batch_rows", "lanes")
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
        """Windows of an epoch, where there is one lane."""
        return -(-self.n_chunks // self.chunks_per_window)

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        if self.reading is not None:
            return len(self.reading.batch_starts) - 1
        whole, rest = divmod(self.n_rows, self.batch_rows)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def most_window_rows(self) -> int:
        """Rows of the largest window that there can be."""
        if self.reading is not None:
            return int(np.diff(self.epoch(0).lanes[0].starts).max())
        n_chunks = -(-self.n_chunks // self.n_windows) if self.lanes == 1 else self.chunks_per_window
        n_chunks = min(n_chunks, self.n_chunks)
        if self.chunk_table is None:
            return min(self.most_lane_rows, n_chunks * self.rows_per_chunk)
        return min(self.most_lane_rows, int(np.sort(self.chunk_table[:, 1])[-n_chunks:].sum()))

    @property
    def most_lane_rows(self) -> int:
        """Rows of the longest lane."""
        return max(end - begin for begin, end in map(self.lane_span, range(self.lanes)))

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
            rows: NDArray[np.int64] = np.repeat(chunks * self.rows_per_chunk - np.cumsum(sizes) + sizes, sizes)
            rows += np.arange(len(rows))
            return rows
        bits = self.wanted[np.searchsorted(self.chunk_table[:, 0], chunks)]
        line, byte = np.nonzero(bits)  # few, where few rows of many chunks are wanted
        place, bit = np.nonzero(np.unpackbits(bits[line, byte][:, None], axis=1))
        return chunks[line[place]] * self.rows_per_chunk + 8 * byte[place] + bit

    def epoch(self, epoch: int) -> Epoch:
        """The order of one epoch."""
        if self.reading is None:
            chunks = permutation(self.n_chunks, self.seed, CHUNK_ORDER, epoch)
        else:
            chunks = np.arange(self.n_chunks)
        if self.chunk_table is None:
            sizes = self.chunk_rows(chunks)
        else:
            chunks, sizes = self.chunk_table[chunks].T
        before = np.concatenate([[0], np.cumsum(sizes)])
        lanes = tuple(self._lane(epoch, lane, chunks, before) for lane in range(self.lanes))
        return Epoch(plan=self, epoch=epoch, lanes=lanes)

    def _lane(self, epoch: int, lane: int, chunks: NDArray[np.int64], before: NDArray[np.int64]) -> Lane:
        """A lane, from all chunks in order and the rows before each of them."""
        begin, end = self.lane_span(lane)
        first = int(np.searchsorted(before, begin, side="right")) - 1
        last = int(np.searchsorted(before, end, side="left"))
        if self.reading is None:
            n_windows = -(-(last - first) // self.chunks_per_window) if end > begin else 0
            cuts = first + _nearly_equal(last - first, n_windows)
        else:
            cuts = np.flatnonzero(np.diff(chunks // self.reading.chunks_per_shard, prepend=-1, append=-1))
        return Lane(
            plan=self,
            epoch=epoch,
            number=lane,
            chunks=chunks,
            cuts=cuts,
            skipped=begin - int(before[first]),
            starts=np.clip(before[cuts], begin, end) - begin,
        )

    def lane_span(self, lane: int) -> tuple[int, int]:
        """The stretch of the epoch's row sequence that is a lane's; the last, smaller batch is the next lane's turn."""
        whole, rest = divmod(self.n_rows, self.batch_rows)
        per_lane, with_rest = divmod(whole, self.lanes)
        begin, end = (
            (number * per_lane + min(number, with_rest)) * self.batch_rows + rest * (number > with_rest)
            for number in (lane, lane + 1)
        )
        return begin, end


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of a batch that comes from one window."""

    places: NDArray[np.int64]
    """Which of the window's rows, in batch order."""
    start: int
    """The batch row at which they begin."""


class Part(NamedTuple):
    """The rows of one chunk that are in a window."""

    chunk: int
    """The chunk's number."""
    skipped: int
    """Of its (wanted) rows, how many come before."""
    start: int
    """The window row at which they begin."""
    stop: int
    """The window row before which they end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """One lane of an epoch: its windows of chunks, and where each begins in the lane's sequence of rows."""

    plan: Plan
    epoch: int
    number: int
    chunks: NDArray[np.int64]
    """Numbers of all the epoch's chunks, in order."""
    cuts: NDArray[np.int64]
    """`(n_windows + 1,)` where in `chunks` each window begins."""
    skipped: int
    """Rows of its first chunk that belong to the lane before."""
    starts: NDArray[np.int64]
    """`(n_windows + 1,)` rows of the lane before each window."""

    def window_chunks(self, window: int) -> NDArray[np.int64]:
        """Chunk numbers of a window."""
        return self.chunks[self.cuts[window] : self.cuts[window + 1]]

    def parts(self, window: int) -> list[Part]:
        """What a window holds, chunk by chunk; of the lane's first and last chunk perhaps not all."""
        chunks, (low, high) = self.window_chunks(window), self.starts[window : window + 2].tolist()
        ends = np.minimum(np.cumsum(self.plan.chunk_rows(chunks)) - self._before(window), high - low).tolist()
        starts = [0, *ends[:-1]]
        skipped = [self._before(window), *[0] * (len(ends) - 1)]
        return list(map(Part, chunks.tolist(), skipped, starts, ends))

    def _before(self, window: int) -> int:
        """Rows of a window's first chunk that are another lane's."""
        return self.skipped if window == 0 else 0

    def window_order(self, window: int) -> NDArray[np.int64]:
        """The permutation of a window's rows; places count through the window's chunks in their order.

        Reading order is not known from integers alone: the row table has it.
        """
        n = int(self.starts[window + 1] - self.starts[window])
        lane = () if self.plan.lanes == 1 else (self.number,)
        return permutation(n, self.plan.seed, ROW_ORDER, self.epoch, window, *lane)

    def row_ids(self, window: int) -> NDArray[np.int64]:
        """Row id of each place of a window."""
        first = self._before(window)
        n = int(self.starts[window + 1] - self.starts[window])
        return self.plan.row_ids(self.window_chunks(window))[first : first + n]

    def batch_spans(self, batches: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The stretches of the lane's row sequence that some of its batches are: begins and ends."""
        if self.plan.reading is not None:
            return self.plan.reading.batch_starts[batches], self.plan.reading.batch_starts[batches + 1]
        begin = batches * self.plan.batch_rows
        return begin, np.minimum(begin + self.plan.batch_rows, self.starts[-1])

    def batch_span(self, batch: int) -> tuple[int, int]:
        """The stretch that its batch `batch` is."""
        begin, end = self.batch_spans(np.array([batch]))
        return int(begin[0]), int(end[0])

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """One epoch's order."""

    plan: Plan
    epoch: int
    lanes: tuple[Lane, ...]

    def batch_row_ids(self, batch: int) -> NDArray[np.int64]:
        """Global row ids of a batch, from the integers alone; what the loader's batches must equal."""
        number, lane = divmod(batch, self.plan.lanes)
        of_lane = self.lanes[lane]
        parts = ((window, of_lane.window_order(window)) for window in of_lane.batch_windows(number))
        return np.concatenate(
            [of_lane.row_ids(window)[of_lane.piece(number, window, order).places] for window, order in parts]
        )


def _nearly_equal(n: int, parts: int) -> NDArray[np.int64]:
    """`(parts + 1,)` borders of parts of `range(n)` that differ by one at most, the larger ones first."""
    numbers = np.arange(parts + 1)
    size, larger = divmod(n, parts) if parts else (0, 0)
    borders: NDArray[np.int64] = numbers * size + np.minimum(numbers, larger)
    return borders


def chunk_table(shard_n_rows: NDArray[np.int64], rows_per_shard: int, rows_per_chunk: int) -> NDArray[np.int64] | None:
    """The `chunk_table` of a store whose shards have these numbers of rows; None where only the last is not full."""
    if (shard_n_rows[:-1] == rows_per_shard).all():
        return None
    per_shard = rows_per_shard // rows_per_chunk
    rows = shard_n_rows[:, None] - np.arange(per_shard) * rows_per_chunk
    rows = np.clip(rows, 0, rows_per_chunk).reshape(-1)
    numbers = np.flatnonzero(rows)
    return np.stack([numbers, rows[numbers]], axis=1)
