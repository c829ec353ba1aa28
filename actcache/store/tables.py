"""What is stored beside the activations, as arrays: where the rows of a shard come from, and their statistics.

In: an open store. Out: its tables, every byte checked against the commit records.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, CorruptShardError, StoreError
from actcache.order import permutation
from actcache.store import layout
from actcache.store.rows import Rows, blocks_of_rows
from actcache.store.stats import LineBuilder, SiteStats, line_length, merge, stats_of

if TYPE_CHECKING:
    from actcache.store.reader import Store

_THREADS = 2
"""That read rows to be measured."""


def shard_row_table(
    store: Store, shard: int, arrays: Collection[str] = layout.ROW_ARRAYS
) -> dict[str, NDArray[np.uint32]]:
    """Those of `sequence`, `position` and `token` that are named, for each row of a shard, in row order."""
    record, spec = store.record(layout.ROWS, shard), store.spec
    shape, table = (spec.rows_per_shard,), {}
    for name, expected in zip(layout.ROW_ARRAYS, record.checksums, strict=False):
        if name not in arrays:
            continue
        with store.explained():
            values, crc = layout.get_table(store.objects, layout.row_key(name, shard), shape, layout.UINT32)
        if crc != expected:
            raise store.corrupt(layout.ROWS, shard, f"is damaged: {name} is not the one that was committed")
        table[name] = values[: record.n_rows]
    possible = {"sequence": spec.shard_sequences(shard), "position": range(spec.skip_first, spec.sequence_length)}
    for name in possible.keys() & table.keys():
        if record.n_rows and not possible[name].start <= table[name].min() <= table[name].max() < possible[name].stop:
            raise store.corrupt(layout.ROWS, shard, f"lists rows of a {name} that it cannot have")
    return table


def check_rows(store: Store, shard: int) -> None:
    """Hold a shard's row table against the tokens of its sequences, and its order against that of the spec's seed.

    Raises:
        CorruptShardError: it is of other tokens or of another order.
    """
    spec, table = store.spec, shard_row_table(store, shard)
    ids, within = store.shard_tokens(shard), table["sequence"].astype(np.int64) - spec.shard_sequences(shard).start
    place = within * spec.rows_per_sequence + table["position"] - spec.skip_first
    order = np.sort(place)[permutation(len(place), spec.seed, shard)]
    if not np.array_equal(ids[within, table["position"]], table["token"]) or not np.array_equal(order, place):
        raise store.corrupt(layout.ROWS, shard, "lists other rows than the store's tokens and seed give")


def row_table(store: Store) -> dict[str, NDArray[np.uint32]]:
    """`sequence`, `position` and `token` of every committed row, in row order."""
    tables = [shard_row_table(store, shard) for shard in store.committed]
    none = np.empty(0, layout.UINT32)
    return {name: np.concatenate([none, *(table[name] for table in tables)]) for name in layout.ROW_ARRAYS}


def kept_rows(store: Store, shard: int) -> NDArray[np.bool_] | None:
    """`(q * rows_per_sequence,)` which rows of the shard's sequences there are, in reading order; None for all."""
    spec = store.spec
    capacity = len(spec.shard_rows(shard))
    if store.shard_n_rows[shard] == capacity:
        return None
    table, kept = shard_row_table(store, shard), np.zeros(capacity, bool)
    place = (table["sequence"].astype(np.int64) - spec.shard_sequences(shard).start) * spec.rows_per_sequence
    kept[place + table["position"] - spec.skip_first] = True
    return kept


def shard_line(store: Store, site: str, shard: int) -> NDArray[np.float64]:
    """The statistics line of a shard."""
    shape = (1, line_length(store.spec.site(site).width))
    with store.explained():
        values, crc = layout.get_table(store.objects, layout.stats_key(site, shard), shape, layout.FLOAT64)
    if crc != store.record(site, shard).checksums[layout.stats_place(store.spec)]:
        raise store.corrupt(site, shard, "is damaged: its statistics are not the ones that were committed")
    line: NDArray[np.float64] = values[0]
    return line


def stats(store: Store, site: str, shards: Sequence[int] | None, rows: Rows | None) -> SiteStats:
    """Statistics over all committed rows of a site, those of some shards, or some rows."""
    store.check_site(site)
    if shards is not None and rows is not None:
        raise ConfigError("stats: of shards or of rows, not of both; name the rows")
    if rows is not None:
        return measured(store, site, rows, _THREADS)
    if store.sealed and shards is None:
        line = store.total(site)
    elif store.committed:
        line = merge(shard_line(store, site, shard) for shard in (store.committed if shards is None else shards))
    else:
        raise StoreError(f"{store.path} has no committed shard yet, so there are no statistics of {site}")
    if not (np.isfinite(line).all() and (line[-6:] >= 0).all()):  # hostile: rows that are not finite do not count
        raise CorruptShardError(f"the statistics of {site} in {store.path} are none; run 'actcache verify'")
    return stats_of(line)


def measured(store: Store, site: str, rows: Rows, threads: int) -> SiteStats:
    """Statistics of some rows, which are read for it."""
    total = None
    for values in blocks_of_rows(store, site, rows, threads):
        builder = LineBuilder(values.shape[1], store.spec.dtype)
        builder.add(values)
        total = builder.line if total is None else merge([total, builder.line])
    if total is None:
        raise StoreError(f"{store.path} has no row of those asked for, so there are no statistics of {site}")
    return stats_of(total)


def heads(store: Store, shards: Sequence[int] | None) -> NDArray[np.uint64]:
    """`(shards, C, 2)` rows and stored bytes of the columns of some shards, or of all that are committed."""
    if store.sealed:
        all_heads = store.ledger[:, :, 32:].copy().view("<u8")
        return all_heads if shards is None else all_heads[np.asarray(shards, np.int64)]
    columns = layout.columns(store.spec)
    records = [
        [store.record(name, shard) for name in columns] for shard in (store.committed if shards is None else shards)
    ]
    sizes = [[(record.n_rows, record.n_bytes) for record in row] for row in records]
    return np.array(sizes, "<u8").reshape(-1, len(columns), 2)
