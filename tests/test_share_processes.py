"""One loader for several processes: the same batches for all, whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resume import assert_same, content, run_test_resume_at_every_batch
from share_processes import Process, consume, loader_of, serve, tensors

import actcache
from actcache.errors import ConfigError, CorruptShardError, ServingError, SiteError
from actcache.load import Batch, Loader
from actcache.share import ServedBatches, exact_dtype, serve_batches
from actcache.store import Store
from actcache.store.format.keys import sharded_key

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore:batches of .* rows are going to have"),
]

N_BATCHES = 36
Start = Callable[..., Process]


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket; short, as the paths of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="share-") as folder:
        yield Path(folder, "s")


@pytest.fixture
def start(small_store: Store, path: Path) -> Iterator[Start]:
    """Starts servers and consumers, which end with the test."""
    started: list[Process] = []

    def begin(who: Any, n_consumers: int = 1, *, store: str = small_store.path, **options: Any) -> Process:
        if who is serve:
            loader = options.pop("loader", {})
            arguments = (store, str(path), n_consumers, loader, options)
        else:
            arguments = (str(path), options)
        started.append(Process(who, *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.end()


def joined(process: Process) -> Process:
    """A consumer once the server has greeted it."""
    process.hear()
    return process


@pytest.fixture(scope="module")
def expected(small_store: Store) -> list[Any]:
    with closing(loader_of(small_store.path)) as loader:
        return [content(batch) for batch in loader]


@pytest.fixture(scope="module")
def states(small_store: Store) -> list[dict[str, Any]]:
    """The loader's, after each batch."""
    with closing(loader_of(small_store.path)) as loader:
        return [loader.state_dict() for _ in loader]


def assert_are(got: list[Any], wanted: list[Any]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert_same(tensors(one), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_consumer_gets_every_batch(start, expected, dtype):
    server = start(serve, 3, loader={"dtype": dtype})
    consumers = [start(consume) for _ in range(3)]
    for consumer in consumers:
        joined(consumer).tell("all")
    for consumer in consumers:
        assert_are(consumer.hear(), expected)
    said = server.hear_until("served")
    assert (N_BATCHES, N_BATCHES) in said
    sentences = [sentence for sentence in said if "has joined" in sentence]
    assert {int(sentence.split()[1]) for sentence in sentences} == {consumer.pid for consumer in consumers}
    assert [sentence.split(": ")[1] for sentence in sentences] == ["1", "2", "3"]


def test_the_first_consumer_waits_for_the_others(start, expected):
    start(serve, 2)
    first = joined(start(consume))
    first.tell("all")
    assert first.waits()
    second = joined(start(consume))
    assert_are(second.ask("all"), expected)
    assert_are(first.hear(), expected)


def test_batches_know_where_they_come_from(start, small_store):
    start(serve)
    origin = joined(start(consume)).ask("origin")
    with closing(loader_of(small_store.path)) as loader:
        batch = next(iter(loader))
        for name, values in origin.items():
            assert np.array_equal(values, getattr(batch, name).numpy()), name


def test_each_consumer_gets_its_sites_in_its_dtype(served, small_store, expected):
    server = served(2)
    with ServedBatches(server.path, sites=["*hook_z"], dtype=torch.float64) as few, ServedBatches(server.path) as all_:
        batch, whole = next(few), next(all_)
    assert few.sites == list(batch) == ["blocks.1.attn.hook_z"]
    assert all_.sites == list(whole) == small_store.sites
    assert batch[few.sites[0]].dtype == torch.float64
    assert torch.equal(batch[few.sites[0]].float(), expected[0][1][few.sites[0]])
    assert_same(content(whole), expected[0])


def test_a_batch_is_its_consumers_own(served, expected):
    server = served(2)
    with ServedBatches(server.path) as first, ServedBatches(server.path) as second:
        spoiled = next(first)
        for tensor in (*spoiled.values(), spoiled.rows):
            tensor.zero_()
        assert_same(content(next(second)), expected[0])
        following = next(first)
        assert_same(content(following), expected[1])
        assert not any(tensor.any() for tensor in spoiled.values())


def test_a_consumer_that_is_dropped_is_waited_for_no_more(served, expected):
    server = served(2, batches_ahead=1)
    staying, leaving = ServedBatches(server.path), ServedBatches(server.path)
    kept = next(leaving)
    with pytest.warns(ResourceWarning):
        del leaving
    assert len([content(batch) for batch in staying]) == N_BATCHES
    assert len(kept.tokens) == len(kept.rows)


def test_the_fastest_waits_for_the_slowest(start, expected):
    start(serve, 2, batches_ahead=3)
    fast, slow = [start(consume) for _ in range(2)]
    joined(fast), joined(slow)
    for number in range(3):
        assert_same(tensors(fast.ask("next")), expected[number])
    fast.tell("next")
    assert fast.waits()
    slow.ask("next")
    assert_same(tensors(fast.hear()), expected[3])


def test_shared_memory_is_bounded(served, small_store, path):
    """However long it goes on: with 20 rows of 22 float32 and an id, in pages, and at most 2 + 2 + 3 batches."""
    server = served(2, loader={"epochs": 40, "drop_last": True}, batches_ahead=2)
    with ServedBatches(server.path) as first, ServedBatches(server.path) as second:
        for batch, same in zip(first, second, strict=True):
            assert torch.equal(batch.rows, same.rows)
        assert os.fstat(first._memory._descriptor).st_size <= 7 * 4096


def test_a_consumer_that_is_killed_is_waited_for_no_more(start, expected):
    server = start(serve, 3, batches_ahead=1)
    dying, *others = [joined(start(consume)) for _ in range(3)]
    for consumer in others:
        consumer.ask("next")  # which the dying one was told of, too
    dying.kill()
    for consumer in others:
        consumer.tell("all")
    for consumer in others:
        assert_are(consumer.hear(), expected[1:])
    assert f"process {dying.pid} has left; consumers: 2" in server.hear_until("served")


def test_the_server_ends_when_all_have_left(start):
    server = start(serve, 2, loader={"epochs": None})
    for consumer in [joined(start(consume)) for _ in range(2)]:
        consumer.ask("next")
        consumer.kill()
    server.hear_until("served")


def test_a_sweep_goes_on_after_its_server_was_killed(start, expected, path):
    server = start(serve, 2)
    before = [joined(start(consume)) for _ in range(2)]
    taken = [[consumer.ask("next") for _ in range(n)] for consumer, n in zip(before, (4, 2), strict=True)]
    saved = [json.loads(json.dumps(consumer.ask("state"))) for consumer in before]
    server.kill()
    for consumer in before:
        with pytest.raises(ServingError, match=r"is gone.*state_dict\(\)"):
            consumer.ask("all")
    assert path.exists()
    start(serve, 2)
    after = [start(consume, state=state) for state in saved]
    for consumer, state in zip(after, saved, strict=True):
        assert consumer.hear() == state
        consumer.tell("all")
    for consumer, first in zip(after, taken, strict=True):
        assert_are([*first, *consumer.hear()], expected)


def test_one_that_comes_later_gets_what_comes_then(start, expected, states):
    start(serve, 1, batches_ahead=2)
    first = joined(start(consume))
    for _ in range(4):
        first.ask("next")
    late = start(consume)
    n_before = states.index(late.hear()) + 1
    assert 4 <= n_before <= 4 + 2
    first.tell("all")
    late.tell("all")
    assert_are(late.hear(), expected[n_before:])
    assert_are(first.hear(), expected[4:])


def test_states_that_cannot_be_served_are_refused(served, states, expected):
    server = served(1)
    other = {**states[3], "settings": {**states[3]["settings"], "seed": 4}}
    for wrong, message in [
        (other, "seed: saved 4, now 3"),
        ({**states[3], "fingerprint": "x"}, "another store"),
        ({**states[3], "batch": "many"}, "is no state of a loader"),
        ({**states[3], "batch": -1}, "is no state of a loader"),
        ({"version": 2}, "is no state of a loader"),
        ({}, "version None"),
    ]:
        with pytest.raises(ServingError, match=message):
            ServedBatches(server.path, state=wrong)
    with ServedBatches(server.path, state=states[9]) as going_on:
        assert_same(content(next(going_on)), expected[10])
        with pytest.raises(ServingError, match="the state is that of epoch 0, batch 4, and the others are past it"):
            ServedBatches(server.path, state=states[3])
        assert_same(content(next(going_on)), expected[11])


class Server:
    """A server in a thread of this process."""

    def __init__(self, loader: Loader, path: Path, n_consumers: int, **options: Any) -> None:
        self.path, self.error = path, None

        def run() -> None:
            try:
                serve_batches(loader, path, n_consumers, **options)
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def ended(self) -> bool:
        self.thread.join(60)
        return not self.thread.is_alive()


@pytest.fixture
def served(small_store: Store, path: Path) -> Callable[..., Server]:
    def begin(n_consumers: int, *, store: str = small_store.path, loader: Any = (), **options: Any) -> Server:
        return Server(loader_of(store, **dict(loader)), path, n_consumers, **options)

    return begin


class Served:
    """Batches of a server of its own, as one iterator with a state."""

    def __init__(self, loader: Loader, path: Path) -> None:
        self._loader, self._path = loader, path
        self._state = loader.state_dict()
        self._batches: ServedBatches | None = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict() if self._batches else self._state

    def __iter__(self) -> Iterator[Batch]:
        self._server = Server(self._loader, self._path, 1)
        self._batches = ServedBatches(self._path, state=self._state)
        return self._batches

    def close(self) -> None:
        if self._batches:
            self._batches.close()
            assert self._server.ended()


@pytest.mark.exhaustive
def test_resume_at_every_batch(small_store, path):
    def make(read_ahead: int) -> Served:
        return Served(loader_of(small_store.path, dtype=torch.bfloat16, read_ahead=read_ahead), path)

    assert run_test_resume_at_every_batch(make) == N_BATCHES


def test_an_error_of_the_loader_reaches_every_consumer(served, small_store, tmp_path):
    copy = tmp_path / "damaged.zarr"
    shutil.copytree(small_store.path, copy)
    shard = copy / sharded_key(small_store.sites[0], "acts", 2)
    shard.write_bytes(bytes(len(shard.read_bytes())))
    server = served(2, store=str(copy))
    with ServedBatches(server.path) as first, ServedBatches(server.path) as second:
        for consumer in (first, second):
            with pytest.raises(ServingError, match="actcache verify"):
                list(consumer)
    assert server.ended()
    assert isinstance(server.error, CorruptShardError)


GARBAGE = {
    "no JSON": b"hello\n",
    "no object": b"[1, 2]\n",
    "another version": b'{"actcache": 2, "process": 1}\n',
    "no process": b'{"actcache": 1}\n',
    "a state that is none": b'{"actcache": 1, "process": 1, "state": [1]}\n',
    "no text": bytes(range(128, 256)) + b"\n",
    "too deep": b"[" * 60_000 + b"\n",
    "a number too long": b"1" * 60_000 + b"\n",
    "a line without an end": b"a" * (1 << 18),
    "a batch that it does not have": b'{"actcache": 1, "process": 1}\n{"done": 7}\n',
    "no number of a batch": b'{"actcache": 1, "process": 1}\n{"done": [7]}\n',
    "two greetings": b'{"actcache": 1, "process": 1}\n' * 2,
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_and_hurts_nobody(served, expected, garbage):
    server = served(2)
    with ServedBatches(server.path) as before, socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(600)
        stranger.connect(str(server.path))
        try:
            stranger.sendall(garbage)
            answer = b""
            while piece := stranger.recv(1 << 16):
                answer += piece
        except ConnectionError:  # it has hung up while this was speaking
            answer = b'"error"'
        assert b'"error"' in answer
        with ServedBatches(server.path) as after:
            for number in range(3):
                assert_same(content(next(before)), expected[number])
                assert_same(content(next(after)), expected[number])


def test_one_that_connects_and_says_nothing_hurts_nobody(served, expected):
    server = served(1)
    with socket.socket(socket.AF_UNIX) as silent:
        with ServedBatches(server.path) as batches:
            silent.connect(str(server.path))
            assert len([content(batch) for batch in batches]) == N_BATCHES
        assert server.ended()


def test_only_this_user_may_connect(served, path):
    server = served(1)
    with ServedBatches(server.path) as batches:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        list(batches)
    assert server.ended()
    assert not path.exists()


def test_a_living_server_is_not_replaced(served, expected):
    server = served(1)
    with ServedBatches(server.path) as batches:
        second = served(1)
        assert second.ended()
        assert "a server is at" in str(second.error)
        assert_same(content(next(batches)), expected[0])


def test_what_is_no_socket_is_left_alone(small_store, path):
    path.write_text("precious")
    with pytest.raises(ServingError, match="is no socket"):
        serve_batches(loader_of(small_store.path), path, 1)
    assert path.read_text() == "precious"
    with pytest.raises(ServingError, match=r"no socket can be made at .*AF_UNIX path too long"):
        serve_batches(loader_of(small_store.path), path.parent / ("long" * 40), 1)


def test_no_server_is_said_with_what_to_start(path):
    with pytest.raises(ServingError, match=r"no server at .*actcache serve --socket"):
        ServedBatches(path, wait_s=0)


def test_a_server_may_come_up_later(served, path, expected):
    late = threading.Timer(0.2, lambda: served(1))
    late.start()
    with ServedBatches(path) as batches:
        assert_same(content(next(batches)), expected[0])


def test_wrong_arguments_are_refused(served, small_store, path):
    with pytest.raises(ConfigError, match="n_consumers must be a positive integer"):
        serve_batches(loader_of(small_store.path), path, 0)
    with pytest.raises(ConfigError, match="batches_ahead must be a positive integer"):
        serve_batches(loader_of(small_store.path), path, 1, batches_ahead=0)
    server = served(1)
    with ServedBatches(server.path), pytest.raises(SiteError, match="no site matches 'nothing'"):
        ServedBatches(server.path, sites=["nothing"])
    assert server.ended()


def test_the_narrowest_dtype_in_which_values_stay_what_they_are(small_store):
    assert exact_dtype(small_store, ["*"]) == torch.bfloat16
    assert exact_dtype(small_store, ["*"], "rms") == torch.float32


@contextmanager
def command(store: Store, path: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The verb, in a process that hears Ctrl-C."""
    sizes = ["--sites", "*", "--batch-rows", "20", "--seed", "3", "--consumers", "2", "--socket", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(actcache.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [sys.executable, "-m", "actcache", "serve", store.path, *sizes, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    ) as process:
        yield process
        process.kill()


def test_the_verb_serves_what_a_loader_gives(small_store, path):
    with Loader(small_store, ["*"], batch_rows=20, seed=3, epochs=2) as loader:
        expected = [content(batch) for batch in loader]
    with command(small_store, path, "--epochs", "2", "--json") as process:
        with ServedBatches(path) as first, ServedBatches(path) as second:
            for batch, same, wanted in zip(first, second, expected, strict=True):
                assert_same(content(batch), wanted)
                assert_same(content(same), wanted)
        out, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    result = json.loads(out)
    assert (result["n_batches"], result["n_rows"]) == (len(expected), 20 * len(expected))
    events = [json.loads(line) for line in said.splitlines()]
    assert [e["message"] for e in events if e["event"] == "note"] == [
        f"process {os.getpid()} has joined; consumers: 1",
        f"process {os.getpid()} has joined; consumers: 2",
    ]
    last = next(e for e in events if e["event"] == "done")
    assert (last["done"], last["total"], last["unit"]) == (20 * len(expected), 20 * len(expected), "rows")


def test_ctrl_c_ends_the_verb_and_tells_the_consumers(small_store, path):
    with command(small_store, path, "--epochs", "0") as process:
        with ServedBatches(path) as first, ServedBatches(path) as second:
            next(first), next(second)
            process.send_signal(signal.SIGINT)
            for consumer in (first, second):
                with pytest.raises(ServingError, match="says: it was interrupted"):
                    list(consumer)
        _, said = process.communicate(timeout=600)
    assert process.returncode == 130, said
    assert "ServedBatches(path, state=...)" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not path.exists()


def test_the_verb_says_what_is_wrong(small_store, path):
    path.write_text("precious")
    with command(small_store, path) as process:
        out, said = process.communicate(timeout=600)
    assert process.returncode == 1
    assert out == ""
    assert said.splitlines()[-1].startswith(f"error: {path} is there and is no socket")


@pytest.mark.exhaustive
def test_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import sharing
    from measure import embedded

    lm, blocks = embedded(20)
    actcache.extract(lm, blocks, sharing.SITES, tmp_path / "s.zarr")
    rates = [sharing.share(tmp_path / "s.zarr", 2), sharing.by_themselves(tmp_path / "s.zarr", 2)]
    rates += [sharing.serve(tmp_path / "s.zarr", 1), sharing.in_processes(sharing.alone, tmp_path / "s.zarr", 1)]
    assert all(rate > 0 for rate in rates)
