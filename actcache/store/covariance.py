"""The covariance of a site's dimensions, on demand: one pass over the rows, as exact as two.

In: an open store and a site. Out: a `(D, D)` matrix, in memory that the number of rows has no part in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, StoreError
from actcache.store.rows import Rows, blocks_of_rows

if TYPE_CHECKING:
    from actcache.store.reader import Store


_MOST_MATRIX_BYTES = 1 << 33
"""A site of width 32,768; a wider one would rather be asked for by mistake."""


def covariance(store: Store, site: str, rows: Rows | None, threads: int) -> NDArray[np.float64]:
    """`(D, D)` population covariance of the rows that are finite; see `Store.covariance`.

    Products are taken of the deviations from a shift that is near the mean: the store's own mean, and for some of the
    rows that of the first of them. What the shift is off is taken away at the end, so it costs digits only where rows
    lie many thousand deviations apart.
    """
    import torch

    store.check_site(site)
    width = store.spec.site(site).width
    if 8 * width**2 > _MOST_MATRIX_BYTES:
        raise ConfigError(
            f"{site} is {width:,} wide, its covariance matrix would take {8 * width**2 / 2**30:,.0f} GiB, and at most "
            f"{_MOST_MATRIX_BYTES >> 30} are possible; calculate with a part of its features: Store.as_dask"
        )
    shift = store.stats(site).mean if rows is None else None
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
    return (matrix + matrix.T) / 2  # a product of matrices is symmetric but for its last digits


def _finite_blocks(store: Store, site: str, rows: Rows | None, threads: int) -> Iterator[NDArray[np.float64]]:
    for stored in blocks_of_rows(store, site, rows, threads):
        values = _widened(stored, store.spec.dtype)
        finite = np.isfinite(values).all(axis=1)
        if finite.any():
            yield values if finite.all() else values[finite]


def _widened(stored: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    if dtype == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float64)
