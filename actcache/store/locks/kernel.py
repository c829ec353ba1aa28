"""Locks of the kernel (`flock`) on files of the store's folder: they end with their process, however it ends.

Files and not the folder itself, because a lock on a file is seen by other machines too where the file system is shared
(NFS gives it to the server), while one on a folder stays on the machine. The files are empty, lie where zarr does not
look, and are taken away by whoever holds them last.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from actcache.errors import NotAStoreError, StoreBusyError
from actcache.store.locks.keys import LEASE, claim_key, lock_keys
from actcache.store.locks.leases import busy, read_lease

if TYPE_CHECKING:
    from actcache.store.backends.folders import FileBackend
    from actcache.store.backends.objects import Objects

_NO_FLOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What file systems say that have no such lock."""


class NoFlockError(Exception):
    """The file system has no such lock."""


class Flocks:
    """The locks of one writer on files of a folder.

    Args:
        objects: of the store.
        backend: its folder.
        shared: whether others may write at the same time.
    """

    def __init__(self, objects: Objects, backend: FileBackend, shared: bool) -> None:
        self._objects, self._backend, self._shared = objects, backend, shared
        self._descriptors: dict[str, int] = {}

    def take(self) -> None:
        """Take the store; StoreBusyError when somebody has it. NoFlockError where that cannot be."""
        try:
            self._try_out()
            taken = self._lock(LEASE, fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX)
        except NotADirectoryError as error:
            raise NotAStoreError(f"{error.filename or self._objects} is no folder; name another place") from None
        if not taken:
            raise _busy(self._objects)
        try:
            if not self._shared:
                self._sweep()
        except BaseException:
            self._close(LEASE)
            raise

    def claim(self, shard: int) -> bool:
        """Take a shard; False when somebody has it."""
        return self._lock(claim_key(shard), fcntl.LOCK_EX)

    def unclaim(self, shard: int) -> None:
        """Give a shard back."""
        self._unlock(claim_key(shard))

    def give_back(self) -> None:
        """Give the store back; the last one takes away what dead processes have left."""
        if LEASE in self._descriptors and self._is_last():
            with suppress(StoreBusyError):
                self._sweep()
            self._unlock(LEASE)
        self._close(LEASE)
        for folder in ("tokens/ids", "tokens"):  # made by us, where no store came to be
            self._backend.remove_folder(folder)

    def forget(self) -> None:
        """In a forked child: let go without unlocking what the parent still holds."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _try_out(self) -> None:
        """Lock a file that nobody else has; NoFlockError where that cannot be, before a file is there that says so."""
        key = f"{LEASE}.{uuid.uuid4().hex}"
        descriptor = self._open(key)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            raise NoFlockError from None
        finally:
            os.close(descriptor)
            self._objects.delete(key)

    def _open(self, key: str) -> int:
        """The descriptor of a file, which is made if it has to be, and so are its folders."""
        path = self._backend.own(key)
        while True:
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with self._objects.full_disk_explained(f"{key}: an empty file"):
                    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except FileExistsError as error:
                if os.path.lexists(error.filename) and not os.path.isdir(error.filename):
                    raise NotADirectoryError(errno.ENOTDIR, "not a folder", error.filename) from None
            except FileNotFoundError:
                pass
            # Another one has just taken the empty folder away: before the file was made, or while `makedirs` looked.

    def _lock(self, key: str, mode: int) -> bool:
        """Lock a file; False when somebody else has it."""
        path = self._backend.own(key)
        while True:
            descriptor = self._open(key)
            try:
                fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except BaseException:
                os.close(descriptor)
                raise
            if _lies_at(descriptor, path):
                break
            os.close(descriptor)  # who held it has taken the file away: this lock is one on nothing
        self._descriptors[key] = descriptor
        if os.fstat(descriptor).st_size:  # put by a writer for whom this file system has no such locks
            self._close(key)
            if key == LEASE and (found := read_lease(self._objects, LEASE)) is not None:
                raise busy(self._objects, found)
            return False
        return True

    def _is_last(self) -> bool:
        """Whether nobody else holds the store; nobody else can take it then."""
        try:
            fcntl.flock(self._descriptors[LEASE], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(self, key: str) -> None:
        """Take the file away, then give the lock back: who has opened it meanwhile sees that it is not there."""
        if key in self._descriptors:
            path = self._backend.own(key)
            if _lies_at(self._descriptors[key], path):
                os.unlink(path)
            self._close(key)

    def _close(self, key: str) -> None:
        descriptor = self._descriptors.pop(key, None)
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it to copies in forked children
            os.close(descriptor)

    def _sweep(self) -> None:
        """Take away what dead processes have left; of one who is alone."""
        for key in lock_keys(self._objects):
            if self._objects.size(key) > 0 and (found := read_lease(self._objects, key)) is not None:
                raise busy(self._objects, found)
            if key != LEASE:
                self._objects.delete(key)


def remove_flocks(objects: Objects, backend: FileBackend) -> None:
    """Take away the files that dead processes have left; StoreBusyError when one is locked by a living one."""
    locks = Flocks(objects, backend, shared=False)
    for key in lock_keys(objects):
        if objects.size(key) == 0:
            try:
                locks._try_out()
            except NoFlockError:
                return
            if not locks._lock(key, fcntl.LOCK_EX):
                raise _busy(objects)
            locks._unlock(key)


def _busy(objects: Objects) -> StoreBusyError:
    return StoreBusyError(
        f"{objects} is being written by another process, or by another writer in this one; wait until it is done, or "
        "stop it: its lock goes with it"
    )


def _lies_at(descriptor: int, path: str) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        there, mine = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.ESTALE:  # what NFS says of a file that another machine has taken away
            raise
        return False
    return bool(mine.st_nlink) and os.path.samestat(there, mine)
