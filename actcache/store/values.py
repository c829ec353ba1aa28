"""Rows of a site as one array, and sharded objects from end to end: many chunks at a time.

In: an open store and what is asked of it. Out: values, or errors that name the shard.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.spec import Site
from actcache.store import codecs, layout
from actcache.store.rows import Rows

if TYPE_CHECKING:
    from actcache.store.reader import Store


def read_stored(store: Store, site: str, rows: Rows, threads: int) -> NDArray[Any]:
    """`(n, D)` rows of a site in the dtype of numpy that stands for the logical one."""
    store.check_site(site)
    wanted = store.checked_rows(rows)
    spec, about = store.spec, store.spec.site(site)
    values = np.empty((len(wanted), about.width), store.stored_dtype)
    chunk_ids, places, counts = np.unique(wanted // spec.rows_per_chunk, return_inverse=True, return_counts=True)
    # Which of the wanted rows each chunk holds, found by one sort and not by one scan a chunk.
    rows_of_chunk = np.split(np.argsort(places, kind="stable"), np.cumsum(counts)[:-1])

    def fetch(part: NDArray[np.int64]) -> None:
        buffer, scratch = np.empty((spec.rows_per_chunk, about.width), store.stored_dtype), codecs.Scratch()
        for number in part:
            chunk_id = int(chunk_ids[number])
            _read_logical(store, about, *divmod(chunk_id, layout.chunks_per_shard(spec)), buffer, scratch)
            here = rows_of_chunk[number]
            values[here] = buffer[wanted[here] - chunk_id * spec.rows_per_chunk]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fetch, np.array_split(np.arange(len(chunk_ids)), threads)))
    return values


def _read_logical(store: Store, site: Site, shard: int, chunk: int, out: NDArray[Any], scratch: codecs.Scratch) -> None:
    """One chunk as values of the logical dtype; those of a quantised site are multiplied out."""
    if not codecs.chain_of(site.codec).quantised:
        store.read_chunk(site.name, shard, chunk, out, scratch)
        return
    values, scale = np.empty(out.shape, "i1"), np.empty(len(out), "<u2")
    store.read_chunk(site.name, shard, chunk, values, scratch)
    store.read_chunk(site.name, shard, chunk, scale, scratch, array="scale")
    wide = np.empty(out.shape, np.float32) if store.spec.dtype == "float16" else out
    codecs.dequantise_rows(values, scale, wide, layout.exponents_of(site))
    if wide is not out:
        out[:] = wide


def check_sharded(store: Store, site: str, array: str, shard: int) -> None:
    """Hold every byte of a sharded object against the commit record."""
    index = store.index(site, array, shard)
    chunks = np.flatnonzero(index.spans[:, 1] != layout.ABSENT_CHUNK)
    key, spans = layout.sharded_key(site, array, shard), index.spans[chunks].tolist()
    for chunk, (_, size), stored in zip(chunks.tolist(), spans, store.objects.pieces(key, spans), strict=True):
        problem = "is cut short" if len(stored) != size else None
        if problem is None and not codecs.is_whole(stored):
            problem = "does not match its checksum"
        store.check_chunk(site, array, shard, chunk, memoryview(stored), index, problem)
    if store.objects.size(key) != sum(size for _, size in spans) + layout.index_bytes(store.spec):
        raise store.corrupt(site, shard, f"is damaged: {key} is not as long as its chunks and its index")
