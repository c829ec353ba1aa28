"""One loader for several threads: the same batches for all, nobody blocked by one who is gone."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from resume import assert_same, content, run_test_resume_at_every_batch

from actcache.errors import ConfigError, CorruptShardError, SiteError, StateError
from actcache.load import Batch, Loader, MixedLoader
from actcache.share import SharedBatches, share_batches
from actcache.store import Store, open_store
from actcache.store.format.keys import sharded_key

pytestmark = pytest.mark.filterwarnings("ignore:batches of .* rows are going to have")

A_WHILE_S = 0.2
"""In which something that must not happen would have happened. Too short a while lets faults pass, never tests fail."""
TIMEOUT_S = 600


def loader_of(store: Store, **changes: Any) -> Loader:
    settings = {"batch_rows": 20, "memory": 4000, "epochs": 2, "seed": 3, "threads": 1, "drop_last": False}
    return Loader(store, ["*"], **{**settings, **changes})


class Task:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._result = call, None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def waits(self) -> bool:
        self._thread.join(A_WHILE_S)
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        if self._error:
            raise self._error
        return self._result


def contents(batches: Iterator[Batch]) -> list[Any]:
    return [content(batch) for batch in batches]


@pytest.mark.parametrize("copy", [True, False])
def test_every_consumer_gets_every_batch(small_store, copy):
    expected = contents(iter(loader_of(small_store)))
    tasks = [Task(lambda c=c: contents(c)) for c in share_batches(loader_of(small_store), 3, copy=copy)]
    for task in tasks:
        got = task.result()
        assert len(got) == len(expected) == 36
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other)


def test_batches_know_where_they_come_from(small_store):
    batch = next(iter(loader_of(small_store)))
    for consumer in share_batches(loader_of(small_store), 2):
        own = next(consumer)
        for name in ("tokens", "sequences", "positions", "documents"):
            assert torch.equal(getattr(own, name), getattr(batch, name))


def test_a_batch_is_its_consumers_own(small_store):
    expected, (first, second) = content(next(iter(loader_of(small_store)))), share_batches(loader_of(small_store), 2)
    spoiled = next(first)
    for tensor in (*spoiled.values(), spoiled.rows):
        tensor.zero_()
    assert_same(content(next(second)), expected)


def test_without_copy_all_have_the_same_memory(small_store):
    first, second = (next(consumer) for consumer in share_batches(loader_of(small_store), 2, copy=False))
    assert all(first[site].data_ptr() == second[site].data_ptr() for site in first)


def test_bfloat16_batches_are_widened_exactly(small_store):
    narrow = loader_of(small_store, dtype=torch.bfloat16)
    for consumer in share_batches(narrow, 2, dtype=torch.float32):
        assert_same(content(next(consumer)), content(next(iter(loader_of(small_store)))))


def test_each_consumer_gets_its_sites(small_store):
    one, both = share_batches(loader_of(small_store), 2, sites=[["*hook_z"], ["*"]])
    assert one.sites == ["blocks.1.attn.hook_z"]
    few, all_sites = next(one), next(both)
    assert list(few) == one.sites
    assert list(all_sites) == both.sites == small_store.sites
    assert torch.equal(few[one.sites[0]], all_sites[one.sites[0]])


def test_the_fastest_waits_for_the_slowest(small_store):
    fast, slow = share_batches(loader_of(small_store), 2, batches_ahead=3)
    assert len(list(islice(fast, 3))) == 3
    fourth = Task(lambda: next(fast))
    assert fourth.waits()
    next(slow)
    assert torch.equal(fourth.result().rows, list(islice(slow, 3))[-1].rows)


def closed(consumer: SharedBatches) -> None:
    consumer.close()


def dead(consumer: SharedBatches) -> None:
    Task(lambda: next(consumer)).result()


@pytest.mark.parametrize("leave", [closed, dead])
def test_nobody_waits_for_one_that_is_gone(small_store, leave):
    staying, leaving = share_batches(loader_of(small_store), 2, batches_ahead=2)
    leave(leaving)
    assert len(Task(lambda: contents(staying)).result()) == 36
    with pytest.raises(ConfigError, match="were closed, or the thread"):
        next(leaving)


def test_nobody_waits_for_one_that_is_collected(small_store):
    consumers = share_batches(loader_of(small_store), 2, batches_ahead=2)
    staying = consumers.pop()
    del consumers
    assert len(Task(lambda: contents(staying)).result()) == 36


def test_nobody_waits_for_one_that_is_collected_in_a_cycle(small_store):
    consumers: list[Any] = list(share_batches(loader_of(small_store), 2, batches_ahead=2))
    staying = consumers.pop()
    consumers.append(consumers)
    del consumers
    taking = Task(lambda: contents(staying))
    gc.collect()
    assert len(taking.result()) == 36


def test_a_consumer_that_is_closed_while_it_waits_wakes_up(small_store):
    fast, slow = share_batches(loader_of(small_store), 2, batches_ahead=1)
    next(fast)
    waiting = Task(lambda: next(fast))
    assert waiting.waits()
    fast.close()
    with pytest.raises(ConfigError, match="were closed"):
        waiting.result()
    assert len(contents(slow)) == 36


def test_the_loader_stops_reading_when_all_are_gone(small_store):
    loader = loader_of(small_store, epochs=None)
    threads_before = threading.active_count()
    for consumer in share_batches(loader, 2):
        with consumer:
            next(consumer)
    deadline = monotonic() + TIMEOUT_S
    while threading.active_count() > threads_before and monotonic() < deadline:
        sleep(0.01)
    assert threading.active_count() <= threads_before


def test_an_error_of_the_loader_reaches_every_consumer(small_store, tmp_path):
    store = damaged(small_store, tmp_path)
    for task in [Task(lambda c=c: contents(c)) for c in share_batches(loader_of(store), 3)]:
        with pytest.raises(CorruptShardError):
            task.result()


def damaged(store: Store, folder: Path) -> Store:
    """A copy of a store, of which one shard cannot be read."""
    path = folder / "damaged.zarr"
    shutil.copytree(store.path, path)
    shard = path / sharded_key(store.sites[0], "acts", 2)
    shard.write_bytes(bytes(len(shard.read_bytes())))
    return open_store(path)


class Shared:
    """Consumers in step, as one iterator with a state."""

    def __init__(self, loader: Loader | MixedLoader) -> None:
        self.loader, self._states = loader, [loader.state_dict()] * 2
        self._consumers: list[SharedBatches] = []

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._states = [state] * 2

    def state_dict(self) -> dict[str, Any]:
        first, second = [consumer.state_dict() for consumer in self._consumers] or self._states
        assert first == second
        return first

    def __iter__(self) -> Iterator[Batch]:
        self._consumers = share_batches(self.loader, 2, states=self._states)
        for batch, same in zip(*self._consumers, strict=True):
            assert_same(content(batch), content(same))
            yield batch

    def close(self) -> None:
        for consumer in self._consumers:
            consumer.close()


def test_resume_at_every_batch(small_store):
    assert run_test_resume_at_every_batch(lambda **ahead: Shared(loader_of(small_store, **ahead))) == 36


def test_resume_of_a_mixture_at_every_batch(small_store):
    def make(read_ahead: int) -> Shared:
        settings = {"epochs": None, "drop_last": True, "read_ahead": read_ahead}
        parts = [(loader_of(small_store, **settings), 2), (loader_of(small_store, seed=5, **settings), 1)]
        return Shared(MixedLoader(parts, n_batches=20))

    assert run_test_resume_at_every_batch(make) == 20


def test_consumers_go_on_each_after_its_own_state(small_store):
    expected, states = contents(iter(loader_of(small_store))), []
    with closing(loader_of(small_store)) as loader:
        for _ in loader:
            states.append(loader.state_dict())
    fresh, third, last = share_batches(loader_of(small_store), 3, states=[None, states[2], states[-1]])
    tasks = [Task(lambda c=c: contents(c)) for c in (fresh, third, last)]
    for task, left in zip(tasks, (expected, expected[3:], []), strict=True):
        got = task.result()
        assert len(got) == len(left)
        for one, other in zip(got, left, strict=True):
            assert_same(one, other)
    assert third.state_dict() == fresh.state_dict() == states[-1]


def test_a_sweep_that_goes_on_does_not_read_what_nobody_wants(small_store):
    with closing(loader_of(small_store)) as loader:
        state = [loader.state_dict() for _ in loader][25]
    again = loader_of(small_store)
    for consumer in share_batches(again, 2, batches_ahead=2, states=[state, state]):
        next(consumer)
    assert again.stats().n_batches < 25


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"n_consumers": 0}, ConfigError, "n_consumers must be a positive integer"),
        ({"batches_ahead": 0}, ConfigError, "batches_ahead must be a positive integer"),
        ({"sites": [["*"]]}, ConfigError, "2 consumers and 1 sites"),
        ({"states": [None] * 3}, ConfigError, "2 consumers and 3 states"),
        ({"sites": [["*"], ["nothing"]]}, SiteError, "no site matches 'nothing'"),
        ({"copy": False, "dtype": torch.float16}, ConfigError, "make the loader with that dtype"),
        ({"states": [None, {"version": 99}]}, StateError, "version 99"),
    ],
)
def test_wrong_arguments_are_refused(small_store, given, error, message):
    with pytest.raises(error, match=message):
        share_batches(loader_of(small_store), **{"n_consumers": 2, **given})
