"""One batch, from the windows that hold its rows.

In: a lane of an epoch, the number of a batch, the lane's windows. Out: a `Batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING

from actcache.load.batches.batch import Batch
from actcache.load.batches.batch_memory import BatchMemory
from actcache.load.batches.gather import Gather
from actcache.load.batches.origin import Origin, ShardTables
from actcache.load.device.device_rows import DeviceGather
from actcache.load.device.link import link_to
from actcache.load.normalize import Normalization
from actcache.load.plan.epochs import Lane
from actcache.load.speed import Clock
from actcache.load.windows.stream import LaneStream
from actcache.load.windows.window import Window

if TYPE_CHECKING:
    import torch

    from actcache.store import Store


class BatchMaker:
    """Makes batches of a store's sites in a dtype, on a device, and normalised.

    Raises:
        ConfigError: the device cannot be used.
    """

    def __init__(
        self,
        store: Store,
        sites: list[str],
        dtype: torch.dtype,
        device: torch.device,
        normalization: Mapping[str, Normalization],
        clock: Clock,
    ) -> None:
        import torch

        self.store = store
        self.clock = clock
        self._sites = sites
        self._dtype = dtype
        self._gather = Gather(getattr(torch, store.spec.dtype), dtype, normalization)
        self._link = link_to(device)
        self._there: DeviceGather | None = None
        if self._link is not None:
            self._there = DeviceGather(self._link, store.spec, sites, dtype, normalization)
        self.memory = BatchMemory()
        """Memory of the batches on the CPU."""
        self._tables = ShardTables(store)
        self._origin: dict[int, tuple[Window, int, int, Origin]] = {}

    def window(self, n_rows: int) -> Window:
        """An empty window, in memory from which batches are made."""
        return Window(self.store, self._sites, n_rows, None if self._there is None else self._there.window(n_rows))

    def load_loops(self, window: Window) -> None:
        """Use compiled loops for the following batches; the first batch comes sooner without them."""
        if window.there is None and not self._gather.loops_loaded:
            # In a thread that interrupts do not reach: a half-imported module would stay half imported.
            with ThreadPoolExecutor(1, thread_name_prefix="actcache-loops") as apart:
                apart.submit(self._gather.load_loops, window).result()

    def batch(self, lane: Lane, number: int, stream: LaneStream) -> tuple[Batch, Callable[[], None]]:
        """A batch of a lane, and what its consumer's thread must call before it uses the batch."""
        import torch

        began, waited = perf_counter(), 0.0
        begin, end = lane.batch_span(number)
        acts = {site: self._batch_memory(end - begin, self.store.spec.site(site).width) for site in self._sites}
        rows, origins = torch.empty(end - begin, dtype=torch.int64), []
        for wanted in lane.batch_windows(number):
            asked = perf_counter()
            window = stream.window(lane, wanted)
            waited += perf_counter() - asked
            piece = lane.piece(number, wanted, window.order)
            here = slice(piece.start, piece.start + len(piece.places))
            rows[here] = torch.from_numpy(window.row_ids[piece.places])
            origins.append((self._origin_of(window), piece.places))
            targets = {site: target[here] for site, target in acts.items()}
            if window.there is None:
                for site, target in targets.items():
                    self._gather(window, site, piece.places, target)
            else:  # the window on the device has the order of its rows
                window.there.take(begin + piece.start - int(lane.starts[wanted]), targets)
        hand_over = _nothing if self._link is None else self._link.hand_over(acts.values())
        self.clock.add("gather", perf_counter() - began - waited)
        return Batch(acts, rows, origins), hand_over

    def _batch_memory(self, n_rows: int, width: int) -> torch.Tensor:
        if self._link is None:
            return self.memory.take(n_rows, width, self._dtype)
        return self._link.gathers.empty((n_rows, width), self._dtype)

    def _origin_of(self, window: Window) -> Origin:
        """Where a window's rows come from; one object for all its batches."""
        kept = self._origin.get(window.lane.number)
        if kept is None or kept[:3] != (window, window.lane.epoch, window.number):
            origin = Origin(self._tables, self.store.spec.rows_per_shard, window.row_ids)
            kept = self._origin[window.lane.number] = (window, window.lane.epoch, window.number, origin)
        return kept[3]


def _nothing() -> None:
    """A batch on the CPU can be used at once."""
