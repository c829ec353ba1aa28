"""Single chunks of a store: fetched, checked against what was committed, and decoded into the caller's memory.

In: what is committed. Out: values whose every byte has been checked: the chunk's own crc32c, and that this crc32c is
the one which the shard's commit record lists, so that whole but misplaced objects (swapped, stale, of another store)
are noticed as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.memory import Kept, Scratch
from actcache.store import codecs
from actcache.store.format.keys import ROWS, sharded_key
from actcache.store.format.records import checksum_place
from actcache.store.format.site_arrays import ABSENT_CHUNK, arrays_of, chunks_per_shard, index_bytes
from actcache.store.reading.tables import Tables

_INDEX_BYTES = 64 << 20
"""Most memory for indexes: 20 bytes a chunk, so 3.3 million chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """Where the chunks of a sharded object lie, and what their checksums are to be."""

    spans: NDArray[np.uint64]
    """`(n_chunks, 2)` offset and stored size of each."""
    checksums: NDArray[np.uint32]
    """`(n_chunks,)` the crc32c that was committed for each."""


class Chunks(Tables):
    """The chunks of a store's sites."""

    @cached_property
    def _arrays(self) -> dict[tuple[str, str], tuple[codecs.StoredArray, int]]:
        """By site and name: each array, and its number among those of its site."""
        return {
            (site.name, array.name): (array, number)
            for site in self.spec.sites
            for number, array in enumerate(arrays_of(self.spec, site))
        }

    @cached_property
    def _indexes(self) -> Kept[tuple[str, str, int], Index]:
        return Kept(_INDEX_BYTES)

    def read_chunk(
        self, site: str, shard: int, chunk: int, out: NDArray[Any], scratch: Scratch, *, array: str = codecs.ACTS
    ) -> None:
        """Decode one inner chunk, checked, into the C-contiguous `(rows_per_chunk, D)` array `out`.

        `scratch` receives the stored bytes and is kept by the caller for the next call (one per thread). A quantised
        site has other arrays too: `array="scale"` gives the `(rows_per_chunk,)` scales of an int8 site.

        Raises:
            CorruptShardError: anything about the chunk is not as it was written.
        """
        index = self.index(site, array, shard)
        offset, size = index.spans[chunk].tolist()
        key, chain = self._key(site, array, shard), self._arrays[site, array][0].chain
        if chain.is_raw and size == out.nbytes + codecs.CRC_BYTES:
            # Nothing to decode: the values are read where they belong, their checksum beside them.
            payload, stored = out.reshape(-1).view(np.uint8).data, scratch.take(codecs.CRC_BYTES)
            n_read = self.objects.read_into(key, offset, payload, stored)
            sound = n_read == size and codecs.matches(payload, codecs.checksum_of(stored))
            problem = None if sound else "does not match its checksum"
        else:
            stored = scratch.take(size)
            n_read = self.objects.read_into(key, offset, stored)
            problem = chain.decode_into(stored, out) if n_read == size else ""
        if n_read != size:
            raise self.corrupt(site, shard, f"is missing or too short to hold chunk {chunk} of {array}")
        self.check_chunk(site, array, shard, chunk, stored, index, problem)

    def _key(self, site: str, array: str, shard: int) -> str:
        return sharded_key(site, array, shard, len(self._arrays[site, array][0].row_shape))

    def index(self, site: str, array: str, shard: int) -> Index:
        """Where the chunks of a sharded object lie; CorruptShardError when it is not as written."""

        def read() -> tuple[Index, int]:
            index = self._read_index(site, array, shard)
            return index, index.spans.nbytes + index.checksums.nbytes

        return self._indexes.get((site, array, shard), read)

    def _read_index(self, site: str, array: str, shard: int) -> Index:
        record, n_chunks, number = self.record(site, shard), chunks_per_shard(self.spec), self._arrays[site, array][1]
        key, n_bytes = self._key(site, array, shard), index_bytes(self.spec)
        stored = self.objects.tail(key, n_bytes)
        if stored is None:
            raise self.corrupt(site, shard, f"is missing: there is no {key}")
        if len(stored) != n_bytes:
            raise self.corrupt(site, shard, f"is truncated: {key} has {len(stored):,} bytes")
        index = np.empty((n_chunks, 2), "<u8")
        problem = codecs.RAW.decode_into(stored, index)
        place = checksum_place(self.spec, number, n_chunks)
        if problem is None and codecs.checksum_of(stored) != record.checksums[place]:
            problem = "is not the one that was committed"
        problem = problem or self._implausible(index, record.n_rows, site, array, shard)
        if problem:
            raise self.corrupt(site, shard, f"is damaged: the index of {array} {problem}")
        first = checksum_place(self.spec, number, 0)
        return Index(spans=index, checksums=np.array(record.checksums[first:place], np.uint32))

    def _implausible(self, index: NDArray[np.uint64], n_rows: int, site: str, array: str, shard: int) -> str | None:
        """What cannot be right about an index: a hostile one must not make us read or allocate more than there is."""
        spec = self.spec
        if n_rows != (self.shard_n_rows[shard] if self.held_against_ledger else self.record(ROWS, shard).n_rows):
            return "is for another number of rows than the row table"
        n_chunks = -(-n_rows // spec.rows_per_chunk)
        there, absent = index[:n_chunks], index[n_chunks:]
        key = self._key(site, array, shard)
        end = self.objects.size(key) if self.objects.is_local else 1 << 62
        decoded = spec.rows_per_chunk * self._arrays[site, array][0].row_bytes
        # No codec that can be named makes a chunk four times as large.
        least_most = ((0, end), (codecs.CRC_BYTES, min(end, 4 * decoded + (1 << 16))))
        within = (((least <= there[:, i]) & (there[:, i] <= most)).all() for i, (least, most) in enumerate(least_most))
        return None if all(within) and (absent == ABSENT_CHUNK).all() else "lists other chunks than there can be"

    def expect_chunk(self, site: str, shard: int, chunk: int, *, array: str = codecs.ACTS) -> None:
        """Say that an inner chunk is going to be read soon, so that a disk can begin to."""
        offset, size = self.index(site, array, shard).spans[chunk].tolist()
        self.objects.expect(self._key(site, array, shard), offset, size)

    def fetch_chunk(self, site: str, shard: int, chunk: int, *, array: str = codecs.ACTS) -> memoryview:
        """The stored bytes of one inner chunk, not yet checked: the part of `read_chunk` that waits for the storage."""
        offset, size = self.index(site, array, shard).spans[chunk].tolist()
        stored = self.objects.span(self._key(site, array, shard), offset, size)
        if stored is None or len(stored) != size:
            raise self.corrupt(site, shard, f"is missing or too short to hold chunk {chunk} of {array}")
        return stored

    def decode_chunk(
        self, site: str, shard: int, chunk: int, stored: memoryview, out: NDArray[Any], *, array: str = codecs.ACTS
    ) -> None:
        """Check and decode what `fetch_chunk` gave: the part of `read_chunk` that uses the processor."""
        problem = self._arrays[site, array][0].chain.decode_into(stored, out)
        self.check_chunk(site, array, shard, chunk, stored, self.index(site, array, shard), problem)

    def check_chunk(
        self, site: str, array: str, shard: int, chunk: int, stored: memoryview, index: Index, problem: str | None
    ) -> None:
        """Raise unless there is no problem with a stored chunk, and it is the one that was committed."""
        if problem is None and codecs.checksum_of(stored) != index.checksums[chunk]:
            problem = "is not the one that was committed"
        if problem:
            raise self.corrupt(site, shard, f"is damaged: chunk {chunk} of {array} {problem}")

    def check_sharded(self, site: str, array: str, shard: int) -> None:
        """Read one sharded object from end to end and hold every byte against the commit record.

        Raises:
            CorruptShardError: a byte, or the length, is not as it was written.
        """
        index = self.index(site, array, shard)
        chunks = np.flatnonzero(index.spans[:, 1] != ABSENT_CHUNK)
        key, spans = self._key(site, array, shard), index.spans[chunks].tolist()
        for chunk, (_, size), stored in zip(chunks.tolist(), spans, self.objects.pieces(key, spans), strict=True):
            problem = "is cut short" if len(stored) != size else None
            if problem is None and not codecs.is_whole(stored):
                problem = "does not match its checksum"
            self.check_chunk(site, array, shard, chunk, memoryview(stored), index, problem)
        if self.objects.size(key) != sum(size for _, size in spans) + index_bytes(self.spec):
            raise self.corrupt(site, shard, f"is damaged: {key} is not as long as its chunks and its index")
