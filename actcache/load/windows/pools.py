"""The threads that read and decode."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from actcache.load.speed import Clock
from actcache.memory import keep_freed_memory

_REQUESTS = 128
"""Requests at a time to a store that is not a folder: each waits most of its time. At 20 ms a request and a quarter of
a megabyte a chunk, that is room for 1.6 GB/s."""


class Pools:
    """The threads of a loader: some that decode, and for stores that answer slowly many that wait for their bytes."""

    def __init__(self, threads: int, clock: Clock, *, is_local: bool) -> None:
        self.clock, self.threads, self.closing = clock, threads, False
        self.decode = ThreadPoolExecutor(threads, thread_name_prefix="actcache-decode")
        self.fetch = None
        if not is_local:
            keep_freed_memory()  # every answer comes in memory of its own
            self.fetch = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="actcache-fetch")

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing = True
        if self.fetch is not None:
            self.fetch.shutdown(cancel_futures=True)
        self.decode.shutdown(cancel_futures=True)
