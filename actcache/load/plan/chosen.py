"""The rows that a loader is to deliver, where not all of them are: a bit for each row, chunk by chunk.

In: an open store, and rows by id, by a mask or by a filter. Out: integers for `plan.py`, and a digest for its state.
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
"""Row tables that are asked for at a time of a store that is not a folder; each is held whole, 12 bytes a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """Wanted rows of a store: an eighth of a byte for each row of the chunks that have any, 16 bytes for each chunk."""

    n_rows: int
    """Rows that are wanted."""
    chunk_table: NDArray[np.int64]
    """`(n_chunks, 2)` number and wanted rows of each chunk that has any, in order."""
    bits: NDArray[np.uint8]
    """`(n_chunks, bytes)` which rows of those chunks, highest bit first."""
    digest: str
    """Of which rows these are, however they were asked for."""


def chosen_rows(store: Store, rows: Rows) -> Chosen | None:
    """The rows that `rows` means; None when that is every row there is.

    Filters read the row table, each shard's once, several shards at a time; memory is that of the result and of those.

    Raises:
        IndexError: a row is none. ConfigError: no row is left, or one is named twice. CorruptShardError: a row table
        is damaged.
    """
    masks = shard_masks(store, rows)

    def of_shard(shard: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        return _packed(store, shard, masks)

    threads = (os.cpu_count() or 1) if store.objects.is_local else _REQUESTS
    with ThreadPoolExecutor(threads, thread_name_prefix="actcache-rows") as pool:
        parts = list(pool.map(of_shard, np.flatnonzero(store.shard_n_rows).tolist()))
    n_rows = sum(int(table[:, 1].sum()) for table, _ in parts)
    if not n_rows:
        raise ConfigError(f"loader: rows means none of the {store.n_rows:,} rows of {store.path}; choose others")
    if n_rows == store.n_rows:
        return None
    table, bits = (np.concatenate(part) for part in zip(*parts, strict=True))
    digest = hashlib.sha256(np.ascontiguousarray(table, "<i8").data)
    digest.update(np.ascontiguousarray(bits).data)
    return Chosen(n_rows=n_rows, chunk_table=table, bits=bits, digest=digest.hexdigest())


def _packed(
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
