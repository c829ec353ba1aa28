"""Who may write a store: one writer alone, or several that share it, each with a claim on the shards it is making.

A writer that changes what is there holds the store alone: `extract` without a part, growth, deletion, repair, sealing.
Processes that fill one store together share it. None of them touches a shard that another one has claimed: floating
point sums differ between machines, so a shard of two writers could be a mix.

In a folder the locks are the kernel's, on files (`kernel.py`). Elsewhere, and where the file system has no such locks,
they are objects (`leases.py`); for a store in memory, a list within the process. Through fsspec (not obstore) zarr has
no put-if-absent: such stores cannot be shared, and nothing guards against two writers that start at the same instant.
Readers need no lock: they see committed shards only.
"""

from __future__ import annotations

import os
import random
import threading
import uuid
from collections.abc import Hashable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol, Self

from actcache.errors import ConfigError, StoreBusyError
from actcache.store.backends.objects import Objects, to_write
from actcache.store.locks.kernel import FileLocks, NoFlockError, remove_file_locks
from actcache.store.locks.leases import HELD, Leases, remove_leases

_HELD_LOCKS: set[WriterLock] = set()
_GUARD = threading.RLock()
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


def attempts(patience_s: float) -> Iterator[bool]:
    """Attempts at something for so many seconds, at least one; each yields whether it is the last.

    The pauses between them grow, and are of random length, so that two writers that gave way to each other do not meet
    again.
    """
    until, pause_s = monotonic() + patience_s, _FIRST_PAUSE_S
    while monotonic() < until:
        yield False
        sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    yield True


class _Locks(Protocol):
    """How one writer locks a place: the store as a whole, and single shards of a store that is shared."""

    def take(self) -> None:
        """Take the store; StoreBusyError when another writer has it."""

    def give_back(self) -> None:
        """Give the store back."""

    def claim(self, shard: int) -> bool:
        """Take a shard; False when another writer has it."""

    def unclaim(self, shard: int) -> None:
        """Give a shard back."""

    def forget(self) -> None:
        """In a forked child: let go without unlocking what the parent still holds."""


class WriterLock:
    """Held while a store is written. Use as a context manager, or acquire and release. Thread-safe.

    A forked child does not hold its parent's lock: releasing it there does nothing.

    Args:
        objects: of the store.
        shared: others that share the store may hold it at the same time; every shard has to be claimed.
    """

    def __init__(self, objects: Objects, *, shared: bool = False) -> None:
        self._objects, self._shared = objects, shared
        self._locks: _Locks | None = None
        self._token = uuid.uuid4().hex
        self._claimed: set[int] = set()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self, *, patience_s: float = 0.0) -> None:
        """Take the lock; try again for so many seconds.

        Raises:
            StoreBusyError: another writer has it. ConfigError: the place has no locks for several writers.
        """
        for is_last in attempts(patience_s):
            try:
                with _GUARD:
                    self._acquire()
                return
            except StoreBusyError:
                if is_last:
                    raise

    def _acquire(self) -> None:
        backend = self._objects.backend
        if backend.root is not None:
            try:
                self._take(FileLocks(self._objects, self._shared))
                return
            except NoFlockError:
                pass
        if not backend.shared:
            self._take(_ProcessLocks(self._objects, backend.identity, self._shared))
            return
        if self._shared and not backend.creates_once:
            raise ConfigError(
                f"{self._objects} cannot be written by several processes at once: what reaches it cannot put an object "
                "only if it is not there; install obstore for buckets, or write it by one process alone"
            )
        self._take(Leases(self._objects, self._shared, self._token))

    def _take(self, locks: _Locks) -> None:
        HELD.add(self._token)  # before the lease can be seen
        try:
            locks.take()
        except BaseException:
            HELD.discard(self._token)
            raise
        self._locks = locks
        _HELD_LOCKS.add(self)

    def release(self) -> None:
        """Give the lock and all claims back; nothing happens when it is not held."""
        with _GUARD:
            locks, self._locks = self._locks, None
        try:
            if locks is not None:
                for shard in sorted(self._claimed):
                    locks.unclaim(shard)
                locks.give_back()
        finally:  # not earlier: a lease that is not in HELD may be taken over
            with _GUARD:
                self._claimed.clear()
                HELD.discard(self._token)
                _HELD_LOCKS.discard(self)

    def claim(self, shard: int) -> bool:
        """Take a shard; False when another writer has it. A lock that is held alone has every shard."""
        if self.holds(shard):
            return True
        if self._locks is None:
            raise StoreBusyError(f"{self._objects} is not held, so no shard of it can be claimed")
        if not self._locks.claim(shard):
            return False
        self._claimed.add(shard)
        return True

    def holds(self, shard: int) -> bool:
        """Whether the shard may be written."""
        return not self._shared or shard in self._claimed

    def unclaim(self, shard: int) -> None:
        """Give a shard back; nothing happens when it is not claimed."""
        if shard in self._claimed and self._locks is not None:
            self._locks.unclaim(shard)
            self._claimed.discard(shard)

    def _left_behind(self) -> None:
        """In a forked child: let go without unlocking what the parent still holds."""
        if self._locks is not None:
            self._locks.forget()
        self._locks = None
        self._claimed.clear()


class _ProcessLocks:
    """The locks of one writer of a store that only this process can reach."""

    _taken: set[_ProcessLocks] = set()  # noqa: RUF012 (common to all instances)

    def __init__(self, objects: Objects, identity: Hashable, shared: bool) -> None:
        self._objects, self._identity, self._shared = objects, identity, shared
        self._claims: set[int] = set()

    def _others(self) -> list[_ProcessLocks]:
        return [other for other in self._taken if other is not self and other._identity == self._identity]

    def take(self) -> None:
        with _GUARD:
            if any(not (self._shared and other._shared) for other in self._others()):
                raise StoreBusyError(
                    f"{self._objects} is being written by another writer in this process; end that one first"
                )
            self._taken.add(self)

    def give_back(self) -> None:
        with _GUARD:
            self._taken.discard(self)

    def claim(self, shard: int) -> bool:
        with _GUARD:
            if any(shard in other._claims for other in self._others()):
                return False
            self._claims.add(shard)
            return True

    def unclaim(self, shard: int) -> None:
        with _GUARD:
            self._claims.discard(shard)

    def forget(self) -> None:
        self._taken.discard(self)


def unlock(path: str | Path | Objects) -> str | None:
    """Remove the locks of writers that are gone, such as those on other machines.

    Returns:
        The owner of one of them, in words; None when there was no lock.

    Raises:
        StoreBusyError: one of the writers is a living process of this machine, or holds a lock of the file system.
    """
    objects = to_write(path)
    if objects.root is not None:
        remove_file_locks(objects)
    return remove_leases(objects)


def _after_fork() -> None:
    global _GUARD
    _GUARD = threading.RLock()
    for lock in _HELD_LOCKS:
        lock._left_behind()
    _HELD_LOCKS.clear()
    HELD.clear()


os.register_at_fork(after_in_child=_after_fork)
