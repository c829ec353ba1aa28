"""Locks of the kernel (`flock`) on files in the store's folder: they end with their process, however it ends.

They are on files and not on the folder itself because other machines see a lock on a file where the file system is
shared (NFS passes it to the server), while a lock on a folder stays on its machine. The files are empty, lie where zarr
does not look, and are removed by the writer that holds them last.

Release: unlink, then unlock. Acquire: lock, then check that the path is still this file; if not, try again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING

from actcache.errors import NotAStoreError, StoreBusyError
from actcache.store.locks.leases import busy, read_lease
from actcache.store.locks.lock_keys import LEASE, claim_key, lock_keys

if TYPE_CHECKING:
    from actcache.store.backends.objects import Objects

_NO_FLOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Error codes of file systems without such locks."""


class NoFlockError(Exception):
    """The file system has no such locks."""


class FileLocks:
    """The locks of one writer on files of a folder.

    Args:
        objects: the objects of the store, which are files.
        shared: whether others may write at the same time.
    """

    def __init__(self, objects: Objects, shared: bool) -> None:
        self._objects, self._shared = objects, shared
        self._descriptors: dict[str, int] = {}

    def take(self) -> None:
        """Take the store.

        Raises:
            StoreBusyError: another writer has it. NoFlockError: the file system has no such locks.
        """
        try:
            self._check_support()
            taken = self._lock(LEASE, fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX)
        except NotADirectoryError as error:
            raise NotAStoreError(f"{error.filename or self._objects} is not a folder; name another place") from None
        if not taken:
            raise _busy(self._objects)
        try:
            if not self._shared:
                self._sweep()
        except BaseException:
            self._close(LEASE)
            raise

    def claim(self, shard: int) -> bool:
        """Take a shard; False when another writer has it."""
        return self._lock(claim_key(shard), fcntl.LOCK_EX)

    def unclaim(self, shard: int) -> None:
        """Give a shard back."""
        self._unlock(claim_key(shard))

    def give_back(self) -> None:
        """Give the store back; the last writer removes what dead processes have left."""
        if LEASE in self._descriptors and self._is_last():
            with suppress(StoreBusyError):
                self._sweep()
            self._unlock(LEASE)
        self._close(LEASE)
        for folder in ("tokens/ids", "tokens"):  # empty if no store was made
            self._objects.backend.remove_folder(folder)

    def forget(self) -> None:
        """In a forked child: let go without unlocking what the parent still holds."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _check_support(self) -> None:
        """Lock a file of our own; NoFlockError where that is impossible, before any file claims to be a lock."""
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
        """The descriptor of a file; the file and its folders are made if they are missing."""
        path = self._objects.backend.path_to_change(key)
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
            # Another writer has just removed the empty folder: before the file was made, or while `makedirs` looked.

    def _lock(self, key: str, mode: int) -> bool:
        """Lock a file; False when another writer has it."""
        path = self._objects.backend.path_to_change(key)
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
            os.close(descriptor)  # the last holder has removed the file, so this lock excludes nobody
        self._descriptors[key] = descriptor
        if os.fstat(descriptor).st_size:  # a lease, of a writer whose file system has no such locks
            self._close(key)
            if key == LEASE and (found := read_lease(self._objects, LEASE)) is not None:
                raise busy(self._objects, found)
            return False
        return True

    def _is_last(self) -> bool:
        """Whether this is the only holder of the store; if so, no other writer can take it from now on."""
        try:
            fcntl.flock(self._descriptors[LEASE], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(self, key: str) -> None:
        """Remove the file, then release the lock: a writer that has opened it meanwhile sees that it is gone."""
        if key in self._descriptors:
            path = self._objects.backend.path_to_change(key)
            if _lies_at(self._descriptors[key], path):
                os.unlink(path)
            self._close(key)

    def _close(self, key: str) -> None:
        descriptor = self._descriptors.pop(key, None)
        if descriptor is not None:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # after a mere close, copies in forked children would keep it
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove lock files of dead processes. Call only while holding the store alone."""
        for key in lock_keys(self._objects):
            if self._objects.size(key) > 0 and (found := read_lease(self._objects, key)) is not None:
                raise busy(self._objects, found)
            if key != LEASE:
                self._objects.delete(key)


def remove_file_locks(objects: Objects) -> None:
    """Remove lock files of dead processes; StoreBusyError when a living process holds one."""
    locks = FileLocks(objects, shared=False)
    for key in lock_keys(objects):
        if objects.size(key) == 0:
            try:
                locks._check_support()
            except NoFlockError:
                return
            if not locks._lock(key, fcntl.LOCK_EX):
                raise _busy(objects)
            locks._unlock(key)


def _busy(objects: Objects) -> StoreBusyError:
    return StoreBusyError(
        f"{objects} is being written by another process, or by another writer in this one; wait until it is done, or "
        "stop it: its lock ends with it"
    )


def _lies_at(descriptor: int, path: str) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        there, mine = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.ESTALE:  # on NFS: another machine has removed the file
            raise
        return False
    return bool(mine.st_nlink) and os.path.samestat(there, mine)
