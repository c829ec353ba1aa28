"""Files and paths: files that appear whole or not at all, paths from a caller's argument, JSON with a clear error.

The system keeps what was written in memory for a while. A file's bytes are on the disk once the file is flushed
(`fsync`), its name once its folder is flushed, and the folder once the folder above is flushed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from actcache.errors import ConfigError, StorageFullError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ELSEWHERE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""Errors that another path would solve."""
_MOST_SHOWN = 80
_MOST_PARTS = 512
"""Parts given to the system at a time; Linux takes 1,024."""
_LFS = b"version https://git-lfs.github.com/"
_ABSENT = (FileNotFoundError, NotADirectoryError)
_CANNOT_FLUSH = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Error codes of file systems that cannot flush a folder; most of them do not need it."""


@contextmanager
def whole_file(path: str, beside: str, *, flushed: bool) -> Iterator[int]:
    """The descriptor of a new file, which is renamed to its path when the block ends, and removed if the block raises.

    Args:
        path: where the file belongs; what is there is replaced.
        beside: where it is written, in the same folder.
        flushed: flush its bytes to the disk before it is renamed. Its name is safe once the folder is flushed.
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


def write_whole(path: Path, data: bytes | str, *, beside: str | None = None) -> Path:
    """Write or replace a whole file; its folders are made. After a crash or power cut there is the old file or the new.

    Args:
        path: the file.
        data: all of its content.
        beside: name of the unfinished file; by default one that the next write of the file reuses, which is right for
            a file that only one process writes.

    Raises:
        StorageFullError: no room; what was there before is untouched. ConfigError: there can be no file at this path.
    """
    payload = data.encode() if isinstance(data, str) else data
    with explained(path, f"{len(payload):,} bytes"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(str(path), str(path.with_name(beside or f"{path.name}.partial")), flushed=True) as descriptor:
            write_parts(descriptor, [payload])
    for folder in folders_to_flush(path.absolute().parent):
        flush(folder)
    return path


def own_partial(path: Path) -> str:
    """A name for the unfinished file that differs between processes, for a file that several processes write."""
    return f".{path.name}.{os.getpid()}.partial"


def write_parts(descriptor: int, parts: Iterable[memoryview | bytes]) -> None:
    """Write the parts one after the other, all of them, however little the system takes at a time."""
    left = [memoryview(part).cast("B") for part in parts]
    while left:
        n_bytes = os.writev(descriptor, left[:_MOST_PARTS])
        done = 0
        while done < len(left) and n_bytes >= len(left[done]):
            n_bytes -= len(left[done])
            done += 1
        left = left[done:]
        if n_bytes:
            left[0] = left[0][n_bytes:]


def flush(path: str) -> None:
    """Flush a file's bytes, or a folder's names, to the disk; nothing happens if it does not exist."""
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
    """Flush an open file; on macOS also the drive's own memory, which `fsync` leaves out there."""
    command = getattr(fcntl, "F_FULLFSYNC", None)
    if command is not None:
        with suppress(OSError):  # not every file system of macOS has it
            fcntl.fcntl(descriptor, command)
            return
    os.fsync(descriptor)


def folders_to_flush(folder: Path) -> Iterator[str]:
    """A folder and those above it that may be new: up to the file system's root, or to one that cannot be read."""
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
    """Turn the system's "no space left" into our error, which says what was being written and how to continue.

    Args:
        what: completes the sentence "no room ... needed": `for runs/a/metrics.json: 1,234 bytes`.
        place: a path on the file system in question, None where free room is unknown.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageFullError) or error.errno not in (*_FULL, errno.EFBIG):
            raise
        if error.errno == errno.EFBIG:
            raise StorageFullError(
                error.errno,
                f"no room {what}: the file system or 'ulimit -f' allows no file that large; "
                "raise the limit, or name another place, and give the same command again",
            ) from error
        free = free_bytes(place)
        raise StorageFullError(
            error.errno,
            f"no room {what} needed, {'too few' if free is None else f'{free:,}'} free; "
            "make room and give the same command again, it continues where it stopped",
        ) from error


def free_bytes(place: Path | None) -> int | None:
    """Free bytes of the file system that a path is or will be on, None without a path."""
    if place is None:
        return None
    here = place.absolute()
    return shutil.disk_usage(next(folder for folder in (here, *here.parents) if folder.exists())).free


@contextmanager
def explained(path: Path, needed: str = "more bytes") -> Iterator[None]:
    """Add the path to errors of the system: those of a write do not name it."""
    try:
        with full_disk_explained(f"for {path}: {needed}", path):
            yield
    except OSError as error:
        if isinstance(error, StorageFullError):
            raise
        if error.errno in _ELSEWHERE:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from error
        raise type(error)(error.errno, error.strerror, str(path)) from error


def path_of(given: Any, what: str) -> Path:
    """A path from a text or a path; `~` is the home folder.

    Raises:
        ConfigError: it is neither, or is empty, or cannot name anything on a disk.
    """
    if not isinstance(given, str | os.PathLike) or not isinstance(text := os.fspath(given), str):
        raise ConfigError(f"{what} must be a path, got {shown(given)}")
    if not text or "\0" in text:
        raise ConfigError(f"{what} must be the path of something, got {text!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what}: {text} names the home folder of an unknown user; give the whole path") from error


def shown(value: Any) -> str:
    """A value as a message can show it: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # a number of ten thousand digits, a list ten thousand deep, any class
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON; the message says why. OSError: it cannot be read.
    """
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON; the message says why.
    """
    if data.startswith(_LFS):
        raise ValueError("is a git-lfs pointer and not the file itself: run 'git lfs pull'")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from error


def why_not_tensors(path: Path, error: Exception) -> str:
    """Why a safetensors file could not be read, to complete a sentence about it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as reason:
        return f"cannot be read ({reason.strerror})"
    if start == _LFS:
        return "is a git-lfs pointer and not the tensors: run 'git lfs pull'"
    return f"is damaged, cut short or not a safetensors file ({error})"


def finite(value: Any) -> Any:
    """The value with numbers that JSON cannot hold (NaN, infinity) replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
