"""The objects of a Zarr store, synchronously: put, get, read a range into a buffer, list, delete.

In: a folder, a URL or a zarr store object. Out: bytes, or errors that name the store and the key. How the bytes travel
is up to the files beside this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from zarr.abc.store import Store
from zarr.storage import LocalStore, ObjectStore

from actcache.addresses import cause_of, safe_message, shown
from actcache.errors import ActcacheError, ConfigError
from actcache.files import free_bytes, full_disk_explained, path_of
from actcache.store.backends.backend import PUTS_AT_ONCE, Backend, at_once
from actcache.store.backends.buckets import BucketBackend
from actcache.store.backends.folders import FileBackend
from actcache.store.backends.urls import open_url
from actcache.store.backends.zarr_stores import ZarrBackend

_LOST_A_SLASH = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")
"""What `pathlib` makes of a URL."""
_Names: TypeAlias = list[str]  # within the class, `list` is a method
_DENIED = ("PermissionDeniedError", "UnauthenticatedError")


class Objects:
    """The objects of one store. Thread-safe; may be pickled when it was made from a path or a URL.

    A forked child may go on using it, unless it is a bucket that was used before the fork: that raises a
    `ConfigError`, because obstore's threads are not copied to the child.

    Args:
        location: a folder; a URL (`s3://`, `gs://`, `az://`, `http(s)://` through obstore, all that fsspec knows
            otherwise); or a zarr store object.
        read_only: refuse puts and deletes.
        durable: flush what is written to a folder (`fsync`), so that a power cut loses nothing that was committed.
            Elsewhere it makes no difference: a bucket has stored what it has accepted.

    Raises:
        ConfigError: a URL that cannot be opened here.
    """

    def __init__(self, location: str | Path | Store, *, read_only: bool, durable: bool = True) -> None:
        is_place = not isinstance(location, Store) and "://" not in str(location)
        if is_place and not _LOST_A_SLASH.match(str(location)):
            location = path_of(location, "the place of a store")
        self.location, self._read_only, self._durable = location, read_only, durable
        if isinstance(location, Store):
            self.store = location
        elif _LOST_A_SLASH.match(str(location)):
            raise ConfigError(f"{shown(location)} is neither a path nor a URL; give a URL as text, with two slashes")
        elif "://" in str(location):
            self.store = open_url(str(location), read_only=read_only)
        else:
            self.store = LocalStore(Path(location), read_only=read_only)
        self.backend = backend_of(self.store, durable=durable)
        self.root = self.backend.root
        """The folder of the store, None where it is not in one."""

    def __str__(self) -> str:
        """Where the store lies, as people may see it: of a URL without user, password and query."""
        return shown(self.location)

    def __reduce__(self) -> Any:
        return _reopen, (self.location, self._read_only, self._durable)

    @property
    def is_local(self) -> bool:
        """Whether answers come at once, as from a folder; elsewhere several requests should be made at a time."""
        return self.backend.is_local

    def put(self, key: str, *parts: memoryview | bytes) -> None:
        """Write one object, the parts laid end to end, atomically: readers see the old one or the new one.

        File systems behind fsspec that write in place (`ftp://`, `sftp://`) are the exception.

        Raises:
            StorageFullError: there is no room; what was there before is untouched.
            OSError: the store did not take it, after some retries; what was there before is untouched.
        """
        self._check_writable()
        n_bytes = sum(map(len, parts))
        with self.full_disk_explained(f"{key}: {n_bytes:,} bytes"), self._named("write", key):
            self.backend.put(key, *parts)

    def put_all(self, objects: Sequence[tuple[str, bytes]]) -> None:
        """Write several small objects in any order, many at a time where answers are slow; raises like `put`."""
        at_once(lambda item: self.put(*item), objects, 1 if self.is_local else PUTS_AT_ONCE)

    def commit(self, objects: Sequence[tuple[str, bytes]]) -> None:
        """Write small objects that make others count; raises like `put`.

        All that was put, deleted or kept before is on the disk before one of these can be seen, and they are when this
        returns. Each is whole or not there at all, after a power cut too.
        """
        self._check_writable()
        n_bytes, keys = sum(len(data) for _, data in objects), ", ".join(key for key, _ in objects[:3])
        with self.full_disk_explained(f"{keys} and what they stand for: {n_bytes:,} bytes"), self._named("write", keys):
            self.backend.commit(objects)

    def flush(self) -> None:
        """Make all that was put, deleted or kept so far safe from a power cut."""
        with self.full_disk_explained("what was written: some bytes"):
            self.backend.flush()

    def keep(self, key: str) -> None:
        """Count an object or a folder among what has to be flushed, although another process has put it.

        A writer that was killed may have left it in the system's memory, where every process sees it.
        """
        self.backend.keep(key)

    @contextmanager
    def writing(self, key: str) -> Iterator[Callable[..., None]]:
        """Write one object piece by piece: `with objects.writing(key) as add: add(part, part)`.

        It appears whole when the block ends, and not at all when the block raises. In a folder every piece goes to the
        file while it is in the processor's cache; elsewhere the pieces are kept until the end. Raises like `put`.
        """
        self._check_writable()
        n_bytes = 0

        def add(*parts: memoryview | bytes) -> None:
            nonlocal n_bytes
            part_bytes = sum(map(len, parts))
            with self.full_disk_explained(f"a part of {key}: {part_bytes:,} bytes"):
                write(*parts)
            n_bytes += part_bytes

        with ExitStack() as unfinished:
            with self.full_disk_explained(key):
                write = unfinished.enter_context(self.backend.writing(key))
            yield add
            with self.full_disk_explained(f"{key}: {n_bytes:,} bytes"), self._named("write", key):
                unfinished.close()

    def create(self, key: str, data: bytes) -> None:
        """Put an object unless there is one of that name; reading it afterwards tells which writer was first.

        A single step in folders and through obstore; through fsspec it is a look and then a put.
        """
        self._check_writable()
        with self.full_disk_explained(f"{key}: {len(data):,} bytes"), self._named("write", key):
            self.backend.create(key, data)

    def full_disk_explained(self, what: str) -> AbstractContextManager[None]:
        """Turn the system's "no space left" into our error, which says what was needed and how to continue."""
        return full_disk_explained(f"in {self} for {what}", self.root)

    @contextmanager
    def _named(self, doing: str, what: str) -> Iterator[None]:
        """Turn the errors of a remote store into an OSError that names the key."""
        try:
            yield
        except ActcacheError:
            raise
        except Exception as error:
            if self.is_local:
                raise
            said = (
                f"could not {doing} {what or 'the objects'} of {self}: {safe_message(error, self.location)}; "
                "check the connection, the address and the permissions, and give the same command again"
            )
            if isinstance(error, OSError) and error.errno:
                raise OSError(error.errno, said) from cause_of(error, self.location)
            kind = PermissionError if type(error).__name__ in _DENIED else OSError
            raise kind(said) from cause_of(error, self.location)

    def _check_writable(self) -> None:
        if self._read_only or self.store.read_only:
            raise ValueError(f"{self} was opened in read-only mode")

    def get(self, key: str) -> memoryview | None:
        """The whole object, or None when there is none."""
        if self.is_local:  # without the cost of a context, as in `read_into`
            return self.backend.get(key)
        with self._named("read", key):
            return self.backend.get(key)

    def read_into(self, key: str, offset: int, *outs: memoryview) -> int:
        """Fill the buffers, one after the other, from byte `offset` on.

        Returns the bytes read, fewer than asked for where the object ends, or -1 when there is no object.
        """
        if self.is_local:
            return self.backend.read_into(key, offset, outs)
        with self._named("read", key):
            return self.backend.read_into(key, offset, outs)

    @property
    def n_waits(self) -> int:
        """How many reads into memory had to wait for a disk so far; 0 where that cannot be told."""
        return self.backend.n_waits

    def expect(self, key: str, offset: int, n_bytes: int) -> None:
        """Say that a stretch is going to be read soon, so that a folder's disk can begin to read it."""
        self.backend.expect(key, offset, n_bytes)

    def span(self, key: str, offset: int, n_bytes: int) -> memoryview | None:
        """Bytes of an object from `offset` on, fewer where it ends earlier; None when there is no object."""
        with self._named("read", key):
            return self.backend.span(key, offset, n_bytes)

    def pieces(self, key: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """The bytes of each `(offset, length)` of one object, in turn; empty where there is no object."""
        with self._named("read", key):
            yield from self.backend.pieces(key, spans)

    def tail(self, key: str, n_bytes: int) -> memoryview | None:
        """The last `n_bytes` (at least 1) of an object, all of it where it is shorter, None when there is none."""
        with self._named("read", key):
            return self.backend.tail(key, n_bytes)

    def size(self, key: str) -> int:
        """Bytes of an object, -1 when there is none."""
        with self._named("read", key):
            return self.backend.size(key)

    def list(self, prefix: str) -> Iterator[str]:
        """Keys of all objects below a folder, which may be given with or without a slash at its end."""
        with self._named("list", prefix):
            yield from self.backend.walk(prefix.rstrip("/"))

    def names(self, prefix: str) -> _Names:
        """Names of the objects directly below a folder."""
        with self._named("list", prefix):
            return self.backend.names(prefix.rstrip("/"))

    def sizes(self, prefix: str) -> dict[str, int]:
        """Bytes of each object directly below a folder, by its name: one listing."""
        with self._named("list", prefix):
            return self.backend.sizes(prefix.rstrip("/"))

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""
        self._check_writable()
        with self._named("delete", key):
            self.backend.delete(key)

    def delete_all(self, prefix: str) -> None:
        """Remove everything below a folder, in no particular order; nothing happens when there is none."""
        if not prefix.strip("/"):
            raise ValueError("this would delete the store itself; name a folder in it")
        self._check_writable()
        with self._named("delete", prefix):
            self.backend.delete_all(prefix.rstrip("/"))

    def remove_partial_writes(self) -> None:
        """Delete what a killed process left of unfinished atomic writes (zarr names such files `*.partial`).

        In buckets, parts of unfinished uploads cannot be listed; the bucket's lifecycle rules remove them.
        """
        self.backend.remove_partial_writes()

    def free_bytes(self) -> int | None:
        """Room on the file system that the store is or will be on, None where that is unknown."""
        return free_bytes(self.root)


def _reopen(location: str | Path | Store, read_only: bool, durable: bool) -> Objects:
    return Objects(location, read_only=read_only, durable=durable)


def to_write(path: str | Path | Objects, *, durable: bool = True) -> Objects:
    """The objects of a store that is going to be written; an `Objects` is returned as it is, settings included."""
    return path if isinstance(path, Objects) else Objects(path, read_only=False, durable=durable)


def backend_of(store: Store, *, durable: bool) -> Backend:
    """The fastest backend for a zarr store; `durable` is for folders only. A new backend gets a line here."""
    if isinstance(store, LocalStore):
        return FileBackend(store, durable=durable)
    if type(store) is ObjectStore:  # a subclass may rely on seeing the requests
        return BucketBackend(store)
    return ZarrBackend(store)
