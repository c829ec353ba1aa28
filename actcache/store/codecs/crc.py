"""The crc32c that ends every stored chunk."""

from __future__ import annotations

import google_crc32c
import numpy as np

CRC_BYTES = 4


def crc_bytes(crc: int) -> bytes:
    """A crc32c as it is stored."""
    return crc.to_bytes(CRC_BYTES, "little")


def checksum_of(stored: memoryview) -> int:
    """The crc32c that stands behind a stored payload; not yet compared with the payload."""
    return int.from_bytes(stored[-CRC_BYTES:], "little")


def matches(payload: memoryview, crc: int) -> bool:
    """True when the payload has this crc32c."""
    # The library takes arrays and bytes, but not memoryviews.
    return bool(google_crc32c.value(np.frombuffer(payload, dtype=np.uint8)) == crc)


_RESIDUE = 0x48674BC7
"""The crc32c of any bytes with their own crc32c, little-endian, behind them."""


def is_whole(stored: bytes) -> bool:
    """True when a stored chunk matches the crc32c at its end. For bytes, unlike arrays, the GIL is released."""
    return len(stored) >= CRC_BYTES and bool(google_crc32c.value(stored) == _RESIDUE)
