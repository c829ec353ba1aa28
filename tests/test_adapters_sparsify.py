"""The replay of a store as sparsify's model and data set: which rows its items are; the real Trainer runs beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.adapters.sparsify import replay
from actcache.errors import ConfigError, SiteError, StateError, StoreIncompleteError
from actcache.spec import Site
from actcache.store import Store, StoreWriter, open_store

TRAINS = "peers/sparsify_trains.py"
SITE = "blocks.0.hook_mlp_out"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> peers.Results:
    return peers.Results([TRAINS], ["sparsify"], tmp_path_factory.mktemp("sparsify"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", peers.tests_in(TRAINS))
def test_sparsify(results: peers.Results, name: str) -> None:
    results.check(name)


@pytest.fixture(scope="module")
def gappy_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of 4 shards that leaves out about a third of the rows, and all rows of its second shard but one."""
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks)
    bits, rng = random_bits(spec), np.random.default_rng(5)
    with StoreWriter(tmp_path_factory.mktemp("gappy") / "s.zarr", spec, blocks) as writer:
        for shard in writer.pending():
            sequences = spec.shard_sequences(shard)
            kept = rng.random(len(spec.shard_rows(shard))) < 0.66
            if shard == 1:
                kept[1:] = False
                kept[0] = True
            buffers = writer.acquire(shard)
            for site in writer.sites:
                rows = bits[site.name][sequences.start : sequences.stop].reshape(-1, site.width)
                buffers.rows[site.name][: kept.sum()] = rows[kept]
            writer.submit(buffers, blocks.ids[sequences.start : sequences.stop], kept)
        return writer.finish()


def items_of(store: Store, **settings):
    """All items, taken two at a time as a trainer does: their tokens, and the activations that hooks see."""
    model, dataset = replay(store, {"mlp": SITE}, **settings)
    seen = []
    model.base_model.get_submodule("mlp").register_forward_hook(lambda _, inputs, output: seen.append(output))
    tokens = []
    for first in range(0, len(dataset), 2):
        batch = [dataset[number]["input_ids"] for number in range(first, min(first + 2, len(dataset)))]
        model(torch.stack(batch))
        tokens += batch
    return torch.stack(tokens), torch.cat(seen)


@pytest.mark.parametrize("rows_per_item", [None, 1, 7, 100])
@pytest.mark.parametrize("order", ["stored", "reading"])
def test_items_are_the_rows_of_the_store_each_once(small_store, gappy_store, order, rows_per_item):
    for store in (small_store, gappy_store):
        table, values = store.row_table(), store.read(SITE, store.row_ids()).float()
        places = np.arange(store.n_rows)
        if order == "reading":
            places = np.lexsort((table["position"], table["sequence"]))
        tokens, acts = items_of(store, order=order, rows_per_item=rows_per_item)
        size = rows_per_item or store.spec.rows_per_sequence
        n = store.n_rows // size * size
        assert tokens.shape == (n // size, size)
        assert tokens.reshape(-1).tolist() == table["token"][places][:n].tolist()
        assert torch.equal(acts.reshape(n, -1), values[places][:n])


def test_items_in_reading_order_are_the_sequences(small_store):
    tokens, _ = items_of(small_store, order="reading")
    assert np.array_equal(tokens, small_store.tokens()[:, small_store.spec.skip_first :])


def test_parts_of_the_items_go_with_the_same_model(small_store):
    model, dataset = replay(small_store, [SITE])
    whole = [dataset[number]["input_ids"].tolist() for number in range(len(dataset))]
    later = dataset.select(range(5, len(dataset)))
    assert [later[number]["input_ids"].tolist() for number in range(len(later))] == whole[5:]
    shards = [later.shard(3, number) for number in range(3)]
    assert [number for shard in shards for number in shard.items] == [*range(5, len(dataset))]
    batch = torch.stack([shards[1][number]["input_ids"] for number in range(2)])
    model(batch)


def test_tokens_that_were_not_handed_out_are_refused(small_store):
    model, dataset = replay(small_store, [SITE])
    batch = torch.stack([dataset[number]["input_ids"] for number in range(2)])
    with pytest.raises(StateError, match="handed out just before"):
        model(batch.flip(0))
    with pytest.raises(StateError, match="handed out just before"):
        model(batch)  # asked for once, refused, and so no longer the last ones


def test_what_cannot_be_replayed_is_refused(small_store, tmp_path: Path):
    with pytest.raises(SiteError, match="no site"):
        replay(small_store, {"mlp": "blocks.7.hook_mlp_out"})
    with pytest.raises(ConfigError, match=r"is 12 wide and .* 10"):
        replay(small_store, {"mlp": tuple(small_store.sites)})
    with pytest.raises(ConfigError, match="order must be"):
        replay(small_store, [SITE], order="shuffled")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is more than"):
        replay(small_store, [SITE], rows_per_item=small_store.n_rows + 1)
    with pytest.raises(ConfigError, match="rows_per_item must be a positive integer, got 0"):
        replay(small_store, [SITE], rows_per_item=0)
    with pytest.raises(ConfigError, match="no hookpoint"):
        replay(small_store, [])
    blocks = random_blocks(29, 13)
    spec = spec_of(blocks, sites=(Site(name=SITE, shape=(12,)),))
    write_shards(tmp_path / "open.zarr", spec, random_blocks(29, 13), random_bits(spec), shards=[])
    with pytest.raises(StoreIncompleteError):
        replay(open_store(tmp_path / "open.zarr"), [SITE])
