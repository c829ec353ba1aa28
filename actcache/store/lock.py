"""One writer at a time: the kernel's lock on a folder, a lease object where there is none, a list within the process.

A folder's lock (`flock` on the folder itself, so that no foreign file lies in the Zarr group) goes with its process.
Where the file system has no such lock (some NFS), and for remote stores, the writer puts a lease instead. That one
stays when its writer is killed: the next writer on the same machine sees that the process is gone and takes it over,
one on another machine cannot know and is refused until somebody says `actcache repair STORE --unlock`.

Nothing here guards against two writers behind fsspec (not obstore) that begin in the same instant: its stores have no
put-if-absent that zarr uses. Readers need no lock: they see committed shards only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import threading
import uuid
import warnings
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from actcache.errors import NotAStoreError, StoreBusyError

if TYPE_CHECKING:
    from actcache.store.objects import Objects

LEASE = "tokens/ids/writer"
"""The lease's key: below an array, where zarr does not look for groups and arrays."""
_MOST_BYTES = 4096
_NO_FLOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems say that cannot lock a folder (NFS wants the file open for writing, and a folder cannot be)."""
_HELD: set[WriterLock] = set()
_GUARD = threading.RLock()


class WriterLock:
    """Held by whoever writes a store. Use as a context manager, or acquire and release.

    A forked child does not hold its parent's lock: releasing it there does nothing.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._release: Callable[[], None] | None = None
        self._descriptor: int | None = None
        self._identity: Hashable = None
        self._token = uuid.uuid4().hex

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock; does not wait.

        Raises:
            StoreBusyError: somebody else is writing.
        """
        with _GUARD:
            objects = self._objects
            if objects.root is not None:
                self._release = self._take_folder(objects.root) or self._take_lease()
            elif objects.backend.shared:
                self._release = self._take_lease()
            else:
                self._release = self._take_here(objects.backend.identity)
            _HELD.add(self)

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        with _GUARD:
            release, self._release = self._release, None
        try:
            if release is not None:
                release()
        finally:  # not sooner: a lease that nobody holds may be taken over
            with _GUARD:
                _HELD.discard(self)

    def _take_here(self, identity: Hashable) -> Callable[[], None]:
        if any(lock._identity == identity for lock in _HELD):
            raise StoreBusyError(f"{self._objects} is being written by another writer in this process; end that first")
        self._identity = identity
        return lambda: None

    def _take_folder(self, folder: Path) -> Callable[[], None] | None:
        """Lock a folder, which is made if it has to be; None when its file system cannot."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotAStoreError(f"{self._objects} is a file, no folder; name another place") from None
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise StoreBusyError(
                    f"{self._objects} is being written by another process, or by another writer in this one; wait "
                    "until it is done, or stop it: its lock goes with it"
                ) from None
            if error.errno in _NO_FLOCK:
                return None
            raise
        self._descriptor = descriptor
        return self._unlock_folder

    def _unlock_folder(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to copies in forked children
            os.close(descriptor)

    def _take_lease(self) -> Callable[[], None]:
        mine = _Lease.now(self._token)
        self._objects.create(LEASE, mine.to_bytes())
        found = _read_lease(self._objects, LEASE)
        if found is not None and found.token != mine.token and found.is_gone():
            found = self._take_over(found, mine)
        if found is None or found.token != mine.token:
            raise _busy(self._objects, found)
        return self._give_lease_back

    def _take_over(self, gone: _Lease, mine: _Lease) -> _Lease | None:
        """Replace the lease of a dead process; the lease that is there then.

        The right to do so is an object of its own, made by put-if-absent: of several who see the same dead lease one
        gets it, and one who comes late finds another lease than the one that it saw. Who died with the right in hand
        is succeeded in the same way.
        """
        rights: list[str] = []
        owner: _Lease | None = gone
        while owner is not None and owner.token != mine.token:
            right = f"{LEASE}.{owner.token}"
            if right in rights or not owner.is_gone():
                return owner
            self._objects.create(right, mine.to_bytes())
            rights.append(right)
            owner = _read_lease(self._objects, right)
        found = _read_lease(self._objects, LEASE)
        if owner is not None and found is not None and found.token == gone.token:
            self._objects.put(LEASE, mine.to_bytes())
            found = mine
        for right in rights:
            self._objects.delete(right)
        return found

    def _give_lease_back(self) -> None:
        try:
            found = _read_lease(self._objects, LEASE)
            if found is not None and found.token == self._token:
                self._objects.delete(LEASE)
        except OSError as error:  # most likely what made the writer give up, and that is what should be heard
            warnings.warn(f"the lock stays, until the next writer of this machine: {error}", stacklevel=2)

    def _left_behind(self) -> None:
        """In a forked child: let go without unlocking what the parent still holds."""
        self._release = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def unlock(objects: Objects) -> str | None:
    """Remove the lease of a writer that is gone; whose it was, or None when there was none.

    Raises:
        StoreBusyError: the writer is a living process of this machine.
    """
    found = _read_lease(objects, LEASE)
    if found is not None and found.is_here() and not found.is_gone():
        raise _busy(objects, found)
    leases = [f"tokens/ids/{name}" for name in objects.names("tokens/ids") if f"tokens/ids/{name}".startswith(LEASE)]
    for key in leases:
        objects.delete(key)
    return (found or _UNKNOWN).whose() if leases else None


def _busy(objects: Objects, found: _Lease | None) -> StoreBusyError:
    return StoreBusyError(
        f"{objects} is being written by {(found or _UNKNOWN).whose()}; wait until it is done, or, if that writer is "
        f"gone, run 'actcache repair {objects} --unlock'"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lease:
    """Who is writing: for people, and for the next writer on the same machine."""

    host: str
    pid: int
    since: str
    token: str
    """32 hexadecimal digits, one for each lock."""
    processes: str = ""
    """Which pids `pid` is among: those of one container, between two starts of the machine."""

    @classmethod
    def now(cls, token: str) -> _Lease:
        """The lease of this process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=token,
            processes=_these_processes(),
        )

    @classmethod
    def from_bytes(cls, data: memoryview) -> _Lease:
        """The lease that `to_bytes` wrote; an unknown one when it is damaged."""
        try:
            lease = cls(**json.loads(bytes(data)))
        except (ValueError, TypeError, RecursionError):
            return _UNKNOWN
        texts = (lease.host, lease.since, lease.token, lease.processes)
        sound = type(lease.pid) is int and lease.pid > 0 and all(isinstance(text, str) for text in texts)
        # The token becomes part of a key.
        return lease if sound and re.fullmatch("[0-9a-f]{32}", lease.token) else _UNKNOWN

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
            return all(lock._token != self.token for lock in _HELD)
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


_UNKNOWN = _Lease(host="", pid=0, since="", token="")


def _read_lease(objects: Objects, key: str) -> _Lease | None:
    data = objects.tail(key, _MOST_BYTES)
    return None if data is None else _Lease.from_bytes(data)


def _these_processes() -> str:
    """What tells one set of process numbers from another: the machine's start, and the namespace (a container's)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: the host's name has to do
        return ""


def _after_fork() -> None:
    global _GUARD
    _GUARD = threading.RLock()
    for lock in _HELD:
        lock._left_behind()
    _HELD.clear()


os.register_at_fork(after_in_child=_after_fork)
