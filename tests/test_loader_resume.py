"""Exact resume of every iterator there is, after any batch; at once, however large the store."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards
from resume import run_test_resume_at_every_batch

from actcache.errors import StateError
from actcache.load import Loader, MixedLoader, Plan
from actcache.load.plan import Share
from actcache.store import RowFilter, Store, export

MODES = {
    "plain": {},
    "last one smaller": {"drop_last": False},
    "chosen rows": {"rows": RowFilter(exclude_tokens=range(0, 900)), "drop_last": False},
    "lanes": {"lanes": 3, "drop_last": False},
    "a rank of two": {"rank": 1, "world_size": 2},
    "lanes and ranks that do not divide": {"lanes": 4, "rank": 2, "world_size": 3},
    "normalised": {"normalize": "center-rms", "lanes": 2},
    "reading order": {"order": "sequence", "batch_rows": 40, "memory": 20_000},
    "reading order of some rows": {
        "order": "sequence",
        "batch_rows": 30,
        "memory": 20_000,
        "rows": RowFilter(positions=slice(5, None)),
        "drop_last": False,
    },
    "reading order, a rank of two": {
        "order": "sequence",
        "batch_rows": 30,
        "memory": 20_000,
        "rank": 1,
        "world_size": 2,
    },
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """One with a last shard that is not full, and the same with rows left out and a shard that has none."""
    folder, blocks = tmp_path_factory.mktemp("resume"), random_blocks(45, 13)
    spec = spec_of(blocks)
    spec = replace(spec, sites=(spec.sites[0], replace(spec.sites[1], codec="int8")))
    whole = write_shards(folder / "whole.zarr", spec, blocks, random_bits(spec))
    kept = np.random.default_rng(5).random(spec.n_rows) < 0.6
    kept[spec.rows_per_shard : 2 * spec.rows_per_shard] = False
    return {"whole": whole, "holes": export(whole, folder / "holes.zarr", rows=kept)}


def loader_of(store: Store, **changes: object) -> Loader:
    settings = {"batch_rows": 20, "memory": 4000, "epochs": 2, "seed": 3, "threads": 1}
    return Loader(store, ["*"], **{**settings, **changes})


@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
@pytest.mark.parametrize("name", ["whole", "holes"])
@pytest.mark.parametrize("mode", MODES)
def test_resume_at_every_batch(stores, name, mode):
    assert run_test_resume_at_every_batch(lambda **ahead: loader_of(stores[name], **MODES[mode], **ahead)) > 4


@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
def test_resume_of_a_mixture_at_every_batch(stores):
    def make(read_ahead: int) -> MixedLoader:
        settings = {"read_ahead": read_ahead, "epochs": None}
        parts = [(loader_of(stores["whole"], **settings), 0.7), (loader_of(stores["holes"], lanes=2, **settings), 0.3)]
        return MixedLoader(parts, n_batches=50)

    assert run_test_resume_at_every_batch(make) == 50


def test_the_first_batch_after_a_state_takes_no_time_in_a_store_of_a_million_chunks():
    """Integers only: 255 million rows, at the end of an epoch; reading one window is the same in any store."""
    rows_per_chunk, n_chunks = 255, 10**6
    table = np.stack([np.arange(n_chunks), np.full(n_chunks, rows_per_chunk)], axis=1)
    table[::1000, 1] -= 7
    for chunk_table in (None, table):
        n_rows = rows_per_chunk * n_chunks if chunk_table is None else int(table[:, 1].sum())
        sizes = {"rows_per_chunk": rows_per_chunk, "n_rows": n_rows, "chunks_per_window": 512, "batch_rows": 4096}
        for lanes, share in [(1, Share()), (8, Share(rank=3, world_size=8)), (8, Share(rank=0, world_size=3))]:
            plan = Plan(**sizes, seed=0, lanes=lanes, chunk_table=chunk_table)
            delivered = plan.n_batches - 100
            began = perf_counter()
            epoch = plan.epoch(5)
            number = share.batches(plan.n_batches, delivered)[0]
            lane = epoch.lanes[number % lanes]
            window = share.windows(epoch, lane.number, delivered)[0]
            order, rows, parts = lane.window_order(window), lane.row_ids(window), lane.parts(window)
            piece = lane.piece(number // lanes, window, order)
            assert len(rows[piece.places]) > 0
            assert len(parts) <= 512
            assert perf_counter() - began < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"version": None}, "version None"),
        ({"fingerprint": "x"}, r"another store \(fingerprint x\)"),
        ({"settings": {"batch_rows": 40}}, "batch_rows: saved 40, now 20"),
        ({"settings": {"seed": 4}}, "seed: saved 4, now 3"),
        ({"settings": {"sites": ["x"]}}, "sites: saved"),
        ({"settings": {"epochs": None}}, "epochs: saved None, now 2"),
        ({"settings": {"rows": "abc"}}, "saved with a choice of rows"),
        ({"settings": {"chunks_per_window": 1000}}, "chunks_per_window: saved 1000"),
    ],
)
@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
def test_states_of_something_else_are_refused(stores, change, message):
    loader = loader_of(stores["whole"])
    state = loader.state_dict()
    if "settings" in change:
        change = {"settings": {**state["settings"], **change["settings"]}}
    with pytest.raises(StateError, match=message):
        loader.load_state_dict({**state, **change})
