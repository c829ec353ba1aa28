"""Check a store against its commit records, byte for byte.

In: a store. Out: every fault, with its column, shard and reason. `repair` un-commits exactly these, so that the command
that made the store makes them again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from actcache.errors import ConfigError, CorruptShardError
from actcache.order import permutation
from actcache.spec import Progress
from actcache.store.backends.objects import Objects
from actcache.store.format import metadata
from actcache.store.format.keys import ROWS, columns_of
from actcache.store.format.records import committed_shards
from actcache.store.format.site_arrays import arrays_of
from actcache.store.store import Store, open_store
from actcache.store.writing.integrity import Homes

_MOST_MISSING = 1000
_DISK_FAULTS = (errno.EIO, errno.EISDIR)
"""Errors of the system for an object that is there and cannot be read: damage too, and no reason to stop checking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something on disk that is not what was written."""

    column: str
    """A site's name, `rows`, `tokens`, `ledger` (and totals), `attributes` (the root's), `metadata` (of arrays)."""
    shard: int
    """The shard, or -1 for what belongs to the whole store."""
    reason: str
    """What is wrong, in words."""


class Faults(list[Fault]):
    """What `verify` has found: faults, and shards of which not everything could be checked."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        super().__init__(faults)
        self.not_bound: dict[str, list[int]] = {}
        """By site: shards whose record does not say which tokens it belongs to, as in earlier versions. That is not a
        fault: the row table has been compared with the tokens, but nothing proves that the values are of these rows."""


def verify(
    path: str | Path | Objects, *, sample: float = 1.0, threads: int = 2, progress: Progress | None = None
) -> Faults:
    """Read and check every committed byte; an empty list means that the store is intact.

    Stored bytes are compared with the checksums in the commit records, those with the ledger, and the ledger with the
    fingerprint, so nothing has to be decompressed. The row table is compared with the tokens, and each site's record
    with the tokens and rows that it is bound to; records that are not bound are listed in `not_bound`.

    Args:
        path: the store.
        sample: share of the shards to check, chosen at random; what belongs to the whole store is always checked.
        threads: threads that read and check.
        progress: called with (columns of shards done, in all).

    Raises:
        StoreNotFoundError, NotAStoreError, StoreVersionError: there is no store to check.

    Examples:
        >>> faults = ac.verify("acts.zarr")
        >>> len(faults), faults.not_bound
        (0, {})
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"verify: sample must be more than 0 and at most 1, got {sample}")
    try:
        store = open_store(path)
    except CorruptShardError as error:
        return Faults([Fault(column="attributes", shard=-1, reason=_reason(error))])
    store.is_checked = True  # done below, fault by fault
    faults = Faults(_check(lambda: _check_ledger(store), "ledger", -1))
    # With a damaged ledger, shards are compared with their own commit records only.
    if faults:
        store = Store(store.objects, store.root, held_against_ledger=False)
        store.is_checked = True
    faults += [] if faults else _check(lambda: _check_root(store), "attributes", -1)
    wrong_tokens = _check(lambda: _check_tokens(store), "tokens", -1)
    faults += wrong_tokens
    wrong = metadata.wrong_metadata(store.objects, store.root)
    faults += [Fault(column="metadata", shard=-1, reason=f"{key} {reason}") for key, reason in wrong]
    homes = None if wrong_tokens else Homes(store)
    faults += _check_shards(store, homes, faults.not_bound, sample, threads, progress)
    return faults


def _check(check: Callable[[], None], column: str, shard: int) -> list[Fault]:
    try:
        check()
    except OSError as error:
        if not isinstance(error, CorruptShardError) and error.errno not in _DISK_FAULTS:
            raise
        return [Fault(column=column, shard=shard, reason=_reason(error))]
    return []


def _reason(error: OSError) -> str:
    return error.reason if isinstance(error, CorruptShardError) else str(error)


def _check_shards(
    store: Store,
    homes: Homes | None,
    not_bound: dict[str, list[int]],
    sample: float,
    threads: int,
    progress: Progress | None,
) -> Iterator[Fault]:
    listed, missing = _shards_to_check(store)
    yield from missing
    shards = np.array(listed)
    chosen = np.sort(shards[permutation(len(shards), 0)[: int(np.ceil(sample * len(shards)))]]).tolist()
    pairs = [(shard, name) for shard in chosen for name in columns_of(store.spec)]

    def check(pair: tuple[int, str]) -> list[Fault]:
        shard, name = pair
        found = _check(lambda: _check_column(store, name, shard), name, shard)
        return found or _check(lambda: _check_home(store, homes, name, shard), name, shard)

    with ThreadPoolExecutor(threads, thread_name_prefix="actcache-verify") as pool:
        for done, ((shard, name), found) in enumerate(zip(pairs, pool.map(check, pairs), strict=True), 1):
            yield from found
            if name != ROWS and not found and not store.record(name, shard).binding:
                not_bound.setdefault(name, []).append(shard)
            if progress:
                progress(done, len(pairs))


def _shards_to_check(store: Store) -> tuple[list[int], list[Fault]]:
    """The committed shards; with a damaged ledger, those that have a record, and faults for those that have none."""
    if store.held_against_ledger or not store.sealed:
        return store.committed, []
    known = set().union(*(committed_shards(store.objects, name) for name in columns_of(store.spec)))
    shards = sorted(shard for shard in known if shard < store.spec.n_shards)
    absent = (shard for shard in range(store.spec.n_shards) if shard not in known)
    faults = [
        Fault(column=ROWS, shard=shard, reason="the shard is missing: it has no commit record")
        for shard in islice(absent, _MOST_MISSING)
    ]
    left = store.spec.n_shards - len(shards) - len(faults)
    if left:  # a ledger and a root may claim millions of them
        faults.append(Fault(column="ledger", shard=-1, reason=f"{left:,} more shards are missing"))
    return shards, faults


def _check_ledger(store: Store) -> None:
    if store.sealed:
        _ = store.ledger
        for site in store.sites:
            store.total(site)


def _check_root(store: Store) -> None:
    store.is_checked = False
    try:
        store.check()
    finally:
        store.is_checked = True


def _check_tokens(store: Store) -> None:
    store.tokens()
    if "tokens" not in store.spec.text:
        raise CorruptShardError(f"{store.path}: its attributes have no digest of the tokens")


def _check_column(store: Store, column: str, shard: int) -> None:
    if column == ROWS:
        store.shard_row_table(shard)
        return
    store.shard_line(column, shard)
    for array in arrays_of(store.spec, store.spec.site(column)):
        store.check_sharded(column, array.name, shard)


def _check_home(store: Store, homes: Homes | None, column: str, shard: int) -> None:
    if homes is None:  # the tokens are at fault, and not what belongs to them
        return
    if column == ROWS:
        homes.check_rows(shard)
        return
    try:
        homes.of(shard)
    except CorruptShardError:  # the row table's own fault
        return
    homes.check(column, shard, store.record(column, shard))
