"""A lane's windows one after the other; the next one is filled while one is in use.

A window that is used up is filled again before the next one is waited for, so that decoding threads go from one window
to the other without a pause. A third window would do the same, for half as much memory again.
"""

from __future__ import annotations

from collections.abc import Iterator

from actcache.load.plan.epochs import Lane
from actcache.load.windows.pools import Pools
from actcache.load.windows.window import Window


class LaneStream:
    """The windows of a lane, each decoded while the one before it is in use, also across the ends of epochs.

    `numbers` are (lane of an epoch, window) in order; decoding of the first begins at once. When a window is no longer
    in use, filling it with the one after the next begins before the next is done, so that threads always have work.
    """

    def __init__(self, numbers: Iterator[tuple[Lane, int]], buffers: list[Window], pools: Pools) -> None:
        self._numbers, self._pools = numbers, pools
        self._current: Window | None = None
        self._following, self._unused = buffers
        self._begin(self._following)

    def window(self, lane: Lane, number: int) -> Window:
        """A window, valid until a later one is asked for; earlier ones are skipped."""
        while self._current is None or (self._current.lane.epoch, self._current.number) != (lane.epoch, number):
            self._current, self._following = self._following, self._current or self._unused
            self._begin(self._following)
            self._current.wait()
        return self._current

    def _begin(self, buffer: Window) -> None:
        coming = next(self._numbers, None)
        if coming:
            buffer.begin(*coming, self._pools)
