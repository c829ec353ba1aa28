"""The sharded arrays of a site: which there are, under which keys, and where their chunks lie."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from actcache.spec import Site, StoreSpec
from actcache.store import codecs
from actcache.store.format.keys import sharded_key

_INDEX_ENTRY_BYTES = 16


ABSENT_CHUNK = np.iinfo(np.uint64).max
"""Offset and size of a chunk that a shard does not have, as the sharding codec defines it."""


def arrays_of(spec: StoreSpec, site: Site) -> tuple[codecs.StoredArray, ...]:
    """The sharded arrays of a site; the first says in its metadata what the site is."""
    return codecs.stored_arrays(site.codec, spec.dtype, site.width)


def powers_of(site: Site) -> codecs.Powers | None:
    """`(D,)` powers of two that the features of a quantised site are multiplied by; None where there are none."""
    if not site.feature_exponents:
        return None
    return np.ldexp(np.float32(1), np.array(site.feature_exponents, np.int32))


def object_key(site: Site, array: codecs.StoredArray, shard: int) -> str:
    """The sharded object of a site's shard."""
    return sharded_key(site.name, array.name, shard, len(array.row_shape))


def chunks_per_shard(spec: StoreSpec) -> int:
    """Inner chunks of a shard."""
    return spec.rows_per_shard // spec.rows_per_chunk


def index_of(sizes: list[int], n_chunks: int) -> NDArray[np.uint64]:
    """The `(n_chunks, 2)` shard index for chunks of these stored sizes laid end to end; absent chunks are all ones."""
    index = np.full((n_chunks, 2), ABSENT_CHUNK, "<u8")
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum([0, *sizes])[:-1]
    return index


def index_bytes(spec: StoreSpec) -> int:
    """Stored bytes of a shard's index, its crc32c included."""
    return chunks_per_shard(spec) * _INDEX_ENTRY_BYTES + codecs.CRC_BYTES
