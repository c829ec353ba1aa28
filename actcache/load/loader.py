"""The loader: a sealed store in, shuffled batches of aligned sites out, exactly resumable.

`plan/epochs.py` decides the order, from the seed and the sizes alone. A background thread reads ahead. The state counts
the batches that were *delivered*, so batches that were only read ahead are neither lost nor delivered twice.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

from actcache.errors import ConfigError, StateError
from actcache.load.ahead import ReadAhead, check_process
from actcache.load.arguments import check_loader, check_switch, device_of, dtype_of
from actcache.load.batches.batch import Batch
from actcache.load.batches.batch_memory import BatchMemory
from actcache.load.batches.maker import BatchMaker
from actcache.load.batches.origin import ShardTables, look_up
from actcache.load.normalize import Normalization, normalization_of
from actcache.load.plan.chosen import choose_rows
from actcache.load.plan.epochs import Plan, chunk_table
from actcache.load.plan.quality import ShuffleReport, batches_to_look_at, shuffle_report
from actcache.load.plan.ranks import Rank
from actcache.load.plan.reading_order import rows_per_sequence, with_reading_order
from actcache.load.plan.window_sizes import GOOD_RATIO, Budget, expected_ratio, memory_bytes, with_windows
from actcache.load.production import Made, Production
from actcache.load.speed import Clock, LoaderStats
from actcache.load.state import STATE_VERSION, Place, check_settings, parse_place, parse_state, sites_in_state
from actcache.spec import DTYPE_BYTES, check_positive, expand_names, integer
from actcache.store.format.site_arrays import arrays_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from actcache.store import SiteStats, Store
    from actcache.store.reading.rows import Rows


class Loader:
    """Shuffled batches from a sealed store.

    Iterating delivers `epochs` epochs, each in its own order. If the loop is left early, iterating again continues
    after the last batch delivered; after the last epoch, it delivers the next `epochs`. A loader can only be used in
    the process that made it.

    Args:
        store: a sealed store.
        sites: hook names or glob patterns; every batch has all of them, with their rows aligned.
        batch_rows: B, rows of a batch.
        seed: decides the order, together with the sizes.
        epochs: how many to deliver; None for no end.
        dtype: of the batches' tensors: float32, or another floating-point type.
        device: of the batches' tensors; windows are kept there, too.
        memory: for the windows of decoded chunks, two for each lane that is read: text such as `"1GB"`, or a number of
            bytes. Larger windows shuffle better; they are never larger than a good shuffle needs. A loader also holds
            `read_ahead + 3` batches (made, handed out, not yet released), 16 bytes for each row of the windows, two
            chunks per thread, and about 100 bytes for each chunk of the store.
        read_ahead: batches that a thread makes in advance; 0 to make each batch when it is asked for.
        threads: decoding threads; by default one per core.
        drop_last: leave out the smaller batch at the end of an epoch.
        rows: which rows an epoch has: a `RowFilter`, row ids (each once, in any order), a mask over all ids, or a
            slice; None for all. Chunks without a selected row are not read.
        normalize: None, or `"rms"`, `"center"`, `"center-rms"`: `(x - mean) * scale`, from the statistics of the rows
            that are delivered. The constants of each site are in `normalization`.
        order: `"shuffled"`, or `"sequence"`: whole sequences in reading order, as many as fit `batch_rows`, and the
            same order in every epoch.
        lanes: stretches of the order from which batches are taken in turn; a rank reads only the lanes of its own
            batches. By default one per rank. Lanes are part of the order: a state that is loaded on another number of
            ranks keeps them.
        rank, world_size: this consumer gets the batches whose number is `rank` modulo `world_size`. Every rank gets
            the same number, so up to `world_size - 1` batches at the end of an epoch are left out.

    Raises:
        SiteError: a pattern matches no site. ConfigError: `batch_rows` is larger than the store, `rank` is not below
        `world_size`, no row is selected, or another argument is invalid. IndexError: a selected row id does not exist.
        StoreIncompleteError: the store is not sealed.

    Examples:
        >>> loader = ac.Loader(store, ["blocks.3.*"], batch_rows=512, seed=0)
        >>> batch = next(iter(loader))
        >>> batch[site_in].shape, batch[site_out].dtype, batch.rows.shape
        (torch.Size([512, 128]), torch.float32, torch.Size([512]))
        >>> state = loader.state_dict()  # after the first of seven batches
        >>> with ac.Loader(store, ["blocks.3.*"], batch_rows=512, seed=0) as again:
        ...     again.load_state_dict(state)
        ...     print(len(again), sum(1 for _ in again))
        7 6
        >>> loader.close()
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
        self.store = store
        self.sites = expand_names(sites, store.sites)
        if not self.sites:
            raise ConfigError(f"loader: name at least one site; the store has {', '.join(store.sites)}")
        self.batch_rows = batch_rows
        self.seed = integer("loader", "seed", seed)
        self.epochs = epochs
        self.drop_last = check_switch("loader", "drop_last", drop_last)
        self.dtype = dtype_of("loader", dtype)
        self.device = device_of("loader", device)
        self.order = order
        self.read_ahead = read_ahead
        self.rank, self.world_size = rank, world_size
        self._this_rank = Rank(rank=rank, world_size=world_size)
        self._lanes = lanes
        self._memory_bytes = memory_bytes(memory)
        self._chosen = None if rows is None else choose_rows(store, rows)
        self._rows = rows
        self._stats: dict[str, SiteStats] = {}
        self._threads = threads or os.cpu_count() or 1
        self._process = os.getpid()
        self.plan = self._first_plan()
        self.normalization: dict[str, Normalization] = {}
        """What is done to the rows of each site; empty without `normalize`."""
        if normalize is not None:
            self.normalization = {site: normalization_of(normalize, self.site_stats(site)) for site in self.sites}
        self._clock = Clock()
        self._n_batches, self._n_rows = 0, 0
        """Delivered so far."""
        self._maker = BatchMaker(store, self.sites, self.dtype, self.device, self.normalization, self._clock)
        self._production = self._production_of(self.plan)
        self._place = Place()
        self._running: ReadAhead[Made] | None = None
        self._warn_of_bad_shuffle()

    def _first_plan(self) -> Plan:
        """The plan of the arguments alone; a state may have other lanes and windows."""
        in_order = self.order == "sequence"
        plan = self._plan(self._lanes or (1 if in_order else self.world_size))
        if in_order:
            plan = with_reading_order(plan, self.store, self._row_bytes, self._memory_bytes)
        if plan.n_batches < self.world_size:
            raise ConfigError(
                f"{plan.n_batches} batches of {self.batch_rows} rows cannot be shared by {self.world_size} ranks"
            )
        return plan

    def _plan(self, lanes: int) -> Plan:
        store, spec, chosen = self.store, self.store.spec, self._chosen
        all_chunks = chunk_table(store.shard_n_rows, spec.rows_per_shard, spec.rows_per_chunk)
        plan = Plan(
            rows_per_chunk=spec.rows_per_chunk,
            n_rows=chosen.n_rows if chosen else store.n_rows,
            chunk_table=chosen.chunk_table if chosen else all_chunks,
            wanted=chosen.bits if chosen else None,
            chunks_per_window=1,
            batch_rows=self.batch_rows,
            seed=self.seed,
            drop_last=self.drop_last,
            lanes=lanes,
        )
        return with_windows(plan, spec, self._most_chunks(lanes))

    @property
    def _row_bytes(self) -> int:
        """Bytes of a row at all sites, as their first arrays store it."""
        spec = self.store.spec
        return sum(arrays_of(spec, spec.site(name))[0].row_bytes for name in self.sites)

    def _most_chunks(self, lanes: int) -> int:
        """How many chunks a window may have within the memory."""
        lanes_here = len(self._this_rank.lanes(lanes))
        budget = Budget(n_bytes=self._memory_bytes, row_bytes=self._row_bytes, lanes_here=lanes_here)
        return budget.most_chunks(self.store.spec.rows_per_chunk, self._chosen)

    def _production_of(self, plan: Plan) -> Production:
        return Production(plan, self._this_rank, self.epochs, self._maker, self._threads)

    def _warn_of_bad_shuffle(self) -> None:
        plan, spec = self.plan, self.store.spec
        ratio = expected_ratio(plan, spec)
        if ratio >= GOOD_RATIO or plan.reading is not None:
            return
        wider = with_windows(plan, spec, most_chunks=plan.n_chunks).chunks_per_window > plan.chunks_per_window
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

    @property
    def n_rows(self) -> int:
        """Rows of an epoch, those of all ranks together; a smaller last batch counts even if it is left out."""
        return self.plan.n_rows

    def row_ids(self) -> NDArray[np.int64] | None:
        """`(n_rows,)` ids of the selected rows, ascending; None if all rows of the store are selected."""
        chosen = self._chosen
        return None if chosen is None else self.plan.row_ids(chosen.chunk_table[:, 0])

    def site_stats(self, site: str) -> SiteStats:
        """Statistics of a site over the selected rows: the store's, or measured once if `rows` leaves some out."""
        if self._chosen is None:
            return self.store.stats(site)
        if site not in self._stats:
            self._stats[site] = self.store.stats(site, rows=self._rows)
        return self._stats[site]

    def stats(self) -> LoaderStats:
        """How much was delivered since the loader was made, how fast, and where the time went."""
        spec, clock = self.store.spec, self._clock
        width = sum(spec.site(site).width for site in self.sites)
        return LoaderStats(
            n_batches=self._n_batches,
            n_rows=self._n_rows,
            n_bytes=self._n_rows * width * DTYPE_BYTES[spec.dtype],
            seconds=clock["all"],
            wait_seconds=clock["wait"],
            read_seconds=clock["read"],
            decode_seconds=clock["decode"],
            gather_seconds=clock["gather"],
        )

    def shuffle_report(self, *, epoch: int = 0, n_batches: int = 80) -> ShuffleReport:
        """How well the rows of an epoch are mixed, measured on some of its batches without reading activations.

        Reads the row tables of the shards that those batches take rows from, or of all shards if rows are left out.

        Args:
            epoch: which one.
            n_batches: about how many to look at: a tenth of them in a row, at ten places of the epoch.
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
            lambda rows: look_up(tables, spec.rows_per_shard, rows, "sequences"),
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
            "a loader belongs to the process that made it and cannot be sent to another one; send the store, which "
            "can be pickled, and make the loader there"
        )

    def make_batches_in(self, memory: BatchMemory) -> None:
        """Make the batches of the next iteration in the caller's memory, for instance memory shared with processes."""
        self._maker.memory = memory

    def close(self) -> None:
        """Stop reading ahead; iterating again is allowed."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def __iter__(self) -> Iterator[Batch]:
        check_process(self._process)
        self.close()
        running = self._running = ReadAhead(self._production.batches(self._place), self.read_ahead, self._clock)
        began = perf_counter()
        try:
            for place, batch, hand_over in running:
                hand_over()
                self._n_batches += 1
                self._n_rows += len(batch.rows)
                now = perf_counter()
                self._clock.add("all", now - began)
                began, self._place = now, place
                yield batch
            self._place = replace(self._place, first_epoch=self._place.epoch)
        finally:
            running.stop()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, after the batch delivered last: a small JSON-able dict.

        It counts the batches of all ranks together. The ranks must be in step, so the state of any one of them will do.
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

        The number of ranks may differ from the one saved: the lanes and windows of the state keep the order, and the
        batches that are left of the epoch are divided among the present ranks.

        Raises:
            StateError: the state is of another version, store or settings, its place is impossible, or its windows need
            more memory than this loader may use; the message says which. The loader stays where it is.
        """
        state = parse_state(state, self.store.fingerprint, self.store.path)
        settings, plan = state["settings"], self.plan
        mine, theirs = self._settings(plan), {name: settings[name] for name in ("lanes", "chunks_per_window")}
        if plan.reading is None and self._lanes in (None, theirs["lanes"]):
            mine |= theirs
        check_settings(settings, mine)
        place = parse_place(state, plan.n_batches)
        if mine != self._settings(plan):
            plan = self._plan_of_state(**theirs)
        self.close()
        if plan is not self.plan:
            self.plan, self._production = plan, self._production_of(plan)
        self._place = self._production.place_of_next(place)

    def _plan_of_state(self, lanes: int, chunks_per_window: int) -> Plan:
        """This plan with the lanes and windows of a state, saved by other ranks or with a different memory."""
        plan = replace(self.plan, lanes=lanes, chunks_per_window=chunks_per_window)
        here, possible = len(self._this_rank.lanes(lanes)), self._most_chunks(lanes)
        needed = 2 * here * self._row_bytes * plan.most_window_rows
        if chunks_per_window > possible and needed > self._memory_bytes:
            raise StateError(
                f"the loader state has windows of {chunks_per_window} chunks, and memory={self._memory_bytes} has room "
                f"for {possible}, as this rank reads {here} of {lanes} lanes; give the loader memory={needed} or more"
            )
        return plan

    def _settings(self, plan: Plan) -> dict[str, Any]:
        return {
            "sites": sites_in_state(self.sites),
            "batch_rows": plan.batch_rows,
            "seed": plan.seed,
            "chunks_per_window": plan.chunks_per_window,
            "lanes": plan.lanes,
            "drop_last": plan.drop_last,
            "epochs": self.epochs,
            **({"rows": self._chosen.digest} if self._chosen else {}),
            **({"order": self.order} if self.order == "sequence" else {}),
        }
