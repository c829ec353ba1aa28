"""Any store that zarr opens, through zarr's asynchronous interface."""

# ruff: noqa: D102 (the methods are documented in `Backend`)
from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Hashable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np
from zarr.abc.store import RangeByteRequest, Store, SuffixByteRequest
from zarr.buffer import cpu, default_buffer_prototype
from zarr.storage import FsspecStore

from actcache.store.backends.backend import ABSENT, Backend, T, as_folder, last_bytes


class _Loop:
    """One event loop in a thread of its own for the whole process, started at first use; zarr's stores are
    asynchronous."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start again: a forked child does not have the thread, and may have a lock that is never released."""
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


class ZarrBackend(Backend):
    """Any store that zarr opens, through its asynchronous interface."""

    creates_once = False

    def __init__(self, store: Store) -> None:
        self.store, self.shared = store, False
        self.identity: Hashable = id(store)
        if isinstance(store, FsspecStore):
            self.shared = "memory" not in store.fs.protocol  # a name or a tuple of names
            self.identity = id(store) if self.shared else ("memory", store.path)

    def get(self, key: str) -> memoryview | None:
        return self._request(key, None)

    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None:
        return self._request(key, RangeByteRequest(offset, offset + n_bytes))

    def tail(self, key: str, n_bytes: int) -> memoryview | None:
        data = self._request(key, SuffixByteRequest(n_bytes))
        # Stores differ in what they do when the object is shorter than that.
        return data if data is None or len(data) == n_bytes else last_bytes(self.get(key), n_bytes)

    def _request(self, key: str, wanted: RangeByteRequest | SuffixByteRequest | None) -> memoryview | None:
        buffer = _LOOP.run(self.store.get(key, default_buffer_prototype(), wanted))
        return None if buffer is None else buffer.as_numpy_array().view(np.uint8).data

    def size(self, key: str) -> int:
        try:
            return _LOOP.run(self.store.getsize(key))
        except ABSENT:
            return -1

    def put(self, key: str, *parts: memoryview | bytes) -> None:
        # A store in memory keeps what it is given, and the caller reuses its buffers.
        _LOOP.run(self.store.set(key, cpu.Buffer.from_bytes(b"".join(parts))))

    def create(self, key: str, data: bytes) -> None:
        _LOOP.run(self.store.set_if_not_exists(key, cpu.Buffer.from_bytes(data)))

    def walk(self, prefix: str) -> Iterator[str]:
        async def collect() -> list[str]:
            return [key async for key in self.store.list_prefix(as_folder(prefix))]

        return iter(_LOOP.run(collect()))

    def sizes(self, prefix: str) -> dict[str, int]:
        return _LOOP.run(self._sizes(prefix))

    async def _sizes(self, prefix: str) -> dict[str, int]:
        if isinstance(self.store, FsspecStore):  # one listing, not a request for each
            try:
                found = await self.store.fs._ls(f"{self.store.path}/{prefix}", detail=True)
            except ABSENT:
                return {}
            return {str(item["name"]).rpartition("/")[2]: item["size"] for item in found if item["type"] == "file"}
        folder = as_folder(prefix)
        names = [name async for name in self.store.list_dir(prefix)]
        keys = [name for name in names if await self.store.exists(folder + name)]
        return {name: await self.store.getsize(folder + name) for name in keys}

    def delete(self, key: str) -> None:
        _LOOP.run(self._delete([key]))

    def delete_all(self, prefix: str) -> None:
        _LOOP.run(self._delete(list(self.walk(prefix))))

    async def _delete(self, keys: list[str]) -> None:
        """Delete exactly these keys: zarr's own call into fsspec reads `[`, `*` and `?` in a key as a pattern."""
        for key in keys:
            if isinstance(self.store, FsspecStore):
                with suppress(*ABSENT):
                    await self.store.fs._rm_file(f"{self.store.path}/{key}")
            else:
                await self.store.delete(key)
