"""The loader: a sealed store in, shuffled batches of aligned sites out, exactly resumable.

The order is `plan.py`'s and depends on the seed alone; a background thread reads ahead; the state counts the batches
that were *delivered*, so what was only prefetched is never lost or doubled.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

from actcache.errors import ConfigError, StateError
from actcache.load.ahead import ReadAhead, check_process
from actcache.load.arguments import check_loader, device_of, dtype_of, switch
from actcache.load.batches.batch import Batch
from actcache.load.batches.batch_memory import BatchMemory
from actcache.load.batches.maker import BatchMaker
from actcache.load.batches.origin import ShardTables, lookup
from actcache.load.normalize import Normalization, normalization_of
from actcache.load.plan.chosen import chosen_rows
from actcache.load.plan.epochs import Epoch, Lane, Plan, chunk_table
from actcache.load.plan.quality import ShuffleReport, batches_to_look_at, shuffle_report
from actcache.load.plan.ranks import Share
from actcache.load.plan.reading_order import in_reading_order, rows_per_sequence
from actcache.load.plan.window_sizes import GOOD_RATIO, Budget, expected_ratio, memory_bytes, sized
from actcache.load.speed import Clock, LoaderStats
from actcache.load.state import STATE_VERSION, Place, check_settings, checked_place, checked_state, named
from actcache.load.windows.pools import Pools
from actcache.load.windows.stream import LaneStream
from actcache.load.windows.window import Window
from actcache.spec import DTYPE_BYTES, check_positive, expand_names, integer
from actcache.store.format.site_arrays import arrays_of

if TYPE_CHECKING:
    import torch

    from actcache.store import SiteStats, Store
    from actcache.store.reading.rows import Rows


class Loader:
    """Shuffled batches from a sealed store.

    Iterating delivers `epochs` epochs, each in an order of its own, and goes on after the last delivered batch when
    iteration was broken off; after the last epoch, iterating again delivers the next ones. A loader belongs to the
    process that made it.

    Args:
        store: a sealed store.
        sites: hook names or glob patterns; every batch has all of them, aligned.
        batch_rows: B.
        seed: decides the order, together with the sizes.
        epochs: how many to deliver, None for ever.
        dtype: of the batches' tensors: float32, or another floating-point type.
        device: of the batches' tensors; windows lie there, too.
        memory: for the windows of decoded chunks, two for each lane that is read, such as `"1GB"` or a number of bytes;
            larger windows shuffle better, and they are no larger than a good shuffle needs. Beside them a loader holds
            `read_ahead + 3` batches (made, handed out, not yet let go), 16 bytes for each row of the windows, two
            chunks a thread, and about 100 bytes for each chunk of the store.
        read_ahead: batches made in advance, by a thread; 0 to make each one when it is asked for.
        threads: decoding threads; by default one per core.
        drop_last: leave out the smaller batch at an epoch's end.
        rows: which rows an epoch has: a `RowFilter`, row ids (each once, in any order), a mask over all ids, or a
            slice; None for all. Chunks without such a row are not read.
        normalize: None, or `"rms"`, `"center"`, `"center-rms"`: `(x - mean) * scale` from the statistics of the rows
            that are delivered; what is done to each site stands in `normalization`.
        order: `"shuffled"`, or `"sequence"`: whole sequences in reading order, as many a batch as `batch_rows` has
            room for; every epoch is the same then.
        lanes: stretches of the order from which batches are taken in turn; a rank reads only those of its batches. By
            default as many as there are ranks. Part of the order, and kept when a state is loaded on other ranks.
        rank, world_size: this consumer gets the batches of the one order whose number is `rank`, modulo `world_size`;
            every rank gets as many, so that up to `world_size - 1` batches at an epoch's end are left out.

    Raises:
        SiteError: a pattern matches no site. ConfigError: batch_rows is larger than the store, or rank is no rank,
        or no row is wanted, or another argument is none. IndexError: a wanted row is none.
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
        memory: int | str = "1GiB",
        read_ahead: int = 2,
        threads: int | None = None,
        drop_last: bool = True,
        rows: Rows | None = None,
        normalize: str | None = None,
        order: str = "shuffled",
        lanes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_loader(store, order, read_ahead, rank, world_size, {"epochs": epochs, "lanes": lanes, "threads": threads})
        seed, drop_last = integer("loader", "seed", seed), switch("loader", "drop_last", drop_last)
        self.store, self.sites, self.batch_rows = store, expand_names(sites, store.sites), batch_rows
        if not self.sites:
            raise ConfigError(f"loader: name at least one site; the store has {', '.join(store.sites)}")
        self.epochs, self.dtype, self.device = epochs, dtype_of("loader", dtype), device_of("loader", device)
        self.rank, self.world_size, self.read_ahead = rank, world_size, read_ahead
        self._share = Share(rank=rank, world_size=world_size)
        self._lanes, self._memory_bytes = lanes, memory_bytes(memory)
        self._chosen = None if rows is None else chosen_rows(store, rows)
        self._rows, self._stats = rows, dict[str, "SiteStats"]()
        self.order, in_order = order, order == "sequence"
        self.plan = self._plan(lanes or (1 if in_order else world_size), seed, drop_last)
        if in_order:
            self.plan = in_reading_order(self.plan, store, self._row_bytes, self._memory_bytes)
        if self.plan.n_batches < world_size:
            raise ConfigError(
                f"{self.plan.n_batches} batches of {batch_rows} rows cannot be shared by {world_size} ranks"
            )
        self.normalization: dict[str, Normalization] = {}
        """What is done to the rows of each site; empty without `normalize`."""
        if normalize is not None:
            self.normalization = {site: normalization_of(normalize, self.site_stats(site)) for site in self.sites}
        self._threads, self._process = threads or os.cpu_count() or 1, os.getpid()
        self._clock, self._delivered = Clock(), [0, 0]
        self._maker = BatchMaker(store, self.sites, self.dtype, self.device, self.normalization, self._clock)
        self._buffers: dict[int, list[Window]] = {}
        self._place = Place()
        self._running: ReadAhead[tuple[Place, Batch, Callable[[], None]]] | None = None
        self._warn_of_bad_shuffle()

    def _plan(self, lanes: int, seed: int, drop_last: bool) -> Plan:
        store, spec, chosen = self.store, self.store.spec, self._chosen
        all_chunks = chunk_table(store.shard_n_rows, spec.rows_per_shard, spec.rows_per_chunk)
        plan = Plan(
            rows_per_chunk=spec.rows_per_chunk,
            n_rows=chosen.n_rows if chosen else store.n_rows,
            chunk_table=chosen.chunk_table if chosen else all_chunks,
            wanted=chosen.bits if chosen else None,
            chunks_per_window=1,
            batch_rows=self.batch_rows,
            seed=seed,
            drop_last=drop_last,
            lanes=lanes,
        )
        return sized(plan, spec, self._most_chunks(lanes))

    @property
    def _row_bytes(self) -> int:
        """Of a row at all sites, as their first arrays store it."""
        spec = self.store.spec
        return sum(arrays_of(spec, spec.site(name))[0].row_bytes for name in self.sites)

    def _most_chunks(self, lanes: int) -> int:
        """Chunks of a window that the memory has room for."""
        lanes_here = len(self._share.lanes(lanes))
        budget = Budget(n_bytes=self._memory_bytes, row_bytes=self._row_bytes, lanes_here=lanes_here)
        return budget.most_chunks(self.store.spec.rows_per_chunk, self._chosen)

    def _warn_of_bad_shuffle(self) -> None:
        plan, spec = self.plan, self.store.spec
        ratio = expected_ratio(plan, spec)
        if ratio >= GOOD_RATIO or plan.reading is not None:
            return
        wider = sized(plan, spec, most_chunks=plan.n_chunks).chunks_per_window > plan.chunks_per_window
        by_memory = f"more than memory={self._memory_bytes}, or " if wider else ""
        by_lanes = "fewer lanes, or " if plan.lanes > 1 else ""
        warnings.warn(
            f"batches of {self.batch_rows:,} rows are going to have about {ratio:.2f} of the distinct sequences that a "
            f"shuffle of all rows would give (good: {GOOD_RATIO}): windows have {plan.chunks_per_window} chunks of "
            f"{plan.rows_per_chunk} rows; give the loader {by_memory}{by_lanes}fewer rows a batch, or make the store "
            "with more sequences_per_shard or smaller chunks",
            stacklevel=3,
        )

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

    def stats(self) -> LoaderStats:
        """How much was delivered since the loader was made, how fast, and what the time went into."""
        n_batches, n_rows = self._delivered
        spec, clock = self.store.spec, self._clock
        width = sum(spec.site(site).width for site in self.sites)
        return LoaderStats(
            n_batches=n_batches,
            n_rows=n_rows,
            n_bytes=n_rows * width * DTYPE_BYTES[spec.dtype],
            seconds=clock["all"],
            wait_seconds=clock["wait"],
            read_seconds=clock["read"],
            decode_seconds=clock["decode"],
            gather_seconds=clock["gather"],
        )

    def shuffle_report(self, *, epoch: int = 0, n_batches: int = 80) -> ShuffleReport:
        """How well the rows of an epoch are mixed, measured on some of its batches: no activation is read.

        Reads the row tables of the shards that those batches take rows from, and of all where rows are left out.

        Args:
            epoch: which one.
            n_batches: how many to look at, about: a tenth of them in a row, at ten places.
        """
        plan, spec = self.plan, self.store.spec
        check_positive("shuffle report", n_batches=n_batches)
        if integer("shuffle report", "epoch", epoch) < 0:
            raise ConfigError(f"shuffle report: epoch must be 0 or more, got {epoch}")
        if plan.reading is not None:
            raise ConfigError('a loader with order="sequence" shuffles nothing; use order="shuffled"')
        order = plan.epoch(epoch)
        n_whole = plan.n_rows // plan.batch_rows
        runs = [[order.batch_row_ids(b) for b in run] for run in batches_to_look_at(n_whole, n_batches)]
        tables = ShardTables(self.store)
        return shuffle_report(
            runs,
            lambda rows: lookup(tables, spec.rows_per_shard, rows, "sequences"),
            rows_per_sequence(self.store, plan),
            spec.n_rows,
            spec.rows_per_chunk,
        )

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a loader belongs to the process that made it, and was to be sent to another one; send it the store, which "
            "can be pickled, and make the loader there"
        )

    def make_batches_in(self, memory: BatchMemory) -> None:
        """Make the batches of the next iteration in memory of the caller's: such as other processes read, too."""
        self._maker.memory = memory

    def close(self) -> None:
        """Stop reading ahead; iterating again is allowed."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def __iter__(self) -> Iterator[Batch]:
        check_process(self._process)
        self.close()
        running = self._running = ReadAhead(self._produce(self._place), self.read_ahead, self._clock)
        began = perf_counter()
        try:
            for place, batch, hand_over in running:
                hand_over()
                self._delivered[0] += 1
                self._delivered[1] += len(batch.rows)
                now = perf_counter()
                self._clock.add("all", now - began)
                began, self._place = now, place
                yield batch
            self._place = replace(self._place, first_epoch=self._place.epoch)
        finally:
            running.stop()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batch delivered last: a small JSON-able dict.

        It counts the batches of all ranks together, which have to be in step: it can be taken from any one of them.
        """
        return {
            "version": STATE_VERSION,
            "fingerprint": self.store.fingerprint,
            "settings": self._settings(self.plan),
            "world_size": self.world_size,
            **asdict(self._place),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state` was taken, bit for bit.

        The number of ranks may be another one: the order stays, lanes and windows being those of the state, and each
        batch that is left of the epoch goes to one of the ranks that there are now.

        Raises:
            StateError: the state is of another version, store or settings, no loader can be where it says, or its
            windows take more memory here than this loader may; the message says which. The loader stays where it is.
        """
        state = checked_state(state, self.store.fingerprint, self.store.path)
        settings, plan = state["settings"], self.plan
        mine, theirs = self._settings(plan), {name: settings[name] for name in ("lanes", "chunks_per_window")}
        if plan.reading is None and self._lanes in (None, theirs["lanes"]):
            mine |= theirs
        check_settings(settings, mine)
        place = checked_place(state, plan.n_batches)
        if mine != self._settings(plan):
            plan = self._continued(plan, **theirs)
        self.close()
        if plan is not self.plan:
            self.plan, self._buffers = plan, {}
        self._place = self._begun(place)

    def _continued(self, plan: Plan, lanes: int, chunks_per_window: int) -> Plan:
        """This plan with the lanes and windows of a state that other ranks, or with another memory, have saved."""
        continued = replace(plan, lanes=lanes, chunks_per_window=chunks_per_window)
        here, possible = len(self._share.lanes(lanes)), self._most_chunks(lanes)
        needed = 2 * here * self._row_bytes * continued.most_window_rows
        if chunks_per_window > possible and needed > self._memory_bytes:
            raise StateError(
                f"the loader state has windows of {chunks_per_window} chunks, and memory={self._memory_bytes} has room "
                f"for {possible}, as this rank reads {here} of {lanes} lanes; give the loader memory={needed} or more"
            )
        return continued

    def _begun(self, place: Place) -> Place:
        """The place of the next batch: of an epoch with too few left for every rank, the one after it."""
        if self.plan.n_batches - place.batch < self.world_size:
            return Place(first_epoch=place.first_epoch, epoch=place.epoch + 1, batch=0)
        return place

    def _settings(self, plan: Plan) -> dict[str, Any]:
        return {
            "sites": named(self.sites),
            "batch_rows": plan.batch_rows,
            "seed": plan.seed,
            "chunks_per_window": plan.chunks_per_window,
            "lanes": plan.lanes,
            "drop_last": plan.drop_last,
            "epochs": self.epochs,
            **({"rows": self._chosen.digest} if self._chosen else {}),
            **({"order": self.order} if self.order == "sequence" else {}),
        }

    def _produce(self, start: Place) -> Generator[tuple[Place, Batch, Callable[[], None]]]:
        """Batches from a place on, each with the place after it, and what to call before it is handed out."""
        plan, share = self.plan, self._share
        epoch_of = lru_cache(maxsize=2)(plan.epoch)
        with Pools(self._threads, self._clock, is_local=self.store.objects.is_local) as pools:
            streams = {
                lane: LaneStream(self._windows(lane, start, epoch_of), self._buffers_of(lane), pools)
                for lane in share.lanes(plan.lanes)
            }
            for number in self._epochs(start):
                epoch, delivered = epoch_of(number), start.batch if number == start.epoch else 0
                for batch in share.batches(plan.n_batches, delivered):
                    in_lane, lane = divmod(batch, plan.lanes)
                    value, hand_over = self._maker.batch(epoch.lanes[lane], in_lane, streams[lane])
                    delivered += self.world_size
                    place = Place(first_epoch=start.first_epoch, epoch=number, batch=delivered)
                    yield self._begun(place), value, hand_over
                    self._maker.load_loops(self._buffers_of(lane)[0])

    def _windows(self, lane: int, start: Place, epoch_of: Callable[[int], Epoch]) -> Iterator[tuple[Lane, int]]:
        """The windows of a lane that this rank needs, from a place on."""
        for number in self._epochs(start):
            epoch, delivered = epoch_of(number), start.batch if number == start.epoch else 0
            needed = self._share.windows(epoch, lane, delivered)
            if not needed and not delivered:
                return  # there are fewer batches than lanes, and so it is in every epoch
            yield from ((epoch.lanes[lane], window) for window in needed)

    def _epochs(self, start: Place) -> Iterable[int]:
        return count(start.epoch) if self.epochs is None else range(start.epoch, start.first_epoch + self.epochs)

    def _buffers_of(self, lane: int) -> list[Window]:
        if lane not in self._buffers:
            n_rows = self.plan.most_window_rows
            self._buffers[lane] = [self._maker.window(n_rows) for _ in range(2)]
        return self._buffers[lane]
