"""The rows that a loader is to deliver, if that is not all of them: a bit for each row, chunk by chunk.

In: an open store, and rows by id, by mask or by filter. Out: integers for `epochs.py`, and a digest for the state.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.store import Rows, shard_masks

if TYPE_CHECKING:
    from actcache.store import Store

_REQUESTS = 32
"""Row tables read at a time from a store that is not a folder; each is in memory as a whole, 12 bytes a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenRows:
    """Selected rows of a store. Takes one bit for each row and 16 bytes for each chunk, of chunks with such rows."""

    n_rows: int
    """Rows that are selected."""
    chunk_table: NDArray[np.int64]
    """`(n_chunks, 2)` number and selected rows of each chunk that has any, in order."""
    bits: NDArray[np.uint8]
    """`(n_chunks, bytes)` a bit for each row of those chunks, highest bit first."""
    digest: str
    """The same for the same rows, however they were asked for."""


def choose_rows(store: Store, rows: Rows) -> ChosenRows | None:
    """The rows that `rows` selects; None if that is every row of the store.

    Filters read the row table of each shard once, several shards at a time; memory is that of the result and of those.

    Raises:
        IndexError: a row id does not exist. ConfigError: no row is selected, or one twice. CorruptShardError: a row
        table is damaged.
    """
    masks = shard_masks(store, rows)

    def of_shard(shard: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        return _pack_shard(store, shard, masks)

    threads = (os.cpu_count() or 1) if store.objects.is_local else _REQUESTS
    with ThreadPoolExecutor(threads, thread_name_prefix="actcache-rows") as pool:
        parts = list(pool.map(of_shard, np.flatnonzero(store.shard_n_rows).tolist()))
    n_rows = sum(int(table[:, 1].sum()) for table, _ in parts)
    if not n_rows:
        raise ConfigError(f"loader: rows selects none of the {store.n_rows:,} rows of {store.path}; choose others")
    if n_rows == store.n_rows:
        return None
    table, bits = (np.concatenate(part) for part in zip(*parts, strict=True))
    digest = hashlib.sha256(np.ascontiguousarray(table, "<i8").data)
    digest.update(np.ascontiguousarray(bits).data)
    return ChosenRows(n_rows=n_rows, chunk_table=table, bits=bits, digest=digest.hexdigest())


def _pack_shard(
    store: Store, shard: int, masks: Callable[[int], NDArray[np.bool_]]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """A shard's lines of `chunk_table` and `bits`."""
    spec = store.spec
    padded = np.zeros(spec.rows_per_shard, bool)
    wanted = masks(shard)
    padded[: len(wanted)] = wanted
    by_chunk = padded.reshape(-1, spec.rows_per_chunk)
    counts = by_chunk.sum(axis=1)
    there = np.flatnonzero(counts)
    numbers = shard * len(by_chunk) + there
    return np.stack([numbers, counts[there]], axis=1), np.packbits(by_chunk[there], axis=1)
