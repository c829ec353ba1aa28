"""Memory that several processes share: buffers that one of them writes and the others read.

It is anonymous: it has no name in a file system. Processes get its descriptor over a socket, and the kernel frees it
with the last of them, however they end. No reader can take it away from the others, or write to it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ServingError

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
"""Bytes: a cache line."""
_MOST_BYTES = 1 << 40
"""Bytes of address space that are reserved; only what has been written to takes memory."""
_FEWEST_REGIONS = 16
_SEAL_FUTURE_WRITE = 0x10
"""`F_SEAL_FUTURE_WRITE` of Linux 5.1, for which Python has no name: only existing mappings may be written to."""


class SharedMemory:
    """Memory that grows by regions, with buffers in it that other processes find by offset.

    It is mapped as large as it can ever be, and then sealed: no process can make it smaller, which would kill all that
    read it, and only this process can write to it. Any process may let it grow, which is harmless.

    Args:
        sizes: bytes of the buffers of a batch, for which a region has room. Each region that another process maps takes
            one of its few descriptors.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.region_bytes = _up(sum(_up(size, _ALIGNMENT) for size in sizes), mmap.ALLOCATIONGRANULARITY)
        self.descriptor = _anonymous_memory()
        self._mapped = self._map(_FEWEST_REGIONS * self.region_bytes)
        _seal(self.descriptor)
        self._n_regions = 0
        self._used = self.region_bytes
        """Bytes that are used of the last region."""
        self._offsets: dict[int, int] = {}
        self._alone = threading.Lock()

    def _map(self, fewest_bytes: int) -> mmap.mmap:
        """Address space for all regions that there may ever be, or as much as the limits of this process allow."""
        n_bytes = max(_MOST_BYTES, fewest_bytes)
        while True:
            try:
                os.ftruncate(self.descriptor, n_bytes)
                mapped = mmap.mmap(self.descriptor, n_bytes)
                break
            except OSError as error:
                n_bytes //= 2
                if n_bytes < fewest_bytes:
                    os.close(self.descriptor)
                    raise ServingError(
                        f"cannot share at least {fewest_bytes:,} bytes of memory ({error.strerror}); serve fewer rows "
                        "a batch, or raise the limits of this process (ulimit -v, ulimit -f)"
                    ) from error
        os.ftruncate(self.descriptor, 0)
        if hasattr(mmap, "MADV_DONTDUMP"):
            mapped.madvise(mmap.MADV_DONTDUMP)
        return mapped

    def allocate(self, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A new buffer."""
        n_bytes = math.prod(shape) * dtype.itemsize
        with self._alone:
            if self._used + n_bytes > self.region_bytes:
                self._add_region()
            begin = (self._n_regions - 1) * self.region_bytes + self._used
            self._used += _up(n_bytes, _ALIGNMENT)
            buffer = np.frombuffer(self._mapped, dtype, math.prod(shape), begin)
            self._offsets[buffer.ctypes.data] = begin
        return buffer.reshape(shape)

    def _add_region(self) -> None:
        n_bytes = (self._n_regions + 1) * self.region_bytes
        if n_bytes > len(self._mapped):
            raise ServingError(f"there is no room for more than {len(self._mapped):,} bytes of batches")
        if os.fstat(self.descriptor).st_size < n_bytes:
            os.ftruncate(self.descriptor, n_bytes)
        self._n_regions, self._used = self._n_regions + 1, 0

    def offset_of(self, tensor: torch.Tensor) -> int:
        """The offset at which a tensor's buffer begins."""
        return self._offsets[tensor.data_ptr()]

    def close(self) -> None:
        """Close the descriptor; mapped memory stays as long as somebody uses it."""
        os.close(self.descriptor)


class MappedMemory:
    """The buffers of another process, to read. This object owns the descriptor from now on."""

    def __init__(self, descriptor: int, region_bytes: int) -> None:
        self._descriptor, self._region_bytes = descriptor, region_bytes
        weakref.finalize(self, os.close, descriptor).atexit = False
        self._regions: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._buffers: dict[int, torch.Tensor] = {}

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A buffer, always in the same shape and dtype. Writing to it would crash the process.

        Raises:
            OSError, ValueError: there is no such buffer.
        """
        import torch

        if offset not in self._buffers:
            region, begin = divmod(offset, self._region_bytes)
            flat = torch.frombuffer(self._region(region), dtype=dtype, count=math.prod(shape), offset=begin)
            self._buffers[offset] = flat.view(shape)
        return self._buffers[offset]

    def _region(self, number: int) -> ctypes.Array[ctypes.c_char]:
        if number not in self._regions:
            first = number * self._region_bytes
            mapped = mmap.mmap(self._descriptor, self._region_bytes, offset=first, access=mmap.ACCESS_READ)
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            # torch warns about read-only memory, so it gets a view that does not say so.
            view = (ctypes.c_char * self._region_bytes).from_address(address)
            view.mapped = mapped  # type: ignore[attr-defined]  # lives as long as any tensor on it
            self._regions[number] = view
        return self._regions[number]


def _up(n_bytes: int, multiple: int) -> int:
    return -(-n_bytes // multiple) * multiple


def _anonymous_memory() -> int:
    """A descriptor of anonymous memory; of a file without a name if the system has no anonymous memory."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("actcache-batches", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _seal(descriptor: int) -> None:
    """Forbid to shrink the memory, and to map it for writing from now on; as far as the system can do that."""
    import fcntl

    if not hasattr(fcntl, "F_ADD_SEALS"):
        return
    for seals in (fcntl.F_SEAL_SHRINK | _SEAL_FUTURE_WRITE, fcntl.F_SEAL_SHRINK):
        with suppress(OSError):  # an older kernel; or a file, which has no seals
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
            return
