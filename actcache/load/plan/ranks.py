"""Which batches, lanes and windows of an order one of several ranks needs: integers only.

Ranks read lanes. Windows mix all their chunks, so ranks that take every W-th batch of one order would all read the
whole store. The order is cut into lanes, stretches of whole batches with windows of their own, and batches are taken
from the lanes in turn: the order depends on the number of lanes, which stands in the state, and not on the number of
ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from actcache.load.plan.epochs import Epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One of `world_size` processes that divide an epoch's batches: it gets those whose number is `rank` modulo that.

    Every process gets the same number: the batches left over at the end of an epoch, fewer than `world_size`, are left
    out.
    """

    rank: int = 0
    world_size: int = 1

    def batches(self, n_batches: int, delivered: int) -> range:
        """Numbers of this rank's batches, after all ranks together have had the first `delivered`."""
        first = delivered + (self.rank - delivered) % self.world_size
        rounds = (n_batches - delivered) // self.world_size
        return range(first, first + rounds * self.world_size, self.world_size)

    def lanes(self, n_lanes: int) -> range:
        """The lanes that this rank's batches come from."""
        common = math.gcd(self.world_size, n_lanes)
        return range(self.rank % common, n_lanes, common)

    def windows(self, epoch: Epoch, lane: int, delivered: int) -> list[int]:
        """The windows that this rank needs of one of its lanes, in order."""
        plan = epoch.plan
        numbers = self.batches(plan.n_batches, delivered)
        apart = math.lcm(self.world_size, plan.lanes)
        first = next((number for number in numbers[: apart // self.world_size] if number % plan.lanes == lane), None)
        if first is None:
            return []
        in_lane = np.arange(first, numbers.stop, apart) // plan.lanes
        of_lane = epoch.lanes[lane]
        begin, end = of_lane.batch_spans(in_lane)
        first_window = np.searchsorted(of_lane.starts, begin, side="right") - 1
        last_window = np.searchsorted(of_lane.starts, end, side="left") - 1
        changes = np.zeros(len(of_lane.starts), np.int64)
        np.add.at(changes, first_window, 1)
        np.add.at(changes, last_window + 1, -1)
        needed: list[int] = np.flatnonzero(np.cumsum(changes)[:-1] > 0).tolist()
        return needed
