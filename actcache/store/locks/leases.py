"""Locks that are objects, for places where the kernel has none: buckets, and some file systems.

A writer puts a lease, an object that says which process it is, unless there is one. The lease stays when its process is
killed. The next writer on the same machine sees that the process is gone and takes the lease over. A writer on another
machine cannot know, and is refused until the user runs `actcache repair STORE --unlock`.

A lease does not end with its process, because another machine cannot see whether that process lives. Its shard is
passed over by the others, which finish all the rest, and `actcache repair --unlock` frees it. Leases that expire would
need clocks, or writers that renew them during a forward pass, and a slow writer would be taken for dead and then write
into the shard of another.
"""

from __future__ import annotations

import json
import os
import re
import socket
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.errors import StoreBusyError
from actcache.store.locks.lock_keys import CLAIM, LEASE, SHARED, claim_key, lock_keys

if TYPE_CHECKING:
    from actcache.store.backends.objects import Objects

HELD: set[str] = set()
"""Tokens of the locks that this process holds."""
_IS_CLAIM = re.compile(rf"{re.escape(CLAIM)}\d+")
_MOST_BYTES = 4096
_MOST_TURNS = 8


class Leases:
    """The locks of one writer as objects.

    A writer that wants the store alone puts its lease and then looks for writers that share it. A writer that shares it
    puts its own lease and then looks for one that is alone. If both do so at the same moment, at least one sees the
    other, and gives way.

    Args:
        objects: the objects of the store.
        shared: whether others may write at the same time.
        token: 32 hexadecimal digits, different for each writer.
    """

    def __init__(self, objects: Objects, shared: bool, token: str) -> None:
        self._objects, self._token = objects, token
        self._key = f"{SHARED}{token}" if shared else LEASE
        self._shared = shared

    def take(self) -> None:
        """Take the store; StoreBusyError when another writer has it."""
        try:
            if self._shared:
                self._take_shared()
            else:
                self._take_alone()
        except BaseException:
            self._give_back(self._key)
            raise

    def claim(self, shard: int) -> bool:
        """Take a shard; False when another writer has it."""
        return self._obtain(claim_key(shard)) is None

    def unclaim(self, shard: int) -> None:
        """Give a shard back."""
        self._give_back(claim_key(shard))

    def give_back(self) -> None:
        """Give the store back, and remove what dead processes of this machine have left."""
        if self._shared:
            with suppress(OSError):
                self._tidy_up()
        self._give_back(self._key)

    def _tidy_up(self) -> None:
        """While others write: remove only leases that no other writer can be taking over."""
        for key in lock_keys(self._objects):
            lease = read_lease(self._objects, key) if key.startswith(SHARED) or _IS_CLAIM.fullmatch(key) else None
            if lease is not None and lease.is_gone():
                if key.startswith(SHARED):
                    self._objects.delete(key)
                elif self._obtain(key) is None:
                    self._give_back(key)

    def forget(self) -> None:
        """Nothing to do in a forked child: the token is not in its `HELD`."""

    def _take_alone(self) -> None:
        owner = self._obtain(LEASE)
        if owner is not None:
            raise busy(self._objects, owner)
        keys = lock_keys(self._objects)
        for key in keys:
            if key.startswith(SHARED):
                other = read_lease(self._objects, key)
                if other is not None and not other.is_gone():
                    raise busy(self._objects, other)
        for key in keys:
            if key != LEASE:  # of dead processes: no other writer is here
                self._objects.delete(key)

    def _take_shared(self) -> None:
        self._objects.put(self._key, Lease.now(self._token).to_bytes())
        alone = read_lease(self._objects, LEASE)
        if alone is None:
            return
        owner = self._obtain(LEASE) if alone.is_gone() else alone
        if owner is not None:
            raise busy(self._objects, owner)
        self._give_back(LEASE)

    def _obtain(self, key: str) -> Lease | None:
        """Put the lease, or take over that of a dead process; returns the lease of another writer if it has the key."""
        mine = Lease.now(self._token)
        for _ in range(_MOST_TURNS):
            self._objects.create(key, mine.to_bytes())
            found = read_lease(self._objects, key)
            if found is not None and found.token != mine.token and found.is_gone():
                found = self._take_over(key, found, mine)
            if found is not None:
                return None if found.token == mine.token else found
        return UNKNOWN  # taken and given back between two looks, each time: others are busy here

    def _take_over(self, key: str, gone: Lease, mine: Lease) -> Lease | None:
        """Replace the lease of a dead process; returns the lease that is there afterwards.

        The right to replace it is an object of its own, made by put-if-absent: if several writers see the same dead
        lease, one gets the right, and one that comes late finds another lease than it saw. If the holder of the right
        has died too, the right is taken over in the same way.
        """
        rights: list[str] = []
        owner: Lease | None = gone
        while owner is not None and owner.token != mine.token:
            right = f"{key}.{owner.token}"
            if right in rights or not owner.is_gone():
                return owner
            self._objects.create(right, mine.to_bytes())
            rights.append(right)
            owner = read_lease(self._objects, right)
        found = read_lease(self._objects, key)
        if owner is not None and found is not None and found.token == gone.token:
            self._objects.put(key, mine.to_bytes())
            found = mine
        for right in rights:
            self._objects.delete(right)
        return found

    def _give_back(self, key: str) -> None:
        try:
            found = read_lease(self._objects, key)
            if found is not None and found.token == self._token:
                self._objects.delete(key)
        except OSError as error:  # probably what stopped the writer, whose own error should be the one raised
            warnings.warn(f"the lock stays until this machine writes the store again: {error}", stacklevel=2)


def remove_leases(objects: Objects) -> str | None:
    """Remove all leases of writers that are gone; the owner of one of them in words, None when there was none.

    Raises:
        StoreBusyError: one of the writers is a living process of this machine.
    """
    keys = lock_keys(objects)
    found = [lease for key in keys if (lease := read_lease(objects, key)) is not None]
    for lease in found:
        if lease.is_here() and not lease.is_gone():
            raise busy(objects, lease)
    for key in keys:
        objects.delete(key)
    return max(found, key=lambda lease: lease.pid > 0).owner() if found else None


def busy(objects: Objects, found: Lease) -> StoreBusyError:
    """The error that says who is writing."""
    return StoreBusyError(
        f"{objects} is being written by {found.owner()}; wait until it is done, or, if that writer is gone, "
        f"run 'actcache repair {objects} --unlock'"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Which process is writing: for people, and for the next writer on the same machine."""

    host: str
    pid: int
    since: str
    token: str
    """32 hexadecimal digits, one for each lock."""
    processes: str = ""
    """The set of process ids that `pid` belongs to: of one container, since one start of the machine."""

    @classmethod
    def now(cls, token: str) -> Lease:
        """The lease of this process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=token,
            processes=_these_processes(),
        )

    @classmethod
    def from_bytes(cls, data: memoryview) -> Lease:
        """The lease that `to_bytes` wrote; `UNKNOWN` when it is damaged."""
        try:
            lease = cls(**json.loads(bytes(data)))
        except (ValueError, TypeError, RecursionError):
            return UNKNOWN
        texts = (lease.host, lease.since, lease.token, lease.processes)
        sound = type(lease.pid) is int and lease.pid > 0 and all(isinstance(text, str) for text in texts)
        # The token becomes part of a key.
        return lease if sound and re.fullmatch("[0-9a-f]{32}", lease.token) else UNKNOWN

    def to_bytes(self) -> bytes:
        """The lease as JSON."""
        return json.dumps(asdict(self)).encode()

    def owner(self) -> str:
        """The writer, in words."""
        return f"process {self.pid} on {self.host} since {self.since}" if self.pid else "a writer that left no name"

    def is_here(self) -> bool:
        """Whether this process can see the other one, if it is alive."""
        return bool(self.pid) and (self.host, self.processes) == (socket.gethostname(), _these_processes())

    def is_gone(self) -> bool:
        """Whether the writer is known to be dead; False for a process that cannot be seen from here."""
        if not self.is_here():
            return False
        if self.pid == os.getpid():  # ours, or a dead process's with the same id, as after a container restarts
            return self.token not in HELD
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _is_zombie(self.pid)


UNKNOWN = Lease(host="", pid=0, since="", token="")


def read_lease(objects: Objects, key: str) -> Lease | None:
    """The lease at this key; None when there is none."""
    data = objects.tail(key, _MOST_BYTES)
    return None if data is None else Lease.from_bytes(data)


def _is_zombie(pid: int) -> bool:
    """Whether a process is dead and its parent has not asked for its exit status (in a container it may never ask)."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # not Linux, or the process has just ended
        return False
    return said.rpartition(")")[2].split()[:1] == ["Z"]  # the process's name comes before, and may hold anything


def _these_processes() -> str:
    """Identifies a set of process ids: by the machine's start, and by the namespace (of a container)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: the host's name has to suffice
        return ""
