"""Real processes, really killed, and two of them at one store: nothing is lost, mixed or shown before it is whole."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_blocks
from test_extract import SITES, SIZES, tiny_lm

import actcache as ac
from actcache.errors import StoreBusyError
from actcache.store import StoreWriter, delete_sites, open_store, repair, verify

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kill

WRITER = """
import sys
import kill
text = kill.blocks()
with kill.StoreWriter(sys.argv[1], kill.spec_of(text), text) as writer:
    for shard in writer.pending():
        print("ready", flush=True)
        sys.stdin.readline()
        kill.fill(writer, shard, text)
    print("ready", flush=True)
    sys.stdin.readline()
    writer.finish()
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "n_seeds"), [(kind, 20 if kind == "write" else 8) for kind in kill.KINDS])
def test_killed_at_random_moments_and_given_again_it_ends_in_the_same_bytes(tmp_path, kind, n_seeds):
    outcome = kill.Outcome()
    with kill.Killer(kind, tmp_path) as killer:
        for seed in range(10 * n_seeds):
            killer.run(seed, outcome)
            if seed >= n_seeds - 1 and outcome.kills >= n_seeds:
                break
    assert outcome.wrong == []
    assert outcome.left.total() == outcome.kills >= n_seeds


def extract(kind: str, path: Path, source: Path) -> None:
    """What is killed: a whole extraction, with a model. One thread: the pools of torch do not survive a fork."""
    torch.set_num_threads(1)
    ac.extract(tiny_lm(), random_blocks(29, 21), SITES, path, **SIZES)


@pytest.mark.exhaustive
def test_a_killed_extraction_continues_to_the_same_bytes(tmp_path):
    outcome = kill.Outcome()
    with kill.Killer("extract", tmp_path, work="test_kill.extract") as killer:
        for seed in range(5):
            killer.run(seed, outcome)
    assert outcome.wrong == []
    assert outcome.kills >= 1


@pytest.mark.exhaustive
def test_what_it_kills_may_also_fail(tmp_path):
    """The harness sees wrong ends: a store that is not the one it compares with, and a process that ends by itself."""
    outcome = kill.Outcome()
    with kill.Killer("write", tmp_path) as killer:
        next(killer.after.glob("sites/*/stats/c.0.0")).write_bytes(b"")
        killer.run(0, outcome)
        assert any("stats/c.0.0" in wrong for wrong in outcome.wrong)
        killer.kind = "export"
        (killer.source / "zarr.json").unlink()
        with pytest.raises(RuntimeError, match="export ended with 1"):
            killer.run(1, outcome)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Any:
    text = kill.blocks()
    return kill.write(tmp_path_factory.mktemp("whole") / "s.zarr", kill.spec_of(text), text)


@pytest.fixture
def writing(tmp_path):
    """Another process that is writing a store, and writes one shard more for every line that it is given."""
    path = [str(Path(kill.__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{WRITER}", str(tmp_path / "s.zarr")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def go_on(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def wait_for_shards(path: Path, n_shards: int) -> ac.Store:
    until = time.monotonic() + 600
    while len((store := open_store(path)).committed) < n_shards:
        assert time.monotonic() < until
        time.sleep(0.002)
    return store


def test_a_reader_sees_the_committed_shards_while_a_writer_works(tmp_path, writing, whole):
    path = tmp_path / "s.zarr"
    for n_shards in range(whole.spec.n_shards):
        found = wait_for_shards(path, n_shards)
        assert not found.sealed
        assert found.committed == list(range(n_shards))
        assert found.row_ids().tolist() == list(range(n_shards * whole.spec.rows_per_shard))
        for site in found.sites:
            assert np.array_equal(found.read_stored(site, found.row_ids()), whole.read_stored(site, found.row_ids()))
        assert verify(path) == []
        go_on(writing)
    go_on(writing)
    assert writing.wait(600) == 0
    assert open_store(path).fingerprint == whole.fingerprint


def test_a_second_writer_is_refused_and_the_first_one_finishes_unharmed(tmp_path, writing, whole):
    path, text = tmp_path / "s.zarr", kill.blocks()
    go_on(writing)
    wait_for_shards(path, 1)
    for attempt in (
        lambda: StoreWriter(path, kill.spec_of(text), text),
        lambda: StoreWriter(path, kill.spec_of(text, kill.ADDED), text, grow=True),
        lambda: delete_sites(path, [kill.ADDED.name]),
        lambda: repair(path, []),
    ):
        with pytest.raises(StoreBusyError, match="is being written"):
            attempt()
    for _ in range(whole.spec.n_shards):
        go_on(writing)
    assert writing.wait(600) == 0
    assert kill.contents(path) == kill.contents(Path(whole.path))


def test_when_the_first_writer_is_killed_the_second_goes_on_at_once(tmp_path, writing, whole):
    path, text = tmp_path / "s.zarr", kill.blocks()
    for _ in range(3):
        go_on(writing)
    wait_for_shards(path, 2)
    writing.kill()
    writing.wait()
    assert kill.write(path, kill.spec_of(text), text).fingerprint == whole.fingerprint
    assert kill.contents(path) == kill.contents(Path(whole.path))
