"""What a place for objects has to offer, and what several of them share.

A new kind of storage is a class with these methods in a file of its own, and a line in `objects.backend_of`.
`Objects` documents the methods.
"""

# ruff: noqa: D102 (the methods are those of `Objects`, and documented there)
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

T = TypeVar("T")


ABSENT = (FileNotFoundError, NotADirectoryError)


class Backend(Protocol):
    """What `Objects` needs; keys and prefixes are relative to the store."""

    identity: Hashable
    """Equal for two backends of this process that reach the same store."""
    shared: bool
    """Whether other processes can reach the store too."""
    creates_once: bool
    """Whether of several who `create` an object at the same moment one does, and not each of them."""

    def get(self, key: str) -> memoryview | None: ...
    def read_into(self, key: str, offset: int, outs: tuple[memoryview, ...]) -> int: ...
    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None: ...
    def pieces(self, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]: ...
    def tail(self, key: str, n_bytes: int) -> memoryview | None: ...
    def size(self, key: str) -> int: ...
    def put(self, key: str, *parts: memoryview | bytes) -> None: ...
    def create(self, key: str, data: bytes) -> None: ...
    def walk(self, prefix: str) -> Iterator[str]: ...
    def names(self, prefix: str) -> list[str]: ...
    def sizes(self, prefix: str) -> dict[str, int]: ...
    def delete(self, key: str) -> None: ...
    def delete_all(self, prefix: str) -> None: ...


class WholeObjects(ABC):
    """For backends that give an object best in one piece."""

    @abstractmethod
    def get(self, key: str) -> memoryview | None: ...

    @abstractmethod
    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None: ...

    def read_into(self, key: str, offset: int, outs: tuple[memoryview, ...]) -> int:
        data = self.span(key, offset, sum(map(len, outs)))
        return -1 if data is None else spread(data, outs)

    def pieces(self, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        data = self.get(key) or memoryview(b"")
        for offset, n_bytes in spans:
            yield bytes(data[offset : offset + n_bytes])


def as_folder(prefix: str) -> str:
    """A prefix as zarr's stores list it, so that `a/b` does not find `a/bc`."""
    return f"{prefix}/" if prefix and not prefix.endswith("/") else prefix


def directly_below(keys: Iterator[str], prefix: str) -> list[str]:
    """Names of the keys that lie in this folder itself."""
    skip = len(as_folder(prefix))
    return [name for key in keys if "/" not in (name := key[skip:])]


def last_bytes(data: memoryview | None, n_bytes: int) -> memoryview | None:
    """The end of some data, or all of it where it is shorter."""
    return None if data is None else data[max(0, len(data) - n_bytes) :]


def spread(data: memoryview, outs: tuple[memoryview, ...]) -> int:
    """Copy data over the buffers, one after the other; the bytes copied. numpy lets other threads run meanwhile."""
    done = 0
    for out in outs:
        part = data[done : done + len(out)]
        np.copyto(np.frombuffer(out, np.uint8)[: len(part)], np.frombuffer(part, np.uint8))
        done += len(part)
    return done
