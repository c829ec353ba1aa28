"""Write a store, shard by shard: create, continue or grow it, encode in threads, commit, seal.

In: filled `ShardBuffers`. Out: objects, in the order that makes a crash harmless: site data and statistics, row table,
commit records, and once every shard is there the ledger, the totals and (one atomic put) the sealed root attributes.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import NotAStoreError, StorageFullError, StoreMismatchError
from actcache.order import permutation
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import codecs, grow, layout, metadata
from actcache.store.encode import ShardEncoder
from actcache.store.objects import Objects
from actcache.store.reader import Store
from actcache.store.seal import seal


class ShardBuffers:
    """One shard's rows in memory, in stored dtype and reading order; reused from shard to shard.

    They are shuffled when they are encoded, chunk by chunk, so that the forward pass's thread only appends.
    """

    def __init__(self, spec: StoreSpec, sites: Sequence[Site]) -> None:
        dtype = codecs.STORED_DTYPE[spec.dtype]
        self.spec, self.shard = spec, -1
        self.rows = {site.name: np.empty((spec.rows_per_shard, site.width), dtype) for site in sites}
        self.kept: NDArray[np.int64] = np.empty(0, np.int64)
        self.order: NDArray[np.int64] = np.empty(0, np.int64)

    def keep(self, kept: NDArray[np.bool_] | None) -> None:
        """Say which of the shard's rows are in the buffers; row i on disk will be row `order[i]` of those."""
        capacity = len(self.spec.shard_rows(self.shard))
        self.kept = np.arange(capacity) if kept is None else np.flatnonzero(kept)
        self.order = permutation(len(self.kept), self.spec.seed, self.shard)


class StoreWriter:
    """Writes one store; use as a context manager. Encoding and disk overlap with the caller's next shard.

    Memory: `n_buffers` shards of all sites, plus one encoded shard of one site per thread.

    Args:
        path: where the store is made, continued or grown.
        spec: what it shall hold when it is finished.
        blocks: the tokens of all its sequences.
        grow: allow a store that holds a part of this already: fewer sequences, or fewer sites.
        threads: encoding threads.
        n_buffers: shards in memory.

    Raises:
        StoreMismatchError: there is a store of other settings. StoreBusyError: another process is writing it.
        StorageFullError: the disk has less room than the missing shards are going to need.
    """

    def __init__(
        self,
        path: str | Path | Objects,
        spec: StoreSpec,
        blocks: TokenBlocks,
        *,
        grow: bool = False,
        threads: int = 2,
        n_buffers: int = 2,
    ) -> None:
        for site in spec.sites:
            codecs.chain_of(site.codec)
        self.objects = path if isinstance(path, Objects) else Objects(path, read_only=False)
        self.spec = spec
        self._lock = self.objects.lock()
        self._lock.__enter__()
        try:
            found = self._look(blocks, grow)
            self._before = None if found is None or found.spec == spec else found
            self._outgrown = self._find_outgrown()
            self._committed = self._list_committed()
            self._check_room()  # before anything is written
            self._prepare(blocks, found)
            self._committed = self._list_committed() if self._before else self._committed
            self.sites = self._lacking()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="actcache-encode")
        self._free: queue.SimpleQueue[ShardBuffers] = queue.SimpleQueue()
        self._buffers_left = n_buffers
        self._running: list[Future[None]] = []
        self._local = threading.local()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=exception[0] is not None)
        self._lock.__exit__(None, None, None)

    def _look(self, blocks: TokenBlocks, may_grow: bool) -> layout.Root | None:
        """The root of the store that is there, None where one has to be made; an error when it is another one."""
        if self.objects.size("zarr.json") < 0:
            if self.objects.exists_any():
                raise NotAStoreError(f"{self.objects} holds something else, no activation store; name another place")
            return None
        root = layout.read_root(self.objects)
        if root.state == "creating":  # a crash before the first shard: nothing is lost by beginning again
            return None
        if root.spec != self.spec:
            if not may_grow:
                grow.check_same_spec(self.objects, root.spec, self.spec)
            grow.check(self.objects, root.spec, self.spec, blocks)
        return root

    def _prepare(self, blocks: TokenBlocks, found: layout.Root | None) -> None:
        """Make the place ready for shards."""
        self.objects.remove_partial_writes()
        if found is None:
            layout.write_root(self.objects, layout.Root(state="creating", spec=self.spec))
            self.objects.delete_all("sites")  # what a killed process has begun for other sites and settings
            self._put_arrays(blocks, 0)
            layout.write_root(self.objects, layout.Root(state="open", spec=self.spec))
        elif self._before:
            grow.clear_leftovers(self.objects, found.spec, self.spec, blocks)
            self._put_arrays(blocks, found.spec.n_sequences)

    def _list_committed(self) -> dict[str, set[int]]:
        return {name: layout.committed_shards(self.objects, name) for name in layout.columns(self.spec)}

    def _lacking(self) -> list[Site]:
        """Sites of which a shard has to be made."""
        lacking = {name for shard in self.pending() for name in self.missing(shard)}
        return [site for site in self.spec.sites if site.name in lacking]

    def _put_arrays(self, blocks: TokenBlocks, n_present: int) -> None:
        """Metadata of all arrays, and the tokens from sequence `n_present` on."""
        with self.objects.full_disk_explained("the arrays' metadata: a few kilobytes"):
            metadata.write_metadata(self.objects, self.spec)
        if n_present == self.spec.n_sequences:
            return
        per_chunk = layout.token_sequences_per_chunk(self.spec)
        for name in layout.TOKEN_ARRAYS:
            values = getattr(blocks, name)
            for chunk in range(n_present // per_chunk, -(-self.spec.n_sequences // per_chunk)):
                part = np.zeros((per_chunk, self.spec.sequence_length), layout.UINT32)
                taken = values[chunk * per_chunk : (chunk + 1) * per_chunk]
                part[: len(taken)] = taken
                layout.put_table(self.objects, layout.token_key(name, chunk), part)

    def _find_outgrown(self) -> int | None:
        """The shard that was the last and partial one before the store grew: it has to be made again."""
        before = self._before.spec if self._before else self.spec
        grown = self.spec.n_sequences > before.n_sequences and before.n_sequences % before.sequences_per_shard
        return before.n_shards - 1 if grown else None

    def missing(self, shard: int) -> list[str]:
        """Columns of a shard that have to be written; the outgrown shard's all."""
        names = layout.columns(self.spec)
        return names if shard == self._outgrown else [name for name in names if shard not in self._committed[name]]

    def pending(self) -> list[int]:
        """Shards that have to be made, the outgrown one last: until then the store stays what it was."""
        shards = [shard for shard in range(self.spec.n_shards) if self.missing(shard)]
        return sorted(shards, key=lambda shard: (shard == self._outgrown, shard))

    def _check_room(self) -> None:
        row_bytes = {
            site.name: site.width * codecs.expected_bytes_per_value(site.codec, self.spec.dtype)
            for site in self.spec.sites
        }
        row_bytes[layout.ROWS] = 4.0
        expected = (
            len(self.spec.shard_rows(shard)) * sum(row_bytes[name] for name in self.missing(shard))
            for shard in self.pending()
        )
        needed, free = int(sum(expected)), self.objects.free_bytes()
        if free is not None and needed > free:
            raise StorageFullError(
                errno.ENOSPC,
                f"no room for {self.objects}: about {needed:,} bytes needed, {free:,} free; "
                "make room and give the same command again",
            )

    def acquire(self, shard: int) -> ShardBuffers:
        """Buffers for a shard; waits while all of them are being written. Raises what a write before has raised."""
        self._raise_failures()
        if shard == self._outgrown:
            self._adopt()
        if self._buffers_left:
            self._buffers_left -= 1
            buffers = ShardBuffers(self.spec, self.sites)
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

    def finish(self) -> Store:
        """Wait for every write, seal the store if it is complete, and open it."""
        self._wait()
        if not self.pending():
            self._adopt()
            if layout.read_root(self.objects).state != "sealed":
                seal(self.objects, self._before)
        return Store(self.objects, layout.read_root(self.objects))

    def _wait(self) -> None:
        for future in self._running:
            future.result()
        self._running.clear()

    def _adopt(self) -> None:
        """Make a grown store's new spec the one in force; from here on it is unfinished until it is sealed again."""
        self._wait()
        if self._before is None or layout.read_root(self.objects).spec == self.spec:
            return
        if self._outgrown is not None:
            layout.write_root(self.objects, layout.Root(state="open", spec=self._before.spec))
            for name in layout.columns(self.spec):
                self.objects.delete(layout.commit_key(name, self._outgrown))
                self._committed[name].discard(self._outgrown)
            self._outgrown = None
        layout.write_root(self.objects, layout.Root(state="open", spec=self.spec))

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

    def _write_site(self, buffers: ShardBuffers, site: Site) -> tuple[str, layout.Record]:
        if not hasattr(self._local, "encoder"):
            self._local.encoder = ShardEncoder(self.objects, self.spec)
        encoder: ShardEncoder = self._local.encoder
        return site.name, encoder.write(site, buffers.shard, buffers.rows[site.name], buffers.order)

    def _commit(self, buffers: ShardBuffers, ids: NDArray[np.uint32], sites: dict[str, layout.Record]) -> None:
        """The row table, then the records of all columns: from here on the shard counts."""
        records = {layout.ROWS: self._write_rows(buffers, ids), **sites}
        for name in self.missing(buffers.shard):
            length = layout.record_length(self.spec, name)
            data = np.frombuffer(records[name].to_bytes(length), np.uint8).reshape(1, length)
            layout.put_table(self.objects, layout.commit_key(name, buffers.shard), data)
        for name in records:
            self._committed[name].add(buffers.shard)

    def _write_rows(self, buffers: ShardBuffers, ids: NDArray[np.uint32]) -> layout.Record:
        """Put the row table, or hold it against the one that is committed: sites added later are of the same rows."""
        spec, shard = self.spec, buffers.shard
        sequence, position = np.divmod(buffers.kept[buffers.order], spec.rows_per_sequence)
        position += spec.skip_first
        table = {
            "sequence": sequence + spec.shard_sequences(shard).start,
            "position": position,
            "token": ids[sequence, position],
        }
        checksums, n_bytes = [], 0
        for name in layout.ROW_ARRAYS:
            padded = np.full(spec.rows_per_shard, layout.ABSENT_ROW, layout.UINT32)
            padded[: len(sequence)] = table[name]
            crc, data = layout.encode_table(padded)
            if layout.ROWS in self.missing(shard):
                self.objects.put(layout.row_key(name, shard), data)
            checksums.append(crc)
            n_bytes += len(data)
        record = layout.Record(n_rows=len(sequence), n_bytes=n_bytes, checksums=tuple(checksums))
        if layout.ROWS not in self.missing(shard) and record != layout.read_record(
            self.objects, spec, layout.ROWS, shard
        ):
            raise StoreMismatchError(
                f"the rows of shard {shard} are not those that {self.objects} has (another text, or other rows left "
                "out), so nothing is added to it"
            )
        return record
