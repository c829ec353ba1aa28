"""Several real processes fill one store: each shard is made once, whoever ends last seals, and killed ones harm nobody.

The processes are those of `part_processes.py`.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_bits, random_blocks, spec_of, write_shards
from part_processes import N_SHARDS, TIMEOUT_S, Processes, kill
from places import between_processes, by_name, everywhere, writable

from actcache.errors import (
    ConfigError,
    NotAStoreError,
    StoreBusyError,
    StoreIncompleteError,
    StoreMismatchError,
    StoreNotFoundError,
)
from actcache.spec import Site
from actcache.store import StoreWriter, delete_sites, open_store, repair, unlock, verify
from actcache.store.format.keys import commit_key
from actcache.store.format.root import Root, exists_any, read_root, write_root
from actcache.store.format.stats import stats_of
from actcache.store.locks.lock_keys import CLAIM, LEASE, SHARED, lock_keys
from actcache.store.writing import writer as writer_module


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[Processes]:
    begun = Processes(tmp_path_factory.mktemp("processes"))
    yield begun
    begun.end()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The store that one writer makes."""
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    kill.write(path, kill.spec_of(kill.blocks()), kill.blocks())
    return contents(path)


def contents(place: Any) -> dict[str, bytes]:
    """All objects of a store, and in a folder all files, unfinished ones too."""
    if isinstance(place, Path):
        return kill.contents(place)
    objects = writable(place)
    return {key: bytes(objects.get(key)) for key in objects.list("")}


def share(place: Any, **more: Any) -> StoreWriter:
    text = kill.blocks()
    return StoreWriter(place, kill.spec_of(text), text, shared=True, **more)


def alone(place: Any) -> StoreWriter:
    text = kill.blocks()
    return StoreWriter(place, kill.spec_of(text), text)


def make(writer: StoreWriter, shards: Any) -> None:
    for shard in shards:
        if writer.claim(shard):
            kill.fill(writer, shard, kill.blocks())
    writer.wait()


@between_processes
def test_parts_come_to_the_bytes_that_one_writer_makes(place, processes, whole):
    parts = [processes.begin(place, range(i, N_SHARDS, 3)) for i in range(3)]  # nothing is there when they begin
    results = [part.result() for part in parts]
    assert sum(result["made"] for result in results) == N_SHARDS
    assert sum(result["seals"] for result in results) == 1
    assert any(result["sealed"] for result in results)
    assert contents(place) == whole


@between_processes
def test_of_processes_with_the_same_shards_each_shard_is_made_by_one(place, processes, whole):
    order = list(range(N_SHARDS))
    parts = [processes.begin(place, order[i:] + order[:i], pause_s=0.005) for i in (0, 0, 3)]
    results = [part.result() for part in parts]
    assert sum(result["made"] for result in results) == N_SHARDS
    assert sum(result["seals"] for result in results) == 1
    assert contents(place) == whole


@pytest.mark.exhaustive
@pytest.mark.parametrize(("place", "n_seeds"), [("folder", 25), ("s3", 4)], indirect=["place"])
def test_processes_killed_at_random_moments_harm_neither_the_others_nor_the_store(place, n_seeds, processes, whole):
    n_killed = 0
    for seed in range(n_seeds):
        path, rng = (place / str(seed) if isinstance(place, Path) else f"{place}/{seed}"), np.random.default_rng(seed)
        parts = [processes.begin(path, rng.permutation(N_SHARDS).tolist(), pause_s=0.01) for _ in range(3)]
        victims = parts[: rng.integers(1, 4)]
        for victim in victims:
            time.sleep(rng.uniform(0, 0.06 if isinstance(place, Path) else 0.3))
            victim.kill()
        assert all(part.wait() == 0 for part in parts if part not in victims)
        n_killed += sum(victim.wait() != 0 for victim in victims)
        if exists_any(writable(path)) and read_root(writable(path)).state != "creating":
            assert verify(path) == []
        for _ in range(2):  # the second one finds nothing to do, and takes away what one killed at its very end left
            processes.begin(path, range(N_SHARDS)).result()
        assert contents(path) == whole, seed
    assert n_killed >= n_seeds // 2


@pytest.mark.exhaustive
def test_of_processes_that_end_at_the_same_moment_one_seals(tmp_path, processes, whole):
    for number in range(30):
        path, meet = tmp_path / f"{number}.zarr", tmp_path / f"meet-{number}"
        meet.mkdir()
        parts = [processes.begin(path, range(i, N_SHARDS, 3), meet=str(meet), n=3) for i in range(3)]
        results = [part.result() for part in parts]
        assert sum(result["seals"] for result in results) == 1
        assert all(result["sealed"] for result in results)
        assert contents(path) == whole


@pytest.mark.exhaustive
@between_processes
def test_when_the_one_that_seals_is_killed_the_other_does_it(place, processes, whole, tmp_path):
    n_killed, most = 0, 40 if isinstance(place, Path) else 4
    for number in range(most):
        path, meet = (place / str(number) if isinstance(place, Path) else f"{place}/{number}"), tmp_path / f"m{number}"
        meet.mkdir()
        jobs = [{"dies when it seals": True}, {}]
        parts = [processes.begin(path, range(i, N_SHARDS, 2), meet=str(meet), n=2, **jobs[i]) for i in range(2)]
        assert parts[1].result() == {"sealed": True, "made": N_SHARDS // 2, "seals": 1}
        n_killed += parts[0].wait() == -signal.SIGKILL
        assert contents(path) == whole
        if n_killed == 2:
            break
    assert n_killed or most == 4  # which of the two is the first is left to chance


@between_processes
def test_the_claim_of_a_killed_process_is_taken_over_at_once(place, processes, whole):
    part = processes.begin(place, [4], claim_s=TIMEOUT_S)
    part.wait_for_claim()
    with share(place) as writer:
        assert not writer.claim(4)
        part.kill()
        make(writer, range(N_SHARDS))
        assert writer.finish().sealed
    assert contents(place) == whole


@between_processes
def test_after_the_last_one_was_killed_a_writer_that_is_alone_finishes_and_leaves_nothing(place, processes, whole):
    parts = [processes.begin(place, [shard], claim_s=TIMEOUT_S) for shard in (1, 2)]
    for part in parts:
        part.wait_for_claim()
    with pytest.raises(StoreBusyError, match="is being written by"):
        alone(place)
    for part in parts:
        part.kill()
    assert {f"{CLAIM}1", f"{CLAIM}2"} <= set(lock_keys(writable(place)))
    with alone(place) as writer:
        assert writer.pending() == list(range(N_SHARDS))
        assert all(key.startswith(LEASE) and SHARED not in key for key in lock_keys(writable(place)))
        make(writer, writer.pending())
        assert writer.finish().sealed
    assert contents(place) == whole


@everywhere
def test_those_who_share_keep_out_those_who_want_it_alone_and_the_other_way_round(place, monkeypatch):
    monkeypatch.setattr(writer_module, "_JOIN_PATIENCE_S", 0.05)
    monkeypatch.setattr(writer_module, "_CREATION_PATIENCE_S", 0.05)
    objects = writable(place)
    with share(objects) as first, share(objects) as second:
        make(first, [0])
        for attempt in (
            lambda: alone(objects),
            lambda: delete_sites(objects, [next(iter(kill.WIDTHS))]),
            lambda: repair(objects, []),
        ):
            with pytest.raises(StoreBusyError, match="being written"):
                attempt()
        make(second, [1])
    with alone(objects) as writer:
        with pytest.raises(StoreBusyError, match="being written"):
            share(objects)
        assert writer.pending() == list(range(2, N_SHARDS))
    assert lock_keys(objects) == []


@by_name
def test_who_shares_waits_for_one_that_is_about_to_end(place):
    objects = writable(place)
    writer = alone(objects)
    ending = threading.Timer(0.3, writer.__exit__, [None, None, None])
    ending.start()
    with share(objects) as other:
        assert not ending.is_alive() or ending.finished.is_set()
        assert other.claim(0)
    ending.join()


@everywhere
def test_a_claim_is_one_writer_s_until_it_is_committed_or_the_writer_ends(place):
    objects = writable(place)
    with share(objects) as second:
        with share(objects) as first:
            assert first.claim(0)
            assert first.claim(0)
            assert first.claim(1)
            assert not second.claim(0)
            with pytest.raises(StoreBusyError, match="claim it first"):
                second.acquire(0)
            make(first, [0])
            assert first.pending() == list(range(1, N_SHARDS))
            assert second.pending() == list(range(N_SHARDS))  # as it was when it began
            assert not first.claim(0)
            assert not second.claim(0)  # but a claim looks at the store
            assert second.pending() == list(range(1, N_SHARDS))
            assert not second.claim(1)
        assert second.claim(1)
        assert not second.finish().sealed
    assert lock_keys(objects) == []


def test_a_writer_that_is_alone_has_every_shard_that_is_missing(tmp_path):
    with alone(tmp_path / "s.zarr") as writer:
        assert writer.claim(3)
        make(writer, [3])
        assert not writer.claim(3)
        assert writer.claim(4)


def test_a_forked_child_does_not_give_its_parent_s_claims_away(tmp_path):
    with share(tmp_path) as writer, share(tmp_path) as other:
        assert writer.claim(0)
        child = os.fork()
        if not child:
            writer._lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert not other.claim(0)
        with pytest.raises(StoreBusyError):
            alone(tmp_path)


def test_unfinished_writes_of_others_stay_until_one_is_alone(tmp_path, whole):
    path = tmp_path / "s.zarr"
    unfinished = path / "rows" / "token" / f"c.6.{'0' * 32}.partial"
    with share(path) as first:
        make(first, [0])
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(b"being written")
        with share(path) as second:
            make(second, [1])
            assert not second.finish().sealed
        assert unfinished.exists()
        make(first, range(N_SHARDS))
        assert first.finish().sealed
    assert contents(path) == whole


def test_a_shard_begun_by_another_is_finished_as_it_was_begun(tmp_path, whole):
    """Some columns are committed: the others are made, of the same rows."""
    path, (first, second) = tmp_path / "s.zarr", kill.WIDTHS
    with share(path) as writer:
        make(writer, range(N_SHARDS))
    for column, shard in ((first, 2), (second, 3)):
        writable(path).delete(commit_key(column, shard))
    with share(path) as writer:
        assert writer.pending() == [2, 3]
        make(writer, [2, 3])
        assert set(writer.written.lines) == {first, second}
        assert writer.finish().sealed
    assert contents(path) == whole


def test_where_folders_have_no_locks_of_the_system_leases_do(tmp_path, monkeypatch, whole):
    def refuse(*_: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("fcntl.flock", refuse)
    with share(tmp_path) as first, share(tmp_path) as second:
        make(first, [0, 1])
        assert first.claim(2)
        assert not second.claim(2)
        assert {f"{CLAIM}2", *(f"{SHARED}{writer._lock._token}" for writer in (first, second))} == set(
            lock_keys(writable(tmp_path))
        )
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} on"):
            alone(tmp_path)
    with share(tmp_path) as writer:
        make(writer, range(N_SHARDS))
        assert writer.finish().sealed
    assert contents(tmp_path) == whole


def test_locks_of_machines_that_cannot_be_seen_stay_until_they_are_removed(bucket, whole):
    elsewhere = {"host": "elsewhere", "pid": 7, "since": "2026-01-02T03:04:05+00:00", "token": "0" * 32}
    lease = json.dumps({**elsewhere, "processes": "x"}).encode()
    objects = writable(bucket)
    with share(bucket) as writer:
        objects.put(f"{CLAIM}1", lease)
        objects.put(f"{SHARED}{'0' * 32}", lease)
        assert not writer.claim(1)
        make(writer, range(N_SHARDS))
        assert not writer.finish().sealed
        assert writer.pending() == [1]
    with pytest.raises(StoreBusyError, match=r"process 7 on elsewhere since 2026-01-02.* --unlock"):
        alone(bucket)
    assert unlock(bucket) == "process 7 on elsewhere since 2026-01-02T03:04:05+00:00"
    with alone(bucket) as writer:
        make(writer, [1])
        assert writer.finish().sealed
    assert contents(bucket) == whole


@between_processes
def test_who_is_done_does_not_wait_for_ever_for_one_that_is_not(place, monkeypatch, whole):
    monkeypatch.setattr(writer_module, "_SEALING_PATIENCE_S", 0.2)
    with share(place) as idle:
        with share(place) as writer:
            make(writer, range(N_SHARDS))
            assert not writer.finish().sealed
        assert idle.finish().sealed
    assert contents(place) == whole


@between_processes
def test_locks_of_living_processes_are_not_taken_away(place):
    with share(place) as writer:
        assert writer.claim(0)
        with pytest.raises(StoreBusyError):
            unlock(place)
        with share(place) as other:
            assert not other.claim(0)
    assert unlock(place) is None


def test_other_settings_are_refused(tmp_path):
    text = kill.blocks()
    with share(tmp_path), pytest.raises(StoreMismatchError, match="begun with other settings"):
        StoreWriter(tmp_path, kill.spec_of(text, Site(name="more", shape=(3,))), text, shared=True)
    with pytest.raises(ConfigError, match="leave out either grow or shared"):
        StoreWriter(tmp_path, kill.spec_of(text), text, shared=True, grow=True)


def test_without_tokens_a_store_that_exists_is_filled_and_none_is_made(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(writer_module, "_CREATION_PATIENCE_S", 0.05)
    path, text = tmp_path / "s.zarr", kill.blocks()
    spec = kill.spec_of(text)
    for shared in (True, False):
        with pytest.raises(StoreNotFoundError, match="no activation store at"):
            StoreWriter(path, spec, None, shared=shared)
    write_root(writable(path), Root(state="creating", spec=spec))
    for shared in (True, False):
        with pytest.raises(StoreIncompleteError):
            StoreWriter(path, spec, None, shared=shared)
    with share(path) as writer:
        make(writer, [0])
    for shared in (True, False):
        with StoreWriter(path, spec, None, shared=shared) as writer:
            make(writer, range(4 if shared else N_SHARDS))
            assert writer.finish().sealed is not shared
    assert contents(path) == whole


@pytest.mark.parametrize("shared", [False, True])
def test_something_else_is_left_as_it_is(tmp_path, shared):
    (tmp_path / "thesis.txt").write_text("mine")
    text = kill.blocks()
    with pytest.raises(NotAStoreError):
        StoreWriter(tmp_path, kill.spec_of(text), text, shared=shared)
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.txt"]


def test_a_store_says_how_it_came_to_be_whoever_goes_on_with_it(tmp_path):
    blocks, elsewhere, tmp_path = random_blocks(29, 13), tmp_path, tmp_path / "acts.zarr"
    spec, made = spec_of(blocks), {"versions": {"torch": "1"}, "batch_sequences": 8}
    with StoreWriter(tmp_path, spec, blocks, provenance=made) as writer:
        assert writer.provenance == made
    with StoreWriter(tmp_path, spec, None, shared=True, provenance={"versions": {"torch": "2"}}) as writer:
        assert writer.provenance == made
    write_shards(tmp_path, spec, blocks, random_bits(spec))
    assert open_store(tmp_path).root.provenance == made
    more = random_blocks(29, 13).join(random_blocks(6, 13, seed=3))
    grown = spec_of(more)
    assert write_shards(tmp_path, grown, more, random_bits(grown), grow=True).root.provenance == made
    delete_sites(tmp_path, [spec.sites[0].name])
    assert open_store(tmp_path).root.provenance == made
    next(tmp_path.glob("sites/*/acts/c.1.0")).write_bytes(b"")
    repair(tmp_path, verify(tmp_path))
    assert open_store(tmp_path).root.state == "open"
    assert open_store(tmp_path).root.provenance == made
    fingerprints = {
        write_shards(elsewhere / name, spec, blocks, random_bits(spec)).fingerprint for name in ("with", "without")
    }
    assert len(fingerprints) == 1


def test_a_writer_tells_what_it_has_written(tmp_path):
    with share(tmp_path, n_buffers=1) as first:
        assert (first.written.n_bytes, first.written.n_shards, first.written.lines, first.queued) == (0, 0, {}, 0)
        make(first, range(0, N_SHARDS, 2))
        with share(tmp_path) as second:
            make(second, range(1, N_SHARDS, 2))
            assert first.queued == second.queued == 0
        store = first.finish()
    found, other = first.written, second.written
    assert (found.n_shards, other.n_shards) == (4, 3)
    assert found.n_bytes + other.n_bytes == store.ledger[:, :, 40:48].copy().view("<u8").sum()
    for site in store.sites:
        expected = store.stats(site)
        mine, theirs = stats_of(found.lines[site]), stats_of(other.lines[site])
        assert mine.count + theirs.count == expected.count
        mean = (mine.mean * mine.count + theirs.mean * theirs.count) / expected.count
        assert np.allclose(mean, expected.mean, rtol=1e-12)
        assert max(mine.abs_max, theirs.abs_max) == expected.abs_max


def test_buffers_are_allocated_as_the_caller_wants(tmp_path, whole):
    asked = []

    def allocate(shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
        asked.append((shape, dtype))
        return np.zeros(shape, dtype)

    text = kill.blocks()
    spec = kill.spec_of(text)
    with StoreWriter(tmp_path, spec, text, allocate=allocate, n_buffers=2) as writer:
        make(writer, range(N_SHARDS))
        writer.finish()
    assert asked == 2 * [((spec.rows_per_shard, site.width), np.dtype(np.uint16)) for site in spec.sites]
    assert contents(tmp_path) == whole
