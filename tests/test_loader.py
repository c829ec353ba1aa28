"""The loader: the plan's order, aligned sites, exact resume, and refusals."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.errors import ConfigError, CorruptShardError, SiteError, StoreIncompleteError
from actcache.load import Loader, Plan
from actcache.load.batches.batch_memory import BatchMemory
from actcache.load.mix import turn
from actcache.load.plan.epochs import chunk_table
from actcache.order import permutation
from actcache.spec import Site
from actcache.store import open_store
from actcache.store.codecs import int8

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
GOLDEN = Path(__file__).parent / "golden" / "order.json"


def test_the_order_is_the_one_that_saved_states_rely_on():
    """Golden order: if this fails, every state saved by an earlier version continues with other rows."""
    golden = json.loads(GOLDEN.read_text())
    assert permutation(10, 1, 2, 3).tolist() == golden["permutation_10_key_1_2_3"]
    plan = Plan(rows_per_chunk=7, n_rows=100, chunks_per_window=4, batch_rows=16, seed=5)
    for epoch in (0, 1):
        assert rows_of(plan, epoch) == golden[f"epoch_{epoch}"]
    lanes = replace(plan, chunks_per_window=3, lanes=2, drop_last=False)
    assert rows_of(lanes, 1) == golden["two_lanes"]
    table = chunk_table(np.array([9, 0, 28, 15]), 28, 7)
    partial = replace(plan, n_rows=52, chunks_per_window=3, chunk_table=table)
    assert rows_of(partial, 0) == golden["shards_of_9_0_28_15_rows"]
    mask = np.arange(105).reshape(-1, 7) % 3 == 0
    table, bits = np.stack([np.arange(15), mask.sum(1)], axis=1), np.packbits(mask, axis=1)
    wanted = replace(plan, n_rows=int(mask.sum()), chunk_table=table, wanted=bits)
    assert rows_of(wanted, 0) == golden["every_third_of_105_rows"]
    assert [turn(step, [3, 1, 2], 7) for step in range(24)] == golden["turns_of_weights_3_1_2"]


def rows_of(plan: Plan, epoch: int) -> list[list[int]]:
    return [plan.epoch(epoch).batch_row_ids(number).tolist() for number in range(plan.n_batches)]


def test_epochs_and_seeds_have_orders_of_their_own():
    plan = Plan(rows_per_chunk=7, n_rows=700, chunks_per_window=4, batch_rows=100, seed=5)
    other = Plan(rows_per_chunk=7, n_rows=700, chunks_per_window=4, batch_rows=100, seed=6)
    first = plan.epoch(0).batch_row_ids(0)
    assert not np.array_equal(first, plan.epoch(1).batch_row_ids(0))
    assert not np.array_equal(first, other.epoch(0).batch_row_ids(0))


def small_loader(store, **changes):
    settings = {"batch_rows": 50, "memory": 3000, "drop_last": False, "epochs": 2, "seed": 3}
    return Loader(store, ["*"], **{**settings, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_are_the_plans_rows_for_every_site(small_store, dtype):
    values = {site: small_store.read(site, slice(None)) for site in small_store.sites}
    with small_loader(small_store, dtype=dtype) as loader:
        assert loader.plan.n_windows > 2
        for i, batch in enumerate(loader):
            expected = loader.plan.epoch(i // len(loader)).batch_row_ids(i % len(loader))
            assert batch.rows.tolist() == expected.tolist()
            for site, all_rows in values.items():
                assert batch[site].dtype == dtype
                assert torch.equal(batch[site], all_rows[batch.rows].to(dtype))
    assert i + 1 == 2 * len(loader)


@pytest.fixture(scope="module")
def quantised_store(tmp_path_factory):
    """Three int8 sites, one with an outlying feature, 2**5 times as large as the others."""
    blocks = random_blocks(29, 13)
    outlier = Site(name="outlier", shape=(6,), feature_exponents=(0, 5, 0, 0, 0, 1))
    spec = spec_of(blocks, "int8", sites=(*spec_of(blocks).sites, outlier))
    bits = random_bits(spec)
    bits["outlier"][:, :, 1] += 5 << 7  # the exponent field of a bfloat16 begins at its bit 7
    store = write_shards(tmp_path_factory.mktemp("int8") / "s.zarr", spec, blocks, bits)
    table = store.row_table()
    return store, {site: values[table["sequence"], table["position"] - 1] for site, values in bits.items()}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_sites_are_delivered_close_to_what_was_written(quantised_store, monkeypatch, dtype, compiled):
    store, written = quantised_store
    if not compiled:
        monkeypatch.setattr(int8, "take_int8", lambda **_: None)
    exact = {site: (bits.astype(np.uint32) << 16).view(np.float32) for site, bits in written.items()}
    read = {site: store.read(site, slice(None)).float() for site in store.sites}
    with small_loader(store, dtype=dtype) as loader:
        for batch in loader:
            for site in batch:
                values = exact[site][batch.rows.numpy()]
                weights = np.exp2(store.spec.site(site).feature_exponents or np.zeros(values.shape[1]))
                step = np.abs(values / weights).max(axis=1, keepdims=True) / 127 * weights
                assert (np.abs(batch[site].float().numpy() - values) <= 0.51 * step + 2**-8 * np.abs(values)).all()
                # `read` rounds to the store's bfloat16, the loader to the dtype that is asked for.
                np.testing.assert_allclose(batch[site].float(), read[site][batch.rows], rtol=2**-7)


def everything(loader):
    return [(batch.rows, {site: batch[site] for site in batch}) for batch in loader]


def assert_equal(left, right):
    assert len(left) == len(right)
    for (rows, acts), (other_rows, other_acts) in zip(left, right, strict=True):
        assert torch.equal(rows, other_rows)
        assert all(torch.equal(acts[site], other_acts[site]) for site in acts)


def test_breaking_off_and_iterating_again_goes_on(small_store):
    unbroken = everything(small_loader(small_store))
    loader = small_loader(small_store)
    got = []
    for batch in loader:
        got.append((batch.rows, dict(batch)))
        if len(got) == 3:
            break
    got += everything(loader)
    assert_equal(got, unbroken)
    again = everything(loader)
    assert len(again) == len(unbroken)
    assert not torch.equal(again[0][0], unbroken[0][0])


def test_an_iterator_that_lost_its_loader_says_so_instead_of_waiting(small_store):
    for disturb in (lambda it: next(iter(it)), lambda it: it.load_state_dict(it.state_dict()), lambda it: it.close()):
        loader = small_loader(small_store)
        iterator = iter(loader)
        next(iterator)
        disturb(loader)
        with pytest.raises(ConfigError, match="make a separate loader for each use"):
            next(iterator)


def test_batches_may_be_kept_and_modified(small_store):
    site = small_store.sites[0]
    values = small_store.read(site, slice(None)).float()
    kept = []
    for batch in small_loader(small_store):
        rows = values[batch.rows]
        assert torch.equal(batch[site], rows)
        batch[site].mul_(2.0)
        kept.append((batch[site][3:], 2 * rows[3:]))
    assert all(torch.equal(got, expected) for got, expected in kept)


def test_batch_memory_is_reused_only_when_nobody_holds_it():
    memory = BatchMemory()
    first = memory.take(4, 3, torch.bfloat16)
    assert all(memory.take(n, 5, torch.float32).data_ptr() % 64 == 0 for n in range(1, 30))
    view, address = first[1:2], first.data_ptr()
    del first
    gc.collect()
    assert memory.take(4, 3, torch.bfloat16).data_ptr() != address
    del view
    gc.collect()
    assert address in {memory.take(4, 3, torch.bfloat16).data_ptr() for _ in range(1)} | {
        t.data_ptr() for t in [memory.take(4, 3, torch.bfloat16) for _ in range(2)]
    }


def test_bad_input_is_refused_when_the_loader_is_made(small_store, tmp_path):
    with pytest.raises(ConfigError, match="batches of 1,000 rows asked of a store that has 348 rows"):
        Loader(small_store, ["*"], batch_rows=1000)
    with pytest.raises(SiteError, match="no site matches"):
        Loader(small_store, ["blocks.7.*"], batch_rows=10)
    with pytest.raises(ConfigError, match="rank must be between 0 and world_size - 1 = 1"):
        Loader(small_store, ["*"], batch_rows=10, rank=2, world_size=2)
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    unfinished = write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec), shards=[0])
    with pytest.raises(StoreIncompleteError, match="1 of 4 shards"):
        Loader(unfinished, ["*"], batch_rows=10)


def test_damage_met_while_reading_ahead_reaches_the_consumer(tmp_path):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    file = tmp_path / "s.zarr/sites/blocks.0.hook_mlp_out/acts/c.1.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 4
    file.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"shard 1 of blocks\.0\.hook_mlp_out"):
        everything(small_loader(open_store(tmp_path / "s.zarr")))
