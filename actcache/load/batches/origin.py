"""Where the rows of a batch come from: token, sequence, position and document, read when somebody asks.

In: row ids. Out: a column for them. The rows of a window are looked up together, reading each shard's row table once;
tables stay in memory for the windows that follow, as many as fit.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.memory import Kept

if TYPE_CHECKING:
    from actcache.store import Store

_COLUMN_OF = {"tokens": "token", "sequences": "sequence", "positions": "position"}
_KEPT_BYTES = 128 << 20
"""Bytes of row tables that are kept."""


class ShardTables:
    """Columns of the row tables of a store's shards; the latest ones are kept."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept = Kept[tuple[str, int], dict[str, NDArray[np.uint32]]](_KEPT_BYTES)

    def column(self, name: str, shard: int) -> NDArray[np.uint32]:
        """One of `tokens`, `sequences`, `positions`, `documents` for a shard's rows, in row order."""
        read = self._read_documents if name == "documents" else self._read_table
        return self._kept.get((read.__name__, shard), lambda: read(shard))[name]

    def _read_table(self, shard: int) -> tuple[dict[str, NDArray[np.uint32]], int]:
        table = self._store.shard_row_table(shard)
        columns = {name: table[stored] for name, stored in _COLUMN_OF.items()}
        return columns, sum(column.nbytes for column in columns.values())

    def _read_documents(self, shard: int) -> tuple[dict[str, NDArray[np.uint32]], int]:
        sequences = self.column("sequences", shard).astype(np.int64) - self._store.spec.shard_sequences(shard).start
        documents = self._store.shard_documents(shard)[sequences, self.column("positions", shard)]
        return {"documents": documents}, documents.nbytes


class Origin:
    """Where the rows of one window come from."""

    def __init__(self, tables: ShardTables, rows_per_shard: int, row_ids: NDArray[np.int64]) -> None:
        self._tables = tables
        self._rows_per_shard = rows_per_shard
        self._row_ids = row_ids
        self._columns: dict[str, NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    def column(self, name: str) -> NDArray[np.int64]:
        """A column for all rows of the window, in the order of its places."""
        with self._lock:
            if name not in self._columns:
                self._columns[name] = look_up(self._tables, self._rows_per_shard, self._row_ids, name)
            return self._columns[name]


def look_up(tables: ShardTables, rows_per_shard: int, row_ids: NDArray[np.int64], name: str) -> NDArray[np.int64]:
    """A column for some rows; each shard's table is read once."""
    shards, places = np.divmod(row_ids, rows_per_shard)
    by_shard = np.argsort(shards, kind="stable")
    present, firsts = np.unique(shards[by_shard], return_index=True)
    found = np.empty(len(row_ids), np.int64)
    for shard, here in zip(present.tolist(), np.split(by_shard, firsts[1:]), strict=True):
        found[here] = tables.column(name, shard)[places[here]]
    return found
