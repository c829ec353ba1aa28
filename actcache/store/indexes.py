"""The indexes of sharded objects: where each inner chunk lies in its shard. Read once each, and checked then.

In: an open store. Out: offsets and sizes that can be read and allocated by, even where a store was made to do harm.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.store import codecs, layout

if TYPE_CHECKING:
    from actcache.store.reader import Store


class Indexes:
    """Those of a store that have been read so far."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str, int], NDArray[np.uint64]] = {}
        self._guards: dict[tuple[str, str, int], threading.Lock] = {}

    def of(self, store: Store, site: str, array: str, shard: int) -> NDArray[np.uint64]:
        """`(n_chunks, 2)` offset and stored size of each chunk; CorruptShardError when they are not as written."""
        key = (site, array, shard)
        if key not in self._read:
            # Of many threads that need it at once, one asks for it: that is what takes long where a store is far away.
            with self._guards.setdefault(key, threading.Lock()):
                if key not in self._read:
                    self._read[key] = _read_index(store, site, array, shard)
        return self._read[key]


def _read_index(store: Store, site: str, array: str, shard: int) -> NDArray[np.uint64]:
    record, n_chunks = store.record(site, shard), layout.chunks_per_shard(store.spec)
    key, n_bytes = layout.sharded_key(site, array, shard), layout.index_bytes(store.spec)
    stored = store.objects.tail(key, n_bytes)
    if stored is None:
        raise store.corrupt(site, shard, f"is missing: there is no {key}")
    if len(stored) != n_bytes:
        raise store.corrupt(site, shard, f"is truncated: {key} has {len(stored):,} bytes")
    index = np.empty((n_chunks, 2), "<u8")
    problem = codecs.chain_of("raw").decode_into(stored, index)
    place = layout.checksum_place(store.spec, array, n_chunks)
    if problem is None and codecs.checksum_of(stored) != record.checksums[place]:
        problem = "is not the one that was committed"
    problem = problem or _implausible(store, index, record.n_rows, site, array, shard)
    if problem:
        raise store.corrupt(site, shard, f"is damaged: the index of {array} {problem}")
    return index


def _implausible(
    store: Store, index: NDArray[np.uint64], n_rows: int, site_name: str, array: str, shard: int
) -> str | None:
    """What about an index cannot be: a hostile one must not make us read or allocate more than there is."""
    spec, site = store.spec, store.spec.site(site_name)
    by_ledger = store.sealed and store.use_ledger
    if n_rows != (store.shard_n_rows[shard] if by_ledger else store.record(layout.ROWS, shard).n_rows):
        return "is for another number of rows than the row table"
    n_chunks = -(-n_rows // spec.rows_per_chunk)
    there, absent = index[:n_chunks], index[n_chunks:]
    key = layout.sharded_key(site_name, array, shard)
    end = store.objects.size(key) if store.objects.is_local else 1 << 62
    width = site.width if array == "acts" else 1
    decoded = spec.rows_per_chunk * width * layout.array_dtype(spec, site, array).itemsize
    # No codec that can be named makes a chunk four times as large.
    least_most = ((0, end), (codecs.CRC_BYTES, min(end, 4 * decoded + (1 << 16))))
    within = (((least <= there[:, i]) & (there[:, i] <= most)).all() for i, (least, most) in enumerate(least_most))
    return None if all(within) and (absent == layout.ABSENT_CHUNK).all() else "lists other chunks than there can be"
