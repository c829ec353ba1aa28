"""Write a store, shard by shard: create, continue or grow it, encode in threads, commit, seal.

In: filled `ShardBuffers`. Out: objects, in the order that makes a crash harmless: site data and statistics, row table,
commit records, and once every shard is there the ledger, the totals and (one atomic put) the sealed root attributes.

Several writers, in processes here or on other machines, can fill one store together: each claims a shard before it
makes it, and the one that finds all shards committed when it ends seals the store.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, CorruptShardError, StoreBusyError, StoreIncompleteError
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import codecs
from actcache.store.backends.objects import Objects, to_write
from actcache.store.format.binding import Bindings, home_of
from actcache.store.format.keys import ROWS
from actcache.store.format.records import Record, record_length, record_object
from actcache.store.format.root import Root, read_root, write_root
from actcache.store.locks.lock import WriterLock, attempts
from actcache.store.store import Store
from actcache.store.writing import begin
from actcache.store.writing.agenda import Agenda
from actcache.store.writing.buffers import N_BUFFERS, Allocate, ShardBuffers, Written
from actcache.store.writing.encode import ShardEncoder
from actcache.store.writing.growth import clear_leftovers
from actcache.store.writing.integrity import TornShardsError, torn_among
from actcache.store.writing.row_table import put_row_table
from actcache.store.writing.seal import Check, check_complete, provenance_after, seal

_Part: TypeAlias = tuple[Record, NDArray[np.float64]]
_CREATION_PATIENCE_S = 600.0
"""How long a writer that shares a store waits for another one to create it; tokens of a large store take minutes."""
_JOIN_PATIENCE_S = 60.0
"""How long it waits for a writer that holds the store alone, most likely to seal it."""
_SEALING_PATIENCE_S = 60.0
"""How long a writer that has finished a shared store waits for others that are about to end as well."""
_SENDING_THREADS = 4
"""Additional encoding threads where objects are sent far away: each holds one site of one shard, compressed."""


class StoreWriter:
    """Writes one store; use as a context manager. Encoding and disk overlap with the caller's next shard.

    Memory: `n_buffers` shards of all sites, plus one encoded shard of one site per thread.

    Args:
        path: where the store is made, continued or grown.
        spec: what the store shall hold when it is finished.
        blocks: the tokens of all its sequences; not needed for a store that exists and does not grow.
        grow: allow a store that holds only a part of this: fewer sequences, or fewer sites.
        shared: other writers that share the store may fill it at the same time; see `claim`.
        threads: encoding threads; where storage is slow to answer, some more, which mostly wait.
        n_buffers: shards in memory.
        allocate: makes the buffers' arrays from a shape and a dtype; `numpy.empty` by default.
        provenance: JSON-able, how the store came to be. Used when the store is created; an existing one keeps its own.

    Raises:
        StoreMismatchError: there is a store with other settings. StoreBusyError: another process is writing it.
        StorageFullError: the disk has less room than the missing shards need. StoreNotFoundError: there is no store,
        and there are no tokens to make one.
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
        self._bindings = Bindings(spec)
        if shared:
            self._create_or_wait(blocks)
        self._lock = WriterLock(self.objects, shared=shared)
        self._lock.acquire(patience_s=_JOIN_PATIENCE_S if shared else 0.0)
        try:
            if shared:
                self._agenda = self._prepare_shared(blocks)
            else:
                self._agenda = self._prepare_alone(blocks, grow)
            self.sites = self._agenda.sites_to_write()
            """Sites of which the buffers have to be filled: a shard of each is missing."""
        except BaseException:
            self._lock.release()
            raise
        sending = 0 if self.objects.is_local else _SENDING_THREADS
        self._pool = ThreadPoolExecutor(threads + sending, thread_name_prefix="actcache-encode")
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

    def _prepare_alone(self, blocks: TokenBlocks | None, may_grow: bool) -> Agenda:
        """Create, continue or grow the store. Call only while holding it alone."""
        found = begin.look(self.objects, self.spec, blocks, may_grow=may_grow)
        before = None if found is None or found.spec == self.spec else found
        agenda = Agenda(self.objects, self.spec, before)
        begin.check_room(self.objects, self.spec, agenda)  # before anything is written
        self.objects.remove_partial_writes()
        if found is None:
            if blocks is None:
                raise StoreIncompleteError(
                    f"the creation of {self.objects} was not finished; create it with its tokens"
                )
            found = begin.create(self.objects, self.spec, blocks, self.provenance)
        elif before and blocks is not None:
            clear_leftovers(self.objects, found.spec, self.spec, blocks)
            begin.put_arrays(self.objects, self.spec, blocks, found.spec.n_sequences)
            agenda.read_records()
        self.provenance = found.provenance
        if found.state == "sealed" and before is None and agenda.pending():  # records are gone: it may be a copy
            write_root(self.objects, replace(found, state="open", fingerprint=None, digests=()))
        if found.state != "sealed" or before is not None:
            reader = Store(self.objects, Root(state="open", spec=self.spec), lies_there=False)
            agenda.uncommit(torn_among(reader, agenda.done()))
        return agenda

    def _create_or_wait(self, blocks: TokenBlocks | None) -> None:
        """Of the writers that share a store, let the first create it, alone; the others wait until it is there."""
        for is_last in attempts(_CREATION_PATIENCE_S):
            if begin.look(self.objects, self.spec, blocks, may_grow=False) is not None:
                return
            try:
                if blocks is not None:
                    with WriterLock(self.objects):
                        self._prepare_alone(blocks, may_grow=False)
                    return
            except StoreBusyError:
                if is_last:
                    raise
        raise StoreIncompleteError(f"{self.objects} is still being created; try again later")

    def _prepare_shared(self, blocks: TokenBlocks | None) -> Agenda:
        """Continue a store that others may be writing too."""
        found = begin.look(self.objects, self.spec, blocks, may_grow=False)
        if found is None:
            raise StoreIncompleteError(f"{self.objects} was removed and is being created again; try again")
        agenda = Agenda(self.objects, self.spec)
        if found.state == "sealed" and (pending := agenda.pending()):
            raise CorruptShardError(
                f"{self.objects} is sealed, and commit records of shards {pending[:3]} are missing; "
                "give the command again without a part"
            )
        begin.check_room(self.objects, self.spec, agenda)
        self.provenance = found.provenance
        return agenda

    def pending(self) -> list[int]:
        """Shards that have to be written, in the order in which they should be."""
        return self._agenda.pending()

    def claim(self, shard: int) -> bool:
        """Whether this writer is to write a shard: it is not committed, and no other writer is writing it.

        From then on it is this writer's until it is committed, or the writer ends. A writer that shares the store has
        to claim a shard before it acquires buffers for it; a writer that is alone has every shard that is missing.
        """
        return self._agenda.claim(shard, self._lock)

    def acquire(self, shard: int) -> ShardBuffers:
        """Buffers for a shard; waits while all of them are being written. Raises what an earlier write has raised."""
        self._raise_failures()
        if not self._lock.holds(shard):
            raise StoreBusyError(f"other writers may be writing shard {shard} of {self.objects}; claim it first")
        if shard == self._agenda.outgrown:
            self._put_grown_root()
        self._agenda.uncommit([shard])  # of which some columns may be committed
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
        buffers.shuffle(kept)
        missing = self._agenda.missing(buffers.shard)
        sites = [site for site in self.spec.sites if site.name in missing]
        parts: list[Future[Any]] = [self._pool.submit(self._write_site, buffers, site) for site in sites]
        # A shard that lacks only its row table has no site to write; its buffers are given back all the same.
        parts = parts or [self._pool.submit(lambda: None)]
        self._running.append(
            self._when_done(parts, lambda made: self._commit(buffers, ids, missing, dict(filter(None, made))), buffers)
        )

    def finish(self, check: Check | None = None) -> Store:
        """Wait for every write, seal the store if it is complete, and open it.

        If several writers share a store, the one that ends last seals it; the others get a store that is not sealed.
        Nothing can be written afterwards.

        Args:
            check: called with the complete store, in state `open`, by the writer that is about to seal it. What it
                returns is appended to `audits` in the store's provenance. When it raises `AuditError`, the store is not
                sealed and the error's entry is appended instead; a store that has grown stays sealed as it was, unless
                its last shard had to be written again. By default the store is sealed without a check.

        Raises:
            AuditError: what `check` raised.
        """
        self.wait()
        if self._shared:
            self._seal_shared(check)
        root = read_root(self.objects)
        if not self._shared and not self.pending() and (root.state, root.spec) != ("sealed", self.spec):
            root = self._seal(root, check)
        store = Store(self.objects, root)
        store.check()
        return store

    def wait(self) -> None:
        """Wait until all shards that were submitted are committed. Raises what a write has raised."""
        for future in self._running:
            future.result()
        self._running.clear()

    def _seal(self, root: Root, check: Check | None) -> Root:
        """Seal a complete store whose root is `root`, and return the sealed root. Call only while holding it alone."""
        try:
            complete = check_complete(self.objects, self.spec, self._agenda.before)
        except TornShardsError as error:
            own = self._agenda.columns_written_together
            self._agenda.uncommit({shard for shard, column in error.torn if column in own(shard)})
            raise
        provenance = None if check is None else provenance_after(self.objects, root, self.spec, check)
        self._put_grown_root()
        return seal(self.objects, complete, provenance)

    def _seal_shared(self, check: Check | None) -> None:
        """Give the store back and, if it is complete, seal it alone; if several writers try at once, the first does.

        All of them try, because the one that holds the store alone may be killed.
        """
        self._agenda.read_records()
        self._lock.release()
        for _ in attempts(_SEALING_PATIENCE_S):
            if self.pending() or read_root(self.objects).state != "open":
                return
            try:
                with WriterLock(self.objects):
                    self._seal_if_complete(check)
                return
            except StoreBusyError:
                pass

    def _seal_if_complete(self, check: Check | None) -> None:
        root = read_root(self.objects)
        self._agenda.read_records()  # it may have been repaired, or have grown, before we held it alone
        if root.state == "open" and root.spec == self.spec and not self.pending():
            self.objects.remove_partial_writes()
            self._seal(root, check)

    def _put_grown_root(self) -> None:
        """Replace the spec of a store that grows; from here on the store is unfinished until it is sealed again."""
        self.wait()
        before = self._agenda.before
        if before is None or read_root(self.objects).spec == self.spec:
            return
        if self._agenda.outgrown is not None:
            write_root(self.objects, Root(state="open", spec=before.spec, provenance=self.provenance))
            self._agenda.uncommit_outgrown()
        write_root(self.objects, Root(state="open", spec=self.spec, provenance=self.provenance))

    def _when_done(
        self, parts: list[Future[Any]], then: Callable[[list[Any]], None], buffers: ShardBuffers
    ) -> Future[None]:
        """Call `then` with the results once all parts are done, and give the buffers back in any case."""
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

    def _commit(
        self, buffers: ShardBuffers, ids: NDArray[np.uint32], missing: list[str], made: dict[str, _Part]
    ) -> None:
        """Put the row table, then the records of all missing columns: from here on the shard counts."""
        shard = buffers.shard
        rows = put_row_table(self.objects, buffers, ids, is_committed=ROWS not in missing)
        home = home_of(rows.to_bytes(record_length(self.spec, ROWS)), ids)
        records = {ROWS: rows}
        for name, (record, _) in made.items():
            records[name] = replace(record, binding=self._bindings.of(name, shard, home))
        self.objects.commit([record_object(self.spec, name, shard, records[name]) for name in missing])
        self._agenda.note_committed(shard, missing)
        with self._counting:
            n_bytes = sum(records[name].n_bytes for name in missing)
            self._written = self._written.with_shard(n_bytes, {name: line for name, (_, line) in made.items()})
        self._lock.unclaim(shard)
