"""Memory of batches, reused once the last tensor on it is gone.

In: shapes and dtypes. Out: uninitialised tensors on the CPU.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.kernels.bits import bits_tensor

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
"""Bytes: a cache line, and what JAX requires of memory that it takes over without a copy."""


def _aligned(shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    n_bytes = shape[0] * shape[1] * dtype.itemsize
    memory = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + n_bytes].view(dtype).reshape(shape)


_STORED = {
    "torch.bfloat16": "<u2",
    "torch.float16": "<f2",
    "torch.float32": "<f4",
    "torch.float64": "<f8",
    "torch.int8": "|i1",
    "torch.int64": "<i8",
}


class BatchMemory:
    """Batch buffers, handed out as tensors and taken back when the last tensor or view on one is gone.

    `torch.from_numpy` keeps its array alive for as long as any tensor shares the memory. Each tensor gets its own array
    object, a view of a kept buffer, and the buffer is free again when that object dies. So a consumer may keep or
    modify the tensors it gets.

    Args:
        allocate: makes a buffer `(n_rows, width)`; by default in the memory of this process.
    """

    def __init__(self, allocate: Callable[[tuple[int, int], np.dtype[Any]], NDArray[Any]] = _aligned) -> None:
        self._allocate = allocate
        self._free: dict[tuple[int, int, str], list[NDArray[Any]]] = {}
        self._lent: dict[int, _Lent] = {}
        self._returned: deque[weakref.ref[NDArray[Any]]] = deque()

    def take(self, n_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised `(n_rows, width)` tensor."""
        self._take_back()
        stored = _STORED[str(dtype)]
        free = self._free.setdefault((n_rows, width, stored), [])
        kept = free.pop() if free else self._allocate((n_rows, width), np.dtype(stored))
        handed_out = kept[:]
        # The callback is not a Python function: an interrupt inside one would be lost, like all errors there.
        lent = _Lent(handed_out, self._returned.append)
        lent.kept, lent.free = kept, free
        self._lent[id(lent)] = lent
        return bits_tensor(handed_out, str(dtype).removeprefix("torch."))

    def _take_back(self) -> None:
        """Free the buffers whose tensors are gone."""
        while self._returned:
            lent = self._lent.pop(id(self._returned.popleft()))
            lent.free.append(lent.kept)


class _Lent(weakref.ref[NDArray[Any]]):
    """A weak reference to the array of a tensor, with the buffer below it."""

    kept: NDArray[Any]
    free: list[NDArray[Any]]
