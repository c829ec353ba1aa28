"""Whole objects of a Zarr store, synchronously: put, get, read a range into a buffer, list, delete.

Everything goes through zarr's own store interface (so any store that zarr opens will do), except that ranges of local
files are read straight into the caller's buffer: on hot paths the first touch of fresh memory costs more than the copy.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from zarr.abc.store import RangeByteRequest, Store
from zarr.buffer import cpu, default_buffer_prototype
from zarr.storage import LocalStore

from actcache.errors import ConfigError, StorageFullError

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Loop:
    """One background event loop for the whole process, begun at first use; zarr's stores are asynchronous."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._loop is None or self._pid != os.getpid():  # a forked child has no copy of the thread
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="actcache-io", daemon=True).start()
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()


_LOOP = _Loop()


class Objects:
    """The objects of one store. Thread-safe; picklable stores stay the caller's business."""

    def __init__(self, location: str | Path | Store, *, read_only: bool) -> None:
        self.location = location
        if isinstance(location, Store):
            self.store = location
        elif "://" in str(location):
            raise ConfigError(
                f"{location} is a URL, and this version writes and reads local folders; "
                "give a path, or a zarr store object"
            )
        else:
            self.store = LocalStore(Path(location), read_only=read_only)
        self.root = self.store.root if isinstance(self.store, LocalStore) else None
        self._root = None if self.root is None else str(self.root)

    def __str__(self) -> str:
        return str(self.location)

    def put(self, key: str, data: memoryview | bytes) -> None:
        """Write one object whole and atomically.

        Raises:
            StorageFullError: there is no room; what was there before is untouched.
        """
        # A store in memory keeps what it is given, and the caller reuses its buffer; a file is written and done with.
        kept = np.frombuffer(data if self.root is not None else bytes(data), dtype=np.uint8)
        with self.full_disk_explained(f"{key}: {len(data):,} bytes"):
            _LOOP.run(self.store.set(key, cpu.Buffer.from_array_like(kept)))

    @contextmanager
    def full_disk_explained(self, what: str) -> Iterator[None]:
        """Turn the system's "no space left" into our error, which says what was needed and how to go on."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            free = f"{shutil.disk_usage(self.root).free:,}" if self.root else "too few"
            raise StorageFullError(
                error.errno,
                f"no room in {self} for {what} needed, {free} free; "
                "make room and give the same command again, it continues where it stopped",
            ) from error

    def get(self, key: str) -> memoryview | None:
        """The whole object, or None when there is none."""
        if self.root is not None:
            try:
                return memoryview((self.root / key).read_bytes())
            except (FileNotFoundError, NotADirectoryError):
                return None
        buffer = _LOOP.run(self.store.get(key, prototype=default_buffer_prototype()))
        return None if buffer is None else memoryview(buffer.to_bytes())

    def read_into(self, key: str, offset: int, *outs: memoryview) -> int:
        """Fill the buffers, one after the other, from byte `offset` on.

        Returns the bytes read, fewer than asked for where the object ends, or -1 when there is no object.
        """
        if self._root is None:
            request = RangeByteRequest(offset, offset + sum(map(len, outs)))
            buffer = _LOOP.run(self.store.get(key, prototype=default_buffer_prototype(), byte_range=request))
            if buffer is None:
                return -1
            data, done = memoryview(buffer.to_bytes()), 0
            for out in outs:
                part = data[done : done + len(out)]
                out[: len(part)] = part
                done += len(part)
            return done
        try:
            descriptor = os.open(f"{self._root}/{key}", os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        try:
            return os.preadv(descriptor, outs, offset)
        finally:
            os.close(descriptor)

    def size(self, key: str) -> int:
        """Bytes of an object, -1 when there is none."""
        if self.root is not None:
            try:
                return (self.root / key).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                return -1
        try:
            return _LOOP.run(self.store.getsize(key))
        except FileNotFoundError:
            return -1

    def list(self, prefix: str) -> Iterator[str]:
        """Keys of all objects below a prefix."""

        async def collect() -> list[str]:
            return [key async for key in self.store.list_prefix(prefix)]

        return iter(_LOOP.run(collect()))

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""
        _LOOP.run(self.store.delete(key))

    def remove_partial_writes(self) -> None:
        """Delete what a killed process left of unfinished atomic writes (zarr names such files `*.partial`)."""
        if self.root is not None:
            for file in self.root.rglob("*.partial"):
                file.unlink(missing_ok=True)
