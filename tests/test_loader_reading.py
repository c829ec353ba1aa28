"""How chunks come from the disk: each is taken once, and those that come are announced where the disk is waited for."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_bits, random_blocks, spec_of, write_shards

from actcache.load import Loader
from actcache.load.plan.epochs import Part
from actcache.load.windows.chunk_queue import ChunkQueue, Wanted
from actcache.load.windows.window import Window
from actcache.spec import Site
from actcache.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    blocks = random_blocks(64, 13)
    spec = replace(spec_of(blocks), sites=(Site(name="a", shape=(512,)), Site(name="b", shape=(300,), codec="int8")))
    return write_shards(tmp_path / "s.zarr", spec, blocks, random_bits(spec))


def out_of_memory(store: Store) -> Store:
    """The store as the disk has it, opened anew; skips where the file system has nothing but memory."""
    for file in filter(Path.is_file, Path(store.path).rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                if os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) and file.stat().st_size > 1 << 12:
                    pytest.skip("files stay in memory here")
            except BlockingIOError:
                pass
            except OSError:
                pytest.skip("this file system does not tell what it has in memory")
        finally:
            os.close(descriptor)
    return open_store(store.path)


def announced(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, str]]:
    said: list[tuple[str, int, int, str]] = []

    def expect(of: Store, site: str, shard: int, chunk: int, *, array: str = "acts") -> None:
        said.append((site, shard, chunk, array))
        Store.expect_chunk(of, site, shard, chunk, array=array)

    monkeypatch.setattr(store, "expect_chunk", expect.__get__(store))
    return said


def test_chunks_that_come_are_announced_to_a_disk_only_while_it_is_waited_for(store, monkeypatch):
    sites = list(store.sites)
    warm = [dict(batch) for batch in Loader(store, sites, batch_rows=16)]
    said = announced(store, monkeypatch)
    assert len(list(Loader(store, sites, batch_rows=16))) == len(warm)
    assert not said

    cold = out_of_memory(store)
    said = announced(cold, monkeypatch)
    batches = [dict(batch) for batch in Loader(cold, sites, batch_rows=16)]
    assert cold.objects.n_waits
    assert said
    assert len({*said}) >= len(said) - 2  # two threads may say the same
    for ours, theirs in zip(batches, warm, strict=True):
        assert all(torch.equal(ours[site], theirs[site]) for site in sites)


@pytest.mark.parametrize("threads", [1, 4])
def test_each_chunk_is_taken_by_one_thread(store, threads):
    wanted = [Wanted("acts", store.sites[0], Part(chunk=i % 3, skipped=0, start=i, stop=i + 1)) for i in range(5000)]
    queue = ChunkQueue(store, wanted)
    with ThreadPoolExecutor(threads) as pool:
        taken = [pool.submit(list, queue) for _ in range(threads)]
    assert sorted(chunk.part.start for each in taken for chunk in each.result()) == list(range(5000))


@pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")
def test_a_window_that_is_used_up_is_filled_before_the_one_after_it_is_waited_for(store, monkeypatch):
    did: list[tuple[str, int]] = []
    begin, wait = Window.begin, Window.wait
    monkeypatch.setattr(Window, "begin", lambda self, *of: did.append(("begin", of[1])) or begin(self, *of))
    monkeypatch.setattr(Window, "wait", lambda self: did.append(("wait", self.number)) or wait(self))
    with Loader(store, list(store.sites), batch_rows=16, memory=200_000, epochs=1, read_ahead=0) as loader:
        n_windows = loader.plan.n_windows
        assert len(list(loader)) == len(loader)
    assert n_windows > 4
    expected = [("begin", 0)]
    for number in range(n_windows):
        expected += [("begin", number + 1)] * (number + 1 < n_windows) + [("wait", number)]
    assert did == expected


def test_a_chunk_that_lies_in_no_file_is_no_news_to_a_disk(store):
    store.objects.expect("sites/none/acts/c.0.0", 0, 100)
    assert store.objects.n_waits == 0
