"""Compare commit records with what lies there, before a store is continued and before it is sealed.

A record is put last, but a copy of a folder may have it without the objects that it lists, or with objects of another
store. Every object has to be there, with the length that its record says (one listing of a folder shows it), and a
site's record has to be bound to the tokens and rows of this store. The contents of the objects are left to `verify` and
to reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError
from actcache.spec import StoreSpec
from actcache.store.backends.objects import Objects
from actcache.store.format.binding import Bindings, home_of
from actcache.store.format.keys import ROW_ARRAYS, ROWS, columns_of, row_key, stats_key
from actcache.store.format.records import HEAD_BYTES, Record, committed_shards, record_length
from actcache.store.format.site_arrays import arrays_of, object_key
from actcache.store.format.stats import merge
from actcache.store.store import Store

_MOST_NAMED = 3


class TornShardsError(CorruptShardError):
    """Shards are committed that cannot be sealed as they are."""

    def __init__(self, objects: Objects, torn: Sequence[tuple[int, str, str]]) -> None:
        named = [f"shard {shard} of {column}: {reason}" for shard, column, reason in torn[:_MOST_NAMED]]
        more = f"\n  and {len(torn) - _MOST_NAMED:,} more" if len(torn) > _MOST_NAMED else ""
        super().__init__(
            f"{objects} is not sealed, because what it holds is not what its commit records list:\n  "
            + "\n  ".join(named)
            + more
            + "\ngive the same command again, which makes these shards again; if they were sealed before, first run "
            f"'actcache verify {objects}' and 'actcache repair {objects}'"
        )
        self.torn = [(shard, column) for shard, column, _ in torn]
        """Shard and column of each."""


class Homes:
    """The rows and tokens that the sites of each shard belong to."""

    def __init__(self, store: Store) -> None:
        self._store, self._bindings = store, Bindings(store.spec)
        self._known: dict[int, tuple[int, bytes]] = {}
        self._checked: set[int] = set()

    def of(self, shard: int) -> tuple[int, bytes]:
        """The number of rows of a shard, and what the records of its sites are bound to; raises like reading them."""
        if shard not in self._known:
            store = self._store
            rows = store.record(ROWS, shard)
            stored = rows.to_bytes(record_length(store.spec, ROWS))
            self._known[shard] = rows.n_rows, home_of(stored, store.shard_tokens(shard))
        return self._known[shard]

    def check(self, site: str, shard: int, record: Record) -> None:
        """Compare a site's record with the rows of its shard and the tokens of its sequences.

        Raises:
            CorruptShardError: they do not belong together.
        """
        n_rows, home = self.of(shard)
        if record.n_rows != n_rows:
            raise self._store.corrupt(site, shard, f"has {record.n_rows} rows, and the row table {n_rows}")
        if record.binding and record.binding != self._bindings.of(site, shard, home):
            raise self._store.corrupt(
                site, shard, "is of another store: its record is bound to other tokens, another model or other settings"
            )

    def check_rows(self, shard: int) -> None:
        """Compare a shard's row table with the tokens, once: all that can be done if a site's record is not bound.

        Raises:
            CorruptShardError: it belongs to other tokens.
        """
        if shard not in self._checked:
            self._store.check_rows(shard)
            self._checked.add(shard)


def torn_shards(
    store: Store, column: str, shards: Sequence[int], homes: Homes, heads: NDArray[np.uint8]
) -> Iterator[tuple[int, str, str]]:
    """Shard, column and reason of the shards that cannot be sealed as they are.

    Args:
        store: the store, read as one that is not sealed.
        column: which of its columns.
        shards: shards whose record of that column lies there.
        homes: the homes of the same store.
        heads: `(n, 48)`, receives the heads of the records.
    """
    length, torn = record_length(store.spec, column), set()
    for place, shard in enumerate(shards):
        try:
            record = store.record(column, shard)
            heads[place] = np.frombuffer(record.to_bytes(length)[:HEAD_BYTES], np.uint8)
            if column != ROWS:
                homes.check(column, shard, record)
                if not record.binding:
                    homes.check_rows(shard)
        except CorruptShardError as error:
            torn.add(shard)
            yield shard, column, error.reason
    for shard, reason in _wrong_lengths(store.objects, store.spec, column, shards, heads):
        if shard not in torn:
            yield shard, column, reason


def _wrong_lengths(
    objects: Objects, spec: StoreSpec, column: str, shards: Iterable[int], heads: NDArray[np.uint8]
) -> Iterator[tuple[int, str]]:
    """Shards whose objects are missing, or whose total length is not what the heads of their records say."""
    folders = {key.rpartition("/")[0] for key in _objects_of(spec, column, 0)}
    found = {f"{folder}/{name}": n for folder in folders for name, n in objects.sizes(folder).items()}
    for shard, n_bytes in zip(shards, heads[:, 40:48].copy().view("<u8")[:, 0].tolist(), strict=True):
        sizes = {key: found.get(key, -1) for key in _objects_of(spec, column, shard)}
        if -1 in sizes.values():
            yield shard, f"{next(key for key, size in sizes.items() if size < 0)} is missing"
        elif sum(sizes.values()) != n_bytes:
            yield shard, f"its objects have {sum(sizes.values()):,} bytes, its record lists {n_bytes:,}"


def _objects_of(spec: StoreSpec, column: str, shard: int) -> list[str]:
    """Keys of the objects that the record of a shard's column lists."""
    if column == ROWS:
        return [row_key(array, shard) for array in ROW_ARRAYS]
    site = spec.site(column)
    return [stats_key(column, shard), *(object_key(site, array, shard) for array in arrays_of(spec, site))]


def torn_among(store: Store, made: Mapping[int, Sequence[str]]) -> set[int]:
    """Shards that could not be sealed as they are; `made` has, by shard, the columns whose records lie there."""
    shards_of: dict[str, list[int]] = {}
    for shard, columns in made.items():
        for column in columns:
            shards_of.setdefault(column, []).append(shard)
    homes, torn = Homes(store), set()
    for column, shards in shards_of.items():
        heads = np.zeros((len(shards), HEAD_BYTES), np.uint8)
        torn |= {shard for shard, _, _ in torn_shards(store, column, shards, homes, heads)}
    return torn


@dataclass(frozen=True, kw_only=True, slots=True)
class Complete:
    """What a complete store is sealed with."""

    ledger: NDArray[np.uint8]
    """`(S, C, 48)` heads of all records."""
    totals: Mapping[str, NDArray[np.float64]]
    """The merged statistics line of each site."""


def compare_records(store: Store, earlier: Store | None) -> Complete:
    """Compare every record of a store whose shards are all committed with what lies there, and sum them up.

    Args:
        store: the store, read as one that is not sealed.
        earlier: the same store as it was sealed before sites were added or deleted: the records and statistics of the
            sites that stay are not read again.

    Raises:
        TornShardsError: shards cannot be sealed as they are. CorruptShardError: the root or the tokens are not those
        that the store was begun with, or statistics are damaged.
    """
    store.check()
    store.check_tokens()
    spec, homes, shards = store.spec, Homes(store), range(store.spec.n_shards)
    ledger = np.zeros((len(shards), len(spec.sites) + 1, HEAD_BYTES), np.uint8)
    known = [] if earlier is None else columns_of(earlier.spec)
    torn: list[tuple[int, str, str]] = []
    totals: dict[str, NDArray[np.float64]] = {}
    for place, column in enumerate(columns_of(spec)):
        if earlier is not None and column in known:
            ledger[:, place] = earlier.ledger[:, known.index(column)]
            there = committed_shards(store.objects, column)
            wrong = [(shard, "its commit record is missing") for shard in shards if shard not in there]
            wrong += _wrong_lengths(store.objects, spec, column, shards, ledger[:, place])
            torn += [(shard, column, reason) for shard, reason in wrong]
            totals |= {} if column == ROWS else {column: earlier.total(column)}
            continue
        torn += torn_shards(store, column, shards, homes, ledger[:, place])
        if column != ROWS and not torn:
            totals[column] = merge(store.shard_line(column, shard) for shard in shards)
    if torn:
        raise TornShardsError(store.objects, torn)
    return Complete(ledger=ledger, totals=totals)
