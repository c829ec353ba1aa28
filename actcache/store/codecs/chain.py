"""Chunk codecs: bytes of one chunk to stored bytes and back, exactly as the Zarr v3 codec chain in the metadata says.

A codec is a string: the name of a preset, or the JSON text of a list of Zarr v3 codec metadata. Every chain ends in
crc32c, because without it a flipped byte reads back wrong and silent. Encoding and decoding release the GIL, so chunks
are worked on in threads. Only the codecs listed in `compressors.py` and `filters.py` can be named, so that nothing in a
store's metadata reaches a codec that executes or unpickles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.store.codecs.compressors import (
    DAMAGE,
    Compressor,
    configuration,
)
from actcache.store.codecs.crc import CRC_BYTES, checksum_of, matches
from actcache.store.codecs.filters import Filter, Pcodec
from actcache.store.codecs.quantise import largest_rounding

STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""Logical dtype -> dtype in the arrays. Zarr has no bfloat16: its bits are stored as uint16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What happens to a chunk on its way to the disk, in this order; a crc32c always comes last."""

    filters: tuple[Filter, ...] = ()
    """Array to array."""
    serializer: Pcodec | None = None
    """Array to bytes; None: the bytes as they lie in memory, little-endian."""
    compressors: tuple[Compressor, ...] = ()
    """Bytes to bytes."""
    quantised: bool = False
    """True when rows are stored as int8 with a scale each."""

    @property
    def is_raw(self) -> bool:
        """True when the stored bytes are those in memory."""
        return not (self.filters or self.serializer or self.compressors)

    def stored_dtype(self, logical: str) -> np.dtype[Any]:
        """The dtype of the array that holds values of this logical dtype.

        Raises:
            ConfigError: a filter of the chain does not work on it.
        """
        if self.quantised:
            return np.dtype(np.int8)
        stored = STORED_DTYPE[logical]
        self._dtypes(stored)
        return stored

    def zarr_codecs(self, stored: np.dtype[Any]) -> dict[str, Any]:
        """The chain in the words of zarr-python's `create_array`."""
        dtypes = self._dtypes(stored)
        words: dict[str, Any] = {
            "filters": [_metadata(step, dtype) for step, dtype in zip(self.filters, dtypes, strict=False)],
            "compressors": [*(_metadata(step, dtypes[-1]) for step in self.compressors), {"name": "crc32c"}],
        }
        if self.serializer is not None:
            words["serializer"] = _metadata(self.serializer, dtypes[-1])
        return words

    def largest_error(self, values: NDArray[np.float64], exponents: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """`(n, D)` the most by which storing may change each of some finite values `(n, D)`; zeros if it is lossless.

        `exponents` are a quantised site's powers of two, one a feature.
        """
        error = np.zeros(values.shape)
        if self.quantised:
            error += largest_rounding(values, exponents)
        for step in self.filters:
            error += step.largest_error(values)
        return error

    def encode(self, chunk: NDArray[Any]) -> tuple[Any, int]:
        """Encode one C-contiguous chunk; the payload (bytes-like) and its crc32c, which is stored right behind it.

        The payload of a chain without any step is the chunk's own memory. Lossy filters raise ValueError for values
        that they cannot hold.
        """
        values = chunk
        for step in self.filters:
            values = step.forward(values)
        payload: Any = self.serializer.forward(values) if self.serializer else values.reshape(-1).view(np.uint8)
        for compressor in self.compressors:
            payload = compressor.compress(payload, values.itemsize)
        return payload, google_crc32c.value(payload)

    def decode_into(self, stored: memoryview, out: NDArray[Any]) -> str | None:
        """Check and decode one stored chunk into the C-contiguous `out`; None, or what is wrong with the chunk.

        Whatever the stored bytes are, nothing outside `out` is written; after an error the content of `out` is
        undefined.
        """
        if len(stored) < CRC_BYTES:
            return f"is {len(stored)} bytes long, too short for a checksum"
        payload = stored[:-CRC_BYTES]
        if not matches(payload, checksum_of(stored)):
            return "does not match its checksum"
        try:
            if self.filters or self.serializer:
                self._decode_filtered(payload, out)
            else:
                self._expand(payload, out.reshape(-1).view(np.uint8), out.itemsize)
        except DAMAGE as error:
            return f"cannot be decoded: {error}"
        return None

    def _dtypes(self, stored: np.dtype[Any]) -> list[np.dtype[Any]]:
        """The dtypes before, between and behind the filters."""
        dtypes = [stored]
        for step in self.filters:
            step.check(dtypes[-1])
            dtypes.append(step.encoded_dtype(dtypes[-1]))
        return dtypes

    def _decode_filtered(self, payload: memoryview, out: NDArray[Any]) -> None:
        dtypes = self._dtypes(out.dtype)
        values = np.empty(out.size, dtypes[-1])
        if self.serializer is None:
            self._expand(payload, values.view(np.uint8), values.itemsize)
        else:
            room = np.empty(_bound(values.nbytes), np.uint8)
            n_bytes = self._expand(payload, room, values.itemsize, exact=False)
            self.serializer.backward(room[:n_bytes].tobytes(), values)
        for step, dtype in reversed(list(zip(self.filters, dtypes, strict=False))):
            target = out if step is self.filters[0] else np.empty(out.shape, dtype)
            step.backward(values, target)
            values = target.reshape(-1)
        if not self.filters:
            out.reshape(-1)[:] = values

    def _expand(self, payload: memoryview, out: NDArray[np.uint8], itemsize: int, *, exact: bool = True) -> int:
        """Undo the compressors, the last one first; the number of bytes at the start of `out`."""
        for position in range(len(self.compressors) - 1, 0, -1):
            room = np.empty(_bound(len(out)), np.uint8)
            payload = room.data[: self.compressors[position].expand(payload, room, itemsize)]
        if self.compressors:
            n_bytes = self.compressors[0].expand(payload, out, itemsize)
        else:
            n_bytes = len(payload)
            out[:n_bytes] = np.frombuffer(payload, np.uint8)[: len(out)]
        if n_bytes != len(out) and (exact or n_bytes > len(out)):
            raise ValueError(f"it holds {n_bytes} bytes where {len(out)} belong")
        return n_bytes


def _bound(n_bytes: int) -> int:
    """Room for so many bytes after compressors that found nothing to compress."""
    return n_bytes + n_bytes // 8 + (1 << 16)


def _metadata(step: Any, stored: np.dtype[Any] | None = None) -> dict[str, Any]:
    return {"name": step.name, "configuration": configuration(step, stored)}
