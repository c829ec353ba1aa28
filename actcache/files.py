"""Files that appear whole or not at all, and that a power cut does not take: written beside their place, then renamed.

What the system has taken it still keeps in memory for a while. A file's bytes are on the disk once the file is flushed
(`fsync`), its name once its folder is, and the folder once the folder above is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actcache.errors import StorageFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ABSENT = (FileNotFoundError, NotADirectoryError)
_CANNOT_FLUSH = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What file systems say that cannot flush a folder, most of which do not need it."""


@contextmanager
def whole_file(path: str, beside: str, *, flushed: bool) -> Iterator[int]:
    """The descriptor of a new file, which takes its place when the block ends, and is removed when that raises.

    Args:
        path: where the file belongs; what is there is replaced.
        beside: where it is written, in the same folder.
        flushed: have its bytes on the disk before it takes its place. Its name is there when the folder is flushed.
    """
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            yield descriptor
            if flushed:
                _sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def write_whole(path: Path, data: bytes, *, beside: str | None = None) -> None:
    """Make or replace a file as a whole, folders included: after a crash or a power cut there is the old or the new.

    Args:
        path: of the file.
        data: all of it.
        beside: name of the unfinished file; by default one that the next write of this file takes over, which is right
            for a file that one process writes.

    Raises:
        StorageFullError: no room; what was there before is untouched.
    """
    with full_disk_explained(f"for {path}: {len(data):,} bytes", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(str(path), str(path.with_name(beside or f"{path.name}.partial")), flushed=True) as descriptor:
            write_all(descriptor, memoryview(data))
    for folder in folders_to_flush(path.absolute().parent):
        flush(folder)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of it, however little the system takes at a time."""
    while data:
        data = data[os.write(descriptor, data) :]


def flush(path: str) -> None:
    """Have a file's bytes, or a folder's names, on the disk; nothing happens where there is nothing (any more)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except _ABSENT:
        return
    try:
        _sync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise
    finally:
        os.close(descriptor)


def _sync(descriptor: int) -> None:
    """Flush an open file; on macOS the drive's own memory too, where `fsync` ends before that."""
    command = getattr(fcntl, "F_FULLFSYNC", None)
    if command is not None:
        with suppress(OSError):  # not every file system of theirs has it
            fcntl.fcntl(descriptor, command)
            return
    os.fsync(descriptor)


def folders_to_flush(folder: Path) -> Iterator[str]:
    """A folder and those above it, as far as they may be new: not beyond its file system, nor what cannot be read."""
    try:
        device = os.stat(folder).st_dev
    except _ABSENT:
        return
    for place in (folder, *folder.parents):
        if not os.access(place, os.R_OK) or os.stat(place).st_dev != device:
            return
        yield str(place)


@contextmanager
def full_disk_explained(what: str, place: Path | None) -> Iterator[None]:
    """Turn the system's "no space left" into our error, which says what was being written and how to go on.

    Args:
        what: for the sentence "no room ... needed": `for runs/a/metrics.json: 1,234 bytes`.
        place: a path on the file system in question, None where nobody knows how much is free.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageFullError) or error.errno not in (*_FULL, errno.EFBIG):
            raise
        if error.errno == errno.EFBIG:
            raise StorageFullError(
                error.errno,
                f"no room {what}: no file may be so large there, by the file system or by 'ulimit -f'; "
                "raise the limit, or name another place, and give the same command again",
            ) from error
        free = free_bytes(place)
        raise StorageFullError(
            error.errno,
            f"no room {what} needed, {'too few' if free is None else f'{free:,}'} free; "
            "make room and give the same command again, it continues where it stopped",
        ) from error


def free_bytes(place: Path | None) -> int | None:
    """Room on the file system that a path is or will be on, None where nobody knows."""
    if place is None:
        return None
    here = place.absolute()
    return shutil.disk_usage(next(folder for folder in (here, *here.parents) if folder.exists())).free
