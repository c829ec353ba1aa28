"""How large windows are, from a memory budget, and how well windows of a size shuffle. Only numbers; nothing is
read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.files import shown
from actcache.load.plan.chosen import ChosenRows
from actcache.load.plan.epochs import Plan
from actcache.spec import StoreSpec

_WINDOWS_PER_EPOCH = 4
_CHUNKS_THAT_SHUFFLE = 64
_CHUNKS_ENOUGH = 1024
"""For a window. Chunks are small if there are more, and a larger window would only delay the first batch
(`benchmarks/resume.py`)."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
GOOD_RATIO = 0.97
"""A shuffle is good if a batch has at least this share of the distinct sequences that a true permutation would give."""


def memory_bytes(memory: int | str) -> int:
    """Bytes of a budget such as `"1GB"` (1e9), `"512MiB"` (2**29) or a number.

    Raises:
        ConfigError: it cannot be read as a positive number of bytes.
    """
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", memory.lower())
        if found:
            number, unit, binary = found.groups()
            factor = 1024 ** "kmgt".index(unit) * 1024 if binary and unit else _UNITS[unit]
            memory = int(float(number) * factor) if len(number) < 30 else memory
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        given = shown(memory)
        raise ConfigError(f'loader: memory must be a number of bytes or text such as "1GB", "512MiB", got {given}')
    return memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The memory that windows may take."""

    n_bytes: int
    """Bytes for all windows of a process."""
    row_bytes: int
    """Bytes of a row at all sites, as stored."""
    lanes_here: int
    """Lanes that the process reads; each has two windows."""

    @property
    def window_rows(self) -> int:
        """Rows of a window that fit."""
        return self.n_bytes // (2 * self.lanes_here * self.row_bytes)

    def most_chunks(self, rows_per_chunk: int, chosen: ChosenRows | None) -> int:
        """Chunks of a window that fit, at least one. Windows hold selected rows only."""
        if chosen is None:
            return max(1, self.window_rows // rows_per_chunk)
        fullest_first = np.cumsum(np.sort(chosen.chunk_table[:, 1])[::-1])
        return max(1, int(np.searchsorted(fullest_first, self.window_rows, side="right")))


def with_windows(plan: Plan, spec: StoreSpec, most_chunks: int) -> Plan:
    """The plan with windows of at most `most_chunks` chunks.

    An epoch has several windows, so that one is read while another is in use. It gets fewer and wider ones, as far as
    the memory goes, if batches of several would shuffle badly.
    """
    n_chunks, that_shuffle = -(-plan.n_rows // plan.rows_per_chunk), _CHUNKS_THAT_SHUFFLE
    if plan.wanted is not None:  # chunks have fewer rows each, so more of them are needed
        n_chunks = plan.n_chunks
        that_shuffle = -(-_CHUNKS_THAT_SHUFFLE * plan.rows_per_chunk * n_chunks // plan.n_rows)
    several = max(that_shuffle, min(_CHUNKS_ENOUGH, -(-n_chunks // (_WINDOWS_PER_EPOCH * plan.lanes))))
    found = replace(plan, chunks_per_window=min(most_chunks, several))
    for n_windows in range(-(-chunks_of_lane(plan) // several) - 1, 0, -1):
        wider = -(-chunks_of_lane(plan) // n_windows)
        if wider > most_chunks or expected_ratio(found, spec) >= GOOD_RATIO:
            break
        found = replace(plan, chunks_per_window=wider)
    return found


def chunks_of_lane(plan: Plan) -> int:
    """Chunks that the longest lane takes rows from, with one on a border; for unequal chunks, nearly always a bound."""
    if plan.lanes == 1:
        return plan.n_chunks
    sizes = np.array([plan.rows_per_chunk]) if plan.chunk_table is None else plan.chunk_table[:, 1]
    mean, deviation = float(sizes.mean()), float(sizes.std())
    n_chunks = plan.most_lane_rows / mean
    return min(plan.n_chunks, math.ceil(n_chunks + 3 * math.sqrt(n_chunks) * deviation / mean) + 1)


def expected_ratio(plan: Plan, spec: StoreSpec) -> float:
    """About how many distinct sequences a batch will have, as a share of what a permutation of all rows would give.

    A batch that begins in one window and ends in the next lies between a batch of one window and a batch that takes
    half of each of two, which shuffles as if they were one window: two thirds of the way, by the mean variance of its
    number of rows from a shard.
    """
    rows_of_chunk, n_windows = plan.n_rows / plan.n_chunks, -(-chunks_of_lane(plan) // plan.chunks_per_window)
    in_window = -(-plan.n_chunks // (plan.lanes * n_windows))  # the windows of a lane are nearly equal
    in_window = min(plan.n_chunks, max(in_window, math.ceil(plan.batch_rows / rows_of_chunk)))
    found = _share_found(plan, spec, in_window)
    if n_windows > 1:
        of_two = _share_found(plan, spec, min(plan.n_chunks, 2 * in_window))
        found += min(1.0, plan.batch_rows / (in_window * rows_of_chunk)) * 2 / 3 * (of_two - found)
    return min(1.0, found / _share_found(plan, spec, plan.n_chunks))


def _share_found(plan: Plan, spec: StoreSpec, in_window: int) -> float:
    """Share of all sequences that have a row in a batch from a window of `in_window` chunks drawn at random.

    The batch has an equal share of the rows of each chunk, and the rows of a sequence lie anywhere in its shard. What
    differs from shard to shard enters by its mean.
    """
    of_shard, rows_of_sequence = round(plan.n_chunks / spec.n_shards) or 1, max(1.0, plan.n_rows / spec.n_sequences)
    taken = min(1.0, plan.batch_rows / (in_window * plan.n_rows / plan.n_chunks))
    of_sequence = np.arange(of_shard + 1) / of_shard * taken
    return float(_hypergeometric(plan.n_chunks, of_shard, in_window) @ (1 - (1 - of_sequence) ** rows_of_sequence))


def _hypergeometric(population: int, marked: int, draws: int) -> NDArray[np.float64]:
    """`(marked + 1,)` the probability that k of the draws from a population are marked, for each k."""
    low, high = max(0, draws + marked - population), min(marked, draws)
    ways = _log_choose(marked, low) + _log_choose(population - marked, draws - low) - _log_choose(population, draws)
    k = np.arange(low, high)
    steps = np.log((marked - k) * (draws - k) / ((k + 1.0) * (population - marked - draws + k + 1)))
    chances = np.zeros(marked + 1)
    chances[low : high + 1] = np.exp(ways + np.concatenate([[0.0], np.cumsum(steps)]))
    return chances


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
