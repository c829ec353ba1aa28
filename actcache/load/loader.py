"""The loader: a sealed store in, shuffled batches of aligned sites out, exactly resumable.

The order is `plan.py`'s and depends on the seed alone; a background thread reads ahead; the state counts the batches
that were *delivered*, so what was only prefetched is never lost or doubled.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actcache.errors import ConfigError, StateError, StoreIncompleteError
from actcache.load.chosen import Chosen, chosen_rows
from actcache.load.fetch import BatchMemory, Gather, Pools, Window, dequantise_on, windows
from actcache.load.plan import Plan, chunk_table
from actcache.spec import check_positive, expand_names
from actcache.store.layout import array_dtype

if TYPE_CHECKING:
    import torch

    from actcache.store import SiteStats, Store
    from actcache.store.rows import Rows

STATE_VERSION = 1
_WINDOWS_PER_EPOCH = 4
_CHUNKS_THAT_SHUFFLE = 64


@dataclass(frozen=True, slots=True, repr=False)
class Batch(Mapping[str, "torch.Tensor"]):
    """Rows of several sites, aligned: `batch[site][i]` belongs to global row `batch.rows[i]` for every site.

    The tensors are the caller's own: they may be kept, and modified in place.
    """

    activations: dict[str, torch.Tensor]
    """`(B, D)` by site."""
    rows: torch.Tensor
    """`(B,)` int64 global row ids, on the CPU."""

    def __repr__(self) -> str:
        shapes = ", ".join(f"{site}: {tuple(acts.shape)}" for site, acts in self.activations.items())
        return f"Batch({shapes})"

    def __getitem__(self, site: str) -> torch.Tensor:
        return self.activations[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)


class Loader:
    """Shuffled batches from a sealed store.

    Iterating delivers `epochs` epochs, each in an order of its own, and goes on after the last delivered batch when
    iteration was broken off; after the last epoch, iterating again delivers the next ones.

    Args:
        store: a sealed store.
        sites: hook names or glob patterns; every batch has all of them, aligned.
        batch_rows: B.
        seed: decides the order, together with the sizes.
        epochs: how many to deliver, None for ever.
        dtype: of the batches' tensors.
        device: of the batches' tensors.
        memory_bytes: for the two windows of decoded chunks; larger windows shuffle better.
        read_ahead: batches made in advance.
        threads: decoding threads; by default one per core.
        drop_last: leave out the smaller batch at an epoch's end.
        rows: which rows an epoch has: a `RowFilter`, row ids (each once, in any order), a mask over all ids, or a
            slice; None for all. Chunks without such a row are not read.
        rank, world_size: this consumer gets batches `rank`, `rank + world_size`, ... of the one global order; every
            rank gets the same number.

    Raises:
        SiteError: a pattern matches no site. ConfigError: batch_rows is larger than the store, or rank is no rank,
        or no row is wanted. IndexError: a wanted row is none.
        StoreIncompleteError: the store is not sealed.
    """

    def __init__(
        self,
        store: Store,
        sites: Sequence[str],
        *,
        batch_rows: int,
        seed: int = 0,
        epochs: int | None = 1,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        memory_bytes: int = 1 << 30,
        read_ahead: int = 2,
        threads: int | None = None,
        drop_last: bool = True,
        rows: Rows | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        import torch

        if not store.sealed:
            raise StoreIncompleteError(
                f"{store.path} has {len(store.committed)} of {store.spec.n_shards} shards; "
                "finish 'actcache extract' first"
            )
        check_positive("loader", read_ahead=read_ahead, memory_bytes=memory_bytes, world_size=world_size)
        if epochs is not None:
            check_positive("loader", epochs=epochs)
        if not 0 <= rank < world_size:
            raise ConfigError(f"loader: rank must be between 0 and world_size - 1 = {world_size - 1}, got {rank}")
        self.store, self.sites, self.batch_rows = store, expand_names(sites, store.sites), batch_rows
        self.epochs, self.dtype, self.device = epochs, dtype or torch.float32, torch.device(device)
        self.rank, self.world_size, self.read_ahead = rank, world_size, read_ahead
        self._chosen = None if rows is None else chosen_rows(store, rows)
        self._rows, self._stats = rows, dict[str, "SiteStats"]()
        self.plan = self._plan(self._chosen, memory_bytes, seed, drop_last)
        if self.plan.n_batches < world_size:
            raise ConfigError(
                f"{self.plan.n_batches} batches of {batch_rows} rows cannot be shared by {world_size} ranks"
            )
        self._threads = threads or os.cpu_count() or 1
        self._memory = BatchMemory()
        self._buffers: list[Window] = []
        self._first_epoch, self._epoch, self._batch = 0, 0, 0
        self._running: _ReadAhead | None = None

    def _plan(self, chosen: Chosen | None, memory_bytes: int, seed: int, drop_last: bool) -> Plan:
        store, spec = self.store, self.store.spec
        all_chunks = chunk_table(store.shard_n_rows, spec.rows_per_shard, spec.rows_per_chunk)
        return Plan(
            rows_per_chunk=spec.rows_per_chunk,
            n_rows=chosen.n_rows if chosen else store.n_rows,
            chunk_table=chosen.chunk_table if chosen else all_chunks,
            wanted=chosen.bits if chosen else None,
            chunks_per_window=self._chunks_per_window(chosen, memory_bytes),
            batch_rows=self.batch_rows,
            seed=seed,
            drop_last=drop_last,
        )

    def _chunks_per_window(self, chosen: Chosen | None, memory_bytes: int) -> int:
        spec = self.store.spec
        row_bytes = sum(site.width * array_dtype(spec, site, "acts").itemsize for site in map(spec.site, self.sites))
        by_memory = memory_bytes // 2 // (spec.rows_per_chunk * row_bytes)
        n_chunks, that_shuffle = -(-self.store.n_rows // spec.rows_per_chunk), _CHUNKS_THAT_SHUFFLE
        if chosen:  # a window holds wanted rows alone, so more chunks fit and more are needed
            fullest_first = np.cumsum(np.sort(chosen.chunk_table[:, 1])[::-1])
            by_memory = int(np.searchsorted(fullest_first, memory_bytes // 2 // row_bytes, side="right"))
            n_chunks = len(chosen.chunk_table)
            that_shuffle = -(-_CHUNKS_THAT_SHUFFLE * spec.rows_per_chunk * n_chunks // chosen.n_rows)
        # Several windows an epoch, so that one is read while another is in use; no fewer chunks than shuffle well.
        by_overlap = max(that_shuffle, -(-n_chunks // _WINDOWS_PER_EPOCH))
        return max(1, min(by_memory, by_overlap))

    def __len__(self) -> int:
        """Batches of an epoch, for this rank."""
        return self.plan.n_batches // self.world_size

    def site_stats(self, site: str) -> SiteStats:
        """Statistics of a site over the rows delivered: the store's own, or measured once where rows are chosen."""
        if self._chosen is None:
            return self.store.stats(site)
        if site not in self._stats:
            self._stats[site] = self.store.stats(site, rows=self._rows)
        return self._stats[site]

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead; iterating again is allowed."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        running = self._running = _ReadAhead(self)
        try:
            for epoch, batch, value in running:
                self._epoch, self._batch = (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)
                yield value
            self._first_epoch = self._epoch
        finally:
            running.stop()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batch delivered last: a small JSON-able dict."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.store.fingerprint,
            "settings": self._settings(),
            "world_size": self.world_size,
            "first_epoch": self._first_epoch,
            "epoch": self._epoch,
            "batch": self._batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken, bit for bit.

        Raises:
            StateError: the state is of another version, store, world size or settings; the message says which.
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(f"a loader state of version {state.get('version')!r}; this actcache knows {STATE_VERSION}")
        if state["fingerprint"] != self.store.fingerprint:
            raise StateError(
                f"the loader state belongs to another store (fingerprint {state['fingerprint']}), "
                f"{self.store.path} has {self.store.fingerprint}; open the store it was saved with"
            )
        if state["world_size"] != self.world_size:
            raise StateError(
                f"the loader state was saved with world_size={state['world_size']}, "
                f"this loader has {self.world_size}; use as many ranks as before"
            )
        mine, theirs = self._settings(), state["settings"]
        if mine.get("rows") != theirs.get("rows"):
            raise StateError(
                f"the loader state was saved with {_choice(theirs)}, this loader has {_choice(mine)}; "
                "give the rows= that it was saved with"
            )
        differences = [
            f"{k}: saved {theirs.get(k)!r}, now {mine.get(k)!r}"
            for k in sorted({*mine, *theirs})
            if mine.get(k) != theirs.get(k)
        ]
        if differences:
            raise StateError("the loader state was saved with other settings: " + "; ".join(differences))
        self.close()
        self._first_epoch, self._epoch, self._batch = state["first_epoch"], state["epoch"], state["batch"]

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "sites": self.sites,
            "batch_rows": plan.batch_rows,
            "seed": plan.seed,
            "chunks_per_window": plan.chunks_per_window,
            "drop_last": plan.drop_last,
            "epochs": self.epochs,
            **({"rows": self._chosen.digest} if self._chosen else {}),
        }

    def _produce(self, epoch_number: int, batch: int) -> Generator[tuple[int, int, Batch]]:
        """Batches with their (epoch, batch) numbers, from the given ones on."""
        import torch

        logical = getattr(torch, self.store.spec.dtype)
        gather = Gather(logical, self.dtype)
        while len(self._buffers) < 2:
            self._buffers.append(Window(self.store, self.sites, self.plan.most_window_rows))
        last_epoch = None if self.epochs is None else self._first_epoch + self.epochs
        if last_epoch is not None and epoch_number >= last_epoch:
            return
        first_window = self.plan.epoch(epoch_number).batch_windows(batch * self.world_size + self.rank).start
        with (
            Pools(self._threads, is_local=self.store.objects.is_local) as pools,
            closing(windows(self.plan, (epoch_number, first_window), last_epoch, self._buffers, pools)) as stream,
        ):
            window: Window | None = next(stream)
            while window is not None:
                for number in range(batch, len(self)):
                    value, window = self._batch_from(stream, window, number, gather)
                    yield window.epoch.epoch, number, value
                epoch, batch = window.epoch, 0
                while window is not None and window.epoch is epoch:  # an incomplete last batch is left out
                    window = next(stream, None)

    def _batch_from(self, stream: Iterator[Window], window: Window, batch: int, gather: Gather) -> tuple[Batch, Window]:
        """This rank's batch of that number, and the window that it ended in; `window` is where the stream stands."""
        import torch

        epoch, in_order = window.epoch, batch * self.world_size + self.rank
        begin, end = epoch.batch_span(in_order)
        quantised = window.scales if self.device.type != "cpu" else {}
        acts, scales = self._batch_memory(end - begin, quantised)
        rows = torch.empty(end - begin, dtype=torch.int64)
        for wanted in epoch.batch_windows(in_order):
            while window.number != wanted:  # windows that belong to other ranks' batches are passed by
                window = next(stream)
            piece = epoch.piece(in_order, wanted, window.order)
            stop = piece.start + len(piece.places)
            rows[piece.start : stop] = torch.from_numpy(window.row_ids[piece.places])
            for site, target in acts.items():
                if site in scales:  # multiplied out where the batch is going to live
                    np.take(window.values[site], piece.places, axis=0, out=target[piece.start : stop].numpy())
                    taken = window.scales[site][piece.places].view(np.int16)
                    scales[site][piece.start : stop] = torch.from_numpy(taken).view(torch.bfloat16)
                else:
                    gather(window, site, piece.places, target[piece.start : stop])
        if self.device.type != "cpu":
            acts = {
                site: dequantise_on(self.device, value, scales[site], window.exponents[site], self.dtype)
                if site in scales
                else value.to(self.device)
                for site, value in acts.items()
            }
        return Batch(acts, rows), window

    def _batch_memory(
        self, n_rows: int, quantised: Collection[str]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Tensors for a batch's activations, and for the scales of sites that leave the CPU quantised."""
        import torch

        widths = {site: self.store.spec.site(site).width for site in self.sites}
        acts = {
            site: self._memory.take(n_rows, width, torch.int8 if site in quantised else self.dtype)
            for site, width in widths.items()
        }
        return acts, {site: torch.empty(n_rows, dtype=torch.bfloat16) for site in quantised}


def _choice(settings: Mapping[str, Any]) -> str:
    """Which rows a state's settings are for, in words."""
    return f"a choice of rows (digest {settings['rows']})" if "rows" in settings else "all rows"


class _ReadAhead:
    """Runs a loader's production in a thread, a bounded number of batches ahead of the consumer."""

    def __init__(self, loader: Loader) -> None:
        self._queue: queue.Queue[tuple[int, int, Batch] | BaseException | None] = queue.Queue(loader.read_ahead)
        self._stopping = threading.Event()
        self._loader = loader
        self._start = (loader._epoch, loader._batch)
        self._thread = threading.Thread(target=self._run, name="actcache-read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        last: BaseException | None = None
        production = self._loader._produce(*self._start)
        try:
            for item in production:
                if not self._put(item):
                    return
        except BaseException as error:
            last = error
        finally:
            production.close()
        self._put(last)

    def _put(self, item: tuple[int, int, Batch] | BaseException | None) -> bool:
        """Queue an item; False when the consumer has gone."""
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[tuple[int, int, Batch]]:
        while True:
            item = self._queue.get()
            if item is None:
                return
            if self._stopping.is_set():
                raise ConfigError(
                    "this iteration is over: the loader was closed, moved to a state, or iterated again meanwhile; "
                    "make a loader of its own for each use"
                )
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop(self) -> None:
        """End the thread and drop what it prefetched."""
        self._stopping.set()
        self._thread.join()
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(StopIteration())  # whoever still waits for a batch wakes up
