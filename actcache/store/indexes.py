"""The indexes of sharded objects: where each inner chunk lies in its shard. Read once each, and checked then.

In: an open store. Out: offsets and sizes that can be read and allocated by, even where a store was made to do harm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache.store import codecs, layout

if TYPE_CHECKING:
    from actcache.store.reader import Store

Key = TypeVar("Key")
Value = TypeVar("Value")
_INDEX_BYTES = 64 << 20
"""Of indexes that are kept: 20 bytes a chunk, so 3.3 million chunks."""


class Kept(Generic[Key, Value]):
    """Values that have been read, the latest ones that fit; what is found costs no lock."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._n_bytes = most_bytes, 0
        self._values: dict[Key, tuple[Value, int]] = {}
        self._guards: dict[Key, threading.Lock] = {}
        self._changing = threading.Lock()

    def get(self, key: Key, read: Callable[[], tuple[Value, int]]) -> Value:
        """The value of a key, and if need be from `read`, which says how many bytes of memory it takes."""
        if (found := self._values.get(key)) is None:
            # Of many threads that need it at once, one asks for it: that is what takes long where a store is far away.
            with self._guards.setdefault(key, threading.Lock()):
                if (found := self._values.get(key)) is None:
                    found = read()
                    self._keep(key, found)
        return found[0]

    def _keep(self, key: Key, found: tuple[Value, int]) -> None:
        with self._changing:
            self._values[key] = found
            self._n_bytes += found[1]
            while self._n_bytes > self._most_bytes and len(self._values) > 1:
                oldest = next(iter(self._values))
                self._n_bytes -= self._values.pop(oldest)[1]
                self._guards.pop(oldest, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Where the chunks of a sharded object lie, and what their checksums are to be."""

    spans: NDArray[np.uint64]
    """`(n_chunks, 2)` offset and stored size of each."""
    checksums: NDArray[np.uint32]
    """`(n_chunks,)` the crc32c that was committed for each."""


class Indexes:
    """Those of a store that were read last."""

    def __init__(self) -> None:
        self._kept = Kept[tuple[str, str, int], Index](_INDEX_BYTES)

    def of(self, store: Store, site: str, array: str, shard: int) -> Index:
        """The index of a sharded object; CorruptShardError when it is not as written."""

        def read() -> tuple[Index, int]:
            index = _read_index(store, site, array, shard)
            return index, index.spans.nbytes + index.checksums.nbytes

        return self._kept.get((site, array, shard), read)


def _read_index(store: Store, site: str, array: str, shard: int) -> Index:
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
    first = layout.checksum_place(store.spec, array, 0)
    return Index(spans=index, checksums=np.array(record.checksums[first:place], np.uint32))


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
