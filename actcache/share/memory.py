"""Memory that several processes share: buffers that one of them writes and the others read.

It is anonymous: no file bears its name. Processes get its descriptor over a socket, and the kernel frees it with the
last of them, however they end.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
"""Bytes: a cache line."""


class SharedMemory:
    """Memory that grows by regions, in which there is room for buffers; others find a buffer by its offset.

    Args:
        sizes: bytes of the buffers that a region has room for: those of a batch. Each region that a process maps takes
            one of its descriptors, which are few.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.descriptor = _anonymous_memory()
        self.region_bytes = _up(sum(_up(size, _ALIGNMENT) for size in sizes), mmap.ALLOCATIONGRANULARITY)
        self._regions: list[mmap.mmap] = []
        self._used = self.region_bytes
        """Bytes of the last region."""
        self._offsets: dict[int, int] = {}
        self._alone = threading.Lock()

    def allocate(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A new buffer."""
        n_bytes = math.prod(shape) * dtype.itemsize
        with self._alone:
            if self._used + n_bytes > self.region_bytes:
                self._add_region()
            begin, self._used = self._used, self._used + _up(n_bytes, _ALIGNMENT)
            buffer = np.frombuffer(self._regions[-1], dtype, math.prod(shape), begin)
            self._offsets[buffer.ctypes.data] = (len(self._regions) - 1) * self.region_bytes + begin
        return buffer.reshape(shape)

    def _add_region(self) -> None:
        first, self._used = len(self._regions) * self.region_bytes, 0
        os.ftruncate(self.descriptor, first + self.region_bytes)
        self._regions.append(mmap.mmap(self.descriptor, self.region_bytes, offset=first))

    def offset_of(self, tensor: torch.Tensor) -> int:
        """Where the buffer of a tensor begins."""
        return self._offsets[tensor.data_ptr()]

    def close(self) -> None:
        """Close the descriptor; what is mapped stays until nobody looks at it."""
        os.close(self.descriptor)


class MappedMemory:
    """The buffers of another process; the descriptor is this object's from now on."""

    def __init__(self, descriptor: int, region_bytes: int) -> None:
        self._descriptor, self._region_bytes = descriptor, region_bytes
        weakref.finalize(self, os.close, descriptor).atexit = False
        self._regions: dict[int, mmap.mmap] = {}
        self._buffers: dict[int, torch.Tensor] = {}

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer, which is always asked for in the same shape and dtype."""
        import torch

        if offset not in self._buffers:
            region, begin = divmod(offset, self._region_bytes)
            if region not in self._regions:
                first = region * self._region_bytes
                self._regions[region] = mmap.mmap(self._descriptor, self._region_bytes, offset=first)
            flat = torch.frombuffer(self._regions[region], dtype=dtype, count=math.prod(shape), offset=begin)
            self._buffers[offset] = flat.view(shape)
        return self._buffers[offset]


def _up(n_bytes: int, multiple: int) -> int:
    return -(-n_bytes // multiple) * multiple


def _anonymous_memory() -> int:
    """A descriptor of memory without a name; where there is no such thing, of a file without a name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("actcache-batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
