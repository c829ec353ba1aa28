"""Rows of a site: as one array, or a block of whole chunks at a time.

In: the chunks of a store, and which rows are meant. Out: values, or errors that name the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.memory import Scratch
from actcache.spec import Site
from actcache.store import codecs
from actcache.store.format.site_arrays import arrays_of, chunks_per_shard, powers_of
from actcache.store.reading.chunks import Chunks
from actcache.store.reading.rows import Rows, checked_rows, shard_masks


def read_stored(store: Chunks, site: str, rows: Rows, threads: int) -> NDArray[Any]:
    """`(n, D)` rows of a site in the dtype of numpy that stands for the logical one."""
    store.check_site(site)
    wanted = checked_rows(store, rows)
    spec, about = store.spec, store.spec.site(site)
    values = np.empty((len(wanted), about.width), store.stored_dtype)
    chunk_ids, places, counts = np.unique(wanted // spec.rows_per_chunk, return_inverse=True, return_counts=True)
    # Which of the wanted rows each chunk holds, found by one sort and not by one scan a chunk.
    rows_of_chunk = np.split(np.argsort(places, kind="stable"), np.cumsum(counts)[:-1])

    def fetch(part: NDArray[np.int64]) -> None:
        read, buffer = _reader(store, about), np.empty((spec.rows_per_chunk, about.width), store.stored_dtype)
        for number in part:
            chunk_id = int(chunk_ids[number])
            read(*divmod(chunk_id, chunks_per_shard(spec)), buffer)
            here = rows_of_chunk[number]
            values[here] = buffer[wanted[here] - chunk_id * spec.rows_per_chunk]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fetch, np.array_split(np.arange(len(chunk_ids)), threads)))
    return values


def _reader(store: Chunks, site: Site) -> Callable[[int, int, NDArray[Any]], None]:
    """What reads a chunk of a shard as values of the logical dtype; for one thread."""
    scratch, quantiser, powers = Scratch(), codecs.quantiser_of(site.codec), powers_of(site)
    arrays = arrays_of(store.spec, site)

    def read(shard: int, chunk: int, out: NDArray[Any]) -> None:
        if quantiser is None:
            store.read_chunk(site.name, shard, chunk, out, scratch)
            return
        for array, part in zip(arrays, parts, strict=True):
            store.read_chunk(site.name, shard, chunk, part, scratch, array=array.name)
        codecs.decode_rows(quantiser, parts, powers, out)

    n_rows = store.spec.rows_per_chunk
    parts = [np.empty((n_rows, *array.row_shape), array.dtype) for array in arrays if quantiser]
    return read


def blocks_of_rows(store: Chunks, site: str, rows: Rows | None, threads: int) -> Iterator[NDArray[Any]]:
    """A site's rows in the stored dtype, shard by shard: whole chunks, about as many rows at a time as it is wide.

    `rows` None means all that are committed. Raises like `shard_masks`, and what `Store.read_stored` does.
    """
    spec = store.spec
    of_shard = None if rows is None else shard_masks(store, rows)
    n_chunks = -(-spec.site(site).width // spec.rows_per_chunk)
    cuts = np.arange(n_chunks, spec.rows_per_shard // spec.rows_per_chunk, n_chunks) * spec.rows_per_chunk
    for shard in store.committed:
        n_rows, first = int(store.shard_n_rows[shard]), shard * spec.rows_per_shard
        wanted = np.arange(n_rows) if of_shard is None else np.flatnonzero(of_shard(shard))
        for part in np.split(wanted, np.searchsorted(wanted, cuts)):
            if len(part):
                yield read_stored(store, site, part + first, threads)
