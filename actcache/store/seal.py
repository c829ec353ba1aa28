"""Finish a store: the ledger and the totals from the committed records, then the one put that makes it sealed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from actcache.spec import StoreSpec
from actcache.store import layout, metadata
from actcache.store.objects import Objects
from actcache.store.reader import Store
from actcache.store.stats import merge


def seal(objects: Objects, before: layout.Root | None = None) -> None:
    """Write ledger and totals of a store whose shards are all committed, and make it sealed.

    Args:
        objects: the store, in state `open`.
        before: the sealed root of the same store before sites were added or deleted, if that is what happened: what it
            says of the sites that stay is not read again.

    Raises:
        CorruptShardError: a record or a statistics line is damaged.
    """
    root = layout.read_root(objects)
    for name in layout.columns(root.spec):
        objects.keep(f"{layout.column_prefix(name)}/commit")
    spec, reader = root.spec, Store(objects, replace(root, state="open"))
    earlier = _earlier(objects, before, spec)
    known = {} if earlier is None else _known_heads(earlier, spec)
    ledger = np.empty((spec.n_shards, len(spec.sites) + 1, layout.HEAD_BYTES), np.uint8)
    for column, name in enumerate(layout.columns(spec)):
        if name in known:
            ledger[:, column] = known[name]
            continue
        length = layout.record_length(spec, name)
        for shard in range(spec.n_shards):
            head = reader.record(name, shard).to_bytes(length)[: layout.HEAD_BYTES]
            ledger[shard, column] = np.frombuffer(head, np.uint8)
    totals = []
    for site in spec.sites:
        if earlier is not None and site.name in known:
            totals.append(earlier.total(site.name))
            continue
        totals.append(merge(reader.shard_line(site.name, shard) for shard in range(spec.n_shards)))
        layout.put_table(objects, layout.total_key(site.name), totals[-1])
    metadata.put_ledger(objects, spec, ledger)
    layout.write_root(objects, replace(sealed_root(spec, ledger, totals), provenance=root.provenance))


def _earlier(objects: Objects, before: layout.Root | None, spec: StoreSpec) -> Store | None:
    """The store as it was sealed before, if it had the same rows."""
    if before is None or before.state != "sealed" or before.spec.n_sequences != spec.n_sequences:
        return None
    return Store(objects, before)


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


def fingerprint(spec: StoreSpec, ledger: NDArray[np.uint8], totals: list[NDArray[np.float64]]) -> str:
    """sha256 over the spec and everything that the records say: equal stores have equal fingerprints."""
    digest = hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode())
    for part in (ledger, *totals):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()
