"""Chains: bytes of one chunk to stored bytes and back, exactly as the Zarr v3 codec chain in the metadata says.

Every chain ends in crc32c, because without it a flipped byte reads back as a wrong value and nobody notices. Encoding
and decoding release the GIL, so chunks are worked on in threads. Only the steps in `steps.py` can be named, so that
nothing in a store's metadata reaches a codec that executes or unpickles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.store.codecs.crc import CRC_BYTES, checksum_of, matches
from actcache.store.codecs.steps import DAMAGE, Compressor, Transpose, configuration

STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""Logical dtype -> dtype in the arrays. Zarr has no bfloat16: its bits are stored as uint16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What happens to a chunk on its way to the disk, in this order; a crc32c always comes last."""

    transpose: Transpose | None = None
    """Array to array."""
    compressors: tuple[Compressor, ...] = ()
    """Bytes to bytes; the first gets the values as they lie in memory, little-endian."""

    @property
    def is_raw(self) -> bool:
        """True when the stored bytes are those in memory."""
        return not (self.transpose or self.compressors)

    def metadata(self, stored: np.dtype[Any] | None = None) -> list[dict[str, Any]]:
        """The steps as Zarr v3 codec metadata; with a `stored` dtype, options that follow from it included."""
        steps: list[Any] = [*([self.transpose] if self.transpose else []), *self.compressors]
        return [{"name": step.name, "configuration": configuration(step, stored)} for step in steps]

    def zarr_codecs(self, stored: np.dtype[Any]) -> dict[str, Any]:
        """The chain in the words of zarr-python's `create_array`."""
        n_filters, steps = int(self.transpose is not None), self.metadata(stored)
        return {"filters": steps[:n_filters], "compressors": [*steps[n_filters:], {"name": "crc32c"}]}

    def encode(self, chunk: NDArray[Any]) -> tuple[Any, int]:
        """Encode one C-contiguous chunk; the payload (bytes-like) and its crc32c, which is stored right behind it.

        The payload of a chain without any step is the chunk's own memory.
        """
        values = chunk if self.transpose is None else self.transpose.forward(chunk)
        payload: Any = values.reshape(-1).view(np.uint8)
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
        values = out if self.transpose is None else np.empty(out.size, out.dtype)
        try:
            self._expand(payload, values.reshape(-1).view(np.uint8), out.itemsize)
        except DAMAGE as error:
            return f"cannot be decoded: {error}"
        if self.transpose is not None:
            self.transpose.backward(values, out)
        return None

    def _expand(self, payload: memoryview, out: NDArray[np.uint8], itemsize: int) -> None:
        """Undo the compressors, the last one first, into `out`; an error of `DAMAGE` unless that fills it."""
        for compressor in self.compressors[:0:-1]:
            room = np.empty(_bound(len(out)), np.uint8)
            payload = room.data[: compressor.expand(payload, room, itemsize)]
        if self.compressors:
            n_bytes = self.compressors[0].expand(payload, out, itemsize)
        else:
            n_bytes = len(payload)
            out[:n_bytes] = np.frombuffer(payload, np.uint8)[: len(out)]
        if n_bytes != len(out):
            raise ValueError(f"it holds {n_bytes} bytes where {len(out)} belong")


RAW = Chain()
"""For what is stored as it lies in memory, such as the index of a sharded object."""


def _bound(n_bytes: int) -> int:
    """Room for so many bytes after compressors that found nothing to compress."""
    return n_bytes + n_bytes // 8 + (1 << 16)
