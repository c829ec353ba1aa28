"""Finish a store: the ledger and the totals from the committed records, then the one put that makes it sealed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.errors import AuditError, CorruptShardError
from actcache.spec import StoreSpec
from actcache.store import layout, metadata
from actcache.store.hold import held_ledger
from actcache.store.objects import Objects
from actcache.store.reader import Store
from actcache.store.sealed import fingerprint
from actcache.store.stats import merge

Check: TypeAlias = Callable[[Store], Mapping[str, Any]]
"""Looks at a complete store that is about to be sealed: returns what its provenance is to say of that, JSON-able, or
raises `AuditError`."""


def check_before_sealing(objects: Objects, root: layout.Root, spec: StoreSpec, check: Check) -> Mapping[str, Any]:
    """Have a complete store looked at, and return the provenance to seal it with.

    Args:
        objects: the store.
        root: the root that lies there; of a store that grows, the one of the smaller store that is still in force.
        spec: what the store holds now.
        check: is given the store as it will be sealed, in state `open`.

    Raises:
        AuditError: what `check` raised. Its entry is in the provenance of the root that lies there, which otherwise
        stays as it is.
    """
    found = root.provenance.get("audits")
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    view = layout.Root(state="open", spec=spec, provenance=root.provenance)
    try:
        entry = dict(check(Store(objects, view, lies_there=False)))
    except AuditError as error:
        if error.entry:
            others = [other for other in entries if not _is_the_failure(other, error.entry)]
            provenance = {**root.provenance, "audits": [*others, error.entry]}
            layout.write_root(objects, replace(root, provenance=provenance))
        raise
    passed = [other for other in entries if other.get("sound") is not False]
    return {**root.provenance, "audits": [*passed, entry]}


def _is_the_failure(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an earlier entry tells of the same failure: it would only be said twice."""
    return earlier.get("sound") is False and all(earlier.get(name) == now.get(name) for name in ("of", "sites"))


def complete_ledger(objects: Objects, spec: StoreSpec, before: layout.Root | None = None) -> NDArray[np.uint8]:
    """`(S, C, 48)` the ledger of a store whose shards are all committed, each record held against what lies there.

    Args:
        objects: the store.
        spec: what it holds now.
        before: the sealed root of the same store before sites were added or deleted, if that is what happened: what it
            says of the sites that stay is not read again.

    Raises:
        TornShardsError: objects are missing or too short, or belong elsewhere. CorruptShardError: the root or the
        tokens are not those that the store was begun with.
    """
    earlier = _earlier(objects, before, spec)
    known = {} if earlier is None else _known_heads(earlier, spec)
    return held_ledger(_unsealed(objects, spec), known)


def seal(
    objects: Objects,
    before: layout.Root | None = None,
    provenance: Mapping[str, Any] | None = None,
    ledger: NDArray[np.uint8] | None = None,
    *,
    expected: str | None = None,
) -> None:
    """Write ledger and totals of a store whose shards are all committed, and make it sealed.

    Args:
        objects: the store, in state `open`.
        before: see `complete_ledger`.
        provenance: what the sealed root says of how the store came to be; by default what the open one says.
        ledger: from `complete_ledger`, which is called if it is not given.
        expected: the fingerprint that has to come out; by default any.

    Raises:
        CorruptShardError: a statistics line is damaged, or another fingerprint comes out. The others are those of
        `complete_ledger`. Nothing has been written then.
    """
    root = layout.read_root(objects)
    spec, reader, earlier = root.spec, _unsealed(objects, root.spec), _earlier(objects, before, root.spec)
    for name in layout.columns(spec):
        objects.keep(f"{layout.column_prefix(name)}/commit")
    if ledger is None:
        ledger = complete_ledger(objects, spec, before)
    known = {} if earlier is None else {site: earlier.total(site) for site in earlier.sites}
    new = {
        site.name: merge(reader.shard_line(site.name, shard) for shard in range(spec.n_shards))
        for site in spec.sites
        if site.name not in known
    }
    sealed = sealed_root(spec, ledger, [{**known, **new}[site.name] for site in spec.sites])
    if expected not in (None, sealed.fingerprint):
        raise CorruptShardError(
            f"{objects}: its commit records are not those that it was sealed with, or its zarr.json is not; extract "
            "the store again to another place"
        )
    for site, total in new.items():
        layout.put_table(objects, layout.total_key(site), total)
    metadata.put_ledger(objects, spec, ledger)
    provenance = root.provenance if provenance is None else provenance
    layout.write_root(objects, replace(sealed, provenance=provenance))


def _unsealed(objects: Objects, spec: StoreSpec) -> Store:
    """A store that is read by its commit records, whatever its root says."""
    return Store(objects, layout.Root(state="open", spec=spec), lies_there=False)


def _earlier(objects: Objects, before: layout.Root | None, spec: StoreSpec) -> Store | None:
    """The store as it was sealed before, if it had the same rows."""
    if before is None or before.state != "sealed" or before.spec.n_sequences != spec.n_sequences:
        return None
    return Store(objects, before, lies_there=False)


def _known_heads(earlier: Store, spec: StoreSpec) -> dict[str, NDArray[np.uint8]]:
    """`(S, 48)` ledger columns that are the same before and after."""
    stay = layout.columns(spec)
    return {name: earlier.ledger[:, i] for i, name in enumerate(layout.columns(earlier.spec)) if name in stay}


def sealed_root(spec: StoreSpec, ledger: NDArray[np.uint8], totals: list[NDArray[np.float64]]) -> layout.Root:
    """The root attributes of a finished store."""
    return layout.Root(
        state="sealed",
        spec=spec,
        fingerprint=fingerprint(spec, ledger, totals),
        digests=(layout.sha256_of(ledger), *map(layout.sha256_of, totals)),
    )
