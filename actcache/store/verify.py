"""Check a store against its commit records, byte for byte, and un-commit what is damaged.

`verify` names every fault: column, shard and reason. `repair` un-commits exactly what is faulty, so that the extract
command that made the store makes it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actcache.errors import ConfigError, CorruptShardError
from actcache.order import permutation
from actcache.spec import Progress
from actcache.store import layout
from actcache.store.objects import Objects
from actcache.store.reader import Store, open_store
from actcache.store.seal import fingerprint, seal


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something on disk that is not what was written."""

    column: str
    """A site's name, `rows`, `tokens`, `ledger` (totals included) or `attributes` (the root's)."""
    shard: int
    """The shard, or -1 for what belongs to the whole store."""
    reason: str
    """What is wrong, in words."""


def verify(
    path: str | Path | Objects, *, sample: float = 1.0, threads: int = 2, progress: Progress | None = None
) -> list[Fault]:
    """Read and check every committed byte; an empty list means that the store is sound.

    Stored bytes are held against the checksums in the commit records, those against the ledger, and the ledger against
    the fingerprint, so that nothing has to be decompressed.

    Args:
        path: the store.
        sample: share of the shards to check, evenly chosen; what belongs to the whole store is always checked.
        threads: that read and check.
        progress: called with (columns of shards done, in all).

    Raises:
        StoreNotFoundError, NotAStoreError, StoreVersionError: there is no store to check.
    """
    if not 0 < sample <= 1:
        raise ConfigError(f"verify: sample must be more than 0 and at most 1, got {sample}")
    store = open_store(path)
    faults = _check(lambda: _check_ledger(store), "ledger", -1)
    # A damaged ledger says nothing of the shards: they are held against their own commit records then.
    store.use_ledger = not faults
    faults += [] if faults else _check(lambda: _check_fingerprint(store), "attributes", -1)
    faults += _check(lambda: _check_tokens(store), "tokens", -1)
    return faults + list(_check_shards(store, sample, threads, progress))


def _check(check: Callable[[], None], column: str, shard: int) -> list[Fault]:
    try:
        check()
    except CorruptShardError as error:
        return [Fault(column=column, shard=shard, reason=str(error).split("; run")[0])]
    return []


def _check_shards(store: Store, sample: float, threads: int, progress: Progress | None) -> Iterator[Fault]:
    shards = np.array(store.committed)
    chosen = np.sort(shards[permutation(len(shards), 0)[: int(np.ceil(sample * len(shards)))]]).tolist()
    pairs = [(shard, name) for shard in chosen for name in layout.columns(store.spec)]

    def check(pair: tuple[int, str]) -> list[Fault]:
        shard, name = pair
        return _check(lambda: _check_column(store, name, shard), name, shard)

    with ThreadPoolExecutor(threads, thread_name_prefix="actcache-verify") as pool:
        for done, found in enumerate(pool.map(check, pairs), 1):
            yield from found
            if progress:
                progress(done, len(pairs))


def _check_ledger(store: Store) -> None:
    if store.sealed:
        _ = store.ledger
        for site in store.spec.sites:
            layout.read_total(store.objects, site)


def _check_fingerprint(store: Store) -> None:
    if store.sealed:
        totals = [layout.read_total(store.objects, site) for site in store.spec.sites]
        if fingerprint(store.spec, store.ledger, totals) != store.fingerprint:
            raise CorruptShardError(f"{store.path}: spec, ledger and totals do not match the fingerprint")


def _check_tokens(store: Store) -> None:
    digest = hashlib.sha256()
    for name in layout.TOKEN_ARRAYS:
        digest.update(store.tokens(name).data)
    if digest.hexdigest() != store.spec.text.get("tokens"):
        raise CorruptShardError(f"{store.path}: the tokens do not match their digest")


def _check_column(store: Store, column: str, shard: int) -> None:
    if column == layout.ROWS:
        store.shard_row_table(shard)
        return
    store.shard_line(column, shard)
    for array in layout.arrays_of(store.spec.site(column)):
        store.check_sharded(column, array, shard)


def repair(path: str | Path | Objects, faults: list[Fault]) -> list[int]:
    """Un-commit what the faults name and open the store for writing again; returns the shards to make again.

    A damaged ledger is made again from the commit records at once, if no shard is at fault.

    Raises:
        CorruptShardError: tokens or root attributes are damaged, which no re-extraction of shards can mend.
    """
    store = open_store(path)
    beyond = [fault for fault in faults if fault.column in ("tokens", "attributes")]
    if beyond:
        raise CorruptShardError(f"{path} cannot be repaired: {beyond[0].reason}; extract it anew to another place")
    objects = path if isinstance(path, Objects) else Objects(path, read_only=False)
    bad = sorted({(fault.shard, fault.column) for fault in faults if fault.shard >= 0})
    with objects.lock():
        if faults and store.sealed:
            layout.write_root(objects, layout.Root(state="open", spec=store.spec))
        for shard, column in bad:
            objects.delete(layout.commit_key(column, shard))
        if faults and not bad:
            seal(objects)
    return sorted({shard for shard, _ in bad})
