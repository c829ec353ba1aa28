"""What a place for objects has to offer: all that `Objects` and the locks ask of it.

A new kind of place is one file with a subclass of `Backend`, and one line in `objects.backend_of`. It says what it is
(`identity`, `shared`, `creates_once`) and has the abstract methods; the others have a default that is right
everywhere, and are overridden where a place can do better.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from actcache.errors import StoreError

T = TypeVar("T")

ABSENT = (FileNotFoundError, NotADirectoryError)
PUTS_AT_ONCE = 32
"""Small objects written at a time, where each answer takes its time."""


class Backend(ABC):
    """The objects of one store. Keys and prefixes are relative to the store; a prefix has no slash at its end.

    Called from many threads at once. Errors are raised as they come: `Objects` names the store and the key.
    """

    identity: Hashable
    """Equal for two backends of this process that reach the same store."""
    shared: bool
    """Whether other processes can reach the store too. Where they cannot, its locks are a list in this process."""
    creates_once: bool
    """Whether exactly one of several that `create` an object at the same moment succeeds. Locks that are objects, and
    several writers of one store, depend on it."""
    is_local: bool = False
    """Whether answers come at once, as from a file system. Elsewhere several requests are made at a time."""
    root: Path | None = None
    """The folder that the objects are files of, if they are: locks are then the kernel's, on files in it."""
    n_waits: int = 0
    """Calls of `read_into` that had to wait for a disk; 0 where that cannot be told."""

    @abstractmethod
    def get(self, key: str) -> memoryview | None:
        """The whole object, or None when there is none."""

    @abstractmethod
    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None:
        """Bytes from `offset` on, fewer where the object ends earlier; None when there is no object."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of an object, -1 when there is none."""

    @abstractmethod
    def put(self, key: str, *parts: memoryview | bytes) -> None:
        """Write one object, the parts end to end, atomically. The caller reuses the parts' memory afterwards."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Put an object unless there is one of that name; nothing tells the caller which of the two happened."""

    @abstractmethod
    def walk(self, prefix: str) -> Iterator[str]:
        """Keys of all objects below a folder."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""

    def read_into(self, key: str, offset: int, outs: tuple[memoryview, ...]) -> int:
        """Fill the buffers, one after the other, from `offset` on; the bytes read, or -1 when there is no object."""
        data = self.span(key, offset, sum(map(len, outs)))
        return -1 if data is None else spread(data, outs)

    def expect(self, key: str, offset: int, n_bytes: int) -> None:  # noqa: B027 (nothing to do is the default)
        """Begin to read a stretch that `read_into` is going to ask for, where that can be done without waiting."""

    def pieces(self, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of each `(offset, length)` in turn; empty where there is no object."""
        data = self.get(key) or memoryview(b"")
        for offset, n_bytes in spans:
            yield bytes(data[offset : offset + n_bytes])

    def tail(self, key: str, n_bytes: int) -> memoryview | None:
        """The last `n_bytes` (at least 1) of an object, all of it where it is shorter; None when there is none."""
        size = self.size(key)
        return None if size < 0 else self.span(key, max(0, size - n_bytes), min(size, n_bytes))

    def names(self, prefix: str) -> list[str]:
        """Names of the objects directly below a folder."""
        return directly_below(self.walk(prefix), prefix)

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each object directly below a folder, by its name."""
        return {name: self.size(as_folder(prefix) + name) for name in self.names(prefix)}

    def delete_all(self, prefix: str) -> None:
        """Remove everything below a folder; nothing happens when there is none."""
        for key in list(self.walk(prefix)):
            self.delete(key)

    @contextmanager
    def writing(self, key: str) -> Iterator[Callable[..., None]]:
        """Write one object piece by piece with the function that is given; it appears, whole, when the block ends.

        It does not appear when the block raises. By default the pieces are kept in memory until then.
        """
        kept: list[bytes] = []
        yield lambda *parts: kept.extend(map(bytes, parts))
        self.put(key, *kept)

    def commit(self, objects: Sequence[tuple[str, bytes]]) -> None:
        """Write small objects that make others count.

        All that was put, deleted or kept before is safe from a power cut before one of these can be seen, and they are
        when this returns. The default is for places that have stored what they have taken.
        """
        at_once(lambda item: self.put(*item), objects, 1 if self.is_local else PUTS_AT_ONCE)

    def flush(self) -> None:  # noqa: B027
        """Make all that was put, deleted or kept so far safe from a power cut."""

    def keep(self, key: str) -> None:  # noqa: B027
        """Count an object or folder that another process has put among what `flush` makes safe."""

    def remove_partial_writes(self) -> None:  # noqa: B027
        """Remove what killed processes have left of unfinished puts, where that can be seen."""

    def remove_folder(self, prefix: str) -> None:  # noqa: B027
        """Remove a folder if it is empty; where folders exist only through their objects, there is nothing to do."""

    def path_to_change(self, key: str) -> str:
        """The path of the file that an object is, for locks on files: asked only where there is a `root`.

        Raises:
            StoreError: a link leads out of the store to it, or objects are no files here.
        """
        raise StoreError(f"{key} is not a file of a folder")


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


def at_once(work: Callable[[T], None], items: Collection[T], n: int) -> None:
    """Do the same to each of some items, `n` of them at a time; raises what one of them has raised."""
    if min(n, len(items)) < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(min(n, len(items)), thread_name_prefix="actcache-put") as pool:
        for done in [pool.submit(work, item) for item in items]:
            done.result()
