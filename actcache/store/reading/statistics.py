"""Statistics and covariance of a site's rows.

In: the chunks of a store, a site, and a selection of rows. Out: figures; memory does not grow with the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, CorruptShardError, StoreError
from actcache.kernels.bits import widen
from actcache.store.format.stats import LineBuilder, SiteStats, merge, stats_of
from actcache.store.reading.chunks import Chunks
from actcache.store.reading.rows import Rows
from actcache.store.reading.values import blocks_of_rows

_THREADS = 2
"""Threads that read the rows to be measured."""
_MOST_MATRIX_BYTES = 1 << 33
"""A site of width 32,768; a wider one is more likely a mistake."""


def stats(store: Chunks, site: str, shards: Sequence[int] | None, rows: Rows | None) -> SiteStats:
    """Statistics over all committed rows of a site, those of some shards, or some rows."""
    store.check_site(site)
    if shards is not None and rows is not None:
        raise ConfigError("stats: give shards or rows, not both")
    if rows is not None:
        return measure_rows(store, site, rows, _THREADS)
    if store.sealed and shards is None:
        line = store.total(site)
    elif store.committed:
        line = merge(store.shard_line(site, shard) for shard in (store.committed if shards is None else shards))
    else:
        raise StoreError(f"{store.path} has no committed shard yet, so there are no statistics of {site}")
    if not (np.isfinite(line).all() and (line[-6:] >= 0).all()):  # rows that are not finite were never counted
        raise CorruptShardError(
            f"the stored statistics of {site} in {store.path} cannot be right: negative or not finite", store=store.path
        )
    return stats_of(line)


def measure_rows(store: Chunks, site: str, rows: Rows, threads: int) -> SiteStats:
    """Statistics of some rows, from their values."""
    total = None
    for values in blocks_of_rows(store, site, rows, threads):
        builder = LineBuilder(values.shape[1], store.spec.dtype)
        builder.add(values)
        total = builder.line if total is None else merge([total, builder.line])
    if total is None:
        raise StoreError(f"{store.path} has none of the rows asked for, so there are no statistics of {site}")
    return stats_of(total)


def covariance(store: Chunks, site: str, rows: Rows | None, threads: int) -> NDArray[np.float64]:
    """`(D, D)` population covariance of the rows that are finite; see `Store.covariance`.

    Products are of deviations from a shift near the mean: the store's own mean, or for a selection of rows the mean of
    the first block. The shift's error is corrected at the end, so digits are lost only where rows lie many thousand
    deviations apart.
    """
    import torch

    store.check_site(site)
    width = store.spec.site(site).width
    if 8 * width**2 > _MOST_MATRIX_BYTES:
        raise ConfigError(
            f"{site} is {width:,} wide, its covariance matrix would take {8 * width**2 / 2**30:,.0f} GiB, and at most "
            f"{_MOST_MATRIX_BYTES >> 30} are possible; calculate with a part of its features: Store.as_dask"
        )
    shift = stats(store, site, None, None).mean if rows is None else None
    products = torch.zeros((width, width), dtype=torch.float64)
    sums, n_rows = np.zeros(width), 0
    for values in _finite_blocks(store, site, rows, threads):
        if shift is None:
            shift = values.mean(axis=0)
        values -= shift
        deviations = torch.from_numpy(values)
        products.addmm_(deviations.T, deviations)
        sums += values.sum(axis=0)
        n_rows += len(values)
    if not n_rows:
        raise StoreError(f"none of the rows asked for of {site} in {store.path} is finite, so they have no covariance")
    matrix: NDArray[np.float64] = products.numpy()
    matrix /= n_rows
    matrix -= np.outer(sums / n_rows, sums / n_rows)
    np.fill_diagonal(matrix, np.maximum(matrix.diagonal(), 0.0))
    return (matrix + matrix.T) / 2  # a matrix product is symmetric except in its last digits


def _finite_blocks(store: Chunks, site: str, rows: Rows | None, threads: int) -> Iterator[NDArray[np.float64]]:
    for stored in blocks_of_rows(store, site, rows, threads):
        values = widen(stored, store.spec.dtype).astype(np.float64)
        finite = np.isfinite(values).all(axis=1)
        if finite.any():
            yield values if finite.all() else values[finite]
