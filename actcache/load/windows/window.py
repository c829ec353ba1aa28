"""One window of a lane: its chunks, decoded by threads into one memory.

In: a lane and the number of a window. Out: rows by site, their ids, and their order. Fresh memory is expensive (the
first touch of a page costs several times a copy), so windows are reused, two a lane for the whole run. They are in the
memory from which batches are made: the CPU's, or that of another device.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.load.device.device_rows import DeviceWindow
from actcache.load.plan.epochs import Lane
from actcache.load.plan.reading_order import reading_order
from actcache.load.windows.chunk_queue import ChunkQueue, Wanted
from actcache.load.windows.pools import Pools
from actcache.memory import Scratch
from actcache.spec import Site
from actcache.store.codecs import Powers, Quantiser, quantiser_of
from actcache.store.format.site_arrays import arrays_of, chunks_per_shard, powers_of

if TYPE_CHECKING:
    from actcache.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRows:
    """A site's rows in a window, as they are stored."""

    parts: tuple[NDArray[Any], ...]
    """`(rows, ...)` of each of the site's arrays."""
    width: int
    quantiser: Quantiser | None
    """What joins the arrays to values; None: the only array has the values."""
    powers: Powers | None


class Window:
    """The decoded chunks of one window, for all sites.

    With `there`, a window on another device, the rows are there, and nothing of that size is in the CPU's memory.
    """

    lane: Lane
    """The lane of an epoch whose window is in the buffers."""
    number: int
    """The window's number in that lane."""

    def __init__(self, store: Store, sites: list[str], n_rows: int, there: DeviceWindow | None = None) -> None:
        self.store, self.sites, self.there = store, sites, there
        self.stored: dict[str, StoredRows] = {}
        self._rows: dict[tuple[str, str], NDArray[Any]] = {}
        self._arrays = [(name, array) for name in sites for array in arrays_of(store.spec, store.spec.site(name))]
        if there is None:
            for name, array in self._arrays:
                self._rows[name, array.name] = np.empty((n_rows, *array.row_shape), array.dtype)
            self.stored = {site.name: self._stored_rows(site) for site in map(store.spec.site, sites)}
        self.order: NDArray[np.int64] = np.empty(0, np.int64)
        self.row_ids: NDArray[np.int64] = np.empty(0, np.int64)
        self.pending: list[Future[Any]] = []
        self._local = threading.local()

    def _stored_rows(self, site: Site) -> StoredRows:
        return StoredRows(
            parts=tuple(self._rows[name, array.name] for name, array in self._arrays if name == site.name),
            width=site.width,
            quantiser=quantiser_of(site.codec),
            powers=powers_of(site),
        )

    def begin(self, lane: Lane, number: int, pools: Pools) -> None:
        """Start to decode a window into these buffers."""
        self.lane, self.number = lane, number
        if self.there is not None:
            self.there.link.before_filling()
        wanted = [Wanted(array.name, site, part) for part in lane.parts(number) for site, array in self._arrays]
        # The order first: the window is not ready without it, and threads may be at the next window already.
        self.pending = [pools.decode.submit(self._shuffle, lane, number)]
        if pools.fetch is None:
            queue = ChunkQueue(self.store, wanted)
            self.pending += [pools.decode.submit(self._decode_all, pools, queue) for _ in range(pools.threads)]
        else:
            self.pending += [pools.fetch.submit(self._fetch, pools, chunk) for chunk in wanted]

    def wait(self) -> None:
        """Wait until everything is decoded and on its way to the device; raise what went wrong."""
        pending, self.pending = self.pending, []
        for future in pending:
            # The future of a fetched chunk gives the future of its decoding.
            if (decoding := future.result()) is not None:
                decoding.result()
        if self.there is not None:
            self.there.link.after_filling()

    def _shuffle(self, lane: Lane, number: int) -> None:
        self.row_ids = lane.row_ids(number)
        in_order = lane.plan.reading is not None
        self.order = reading_order(self.store, self.row_ids) if in_order else lane.window_order(number)
        if self.there is not None:
            self.there.send_order(self.order)

    def _decode_all(self, pools: Pools, queue: ChunkQueue) -> None:
        """Decode the chunks that other threads do not take."""
        began, worked = perf_counter(), thread_time()
        for chunk in queue:
            if pools.closing:
                break
            self._decode(chunk)
        worked = thread_time() - worked
        pools.clock.add("decode", worked)
        pools.clock.add("read", max(0.0, perf_counter() - began - worked))

    def _decode_fetched(self, pools: Pools, chunk: Wanted, stored: memoryview) -> None:
        worked = thread_time()
        self._decode(chunk, stored)
        pools.clock.add("decode", thread_time() - worked)

    def _decode(self, chunk: Wanted, stored: memoryview | None = None) -> None:
        """Decode a chunk's rows into their place in the window; `stored` are its bytes if it was fetched."""
        with self._place_of(chunk) as target:
            spec, part = self.store.spec, chunk.part
            place = divmod(part.chunk, chunks_per_shard(spec))
            # A chunk that is not full, or not all wanted, is decoded elsewhere first: its rows on disk are others.
            whole = target if len(target) == spec.rows_per_chunk else self._whole_chunk(target)
            if stored is not None:
                self.store.decode_chunk(chunk.site, *place, stored, whole, array=chunk.array)
            else:
                self.store.read_chunk(chunk.site, *place, whole, self._scratch("stored"), array=chunk.array)
            if whole is not target:
                ids = self.lane.plan.row_ids(np.array([part.chunk]))[part.skipped : part.skipped + len(target)]
                np.take(whole, ids - part.chunk * spec.rows_per_chunk, axis=0, out=target, mode="clip")

    def _place_of(self, chunk: Wanted) -> AbstractContextManager[NDArray[Any]]:
        """Memory for a chunk's rows: their place in the window, or memory that is sent there in the end."""
        array, site, part = chunk
        rows = slice(part.start, part.stop)
        if self.there is not None:
            return self.there.link.sending(self.there.rows[site, array][rows])
        return nullcontext(self._rows[site, array][rows])

    def _whole_chunk(self, target: NDArray[Any]) -> NDArray[Any]:
        """This thread's memory for all rows of a chunk, valid until it decodes the next one."""
        shape = self.store.spec.rows_per_chunk, *target.shape[1:]
        n_bytes = math.prod(shape) * target.itemsize
        return np.frombuffer(self._scratch("whole").take(n_bytes), target.dtype).reshape(shape)

    def _scratch(self, use: str) -> Scratch:
        """This thread's scratch for one use."""
        kept: dict[str, Scratch] = self._local.__dict__
        return kept.setdefault(use, Scratch())

    def _fetch(self, pools: Pools, chunk: Wanted) -> Future[None]:
        """Fetch a chunk's bytes and have them decoded; as many are on their way as there are fetching threads."""
        began, place = perf_counter(), divmod(chunk.part.chunk, chunks_per_shard(self.store.spec))
        stored = self.store.fetch_chunk(chunk.site, *place, array=chunk.array)
        pools.clock.add("read", perf_counter() - began)
        decoding = pools.decode.submit(self._decode_fetched, pools, chunk, stored)
        wait([decoding])  # so that no more is fetched than can be decoded
        return decoding
