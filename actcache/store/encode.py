"""Encode one site of one shard: shuffled, measured, compressed chunk by chunk, and put as one sharded object.

The hot path of writing. Buffers are kept from shard to shard (an encoder belongs to one thread), and what is done to a
chunk is done while it lies in the core's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.spec import Site, StoreSpec
from actcache.store import codecs, layout
from actcache.store.objects import Objects
from actcache.store.stats import LineBuilder


class ShardEncoder:
    """Writes sites of shards, one after the other."""

    def __init__(self, objects: Objects, spec: StoreSpec) -> None:
        self.objects, self.spec = objects, spec
        self._chunks: dict[tuple[int, str], NDArray[Any]] = {}

    def write(self, site: Site, shard: int, rows: NDArray[Any], order: NDArray[np.int64]) -> layout.Record:
        """Put row `order[i]` of `rows (n, D)` as row `i`, and the statistics line; returns the record to commit."""
        spec, quantised = self.spec, codecs.chain_of(site.codec).quantised
        shuffled = self._chunk(site.width, rows.dtype)
        objects = {array: _ShardedObject(spec, site, array) for array in layout.arrays_of(site)}
        builder = LineBuilder(site.width, spec.dtype)
        for start in range(0, len(order), spec.rows_per_chunk):
            wanted = order[start : start + spec.rows_per_chunk]
            n = len(wanted)
            builder.take(rows, wanted, shuffled[:n])
            shuffled[n:] = 0  # the padding of a partial last chunk is always the same bytes
            if quantised:
                values = self._chunk(site.width, np.dtype("i1"))
                scale = np.empty(spec.rows_per_chunk, "<u2")
                codecs.quantise_rows(shuffled, spec.dtype, values, scale, layout.exponents_of(site))
                objects["acts"].add(values)
                objects["scale"].add(scale)
            else:
                objects["acts"].add(shuffled)
        checksums: list[int] = []
        n_bytes = 0
        for array, sharded in objects.items():
            pieces, part = sharded.assemble()
            self.objects.put(layout.sharded_key(site.name, array, shard), *pieces)
            n_bytes += sum(map(len, pieces))
            checksums += part
            if array == "acts":
                crc, size = layout.put_table(self.objects, layout.stats_key(site.name, shard), builder.line[None])
                n_bytes += size
                checksums.append(crc)
        return layout.Record(n_rows=len(order), n_bytes=n_bytes, checksums=tuple(checksums))

    def _chunk(self, width: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        key = (width, dtype.str)
        if key not in self._chunks:
            self._chunks[key] = np.empty((self.spec.rows_per_chunk, width), dtype)
        return self._chunks[key]


class _ShardedObject:
    """The chunks of one sharded array, encoded, until they are put together."""

    def __init__(self, spec: StoreSpec, site: Site, array: str) -> None:
        self._chain, self._n_chunks = layout.array_chain(site, array), layout.chunks_per_shard(spec)
        self._pieces: list[bytes] = []
        self._sizes: list[int] = []
        self._checksums: list[int] = []

    def add(self, chunk: NDArray[Any]) -> None:
        """Encode a whole chunk; it may be overwritten afterwards."""
        payload, crc = self._chain.encode(chunk)
        # Without compression the payload is the chunk itself, which the next one overwrites.
        kept = payload if isinstance(payload, bytes) else bytes(payload)
        self._pieces += [kept, codecs.crc_bytes(crc)]
        self._sizes.append(len(kept) + codecs.CRC_BYTES)
        self._checksums.append(crc)

    def assemble(self) -> tuple[list[bytes], list[int]]:
        """The object in pieces, and the crc32c of each chunk and of the index."""
        index, crc = codecs.chain_of("raw").encode(layout.index_of(self._sizes, self._n_chunks))
        absent = [0] * (self._n_chunks - len(self._checksums))
        return [*self._pieces, bytes(index), codecs.crc_bytes(crc)], [*self._checksums, *absent, crc]
