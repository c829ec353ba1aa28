"""Nobody takes a server down, or gives its consumers other bytes: strangers, silence, crowds, two servers at a time."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import torch
from resume import assert_same, content
from share_processes import loader_of
from test_share_processes import Server

import actcache
from actcache.errors import ConfigError, ServingError, StateError
from actcache.share import ServedBatches, listen, server
from actcache.store import Store

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.filterwarnings("ignore:batches of .* rows are going to have"),
]


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket: short, as paths of sockets have to be."""
    folder = tempfile.mkdtemp(prefix="share-", dir="/tmp")
    yield Path(folder) / "s"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def expected(small_store: Store) -> list[Any]:
    with loader_of(small_store.path) as loader:
        return [content(batch) for batch in loader]


@pytest.fixture
def served(small_store: Store, path: Path) -> Callable[..., Server]:
    return lambda n_consumers, **options: Server(loader_of(small_store.path), path, n_consumers, **options)


def connected(path: Path, stack: ExitStack) -> socket.socket:
    stranger = stack.enter_context(socket.socket(socket.AF_UNIX))
    stranger.settimeout(60)
    until = monotonic() + 60
    while True:
        try:
            stranger.connect(str(path))
            return stranger
        except (FileNotFoundError, ConnectionRefusedError):  # the server is about to start
            assert monotonic() < until
            sleep(0.01)


def all_heard(stranger: socket.socket) -> bytes:
    """What it is told until it is hung up on."""
    heard = b""
    while piece := stranger.recv(1 << 16):
        heard += piece
    return heard


def test_consumers_can_neither_take_memory_away_nor_write_to_it(served, path, expected):
    running = served(2, batches_ahead=1)
    with ServedBatches(path) as first, ServedBatches(path) as second:
        assert_same(content(next(first)), expected[0])
        descriptor = first._memory._descriptor
        for size in (0, os.fstat(descriptor).st_size - 1):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        assert fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, 4096)
        with pytest.raises(TypeError, match="modify a readonly"):
            first._memory._region(0).mapped[:1] = b"x"
        os.ftruncate(descriptor, 1 << 40)  # no harm: what is read and written stays where it is
        assert_same(content(next(second)), expected[0])
        for number, (one, other) in enumerate(zip(first, second, strict=True), 1):
            assert_same(content(one), expected[number])
            one[first.sites[0]].add_(1)  # a consumer's own
            assert_same(content(other), expected[number])
    assert running.ended()
    assert running.error is None


def test_whoever_says_nothing_is_hung_up_on(served, path, expected, monkeypatch):
    monkeypatch.setattr(server, "_PATIENCE_S", 0.2)
    running = served(2)
    with ExitStack() as stack:
        mute = [connected(path, stack) for _ in range(5)]
        for stranger in mute:
            assert b"nothing was heard for 0.2 s" in all_heard(stranger)
        # One that drips its greeting, and one that begins a line about a batch and does not end it.
        dripping, half = connected(path, stack), connected(path, stack)
        half.sendall(b'{"actcache": 1, "process": 1}\n{"do')
        dripping.sendall(b'{"actcache"')
        for stranger in (dripping, half):
            assert b"nothing was heard for 0.2 s" in all_heard(stranger)
        first, second = (stack.enter_context(ServedBatches(path)) for _ in range(2))
        for one, other, wanted in zip(first, second, expected, strict=True):
            assert_same(content(one), wanted)
            assert_same(content(other), wanted)
    assert running.ended()


def test_a_consumer_may_take_its_time(served, path, expected, monkeypatch):
    monkeypatch.setattr(server, "_PATIENCE_S", 0.05)
    served(1)
    with ServedBatches(path) as batches:
        assert_same(content(next(batches)), expected[0])
        sleep(0.3)
        assert [len(batch.rows) for batch in batches] == [len(rows) for rows, _ in expected[1:]]


def test_connections_that_are_too_many_are_hung_up_on(small_store, served, path, expected, monkeypatch):
    monkeypatch.setattr(server, "_MOST_CONNECTIONS", 3)
    served(3)
    with ExitStack() as stack:
        crowd = [connected(path, stack) for _ in range(20)]
        for stranger in crowd[:17]:  # those that have been silent for longest
            assert b"there are 3 connections, and no more are taken" in all_heard(stranger)
        consumers = [stack.enter_context(ServedBatches(path)) for _ in range(3)]
        for consumer in consumers:
            assert_same(content(next(consumer)), expected[0])
        with pytest.raises(ServingError, match="there are 3 connections, and no more are taken"):
            ServedBatches(path)
        for consumer in consumers:
            assert_same(content(next(consumer)), expected[1])
    with pytest.raises(ConfigError, match="n_consumers must be at most 3"):
        server.serve_batches(loader_of(small_store.path), path, 4)


def test_a_process_that_can_open_no_more_files_goes_on_when_it_can(served, path, expected):
    running = served(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as stack:
        batches = stack.enter_context(ServedBatches(path))
        first, second = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        full: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
        try:
            with suppress(OSError):
                while True:
                    full.append(os.dup(0))
            for stranger in (first, second):
                stranger.connect(str(path))
            sleep(3 * server._PAUSE_S)
            assert running.thread.is_alive()
        finally:
            for descriptor in full:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        other = stack.enter_context(ServedBatches(path))
        for one, same, wanted in zip(batches, other, expected, strict=True):
            assert_same(content(one), wanted)
            assert_same(content(same), wanted)


def leave_dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_of_two_servers_on_one_dead_socket_exactly_one_serves(small_store, path, expected, monkeypatch):
    make_way = listen._make_way

    def slowly(where: Path) -> None:
        make_way(where)
        sleep(0.05)

    monkeypatch.setattr(listen, "_make_way", slowly)
    for _ in range(3):
        leave_dead_socket(path)
        servers = [Server(loader_of(small_store.path), path, 1) for _ in range(3)]
        with ServedBatches(path) as batches:
            assert_same(content(next(batches)), expected[0])
            # The one that serves cannot end before its consumer: the others have found it there.
            until = monotonic() + 60
            while sum(each.thread.is_alive() for each in servers) > 1 and monotonic() < until:
                sleep(0.01)
            assert sum(each.thread.is_alive() for each in servers) == 1
            assert [len(batch.rows) for batch in batches] == [len(rows) for rows, _ in expected[1:]]
        assert all(each.ended() for each in servers)
        said = sorted(str(each.error) for each in servers)
        assert said[0] == "None"
        assert all(f"a server is at {path} already" in each for each in said[1:])
        assert not path.exists()


def test_a_socket_is_removed_by_its_owner_only(small_store, path, expected):
    first = Server(loader_of(small_store.path), path, 1)
    with ServedBatches(path) as batches:
        next(batches)
        path.unlink()
        second = Server(loader_of(small_store.path), path, 1)
        until = monotonic() + 60
        while not path.exists() and monotonic() < until:
            sleep(0.01)
    assert first.ended()
    assert path.is_socket()
    with ServedBatches(path) as batches:
        assert_same(content(next(batches)), expected[0])
    assert second.ended()
    assert not path.exists()


def test_a_folder_that_anybody_may_write_to_is_warned_of(small_store, path):
    path.parent.chmod(0o777)
    loader = loader_of(small_store.path)
    path.write_text("precious")
    warned = pytest.warns(UserWarning, match="every user of this machine may replace the socket")
    with warned, pytest.raises(ServingError, match="is no socket"):
        server.serve_batches(loader, path, 1)
    with pytest.raises(ServingError, match=r"no socket can be made at .*No such file"):
        server.serve_batches(loader, path.parent / "missing" / "s", 1)


def test_what_a_consumer_is_given_wrong_is_said_at_once(served, path):
    served(1)
    for state in ([1], "state", 3, {"epoch": {1}}, {"loader": torch.ones(1)}):
        with pytest.raises(StateError, match="this is no state of a loader"):
            ServedBatches(path, state=state)
    for wrong, message in [
        ({"wait_s": "soon"}, "wait_s must be a number of seconds"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "abacus"}, "device 'abacus' cannot be used here"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ServedBatches(path, **wrong)
    with pytest.raises(ConfigError, match="path must be a path, got 7"):
        ServedBatches(7)


def test_something_else_that_listens_is_no_server(path):
    for answer in (b"hello\n", b'{"actcache": 1}\n'):
        with socket.socket(socket.AF_UNIX) as listener:
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen()

            def speak(words: bytes = answer, listener: socket.socket = listener) -> None:
                connection, _ = listener.accept()
                socket.send_fds(connection, [words], [0])

            threading.Thread(target=speak, daemon=True).start()
            with pytest.raises(ServingError, match="is no server of this actcache"):
                ServedBatches(path)


@pytest.mark.parametrize("lost", ["stdout", "stderr"])
def test_the_verb_serves_on_when_nobody_reads_what_it_says(small_store, path, expected, lost):
    sizes = ["--sites", "*", "--batch-rows", "20", "--seed", "3", "--consumers", "1", "--socket", str(path), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(actcache.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-m", "actcache", "serve", small_store.path, *sizes]
    with subprocess.Popen(command, env=environment, **pipes) as process:
        getattr(process, lost).close()
        with ServedBatches(path) as batches:
            n_batches = sum(1 for _ in batches)
        rest = (process.stderr if lost == "stdout" else process.stdout).read()
        assert process.wait(60) == 0
    assert n_batches == 17
    assert b"Traceback" not in rest
    assert b"Broken pipe" not in rest
    if lost == "stderr":
        assert json.loads(rest)["n_batches"] == 17
