"""A writer alone, or several that share: within a process, between processes, after a kill; wherever a store may be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import pytest
from places import between_processes, by_name, everywhere, writable

from actcache.errors import ConfigError, NotAStoreError, StoreBusyError
from actcache.store.format.root import exists_any
from actcache.store.locks.lock import WriterLock, unlock
from actcache.store.locks.lock_keys import CLAIM, LEASE, SHARED

HOLDER = """
import os, sys
from actcache.store.backends.objects import Objects
from actcache.store.locks.lock import WriterLock
with WriterLock(Objects(sys.argv[1], read_only=False)):
    if "fork" not in sys.argv or not os.fork():
        print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold() -> Iterator[Any]:
    """Let another process take a store's lock."""
    processes = []

    def begin(place: Any, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(place), *options]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def lease_of(**changes: Any) -> bytes:
    """A lease as a writer elsewhere would have put it."""
    lease = {"host": "elsewhere", "pid": 7, "since": "2026-01-02T03:04:05+00:00", "token": "0" * 32, "processes": "x"}
    return json.dumps({**lease, **changes}).encode()


CONTENDER = """
import os, sys, random, time
from actcache.errors import StoreBusyError
from actcache.store.backends.objects import Objects
from actcache.store.locks.lock import WriterLock
place, folder, n_turns = sys.argv[1], sys.argv[2], int(sys.argv[3])
mine, inside = os.path.join(folder, str(os.getpid())), os.path.join(folder, "alone")
for turn in range(n_turns):
    shared = random.random() < 0.5
    lock = WriterLock(Objects(place, read_only=False), shared=shared)
    lock.acquire(patience_s=600)
    if shared:
        assert not os.path.exists(inside)
        open(mine, "x").close()
        taken = [shard for shard in range(3) if lock.claim(shard)]
        for shard in taken:
            open(os.path.join(folder, f"shard-{shard}"), "x").close()
        time.sleep(0.001 * random.random())
        for shard in taken:
            os.unlink(os.path.join(folder, f"shard-{shard}"))
            if random.random() < 0.5:
                lock.unclaim(shard)
        assert not os.path.exists(inside)
        os.unlink(mine)
    else:
        open(inside, "x").close()
        assert os.listdir(folder) == ["alone"]
        os.unlink(inside)
    lock.release()
"""


DAMAGED = [b"", b"{", b"[]", b"null", b"9" * 9999, b"[" * 4000]
DAMAGED += [lease_of(token="../../zarr.json"), lease_of(pid="7"), lease_of(pid=-1), lease_of(host=None)]


def race(place: Any, n: int = 6) -> list[WriterLock]:
    """Let `n` threads take a store's lock at the same moment; the locks that were got."""
    begin, winners = threading.Barrier(n), []

    def attempt(_: int) -> None:
        lock = WriterLock(writable(place))
        begin.wait()
        with suppress(StoreBusyError):
            lock.acquire()
            winners.append(lock)

    with ThreadPoolExecutor(n) as pool:
        list(pool.map(attempt, range(n)))
    return winners


class TestLock:
    @everywhere
    def test_one_writer_at_a_time_within_a_process(self, place):
        first, second = writable(place), writable(place)
        with WriterLock(first):
            assert not exists_any(first)
            for other in (first, second):
                with pytest.raises(StoreBusyError, match="being written"):
                    WriterLock(other).acquire()
        with WriterLock(second):
            pass
        assert not exists_any(first)
        assert list(first.list("")) == []

    @everywhere
    def test_of_many_at_once_one_gets_it(self, place):
        for _ in range(3):
            (winner,) = race(place)
            winner.release()
            winner.release()  # a second time does nothing

    def test_a_place_can_be_locked_beside_another(self, tmp_path, bucket):
        with ExitStack() as held:
            for place in (tmp_path / "a", tmp_path / "b", "memory://a", "memory://b", bucket, f"{bucket}2"):
                held.enter_context(WriterLock(writable(place)))

    @between_processes
    def test_another_process_is_refused_until_the_writer_ends(self, place, hold):
        holder = hold(place)
        with pytest.raises(StoreBusyError) as caught:
            WriterLock(writable(place)).acquire()
        if str(place).startswith("s3://"):
            assert f"process {holder.pid} on" in str(caught.value)
            assert "--unlock" in str(caught.value)
            with pytest.raises(StoreBusyError, match=f"process {holder.pid}"):
                unlock(writable(place))
        holder.communicate("", timeout=600)
        with WriterLock(writable(place)):
            pass

    @between_processes
    def test_a_killed_writer_stands_in_nobody_s_way(self, place, hold):
        holder = hold(place)
        holder.kill()
        holder.wait()
        with WriterLock(writable(place)), pytest.raises(StoreBusyError):
            WriterLock(writable(place)).acquire()
        assert list(writable(place).list("")) == []

    def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_lock(self, tmp_path, hold):
        parent = hold(tmp_path, "fork")
        parent.kill()
        parent.wait()
        with WriterLock(writable(tmp_path)):
            pass

    @by_name
    def test_a_forked_child_cannot_give_its_parent_s_lock_away(self, place):
        lock = WriterLock(writable(place))
        with lock:
            child = os.fork()
            if not child:
                lock.release()
                os._exit(0)
            os.waitpid(child, 0)
            with pytest.raises(StoreBusyError):
                WriterLock(writable(place)).acquire()

    def test_of_many_who_see_a_dead_writer_s_lease_one_takes_over(self, bucket, hold):
        for _ in range(3):
            holder = hold(bucket)
            holder.kill()
            holder.wait()
            (winner,) = race(bucket)
            winner.release()
            assert list(writable(bucket).list("")) == []

    def test_who_died_while_taking_over_is_succeeded_too(self, bucket, hold):
        first = hold(bucket)
        first.kill()
        first.wait()
        objects = writable(bucket)
        dead = json.loads(bytes(objects.get(LEASE)))
        for token in ("1" * 32, "2" * 32):  # the first one's right fell to a second one, the second one's to a third
            objects.put(f"{LEASE}.{dead['token']}", json.dumps({**dead, "token": token}).encode())
            dead["token"] = token
        (winner,) = race(bucket)
        winner.release()
        assert list(objects.list("")) == []

    def test_leases_that_name_each_other_are_nobody_s(self, bucket, hold):
        first = hold(bucket)
        first.kill()
        first.wait()
        objects = writable(bucket)
        lease = bytes(objects.get(LEASE))
        objects.put(f"{LEASE}.{json.loads(lease)['token']}", lease)
        with pytest.raises(StoreBusyError, match="--unlock"):
            WriterLock(objects).acquire()
        assert unlock(objects) is not None
        assert list(objects.list("")) == []

    def test_a_lock_that_cannot_be_given_back_does_not_hide_why(self, s3, bucket):
        objects = writable(bucket)

        def write() -> None:
            with WriterLock(objects):
                s3.moods(refuse_after=0)
                objects.put("rows/c.0", b"1")

        with pytest.warns(UserWarning, match="the lock stays"), pytest.raises(PermissionError, match=r"rows/c\.0"):
            write()
        s3.calm()
        with WriterLock(objects):  # this process has it no more, so it may be taken over
            pass

    def test_a_writer_elsewhere_is_named_and_unlock_removes_its_lease(self, bucket):
        objects = writable(bucket)
        assert unlock(objects) is None
        objects.put(LEASE, lease_of())
        with pytest.raises(StoreBusyError, match=r"process 7 on elsewhere since 2026-01-02.*repair s3://.* --unlock"):
            WriterLock(objects).acquire()
        assert objects.get(LEASE) == lease_of()
        assert unlock(objects) == "process 7 on elsewhere since 2026-01-02T03:04:05+00:00"
        with WriterLock(objects):
            pass

    @pytest.mark.parametrize("stored", DAMAGED)
    def test_a_damaged_lease_keeps_writers_out_until_it_is_removed(self, stored):
        objects = writable("memory://damaged-lease")
        objects.backend.shared = True  # as if other processes could see it, which is when there are leases
        objects.put(LEASE, stored)
        with pytest.raises(StoreBusyError, match="left no name"):
            WriterLock(objects).acquire()
        assert unlock(objects) == "a writer that left no name"
        with WriterLock(objects):
            assert objects.get(LEASE) is not None
        assert objects.get(LEASE) is None

    def test_a_lease_that_somebody_removed_and_took_is_not_given_back(self, bucket):
        objects = writable(bucket)
        with WriterLock(objects):
            objects.put(LEASE, lease_of())
        assert objects.get(LEASE) == lease_of()

    def test_where_folders_cannot_be_locked_a_lease_is_put(self, tmp_path, monkeypatch, hold):
        def refuse(*_: Any) -> None:
            raise OSError(errno.EBADF, "Bad file descriptor")

        monkeypatch.setattr(fcntl, "flock", refuse)  # what NFS says of a folder
        objects = writable(tmp_path / "acts.zarr")
        with WriterLock(objects):
            assert json.loads(bytes(objects.get(LEASE)))["pid"] == os.getpid()
            assert not exists_any(objects)
            with pytest.raises(StoreBusyError, match=f"process {os.getpid()} on"):
                WriterLock(writable(tmp_path / "acts.zarr")).acquire()
        assert objects.get(LEASE) is None

    def test_a_file_cannot_be_locked(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(NotAStoreError, match="is not a folder"):
            WriterLock(writable(tmp_path / "file")).acquire()

    @pytest.mark.parametrize(("place", "n_turns"), [("folder", 150), ("s3", 5)], indirect=["place"])
    def test_processes_that_contend_never_hold_what_another_one_holds(self, place, n_turns, tmp_path):
        """Some of them alone, some sharing, with claims on the same few shards; locks come and go all the time."""
        (tmp_path / "held").mkdir()
        command = [sys.executable, "-c", CONTENDER, str(place), str(tmp_path / "held"), str(n_turns)]
        contenders = [subprocess.Popen(command) for _ in range(4)]
        assert [contender.wait(600) for contender in contenders] == [0] * 4
        assert list(writable(place).list("")) == []
        assert list((tmp_path / "held").iterdir()) == []

    @pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
    def test_a_folder_that_another_one_takes_away_meanwhile_is_made_again(self, tmp_path, monkeypatch, error):
        makedirs, missed = os.makedirs, []

        def makedirs_late(path: str, **options: Any) -> None:
            if len(missed) < 3:
                missed.append(path)
                raise error(errno.EEXIST, "it was there, and is gone", path)
            makedirs(path, **options)

        monkeypatch.setattr(os, "makedirs", makedirs_late)
        with WriterLock(writable(tmp_path / "acts.zarr")):
            assert len(missed) == 3
            with pytest.raises(StoreBusyError):
                WriterLock(writable(tmp_path / "acts.zarr")).acquire()

    def test_a_killed_writer_s_file_is_removed_with_its_lock(self, tmp_path, hold):
        holder = hold(tmp_path)
        with pytest.raises(StoreBusyError, match="another process"):
            unlock(writable(tmp_path))
        holder.kill()
        holder.wait()
        assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == [LEASE]
        assert unlock(writable(tmp_path)) is None  # the lock is gone already: the kernel has it back
        assert not [file for file in tmp_path.rglob("*") if file.is_file()]

    def test_a_lease_in_a_folder_keeps_out_those_that_lock_files(self, tmp_path):
        """Put by a machine on which this file system has no such locks."""
        objects = writable(tmp_path)
        objects.put(LEASE, lease_of())
        for shared in (False, True):
            with pytest.raises(StoreBusyError, match="process 7 on elsewhere"):
                WriterLock(objects, shared=shared).acquire()
        objects.delete(LEASE)
        objects.put(f"{SHARED}{'0' * 32}", lease_of())
        with pytest.raises(StoreBusyError, match="process 7 on elsewhere"):
            WriterLock(objects).acquire()
        objects.put(f"{CLAIM}4", lease_of())
        with WriterLock(objects, shared=True) as lock:
            assert not lock.claim(4)
            assert lock.claim(5)
        assert unlock(objects) == "process 7 on elsewhere since 2026-01-02T03:04:05+00:00"
        assert list(objects.list("")) == []

    def test_a_place_without_put_if_absent_cannot_be_shared(self):
        objects = writable("memory://not-shared")
        objects.backend.shared = True  # as any other store behind fsspec is
        with pytest.raises(ConfigError, match="cannot be written by several processes at once"):
            WriterLock(objects, shared=True).acquire()
        assert list(objects.list("")) == []

    def test_a_process_that_is_dead_but_not_waited_for_is_gone(self, bucket):
        command = [sys.executable, "-c", HOLDER, bucket]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        with WriterLock(writable(bucket)):
            pass
        holder.communicate()
