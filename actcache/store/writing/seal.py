"""Seal a store: the ledger and the totals from the committed records, then the single put that makes it sealed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.errors import AuditError, CorruptShardError
from actcache.spec import StoreSpec
from actcache.store.backends.objects import Objects
from actcache.store.format import metadata
from actcache.store.format.keys import column_prefix, columns_of, total_key
from actcache.store.format.root import Root, read_root, write_root
from actcache.store.format.sealed import fingerprint
from actcache.store.format.table_objects import put_table, sha256_of
from actcache.store.store import Store
from actcache.store.writing.integrity import Complete, compare_records

Check: TypeAlias = Callable[[Store], Mapping[str, Any]]
"""Examines a complete store that is about to be sealed: returns an entry for its provenance, JSON-able, or raises
`AuditError`."""


def provenance_after(objects: Objects, root: Root, spec: StoreSpec, check: Check) -> Mapping[str, Any]:
    """Call `check` on a complete store, and return the provenance to seal it with.

    Args:
        objects: the store.
        root: the root that lies there; of a store that grows, still the root of the smaller store.
        spec: what the store holds now.
        check: called with the store as it will be sealed, in state `open`.

    Raises:
        AuditError: what `check` raised. Its entry has been added to the provenance of the root that lies there, which
        is otherwise unchanged.
    """
    found = root.provenance.get("audits")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    view = Root(state="open", spec=spec, provenance=root.provenance)
    try:
        entry = dict(check(Store(objects, view, lies_there=False)))
    except AuditError as error:
        if error.entry:
            others = [other for other in entries if not _is_the_failure(other, error.entry)]
            provenance = {**root.provenance, "audits": [*others, error.entry]}
            write_root(objects, replace(root, provenance=provenance))
        raise
    passed = [other for other in entries if other.get("sound") is not False]
    return {**root.provenance, "audits": [*passed, entry]}


def _is_the_failure(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an earlier entry reports the same failure, which would only be repeated."""
    return earlier.get("sound") is False and all(earlier.get(name) == now.get(name) for name in ("of", "sites"))


def check_complete(objects: Objects, spec: StoreSpec, before: Root | None = None) -> Complete:
    """Compare the records of a store whose shards are all committed with what lies there, before it is sealed.

    Args:
        objects: the store.
        spec: what it holds now.
        before: the sealed root of the same store before sites were added or deleted, if any were: the records of the
            sites that stay are not read again.

    Raises:
        TornShardsError: objects are missing, have the wrong length, or belong elsewhere. CorruptShardError: the root or
        the tokens are not those that the store was begun with, or statistics are damaged.
    """
    same_rows = before is not None and before.state == "sealed" and before.spec.n_sequences == spec.n_sequences
    earlier = Store(objects, before, lies_there=False) if before is not None and same_rows else None
    return compare_records(Store(objects, Root(state="open", spec=spec), lies_there=False), earlier)


def seal(
    objects: Objects,
    complete: Complete | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    expected: str | None = None,
) -> Root:
    """Write ledger and totals of a store whose shards are all committed, and make it sealed.

    Args:
        objects: the store, in state `open`.
        complete: from `check_complete`, which is called if it is not given.
        provenance: how the store came to be, for the sealed root; by default that of the open root.
        expected: the fingerprint that has to result; by default any.

    Returns:
        The sealed root.

    Raises:
        CorruptShardError: another fingerprint results. The others are those of `check_complete`. Either way nothing has
        been written.
    """
    root = read_root(objects)
    for name in columns_of(root.spec):
        objects.keep(f"{column_prefix(name)}/commit")
    complete = check_complete(objects, root.spec) if complete is None else complete
    totals = [complete.totals[site.name] for site in root.spec.sites]
    sealed = sealed_root(root.spec, complete.ledger, totals)
    if expected not in (None, sealed.fingerprint):
        raise CorruptShardError(
            f"{objects}: its commit records are not those that it was sealed with, or its zarr.json is not; extract "
            "the store again to another place"
        )
    for site in root.spec.sites:
        put_table(objects, total_key(site.name), complete.totals[site.name])
    metadata.put_ledger(objects, root.spec, complete.ledger)
    provenance = root.provenance if provenance is None else provenance
    sealed = replace(sealed, provenance=provenance)
    write_root(objects, sealed)
    return sealed


def sealed_root(spec: StoreSpec, ledger: NDArray[np.uint8], totals: list[NDArray[np.float64]]) -> Root:
    """The root attributes of a finished store."""
    return Root(
        state="sealed",
        spec=spec,
        fingerprint=fingerprint(spec, ledger, totals),
        digests=(sha256_of(ledger), *map(sha256_of, totals)),
    )
