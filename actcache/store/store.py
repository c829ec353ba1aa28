"""Open a store and read from it: rows, tokens, statistics, summaries.

In: a folder, a URL or a zarr store. Out: a `Store`, which stands on `Committed`, `Tables` and `Chunks` of `reading/`:
every byte that it returns has been checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, StoreNotFoundError
from actcache.files import shown
from actcache.kernels.bits import bits_tensor
from actcache.store.backends.objects import Objects
from actcache.store.format.root import read_root
from actcache.store.format.stats import SiteStats
from actcache.store.reading import statistics, values, views
from actcache.store.reading.chunks import Chunks
from actcache.store.reading.context import Context, context
from actcache.store.reading.rows import Rows, checked_rows, row_ids

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray


def open_store(path: str | Path | Objects) -> Store:
    """Open a store for reading; an unfinished one shows the shards committed at this moment.

    Raises:
        StoreNotFoundError: nothing is there. NotAStoreError: something else is. StoreVersionError: it is too new.

    Examples:
        >>> ac.open_store("acts.zarr").n_rows
        4032
    """
    objects = path if isinstance(path, Objects) else Objects(path, read_only=True)
    root = read_root(objects)
    if root.state == "creating":
        raise StoreNotFoundError(
            f"the creation of the store at {objects} was not finished; run 'actcache extract' again"
        )
    return Store(objects, root)


class Store(Chunks):
    """An activation store, open for reading.

    A row id is an index into the store's arrays: row `r` lies in shard `r // spec.rows_per_shard`. Usually every id up
    to `spec.n_rows` is a row; in a shard that leaves rows out, the last ids are not.

    Examples:
        >>> store = ac.open_store("acts.zarr")
        >>> store.n_rows, store.sites, store.sealed
        (4032, ['blocks.3.mlp.hook_in', 'blocks.3.hook_mlp_out'], True)
        >>> store.read(site_out, [0, 7, 4031]).shape, store.spec.dtype
        (torch.Size([3, 128]), 'bfloat16')
        >>> store.stats(site_out).mean.shape, store.tokens().shape
        ((128,), (64, 64))
    """

    def __repr__(self) -> str:
        try:
            n_rows = f"{self.n_rows:,} of {self.spec.n_rows:,} rows"
        except OSError:  # a damaged store can still be shown
            n_rows = "an unknown number of rows"
        return f"Store({str(self.objects)!r}, {n_rows}, {len(self.sites)} sites)"

    def read(self, site: str, rows: Rows, *, threads: int = 2) -> torch.Tensor:
        """Rows of a site as a `(n, D)` tensor in the logical dtype; `rows` is a slice, row ids, a mask, or a filter.

        Raises:
            SiteError: no such site. IndexError: a row is out of range. CorruptShardError: a shard is damaged.
        """
        return bits_tensor(self.read_stored(site, rows, threads=threads), self.spec.dtype)

    def read_stored(self, site: str, rows: Rows, *, threads: int = 2) -> NDArray[Any]:
        """Like `read`, as a numpy array. numpy has no bfloat16, so its values are returned as their bits in uint16."""
        return values.read_stored(self, site, rows, threads)

    def row_ids(self) -> NDArray[np.int64]:
        """Ids of all rows that can be read now, in order: `range(n_rows)`, unless shards are missing or not full."""
        return row_ids(self, 0, self.spec.n_rows)

    def checked_rows(self, rows: Rows) -> NDArray[np.int64]:
        """The row ids that a slice, ids, a mask or a filter select; IndexError when one of them does not exist."""
        return checked_rows(self, rows)

    def context(self, row: int, before: int = 16, after: int = 16, *, across_documents: bool = False) -> Context:
        """The tokens around the one that a row belongs to, and where they are from.

        Sequences are in shuffled order, so a context never reaches beyond its own. A packed sequence has pieces of
        several texts; by default only the piece of the row's text is returned.

        Args:
            row: a row id.
            before: the most tokens to return before it.
            after: the most tokens to return after it.
            across_documents: include tokens of other texts in the sequence.

        Raises:
            IndexError: there is no such row. StoreIncompleteError: its shard is not written yet. CorruptShardError:
            what has to be read is damaged.
        """
        return context(self, row, before, after, across_documents)

    def stats(self, site: str, *, shards: Sequence[int] | None = None, rows: Rows | None = None) -> SiteStats:
        """Statistics over all committed rows of a site, over those of some shards, or over some rows, which are read.

        Raises:
            SiteError: no such site. StoreError: no row is selected. IndexError: a selected row does not exist.
        """
        return statistics.stats(self, site, shards, rows)

    def covariance(self, site: str, rows: Rows | None = None, *, threads: int = 2) -> NDArray[np.float64]:
        """`(D, D)` population covariance of a site's dimensions, over all committed rows or some of them.

        Calculated in float64 in one pass over the values; rows with NaN or an infinity are left out, as in `stats`.
        Takes memory for about three such matrices.

        Raises:
            SiteError: no such site. StoreError: no finite row is selected. IndexError: a selected row does not exist.
            ConfigError: the matrix would take more than 8 GiB.
        """
        return statistics.covariance(self, site, rows, threads)

    def info(self) -> dict[str, Any]:
        """What the store is, how complete, how large, and its statistics: JSON-able."""
        return views.info(self)

    def as_dask(self, site: str) -> dask.array.Array:
        """The site as a lazy `(n_rows, D)` dask array, see `views.as_dask`."""
        return views.as_dask(self, site)

    def as_xarray(self, sites: Sequence[str] | str | None = None) -> xarray.Dataset:
        """Sites (all by default) as a lazy xarray dataset, see `views.as_xarray`."""
        return views.as_xarray(self, sites)


def checked_store(store: Any, who: str) -> Store:
    """An open store; where a path was given, the message says how to open it."""
    if not isinstance(store, Store):
        raise ConfigError(f"{who}: store must be an open store, such as open_store({shown(store)})")
    return store
