"""The batches of one rank, made in order from any place on.

In: a plan, the rank, and the place of the next batch. Out: batches, each with the place after it and a call that the
consumer's thread makes before it uses the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from functools import lru_cache
from itertools import count

from actcache.load.batches.batch import Batch
from actcache.load.batches.maker import BatchMaker
from actcache.load.plan.epochs import Epoch, Lane, Plan
from actcache.load.plan.ranks import Rank
from actcache.load.state import Place
from actcache.load.windows.pools import Pools
from actcache.load.windows.stream import LaneStream
from actcache.load.windows.window import Window

Made = tuple[Place, Batch, Callable[[], None]]
"""The place after a batch, the batch, and what its consumer's thread calls before it uses the batch."""


class Production:
    """Makes a plan's batches for one rank, `epochs` epochs of them (None: without end).

    The windows stay from one iteration to the next, since fresh memory is expensive.
    """

    def __init__(self, plan: Plan, rank: Rank, epochs: int | None, maker: BatchMaker, threads: int) -> None:
        self._plan = plan
        self._rank = rank
        self._epochs = epochs
        self._maker = maker
        self._threads = threads
        self.windows: dict[int, list[Window]] = {}
        """Two for each lane that has been read."""

    def batches(self, start: Place) -> Generator[Made]:
        """The batches from a place on."""
        plan, rank = self._plan, self._rank
        epoch_of = lru_cache(maxsize=2)(plan.epoch)
        with Pools(self._threads, self._maker.clock, is_local=self._maker.store.objects.is_local) as pools:
            streams = {
                lane: LaneStream(self._windows_needed(lane, start, epoch_of), self._windows_of(lane), pools)
                for lane in rank.lanes(plan.lanes)
            }
            for number in self._epoch_numbers(start):
                epoch, delivered = epoch_of(number), start.batch if number == start.epoch else 0
                for batch in rank.batches(plan.n_batches, delivered):
                    in_lane, lane = divmod(batch, plan.lanes)
                    value, hand_over = self._maker.batch(epoch.lanes[lane], in_lane, streams[lane])
                    delivered += rank.world_size
                    place = Place(first_epoch=start.first_epoch, epoch=number, batch=delivered)
                    yield self.place_of_next(place), value, hand_over
                    self._maker.load_loops(self._windows_of(lane)[0])

    def place_of_next(self, place: Place) -> Place:
        """Where the next batch is: in the next epoch, if this one has too few batches left for every rank."""
        if self._plan.n_batches - place.batch < self._rank.world_size:
            return Place(first_epoch=place.first_epoch, epoch=place.epoch + 1, batch=0)
        return place

    def _windows_needed(self, lane: int, start: Place, epoch_of: Callable[[int], Epoch]) -> Iterator[tuple[Lane, int]]:
        """The windows of a lane that this rank needs, from a place on."""
        for number in self._epoch_numbers(start):
            epoch, delivered = epoch_of(number), start.batch if number == start.epoch else 0
            needed = self._rank.windows(epoch, lane, delivered)
            if not needed and not delivered:
                return  # there are fewer batches than lanes, in this epoch and in every other
            yield from ((epoch.lanes[lane], window) for window in needed)

    def _epoch_numbers(self, start: Place) -> Iterable[int]:
        return count(start.epoch) if self._epochs is None else range(start.epoch, start.first_epoch + self._epochs)

    def _windows_of(self, lane: int) -> list[Window]:
        if lane not in self.windows:
            n_rows = self._plan.most_window_rows
            self.windows[lane] = [self._maker.window(n_rows) for _ in range(2)]
        return self.windows[lane]
