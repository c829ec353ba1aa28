"""A disk that loses what was not flushed: what is done to a folder is recorded, and played back up to any moment.

The system calls that change the folder are recorded on their way. From the record comes the folder as a power cut at
any moment would leave it, by what POSIX promises: a file's bytes are there once the file was flushed, a name once its
folder was. Of everything else nothing is there or, given a random generator, any part of it: names without bytes, bytes
that are cut short or zero, newer names without older ones.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Content = bytes | dict[str, "Node"]
"""Of a file its bytes, of a folder its names."""
Files = dict[str, bytes]
"""A folder's files, by their paths in it."""


@dataclass(eq=False)
class Node:
    """A file or a folder, whatever it is called; of a folder the names in it at this moment of the recording."""

    names: dict[str, Node] | None = None


@dataclass(eq=False)
class Record:
    """What was done to a folder, in order.

    `events` are `("name", folder, {name: node or None})`, `("write", file, bytes or None to empty it)`, `("flush",
    node)`, and `("mark", ...)`, which the test puts there.
    """

    folder: Path
    events: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before: dict[Node, Content] = {}
        """All that was there, on the disk, when the recording began."""
        self._files: dict[int, Node] = {}
        self._lock = threading.RLock()
        self.root = self._read(self.folder)

    def _read(self, path: Path) -> Node:
        node = Node({place.name: self._read(place) for place in path.iterdir()} if path.is_dir() else None)
        self.before[node] = path.read_bytes() if node.names is None else dict(node.names)
        return node

    def mark(self, *said: Any) -> None:
        with self._lock:
            self.events.append(("mark", *said))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this process does to the folder. Flushing is only noted: nobody cuts the power here."""
        calls = {
            "open": self._opened,
            "write": self._written,
            "writev": self._written,
            "replace": self._moved,
            "link": self._linked,
            "unlink": self._removed,
            "rmdir": self._removed,
            "mkdir": self._made,
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, note in calls.items():
                patch.setattr(os, name, self._recorded(getattr(os, name), note))
            patch.setattr(os, "fsync", self._flushed)
            yield

    def _recorded(self, system: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                result = system(*arguments, **options)
                note(result, *arguments, **options)
                return result

        return call

    def _parts(self, path: Any, dir_fd: int | None) -> list[str] | None:
        """The names that lead from the folder to a path; None when it lies elsewhere."""
        above = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        below = os.path.relpath(os.path.join(above, os.fspath(path)), self.folder)
        return None if below.startswith("..") else below.split("/")

    def _name(self, parts: list[str], node: Node | None) -> None:
        folder = self._find(parts[:-1])
        assert folder is not None
        self._rename(folder, {parts[-1]: node})

    def _rename(self, folder: Node, names: dict[str, Node | None]) -> None:
        self.events.append(("name", folder, names))
        assert folder.names is not None
        _apply(folder.names, names)

    def _find(self, parts: list[str]) -> Node | None:
        node: Node | None = self.root
        for part in parts:
            if part != ".":
                node = None if node is None or node.names is None else node.names.get(part)
        return node

    def _opened(self, descriptor: int, path: Any, flags: int, mode: int = 0, *, dir_fd: int | None = None) -> None:
        self._files.pop(descriptor, None)  # of a file that was closed
        parts = self._parts(path, dir_fd)
        if parts is None:
            return
        found = self._find(parts)
        if found is None:
            self._name(parts, found := Node())
        elif flags & os.O_TRUNC:
            self.events.append(("write", found, None))
        self._files[descriptor] = found

    def _written(self, n_bytes: int, descriptor: int, data: Any) -> None:
        if descriptor in self._files:
            parts = data if isinstance(data, list) else [data]
            self.events.append(("write", self._files[descriptor], b"".join(map(bytes, parts))[:n_bytes]))

    def _flushed(self, descriptor: int) -> None:
        with self._lock:
            if descriptor in self._files:
                self.events.append(("flush", self._files[descriptor]))

    def _moved(self, _: None, old: Any, new: Any) -> None:
        parts, target = self._parts(old, None), self._parts(new, None)
        if parts is not None:
            assert target is not None
            assert parts[:-1] == target[:-1]
            folder, node = self._find(parts[:-1]), self._find(parts)
            self._rename(folder, {parts[-1]: None, target[-1]: node})

    def _linked(self, _: None, old: Any, new: Any) -> None:
        parts = self._parts(new, None)
        if parts is not None:
            self._name(parts, self._find(self._parts(old, None)))

    def _removed(self, _: None, path: Any, *, dir_fd: int | None = None) -> None:
        parts = self._parts(path, dir_fd)
        if parts is not None:
            self._name(parts, None)

    def _made(self, _: None, path: Any, mode: int = 0, *, dir_fd: int | None = None) -> None:
        parts = self._parts(path, dir_fd)
        if parts is not None:
            self._name(parts, Node({}))

    def flushed_only(self) -> Iterator[tuple[int, Files]]:
        """Every folder that a cut can leave of which nothing stays but what was flushed, and the moment of the cut."""
        disk, last = Disk(self), None
        for moment in range(len(self.events) + 1):
            if moment and not disk.go_on(self.events[moment - 1]):
                continue
            files = disk.files(None)
            if files != last:
                last = files
                yield moment, files

    def any_part(self, moment: int, seed: int) -> Files:
        """A folder that a cut at this moment can leave: what was flushed, and of all else any part."""
        disk = Disk(self)
        for event in self.events[:moment]:
            disk.go_on(event)
        return disk.files(np.random.default_rng(seed))


class Disk:
    """What is on the disk, and what was done since."""

    def __init__(self, record: Record) -> None:
        self._root, self._safe = record.root, dict(record.before)
        self._since: dict[Node, list[Any]] = {}

    def go_on(self, event: tuple[Any, ...]) -> bool:
        """Take in what was done next; whether that changed what is surely there."""
        what, node, *more = event
        if what == "flush":
            self._safe[node] = self._with(node, self._since.pop(node, []))
        elif what in ("name", "write"):
            self._since.setdefault(node, []).extend(more)
        return what == "flush"

    def _with(self, node: Node, changes: list[Any]) -> Content:
        content = self._safe.get(node, b"" if node.names is None else {})
        if isinstance(content, dict):
            content = dict(content)
            for names in changes:
                _apply(content, names)
            return content
        for data in changes:
            content = b"" if data is None else content + data
        return content

    def files(self, rng: np.random.Generator | None) -> Files:
        """All files that can be found from the top; by chance with some of what was not flushed."""
        found: Files = {}
        self._collect(self._root, "", rng, found)
        return found

    def _collect(self, node: Node, path: str, rng: np.random.Generator | None, found: Files) -> None:
        content = self._with(node, []) if rng is None else self._by_chance(node, rng)
        if isinstance(content, bytes):
            found[path] = content
            return
        found[f"{path}/"] = b""
        for name, below in content.items():
            self._collect(below, f"{path}/{name}" if path else name, rng, found)

    def _by_chance(self, node: Node, rng: np.random.Generator) -> Content:
        since = self._since.get(node, [])
        if node.names is not None:
            share = rng.random()
            return self._with(node, [names for names in since if rng.random() < share])
        safe, now = self._with(node, []), self._with(node, since)
        assert isinstance(safe, bytes)
        assert isinstance(now, bytes)
        cut = int(rng.integers(0, len(now) + 1))
        ways = [safe, now, now[:cut], now[:cut].ljust(len(now), b"\0")] if since else [now]
        return ways[rng.integers(len(ways))]


def _apply(content: dict[str, Node], names: dict[str, Node | None]) -> None:
    for name, node in names.items():
        if node is None:
            content.pop(name, None)
        else:
            content[name] = node


def lay_out(files: Files, folder: Path) -> None:
    """Make such a folder; it may be there, empty."""
    for path, data in files.items():
        place = folder / path
        if path.endswith("/") or not path:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.write_bytes(data)
