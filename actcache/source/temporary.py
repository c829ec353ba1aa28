"""Temporary files of tokens: written as they come, read in another order, and gone when nobody holds their arrays."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, NoReturn

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, StorageFullError

_BYTES_PER_COPY = 1 << 25


def read_permuted(
    file: IO[bytes], order: NDArray[np.int64], length: int, digest: Callable[[bytes], object]
) -> NDArray[np.uint32]:
    """The file's sequences in the given order, memory-mapped from another file; their bytes go through `digest`."""
    try:
        file.flush()
        packed = np.memmap(file, dtype="<u4", mode="r", shape=(len(order), length))
        sequences_per_copy = max(1, _BYTES_PER_COPY // (4 * length))
        with temporary_file() as target:
            for start in range(0, len(order), sequences_per_copy):
                block = packed[order[start : start + sequences_per_copy]].tobytes()
                target.write(block)
                digest(block)
            target.flush()
            # Copy-on-write: writing into the array changes neither the file nor other views of it.
            return np.memmap(target, dtype="<u4", mode="c", shape=packed.shape)
    except OSError as error:
        raise_no_room(error)


@contextmanager
def temporary_file() -> Iterator[IO[bytes]]:
    """An anonymous file in `TMPDIR`."""
    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115  # closed below
    except OSError as error:
        raise_no_room(error)
    try:
        yield file
    finally:
        # Data that could not be written is not needed any more, or the lack of room has been reported.
        with suppress(OSError):
            file.close()


def raise_no_room(error: OSError) -> NoReturn:
    """Raise an error that says where temporary files are, and how to give them more room."""
    if isinstance(error, FileNotFoundError) and error.filename is None:
        # Python found no folder that it can write to.
        raise StorageFullError(
            errno.ENOSPC,
            f"no folder for temporary files has room ({error.strerror}); set the environment variable TMPDIR to one "
            "that has",
        ) from error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise StorageFullError(
            error.errno,
            f"no room in {tempfile.gettempdir()}, where tokens lie until they are in order (about twelve bytes a "
            "token); set the environment variable TMPDIR to a folder that has more",
        ) from error
    raise ConfigError(
        f"temporary files cannot be written ({error.strerror or error}); set the environment variable TMPDIR to a "
        "folder that can be written"
    ) from error
