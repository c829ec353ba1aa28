"""Who may write a store: one alone, or several who share it, each with a claim on the shards that it is making.

Alone is whoever changes what is there: `extract` without a part, growth, deletion, repair, sealing. Sharing are the
processes that fill one store together; none of them touches a shard that another one has claimed, because floating
point sums differ between machines, and a shard of two writers could be a mix.

In a folder the locks are the kernel's, on files (`kernel.py`); elsewhere, and where the file system has no such locks,
they are objects (`leases.py`); of a store in memory, a list within the process. Behind fsspec (not obstore) there is no
put-if-absent that zarr uses: such stores cannot be shared, and nothing guards against two writers that begin in the
same instant. Readers need no lock: they see committed shards only.
"""

from __future__ import annotations

import os
import random
import threading
import uuid
from collections.abc import Hashable
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol, Self

from actcache.errors import ConfigError, StoreBusyError
from actcache.store.backends.folders import FileBackend
from actcache.store.backends.objects import Objects, to_write
from actcache.store.locks.kernel import Flocks, NoFlockError, remove_flocks
from actcache.store.locks.leases import HELD, Leases, remove_leases

_LOCKS: set[WriterLock] = set()
_GUARD = threading.RLock()
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


class _Means(Protocol):
    """How a place is locked: the store as a whole, and its shards among those who share it."""

    def take(self) -> None: ...
    def give_back(self) -> None: ...
    def claim(self, shard: int) -> bool: ...
    def unclaim(self, shard: int) -> None: ...
    def forget(self) -> None: ...


class WriterLock:
    """Held by whoever writes a store. Use as a context manager, or acquire and release. Thread-safe.

    A forked child does not hold its parent's lock: releasing it there does nothing.

    Args:
        objects: of the store.
        shared: others may hold the store at the same time, if they share it too; every shard has to be claimed.
    """

    def __init__(self, objects: Objects, *, shared: bool = False) -> None:
        self._objects, self._shared = objects, shared
        self._means: _Means | None = None
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
            StoreBusyError: somebody else is writing. ConfigError: the place has no locks for several writers.
        """
        until, pause_s = monotonic() + patience_s, _FIRST_PAUSE_S
        while True:
            try:
                with _GUARD:
                    self._acquire()
                return
            except StoreBusyError:
                if monotonic() >= until:
                    raise
            sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 (so that those who gave way to each other part)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _acquire(self) -> None:
        backend = self._objects.backend
        if isinstance(backend, FileBackend):
            try:
                self._take(Flocks(self._objects, backend, self._shared))
                return
            except NoFlockError:
                pass
        if backend.shared and self._shared and not backend.creates_once:
            raise ConfigError(
                f"{self._objects} cannot be written by several at once: what it is reached through has no way to put "
                "an object only if there is none; install obstore for buckets, or write it by one process alone"
            )
        if backend.shared:
            self._take(Leases(self._objects, self._shared, self._token))
        else:
            self._take(_Here(self._objects, backend.identity, self._shared))

    def _take(self, means: _Means) -> None:
        HELD.add(self._token)  # before the lease can be seen
        try:
            means.take()
        except BaseException:
            HELD.discard(self._token)
            raise
        self._means = means
        _LOCKS.add(self)

    def release(self) -> None:
        """Give the lock and all claims back; nothing happens when it is not held."""
        with _GUARD:
            means, self._means = self._means, None
        try:
            if means is not None:
                for shard in sorted(self._claimed):
                    means.unclaim(shard)
                means.give_back()
        finally:  # not sooner: a lease that nobody holds may be taken over
            with _GUARD:
                self._claimed.clear()
                HELD.discard(self._token)
                _LOCKS.discard(self)

    def claim(self, shard: int) -> bool:
        """Take a shard; False when another one has it. A lock that is held alone has every shard."""
        if self.holds(shard):
            return True
        if self._means is None:
            raise StoreBusyError(f"{self._objects} is not held, so no shard of it can be claimed")
        if not self._means.claim(shard):
            return False
        self._claimed.add(shard)
        return True

    def holds(self, shard: int) -> bool:
        """Whether the shard may be written."""
        return not self._shared or shard in self._claimed

    def unclaim(self, shard: int) -> None:
        """Give a shard back; nothing happens when it is not claimed."""
        if shard in self._claimed and self._means is not None:
            self._means.unclaim(shard)
            self._claimed.discard(shard)

    def _left_behind(self) -> None:
        """In a forked child: let go without unlocking what the parent still holds."""
        if self._means is not None:
            self._means.forget()
        self._means = None
        self._claimed.clear()


class _Here:
    """The locks of one writer of a store that only this process can reach."""

    _taken: set[_Here] = set()  # noqa: RUF012 (of all of them)

    def __init__(self, objects: Objects, identity: Hashable, shared: bool) -> None:
        self._objects, self._identity, self._shared = objects, identity, shared
        self._claims: set[int] = set()

    def _others(self) -> list[_Here]:
        return [other for other in self._taken if other is not self and other._identity == self._identity]

    def take(self) -> None:
        with _GUARD:
            if any(not (self._shared and other._shared) for other in self._others()):
                raise StoreBusyError(
                    f"{self._objects} is being written by another writer in this process; end that first"
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
        Whose lock one of them was; None when there was no lock.

    Raises:
        StoreBusyError: one of the writers is a living process of this machine, or holds a lock of the file system.
    """
    objects = to_write(path)
    if isinstance(objects.backend, FileBackend):
        remove_flocks(objects, objects.backend)
    return remove_leases(objects)


def _after_fork() -> None:
    global _GUARD
    _GUARD = threading.RLock()
    for lock in _LOCKS:
        lock._left_behind()
    _LOCKS.clear()
    HELD.clear()


os.register_at_fork(after_in_child=_after_fork)
