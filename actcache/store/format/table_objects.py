"""Arrays that are stored in whole chunks: tokens, row table, statistics, records."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError
from actcache.store import codecs
from actcache.store.backends.objects import Objects

UINT8, UINT32, FLOAT64 = np.dtype("u1"), np.dtype("<u4"), np.dtype("<f8")


def encode_table(values: NDArray[Any]) -> tuple[int, bytes]:
    """One whole chunk of a table array as it is stored, and its crc32c."""
    payload, crc = codecs.TABLE.encode(np.ascontiguousarray(values))
    return crc, bytes(payload) + codecs.crc_bytes(crc)


def put_table(objects: Objects, key: str, values: NDArray[Any]) -> tuple[int, int]:
    """Store one whole chunk of a table array; its crc32c and stored bytes."""
    crc, data = encode_table(values)
    objects.put(key, data)
    return crc, len(data)


def get_table(
    objects: Objects, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, at_least: int = 0
) -> tuple[NDArray[Any], int]:
    """One whole chunk of a table array and its crc32c; it has at least `at_least` stored bytes.

    Raises:
        CorruptShardError: the object is missing or damaged; never answered with fill values.
    """
    values, stored = get_stored_table(objects, key, shape, dtype, at_least=at_least)
    return values, codecs.checksum_of(stored)


def get_stored_table(
    objects: Objects, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, at_least: int = 0
) -> tuple[NDArray[Any], memoryview]:
    """Like `get_table`, with the stored bytes."""
    most = math.prod(shape) * dtype.itemsize * 9 // 8 + (1 << 16)
    too_long = objects.is_local and objects.size(key) > most  # nothing of that size is even read
    stored = memoryview(b"") if too_long else objects.get(key)
    if stored is None:
        raise CorruptShardError(f"{key} of {objects} is missing", store=objects)
    if len(stored) < at_least or too_long:
        raise CorruptShardError(f"{key} of {objects} has another length", store=objects)
    out = np.empty(shape, dtype)
    problem = codecs.TABLE.decode_into(stored, out)
    if problem:
        raise CorruptShardError(f"{key} of {objects} {problem}", store=objects)
    return out, stored


def sha256_of(values: NDArray[Any]) -> str:
    """sha256 (hex) of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
