"""Several processes, one order: who gets which batch, who reads which chunk, and going on with another number."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader_rows import plan_of

from actcache.errors import ConfigError, StateError
from actcache.load import Loader, Plan
from actcache.load.plan.epochs import chunk_table
from actcache.load.plan.ranks import Rank
from actcache.store import Store, open_store

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
HERE = Path(__file__).parent


def shape_of(kind: str, n_rows: int, rows_per_chunk: int, seed: int, **sizes: object) -> tuple[Plan, np.ndarray]:
    """A plan of a store whose rows are all full shards', or not, or of which some are wanted; and its row ids."""
    rng = np.random.default_rng(seed)
    if kind == "wanted":
        mask = rng.random(n_rows) < rng.choice([0.001, 0.05, 0.5, 0.98, 1])
        mask[rng.integers(n_rows)] = True
        return plan_of(mask, rows_per_chunk, seed=seed, **sizes), np.flatnonzero(mask)
    rows_of_shards, table = np.array([n_rows]), None
    if kind == "partial shards":
        rows_per_shard = rows_per_chunk * int(rng.integers(1, 5))
        rows_of_shards = rng.integers(0, rows_per_shard + 1, -(-n_rows // rows_per_shard) + 1)
        rows_of_shards[rng.integers(len(rows_of_shards))] = rows_per_shard
        table = chunk_table(rows_of_shards, rows_per_shard, rows_per_chunk)
        ids = np.concatenate([s * rows_per_shard + np.arange(n) for s, n in enumerate(rows_of_shards)])
    else:
        ids = np.arange(n_rows)
    return Plan(n_rows=len(ids), rows_per_chunk=rows_per_chunk, chunk_table=table, seed=seed, **sizes), ids


@pytest.mark.exhaustive
@settings(max_examples=2000, deadline=None)
@given(
    kind=st.sampled_from(["whole", "partial shards", "wanted"]),
    rows_per_chunk=st.integers(1, 30),
    n_rows=st.integers(1, 600),
    chunks_per_window=st.integers(1, 9),
    batch_rows=st.integers(1, 90),
    lanes=st.integers(1, 9),
    world_size=st.integers(1, 7),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_every_row_once_an_epoch_over_all_ranks_and_from_their_own_lanes(
    kind, rows_per_chunk, n_rows, chunks_per_window, batch_rows, lanes, world_size, drop_last, seed, epoch
):
    sizes = {"chunks_per_window": chunks_per_window, "lanes": lanes, "drop_last": drop_last}
    plan, ids = shape_of(kind, n_rows, rows_per_chunk, seed, batch_rows=1, **sizes)
    plan = replace(plan, batch_rows=min(batch_rows, len(ids)))
    order = plan.epoch(epoch)
    batches = [order.batch_row_ids(number) for number in range(plan.n_batches)]
    assert [len(batch) for batch in batches[:-1]] == [plan.batch_rows] * (plan.n_batches - 1)
    union, left_out = np.concatenate(batches), len(ids) % plan.batch_rows * drop_last
    assert len(np.unique(union)) == len(union) == len(ids) - left_out
    assert np.isin(union, ids).all()
    assert max(np.diff(lane.starts).max(initial=0) for lane in order.lanes) <= plan.most_window_rows
    assert max(int(lane.starts[-1]) for lane in order.lanes) == plan.most_lane_rows

    ranks = [Rank(rank=rank, world_size=world_size) for rank in range(world_size)]
    numbers = [rank.batches(plan.n_batches, 0) for rank in ranks]
    assert {len(of_rank) for of_rank in numbers} == {plan.n_batches // world_size}
    assert sorted(chain(*numbers)) == list(range(plan.n_batches // world_size * world_size))
    for rank, of_rank in zip(ranks, numbers, strict=True):
        assert {number % lanes for number in of_rank} <= set(rank.lanes(lanes))
        for lane in rank.lanes(lanes):
            in_lane = [number // lanes for number in of_rank if number % lanes == lane]
            needed = {window for number in in_lane for window in order.lanes[lane].batch_windows(number)}
            assert rank.windows(order, lane, 0) == sorted(needed)


@settings(max_examples=300, deadline=None)
@given(
    n_batches=st.integers(1, 60),
    worlds=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_whatever_the_number_of_ranks_becomes_no_batch_is_lost_or_doubled(n_batches, worlds):
    """Each (world size, rounds) of a run that is broken off and goes on with another number of ranks."""
    delivered, got = 0, []
    for world_size, rounds in worlds:
        of_ranks = [Rank(rank=r, world_size=world_size).batches(n_batches, delivered) for r in range(world_size)]
        rounds = min(rounds, len(of_ranks[0]))
        got += [number for of_rank in of_ranks for number in of_rank[:rounds]]
        delivered += rounds * world_size
        assert sorted(got) == list(range(delivered))
    assert n_batches - delivered >= 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """1,920 rows in chunks of 16, the last of 20 shards not full."""
    blocks = random_blocks(160 - 3, 13)
    spec = spec_of(blocks, sequences_per_shard=8)
    return write_shards(tmp_path_factory.mktemp("lanes") / "s.zarr", spec, blocks, random_bits(spec))


def loader_of(store: Store, **changes: object) -> Loader:
    settings = {"batch_rows": 32, "seed": 3, "epochs": 1, "drop_last": False, "threads": 1}
    return Loader(store, store.sites[:1], **{**settings, **changes})


def taken(loader: Loader, n: int | None = None) -> list[list[int]]:
    got = []
    with loader:
        for batch in loader:
            got.append(batch.rows.tolist())
            if len(got) == n:
                break
    return got


@pytest.mark.parametrize("lanes", [1, 2, 4, 6])
def test_the_order_of_batches_is_that_of_the_lanes_whatever_the_ranks(store, lanes):
    whole = taken(loader_of(store, lanes=lanes, epochs=2))
    per_epoch = len(whole) // 2
    for world_size in (1, 2, 3, 4):
        parts = [
            taken(loader_of(store, lanes=lanes, epochs=2, rank=r, world_size=world_size)) for r in range(world_size)
        ]
        rounds = per_epoch // world_size
        for epoch in range(2):
            for number in range(rounds * world_size):
                got = parts[number % world_size][epoch * rounds + number // world_size]
                assert got == whole[epoch * per_epoch + number]
        first, second = (set(chain(*whole[per_epoch * e :][rounds * world_size : per_epoch])) for e in range(2))
        assert first != second or per_epoch % world_size == 0  # what is over is left out, other rows in each epoch


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_reads_its_share_of_the_chunks_and_those_at_the_borders(store, monkeypatch, world_size):
    read: list[tuple[int, int]] = []
    watched = open_store(store.path)
    read_chunk = watched.read_chunk

    def counted(site: str, shard: int, chunk: int, *rest: object, array: str = "acts") -> None:
        read.append((shard, chunk))
        read_chunk(site, shard, chunk, *rest, array=array)

    monkeypatch.setattr(watched, "read_chunk", counted)
    n_chunks = loader_of(store).plan.n_chunks
    total = 0
    for rank in range(world_size):
        read.clear()
        taken(loader_of(watched, rank=rank, world_size=world_size))
        assert len(read) == len(set(read)) <= n_chunks / world_size + 2 + 32 // 16
        total += len(read)
    assert total <= n_chunks + world_size - 1  # a chunk on the border of two lanes is read by both


def test_a_state_goes_on_with_another_number_of_ranks(store):
    lanes, first_rounds = 2, 7
    whole = taken(loader_of(store, lanes=lanes, epochs=2))
    per_epoch = len(whole) // 2
    for before, after in [(2, 3), (2, 1), (3, 2), (1, 5)]:
        firsts = [loader_of(store, lanes=lanes, epochs=2, rank=r, world_size=before) for r in range(before)]
        got = [taken(loader, first_rounds) for loader in firsts]
        states = [json.dumps(loader.state_dict()) for loader in firsts]
        assert len(set(states)) == 1
        seconds = [loader_of(store, epochs=2, rank=r, world_size=after) for r in range(after)]
        for loader in seconds:
            loader.load_state_dict(json.loads(states[0]))
            assert loader.plan.lanes == lanes
        rest = [taken(loader) for loader in seconds]
        delivered = before * first_rounds
        in_epoch = (per_epoch - delivered) // after * after + delivered
        in_next = per_epoch // after * after
        expected = sorted(whole[:in_epoch] + whole[per_epoch : per_epoch + in_next])
        assert sorted(chain(*got, *rest)) == expected
        # and a state of these goes on with as many, in a loader that was not told of the lanes
        third = loader_of(store, epochs=2, rank=0, world_size=after)
        third.load_state_dict(seconds[0].state_dict())
        assert third.plan.lanes == lanes


def test_lanes_that_were_asked_for_are_not_given_up_for_a_state(store):
    state = loader_of(store, lanes=2).state_dict()
    with pytest.raises(StateError, match="lanes: saved 2, now 3"):
        loader_of(store, lanes=3).load_state_dict(state)


@pytest.mark.parametrize("order", ["shuffled", "sequence"])
def test_a_state_goes_on_with_more_memory_in_the_order_that_it_was_begun_in(store, order):
    settings = {"memory": 6000 if order == "shuffled" else 24_000, "epochs": 2, "order": order, "lanes": 1}
    saved = loader_of(store, **settings)
    whole, state = taken(loader_of(store, **settings)), None
    begun = taken(saved, 11)
    state = json.loads(json.dumps(saved.state_dict()))
    roomy = loader_of(store, **{**settings, "memory": "1GB", "lanes": None})
    assert order == "sequence" or roomy.plan.chunks_per_window > saved.plan.chunks_per_window
    roomy.load_state_dict(state)
    assert roomy.state_dict() == state
    assert begun + taken(roomy) == whole


def test_windows_of_a_state_that_do_not_fit_say_what_they_take(store):
    row_bytes, roomy = 24, 2 * 16 * 24 * 12
    saved = loader_of(store, memory=roomy, rank=0, world_size=2).state_dict()
    assert saved["settings"]["chunks_per_window"] == 12
    one = loader_of(store, memory=roomy)
    with pytest.raises(
        StateError,
        match=r"of 12 chunks, and memory=9216 has room for 6, .* 2 of 2 lanes; .* memory=18432 or more",
    ):
        one.load_state_dict(saved)
    assert taken(one, 2) == taken(loader_of(store, memory=roomy), 2)  # refused, and nothing has changed
    with pytest.raises(StateError, match="batch_rows: saved 32, now 30"):  # comes first: no memory would help
        loader_of(store, memory=roomy, batch_rows=30).load_state_dict(saved)
    enough = loader_of(store, memory=18432)
    enough.load_state_dict(saved)
    assert enough.plan.most_window_rows * row_bytes * 2 * 2 <= 18432


def test_states_of_the_version_before_go_on(store):
    """It counted the batches of each rank, and had one lane."""
    now = loader_of(store, lanes=1, rank=1, world_size=2)
    taken(now, 5)
    state = now.state_dict()
    assert state["batch"] == 10
    old = {**state, "version": 1, "batch": 5, "settings": {k: v for k, v in state["settings"].items() if k != "lanes"}}
    fresh = loader_of(store, rank=1, world_size=2)
    fresh.load_state_dict(json.loads(json.dumps(old)))
    assert fresh.state_dict() == state
    assert taken(fresh) == taken(loader_of(store, lanes=1, rank=1, world_size=2))[5:]


def test_memory_is_shared_by_the_lanes_that_a_process_reads(store):
    row_bytes = 24
    for lanes, world_size in [(1, 1), (4, 1), (4, 2), (4, 4), (6, 4)]:
        loader = loader_of(store, lanes=lanes, world_size=world_size, memory=12_000)
        lanes_here = lanes // math.gcd(lanes, world_size)
        assert 2 * lanes_here * loader.plan.most_window_rows * row_bytes <= 12_000
        next(iter(loader))
        assert sum(len(buffers) for buffers in loader._production.windows.values()) == 2 * lanes_here
        loader.close()


def test_more_lanes_than_batches_is_no_trouble(store):
    loader = loader_of(store, batch_rows=900, lanes=8, epochs=None)
    with loader:
        got = [batch.rows for batch, _ in zip(loader, range(3 * len(loader)), strict=False)]
    assert sorted(torch.cat(got[: len(loader)]).tolist()) == store.row_ids().tolist()
    with pytest.raises(ConfigError, match="3 batches of 900 rows cannot be shared by 4 ranks"):
        loader_of(store, batch_rows=900, rank=0, world_size=4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("after", [3, 1])
def test_real_processes_cover_the_epoch_and_go_on_with_another_number(store, tmp_path, after):
    """Of `torch.distributed`, two at first; they gather who had which rows."""
    run_ranks(store, 2, tmp_path, n_batches=9, state=None)
    first = json.loads((tmp_path / "got.json").read_text())
    run_ranks(store, after, tmp_path, n_batches=None, state=tmp_path / "state.json")
    second = json.loads((tmp_path / "got.json").read_text())
    assert {len(of_rank) for of_rank in first} == {9}
    assert len({len(of_rank) for of_rank in second}) == 1
    whole = taken(loader_of(store, lanes=2))
    rounds = (len(whole) - 18) // after * after
    assert sorted(chain(*first, *second)) == sorted(whole[: 18 + rounds])


def run_ranks(store: Store, world_size: int, folder: Path, *, n_batches: int | None, state: Path | None) -> None:
    (folder / "meeting").unlink(missing_ok=True)
    processes = []
    for rank in range(world_size):
        job = {
            "store": store.path,
            "rank": rank,
            "world_size": world_size,
            "folder": str(folder),
            "n_batches": n_batches,
            "state": None if state is None else str(state),
        }
        arguments = [sys.executable, str(HERE / "loader_rank.py"), json.dumps(job)]
        processes.append(subprocess.Popen(arguments, cwd=HERE.parent))
    assert [process.wait(timeout=600) for process in processes] == [0] * world_size
