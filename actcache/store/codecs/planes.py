"""Blosc frames made for floating-point values: zstd over the bytes of each place, coded by how often they occur.

The bytes that hold sign and exponent take few values, in no order; those of the fraction are noise. zstd looks for
repeated sequences first, finds short ones by chance, and is slower in writing and reading them than in coding each byte
by how often it occurs. With a table of 64 places for sequences it hardly finds any, which is twice as fast to write,
half as much again faster to read, and for most sites smaller (`docs/codecs.md`). Numcodecs has no such setting, so the
frames are put together here; every Blosc reads them.

Frames of most sites are 1 to 2 % smaller than numcodecs' own of level 1; for the first residual streams of a model,
whose rows repeat with the tokens, they are 4 % larger.
"""

from __future__ import annotations

import struct
import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

from actcache.kernels import split_planes
from actcache.memory import Scratch

_FORMAT, _ZSTD_FORMAT = 2, 1
_FLAGS = 4 << 5 | 1 << 4 | 1
"""zstd; blocks that are not split further; bytes shuffled (c-blosc, README_HEADER.rst)."""
_WORDS = {2: np.uint16, 4: np.uint32, 8: np.uint64}
ITEMSIZES = tuple(_WORDS)
"""Bytes of the values that can be compressed here."""
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, hash_log=6, min_match=7, target_length=0, window_log=20
)


class _Own(threading.local):
    """What each thread has for itself: fresh memory is expensive on hot paths, and a compressor serves one thread."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.planes, self.shifted = Scratch(), Scratch()


_own = _Own()


def compress_planes(data: NDArray[np.uint8], itemsize: int, block_bytes: int) -> bytes:
    """The Blosc frame of flat bytes, which are values of 2, 4 or 8 bytes each."""
    blocks = [_block(data[start : start + block_bytes], itemsize) for start in range(0, len(data), block_bytes)]
    first = 16 + 4 * len(blocks)
    starts = [first]
    for block in blocks:
        starts.append(starts[-1] + 4 + len(block))
    sizes = len(data), min(block_bytes, len(data)), starts.pop()
    head = struct.pack(f"<4B3I{len(blocks)}I", _FORMAT, _ZSTD_FORMAT, _FLAGS, itemsize, *sizes, *starts)
    return b"".join([head, *(part for block in blocks for part in (struct.pack("<I", len(block)), block))])


def _block(data: NDArray[np.uint8], itemsize: int) -> bytes:
    """A block of a frame: compressed, or as it is where that saves nothing."""
    planes = _planes(data, itemsize)
    block: bytes = _own.compressor.compress(planes.data)
    return block if len(block) < len(data) else planes.tobytes()


def _planes(data: NDArray[np.uint8], itemsize: int) -> NDArray[np.uint8]:
    """First all lowest bytes, then all next ones, and so on; valid until this thread's next call."""
    values = data.view(_WORDS[itemsize])
    n = len(values)
    planes = np.frombuffer(_own.planes.take(len(data)), np.uint8)
    kernel = split_planes()
    if kernel is not None and itemsize == 2:
        kernel(values, planes[:n], planes[n:])
        return planes
    shifted = np.frombuffer(_own.shifted.take(len(data)), values.dtype)
    for place in range(itemsize):
        np.right_shift(values, 8 * place, out=shifted)
        np.copyto(planes[place * n : (place + 1) * n], shifted, casting="unsafe")
    return planes
