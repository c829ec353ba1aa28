"""The threads of a loader that read and decode.

Encoding and decoding threads keep their normal priority. Lowering it (nice 10), so that they would not preempt the
model's threads, was tried once by hand, two rounds: training fell from 0.90 and 0.84 of the bare loop to 0.73 and 0.77,
extraction at 8 sites stayed, and extraction at 2 sites rose a little.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from actcache.load.speed import Clock
from actcache.memory import keep_freed_memory

_REQUESTS = 128
"""Requests at a time to a store that is not a folder, each of which mostly waits. At 20 ms a request and a quarter of
a megabyte a chunk, that allows 1.6 GB/s."""


class Pools:
    """One pool of threads that decode; for stores that answer slowly, another of many threads that wait for bytes."""

    def __init__(self, threads: int, clock: Clock, *, is_local: bool) -> None:
        self.clock = clock
        self.threads = threads
        self.closing = False
        self.decode = ThreadPoolExecutor(threads, thread_name_prefix="actcache-decode")
        self.fetch = None
        if not is_local:
            keep_freed_memory()  # each answer arrives in new memory
            self.fetch = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="actcache-fetch")

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing = True
        if self.fetch is not None:
            self.fetch.shutdown(cancel_futures=True)
        self.decode.shutdown(cancel_futures=True)
