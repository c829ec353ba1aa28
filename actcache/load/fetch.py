"""Bring a plan's rows into memory: windows of chunks decoded by threads, batches gathered from them.

Fresh memory is dear (the first touch of a page costs several times a copy), so every large buffer here is reused: two
windows for the whole run, and batch buffers as soon as nobody holds a tensor on them any more.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.load.plan import Epoch, Plan
from actcache.store.codecs import Scratch
from actcache.store.layout import chunks_per_shard

if TYPE_CHECKING:
    import torch

    from actcache.store import Store


class Window:
    """The decoded chunks of one window, for all sites: `values[site]` is `(rows, D)` in stored dtype."""

    epoch: Epoch
    """The epoch that it belongs to."""
    number: int
    """Its number in that epoch."""

    def __init__(self, store: Store, sites: list[str], n_rows: int) -> None:
        dtype = store.stored_dtype
        self.store, self.sites = store, sites
        self.values = {site: np.empty((n_rows, store.spec.site(site).width), dtype) for site in sites}
        self.order: NDArray[np.int64] = np.empty(0, np.int64)
        self.row_ids: NDArray[np.int64] = np.empty(0, np.int64)
        self.pending: list[Future[None]] = []
        self._local = threading.local()

    def begin(self, epoch: Epoch, window: int, pool: ThreadPoolExecutor) -> None:
        """Start decoding a window into these buffers."""
        self.epoch, self.number = epoch, window
        chunks = epoch.windows[window]
        ends = np.cumsum(epoch.plan.chunk_rows(chunks))
        self.pending = [
            pool.submit(self._decode, site, int(chunk), int(end))
            for chunk, end in zip(chunks, ends, strict=True)
            for site in self.sites
        ]
        self.pending.append(pool.submit(self._shuffle, epoch, window))

    def wait(self) -> None:
        """Until everything is decoded; raises what went wrong."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()

    def _shuffle(self, epoch: Epoch, window: int) -> None:
        self.order, self.row_ids = epoch.window_order(window), epoch.row_ids(window)

    def _decode(self, site: str, chunk: int, end: int) -> None:
        """Decode a chunk so that its rows end before row `end` of the buffer."""
        spec = self.store.spec
        shard, within = divmod(chunk, chunks_per_shard(spec))
        n_rows = min(spec.rows_per_chunk, spec.n_rows - chunk * spec.rows_per_chunk)
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        target = self.values[site][end - n_rows : end]
        if n_rows == spec.rows_per_chunk:
            self.store.read_chunk(site, shard, within, target, self._local.scratch)
        else:  # the store's last chunk is padded on disk, so it does not fit its place here
            whole = np.empty((spec.rows_per_chunk, target.shape[1]), target.dtype)
            self.store.read_chunk(site, shard, within, whole, self._local.scratch)
            target[:] = whole[:n_rows]


def windows(
    plan: Plan, first: tuple[int, int], epochs: int | None, buffers: list[Window], pool: ThreadPoolExecutor
) -> Generator[Window]:
    """The windows of a run, each decoded while the one before it is in use, across the ends of epochs too.

    `first` is the (epoch, window) to begin with; `epochs` is the epoch to stop before, None for never. A yielded window
    is valid until the next one is asked for.
    """
    numbers = _window_numbers(plan, first, epochs)
    coming = next(numbers, None)
    try:
        if coming:
            buffers[0].begin(*coming, pool)
        while coming:
            buffers[0].wait()
            coming = next(numbers, None)
            if coming:
                buffers[1].begin(*coming, pool)
            yield buffers[0]
            buffers.reverse()
    finally:
        for buffer in buffers:
            for future in buffer.pending:
                future.cancel()


def _window_numbers(plan: Plan, first: tuple[int, int], epochs: int | None) -> Iterator[tuple[Epoch, int]]:
    number, window = first
    while epochs is None or number < epochs:
        epoch = plan.epoch(number)
        for following in range(window, len(epoch.windows)):
            yield epoch, following
        number, window = number + 1, 0


_GATHER_BYTES = 1 << 17
"""Rows gathered at a time: they stay in a core's cache until they are widened."""


class BatchMemory:
    """Batch buffers, handed out as tensors and taken back when the last tensor or view on one is gone.

    `torch.from_numpy` keeps the array alive for as long as any tensor shares its memory; each tensor gets an array
    object of its own (a view of a kept buffer), whose end of life returns the buffer. So a consumer may keep or modify
    whatever it got.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, int, str], deque[NDArray[Any]]] = {}

    def take(self, n_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised `(n_rows, width)` tensor."""
        import torch

        stored = {torch.bfloat16: "<u2", torch.float16: "<f2", torch.float32: "<f4", torch.float64: "<f8"}[dtype]
        free = self._free.setdefault((n_rows, width, stored), deque())
        try:
            kept = free.popleft()
        except IndexError:
            kept = np.empty((n_rows, width), stored)
        handed_out = kept[:]
        weakref.finalize(handed_out, free.append, kept).atexit = False
        tensor = torch.from_numpy(handed_out)
        return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


class Gather:
    """Copies rows of a window to a stretch of a batch, in another dtype if need be.

    Done with numpy on the calling thread, block by block in cache: torch would split each copy over a thread team of
    its own, and two teams on the same cores (this one and the trainer's) wait for each other more than they work.
    """

    def __init__(self, logical: torch.dtype, out: torch.dtype) -> None:
        self.logical, self.out = logical, out
        self._scratch = Scratch()

    def __call__(self, values: NDArray[Any], places: NDArray[np.int64], target: torch.Tensor) -> None:
        """`target[i] = values[places[i]]`."""
        import torch

        width = values.shape[1]
        block_rows = max(1, _GATHER_BYTES // (width * values.itemsize))
        if self.out == self.logical:
            bits = target.view(torch.uint16) if self.out == torch.bfloat16 else target
            np.take(values, places, axis=0, out=bits.numpy(), mode="clip")
            return
        for start in range(0, len(places), block_rows):
            part = places[start : start + block_rows]
            rows = np.frombuffer(self._scratch.take(len(part) * width * values.itemsize), values.dtype)
            rows = np.take(values, part, axis=0, out=rows.reshape(-1, width), mode="clip")
            wide = target[start : start + len(part)]
            if self.logical == torch.bfloat16 and self.out == torch.float32:
                # bfloat16 bits are the upper half of the float32.
                np.left_shift(rows, 16, out=wide.view(torch.int32).numpy().view(np.uint32), dtype=np.uint32)
            else:
                narrow = torch.from_numpy(rows)
                wide.copy_(narrow.view(torch.bfloat16) if self.logical == torch.bfloat16 else narrow)
