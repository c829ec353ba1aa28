"""Small files and paths: a path from what a caller gave, a file written in one step, JSON read with a clear reason.

In: what callers and other programs have written. Out: paths, bytes on the disk, plain values; or one of our errors.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actcache.errors import ConfigError, StorageFullError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ELSEWHERE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""What another path would mend."""
_MOST_SHOWN = 80
_LFS = b"version https://git-lfs.github.com/"


def path_of(given: Any, what: str) -> Path:
    """A path from a text or a path, `~` being the home folder.

    Raises:
        ConfigError: it is neither, or empty, or cannot name anything on a disk.
    """
    if not isinstance(given, str | os.PathLike) or not isinstance(text := os.fspath(given), str):
        raise ConfigError(f"{what} must be a path, got {shown(given)}")
    if not text or "\0" in text:
        raise ConfigError(f"{what} must be the path of something, got {text!r}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what}: {text} names the home folder of nobody here") from error


def shown(value: Any) -> str:
    """A value as a message can show it: short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # a number of ten thousand digits, a list ten thousand deep, somebody's class
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is no JSON; the message says why. OSError: it cannot be read.
    """
    return parse_json(path.read_bytes())


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON; the message says why.
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
    """Why a safetensors file could not be read, as the end of a sentence about it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as reason:
        return f"cannot be read ({reason.strerror})"
    if start == _LFS:
        return "is a git-lfs pointer and not the tensors: run 'git lfs pull'"
    return f"is damaged, cut short or no safetensors file ({error})"


def write_atomic(path: Path, data: bytes | str) -> Path:
    """Replace a file as a whole: whatever happens, there is the old one or the new one. Makes its folder.

    Raises:
        StorageFullError: there is no room. ConfigError: there can be no such file; name another place.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the system that name the path: those of a write say nothing of it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            sentence = f"no room to write {path} ({error.strerror}); make room and give the same command again"
            raise StorageFullError(error.errno, sentence) from error
        if error.errno in _ELSEWHERE:
            raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from error
        raise type(error)(error.errno, error.strerror, str(path)) from error
