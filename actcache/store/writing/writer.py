"""Write a store, shard by shard: create, continue or grow it, encode in threads, commit, seal.

In: filled `ShardBuffers`. Out: objects, in the order that makes a crash harmless: site data and statistics, row table,
commit records, and once every shard is there the ledger, the totals and (one atomic put) the sealed root attributes.

Several writers, in processes here or on other machines, can share a store that they fill: each claims a shard before
it makes it, and the one that finds all of them committed when it ends seals the store.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, CorruptShardError, StoreBusyError, StoreIncompleteError, StoreMismatchError
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import codecs
from actcache.store.backends.objects import Objects, to_write
from actcache.store.format.binding import Bindings, home_of
from actcache.store.format.keys import ABSENT_ROW, ROW_ARRAYS, ROWS, columns_of, commit_key, row_key
from actcache.store.format.records import Record, committed_shards, read_record, record_length, record_object
from actcache.store.format.root import Root, read_root, write_root
from actcache.store.format.table_objects import UINT32, encode_table
from actcache.store.locks.lock import WriterLock
from actcache.store.store import Store
from actcache.store.writing import begin
from actcache.store.writing.buffers import N_BUFFERS, Allocate, ShardBuffers, Written
from actcache.store.writing.encode import ShardEncoder
from actcache.store.writing.growth import clear_leftovers
from actcache.store.writing.hold import TornShardsError, torn_among
from actcache.store.writing.seal import Check, complete, provenance_after, seal

_Part: TypeAlias = tuple[Record, NDArray[np.float64]]
_CREATION_PATIENCE_S = 600.0
"""Who shares a store waits so long until another one has made it; tokens of a large one take minutes."""
_JOIN_PATIENCE_S = 60.0
"""And so long for one that has it alone: most likely it is being sealed."""
_SEALING_PATIENCE_S = 60.0
"""Who has finished a shared store waits so long for others, that are about to end as well."""
_WAITING_THREADS = 4
"""Encoding threads more where objects are sent far away: each holds one site of one shard, compressed."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


class StoreWriter:
    """Writes one store; use as a context manager. Encoding and disk overlap with the caller's next shard.

    Memory: `n_buffers` shards of all sites, plus one encoded shard of one site per thread.

    Args:
        path: where the store is made, continued or grown.
        spec: what it shall hold when it is finished.
        blocks: the tokens of all its sequences; not needed for a store that exists and does not grow.
        grow: allow a store that holds a part of this already: fewer sequences, or fewer sites.
        shared: other writers that say so too may fill the store at the same time; see `claim`.
        threads: encoding threads; where each answer of the storage takes its time, some more, which mostly wait.
        n_buffers: shards in memory.
        allocate: makes the buffers' arrays, of a shape and a dtype; `numpy.empty` by default.
        provenance: JSON-able, how the store came to be. Of the writer that makes it; a store that is there keeps its
            own.

    Raises:
        StoreMismatchError: there is a store of other settings. StoreBusyError: another process is writing it.
        StorageFullError: the disk has less room than the missing shards are going to need. StoreNotFoundError: there is
        no store, and no tokens to make one.
    """

    def __init__(
        self,
        path: str | Path | Objects,
        spec: StoreSpec,
        blocks: TokenBlocks | None,
        *,
        grow: bool = False,
        shared: bool = False,
        threads: int = 2,
        n_buffers: int = N_BUFFERS,
        allocate: Allocate | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if grow and shared:
            raise ConfigError("a store that grows is written by one writer alone; leave out either grow or shared")
        for site in spec.sites:
            codecs.resolve_codec(site.codec)
        self.objects = to_write(path)
        self.spec, self.n_buffers = spec, n_buffers
        self.provenance: Mapping[str, Any] = provenance or {}
        self._allocate, self._shared = allocate, shared
        self._before: Root | None = None
        self._outgrown: int | None = None
        self._columns, self._bindings = columns_of(spec), Bindings(spec)
        self._vouched = self._vouched_for()
        if shared:
            self._make_unless_there(blocks)
        self._lock = WriterLock(self.objects, shared=shared)
        self._lock.acquire(patience_s=_JOIN_PATIENCE_S if shared else 0.0)
        try:
            if shared:
                self._join(blocks)
            else:
                self._open(blocks, grow)
            self.sites = self._lacking()
        except BaseException:
            self._lock.release()
            raise
        waiting = 0 if self.objects.is_local else _WAITING_THREADS
        self._pool = ThreadPoolExecutor(threads + waiting, thread_name_prefix="actcache-encode")
        self._free: queue.SimpleQueue[ShardBuffers] = queue.SimpleQueue()
        self._buffers_left = n_buffers
        self._running: list[Future[None]] = []
        self._local = threading.local()
        self._written, self._counting = Written(), threading.Lock()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=exception[0] is not None)
        self._lock.release()

    @property
    def written(self) -> Written:
        """What this writer has committed so far; may be read from any thread."""
        return self._written

    @property
    def queued(self) -> int:
        """Shards that were submitted and are not committed yet."""
        return sum(not future.done() for future in list(self._running))

    def _open(self, blocks: TokenBlocks | None, may_grow: bool) -> None:
        """Look at what is there and make it ready for shards; of a writer that is alone."""
        found = begin.look(self.objects, self.spec, blocks, may_grow=may_grow)
        self._before = None if found is None or found.spec == self.spec else found
        self._outgrown = self._find_outgrown()
        self._vouched = self._vouched_for()
        self._committed = self._list_committed()
        self._check_room()  # before anything is written
        self.objects.remove_partial_writes()
        if found is None:
            if blocks is None:
                raise StoreIncompleteError(f"{self.objects} was never begun properly; begin it with its tokens")
            found = begin.create(self.objects, self.spec, blocks, self.provenance)
        elif self._before and blocks is not None:
            clear_leftovers(self.objects, found.spec, self.spec, blocks)
            begin.put_arrays(self.objects, self.spec, blocks, found.spec.n_sequences)
            self._committed = self._list_committed()
        self.provenance = found.provenance
        if found.state == "sealed" and self._before is None and self.pending():  # records are gone: a copy's, perhaps
            write_root(self.objects, replace(found, state="open", fingerprint=None, digests=()))
        if found.state != "sealed" or self._before is not None:
            reader = Store(self.objects, Root(state="open", spec=self.spec), lies_there=False)
            made = {shard: self._own(shard) for shard in range(self.spec.n_shards) if not self.missing(shard)}
            self._take_back(torn_among(reader, made))

    def _make_unless_there(self, blocks: TokenBlocks | None) -> None:
        """Let the first of those who share a store make it, alone; the others wait until it is there."""
        until, pause_s = monotonic() + _CREATION_PATIENCE_S, _FIRST_PAUSE_S
        while begin.look(self.objects, self.spec, blocks, may_grow=False) is None:
            try:
                if blocks is not None:
                    with WriterLock(self.objects):
                        self._open(blocks, may_grow=False)
                    return
            except StoreBusyError:
                if monotonic() > until:
                    raise
            if monotonic() > until:
                raise StoreIncompleteError(f"{self.objects} is still being created; try again later")
            pause_s = _pause(pause_s)

    def _join(self, blocks: TokenBlocks | None) -> None:
        """Look at a store that others may be writing too."""
        found = begin.look(self.objects, self.spec, blocks, may_grow=False)
        if found is None:
            raise StoreIncompleteError(f"{self.objects} was taken away and is being made anew; try again")
        self._committed = self._list_committed()
        if found.state == "sealed" and self.pending():
            raise CorruptShardError(
                f"{self.objects} is sealed, and commit records of shards {self.pending()[:3]} are missing; "
                "give the command again without a part"
            )
        self._check_room()
        self.provenance = found.provenance

    def _list_committed(self) -> dict[str, set[int]]:
        return {name: committed_shards(self.objects, name) for name in self._columns}

    def _lacking(self) -> list[Site]:
        """Sites of which a shard has to be made."""
        lacking = {name for shard in self.pending() for name in self.missing(shard)}
        return [site for site in self.spec.sites if site.name in lacking]

    def _find_outgrown(self) -> int | None:
        """The shard that was the last and partial one before the store grew: it has to be made again."""
        before = self._before.spec if self._before else self.spec
        grown = self.spec.n_sequences > before.n_sequences and before.n_sequences % before.sequences_per_shard
        return before.n_shards - 1 if grown else None

    def _vouched_for(self) -> tuple[int, list[str]]:
        """How many shards, from the first on, a seal vouches for, and the columns that are added to those.

        What a seal vouches for is not made again.
        """
        before = self._before
        if before is None or before.state != "sealed":
            return 0, []
        known = columns_of(before.spec)
        return before.spec.n_shards - (self._outgrown is not None), [
            name for name in self._columns if name not in known
        ]

    def _own(self, shard: int) -> list[str]:
        """Columns of a shard that are made together: all, or those that are added to a sealed store."""
        n_shards, added = self._vouched
        return added if shard < n_shards else self._columns

    def missing(self, shard: int) -> list[str]:
        """Columns of a shard that have to be written: none, or all that are made together."""
        names = self._own(shard)
        there = all(shard in self._committed[name] for name in names)
        return [] if there and shard != self._outgrown else names

    def _take_back(self, shards: Iterable[int]) -> None:
        """Un-commit what this writer is to make of some shards: no record may outlive what it lists."""
        for shard in shards:
            for name in self._own(shard):
                if shard in self._committed[name]:
                    self.objects.delete(commit_key(name, shard))
                    self._committed[name].discard(shard)

    def pending(self) -> list[int]:
        """Shards that have to be made, the outgrown one last: until then the store stays what it was."""
        shards = [shard for shard in range(self.spec.n_shards) if self.missing(shard)]
        return sorted(shards, key=lambda shard: (shard == self._outgrown, shard))

    def _check_room(self) -> None:
        begin.check_room(self.objects, self.spec, ((shard, self.missing(shard)) for shard in self.pending()))

    def claim(self, shard: int) -> bool:
        """Whether a shard is to be made by this writer: it is not committed, and nobody else is making it.

        From then on it is this writer's until it is committed, or the writer ends. A writer that shares the store has
        to claim a shard before it acquires buffers for it; one that is alone has every shard that is missing.
        """
        if not self._shared or not self.missing(shard):
            return bool(self.missing(shard))
        if not self._lock.claim(shard):
            return False
        for name in self._own(shard):  # another one may have committed it since we looked
            if self.objects.size(commit_key(name, shard)) >= 0:
                self._committed[name].add(shard)
        if self.missing(shard):
            return True
        self._lock.unclaim(shard)
        return False

    def acquire(self, shard: int) -> ShardBuffers:
        """Buffers for a shard; waits while all of them are being written. Raises what a write before has raised."""
        self._raise_failures()
        if not self._lock.holds(shard):
            raise StoreBusyError(f"others may be making shard {shard} of {self.objects}; claim it before it is made")
        if shard == self._outgrown:
            self._adopt()
        self._take_back([shard])  # what others have begun of it
        if self._buffers_left:
            self._buffers_left -= 1
            buffers = ShardBuffers(self.spec, self.sites, self._allocate)
        else:
            buffers = self._free.get()
            self._raise_failures()
        buffers.shard = shard
        return buffers

    def submit(self, buffers: ShardBuffers, ids: NDArray[np.uint32], kept: NDArray[np.bool_] | None = None) -> None:
        """Encode, store and commit a filled shard in the background.

        Args:
            buffers: their first rows are the shard's kept rows, in reading order.
            ids: `(q, T)` tokens of the shard's sequences.
            kept: `(q * rows_per_sequence,)` which rows there are; all by default.
        """
        buffers.keep(kept)
        missing = self.missing(buffers.shard)
        sites = [site for site in self.spec.sites if site.name in missing]
        parts: list[Future[Any]] = [self._pool.submit(self._write_site, buffers, site) for site in sites]
        # A shard that lacks nothing but its row table still gives its buffers back behind one part.
        parts = parts or [self._pool.submit(lambda: ("", None))]
        self._running.append(self._after(parts, lambda found: self._commit(buffers, ids, dict(found)), buffers))

    def finish(self, check: Check | None = None) -> Store:
        """Wait for every write, seal the store if it is complete, and open it.

        Of writers that share a store, the one that ends last seals it; what the others get is not sealed. Nothing can
        be written afterwards.

        Args:
            check: is given the complete store, in state `open`, by the writer that is about to seal it. What it returns
                is appended to `audits` in the store's provenance. When it raises `AuditError`, the store is not sealed
                and the error's entry is appended instead; a store that has grown stays sealed as it was, unless its
                last shard had to be taken back. By default the store is sealed without it.

        Raises:
            AuditError: what `check` raised.
        """
        self.wait()
        if self._shared:
            self._seal_together(check)
        elif not self.pending():
            root = read_root(self.objects)
            if root.state != "sealed" or root.spec != self.spec:
                self._seal(root, check)
        store = Store(self.objects, read_root(self.objects))
        store.check()
        return store

    def wait(self) -> None:
        """Wait until all shards that were submitted are committed. Raises what a write has raised."""
        for future in self._running:
            future.result()
        self._running.clear()

    def _seal(self, root: Root, check: Check | None) -> None:
        """Seal a store of which everything is there, alone; `root` is the one that lies there."""
        try:
            held = complete(self.objects, self.spec, self._before)
        except TornShardsError as error:
            self._take_back({shard for shard, column in error.torn if column in self._own(shard)})
            raise
        provenance = None if check is None else provenance_after(self.objects, root, self.spec, check)
        self._adopt()
        seal(self.objects, held, provenance)

    def _seal_together(self, check: Check | None) -> None:
        """Give the store back, and if all of it is there seal it, alone; of several who try at once the first does.

        All of them try: who has got the store alone may be killed.
        """
        self._committed = self._list_committed()
        self._lock.release()
        until, pause_s = monotonic() + _SEALING_PATIENCE_S, _FIRST_PAUSE_S
        while not self.pending() and monotonic() < until and read_root(self.objects).state == "open":
            try:
                with WriterLock(self.objects):
                    self._seal_alone(check)
            except StoreBusyError:
                pause_s = _pause(pause_s)

    def _seal_alone(self, check: Check | None) -> None:
        root = read_root(self.objects)
        self._committed = self._list_committed()  # it may have been repaired, or grown, before we were alone
        if root.state == "open" and root.spec == self.spec and not self.pending():
            self.objects.remove_partial_writes()
            self._seal(root, check)

    def _adopt(self) -> None:
        """Make a grown store's new spec the one in force; from here on it is unfinished until it is sealed again."""
        self.wait()
        if self._before is None or read_root(self.objects).spec == self.spec:
            return
        if self._outgrown is not None:
            before = Root(state="open", spec=self._before.spec, provenance=self.provenance)
            write_root(self.objects, before)
            for name in columns_of(self.spec):
                self.objects.delete(commit_key(name, self._outgrown))
                self._committed[name].discard(self._outgrown)
            self._outgrown = None
        write_root(self.objects, Root(state="open", spec=self.spec, provenance=self.provenance))

    def _after(
        self, parts: list[Future[Any]], then: Callable[[list[Any]], None], buffers: ShardBuffers
    ) -> Future[None]:
        """Run `then` with the results once all parts are done, and give the buffers back whatever happened."""
        done: Future[None] = Future()
        remaining = threading.Semaphore(len(parts) - 1)

        def check(_: Future[Any]) -> None:
            if remaining.acquire(blocking=False):
                return
            try:
                then([part.result() for part in parts])
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
            finally:
                self._free.put(buffers)

        for part in parts:
            part.add_done_callback(check)
        return done

    def _raise_failures(self) -> None:
        for future in self._running:
            if future.done():
                future.result()
        self._running = [future for future in self._running if not future.done()]

    def _write_site(self, buffers: ShardBuffers, site: Site) -> tuple[str, _Part]:
        if not hasattr(self._local, "encoder"):
            self._local.encoder = ShardEncoder(self.objects, self.spec)
        encoder: ShardEncoder = self._local.encoder
        return site.name, encoder.write(site, buffers.shard, buffers.rows[site.name], buffers.order)

    def _commit(self, buffers: ShardBuffers, ids: NDArray[np.uint32], sites: dict[str, _Part | None]) -> None:
        """The row table, then the records of all columns: from here on the shard counts."""
        made = {name: part for name, part in sites.items() if part is not None}
        rows, missing = self._write_rows(buffers, ids), self.missing(buffers.shard)
        home = home_of(rows.to_bytes(record_length(self.spec, ROWS)), ids)
        bound = {
            name: replace(record, binding=self._bindings.of(name, buffers.shard, home))
            for name, (record, _) in made.items()
        }
        records = {ROWS: rows, **bound}
        self.objects.commit([record_object(self.spec, name, buffers.shard, records[name]) for name in missing])
        for name in missing:
            self._committed[name].add(buffers.shard)
        with self._counting:
            n_bytes = sum(records[name].n_bytes for name in missing)
            self._written = self._written.with_shard(n_bytes, {name: line for name, (_, line) in made.items()})
        self._lock.unclaim(buffers.shard)

    def _write_rows(self, buffers: ShardBuffers, ids: NDArray[np.uint32]) -> Record:
        """Put the row table, or hold it against the one that is committed: sites added later are of the same rows."""
        spec, shard = self.spec, buffers.shard
        sequence, position = np.divmod(buffers.kept[buffers.order], spec.rows_per_sequence)
        position += spec.skip_first
        table = {
            "sequence": sequence + spec.shard_sequences(shard).start,
            "position": position,
            "token": ids[sequence, position],
        }
        checksums, objects = [], []
        for name in ROW_ARRAYS:
            padded = np.full(spec.rows_per_shard, ABSENT_ROW, UINT32)
            padded[: len(sequence)] = table[name]
            crc, data = encode_table(padded)
            checksums.append(crc)
            objects.append((row_key(name, shard), data))
        if ROWS in self.missing(shard):
            self.objects.put_all(objects)
        n_bytes = sum(len(data) for _, data in objects)
        record = Record(n_rows=len(sequence), n_bytes=n_bytes, checksums=tuple(checksums))
        if ROWS not in self.missing(shard) and record != read_record(self.objects, spec, ROWS, shard):
            raise StoreMismatchError(
                f"the rows of shard {shard} are not those that {self.objects} has (another text, or other rows left "
                "out), so nothing is added to it"
            )
        return record


def _pause(seconds: float) -> float:
    """Wait about so long, each process another time; how long to wait the next time."""
    sleep(seconds * random.uniform(0.5, 1.0))  # noqa: S311
    return min(2 * seconds, _LONGEST_PAUSE_S)
