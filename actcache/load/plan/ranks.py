"""Which batches of an order belong to one of several ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from actcache.load.plan.epochs import Epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which of an epoch's batches one of several processes gets: those whose number is its rank, modulo their number.

    Every process gets as many: what is over at an epoch's end, fewer batches than there are processes, is left out.
    """

    rank: int = 0
    world_size: int = 1

    def batches(self, n_batches: int, delivered: int) -> range:
        """Numbers of this process's batches after the first `delivered`, which all of them together have had."""
        first = delivered + (self.rank - delivered) % self.world_size
        rounds = (n_batches - delivered) // self.world_size
        return range(first, first + rounds * self.world_size, self.world_size)

    def lanes(self, n_lanes: int) -> range:
        """The lanes that those batches come from."""
        common = math.gcd(self.world_size, n_lanes)
        return range(self.rank % common, n_lanes, common)

    def windows(self, epoch: Epoch, lane: int, delivered: int) -> list[int]:
        """Those windows of one of its lanes that it needs, in order."""
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
