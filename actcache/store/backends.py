"""Three ways to reach the objects of a store, with the same few methods each: files, a bucket, any zarr store.

Files are in `folders.py`. A bucket (`s3://`, `gs://`, `az://`, `http://`) is asked through obstore from the calling
thread, which costs a fifth of the way through an event loop. Everything else goes through zarr's own asynchronous store
interface.

The methods of `Backend` are those that `Objects` documents; `identity` says what two of them have in common that reach
the same store.
"""

# ruff: noqa: D102 (the methods are those of `Objects`, and documented there)
from __future__ import annotations

import asyncio
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import numpy as np
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import cpu, default_buffer_prototype
from zarr.storage import FsspecStore, LocalStore, ObjectStore

from actcache.errors import ConfigError
from actcache.store.folders import FileBackend

T = TypeVar("T")
_ABSENT = (FileNotFoundError, NotADirectoryError)


class Backend(Protocol):
    """What `Objects` needs; keys and prefixes are relative to the store."""

    identity: Hashable
    """Equal for two backends of this process that reach the same store."""
    shared: bool
    """Whether other processes can reach the store too."""
    creates_once: bool
    """Whether of several who `create` an object at the same moment one does, and not each of them."""

    def get(self, key: str) -> memoryview | None: ...
    def read_into(self, key: str, offset: int, outs: tuple[memoryview, ...]) -> int: ...
    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None: ...
    def pieces(self, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]: ...
    def tail(self, key: str, n_bytes: int) -> memoryview | None: ...
    def size(self, key: str) -> int: ...
    def put(self, key: str, *parts: memoryview | bytes) -> None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def walk(self, prefix: str) -> Iterator[str]: ...
    def names(self, prefix: str) -> list[str]: ...
    def sizes(self, prefix: str) -> dict[str, int]: ...
    def delete(self, key: str) -> None: ...
    def delete_all(self, prefix: str) -> None: ...


class _Loop:
    """One background event loop for the whole process, begun at first use; zarr's stores are asynchronous."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew; a forked child has no copy of the thread, and perhaps a lock that nobody will ever release."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="actcache-io", daemon=True).start()
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()


_LOOP = _Loop()
os.register_at_fork(after_in_child=_LOOP.forget)


class _Whole(ABC):
    """For backends that give an object best in one piece."""

    @abstractmethod
    def get(self, key: str) -> memoryview | None: ...

    @abstractmethod
    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None: ...

    def read_into(self, key: str, offset: int, outs: tuple[memoryview, ...]) -> int:
        data = self.span(key, offset, sum(map(len, outs)))
        return -1 if data is None else _spread(data, outs)

    def pieces(self, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        data = self.get(key) or memoryview(b"")
        for offset, n_bytes in spans:
            yield bytes(data[offset : offset + n_bytes])


class ZarrBackend(_Whole):
    """Any store that zarr opens, through its asynchronous interface."""

    creates_once = False
    identity: Hashable

    def __init__(self, store: Store) -> None:
        self.store = store
        self.shared, self.identity = False, id(store)
        if isinstance(store, FsspecStore):
            self.shared = "memory" not in store.fs.protocol  # a name or a tuple of names
            self.identity = id(store) if self.shared else ("memory", store.path)

    def get(self, key: str) -> memoryview | None:
        return self._request(key, None)

    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None:
        return self._request(key, RangeByteRequest(offset, offset + n_bytes))

    def tail(self, key: str, n_bytes: int) -> memoryview | None:
        data = self._request(key, SuffixByteRequest(n_bytes))
        # What a store does when the object is shorter than that is not the same everywhere.
        return data if data is None or len(data) == n_bytes else _last(self.get(key), n_bytes)

    def _request(self, key: str, wanted: RangeByteRequest | SuffixByteRequest | None) -> memoryview | None:
        buffer = _LOOP.run(self.store.get(key, default_buffer_prototype(), wanted))
        return None if buffer is None else buffer.as_numpy_array().view(np.uint8).data

    def size(self, key: str) -> int:
        try:
            return _LOOP.run(self.store.getsize(key))
        except _ABSENT:
            return -1

    def put(self, key: str, *parts: memoryview | bytes) -> None:
        # A store in memory keeps what it is given, and the caller reuses its buffers.
        _LOOP.run(self.store.set(key, cpu.Buffer.from_bytes(b"".join(parts))))

    def create(self, key: str, data: bytes) -> None:
        _LOOP.run(self.store.set_if_not_exists(key, cpu.Buffer.from_bytes(data)))

    def walk(self, prefix: str) -> Iterator[str]:
        async def collect() -> list[str]:
            return [key async for key in self.store.list_prefix(_folder(prefix))]

        return iter(_LOOP.run(collect()))

    def names(self, prefix: str) -> list[str]:
        return _directly_below(self.walk(prefix), prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        return _LOOP.run(self._sizes(prefix))

    async def _sizes(self, prefix: str) -> dict[str, int]:
        if isinstance(self.store, FsspecStore):  # one question for all of them
            try:
                found = await self.store.fs._ls(f"{self.store.path}/{prefix}", detail=True)
            except _ABSENT:
                return {}
            return {str(item["name"]).rpartition("/")[2]: item["size"] for item in found if item["type"] == "file"}
        folder = _folder(prefix)
        names = [name async for name in self.store.list_dir(prefix)]
        keys = [name for name in names if await self.store.exists(folder + name)]
        return {name: await self.store.getsize(folder + name) for name in keys}

    def delete(self, key: str) -> None:
        _LOOP.run(self._delete([key]))

    def delete_all(self, prefix: str) -> None:
        _LOOP.run(self._delete(list(self.walk(prefix))))

    async def _delete(self, keys: list[str]) -> None:
        """Delete exactly these. zarr's way into fsspec takes `[`, `*` and `?` in a key for a pattern."""
        for key in keys:
            if isinstance(self.store, FsspecStore):
                with suppress(*_ABSENT):
                    await self.store.fs._rm_file(f"{self.store.path}/{key}")
            else:
                await self.store.delete(key)


class BucketBackend(_Whole):
    """An object store behind obstore. Objects above 5 MB go up in parts and appear whole when the last one is there."""

    creates_once = True
    _used_by: int | None = None  # the process whose threads obstore's requests run in

    def __init__(self, store: ObjectStore[Any]) -> None:
        from obstore.store import MemoryStore

        self.store = store
        self.shared = not isinstance(store.store, MemoryStore)
        self.identity: Hashable = id(store.store)

    @property
    def _bucket(self) -> Any:
        """The obstore store. obstore's threads do not survive a fork: a request in the child would wait for ever."""
        if BucketBackend._used_by is None:
            BucketBackend._used_by = os.getpid()
        if BucketBackend._used_by != os.getpid():
            raise ConfigError(
                "object stores cannot be used in a process that was forked after they were used before; start it with "
                "multiprocessing's 'spawn' or 'forkserver' (DataLoader(..., multiprocessing_context='spawn'))"
            )
        return self.store.store

    def get(self, key: str) -> memoryview | None:
        import obstore

        try:
            return memoryview(obstore.get(self._bucket, key).bytes())
        except FileNotFoundError:
            return None

    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None:
        import obstore

        try:
            return memoryview(obstore.get_range(self._bucket, key, start=offset, end=offset + n_bytes))
        except FileNotFoundError:
            return None
        except (obstore.exceptions.BaseError, ValueError):
            size = self.size(key)
            if size <= offset or not n_bytes:  # nothing lies there: servers and obstore call that an error
                return None if size < 0 else memoryview(b"")
            raise

    def tail(self, key: str, n_bytes: int) -> memoryview | None:
        import obstore

        try:
            return memoryview(obstore.get(self._bucket, key, options={"range": {"suffix": n_bytes}}).bytes())
        except FileNotFoundError:
            return None
        except obstore.exceptions.BaseError:
            size = self.size(key)
            if size < 1:  # nothing has no last bytes
                return None if size < 0 else memoryview(b"")
            # Azure knows no suffix ranges.
            return memoryview(obstore.get_range(self._bucket, key, start=max(0, size - n_bytes), end=size))

    def size(self, key: str) -> int:
        import obstore

        try:
            return obstore.head(self._bucket, key)["size"]
        except FileNotFoundError:
            return -1

    def put(self, key: str, *parts: memoryview | bytes) -> None:
        import obstore

        obstore.put(self._bucket, key, b"".join(parts))

    def create(self, key: str, data: bytes) -> None:
        import obstore

        with suppress(obstore.exceptions.AlreadyExistsError):
            obstore.put(self._bucket, key, data, mode="create")

    def walk(self, prefix: str) -> Iterator[str]:
        import obstore

        for batch in obstore.list(self._bucket, prefix or None):
            yield from (found["path"] for found in batch)

    def names(self, prefix: str) -> list[str]:
        import obstore

        found = obstore.list_with_delimiter(self._bucket, prefix or None)["objects"]
        return _directly_below((item["path"] for item in found), prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        import obstore

        found = obstore.list_with_delimiter(self._bucket, prefix or None)["objects"]
        return {item["path"].rpartition("/")[2]: item["size"] for item in found}

    def delete(self, key: str) -> None:
        import obstore

        with suppress(FileNotFoundError):
            obstore.delete(self._bucket, key)

    def delete_all(self, prefix: str) -> None:
        import obstore

        keys = list(self.walk(prefix))
        if keys:
            obstore.delete(self._bucket, keys)


def backend_of(store: Store, *, durable: bool) -> Backend:
    """The quickest way to the objects of a zarr store; `durable` is for folders only."""
    if isinstance(store, LocalStore):
        return FileBackend(store, durable=durable)
    if type(store) is ObjectStore:  # of a subclass nobody knows what it wants to see of the requests
        return BucketBackend(store)
    return ZarrBackend(store)


def _folder(prefix: str) -> str:
    """A prefix as zarr's stores list it, so that `a/b` does not find `a/bc`."""
    return f"{prefix}/" if prefix and not prefix.endswith("/") else prefix


def _directly_below(keys: Iterator[str], prefix: str) -> list[str]:
    skip = len(_folder(prefix))
    return [name for key in keys if "/" not in (name := key[skip:])]


def _last(data: memoryview | None, n_bytes: int) -> memoryview | None:
    return None if data is None else data[max(0, len(data) - n_bytes) :]


def _spread(data: memoryview, outs: tuple[memoryview, ...]) -> int:
    """Copy data over the buffers, one after the other; the bytes copied. numpy lets other threads run meanwhile."""
    done = 0
    for out in outs:
        part = data[done : done + len(out)]
        np.copyto(np.frombuffer(out, np.uint8)[: len(part)], np.frombuffer(part, np.uint8))
        done += len(part)
    return done
