"""Locks that are objects, for places without a lock of the system: buckets, and folders whose file system has none.

Who writes puts an object that says who it is, unless there is one. It stays when its process is killed: the next one
on the same machine sees that the process is gone and takes it over; one on another machine cannot know, and is refused
until somebody says `actcache repair STORE --unlock`.
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

if TYPE_CHECKING:
    from actcache.store.backends.objects import Objects
from actcache.store.locks.keys import CLAIM, LEASE, SHARED, claim_key, lock_keys

HELD: set[str] = set()
"""Tokens of this process's locks."""


_IS_CLAIM = re.compile(rf"{re.escape(CLAIM)}\d+")


_MOST_BYTES = 4096


_MOST_TURNS = 8


class Leases:
    """The locks of one writer as objects.

    One that wants the store alone puts its lease and then looks for those who share it; one who shares puts its own
    and then looks for one who is alone. Of two at the same moment at least one sees the other, and who sees another
    gives way.

    Args:
        objects: of the store.
        shared: whether others may write at the same time.
        token: 32 hexadecimal digits, of this writer only.
    """

    def __init__(self, objects: Objects, shared: bool, token: str) -> None:
        self._objects, self._token = objects, token
        self._key = f"{SHARED}{token}" if shared else LEASE
        self._shared = shared

    def take(self) -> None:
        """Take the store; StoreBusyError when somebody has it."""
        try:
            if self._shared:
                self._join()
            else:
                self._take_alone()
        except BaseException:
            self._give_back(self._key)
            raise

    def claim(self, shard: int) -> bool:
        """Take a shard; False when somebody has it."""
        return self._obtain(claim_key(shard)) is None

    def unclaim(self, shard: int) -> None:
        """Give a shard back."""
        self._give_back(claim_key(shard))

    def give_back(self) -> None:
        """Give the store back, and take away what dead processes of this machine have left."""
        if self._shared:
            with suppress(OSError):
                self._tidy_up()
        self._give_back(self._key)

    def _tidy_up(self) -> None:
        """Of one who is not alone: only what nobody else could be taking over meanwhile, or what was taken over."""
        for key in lock_keys(self._objects):
            lease = read_lease(self._objects, key) if key.startswith(SHARED) or _IS_CLAIM.fullmatch(key) else None
            if lease is not None and lease.is_gone():
                if key.startswith(SHARED):
                    self._objects.delete(key)
                elif self._obtain(key) is None:
                    self._give_back(key)

    def forget(self) -> None:
        """In a forked child nothing is to be done: the token is not among those it holds."""

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
            if key != LEASE:  # of the dead: nobody else is here
                self._objects.delete(key)

    def _join(self) -> None:
        self._objects.put(self._key, Lease.now(self._token).to_bytes())
        alone = read_lease(self._objects, LEASE)
        if alone is None:
            return
        owner = self._obtain(LEASE) if alone.is_gone() else alone
        if owner is not None:
            raise busy(self._objects, owner)
        self._give_back(LEASE)

    def _obtain(self, key: str) -> Lease | None:
        """Put the lease, or take that of a dead process over; whose it is when it is not ours then."""
        mine = Lease.now(self._token)
        for _ in range(_MOST_TURNS):
            self._objects.create(key, mine.to_bytes())
            found = read_lease(self._objects, key)
            if found is not None and found.token != mine.token and found.is_gone():
                found = self._take_over(key, found, mine)
            if found is not None:
                return None if found.token == mine.token else found
        return UNKNOWN  # given back each time between two looks: others are very busy here

    def _take_over(self, key: str, gone: Lease, mine: Lease) -> Lease | None:
        """Replace the lease of a dead process; the lease that is there then.

        The right to do so is an object of its own, made by put-if-absent: of several who see the same dead lease one
        gets it, and one who comes late finds another lease than the one that it saw. Who died with the right in hand
        is succeeded in the same way.
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
        except OSError as error:  # most likely what made the writer give up, and that is what should be heard
            warnings.warn(f"the lock stays, until the next writer of this machine: {error}", stacklevel=2)


def remove_leases(objects: Objects) -> str | None:
    """Remove all leases of writers that are gone; whose one of them was, or None when there was none.

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
    return max(found, key=lambda lease: lease.pid > 0).whose() if found else None


def busy(objects: Objects, found: Lease) -> StoreBusyError:
    """The error that says who is writing."""
    return StoreBusyError(
        f"{objects} is being written by {found.whose()}; wait until it is done, or, if that writer is gone, "
        f"run 'actcache repair {objects} --unlock'"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """Who is writing: for people, and for the next writer on the same machine."""

    host: str
    pid: int
    since: str
    token: str
    """32 hexadecimal digits, one for each lock."""
    processes: str = ""
    """Which pids `pid` is among: those of one container, between two starts of the machine."""

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
        """The lease that `to_bytes` wrote; an unknown one when it is damaged."""
        try:
            lease = cls(**json.loads(bytes(data)))
        except (ValueError, TypeError, RecursionError):
            return UNKNOWN
        texts = (lease.host, lease.since, lease.token, lease.processes)
        sound = type(lease.pid) is int and lease.pid > 0 and all(isinstance(text, str) for text in texts)
        # The token becomes part of a key.
        return lease if sound and re.fullmatch("[0-9a-f]{32}", lease.token) else UNKNOWN

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(asdict(self)).encode()

    def whose(self) -> str:
        """For messages."""
        return f"process {self.pid} on {self.host} since {self.since}" if self.pid else "a writer that left no name"

    def is_here(self) -> bool:
        """Whether the process, if it lives, is one that this process can see."""
        return bool(self.pid) and (self.host, self.processes) == (socket.gethostname(), _these_processes())

    def is_gone(self) -> bool:
        """Whether the writer is known to be dead; never of a process that cannot be seen from here."""
        if not self.is_here():
            return False
        if self.pid == os.getpid():  # ours, or of a dead process that had the same number, as in a restarted container
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
    """The lease that lies there; None when there is none."""
    data = objects.tail(key, _MOST_BYTES)
    return None if data is None else Lease.from_bytes(data)


def _is_zombie(pid: int) -> bool:
    """Whether a process is dead, and only its parent has not asked yet how it ended (a container's may never ask)."""
    try:
        said = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # no Linux, or it has just gone
        return False
    return said.rpartition(")")[2].split()[:1] == ["Z"]  # the name before may hold anything


def _these_processes() -> str:
    """What tells one set of process numbers from another: the machine's start, and the namespace (a container's)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: the host's name has to do
        return ""
