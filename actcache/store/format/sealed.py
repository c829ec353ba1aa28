"""The root compared with what lies there: no value is trusted, and nothing sealed, on the root's word alone.

A sealed store has a fingerprint over spec, ledger and totals, all of them small. One that is not sealed has none yet;
its spec is held against the metadata that its arrays were created with.

In: an opened place and its root. Out: ledger and totals that are those the store was sealed with, or an error that says
what disagrees.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ActcacheError, CorruptShardError, StoreError
from actcache.spec import Site, StoreSpec
from actcache.store.backends.objects import Objects
from actcache.store.format import metadata
from actcache.store.format.keys import LEDGER_KEY, total_key
from actcache.store.format.records import read_ledger, read_total
from actcache.store.format.root import Root, read_root
from actcache.store.format.table_objects import sha256_of

_GETS = 32
"""Totals read at a time where each answer takes its time."""
_WHAT_TO_DO = "put back the zarr.json of the store that was written, or extract it again to another place"


def fingerprint(spec: StoreSpec, ledger: NDArray[np.uint8], totals: Sequence[NDArray[np.float64]]) -> str:
    """sha256 over the spec and everything that the records say: equal stores have equal fingerprints."""
    digest = hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode())
    for part in (ledger, *totals):
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


class Sealed:
    """Ledger and totals of a sealed store, read once; each is the one that the root has a digest of."""

    def __init__(self, objects: Objects, root: Root) -> None:
        self._objects, self._root = objects, root

    @cached_property
    def ledger(self) -> NDArray[np.uint8]:
        """`(S, C, 48)` heads of all records; CorruptShardError when they are not those that were sealed."""
        ledger = read_ledger(self._objects, self._root.spec)
        self._check(LEDGER_KEY, 0, ledger)
        return ledger

    @cached_property
    def totals(self) -> Mapping[str, NDArray[np.float64]]:
        """The merged statistics line of each site; raises like `ledger`."""
        sites = self._root.spec.sites
        if self._objects.is_local:
            return dict(map(self._total, sites, range(1, len(sites) + 1)))
        with ThreadPoolExecutor(_GETS, thread_name_prefix="actcache-get") as pool:
            return dict(pool.map(self._total, sites, range(1, len(sites) + 1)))

    def _total(self, site: Site, place: int) -> tuple[str, NDArray[np.float64]]:
        total = read_total(self._objects, site)
        self._check(total_key(site.name), place, total)
        return site.name, total

    def _check(self, key: str, place: int, values: NDArray[np.generic]) -> None:
        if sha256_of(values) != self._root.digests[place]:
            raise CorruptShardError(
                f"{key} of {self._objects} is not the one that the store was sealed with", store=self._objects
            )

    def check_fingerprint(self) -> None:
        """Hold spec, ledger and totals against the fingerprint.

        Raises:
            CorruptShardError: they disagree, so that the root is not the one that the store was sealed with.
        """
        found = fingerprint(self._root.spec, self.ledger, list(self.totals.values()))
        if found == self._root.fingerprint:
            return
        wrong = first_difference(self._objects, self._root.spec)
        raise CorruptShardError(
            f"{self._objects}: spec, ledger and totals do not match the fingerprint, so its zarr.json is not the one "
            f"that the store was sealed with{f': {wrong}' if wrong else ''}; {_WHAT_TO_DO}"
        )


def check_open(objects: Objects, spec: StoreSpec) -> None:
    """Hold the spec of a store without a fingerprint against what its arrays were created with.

    Raises:
        CorruptShardError: they disagree. Metadata that is missing or damaged says nothing.
    """
    wrong = first_difference(objects, spec)
    if wrong:
        raise CorruptShardError(
            f"{objects}: its zarr.json is not the one that the store was begun with: {wrong}; {_WHAT_TO_DO}"
        )


def first_difference(objects: Objects, spec: StoreSpec) -> str | None:
    """Where a spec and the metadata of the arrays disagree; None when they do not."""
    length = metadata.stored_length(objects)
    if length not in (None, spec.sequence_length):
        return f"it has sequences of {spec.sequence_length} tokens, the array was begun with {length}"
    for site in spec.sites:
        for what, said, found in metadata.differences(objects, spec, site):
            return (
                f"it has {str(said)[:80]!r} for the {what} of {site.name}, the array was begun with {str(found)[:80]!r}"
            )
    return None


def changed_since(objects: Objects, root: Root) -> StoreError | None:
    """The error for a sound store that has changed since it was opened with this root; None otherwise."""
    try:
        now = read_root(objects)
        if (now.state, now.spec, now.fingerprint) == (root.state, root.spec, root.fingerprint):
            return None
        if now.state == "sealed":
            Sealed(objects, now).check_fingerprint()
        else:
            check_open(objects, now.spec)
    except (ActcacheError, OSError):
        return None  # damaged, and not just changed
    grown = now.spec.n_sequences > root.spec.n_sequences or len(now.spec.sites) > len(root.spec.sites)
    return StoreError(f"{objects} has {'grown' if grown else 'changed'} since it was opened; open it again")
