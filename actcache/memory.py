"""How the process keeps memory: the first touch of fresh pages costs several times a copy, so freed blocks are kept.

dask sets `MALLOC_TRIM_THRESHOLD_` for its workers, which switches this off: allocating and filling two tensors of 4 MiB
400 times took 1.54 s instead of 0.08 s. Where the environment sets malloc's parameters, both thresholds are raised by
hand.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

_MOST_MMAP_THRESHOLD = 32 << 20
_SET_BY_ENVIRONMENT = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Make the C allocator keep a loop's large tensors instead of giving their pages back and faulting them in again.

    Freeing a block raises glibc's mmap threshold to its size, 32 MiB at most (mallopt(3), M_MMAP_THRESHOLD); not where
    the environment sets any of its parameters, as dask does for its workers. There both thresholds are raised at once.
    """
    import torch

    if any(name in os.environ for name in _SET_BY_ENVIRONMENT):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
            mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_MMAP_THRESHOLD)
    torch.empty(31 << 20, dtype=torch.uint8)


class Scratch:
    """Bytes that are reused from call to call (one per thread): fresh memory is expensive on hot paths."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> memoryview:
        """`n_bytes` writable bytes, valid until the next call."""
        if len(self._bytes) < n_bytes:
            self._bytes = np.empty(n_bytes, np.uint8)
        return self._bytes.data[:n_bytes]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward pass failed for lack of memory, whatever the device calls that."""
    import torch

    said = str(error).lower()
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in said for text in texts)


Key = TypeVar("Key")
Value = TypeVar("Value")


class Kept(Generic[Key, Value]):
    """A cache of values that have been read, the latest ones that fit; a hit takes no lock."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._n_bytes = most_bytes, 0
        self._values: dict[Key, tuple[Value, int]] = {}
        self._guards: dict[Key, threading.Lock] = {}
        self._changing = threading.Lock()

    def get(self, key: Key, read: Callable[[], tuple[Value, int]]) -> Value:
        """The value of a key; if it is missing, from `read`, which also says how many bytes of memory it takes."""
        if (found := self._values.get(key)) is None:
            # If many threads need it at once, one reads it, which takes long in a store that is far away.
            with self._guards.setdefault(key, threading.Lock()):
                if (found := self._values.get(key)) is None:
                    found = read()
                    self._keep(key, found)
        return found[0]

    def _keep(self, key: Key, found: tuple[Value, int]) -> None:
        with self._changing:
            self._values[key] = found
            self._n_bytes += found[1]
            while self._n_bytes > self._most_bytes and len(self._values) > 1:
                oldest = next(iter(self._values))
                self._n_bytes -= self._values.pop(oldest)[1]
                self._guards.pop(oldest, None)
