"""The socket of a server: used by one server at a time, open to this user only, and removed by its owner only.

In: a path. Out: a listening socket there, whose file is gone in the end.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from actcache.errors import ServingError

_WAIT_S, _TRY_EVERY_S, _ANSWER_S = 10.0, 0.02, 1.0
_NO_FLOCK = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Errors of file systems without such locks."""


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket at a path that only this user may connect to; the path is free again in the end.

    The socket that a dead server left behind is replaced. The folder is locked meanwhile: of two servers that find the
    same dead socket, one could otherwise remove the other's new one.

    Raises:
        ServingError: a server is already there, something at the path is not a socket, or a socket cannot be made.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        with _alone_in(path.parent, path):
            _make_way(path)
            try:
                listener.bind(str(path))
            except OSError as error:
                raise ServingError(f"no socket can be made at {path}: {error}; give another path") from error
            mine = _identity(path)
        try:
            path.chmod(0o600)  # nobody can connect before `listen`
            listener.listen()
            listener.setblocking(False)
            yield listener
        finally:
            # The listener is still open, so no other file can have its inode number.
            with suppress(OSError), _alone_in(path.parent, path):
                if _identity(path) == mine:
                    path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _make_way(path: Path) -> None:
    """Remove the socket of a dead server."""
    with suppress(FileNotFoundError):
        try:
            is_socket = stat.S_ISSOCK(path.lstat().st_mode)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ServingError(f"no socket can be made at {path}: {error}; give another path") from error
        if not is_socket:
            raise ServingError(f"{path} is there and is no socket; give another path")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_ANSWER_S)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            except PermissionError as error:
                raise ServingError(f"{path} is the socket of another user; give another path") from error
            except (TimeoutError, BlockingIOError):  # a server that is busy
                raise _taken(path) from None
            else:
                raise _taken(path)


def _taken(path: Path) -> ServingError:
    return ServingError(f"a server is at {path} already; connect to it, or give another path")


@contextmanager
def _alone_in(folder: Path, path: Path) -> Iterator[None]:
    """With a lock on the folder, if the file system has locks; it leaves no file behind."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ServingError(f"no socket can be made at {path}: {error}; give another path") from error
    try:
        mode = os.fstat(descriptor).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            warnings.warn(
                f"every user of this machine may replace the socket in {folder}, and so give consumers other batches; "
                "use a folder that only you may write to",
                stacklevel=2,
            )
        _lock(descriptor, path)
        yield
    finally:
        with suppress(OSError):  # closing is not enough: a child process may have the folder open, too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    last = monotonic() + _WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() > last:
                message = f"another process has locked the folder of {path}; give another path"
                raise ServingError(message) from None
            sleep(_TRY_EVERY_S)
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return None
            raise
