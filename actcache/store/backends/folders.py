"""A store in a folder: files, read straight into the caller's buffer, and on the disk when it matters.

On hot paths the first touch of fresh memory costs more than the copy, so ranges go past zarr's store interface.
"""

# ruff: noqa: D102 (the methods are those of `Objects`, and documented there)
from __future__ import annotations

import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from typing import TypeVar

from zarr.storage import LocalStore

from actcache.errors import StoreError
from actcache.files import flush, folders_to_flush, whole_file

T = TypeVar("T")
_ABSENT = (FileNotFoundError, NotADirectoryError)
PARTIAL = ".partial"
"""How the names of unfinished files end, zarr's and ours."""
_MOST_PARTS = 512
"""Parts given to the system at a time; Linux takes 1,024."""
_FLUSHES = 16
"""Flushes under way at a time: a file system's journal is then written once for many of them."""


class FileBackend:
    """A folder. Puts are done as zarr does them: beside their place, their name ending in `.partial`, then renamed.

    They are done here so that the parts of an object go to the file as they are, without being joined in memory first.

    An object that takes the place of another is flushed before it does, since a power cut may otherwise leave the new
    name without the bytes. New objects are flushed together, by `flush`, and so are all changes of names.

    Args:
        store: the folder.
        durable: flush at all; without, a power cut may take anything.
    """

    shared = creates_once = True

    def __init__(self, store: LocalStore, *, durable: bool) -> None:
        self.root, self._durable = store.root, durable
        self._root = str(store.root)
        self.identity: Hashable = self._root
        self.n_waits = 0
        """Reads into memory that had to wait for a disk; about, since threads may miss each other's."""
        self._tells_what_is_at_hand = hasattr(os, "RWF_NOWAIT") and hasattr(os, "posix_fadvise")
        self._changed: set[str] = set()
        """Files and folders that have to be flushed."""
        self._settled: set[str] = set()
        """Folders whose own names are on the disk."""
        self._failure: OSError | None = None
        """Why a flush failed. The system forgets what it could not write, so a second one would promise too much."""
        self._changing, self._flushing = threading.Lock(), threading.Lock()

    def get(self, key: str) -> memoryview | None:
        descriptor = self._open(key)
        if descriptor is None:
            return None
        with FileIO(descriptor) as file:  # no buffer: most objects are small, and each is read once
            return memoryview(file.readall())

    def _open(self, key: str) -> int | None:
        """The descriptor of a file; None when there is none. A folder is none, nor a pipe, which would make us wait."""
        try:
            descriptor = os.open(f"{self._root}/{key}", os.O_RDONLY | os.O_NONBLOCK)
        except _ABSENT:
            return None
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        return None

    def read_into(self, key: str, offset: int, outs: tuple[memoryview, ...]) -> int:
        descriptor = self._open(key)
        if descriptor is None:
            return -1
        try:
            if self._tells_what_is_at_hand:
                n_read = self._at_hand(descriptor, outs, offset)
                if n_read == sum(map(len, outs)):
                    return n_read
                self.n_waits += 1
            return os.preadv(descriptor, outs, offset)
        finally:
            os.close(descriptor)

    def _at_hand(self, descriptor: int, outs: tuple[memoryview, ...], offset: int) -> int:
        """Read what the system has in memory; fewer bytes, or -1, where a disk would have to be waited for."""
        try:
            return os.preadv(descriptor, outs, offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return -1
        except OSError:  # a file system that cannot tell
            self._tells_what_is_at_hand = False
            return -1

    def expect(self, key: str, offset: int, n_bytes: int) -> None:
        """Have the system begin to read a stretch into its memory, where it is not there yet."""
        if (descriptor := self._open(key)) is not None:
            try:
                os.posix_fadvise(descriptor, offset, n_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None:
        descriptor = self._open(key)
        if descriptor is None:
            return None
        try:
            return memoryview(os.pread(descriptor, n_bytes, offset))
        finally:
            os.close(descriptor)

    def pieces(self, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        descriptor = self._open(key)
        if descriptor is None:
            yield from (b"" for _ in spans)
            return
        try:
            for offset, n_bytes in spans:
                yield os.pread(descriptor, n_bytes, offset)
        finally:
            os.close(descriptor)

    def tail(self, key: str, n_bytes: int) -> memoryview | None:
        descriptor = self._open(key)
        if descriptor is None:
            return None
        try:
            return memoryview(os.pread(descriptor, n_bytes, max(0, os.fstat(descriptor).st_size - n_bytes)))
        finally:
            os.close(descriptor)

    def size(self, key: str) -> int:
        try:
            found = os.stat(f"{self._root}/{key}")
        except _ABSENT:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def put(self, key: str, *parts: memoryview | bytes) -> None:
        with self.writing(key) as add:
            add(*parts)

    @contextmanager
    def writing(self, key: str, *, flushed: bool = False) -> Iterator[Callable[..., None]]:
        place = self.own(key)
        folder = os.path.dirname(place)
        os.makedirs(folder, exist_ok=True)
        flushed = self._durable and (flushed or os.path.lexists(place))
        with whole_file(place, f"{place}.{uuid.uuid4().hex}{PARTIAL}", flushed=flushed) as descriptor:
            yield lambda *parts: _write_all(descriptor, [memoryview(part).cast("B") for part in parts])
        self._note(folder) if flushed else self._note(folder, place)

    def commit(self, objects: Sequence[tuple[str, bytes]]) -> None:
        """See `Objects.commit`."""

        def put(item: tuple[str, bytes]) -> None:
            with self.writing(item[0], flushed=True) as add:
                add(item[1])

        self.flush()
        at_once(put, objects, _FLUSHES if self._durable else 1)
        self.flush()

    def keep(self, key: str) -> None:
        """See `Objects.keep`."""
        place = f"{self._root}/{key}"
        self._note(os.path.dirname(place), place)

    def _note(self, *places: str) -> None:
        """Remember what has to be flushed."""
        if self._durable:
            with self._changing:
                self._changed.update(places)

    def flush(self) -> None:
        """See `Objects.flush`."""
        with self._flushing:  # what another thread is flushing has to be waited for as well
            if self._failure is not None:
                raise self._failure
            with self._changing:
                changed, self._changed = self._changed, set()
            if not changed:
                return
            folders = {folder for place in changed for folder in self._above(place)} - self._settled
            if self._root in folders:  # those above the store may be as new as it is
                changed.update(folders_to_flush(self.root.absolute()))
            changed.update(os.path.dirname(folder) for folder in folders - {self._root})
            try:
                at_once(flush, changed, _FLUSHES)
            except OSError as error:
                self._failure = error
                raise
            self._settled |= folders

    def _above(self, place: str) -> Iterator[str]:
        """The folders that a file or folder lies in, up to the store itself."""
        while len(place) > len(self._root):
            place = os.path.dirname(place)
            yield place

    def create(self, key: str, data: bytes) -> None:
        place = self.own(key)
        beside = f"{place}.{uuid.uuid4().hex}{PARTIAL}"
        os.makedirs(os.path.dirname(place), exist_ok=True)
        try:
            with open(beside, "xb") as file:
                file.write(data)
            with suppress(FileExistsError):
                os.link(beside, place)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(beside)

    def own(self, key: str) -> str:
        """The path of an object that may be changed; StoreError when a linked folder leads out of the store to it."""
        place, root = f"{self._root}/{key}", os.path.realpath(self._root)
        if not f"{os.path.realpath(os.path.dirname(place))}/".startswith(f"{root.rstrip('/')}/"):
            raise StoreError(
                f"{key} of {self._root} lies elsewhere, behind a link, so it is not changed; copy it there"
            )
        return place

    def walk(self, prefix: str) -> Iterator[str]:
        for folder, _, names in os.walk(self.root / prefix):
            below = os.path.relpath(folder, self.root)
            for name in names:
                if not name.endswith(PARTIAL):
                    yield name if below == "." else f"{below}/{name}"

    def names(self, prefix: str) -> list[str]:
        try:
            with os.scandir(f"{self._root}/{prefix}") as entries:
                return [entry.name for entry in entries if entry.is_file() and not entry.name.endswith(PARTIAL)]
        except _ABSENT:
            return []

    def sizes(self, prefix: str) -> dict[str, int]:
        try:
            with os.scandir(f"{self._root}/{prefix}") as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        except _ABSENT:
            return {}

    def delete(self, key: str) -> None:
        place = self.own(key)
        with suppress(*_ABSENT):
            os.unlink(place)
        self._note(os.path.dirname(place))

    def delete_all(self, prefix: str) -> None:
        place = self.own(prefix)
        with suppress(*_ABSENT):
            if os.path.islink(place):
                os.unlink(place)
            else:
                shutil.rmtree(place)
        self._settled.clear()  # folders of these names may be made again
        self._note(os.path.dirname(place))

    def remove_folder(self, prefix: str) -> None:
        """Remove an empty folder; nothing happens when it is not empty."""
        with suppress(OSError):
            os.rmdir(self.own(prefix))
        self._settled.clear()


def _write_all(descriptor: int, parts: list[memoryview]) -> None:
    """Write the parts one after the other, however little the system takes at a time."""
    while parts:
        n_bytes = os.writev(descriptor, parts[:_MOST_PARTS])
        done = 0
        while done < len(parts) and n_bytes >= len(parts[done]):
            n_bytes -= len(parts[done])
            done += 1
        parts = parts[done:]
        if n_bytes:
            parts[0] = parts[0][n_bytes:]


def at_once(work: Callable[[T], None], items: Collection[T], n: int) -> None:
    """Do the same to each of some items, `n` of them at a time; raises what one of them has raised."""
    if min(n, len(items)) < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(min(n, len(items)), thread_name_prefix="actcache-put") as pool:
        for done in [pool.submit(work, item) for item in items]:
            done.result()
