"""Chunk codecs: bytes of one chunk to stored bytes and back, exactly as the Zarr v3 codec chain in the metadata says.

A preset is a name for a chain; every chain ends in crc32c, because without it a flipped byte reads back wrong and
silent. Encoding and decoding release the GIL, so chunks are worked on in threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from actcache.errors import ConfigError

CRC_BYTES = 4
STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""Logical dtype -> dtype in the arrays. Zarr has no bfloat16: its bits are stored as uint16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """One Blosc setting."""

    name: Literal["lz4", "zstd"]
    level: int
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"]


PRESETS: dict[str, Compression | None] = {
    "raw": None,
    "lossless": Compression(name="lz4", level=5, shuffle="bitshuffle"),
}
TABLE = Compression(name="zstd", level=1, shuffle="shuffle")
"""For tokens, the row table, statistics and commits: small integers, written once."""

_SHUFFLE = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def preset(name: str) -> Compression | None:
    """The compression behind a preset name.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"no codec preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def zarr_codecs(compression: Compression | None, dtype: np.dtype[Any]) -> list[Any]:
    """The chain as zarr-python's codec objects, for array metadata."""
    from zarr.codecs import BloscCodec, Crc32cCodec

    if compression is None:
        return [Crc32cCodec()]
    chain = BloscCodec(
        cname=compression.name, clevel=compression.level, shuffle=compression.shuffle, typesize=dtype.itemsize
    )
    return [chain, Crc32cCodec()]


def encode(chunk: NDArray[Any], compression: Compression | None) -> tuple[Any, int]:
    """Compress one C-contiguous chunk; the payload (bytes-like) and its crc32c, which is stored right behind it."""
    if compression is None:
        payload: Any = chunk.reshape(-1).view(np.uint8)
    else:
        # The typesize is taken from the array, so the elements are handed over, not their bytes.
        payload = blosc.compress(
            chunk.reshape(-1), compression.name.encode(), compression.level, _SHUFFLE[compression.shuffle]
        )
    return payload, google_crc32c.value(payload)


def crc_bytes(crc: int) -> bytes:
    """A crc32c as it is stored."""
    return crc.to_bytes(CRC_BYTES, "little")


def checksum_of(stored: memoryview) -> int:
    """The crc32c that stands behind a stored payload; not yet compared with the payload."""
    return int.from_bytes(stored[-CRC_BYTES:], "little")


def matches(payload: memoryview, crc: int) -> bool:
    """True when the payload has this crc32c."""
    # The library takes arrays and bytes, no memoryviews.
    return bool(google_crc32c.value(np.frombuffer(payload, dtype=np.uint8)) == crc)


def decode_into(stored: memoryview, out: NDArray[Any], compression: Compression | None) -> str | None:
    """Check and decompress one stored chunk into the C-contiguous `out`; None, or what is wrong with the chunk."""
    if len(stored) < CRC_BYTES:
        return f"is {len(stored)} bytes long, too short for a checksum"
    payload = stored[:-CRC_BYTES]
    if not matches(payload, checksum_of(stored)):
        return "does not match its checksum"
    if compression is None:
        if len(payload) != out.nbytes:
            return f"holds {len(payload)} bytes where {out.nbytes} belong"
        out.reshape(-1).view(np.uint8)[:] = payload
        return None
    try:
        blosc.decompress(payload, out.reshape(-1).view(np.uint8))
    except (RuntimeError, ValueError) as error:
        return f"cannot be decompressed ({error})"
    return None


class Scratch:
    """Bytes that are reused from call to call (one per thread): fresh memory is dear on hot paths."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, n_bytes: int) -> memoryview:
        """`n_bytes` writable bytes, valid until the next call."""
        if len(self._bytes) < n_bytes:
            self._bytes = np.empty(n_bytes, np.uint8)
        return self._bytes.data[:n_bytes]

    def join(self, parts: Sequence[Any]) -> memoryview:
        """The byte strings laid one after the other; valid until the next call."""
        view, offset = self.take(sum(len(part) for part in parts)), 0
        for part in parts:
            view[offset : offset + len(part)] = part
            offset += len(part)
        return view
