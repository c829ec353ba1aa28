"""Exact resume of every iterator there is, after any batch; at once, however large the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards
from resume import MOST_STATE_BYTES, run_test_resume_at_every_batch

from actcache.adapters.llamascopium import ActivationStream
from actcache.adapters.torch_data import TorchDataset
from actcache.errors import StateError
from actcache.load import Loader, MixedLoader
from actcache.load.plan import epochs as plan
from actcache.order import permutation
from actcache.spec import Site
from actcache.store import RowFilter, Store, export, open_store
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import LEDGER_KEY
from actcache.store.format.site_arrays import chunks_per_shard

pytestmark = pytest.mark.exhaustive

QUICK = ("plain", "lanes")
"""Modes that every change is tried with; the others are exhaustive."""
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
@pytest.mark.parametrize(
    "mode", [mode if mode in QUICK else pytest.param(mode, marks=pytest.mark.exhaustive) for mode in MODES]
)
def test_resume_at_every_batch(stores, name, mode):
    assert run_test_resume_at_every_batch(lambda **ahead: loader_of(stores[name], **MODES[mode], **ahead)) > 4


@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
def test_resume_of_a_mixture_at_every_batch(stores):
    def make(read_ahead: int) -> MixedLoader:
        settings = {"read_ahead": read_ahead, "epochs": None, "batch_rows": 60}
        parts = [(loader_of(stores["whole"], **settings), 0.7), (loader_of(stores["holes"], lanes=2, **settings), 0.3)]
        return MixedLoader(parts, n_batches=24)

    assert run_test_resume_at_every_batch(make) == 24


@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
@pytest.mark.parametrize("adapter", [TorchDataset, ActivationStream])
def test_resume_of_what_other_trainers_iterate_at_every_batch(stores, adapter):
    def make(read_ahead: int) -> TorchDataset | ActivationStream:
        found = adapter(loader_of(stores["whole"], batch_rows=50, read_ahead=read_ahead))
        found.close = found.loader.close
        return found

    assert run_test_resume_at_every_batch(make) == 20


@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
def test_going_on_makes_and_reads_nothing_that_was_before(stores, monkeypatch):
    """From the last batch of a later epoch on: its windows, and the one that is read while they are in use."""
    store = open_store(stores["whole"].path)
    loader = loader_of(store, epochs=None, read_ahead=0)
    last = len(loader) - 1
    lane, following = (loader.plan.epoch(epoch).lanes[0] for epoch in (7, 8))
    windows = [(lane, window) for window in lane.batch_windows(last)] + [(following, 0)]
    assert len(lane.starts) > 10
    orders = {(loader.plan.n_chunks, 3, 1, epoch) for epoch in (7, 8)}
    orders |= {(int(of.starts[window + 1] - of.starts[window]), 3, 2, of.epoch, window) for of, window in windows}
    chunks = {divmod(part.chunk, chunks_per_shard(store.spec)) for of, window in windows for part in of.parts(window)}
    expected, read_chunk = loader.plan.epoch(7).batch_row_ids(last), store.read_chunk
    made, read = set(), set()

    def permuted(n: int, *key: int) -> np.ndarray:
        made.add((n, *key))
        return permutation(n, *key)

    def counted(site: str, shard: int, chunk: int, *rest: object, **array: str) -> None:
        read.add((shard, chunk))
        read_chunk(site, shard, chunk, *rest, **array)

    monkeypatch.setattr(plan, "permutation", permuted)
    monkeypatch.setattr(store, "read_chunk", counted)
    loader.load_state_dict({**loader.state_dict(), "epoch": 7, "batch": last})
    with loader:
        assert next(iter(loader)).rows.tolist() == expected.tolist()
    assert made <= orders
    assert read <= chunks


@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
def test_a_larger_store_takes_no_more_objects_until_the_first_batch(tmp_path, monkeypatch):
    """Three windows at most, and of the shards of their chunks record and index; the ledger knows of all others."""
    opened: list[str] = []
    for name in ("get", "tail", "read_into"):
        monkeypatch.setattr(Objects, name, _counted(getattr(Objects, name), opened))
    for n_shards in (12, 120):
        blocks = random_blocks(8 * n_shards, 13)
        spec = spec_of(blocks)
        path = tmp_path / f"{n_shards}.zarr"
        write_shards(path, spec, blocks, random_bits(spec))
        opened.clear()
        with loader_of(open_store(path), memory=8000, epochs=None, read_ahead=0) as loader:
            loader.load_state_dict({**loader.state_dict(), "epoch": 7, "batch": len(loader) - 2})
            next(iter(loader))
        assert {"zarr.json", LEDGER_KEY} <= set(opened)
        assert loader.plan.chunks_per_window == 5
        assert len(opened) <= 2 + 3 * 5 * 3 * len(loader.sites)


def _counted(work: Callable[..., Any], opened: list[str]) -> Callable[..., Any]:
    def counted(self: Objects, key: str, *rest: Any) -> Any:
        opened.append(key)
        return work(self, key, *rest)

    return counted


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
        ({"settings": {"chunks_per_window": 1000}}, "windows of 1000 chunks"),
        ({"batch": -1}, "its batch is -1"),
        ({"epoch": "1"}, "its epoch is '1'"),
        ({"settings": {"lanes": None}}, "its lanes is None"),
        ({"settings": {"drop_last": False}}, "drop_last: saved False, now True"),
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


def test_a_state_of_many_sites_is_small_and_still_tells_them_apart(tmp_path):
    blocks = random_blocks(9, 13)
    spec = spec_of(blocks, sites=[Site(name=f"blocks.{layer}.hook_resid_post", shape=(2,)) for layer in range(60)])
    store = write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))
    saved, fewer = Loader(store, ["*"], batch_rows=20), Loader(store, store.sites[:59], batch_rows=20)
    text = json.dumps(saved.state_dict())
    assert len(text) < MOST_STATE_BYTES
    Loader(store, ["*"], batch_rows=20).load_state_dict(json.loads(text))
    whole = {**saved.state_dict(), "settings": {**saved.state_dict()["settings"], "sites": store.sites}}
    Loader(store, ["*"], batch_rows=20).load_state_dict(whole)
    for state in (json.loads(text), whole):
        with pytest.raises(StateError, match=r"sites: saved '60 sites, sha256 .*', now '59 sites, sha256 .*'"):
            fewer.load_state_dict(state)
