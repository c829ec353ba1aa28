"""A lane's windows, one after the other, the next one filled while one is used."""

from __future__ import annotations

from collections.abc import Iterator

from actcache.load.plan.epochs import Lane
from actcache.load.windows.pools import Pools
from actcache.load.windows.window import Window


class LaneStream:
    """The windows of a lane, each decoded while the one before it is in use, across the ends of epochs too.

    `numbers` are (lane of an epoch, window) in order; the first begins to be decoded at once. A window that nobody
    uses any more is filled anew before the one after it is done, so that the threads are never without work in between.
    """

    def __init__(self, numbers: Iterator[tuple[Lane, int]], buffers: list[Window], pools: Pools) -> None:
        self._numbers, self._pools = numbers, pools
        self._current: Window | None = None
        self._following, self._unused = buffers
        self._begin(self._following)

    def window(self, lane: Lane, number: int) -> Window:
        """A window, valid until a later one is asked for; those before it are passed by."""
        while self._current is None or (self._current.lane.epoch, self._current.number) != (lane.epoch, number):
            self._current, self._following = self._following, self._current or self._unused
            self._begin(self._following)
            self._current.wait()
        return self._current

    def _begin(self, buffer: Window) -> None:
        coming = next(self._numbers, None)
        if coming:
            buffer.begin(*coming, self._pools)
