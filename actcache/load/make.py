"""One batch, from the windows that hold its rows."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.load.batch import Batch
from actcache.load.fetch import LaneStream, Window
from actcache.load.gather import BatchMemory, Gather, Normalization, dequantise_on, normalise_on
from actcache.load.origin import Origin, ShardTables
from actcache.load.plan import Lane, Piece
from actcache.load.speed import Clock
from actcache.store.codecs import chain_of
from actcache.store.layout import exponents_of

if TYPE_CHECKING:
    import torch

    from actcache.store import Store


class BatchMaker:
    """Makes batches of a store's sites in a dtype, on a device, normalised if need be."""

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

        self._store, self._sites, self._dtype, self._device = store, sites, dtype, device
        self._on_cpu = device.type == "cpu"
        # What leaves the CPU is normalised where it is going to live.
        self._normalization, self._clock = normalization, clock
        logical: torch.dtype = getattr(torch, store.spec.dtype)
        self._sent_as = dtype if self._on_cpu or not normalization else logical
        self._gather = Gather(logical, self._sent_as, normalization if self._on_cpu else None)
        self._memory, self._tables = BatchMemory(), ShardTables(store)
        self._origin: dict[int, tuple[Window, int, int, Origin]] = {}

    def batch(self, lane: Lane, number: int, stream: LaneStream) -> Batch:
        """A lane's batch of that number."""
        import torch

        worked = 0.0
        begin, end = lane.batch_span(number)
        acts, scales = self._batch_memory(end - begin)
        rows, origins = torch.empty(end - begin, dtype=torch.int64), []
        for wanted in lane.batch_windows(number):
            window = stream.window(lane, wanted)
            began = perf_counter()
            piece = lane.piece(number, wanted, window.order)
            rows[piece.start : piece.start + len(piece.places)] = torch.from_numpy(window.row_ids[piece.places])
            origins.append((self._origin_of(window), piece.places))
            self._fill(window, piece, acts, scales)
            worked += perf_counter() - began
        self._clock.add("gather", worked)
        if not self._on_cpu:
            acts = {site: self._sent(site, value, scales.get(site)) for site, value in acts.items()}
        return Batch(acts, rows, origins)

    def _fill(
        self, window: Window, piece: Piece, acts: dict[str, torch.Tensor], scales: dict[str, torch.Tensor]
    ) -> None:
        import torch

        here = slice(piece.start, piece.start + len(piece.places))
        for site, target in acts.items():
            if site in scales:  # multiplied out where the batch is going to live
                np.take(window.values[site], piece.places, axis=0, out=target[here].numpy())
                taken = window.scales[site][piece.places].view(np.int16)
                scales[site][here] = torch.from_numpy(taken).view(torch.bfloat16)
            else:
                self._gather(window, site, piece.places, target[here])

    def _sent(self, site: str, value: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """A site's rows on the device."""
        import torch

        done = self._normalization.get(site)
        if scales is None:
            value = value.to(self._device)
        else:
            wide = torch.float32 if done else self._dtype
            value = dequantise_on(self._device, value, scales, self._exponents(site), wide)
        return normalise_on(value, done, self._dtype) if done else value

    def _origin_of(self, window: Window) -> Origin:
        """Where a window's rows are from, one object for all its batches."""
        kept = self._origin.get(window.lane.number)
        if kept is None or kept[:3] != (window, window.lane.epoch, window.number):
            origin = Origin(self._tables, self._store.spec.rows_per_shard, window.row_ids)
            kept = self._origin[window.lane.number] = (window, window.lane.epoch, window.number, origin)
        return kept[3]

    def _exponents(self, site: str) -> NDArray[np.int8] | None:
        return exponents_of(self._store.spec.site(site))

    def _batch_memory(self, n_rows: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Tensors for a batch's activations, and for the scales of sites that leave the CPU quantised."""
        import torch

        spec = self._store.spec
        sites = {site: spec.site(site) for site in self._sites}
        quantised: list[str] = []
        if not self._on_cpu:
            quantised = [name for name, site in sites.items() if chain_of(site.codec).quantised]
        acts = {
            name: self._memory.take(n_rows, site.width, torch.int8 if name in quantised else self._sent_as)
            for name, site in sites.items()
        }
        return acts, {name: torch.empty(n_rows, dtype=torch.bfloat16) for name in quantised}
