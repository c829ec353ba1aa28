"""Write a store, shard by shard: create or continue it, encode in threads, commit, seal.

In: filled `ShardBuffers`. Out: objects, in the order that makes a crash harmless: site data and statistics, row table,
commit records, and once every shard is there the ledger, the totals and (one atomic put) the sealed root attributes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import NotAStoreError, StoreMismatchError
from actcache.order import permutation
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import codecs, layout
from actcache.store.objects import Objects
from actcache.store.reader import Store, committed_columns
from actcache.store.stats import LineBuilder, merge


class ShardBuffers:
    """One shard's rows in memory, in stored dtype and reading order; reused from shard to shard.

    They are shuffled when they are encoded, chunk by chunk, so that the forward pass's thread only appends.
    """

    def __init__(self, spec: StoreSpec) -> None:
        dtype = codecs.STORED_DTYPE[spec.dtype]
        self.spec, self.shard = spec, -1
        self.rows = {site.name: np.empty((spec.rows_per_shard, site.width), dtype) for site in spec.sites}
        self.order: NDArray[np.int64] = np.empty(0, np.int64)

    def begin(self, shard: int) -> None:
        """Make ready for a shard; row i on disk will be row `order[i]` of those put in here."""
        self.shard = shard
        self.order = permutation(len(self.spec.shard_rows(shard)), self.spec.seed, shard)


class StoreWriter:
    """Writes one store; use as a context manager. Encoding and disk overlap with the caller's next shard.

    Memory: `n_buffers` shards of all sites, plus one encoded shard of one site per thread.
    """

    def __init__(
        self, path: str | Path, spec: StoreSpec, blocks: TokenBlocks, *, threads: int = 2, n_buffers: int = 2
    ) -> None:
        codecs.preset(spec.codec)
        self.objects = Objects(path, read_only=False)
        self.spec = spec
        self._create_or_continue(blocks)
        self._committed = committed_columns(self.objects, spec, complete=False)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="actcache-encode")
        self._free: queue.SimpleQueue[ShardBuffers] = queue.SimpleQueue()
        self._buffers_left = n_buffers
        self._running: list[Future[None]] = []
        self._local = threading.local()
        self.sealed = layout.read_root(self.objects).state == "sealed"

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=exception[0] is not None)

    def _create_or_continue(self, blocks: TokenBlocks) -> None:
        if layout.is_vacant(self.objects) and self.objects.get("zarr.json") is None:
            self._create(blocks)
            return
        if self.objects.get("zarr.json") is None:
            raise NotAStoreError(f"{self.objects} holds something else, no activation store; name another place")
        root = layout.read_root(self.objects)
        if root.state == "creating":  # a crash before the first shard: nothing is lost by beginning again
            self._create(blocks)
            return
        check_same_spec(self.objects, root.spec, self.spec)
        self.objects.remove_partial_writes()

    def _create(self, blocks: TokenBlocks) -> None:
        layout.write_root(self.objects, layout.Root(state="creating", spec=self.spec))
        with self.objects.full_disk_explained("the arrays' metadata: a few kilobytes"):
            layout.create_arrays(self.objects, self.spec)
        per_chunk = min(layout.token_sequences_per_chunk(self.spec), self.spec.n_sequences)
        for name in layout.TOKEN_ARRAYS:
            values = getattr(blocks, name)
            for chunk, start in enumerate(range(0, self.spec.n_sequences, per_chunk)):
                part = np.zeros((per_chunk, self.spec.sequence_length), layout.UINT32)
                taken = values[start : start + per_chunk]
                part[: len(taken)] = taken
                layout.put_table(self.objects, f"tokens/{name}/c/{chunk}/0", part)
        layout.write_root(self.objects, layout.Root(state="open", spec=self.spec))

    def pending(self) -> list[int]:
        """Shards that still have to be made."""
        n_columns = len(self.spec.sites) + 1
        return [s for s in range(self.spec.n_shards) if not all((s, c) in self._committed for c in range(n_columns))]

    def acquire(self, shard: int) -> ShardBuffers:
        """Buffers for a shard; waits while all of them are being written. Raises what a write before has raised."""
        self._raise_failures()
        if self._buffers_left:
            self._buffers_left -= 1
            buffers = ShardBuffers(self.spec)
        else:
            buffers = self._free.get()
            self._raise_failures()
        buffers.begin(shard)
        return buffers

    def submit(self, buffers: ShardBuffers, ids: NDArray[np.uint32]) -> None:
        """Encode, store and commit a filled shard in the background; `ids (q, T)` are the tokens of its sequences."""
        parts = [self._pool.submit(self._write_site, buffers, site) for site in self.spec.sites]
        self._running.append(self._after(parts, lambda records: self._commit(buffers, ids, records), buffers))

    def finish(self) -> Store:
        """Wait for every write, seal the store if it is complete, and open it."""
        for future in self._running:
            future.result()
        self._running.clear()
        if not self.sealed and not self.pending():
            seal(self.objects)
            self.sealed = True
        return Store(self.objects, layout.read_root(self.objects))

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

    def _write_site(self, buffers: ShardBuffers, site: Site) -> layout.Record:
        """Encode and put one site of a shard, and its statistics line."""
        spec, compression = self.spec, codecs.preset(self.spec.codec)
        rows, n_rows = buffers.rows[site.name], len(buffers.order)
        chunk = np.empty((spec.rows_per_chunk, site.width), rows.dtype)
        builder = LineBuilder(site.width, spec.dtype)
        pieces: list[Any] = []
        sizes, checksums = [], []
        for start in range(0, n_rows, spec.rows_per_chunk):
            wanted = buffers.order[start : start + spec.rows_per_chunk]
            shuffled = np.take(rows, wanted, axis=0, out=chunk[: len(wanted)], mode="clip")
            builder.add(shuffled)
            chunk[len(wanted) :] = 0  # the padding of a partial last chunk is always the same bytes
            payload, crc = codecs.encode(chunk, compression)
            # Without compression the payload is the chunk itself, which the next one overwrites.
            pieces += [payload if compression else payload.tobytes(), codecs.crc_bytes(crc)]
            sizes.append(len(payload) + codecs.CRC_BYTES)
            checksums.append(crc)
        index, index_crc = codecs.encode(layout.index_of(sizes, layout.chunks_per_shard(spec)), None)
        whole = self._scratch().join([*pieces, index, codecs.crc_bytes(index_crc)])
        self.objects.put(layout.acts_key(site.name, buffers.shard), whole)
        stats_crc, stats_bytes = layout.put_table(
            self.objects, layout.stats_key(site.name, buffers.shard), builder.line[None]
        )
        checksums += [0] * (layout.chunks_per_shard(spec) - len(checksums)) + [index_crc, stats_crc]
        return layout.Record(n_rows=n_rows, n_bytes=len(whole) + stats_bytes, checksums=tuple(checksums))

    def _scratch(self) -> codecs.Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = codecs.Scratch()
        scratch: codecs.Scratch = self._local.scratch
        return scratch

    def _commit(self, buffers: ShardBuffers, ids: NDArray[np.uint32], sites: list[layout.Record]) -> None:
        """The row table, then the records of all columns: from here on the shard counts."""
        records = [self._write_rows(buffers, ids), *sites]
        length = layout.record_length(self.spec)
        for column, record in enumerate(records):
            data = np.frombuffer(record.to_bytes(length), np.uint8).reshape(1, 1, length)
            layout.put_table(self.objects, layout.commit_key(buffers.shard, column), data)
        self._committed.update((buffers.shard, column) for column in range(len(records)))

    def _write_rows(self, buffers: ShardBuffers, ids: NDArray[np.uint32]) -> layout.Record:
        spec, shard = self.spec, buffers.shard
        sequence, position = np.divmod(buffers.order, spec.rows_per_sequence)
        position += spec.skip_first
        values = {
            "sequence": sequence + spec.shard_sequences(shard).start,
            "position": position,
            "token": ids[sequence, position],
        }
        checksums, n_bytes = [], 0
        for name in layout.ROW_ARRAYS:
            padded = np.zeros(spec.rows_per_shard, layout.UINT32)
            padded[: len(buffers.order)] = values[name]
            crc, size = layout.put_table(self.objects, layout.row_key(name, shard), padded)
            checksums.append(crc)
            n_bytes += size
        return layout.Record(n_rows=len(buffers.order), n_bytes=n_bytes, checksums=tuple(checksums))


def seal(objects: Objects) -> None:
    """Write ledger and totals of a store whose shards are all committed, then the one put that makes it sealed."""
    root = layout.read_root(objects)
    spec, reader = root.spec, Store(objects, replace(root, state="open"))
    names, length = layout.columns(spec), layout.record_length(spec)
    ledger = np.empty((spec.n_shards, len(names), layout.HEAD_BYTES), np.uint8)
    for shard in range(spec.n_shards):
        for column, name in enumerate(names):
            head = reader.record(name, shard).to_bytes(length)[: layout.HEAD_BYTES]
            ledger[shard, column] = np.frombuffer(head, np.uint8)
    totals = []
    for site in spec.sites:
        total = merge(reader.shard_line(site.name, shard) for shard in range(spec.n_shards))
        layout.put_table(objects, f"{layout.site_prefix(site.name)}/total/c/0", total)
        totals.append(total)
    layout.put_table(objects, "ledger/c/0/0/0", ledger)
    layout.write_root(objects, layout.sealed(root, layout.fingerprint(spec, ledger, totals)))


def check_same_spec(objects: Objects, found: StoreSpec, asked: StoreSpec) -> None:
    """Raise `StoreMismatchError`, listing every difference, unless both specs are equal."""
    differences = list(_differences(found.to_dict(), asked.to_dict()))
    if differences:
        raise StoreMismatchError(
            f"the store at {objects} was begun with other settings, so it is left as it is:\n  "
            + "\n  ".join(differences)
            + "\nname another place, or give the settings of the store"
        )


def _differences(found: Any, asked: Any, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(asked, dict):
        keys = sorted({*found, *asked})
        return [d for k in keys for d in _differences(found.get(k), asked.get(k), f"{where}.{k}".lstrip("."))]
    return [] if found == asked else [f"{where}: the store has {found!r}, asked for {asked!r}"]
