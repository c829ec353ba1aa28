"""A loader of some of the rows: each wanted one exactly once an epoch, no other, and no chunk read in vain."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from places import elsewhere, writable

from actcache.errors import ConfigError, CorruptShardError, StateError
from actcache.load import Loader, Plan
from actcache.spec import Site
from actcache.store import RowFilter, Store, export, open_store
from actcache.store.format.keys import row_key
from actcache.store.format.site_arrays import arrays_of, chunks_per_shard

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
SITES = (
    Site(name="blocks.0.hook_mlp_out", shape=(12,)),
    Site(name="blocks.1.hook_mlp_out", shape=(12,), codec="int8"),
    Site(name="blocks.1.attn.hook_z", shape=(2, 5), codec="raw"),
)


def plan_of(mask: np.ndarray, rows_per_chunk: int, **sizes: int) -> Plan:
    """A plan of wanted rows, from a mask over all row ids."""
    padded = np.zeros(-(-len(mask) // rows_per_chunk) * rows_per_chunk, bool)
    padded[: len(mask)] = mask
    by_chunk = padded.reshape(-1, rows_per_chunk)
    counts = by_chunk.sum(1)
    table = np.stack([np.flatnonzero(counts), counts[counts > 0]], axis=1)
    bits = np.packbits(by_chunk[counts > 0], axis=1)
    return Plan(rows_per_chunk=rows_per_chunk, n_rows=int(mask.sum()), chunk_table=table, wanted=bits, **sizes)


def test_wanting_every_row_is_the_order_without_a_choice():
    sizes = {"chunks_per_window": 4, "batch_rows": 16, "seed": 5}
    wanted, whole = plan_of(np.ones(100, bool), 7, **sizes), Plan(rows_per_chunk=7, n_rows=100, **sizes)
    for batch in range(whole.n_batches):
        assert np.array_equal(wanted.epoch(1).batch_row_ids(batch), whole.epoch(1).batch_row_ids(batch))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """One with a last shard that is not full, and the same with rows left out and a shard that has none."""
    folder, blocks = tmp_path_factory.mktemp("rows"), random_blocks(45, 13)
    spec = replace(spec_of(blocks), sites=SITES)
    whole = write_shards(folder / "whole.zarr", spec, blocks, random_bits(spec))
    kept = np.random.default_rng(5).random(spec.n_rows) < 0.6
    kept[spec.rows_per_shard : 2 * spec.rows_per_shard] = False
    return {"whole": whole, "holes": export(whole, folder / "holes.zarr", rows=kept)}


def some(store: Store, share: float, seed: int = 0) -> np.ndarray:
    """A mask over all row ids, true for some of the rows."""
    mask, ids = np.zeros(store.spec.n_rows, bool), store.row_ids()
    rng = np.random.default_rng(seed)
    mask[ids[rng.random(len(ids)) < share]] = True
    mask[rng.choice(ids)] = True
    return mask


def small(store: Store, **changes: object) -> Loader:
    settings = {"batch_rows": 1, "memory": 6000, "drop_last": False, "epochs": 2, "seed": 3, "threads": 2}
    settings |= {"sites": ["*"]} | changes
    return Loader(store, settings.pop("sites"), **settings)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["whole", "holes"]),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.9]),
    batch_rows=st.integers(1, 60),
    memory=st.sampled_from([1, 3000, 20_000, 1 << 20]),
    seed=st.integers(0, 1000),
    sites=st.sampled_from([["*"], ["blocks.1*"], ["blocks.1.hook_mlp_out"], ["*hook_z", "blocks.0*"]]),
)
def test_batches_are_the_wanted_rows_of_every_site(stores, name, share, batch_rows, memory, seed, sites):
    store = stores[name]
    mask = some(store, share, seed)
    values = {site: store.read(site, slice(None)).float() for site in store.sites}
    place = np.cumsum(np.isin(np.arange(store.spec.n_rows), store.row_ids())) - 1
    batch_rows = min(batch_rows, int(mask.sum()))
    with small(store, sites=sites, rows=mask, batch_rows=batch_rows, memory=memory, seed=seed) as loader:
        batches = list(loader)
        assert len(batches) == 2 * len(loader) == 2 * -(-int(mask.sum()) // batch_rows)
    for epoch in (batches[: len(loader)], batches[len(loader) :]):
        rows = torch.cat([batch.rows for batch in epoch])
        assert np.array_equal(np.sort(rows.numpy()), np.flatnonzero(mask))
    for number, batch in enumerate(batches):
        planned = loader.plan.epoch(number // len(loader)).batch_row_ids(number % len(loader))
        assert np.array_equal(batch.rows.numpy(), planned)
        for site in batch:  # `read` rounds quantised values to bfloat16, the loader does not
            expected = values[site][place[batch.rows.numpy()]]
            torch.testing.assert_close(batch[site], expected, rtol=2**-7 if "1.hook_mlp" in site else 0, atol=0)


def test_the_same_rows_are_the_same_order_however_they_are_named(stores):
    store = stores["holes"]
    table, ids = store.row_table(), store.row_ids()
    late = ids[table["position"] >= 6]
    shuffled = np.random.default_rng(0).permutation(late)
    mask = np.isin(np.arange(store.spec.n_rows), late)
    choices = [RowFilter(positions=slice(6, None)), RowFilter(positions=range(6, 99)), late, shuffled.tolist(), mask]
    loaders = [small(store, rows=rows, batch_rows=20) for rows in choices]
    states = [loader.state_dict() for loader in loaders]
    assert all(state == states[0] for state in states)
    orders = [torch.cat([batch.rows for batch in loader]) for loader in loaders]
    assert all(torch.equal(order, orders[0]) for order in orders)
    part = torch.cat([batch.rows for batch in small(store, rows=slice(400, 100, -3), epochs=1)])
    assert sorted(part.tolist()) == [row for row in ids.tolist() if row in range(400, 100, -3)]


def test_a_choice_of_every_row_is_none(stores):
    for store in stores.values():
        loader, whole = small(store, rows=RowFilter(), batch_rows=50), small(store, batch_rows=50)
        assert loader.state_dict() == whole.state_dict()
        assert "rows" not in whole.state_dict()["settings"]
        for got, expected in zip(loader, whole, strict=True):
            assert torch.equal(got.rows, expected.rows)


def test_ranks_share_the_chosen_rows(stores):
    settings = {"batch_rows": 20, "rows": some(stores["whole"], 0.5), "epochs": 1, "lanes": 1}
    whole = [b.rows for b in small(stores["whole"], **settings)]
    parts = [[b.rows for b in small(stores["whole"], **settings, rank=rank, world_size=2)] for rank in range(2)]
    for number in range(len(whole) // 2 * 2):
        assert torch.equal(parts[number % 2][number // 2], whole[number])


def test_a_state_of_other_rows_is_refused(stores):
    store = stores["whole"]
    none = small(store, batch_rows=20)
    late = small(store, batch_rows=20, rows=RowFilter(positions=range(6, 13)))
    later = small(store, batch_rows=20, rows=RowFilter(positions=range(7, 13)))
    with pytest.raises(StateError, match="saved with all rows, this loader has a choice of rows"):
        late.load_state_dict(none.state_dict())
    with pytest.raises(StateError, match=r"saved with a choice of rows .* this loader has all rows; give the rows="):
        none.load_state_dict(late.state_dict())
    with pytest.raises(StateError, match=r"a choice of rows \(digest .*\), this loader has a choice of rows \(digest"):
        later.load_state_dict(late.state_dict())


def test_chunks_without_a_wanted_row_are_not_read(stores, monkeypatch):
    store, read = open_store(stores["whole"].path), []
    read_chunk = store.read_chunk

    def counted(site: str, shard: int, chunk: int, *rest: object, array: str = "acts") -> None:
        read.append((site, array, shard, chunk))
        read_chunk(site, shard, chunk, *rest, array=array)

    monkeypatch.setattr(store, "read_chunk", counted)
    per_chunk, per_shard = store.spec.rows_per_chunk, chunks_per_shard(store.spec)
    ids = [5, per_chunk * (2 * per_shard + 1), per_chunk * (2 * per_shard + 2) - 1]
    with small(store, rows=ids, epochs=1, read_ahead=1) as loader:
        assert sorted(torch.cat([batch.rows for batch in loader]).tolist()) == ids
    arrays = [(site.name, array.name) for site in SITES for array in arrays_of(store.spec, site)]
    assert sorted(read) == sorted((*names, *place) for names in arrays for place in [(0, 0), (2, 1)])


def test_of_the_row_table_only_what_tells_the_chosen_rows_is_read(stores):
    store, read = open_store(stores["whole"].path), []
    get = store.objects.get
    store.objects.get = lambda key: (read.append(key), get(key))[1]  # type: ignore[method-assign]
    small(store, rows=RowFilter(sequences=[9, 14, 33]))
    tables = {key for key in read if key.startswith("rows/") and not key.startswith("rows/commit")}
    assert tables == {row_key("sequence", shard) for shard in (1, 4)}


@elsewhere
def test_chosen_rows_of_a_bucket_are_fetched_like_others(stores, place):
    folder = Path(stores["holes"].path)
    objects = writable(place)
    for file in folder.rglob("*"):
        if file.is_file():
            objects.put(str(file.relative_to(folder)), file.read_bytes())
    remote = open_store(place)
    rows = some(stores["holes"], 0.3)
    here, there = (small(store, rows=rows, batch_rows=30) for store in (stores["holes"], remote))
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine.rows, theirs.rows)
        assert all(torch.equal(mine[site], theirs[site]) for site in mine)


def test_what_can_be_no_choice_is_refused(stores):
    store = stores["holes"]
    absent = int(np.setdiff1d(np.arange(store.spec.n_rows), store.row_ids())[0])
    with pytest.raises(ConfigError, match=r"none of the .* rows of .*; choose others"):
        small(store, rows=RowFilter(only_tokens=[5000]))
    with pytest.raises(ConfigError, match="row 3 is given more than once"):
        small(store, rows=[3, 0, 3])
    with pytest.raises(IndexError, match=f"row {absent} of .* was left out"):
        small(store, rows=[0, absent])
    mask = np.ones(store.spec.n_rows, bool)
    with pytest.raises(IndexError, match=f"row {absent} of .* was left out"):
        small(store, rows=mask)
    with pytest.raises(IndexError, match="a mask of 540 booleans, not by bool of shape"):
        small(store, rows=mask[:-1])
    with pytest.raises(ConfigError, match="batches of 30 rows asked of the rows that are wanted: 2"):
        small(store, rows=[0, 1], batch_rows=30)
    with pytest.raises(ConfigError, match="chunk_table"):
        Plan(rows_per_chunk=4, n_rows=8, chunks_per_window=1, batch_rows=1, seed=0, wanted=np.zeros((2, 1), np.uint8))


def test_a_damaged_row_table_is_no_basis_for_a_choice(tmp_path):
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    file = tmp_path / "s.zarr" / row_key("token", 2)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptShardError, match=r"rows/token/c\.2"):
        small(open_store(tmp_path / "s.zarr"), rows=RowFilter(exclude_tokens=[1]))


def test_windows_of_chosen_rows_keep_to_their_memory_and_still_shuffle(tmp_path):
    """One row in twenty: a window has room for many more chunks, and takes as many as shuffle well."""
    blocks = random_blocks(256, 65)
    spec = spec_of(blocks, sites=SITES[:1], sequences_per_shard=64, rows_per_chunk=32)
    store = write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    rows, row_bytes, n_threads = some(store, 0.05), 24, threading.active_count()
    for memory in (2000, 8000, 1 << 20):
        with Loader(store, ["*"], batch_rows=16, rows=rows, memory=memory) as loader:
            assert 2 * loader.plan.most_window_rows * row_bytes <= memory
            n_chunks = loader.plan.n_chunks
            assert len(list(loader)) == int(rows.sum()) // 16
    assert loader.plan.chunks_per_window > n_chunks // 4
    assert threading.active_count() <= n_threads
