"""Bytes to bytes: the compressors that a codec chain may name, and what all steps of a chain have in common.

Each step is a frozen dataclass whose fields are the codec's configuration in Zarr metadata; a step that exists is
legal. A field that is None depends on the array and is filled in from its dtype.

Stored chunks may be hostile: `expand` reads no further than the payload, writes nothing outside the memory it is
given, and makes no more bytes than fit there.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import numpy as np
from numcodecs import blosc, lz4, zstd
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.store.codecs.planes import ITEMSIZES, compress_planes

# Blosc with threads writes the blocks of a chunk in the order in which they happen to be finished, so that equal
# values could give unequal bytes. zarr-python switches that off as well.
blosc.use_threads = False

DAMAGE = (RuntimeError, ValueError, TypeError, OSError, EOFError, zlib.error, lzma.LZMAError)
"""What decoding raises on a payload that is no such payload."""
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
        implied = {"typesize": stored.itemsize, "elementsize": stored.itemsize, "dtype": stored.str}
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


def _take(data: bytes, into: NDArray[np.uint8]) -> int:
    if len(data) > len(into):
        raise ValueError(f"it holds more than the {len(into)} bytes that belong here")
    into[: len(data)] = np.frombuffer(data, np.uint8)
    return len(data)


def _stream(decompressor: Any, payload: memoryview, into: NDArray[np.uint8]) -> int:
    """Expand through one of Python's stream decompressors, and no further than `into` reaches."""
    n_bytes = _take(decompressor.decompress(payload, len(into) + 1), into)
    if not decompressor.eof or decompressor.unused_data:
        raise ValueError("its end is missing" if not decompressor.eof else "bytes follow its end")
    return n_bytes


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

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        how = (self.cname.encode(), self.clevel, _SHUFFLE[self.shuffle], self.blocksize, self.typesize or itemsize)
        return blosc.compress(data, *how)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
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

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
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

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        return zstd.compress(data, self.level, self.checksum)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
        n_bytes = _zstd_content_bytes(payload)
        if n_bytes > len(into):
            raise ValueError(f"its header announces {n_bytes} bytes where {len(into)} belong")
        # Given just the room that the header announces, the library checks that the content fills it.
        zstd.decompress(payload, into[:n_bytes])
        return n_bytes


def _zstd_content_bytes(payload: memoryview) -> int:
    """The content size in the header of a zstd frame (RFC 8878, section 3.1.1.1)."""
    if len(payload) < 5 or bytes(payload[:4]) != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is no zstd frame")
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

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        # No time stamp, which numcodecs would write: the same values give the same bytes, whenever they are stored.
        return gzip.compress(data, self.level, mtime=0)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
        return _stream(zlib.decompressobj(16 + zlib.MAX_WBITS), payload, into)


@dataclass(frozen=True, kw_only=True, slots=True)
class Zlib:
    """`numcodecs.zlib`."""

    name: ClassVar[str] = "numcodecs.zlib"
    level: int = 1

    def __post_init__(self) -> None:
        check_whole(self, "level", range(10))

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        return zlib.compress(data, self.level)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
        return _stream(zlib.decompressobj(), payload, into)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bz2:
    """`numcodecs.bz2`."""

    name: ClassVar[str] = "numcodecs.bz2"
    level: int = 1

    def __post_init__(self) -> None:
        check_whole(self, "level", range(1, 10))

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        return bz2.compress(data, self.level)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
        return _stream(bz2.BZ2Decompressor(), payload, into)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lzma:
    """`numcodecs.lzma` in its xz form."""

    name: ClassVar[str] = "numcodecs.lzma"
    preset: int | None = None
    check: int = -1

    def __post_init__(self) -> None:
        check_whole(self, "preset", range(10), optional=True)
        check_one_of(self, "check", (-1, lzma.CHECK_NONE, lzma.CHECK_CRC32, lzma.CHECK_CRC64, lzma.CHECK_SHA256))

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        return lzma.compress(data, lzma.FORMAT_XZ, self.check, self.preset)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
        # Preset 9 needs 65 MiB; a header may ask for 4 GiB.
        return _stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 27), payload, into)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lz4:
    """`numcodecs.lz4`."""

    name: ClassVar[str] = "numcodecs.lz4"
    acceleration: int = 1

    def __post_init__(self) -> None:
        check_whole(self, "acceleration", range(1, 65538))

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        return lz4.compress(data, self.acceleration)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
        n_bytes = int.from_bytes(payload[:4], "little")
        if len(payload) < 5 or n_bytes > len(into):
            raise ValueError(f"its header announces {n_bytes} bytes where {len(into)} belong")
        lz4.decompress(payload, into[:n_bytes])
        return n_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffle:
    """`numcodecs.shuffle`: all first bytes of the values, then all second bytes, and so on."""

    name: ClassVar[str] = "numcodecs.shuffle"
    elementsize: int | None = None
    """None: bytes of a stored value."""

    def __post_init__(self) -> None:
        check_whole(self, "elementsize", range(1, 256), optional=True)

    def compress(self, data: Any, itemsize: int) -> Any:
        """See `Compressor`."""
        values, size = np.frombuffer(data, np.uint8), self.elementsize or itemsize
        return np.ascontiguousarray(values.reshape(-1, size).T).reshape(-1)

    def expand(self, payload: memoryview, into: NDArray[np.uint8], itemsize: int) -> int:
        """See `Compressor`."""
        values, size = np.frombuffer(payload, np.uint8), self.elementsize or itemsize
        if len(values) > len(into) or len(values) % size:
            raise ValueError(f"{len(values)} shuffled bytes where {len(into)} belong")
        into[: len(values)].reshape(-1, size)[:] = values.reshape(size, -1).T
        return len(values)


COMPRESSORS: tuple[type[Any], ...] = (Blosc, Zstd, Gzip, Zlib, Bz2, Lzma, Lz4, Shuffle)
