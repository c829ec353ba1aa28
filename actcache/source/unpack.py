"""Open files: unpack their bytes and tell what they are. Everything is streamed, never unpacked as a whole."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from actcache.errors import TextError
from actcache.source.sniff import HEAD_BYTES, READABLE, kind_of_bytes

PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")

MOST_BYTES = 1 << 30
"""Size of the largest document: a longer line is a mistake or an attack, and must not fill the memory."""

_ZSTD_INPUT_BYTES = 1 << 11
"""Bytes that are unpacked at a time: they become 64 MiB at the very most."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A file that is open for reading."""

    path: Path
    kind: str
    """Its kind as `kind_of_bytes` names it; for a compressed file, that of its content."""
    stream: io.BufferedReader[Any]
    is_packed: bool

    def head(self) -> bytes:
        """The first bytes, without consuming them."""
        return self.stream.peek(HEAD_BYTES)[:HEAD_BYTES]


@contextmanager
def open_file(path: Path) -> Iterator[Opened]:
    """Open a file, and unpack it if its first bytes, not its name, say that it is compressed.

    Raises:
        TextError: it cannot be read; the message says what it is, and what to do.
    """
    with ExitStack() as files:
        stream: io.BufferedReader[Any] = files.enter_context(io.BufferedReader(io.FileIO(path), HEAD_BYTES))
        kind = kind_of_bytes(stream.peek(HEAD_BYTES)[:HEAD_BYTES])
        is_packed = kind in _UNPACKERS
        if kind == "empty" and path.suffix.lower() in PACKED_SUFFIXES:
            raise TextError(f"cannot read {path}: it is empty, and not a compressed file as its name says")
        if is_packed:
            unpacked: Any = _UNPACKERS[kind](stream)
            stream = files.enter_context(io.BufferedReader(unpacked, HEAD_BYTES))
            inner = kind_of_bytes(stream.peek(HEAD_BYTES)[:HEAD_BYTES])
            if inner in _UNPACKERS or (inner in READABLE):
                raise TextError(f"cannot read {path}: it is {kind}-compressed, and inside {inner}; unpack it first")
            kind = inner
        if kind not in (*READABLE, "text", "empty"):
            raise TextError(f"cannot read {path}: {'unpacked, ' if is_packed else ''}it is {kind}")
        yield Opened(path, kind, stream, is_packed)


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, one after the other; unlike zstandard's own reader, this notices a missing end."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._frame: Any = None
        self._ready: bytes | memoryview = b""
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._input = self._input or self._packed.read(_ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends before the end of its compressed data")
                return 0
            self._unpack()
        n_bytes = min(len(buffer), len(self._ready))
        buffer[:n_bytes] = self._ready[:n_bytes]
        self._ready = self._ready[n_bytes:]
        return n_bytes

    def _unpack(self) -> None:
        import zstandard

        self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(self._input))
        except zstandard.ZstdError as error:
            raise OSError(f"{error}; if it was made with --long, unpack it with 'zstd -d --long=31' first") from error
        self._input = self._frame.unused_data if self._frame.eof else b""
        self._frame = None if self._frame.eof else self._frame


_UNPACKERS: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda packed: gzip.GzipFile(fileobj=packed, mode="rb"),
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _Zstd,
}
