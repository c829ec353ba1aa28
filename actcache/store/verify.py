"""Check a store against its commit records, byte for byte, and un-commit what is damaged.

`verify` names every fault: site, shard and reason. `repair` un-commits exactly the faulty shards, so that the extract
command that made the store makes them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError
from actcache.spec import Progress
from actcache.store import codecs, layout
from actcache.store.objects import Objects
from actcache.store.reader import Store, open_store
from actcache.store.stats import line_length
from actcache.store.writer import seal


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something on disk that is not what was written."""

    column: str
    """A site's name, `rows`, `tokens`, `ledger` (totals included) or `attributes` (the root's)."""
    shard: int
    """The shard, or -1 for what belongs to the whole store."""
    reason: str
    """What is wrong, in words."""


def verify(path: str | Path, *, progress: Progress | None = None) -> list[Fault]:
    """Read and check every committed byte; an empty list means that the store is sound.

    Raises:
        StoreNotFoundError, NotAStoreError, StoreVersionError: there is no store to check.
    """
    store = open_store(path)
    names = layout.columns(store.spec)
    faults = _check(store, "ledger", -1, _check_ledger)
    # A damaged ledger says nothing of the shards: they are held against their own commit records then.
    store.use_ledger = not faults
    faults += [] if faults else _check(store, "attributes", -1, _check_fingerprint)
    faults += _check(store, "tokens", -1, _check_tokens)
    total, done = len(store.committed) * len(names), 0
    for shard in store.committed:
        for name in names:
            faults += _check(store, name, shard, _check_rows if name == layout.ROWS else _check_site)
            done += 1
            if progress:
                progress(done, total)
    return faults


def _check(store: Store, column: str, shard: int, check: Callable[[Store, str, int], None]) -> list[Fault]:
    try:
        check(store, column, shard)
    except CorruptShardError as error:
        return [Fault(column=column, shard=shard, reason=str(error).split("; run")[0])]
    return []


def _check_ledger(store: Store, _column: str, _shard: int) -> None:
    if store.sealed:
        _totals(store)
        _ = store.ledger


def _check_fingerprint(store: Store, _column: str, _shard: int) -> None:
    if store.sealed and layout.fingerprint(store.spec, store.ledger, _totals(store)) != store.fingerprint:
        raise CorruptShardError(f"{store.path}: spec, ledger and totals do not match the fingerprint")


def _totals(store: Store) -> list[NDArray[np.float64]]:
    keys = ((f"{layout.site_prefix(site.name)}/total/c/0", line_length(site.width)) for site in store.spec.sites)
    return [layout.get_table(store.objects, key, (length,), layout.FLOAT64)[0] for key, length in keys]


def _check_tokens(store: Store, _column: str, _shard: int) -> None:
    digest = hashlib.sha256()
    for name in layout.TOKEN_ARRAYS:
        digest.update(store.tokens(name).data)
    if digest.hexdigest() != store.spec.text.get("tokens"):
        raise CorruptShardError(f"{store.path}: the tokens do not match their digest")


def _check_rows(store: Store, _column: str, shard: int) -> None:
    store.shard_row_table(shard)


def _check_site(store: Store, column: str, shard: int) -> None:
    store.shard_line(column, shard)
    width = store.spec.site(column).width
    out = np.empty((store.spec.rows_per_chunk, width), codecs.STORED_DTYPE[store.spec.dtype])
    scratch = codecs.Scratch()
    n_chunks = -(-store.record(column, shard).n_rows // store.spec.rows_per_chunk)
    for chunk in range(n_chunks):
        store.read_chunk(column, shard, chunk, out, scratch)


def repair(path: str | Path, faults: list[Fault]) -> list[int]:
    """Un-commit the shards named by the faults and open the store for writing again; returns those shards.

    A damaged ledger is made again from the commit records at once, if no shard is at fault.

    Raises:
        CorruptShardError: tokens or root attributes are damaged, which no re-extraction of shards can mend.
    """
    store = open_store(path)
    beyond = [fault for fault in faults if fault.column in ("tokens", "attributes")]
    if beyond:
        raise CorruptShardError(f"{path} cannot be repaired: {beyond[0].reason}; extract it anew to another place")
    objects = Objects(path, read_only=False)
    shards = sorted({fault.shard for fault in faults if fault.shard >= 0})
    if faults and store.sealed:
        layout.write_root(objects, layout.Root(state="open", spec=store.spec))
    for shard in shards:
        for column in range(len(layout.columns(store.spec))):
            objects.delete(layout.commit_key(shard, column))
    if faults and not shards:
        seal(objects)
    return shards
