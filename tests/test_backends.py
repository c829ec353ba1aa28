"""A new kind of place is one subclass of `Backend`: the smallest one carries a store through everything."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards
from zarr.storage import MemoryStore

from actcache.errors import StoreBusyError
from actcache.store import Objects, StoreWriter, delete_sites, open_store, repair, verify
from actcache.store.backends import objects
from actcache.store.backends.backend import Backend
from actcache.store.format.keys import ROWS, commit_key, row_key


class Place(MemoryStore):
    """Stands for a zarr store of a new kind; what zarr itself would do with it is not used."""


class Shelf(Backend):
    """A dictionary: the abstract methods and the three attributes, nothing else."""

    shared, creates_once = False, True

    def __init__(self, store: Place) -> None:
        self.identity, self.held = id(store), vars(store).setdefault("shelf", {})

    def get(self, key: str) -> memoryview | None:
        return memoryview(self.held[key]) if key in self.held else None

    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None:
        data = self.get(key)
        return None if data is None else data[offset : offset + n_bytes]

    def size(self, key: str) -> int:
        return len(self.held[key]) if key in self.held else -1

    def put(self, key: str, *parts: memoryview | bytes) -> None:
        self.held[key] = b"".join(parts)

    def create(self, key: str, data: bytes) -> None:
        self.held.setdefault(key, data)

    def walk(self, prefix: str) -> Iterator[str]:
        return iter([key for key in self.held if not prefix or key.startswith(f"{prefix}/")])

    def delete(self, key: str) -> None:
        self.held.pop(key, None)


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_the_smallest_backend_carries_a_store(monkeypatch, codec):
    blocks = random_blocks(13, 9)
    spec = spec_of(blocks, codec, sequences_per_shard=4, rows_per_chunk=8)
    expected = write_shards(MemoryStore(), spec, blocks, random_bits(spec))
    usual = objects.backend_of
    monkeypatch.setattr(
        objects, "backend_of", lambda store, **about: Shelf(store) if type(store) is Place else usual(store, **about)
    )
    place = Place()
    store = write_shards(place, spec, blocks, random_bits(spec))
    assert isinstance(store.objects.backend, Shelf)
    assert store.fingerprint == expected.fingerprint
    for site in store.sites:
        assert np.array_equal(store.read_stored(site, slice(None)), expected.read_stored(site, slice(None)))

    at = Objects(place, read_only=False)
    with StoreWriter(at, spec, blocks), pytest.raises(StoreBusyError, match="another writer in this process"):
        StoreWriter(at, spec, blocks)
    at.put(row_key("token", 1), b"damaged")
    faults = verify(at)
    assert [(fault.column, fault.shard) for fault in faults] == [(ROWS, 1)]
    assert repair(at, faults) == [1]
    assert at.size(commit_key(ROWS, 1)) == -1
    assert write_shards(place, spec, blocks, random_bits(spec), shards=[1]).fingerprint == expected.fingerprint

    delete_sites(at, [spec.sites[0].name])
    assert open_store(at).sites == [site.name for site in spec.sites[1:]]
    assert verify(at) == []
