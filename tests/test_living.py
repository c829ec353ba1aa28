"""Living stores: extend, add and delete sites, export. Each equals what one extraction makes, killed or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from test_damage import Died, FailingStore, contents

from actcache.errors import ConfigError, SiteError, StoreIncompleteError, StoreMismatchError, StoreNotFoundError
from actcache.load import Loader
from actcache.spec import Site
from actcache.store import StoreWriter, delete_sites, export, open_store, verify
from actcache.store.backends.objects import Objects

SITE, OTHER = "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"
NEW = Site(name="blocks.1.hook_resid_post", shape=(7,), codec="int8")


grow = partial(write_shards, grow=True)


def reopen(location):
    return open_store(Objects(location, read_only=True))


@pytest.fixture(scope="module")
def plan():
    """The whole store of 13 sequences in 4 shards, the first part of it (the third shard partial), and its values."""
    blocks = random_blocks(13, 9)
    spec = spec_of(blocks, sequences_per_shard=4, rows_per_chunk=8)
    part = blocks.take(range(10))
    small = replace(spec, n_sequences=10, text={"tokens": part.digest()})
    return blocks, spec, part, small, random_bits(spec)


def test_a_store_that_was_extended_is_the_store_extracted_at_once(plan):
    blocks, spec, part, small, bits = plan
    at_once, extended = FailingStore(10**9, Died()), FailingStore(10**9, Died())
    whole = write_shards(at_once, spec, blocks, bits)
    write_shards(extended, small, part, bits)
    assert grow(extended, spec, blocks, bits).fingerprint == whole.fingerprint
    assert contents(extended) == contents(at_once)
    assert verify(Objects(extended, read_only=True)) == []


@pytest.mark.exhaustive
def test_extending_may_fail_at_every_put(plan):
    blocks, spec, part, small, bits = plan
    reference = FailingStore(10**9, Died())
    before = write_shards(reference, small, part, bits)
    values = before.read(SITE, slice(None))
    n_before = 10**9 - reference.puts_left
    fingerprint = grow(reference, spec, blocks, bits).fingerprint
    n_puts = 10**9 - reference.puts_left - n_before
    still_sealed = 0
    for k in range(n_puts):
        location = FailingStore(10**9, Died())
        write_shards(location, small, part, bits)
        location.puts_left = k
        with pytest.raises(Died):
            grow(location, spec, blocks, bits)
        location.puts_left = -1
        found = reopen(location)
        if found.sealed and found.fingerprint == before.fingerprint:  # until then the store is what it was
            still_sealed += 1
            assert verify(found.objects) == [], f"put {k}"
            assert torch.equal(found.read(SITE, slice(None)), values), f"put {k}"
        assert grow(location, spec, blocks, bits).fingerprint == fingerprint, f"put {k}"
        assert contents(location) == contents(reference), f"put {k}"
    assert still_sealed > n_puts / 3


def test_extending_with_other_tokens_after_a_crash_does_not_keep_the_first_ones(plan):
    blocks, spec, part, small, bits = plan
    location = FailingStore(10**9, Died())
    write_shards(location, small, part, bits)
    location.puts_left = 16
    with pytest.raises(Died):
        grow(location, spec, blocks, bits)
    location.puts_left = -1
    other = random_blocks(13, 9, seed=7)
    other.ids[:10], other.document[:10] = blocks.ids[:10], blocks.document[:10]
    changed = replace(spec, text={"tokens": other.digest()})
    new_bits = {name: np.concatenate([values[:10], values[10:] ^ 1]) for name, values in bits.items()}
    store = grow(location, changed, other, new_bits)
    assert verify(store.objects) == []
    at_once = write_shards(FailingStore(10**9, Died()), changed, other, new_bits)
    assert store.fingerprint == at_once.fingerprint


def test_a_store_grows_only_by_what_it_has_not(plan):
    blocks, spec, part, small, bits = plan
    location = FailingStore(10**9, Died())
    write_shards(location, spec, blocks, bits)
    with pytest.raises(StoreMismatchError, match="a store only grows"):
        grow(location, small, part, bits)
    stranger = random_blocks(16, 9, seed=3)
    with pytest.raises(StoreMismatchError, match="the first 13 sequences are not those"):
        grow(location, replace(spec, n_sequences=16), stranger, bits)
    with pytest.raises(StoreMismatchError, match=r"model.name: the store has 'random', asked for 'other'"):
        grow(location, replace(spec, model={"name": "other"}), blocks, bits)
    assert verify(Objects(location, read_only=True)) == []


def test_a_site_added_later_is_the_site_extracted_at_once(plan):
    blocks, spec, _part, _small, bits = plan
    more = replace(spec, sites=(*spec.sites, NEW))
    bits = {**bits, NEW.name: random_bits(replace(spec, sites=(NEW,)), seed=9)[NEW.name]}
    at_once, later = FailingStore(10**9, Died()), FailingStore(10**9, Died())
    whole = write_shards(at_once, more, blocks, bits)
    before = write_shards(later, spec, blocks, bits)
    n_puts = 10**9 - later.puts_left
    assert grow(later, more, blocks, bits).fingerprint == whole.fingerprint
    assert contents(later) == contents(at_once)
    n_puts = 10**9 - later.puts_left - n_puts
    for k in range(n_puts):
        location = FailingStore(10**9, Died())
        write_shards(location, spec, blocks, bits)
        location.puts_left = k
        with pytest.raises(Died):
            grow(location, more, blocks, bits)
        location.puts_left = -1
        found = reopen(location)
        if found.sealed:
            assert found.fingerprint == before.fingerprint
            assert verify(found.objects) == []
        assert grow(location, more, blocks, bits).fingerprint == whole.fingerprint, f"put {k}"


def test_an_abandoned_site_of_another_codec_is_begun_anew(plan):
    blocks, spec, _part, _small, bits = plan
    bits = {**bits, NEW.name: random_bits(replace(spec, sites=(NEW,)), seed=9)[NEW.name]}
    location = FailingStore(10**9, Died())
    write_shards(location, spec, blocks, bits)
    location.puts_left = 14
    with pytest.raises(Died):
        grow(location, replace(spec, sites=(*spec.sites, NEW)), blocks, bits)
    location.puts_left = -1
    store = grow(location, replace(spec, sites=(*spec.sites, replace(NEW, codec="raw"))), blocks, bits)
    assert verify(store.objects) == []
    assert not [key for key in contents(location) if "/scale/" in key]


def test_a_site_for_other_rows_is_refused(plan):
    blocks, spec, _part, _small, bits = plan
    location = FailingStore(10**9, Died())
    write_shards(location, spec, blocks, bits)
    more = replace(spec, sites=(*spec.sites, NEW))
    with StoreWriter(location, more, blocks, grow=True) as writer:
        buffers = writer.acquire(0)
        kept = np.ones(len(spec.shard_rows(0)), bool)
        kept[3] = False
        writer.submit(buffers, blocks.ids[:4], kept)
        with pytest.raises(StoreMismatchError, match="the rows of shard 0 are not those"):
            writer.finish()


def test_deleting_a_site_leaves_the_others_and_may_be_done_again(plan):
    blocks, spec, _part, _small, bits = plan
    without = replace(spec, sites=spec.sites[1:])
    never_had = write_shards(FailingStore(10**9, Died()), without, blocks, bits)
    n_puts, k = 10**9, 0
    while k < n_puts:
        location = FailingStore(10**9, Died())
        write_shards(location, spec, blocks, bits)
        location.puts_left = k
        try:
            delete_sites(Objects(location, read_only=False), [SITE])
        except Died:
            location.puts_left = -1
            delete_sites(Objects(location, read_only=False), [SITE])
        else:
            n_puts = k
        store = reopen(location)
        assert store.fingerprint == never_had.fingerprint
        assert store.sites == [OTHER]
        assert verify(store.objects) == []
        assert not [key for key in contents(location) if SITE in key]
        k += 1
    assert n_puts > 3


def test_the_last_site_and_unknown_sites_are_not_deleted(plan):
    blocks, spec, _part, _small, bits = plan
    location = FailingStore(10**9, Died())
    write_shards(location, spec, blocks, bits)
    objects = Objects(location, read_only=False)
    with pytest.raises(SiteError, match="no site"):
        delete_sites(objects, ["blocks.0.hook_mlp_ouch"])
    with pytest.raises(ConfigError, match="at least one site"):
        delete_sites(objects, [SITE, OTHER])
    assert verify(objects) == []


def rows_by_place(store, site):
    table = store.row_table()
    values = store.read(site, slice(None)).float().numpy()
    places = zip(table["sequence"].tolist(), table["position"].tolist(), strict=True)
    return dict(zip(places, values, strict=True))


@pytest.mark.parametrize("changes", [{}, {"sequences_per_shard": 3}, {"codec": "raw"}, {"sites": [OTHER]}])
def test_an_export_has_the_same_rows(plan, tmp_path, changes):
    blocks, spec, _part, _small, bits = plan
    store = write_shards(FailingStore(10**9, Died()), spec, blocks, bits)
    copied = export(store, tmp_path / "copy.zarr", **changes)
    assert copied.sealed
    assert verify(copied.objects) == []
    for site in copied.sites:
        ours, theirs = rows_by_place(store, site), rows_by_place(copied, site)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[place], theirs[place]) for place in ours)
    assert copied.spec.text["exported_from"]["fingerprint"] == store.fingerprint
    again = export(store, tmp_path / "copy.zarr", **changes)
    assert again.fingerprint == copied.fingerprint


def test_an_export_of_some_rows_keeps_those_and_no_others(plan, tmp_path):
    blocks, spec, _part, _small, bits = plan
    store = write_shards(FailingStore(10**9, Died()), spec, blocks, bits)
    mask = np.random.default_rng(4).random(store.spec.n_rows) < 0.6
    part = export(store, tmp_path / "part.zarr", rows=mask, sequences=range(2, 12))
    table = store.row_table()
    inside = mask & (table["sequence"] >= 2) & (table["sequence"] < 12)
    assert part.n_rows == inside.sum() < part.spec.n_rows
    ours = rows_by_place(store, SITE)
    wanted = zip(table["sequence"][inside].tolist(), table["position"][inside].tolist(), strict=True)
    theirs = rows_by_place(part, SITE)
    assert {(sequence - 2, position) for sequence, position in wanted} == theirs.keys()
    assert all(np.array_equal(ours[sequence + 2, position], row) for (sequence, position), row in theirs.items())
    places = part.row_table()["sequence"], part.row_table()["position"]
    assert (part.row_table()["token"] == part.tokens()[places]).all()
    assert verify(part.objects) == []
    # A store with rows left out is read, loaded and exported like any other.
    loaded = [row for batch in Loader(part, [SITE], batch_rows=5, drop_last=False) for row in batch.rows.tolist()]
    assert sorted(loaded) == part.row_ids().tolist()
    assert len(set(loaded)) == part.n_rows
    absent = np.setdiff1d(np.arange(part.spec.n_rows), part.row_ids())
    with pytest.raises(IndexError, match="was left out"):
        part.read(SITE, absent[:1])
    assert part.as_dask(SITE).shape == (part.n_rows, 12)
    again = export(part, tmp_path / "again.zarr", codec="sparse")
    assert rows_by_place(again, SITE).keys() == theirs.keys()


def test_an_export_in_int8_is_close_and_half_as_large(plan, tmp_path):
    blocks, spec, _part, _small, bits = plan
    store = write_shards(FailingStore(10**9, Died()), spec, blocks, bits)
    small = export(store, tmp_path / "int8.zarr", codec={"*mlp*": "int8"})
    assert [site.codec for site in small.spec.sites] == ["int8", "lossless"]
    ours, theirs = rows_by_place(store, SITE), rows_by_place(small, SITE)
    for place, row in ours.items():
        # Half a step of the scale, which is rounded up to a bfloat16, and the rounding of the result to a bfloat16.
        allowed = np.abs(row).max() / 127 * 0.5 * (1 + 2**-7) + np.abs(row) * 2**-8
        assert (np.abs(row - theirs[place]) <= allowed).all()
    untouched = rows_by_place(small, OTHER)
    assert all(np.array_equal(row, untouched[place]) for place, row in rows_by_place(store, OTHER).items())


def test_exports_are_asked_for_what_there_is(plan, tmp_path):
    blocks, spec, _part, _small, bits = plan
    location = FailingStore(10**9, Died())
    unfinished = write_shards(location, spec, blocks, bits, shards=[0])
    with pytest.raises(StoreIncompleteError, match="finish 'actcache extract'"):
        export(unfinished, tmp_path / "x.zarr")
    store = write_shards(location, spec, blocks, bits)
    with pytest.raises(ConfigError, match="sequences range"):
        export(store, tmp_path / "x.zarr", sequences=range(5, 99))
    assert not (tmp_path / "x.zarr").exists()


def test_sites_of_a_store_that_is_not_there_leave_no_folder(tmp_path):
    with pytest.raises(StoreNotFoundError):
        delete_sites(tmp_path / "nowhere.zarr", ["a"])
    assert not (tmp_path / "nowhere.zarr").exists()


@pytest.mark.parametrize("rows", [slice(1.5, 3), slice("a", None), slice(None, None, 0)], ids=str)
def test_a_slice_of_no_whole_numbers_is_a_sentence(small_store, rows):
    with pytest.raises(IndexError, match="a slice of whole numbers"):
        small_store.read(small_store.sites[0], rows)
