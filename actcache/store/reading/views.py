"""Other views of a store: a summary, a lazy dask array, an xarray dataset.

In: an open store. Out: a dictionary, or lazy arrays that read the store, with its checks, when they are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.kernels.bits import widen
from actcache.spec import expand_names
from actcache.store.format.keys import ROW_ARRAYS, ROWS, column_prefix, columns_of
from actcache.store.format.records import committed_shards
from actcache.store.format.table_objects import UINT32
from actcache.store.locks.lock_keys import CLAIM, lock_keys
from actcache.store.reading import statistics
from actcache.store.reading.chunks import Chunks
from actcache.store.reading.values import read_stored

if TYPE_CHECKING:
    import dask.array
    import xarray


_MOST_SHARDS = 64
"""Shards of an unfinished store that `info` looks at."""
_Read = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[Any]]


def info(store: Chunks) -> dict[str, Any]:
    """What the store is, how complete, how large, and its statistics: JSON-able.

    A finished store has all of this in a few objects. For an unfinished one with many shards, sizes and statistics are
    those of a sample spread evenly over the committed ones; `n_shards_measured` is its size.
    """
    spec, names = store.spec, columns_of(store.spec)
    measured = _evenly(store.committed, len(store.committed) if store.sealed else _MOST_SHARDS)
    share = int(store.shard_n_rows[measured].sum()) / max(1, store.n_rows)
    bytes_per_column = store.heads(measured)[:, :, 1].sum(axis=0) / (share or 1)
    shards = None if len(measured) == len(store.committed) else measured
    raw_bytes = {site.name: store.n_rows * site.width * store.stored_dtype.itemsize for site in spec.sites}
    stored = dict(zip(names, map(int, bytes_per_column), strict=True))
    sites = {
        site.name: {
            "shape": list(site.shape),
            "codec": site.codec,
            "codec_reason": site.codec_reason,
            "bytes": stored[site.name],
            "bytes_per_activation": stored[site.name] / max(1, store.n_rows * site.width),
            "ratio": stored[site.name] / max(1, raw_bytes[site.name]),
            **(statistics.stats(store, site.name, shards, None).summary() if store.committed else {}),
        }
        for site in spec.sites
    }
    return {
        "path": store.path,
        "state": store.root.state,
        "fingerprint": store.fingerprint,
        "n_rows": store.n_rows,
        "n_rows_expected": spec.n_rows,
        "n_shards": len(store.committed),
        "n_shards_expected": spec.n_shards,
        "n_shards_measured": len(measured),
        "bytes": sum(stored.values()),
        "raw_bytes": sum(raw_bytes.values()),
        "codec": ", ".join(dict.fromkeys(site.codec for site in spec.sites)),
        "compression_ratio": sum(stored[name] for name in store.sites) / max(1, sum(raw_bytes.values())),
        "spec": spec.to_dict(),
        "provenance": dict(store.root.provenance),
        "sites": sites,
    }


def begun_shards(store: Chunks) -> set[int]:
    """Shards that are not committed but of which something is there: being written, or left by a writer that ended."""
    if store.sealed:
        return set()
    objects, columns = store.objects, columns_of(store.spec)
    found = {shard for column in columns for shard in committed_shards(objects, column)}
    names = [name for column in columns for name in objects.names(f"{column_prefix(column)}/acts")]
    numbers = [name.split(".")[1] for name in names if name.startswith("c.")]
    numbers += [key.removeprefix(CLAIM).split(".")[0] for key in lock_keys(objects) if key.startswith(CLAIM)]
    found.update(int(number) for number in numbers if number.isdecimal())
    return {shard for shard in found.difference(store.committed) if shard < store.spec.n_shards}


def _evenly(shards: list[int], most: int) -> list[int]:
    return [shards[i] for i in np.linspace(0, len(shards) - 1, min(most, len(shards))).round().astype(int)]


def as_dask(store: Chunks, site: str) -> dask.array.Array:
    """A site as a lazy `(n_rows, D)` dask array of its rows, one block a shard, every read checked.

    Its dtype is the logical one. numpy has no bfloat16, so that is shown as float32, which holds every bfloat16
    exactly. The bfloat16 of ml_dtypes would be needed wherever the array is computed, and most of numpy and dask has to
    widen it first; `astype` converts to it.

    Raises:
        SiteError: no such site. CorruptShardError: a shard is damaged, when it is computed.
    """
    store.check_site(site)
    spec = store.spec
    widened = spec.dtype == "bfloat16"

    def read(shards: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[Any]:
        return widen(read_stored(store, site, shards * spec.rows_per_shard + within, 1), spec.dtype)

    return _lazy(store, site, (spec.site(site).width,), np.dtype("<f4") if widened else store.stored_dtype, read)


def as_xarray(store: Chunks, sites: Sequence[str] | str | None = None) -> xarray.Dataset:
    """Sites as a lazy xarray dataset: one variable each, over the store's rows, as `as_dask` gives them.

    The dimensions are `row` and `feature_768` (for a site of width 768), so that only sites of equal width can be
    subtracted from each other. `sequence`, `position` and `token` are lazy coordinates of `row`. A variable's
    attributes are its hook, the shape of its feature axes, its dtype and its codec.

    Args:
        store: the store.
        sites: names or patterns; all by default.

    Raises:
        ConfigError: xarray is not installed. SiteError: a pattern matches nothing.
    """
    try:
        import xarray
    except ImportError:
        raise ConfigError(
            "as_xarray needs the package xarray, which is not installed; install it with 'pip install xarray', "
            "or use as_dask"
        ) from None
    names = store.sites if sites is None else expand_names([sites] if isinstance(sites, str) else sites, store.sites)
    variables = {}
    for site in map(store.spec.site, names):
        about = {"hook": site.name, "shape": list(site.shape), "dtype": store.spec.dtype, "codec": site.codec}
        variables[site.name] = (("row", f"feature_{site.width}"), as_dask(store, site.name), about)
    coordinates = {name: ("row", _row_column(store, name)) for name in ROW_ARRAYS}
    attributes = {"path": store.path, "fingerprint": store.fingerprint or ""}
    return xarray.Dataset(variables, coords=coordinates, attrs=attributes)


class _Rows:
    """What dask needs of an array to slice it lazily: shape, dtype, blocks, and an index that reads.

    Positions count the rows that exist, while the store finds rows by shard and place within it: `read` takes these two
    arrays and returns the values.
    """

    def __init__(self, store: Chunks, width: tuple[int, ...], dtype: np.dtype[Any], read: _Read) -> None:
        n_rows = store.shard_n_rows
        self.shape, self.dtype, self.ndim = (store.n_rows, *width), dtype, 1 + len(width)
        self.chunks = (tuple(n_rows[n_rows > 0].tolist()) or (0,), *((n,) for n in width))
        self._read, self._starts = read, np.concatenate([[0], np.cumsum(n_rows)])

    def __getitem__(self, index: tuple[slice | int, ...]) -> NDArray[Any]:
        rows, *features = index
        if not isinstance(rows, slice):
            return self[(slice(rows, rows + 1), *features)][0]  # type: ignore[no-any-return]  # a row of an array
        positions = np.arange(*rows.indices(self.shape[0]))
        # A shard without rows starts where the next one does; `right` skips it.
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        return self._read(shards, positions - self._starts[shards])[(slice(None), *features)]


def _lazy(store: Chunks, array: str, width: tuple[int, ...], dtype: np.dtype[Any], read: _Read) -> dask.array.Array:
    import dask.array
    import dask.base

    rows = _Rows(store, width, dtype, read)
    # A finished store does not change, so equal parts of several graphs are read only once.
    name = f"{array}-{dask.base.tokenize(store.path, store.fingerprint)}" if store.sealed else False
    meta = np.empty((0,) * rows.ndim, dtype)
    return dask.array.from_array(rows, chunks=rows.chunks, name=name, asarray=False, fancy=False, meta=meta)


def _row_column(store: Chunks, array: str) -> dask.array.Array:
    def read(shards: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[Any]:
        values = np.empty(len(shards), UINT32)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            values[here] = store.shard_row_table(shard)[array][within[here]]
        return values

    return _lazy(store, f"{ROWS}/{array}", (), UINT32, read)
