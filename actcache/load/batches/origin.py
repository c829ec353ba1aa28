"""Where the rows of a batch come from: token, sequence, position and document, read when somebody asks.

A window's rows are looked up together, each shard's row table once; tables are kept for the windows that follow, as
many as fit.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from actcache.store import Store


_COLUMN_OF = {"tokens": "token", "sequences": "sequence", "positions": "position"}


_KEPT_BYTES = 128 << 20
"""Of row tables, for the windows that follow."""


class ShardTables:
    """Columns of the row tables of a store's shards, the ones used last kept."""

    def __init__(self, store: Store) -> None:
        self._store, self._lock = store, threading.Lock()
        self._kept: OrderedDict[tuple[str, int], NDArray[np.uint32]] = OrderedDict()
        self._n_bytes = 0

    def column(self, name: str, shard: int) -> NDArray[np.uint32]:
        """One of `tokens`, `sequences`, `positions`, `documents` for a shard's rows, in row order."""
        with self._lock:
            if (name, shard) not in self._kept:
                self._read(name, shard)
            self._kept.move_to_end((name, shard))
            values = self._kept[name, shard]
            while self._n_bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._n_bytes -= self._kept.popitem(last=False)[1].nbytes
        return values

    def _read(self, name: str, shard: int) -> None:
        table = self._store.shard_row_table(shard)
        columns = {column: table[stored] for column, stored in _COLUMN_OF.items()}
        if name == "documents":
            first = self._store.spec.shard_sequences(shard).start
            of_tokens = self._store.shard_documents(shard)
            columns[name] = of_tokens[table["sequence"].astype(np.int64) - first, table["position"]]
        for column, values in columns.items():
            if (column, shard) not in self._kept:
                self._kept[column, shard] = values
                self._n_bytes += values.nbytes


class Origin:
    """Where the rows of one window come from."""

    def __init__(self, tables: ShardTables, rows_per_shard: int, row_ids: NDArray[np.int64]) -> None:
        self._tables, self._rows_per_shard, self._row_ids = tables, rows_per_shard, row_ids
        self._columns: dict[str, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def column(self, name: str) -> NDArray[np.int64]:
        """A column for all of the window's rows, in the order of its places."""
        with self._lock:
            if name not in self._columns:
                self._columns[name] = lookup(self._tables, self._rows_per_shard, self._row_ids, name)
            return self._columns[name]


def lookup(tables: ShardTables, rows_per_shard: int, row_ids: NDArray[np.int64], name: str) -> NDArray[np.int64]:
    """A column for some rows, each shard's table taken up once."""
    shards, places = np.divmod(row_ids, rows_per_shard)
    by_shard = np.argsort(shards, kind="stable")
    present, firsts = np.unique(shards[by_shard], return_index=True)
    found = np.empty(len(row_ids), np.int64)
    for shard, here in zip(present.tolist(), np.split(by_shard, firsts[1:]), strict=True):
        found[here] = tables.column(name, shard)[places[here]]
    return found
