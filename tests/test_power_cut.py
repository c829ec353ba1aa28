"""Power cuts: whatever was committed is on the disk, and the same command goes on to the same bytes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power_cut import Files, Record, lay_out

from actcache.errors import SiteError, StoreNotFoundError
from actcache.spec import TokenBlocks
from actcache.store import Objects, delete_sites, open_store, repair, verify
from actcache.store.backends.folders import FileBackend
from actcache.store.format.keys import ROWS
from actcache.store.format.records import committed_shards
from actcache.store.format.root import exists_any
from actcache.store.locks.lock_keys import LEASE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import kill

pytestmark = pytest.mark.exhaustive

TEXT = kill.blocks()
FEW, MORE = TEXT.take(range(10)), TEXT.take(range(14))
"""Shards of 4 sequences: 4, 4 and 2, of which the last one is made again for the larger store."""
DAMAGED = "sites/blocks.0.hook_mlp_out/acts/c.1.0"


@dataclass(frozen=True)
class Work:
    """What is done to a store when the power is cut."""

    do: Callable[[Objects], Any]
    before: Callable[[Path], Any] = lambda path: None
    """Makes the store that it is done to."""


def write(*sites: Any, text: Any = FEW) -> Callable[[Any], Any]:
    return lambda place: kill.write(place, kill.spec_of(text, *sites), text)


def write_parts(place: Any) -> None:
    kill.write_parts(place, kill.spec_of(FEW), FEW)


def damage(path: Path) -> None:
    write()(path)
    data = bytearray((path / DAMAGED).read_bytes())
    data[10] ^= 1
    (path / DAMAGED).write_bytes(data)


def abandon(path: Path) -> None:
    """A store that somebody began to extend with other text, and with another codec for the site that is added."""
    write()(path)
    other = TokenBlocks(ids=np.concatenate([FEW.ids, TEXT.ids[20:26]]), document=TEXT.document[:16], description={})
    with kill.StoreWriter(path, kill.spec_of(other), other, grow=True) as writer:
        kill.fill(writer, 3, other)
    site = replace(kill.ADDED, codec="raw")
    with kill.StoreWriter(path, kill.spec_of(FEW, site), FEW, grow=True) as writer:
        kill.fill(writer, 0, FEW)


def killed_and_continued(place: Objects) -> None:
    """The first process dies when it has put the last records, and nobody has flushed them."""
    if not exists_any(place):
        first = Objects(place.root, read_only=False)
        unflushed = FEW.n_sequences // 4

        def flush() -> None:
            if len(committed_shards(first, ROWS)) <= unflushed:
                FileBackend.flush(first.backend)

        first.backend.flush = flush
        with kill.StoreWriter(first, kill.spec_of(FEW), FEW) as writer:
            for shard in writer.pending():
                kill.fill(writer, shard, FEW)
                writer.wait()
    write()(place)


def reopen(place: Objects) -> None:
    repair(place, verify(place))


def mend(place: Objects) -> None:
    reopen(place)
    write()(place)


def delete(place: Objects) -> None:
    with suppress(SiteError):  # it is done already
        delete_sites(place, [kill.ADDED.name])


WORKS = {
    "write": Work(write()),
    "parts": Work(write_parts),
    "extend": Work(write(text=MORE), write()),
    "add a site": Work(write(kill.ADDED), write()),
    "extend what was abandoned": Work(write(text=MORE), abandon),
    "add what was abandoned": Work(write(kill.ADDED), abandon),
    "killed and continued": Work(killed_and_continued),
    "delete a site": Work(delete, write(kill.ADDED)),
    "repair": Work(mend, damage),
    "reopen": Work(reopen, damage),
}


class Cuts:
    """One work, done once with a recorder at its side."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.work, self.folder = work, folder
        place = folder / "disk" / "s.zarr"
        place.parent.mkdir(parents=True)
        work.before(place)
        self.known = []
        if place.exists() and work.before is not damage:
            self.known.append(open_store(shutil.copytree(place, folder / "before.zarr")))
        self.record = Record(place.parent)
        objects = Objects(place, read_only=False)
        with pytest.MonkeyPatch.context() as patch, self.record.recording():
            patch.setattr(objects, "commit", self._marked("commit", objects.commit))
            patch.setattr(objects, "delete", self._marked("delete", objects.delete))
            patch.setattr(objects, "delete_all", self._marked("delete", objects.delete_all))
            work.do(objects)
        self.known.append(open_store(place))
        self.after = kill.contents(place)
        assert not verify(place)

    def _marked(self, what: str, method: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(given: Any) -> None:
            keys = dict(given) if what == "commit" else {given: None}
            self.record.mark(f"{what} begins", keys)
            method(given)
            self.record.mark(f"{what} ends", keys)

        return call

    def check(self, moment: int, files: Files) -> None:
        """What a cut has left can be opened, lacks nothing that was committed, and becomes what it should be."""
        shutil.rmtree(self.folder / "cut", ignore_errors=True)
        lay_out(files, self.folder / "cut")
        path = self.folder / "cut" / "s.zarr"
        self._check_committed(moment, files)
        self._check_store(path)
        self.work.do(Objects(path, read_only=False, durable=False))
        assert kill.contents(path) == self.after

    def _check_committed(self, moment: int, files: Files) -> None:
        """Every object whose commit had ended is there, unless its removal or its replacement had begun."""
        promised: dict[str, list[bytes | None]] = {}
        for what, keys in (event[1:] for event in self.record.events[:moment] if event[0] == "mark"):
            for key, data in keys.items():
                if what == "commit ends":
                    promised[key] = [data]
                elif what == "commit begins" and key in promised:
                    promised[key].append(data)
                elif what == "delete begins":
                    promised = {known: data for known, data in promised.items() if not known.startswith(key)}
        for key, possible in promised.items():
            assert files.get(f"s.zarr/{key}") in possible, key

    def _check_store(self, path: Path) -> None:
        try:
            store = open_store(path)
        except StoreNotFoundError:
            assert not self.record.before[self.record.root]
            return
        reference = next(known for known in self.known if known.spec == store.spec)
        faults = verify(path)
        known = [("blocks.0.hook_mlp_out", 1)] if self.work.before is damage else []
        assert not [fault for fault in faults if (fault.column, fault.shard) not in known]
        shards = [shard for shard in store.committed if not faults]
        ids = store.row_ids()[np.isin(store.row_ids() // store.spec.rows_per_shard, shards)]
        for site in store.sites:
            assert np.array_equal(store.read_stored(site, ids), reference.read_stored(site, ids))


@pytest.fixture(scope="module")
def cuts_of() -> Iterator[Callable[[str], Cuts]]:
    made: dict[str, Cuts] = {}

    def cuts(name: str) -> Cuts:
        if name not in made:
            made[name] = Cuts(WORKS[name], Path(folder) / name)
        return made[name]

    # Thousands of small files are laid out, which nobody wants on a disk.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield cuts


def check_flushed_only(cuts: Cuts) -> None:
    moments = list(cuts.record.flushed_only())
    for moment, files in moments:
        cuts.check(moment, files)
    assert len(moments) > 2
    # What the call has done when it returns is there to stay, but for the locks.
    last = {path.removeprefix("s.zarr/"): data for path, data in moments[-1][1].items() if not path.endswith("/")}
    assert {path: data for path, data in last.items() if path and not path.startswith(LEASE)} == cuts.after


def check_by_chance(cuts: Cuts, seeds: range) -> None:
    for seed in seeds:
        moment = int(np.random.default_rng([seed, 1]).integers(len(cuts.record.events) + 1))
        cuts.check(moment, cuts.record.any_part(moment, seed))


def test_folders_are_there_to_stay_with_what_lies_in_them(tmp_path):
    (tmp_path / "disk").mkdir()
    record = Record(tmp_path / "disk")
    objects = Objects(tmp_path / "disk" / "new" / "s.zarr", read_only=False)
    with record.recording():
        objects.put("a/b/c", b"1")
        objects.flush()
        objects.put("a/d/e/f", b"2")
        objects.flush()
        objects.delete_all("a/d")
        objects.put("a/d/e/f", b"3")
        objects.flush()
        objects.put("a/g", b"4")  # not flushed
    states = [{path: data for path, data in files.items() if data} for _, files in record.flushed_only()]
    there = {f"new/s.zarr/{path}": data for path, data in {"a/b/c": b"1", "a/d/e/f": b"3"}.items()}
    assert states[-1] == there
    assert {**there, "new/s.zarr/a/d/e/f": b"2"} in states


@pytest.mark.parametrize("name", [name for name in WORKS if name != "parts"])
def test_nothing_that_was_committed_needs_what_was_not_flushed(name, cuts_of):
    check_flushed_only(cuts_of(name))


@pytest.mark.parametrize("name", WORKS)
def test_nor_is_it_harmed_by_parts_of_what_was_not_flushed(name, cuts_of):
    check_by_chance(cuts_of(name), range(8))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WORKS)
def test_whatever_parts_they_are(name, cuts_of):
    check_flushed_only(cuts_of(name))
    check_by_chance(cuts_of(name), range(1000, 1400))
