"""The steps that a codec chain may name: those that zarr-python, tensorstore and zarrs all have.

Each step is a frozen dataclass whose fields are the codec's configuration in Zarr metadata; a step that exists is
legal. A field that is None depends on the array and is filled in from its dtype.

Stored chunks may be hostile: `expand` reads no further than the payload, writes nothing outside the memory it is
given, and makes no more bytes than fit there.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.store.codecs.planes import ITEMSIZES, compress_planes

# Blosc with threads writes the blocks of a chunk in the order in which they happen to be finished, so that equal
# values could give unequal bytes. zarr-python switches that off as well.
blosc.use_threads = False

DAMAGE = (RuntimeError, ValueError, TypeError, OSError, EOFError, zlib.error)
"""What decoding raises on a payload that is not of its format."""
_SHUFFLE = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
_BLOSC_HEADER_BYTES = 16


class Compressor(Protocol):
    """Bytes to bytes."""

    name: ClassVar[str]
    """The codec's name in Zarr metadata."""

    def compress(self, data: NDArray[np.uint8], itemsize: int) -> Any:
        """The compressed bytes of flat bytes; `itemsize` is that of the values before the first compressor."""

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """Decompress to the start of `into` and return the number of bytes; an error of `DAMAGE` when it cannot."""


def configuration(step: Any, stored: np.dtype[Any] | None = None) -> dict[str, Any]:
    """The fields of a step by name: those that are set, and with a `stored` dtype also those that follow from it."""
    implied: dict[str, Any] = {}
    if stored is not None:
        implied = {"typesize": stored.itemsize}
    found = {}
    for entry in fields(step):
        value = getattr(step, entry.name)
        value = implied.get(entry.name) if value is None else value
        if value is not None:
            found[entry.name] = list(value) if isinstance(value, tuple) else value
    return found


def check_whole(step: Any, option: str, allowed: range, *, optional: bool = False) -> None:
    """ConfigError unless the option is one of these whole numbers."""
    value = getattr(step, option)
    if not (optional and value is None) and (type(value) is not int or value not in allowed):
        raise ConfigError(f"{step.name}: {option} must be {allowed.start} to {allowed.stop - 1}, not {value!r}")


def check_one_of(step: Any, option: str, allowed: Collection[Any]) -> None:
    """ConfigError unless the option is one of these, type included: 1 is not True."""
    value = getattr(step, option)
    if not any(type(value) is type(legal) and value == legal for legal in allowed):
        raise ConfigError(f"{step.name}: {option} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Transpose:
    """Zarr's `transpose`, array to array: feature by feature in place of row by row."""

    name: ClassVar[str] = "transpose"
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        check_one_of(self, "order", ((0, 1), (1, 0)))
        if any(type(axis) is not int for axis in self.order):
            raise ConfigError(f"{self.name}: order must be whole numbers, not {self.order!r}")

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values in the order in which they are stored."""
        return np.ascontiguousarray(values.transpose(self.order))

    def backward(self, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Put flat values in the order in which they are stored into the C-contiguous `out`."""
        turned = out.transpose(self.order)
        turned[...] = stored.reshape(turned.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blosc:
    """Zarr's `blosc`."""

    name: ClassVar[str] = "blosc"
    cname: str = "zstd"
    clevel: int = 5
    shuffle: str = "shuffle"
    typesize: int | None = None
    """None: bytes of a stored value."""
    blocksize: int = 0

    def __post_init__(self) -> None:
        check_one_of(self, "cname", tuple(blosc.list_compressors()))
        check_whole(self, "clevel", range(10))
        check_one_of(self, "shuffle", _SHUFFLE)
        check_whole(self, "typesize", range(1, 256), optional=True)
        check_whole(self, "blocksize", range(2**28 + 1))

    def compress(self, data: Any, itemsize: int) -> Any:  # noqa: D102
        how = (self.cname.encode(), self.clevel, _SHUFFLE[self.shuffle], self.blocksize, self.typesize or itemsize)
        return blosc.compress(data, *how)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:  # noqa: D102
        # The library reads as many bytes as the header claims, present or not, so the claims are checked first.
        if len(payload) < _BLOSC_HEADER_BYTES:
            raise ValueError(f"{len(payload)} bytes are too few for a Blosc header")
        n_bytes = int.from_bytes(payload[4:8], "little")
        n_stored = int.from_bytes(payload[12:16], "little")
        if n_stored != len(payload):
            raise ValueError(f"its header announces {n_stored} stored bytes, there are {len(payload)}")
        if n_bytes > len(into):
            raise ValueError(f"its header announces {n_bytes} bytes where {len(into)} belong")
        blosc.decompress(payload, into)
        return n_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanesBlosc(Blosc):
    """Zarr's `blosc` with shuffle and zstd, compressed by settings that suit floating-point values."""

    def compress(self, data: Any, itemsize: int) -> Any:  # noqa: D102
        if itemsize not in ITEMSIZES:
            return Blosc.compress(self, data, itemsize)
        return compress_planes(np.frombuffer(data, np.uint8), itemsize, self.blocksize)


@dataclass(frozen=True, kw_only=True, slots=True)
class Zstd:
    """Zarr's `zstd`."""

    name: ClassVar[str] = "zstd"
    level: int = 0
    checksum: bool = False

    def __post_init__(self) -> None:
        check_whole(self, "level", range(-131072, 23))
        check_one_of(self, "checksum", (False, True))

    def compress(self, data: Any, itemsize: int) -> Any:  # noqa: D102
        return zstd.compress(data, self.level, self.checksum)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:  # noqa: D102
        n_bytes = _zstd_content_bytes(payload)
        if n_bytes > len(into):
            raise ValueError(f"its header announces {n_bytes} bytes where {len(into)} belong")
        # Given just the room that the header announces, the library checks that the content fills it.
        zstd.decompress(payload, into[:n_bytes])
        return n_bytes


def _zstd_content_bytes(payload: memoryview) -> int:
    """The content size in the header of a zstd frame (RFC 8878, section 3.1.1.1)."""
    if len(payload) < 5 or bytes(payload[:4]) != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is not a zstd frame")
    descriptor = payload[4]
    single_segment = descriptor >> 5 & 1
    size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    if not size_bytes or len(payload) < start + size_bytes:
        raise ValueError("its zstd header names no content size")
    return int.from_bytes(payload[start : start + size_bytes], "little") + (256 if size_bytes == 2 else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gzip:
    """Zarr's `gzip`."""

    name: ClassVar[str] = "gzip"
    level: int = 5

    def __post_init__(self) -> None:
        check_whole(self, "level", range(10))

    def compress(self, data: Any, itemsize: int) -> Any:  # noqa: D102
        # No time stamp, which numcodecs would write: the same values give the same bytes, whenever they are stored.
        return gzip.compress(data, self.level, mtime=0)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:  # noqa: D102
        stream = zlib.decompressobj(16 + zlib.MAX_WBITS)
        data = stream.decompress(payload, len(into) + 1)
        if len(data) > len(into):
            raise ValueError(f"it holds more than the {len(into)} bytes that belong here")
        if not stream.eof or stream.unused_data:
            raise ValueError("its end is missing" if not stream.eof else "bytes follow its end")
        into[: len(data)] = np.frombuffer(data, np.uint8)
        return len(data)


_ALL: tuple[type[Any], ...] = (Transpose, Blosc, Zstd, Gzip)
STEPS: dict[str, type[Any]] = {step.name: step for step in _ALL}
"""By their names in Zarr metadata."""
