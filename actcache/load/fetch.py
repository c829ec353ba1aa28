"""Bring a plan's rows into memory: windows of chunks decoded by threads, batches gathered from them.

Fresh memory is dear (the first touch of a page costs several times a copy), so every large buffer here is reused: two
windows for the whole run, and batch buffers as soon as nobody holds a tensor on them any more.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.kernels import take_dequantised, take_widened
from actcache.load.plan import Epoch, Plan
from actcache.memory import keep_freed_memory
from actcache.store.codecs import Scratch, chain_of, dequantise_rows
from actcache.store.layout import array_dtype, chunks_per_shard, exponents_of

if TYPE_CHECKING:
    import torch

    from actcache.store import Store


class Window:
    """The decoded chunks of one window, for all sites: `values[site]` is `(rows, D)` in stored dtype.

    Of quantised sites the values are int8, and `scales[site]` are the `(rows,)` bits of their bfloat16 scales.
    """

    epoch: Epoch
    """The epoch that it belongs to."""
    number: int
    """Its number in that epoch."""

    def __init__(self, store: Store, sites: list[str], n_rows: int) -> None:
        self.store, self.sites = store, sites
        self.values: dict[str, NDArray[Any]] = {}
        self.scales: dict[str, NDArray[np.uint16]] = {}
        self.exponents: dict[str, NDArray[np.int8] | None] = {}
        self.weights: dict[str, NDArray[np.float32]] = {}
        for name in sites:
            site = store.spec.site(name)
            self.values[name] = np.empty((n_rows, site.width), array_dtype(store.spec, site, "acts"))
            if chain_of(site.codec).quantised:
                self.scales[name] = np.empty(n_rows, np.uint16)
                self.exponents[name] = exponents_of(site)
                powers = site.feature_exponents or np.zeros(site.width)
                self.weights[name] = np.exp2(powers, dtype=np.float32)
        self.order: NDArray[np.int64] = np.empty(0, np.int64)
        self.row_ids: NDArray[np.int64] = np.empty(0, np.int64)
        self.pending: list[Future[Any]] = []
        self._local = threading.local()

    def begin(self, epoch: Epoch, window: int, pools: Pools) -> None:
        """Start decoding a window into these buffers."""
        self.epoch, self.number = epoch, window
        chunks = epoch.windows[window]
        ends = np.cumsum(epoch.plan.chunk_rows(chunks)).tolist()
        work = self._decode if pools.fetch is None else partial(self._fetch, pools)
        self.pending = [
            (pools.fetch or pools.decode).submit(work, array, site, chunk, slice(start, end))
            for chunk, start, end in zip(chunks.tolist(), [0, *ends], ends, strict=False)
            for site in self.sites
            for array in (("acts", "scale") if site in self.scales else ("acts",))
        ]
        self.pending.append(pools.decode.submit(self._shuffle, epoch, window))

    def wait(self) -> None:
        """Until everything is decoded; raises what went wrong."""
        pending, self.pending = self.pending, []
        for future in pending:
            # What was fetched from afar gives the future of its decoding.
            if (decoding := future.result()) is not None:
                decoding.result()

    def _shuffle(self, epoch: Epoch, window: int) -> None:
        self.order, self.row_ids = epoch.window_order(window), epoch.row_ids(window)

    def _decode(self, array: str, site: str, chunk: int, span: slice, stored: memoryview | None = None) -> None:
        """Decode a chunk's rows into their span of the buffer; `stored` if the chunk is fetched."""
        spec = self.store.spec
        shard, within = divmod(chunk, chunks_per_shard(spec))
        target = (self.values[site] if array == "acts" else self.scales[site])[span]
        # Of a chunk that is not full, or not all wanted, the rows do not lie as they do on disk.
        whole = target if len(target) == spec.rows_per_chunk else self._whole_chunk(target)
        if stored is not None:
            self.store.decode_chunk(site, shard, within, stored, whole, array=array)
        else:
            self.store.read_chunk(site, shard, within, whole, self._scratch("stored"), array=array)
        if whole is not target:
            places = self.epoch.plan.row_ids(np.array([chunk])) - chunk * spec.rows_per_chunk
            np.take(whole, places, axis=0, out=target, mode="clip")

    def _whole_chunk(self, target: NDArray[Any]) -> NDArray[Any]:
        """Room for all rows of a chunk, this thread's own, valid until it decodes the next one."""
        shape = self.store.spec.rows_per_chunk, *target.shape[1:]
        n_bytes = math.prod(shape) * target.itemsize
        return np.frombuffer(self._scratch("whole").take(n_bytes), target.dtype).reshape(shape)

    def _scratch(self, use: str) -> Scratch:
        """This thread's scratch for one use."""
        kept: dict[str, Scratch] = self._local.__dict__
        return kept.setdefault(use, Scratch())

    def _fetch(self, pools: Pools, array: str, site: str, chunk: int, span: slice) -> Future[None]:
        """Fetch a chunk's bytes and have them decoded; as many are on their way as there are threads to wait."""
        stored = self.store.fetch_chunk(site, *divmod(chunk, chunks_per_shard(self.store.spec)), array=array)
        decoding = pools.decode.submit(self._decode, array, site, chunk, span, stored)
        wait([decoding])  # so that no more is fetched than can be decoded
        return decoding


_REQUESTS = 128
"""Requests at a time to a store that is not a folder: each waits most of its time. At 20 ms a request and a quarter of
a megabyte a chunk, that is room for 1.6 GB/s."""


class Pools:
    """The threads of a loader: some that decode, and for stores that answer slowly many that wait for their bytes."""

    def __init__(self, threads: int, *, is_local: bool) -> None:
        self.decode = ThreadPoolExecutor(threads, thread_name_prefix="actcache-decode")
        self.fetch = None
        if not is_local:
            keep_freed_memory()  # every answer comes in memory of its own
            self.fetch = ThreadPoolExecutor(_REQUESTS, thread_name_prefix="actcache-fetch")

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.fetch is not None:
            self.fetch.shutdown(cancel_futures=True)
        self.decode.shutdown(cancel_futures=True)


def windows(
    plan: Plan, first: tuple[int, int], epochs: int | None, buffers: list[Window], pools: Pools
) -> Generator[Window]:
    """The windows of a run, each decoded while the one before it is in use, across the ends of epochs too.

    `first` is the (epoch, window) to begin with; `epochs` is the epoch to stop before, None for never. A yielded window
    is valid until the next one is asked for.
    """
    numbers = _window_numbers(plan, first, epochs)
    coming = next(numbers, None)
    try:
        if coming:
            buffers[0].begin(*coming, pools)
        while coming:
            buffers[0].wait()
            coming = next(numbers, None)
            if coming:
                buffers[1].begin(*coming, pools)
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


_STORED = {
    "torch.bfloat16": "<u2",
    "torch.float16": "<f2",
    "torch.float32": "<f4",
    "torch.float64": "<f8",
    "torch.int8": "|i1",
}


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

        stored = _STORED[str(dtype)]
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
        self._scratch, self._wide = Scratch(), Scratch()

    def __call__(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> None:
        """`target[i] = window row places[i]`."""
        values, scales = window.values[site], window.scales.get(site)
        if scales is None and self.out == self.logical:
            np.take(values, places, axis=0, out=_bits(target), mode="clip")
        elif not self._in_one_pass(window, site, places, target):
            self._in_blocks(window, site, places, target)

    def _in_one_pass(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> bool:
        """The compiled loops, for what is asked for most; False where there is none."""
        import torch

        values, scales = window.values[site], window.scales.get(site)
        kernel = take_widened() if scales is None else take_dequantised()
        if kernel is None or self.out != torch.float32 or (scales is None and self.logical != torch.bfloat16):
            return False
        if scales is None:
            kernel(values, places, _bits(target).view(np.uint32))
        else:
            wide = (scales[places].astype(np.uint32) << 16).view(np.float32)
            kernel(values, wide, window.weights[site], places, _bits(target))
        return True

    def _in_blocks(self, window: Window, site: str, places: NDArray[np.int64], target: torch.Tensor) -> None:
        values, scales = window.values[site], window.scales.get(site)
        block_rows = max(1, _GATHER_BYTES // (values.shape[1] * values.itemsize))
        for start in range(0, len(places), block_rows):
            part = places[start : start + block_rows]
            rows = self._take(values, part)
            wide = target[start : start + len(part)]
            if scales is None:
                self._widen(rows, wide)
            else:
                self._dequantise(rows, scales[part], window.exponents[site], wide)

    def _take(self, values: NDArray[Any], places: NDArray[np.int64]) -> NDArray[Any]:
        """Gathered rows in reused memory."""
        width = values.shape[1]
        rows = np.frombuffer(self._scratch.take(len(places) * width * values.itemsize), values.dtype)
        return np.take(values, places, axis=0, out=rows.reshape(-1, width), mode="clip")

    def _widen(self, rows: NDArray[Any], target: torch.Tensor) -> None:
        import torch

        if self.logical == torch.bfloat16 and self.out == torch.float32:
            # bfloat16 bits are the upper half of the float32.
            np.left_shift(rows, 16, out=target.view(torch.int32).numpy().view(np.uint32), dtype=np.uint32)
        else:
            narrow = torch.from_numpy(rows)
            target.copy_(narrow.view(torch.bfloat16) if self.logical == torch.bfloat16 else narrow)

    def _dequantise(
        self,
        rows: NDArray[np.int8],
        scales: NDArray[np.uint16],
        exponents: NDArray[np.int8] | None,
        target: torch.Tensor,
    ) -> None:
        import torch

        if self.out in (torch.float32, torch.bfloat16):
            dequantise_rows(rows, scales, _bits(target), exponents)
            return
        wide = np.frombuffer(self._wide.take(4 * rows.size), np.float32).reshape(rows.shape)
        dequantise_rows(rows, scales, wide, exponents)
        target.copy_(torch.from_numpy(wide))


def _bits(target: torch.Tensor) -> NDArray[Any]:
    """The tensor's memory as numpy sees it: bfloat16 as uint16."""
    import torch

    return (target.view(torch.uint16) if target.dtype == torch.bfloat16 else target).numpy()


def dequantise_on(
    device: torch.device,
    q: torch.Tensor,
    scales: torch.Tensor,
    exponents: NDArray[np.int8] | None,
    out: torch.dtype,
) -> torch.Tensor:
    """Quantised rows `(B, D)` int8 and their `(B,)` bfloat16 scales, sent to a device and multiplied out there."""
    import torch

    wide = q.to(device).to(torch.float32)
    wide.mul_(scales.to(device).to(torch.float32)[:, None])
    if exponents is not None:
        wide.mul_(torch.exp2(torch.from_numpy(exponents).to(device, torch.float32)))
    return wide.to(out)
