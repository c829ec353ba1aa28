"""The sharded arrays of a site: which there are, of what dtype, with which codecs, and where their chunks lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.spec import Site, StoreSpec
from actcache.store import codecs

_INDEX_ENTRY_BYTES = 16


ABSENT_CHUNK = np.iinfo(np.uint64).max
"""Offset and size of a chunk that a shard does not have, as the sharding codec defines it."""


def arrays_of(site: Site) -> tuple[str, ...]:
    """The sharded arrays of a site."""
    return ("acts", "scale") if codecs.chain_of(site.codec).quantised else ("acts",)


def exponents_of(site: Site) -> NDArray[np.int8] | None:
    """`(D,)` powers of two that the features of a quantised site are multiplied by; None for none."""
    return np.array(site.feature_exponents, np.int8) if site.feature_exponents else None


def chunks_per_shard(spec: StoreSpec) -> int:
    """Inner chunks of a shard."""
    return spec.rows_per_shard // spec.rows_per_chunk


def array_chain(site: Site, array: str) -> codecs.Chain:
    """The codecs of a sharded array's chunks; scales are stored as they are."""
    return codecs.chain_of(site.codec if array == "acts" else "raw")


def array_dtype(spec: StoreSpec, site: Site, array: str) -> np.dtype[Any]:
    """The dtype in a sharded array; scales are the bits of bfloat16 numbers."""
    return array_chain(site, array).stored_dtype(spec.dtype if array == "acts" else "bfloat16")


def index_of(sizes: list[int], n_chunks: int) -> NDArray[np.uint64]:
    """The `(n_chunks, 2)` shard index for chunks of these stored sizes laid end to end; absent chunks are all ones."""
    index = np.full((n_chunks, 2), ABSENT_CHUNK, "<u8")
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum([0, *sizes])[:-1]
    return index


def index_bytes(spec: StoreSpec) -> int:
    """Stored bytes of a shard's index, its crc32c included."""
    return chunks_per_shard(spec) * _INDEX_ENTRY_BYTES + codecs.CRC_BYTES
