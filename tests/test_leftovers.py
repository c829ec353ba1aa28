from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import zarr
from conftest import random_bits, random_blocks, spec_of, write_shards
from test_damage import Died, FailingStore, contents
from test_living import NEW, grow
from zarr.storage import MemoryStore

from actcache.store import delete_sites, verify
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import site_prefix

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def plan():
    blocks = random_blocks(13, 9)
    spec = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8)
    return blocks, spec, random_bits(spec)


def with_zarr_alone(location):
    return zarr.open_group(MemoryStore(location._store_dict, read_only=True), mode="r")


@pytest.mark.parametrize("changes", [{"codec": "raw"}, {"rows_per_chunk": 16}])
def test_a_store_begun_anew_is_described_as_it_is(plan, changes):
    """Killed while it was being created, then begun with other settings: all metadata is of those."""
    blocks, spec, bits = plan
    at_once = FailingStore(10**9, Died())
    write_shards(at_once, spec, blocks, bits)
    other = spec_of(blocks, **{"sequences_per_shard": 4, "rows_per_chunk": 8, **changes})
    other = replace(other, sites=(*other.sites, replace(NEW, shape=(3,))))
    k = 0
    while True:
        location = FailingStore(k, Died())
        try:
            write_shards(location, other, blocks, {**bits, NEW.name: np.zeros((13, 8, 3), np.uint16)}, shards=[])
        except Died:
            location.puts_left = -1
        else:
            break
        store = write_shards(location, spec, blocks, bits)
        assert contents(location) == contents(at_once), k
        for site in store.spec.sites:
            array = with_zarr_alone(location)[f"{site_prefix(site.name)}/acts"]
            assert np.array_equal(array[:], store.read_stored(site.name, slice(None)))
        k += 1
    assert k > 20


def test_an_abandoned_site_of_other_exponents_is_begun_anew(plan):
    blocks, spec, bits = plan
    bits = {**bits, NEW.name: random_bits(replace(spec, sites=(NEW,)), seed=9)[NEW.name]}
    large = replace(NEW, feature_exponents=(5, *[0] * 6))
    asked = replace(spec, sites=(*spec.sites, NEW))
    at_once = FailingStore(10**9, Died())
    whole = write_shards(at_once, asked, blocks, bits)
    location = FailingStore(10**9, Died())
    write_shards(location, spec, blocks, bits)
    location.puts_left = 14
    with pytest.raises(Died):
        grow(location, replace(spec, sites=(*spec.sites, large)), blocks, bits)
    location.puts_left = -1
    store = grow(location, asked, blocks, bits)
    assert verify(store.objects) == []
    assert np.array_equal(store.read_stored(NEW.name, slice(None)), whole.read_stored(NEW.name, slice(None)))
    assert contents(location) == contents(at_once)


def test_a_deletion_cut_short_anywhere_is_finished_by_the_next(plan):
    blocks, spec, bits = plan
    site = spec.sites[0].name
    whole = FailingStore(10**9, Died())
    write_shards(whole, spec, blocks, bits)
    keys = [key for key in contents(whole) if key.startswith(site_prefix(site) + "/")]
    for stays in keys:
        location = FailingStore(10**9, Died())
        write_shards(location, spec, blocks, bits)
        delete_sites(Objects(location, read_only=False), [site])
        location._store_dict[stays] = whole._store_dict[stays]
        delete_sites(Objects(location, read_only=False), [site])
        assert not [key for key in contents(location) if key.startswith(site_prefix(site) + "/")]
