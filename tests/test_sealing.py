"""What is asked before a store is sealed: a check of the caller's, whose result stands in the provenance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.errors import AuditError
from actcache.spec import Site
from actcache.store import Store, StoreWriter, open_store, verify

SITE = "blocks.0.hook_mlp_out"
NEW = Site(name="blocks.1.hook_resid_post", shape=(7,))
SOUND = {"sound": True, "of": "extract", "sites": ["*"]}
FAILED = {"sound": False, "of": "extract", "sites": ["*"], "worst": 0.3}


@pytest.fixture
def plan():
    """13 sequences in 4 shards, the last one partial."""
    blocks = random_blocks(13, 9)
    spec = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8)
    return blocks, spec, random_bits(replace(spec, sites=(*spec.sites, NEW)))


def filled(location: Any, spec: Any, blocks: Any, bits: Any, check: Any, **more: Any) -> Store:
    """The store that is asked for, and sealed with a check."""
    with StoreWriter(location, spec, blocks, **more) as writer:
        for shard in writer.pending():
            assert writer.claim(shard)
            buffers, sequences = writer.acquire(shard), spec.shard_sequences(shard)
            for site in writer.sites:
                rows = bits[site.name][sequences.start : sequences.stop].reshape(-1, site.width)
                buffers.rows[site.name][: len(rows)] = rows
            writer.submit(buffers, blocks.ids[sequences.start : sequences.stop])
        return writer.finish(check)


def fail(store: Store) -> dict[str, Any]:
    raise AuditError("30 % off", FAILED)


def audits(path: Path) -> list[Any]:
    return open_store(path).root.provenance.get("audits", [])


@pytest.mark.parametrize("shared", [False, True])
def test_the_complete_store_is_looked_at_before_it_is_sealed(plan, tmp_path, shared):
    blocks, spec, bits = plan
    seen = []

    def look(store: Store) -> dict[str, Any]:
        assert open_store(store.path).root.state == store.root.state == "open"
        assert store.committed == list(range(spec.n_shards))
        seen.append(store.read_stored(SITE, slice(None)))
        return SOUND

    store = filled(tmp_path, spec, blocks, bits, look, shared=shared)
    assert store.sealed
    assert (seen[0] == store.read_stored(SITE, slice(None))).all()
    assert audits(tmp_path) == [SOUND]
    assert filled(tmp_path, spec, blocks, bits, fail, shared=shared).sealed  # what is sealed is not looked at again
    assert len(seen) == 1
    assert (
        store.fingerprint
        == write_shards(tmp_path.parent / f"{tmp_path.name}-unchecked.zarr", spec, blocks, bits).fingerprint
    )


@pytest.mark.parametrize("shared", [False, True])
def test_a_store_that_fails_stays_open_and_says_so_until_it_passes(plan, tmp_path, shared):
    blocks, spec, bits = plan
    for _ in range(2):
        with pytest.raises(AuditError, match="30 % off"):
            filled(tmp_path, spec, blocks, bits, fail, shared=shared)
        assert open_store(tmp_path).root.state == "open"
        assert audits(tmp_path) == [FAILED]  # once, however often
    assert filled(tmp_path, spec, blocks, bits, lambda store: SOUND, shared=shared).sealed
    assert audits(tmp_path) == [SOUND]
    assert verify(tmp_path) == []


def test_sealed_without_a_check_a_store_still_says_that_it_failed(plan, tmp_path):
    blocks, spec, bits = plan
    with pytest.raises(AuditError):
        filled(tmp_path, spec, blocks, bits, fail)
    assert filled(tmp_path, spec, blocks, bits, None).sealed
    assert audits(tmp_path) == [FAILED]


def test_sites_that_fail_leave_the_sealed_store_in_force(plan, tmp_path):
    blocks, spec, bits = plan
    before = filled(tmp_path, spec, blocks, bits, lambda store: SOUND)
    more = replace(spec, sites=(*spec.sites, NEW))

    def fail_the_new(store: Store) -> dict[str, Any]:
        assert store.sites == [site.name for site in more.sites]
        assert len(store.read(NEW.name, slice(None))) == spec.n_rows
        raise AuditError("30 % off", FAILED)

    with pytest.raises(AuditError):
        filled(tmp_path, more, blocks, bits, fail_the_new, grow=True)
    found = open_store(tmp_path)
    assert (found.sealed, found.fingerprint, found.spec) == (True, before.fingerprint, before.spec)
    assert audits(tmp_path) == [SOUND, FAILED]
    assert verify(tmp_path) == []
    grown = filled(tmp_path, more, blocks, bits, lambda store: {**SOUND, "of": "add-sites"}, grow=True)
    assert grown.sealed
    assert grown.spec == more
    assert audits(tmp_path) == [SOUND, {**SOUND, "of": "add-sites"}]


def test_sequences_that_fail_leave_the_sealed_store_in_force_where_no_shard_was_outgrown(plan, tmp_path):
    blocks, spec, bits = plan
    part = blocks.take(range(8))
    small = replace(spec, n_sequences=8, text={"tokens": part.digest()})
    before = filled(tmp_path, small, part, bits, None)
    with pytest.raises(AuditError):
        filled(tmp_path, spec, blocks, bits, fail, grow=True)
    assert open_store(tmp_path).fingerprint == before.fingerprint
    assert audits(tmp_path) == [FAILED]
    grown = filled(tmp_path, spec, blocks, bits, lambda store: SOUND, grow=True)
    assert (
        grown.fingerprint
        == write_shards(tmp_path.parent / f"{tmp_path.name}-at-once.zarr", spec, blocks, bits).fingerprint
    )
    assert audits(tmp_path) == [SOUND]


def test_a_shard_that_was_outgrown_leaves_the_larger_store_open(plan, tmp_path):
    blocks, spec, bits = plan
    part = blocks.take(range(10))
    filled(tmp_path, replace(spec, n_sequences=10, text={"tokens": part.digest()}), part, bits, None)
    with pytest.raises(AuditError):
        filled(tmp_path, spec, blocks, bits, fail, grow=True)
    found = open_store(tmp_path)
    assert (found.root.state, found.spec) == ("open", spec)
    assert audits(tmp_path) == [FAILED]
    assert filled(tmp_path, spec, blocks, bits, lambda store: SOUND, grow=True).sealed
    assert audits(tmp_path) == [SOUND]
