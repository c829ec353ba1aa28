"""How large windows are, from a memory budget; and how well such windows are going to shuffle. Integers only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from actcache.errors import ConfigError
from actcache.load.chosen import Chosen
from actcache.load.plan import Plan
from actcache.spec import StoreSpec

_WINDOWS_PER_EPOCH = 4
_CHUNKS_THAT_SHUFFLE = 64
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
GOOD_RATIO = 0.97
"""Distinct sequences in a batch, over what a permutation of all rows would give, from which on a shuffle is good."""


def memory_bytes(memory: int | str) -> int:
    """Bytes of a budget such as `"1GB"` (1e9), `"512MiB"` (2**29) or a number.

    Raises:
        ConfigError: it is none, or nothing.
    """
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)b?\s*", memory.lower())
        if found:
            number, unit, binary = found.groups()
            factor = 1024 ** "kmgt".index(unit) * 1024 if binary and unit else _UNITS[unit]
            memory = int(float(number) * factor)
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ConfigError(f'loader: memory must be a number of bytes or text such as "1GB", "512MiB", got {memory!r}')
    return memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What windows may take."""

    n_bytes: int
    """For all windows of a process."""
    row_bytes: int
    """Of a row at all sites, as it is stored."""
    lanes: int
    """Lanes of the order."""
    lanes_here: int
    """Those that one process reads; each has two windows."""

    @property
    def window_rows(self) -> int:
        """Rows of a window that fit."""
        return self.n_bytes // (2 * self.lanes_here * self.row_bytes)

    def chunks_per_window(self, n_rows: int, rows_per_chunk: int, chosen: Chosen | None) -> int:
        """As many chunks as fit, but several windows an epoch, so that one is read while another is in use."""
        fit = self.window_rows // rows_per_chunk
        n_chunks, that_shuffle = -(-n_rows // rows_per_chunk), _CHUNKS_THAT_SHUFFLE
        if chosen:  # a window holds wanted rows alone, so more chunks fit and more are needed
            fullest_first = np.cumsum(np.sort(chosen.chunk_table[:, 1])[::-1])
            fit = int(np.searchsorted(fullest_first, self.window_rows, side="right"))
            n_chunks = len(chosen.chunk_table)
            that_shuffle = -(-_CHUNKS_THAT_SHUFFLE * rows_per_chunk * n_chunks // chosen.n_rows)
        by_overlap = max(that_shuffle, -(-n_chunks // (_WINDOWS_PER_EPOCH * self.lanes)))
        return max(1, min(fit, by_overlap))


def expected_ratio(plan: Plan, spec: StoreSpec) -> float:
    """Distinct sequences that a batch is going to have, over what a permutation of all rows would give; about.

    A batch takes an equal share of the rows of a window's chunks, which are chunks of so many shards as chance has it;
    the rows of a sequence lie anywhere in its shard. Means are taken for what differs from shard to shard, and batches
    that begin in one window and end in the next are counted for what they are: better mixed.
    """
    rows_of_chunk = plan.n_rows / plan.n_chunks
    in_window = min(plan.n_chunks, max(plan.chunks_per_window, math.ceil(plan.batch_rows / rows_of_chunk)))
    taken = min(1.0, plan.batch_rows / (in_window * rows_of_chunk))  # of the rows of a window
    within = _share_found(plan, spec, in_window, taken)
    between = 0.0
    if in_window < plan.n_chunks:
        cuts = [(2 * i + 1) / 16 for i in range(8)]
        halves = ((_share_found(plan, spec, in_window, taken * part) for part in (cut, 1 - cut)) for cut in cuts)
        between = sum(map(sum, halves)) / len(cuts)
    ideal = 1 - (1 - min(1.0, plan.batch_rows / plan.n_rows)) ** max(1.0, plan.n_rows / spec.n_sequences)
    found = within * (1 - taken) + between * taken if between else within
    return float(min(1.0, found / ideal))


def _share_found(plan: Plan, spec: StoreSpec, in_window: int, taken: float) -> float:
    """Share of all sequences that have a row among those which are taken at random from a window's chunks."""
    rows_of_sequence = max(1.0, plan.n_rows / spec.n_sequences)
    of_shard, found = round(max(1.0, plan.n_chunks / spec.n_shards)), 0.0
    for here in range(1, min(of_shard, in_window) + 1):
        chance = _hypergeometric(here, plan.n_chunks, of_shard, in_window)
        found += chance * (1 - (1 - min(1.0, here / of_shard * taken)) ** rows_of_sequence)
    return float(found)


def _hypergeometric(k: int, population: int, marked: int, draws: int) -> float:
    """Chance that k of the draws from a population are among the marked ones."""
    if not max(0, draws + marked - population) <= k <= min(marked, draws):
        return 0.0
    ways = _log_choose(marked, k) + _log_choose(population - marked, draws - k) - _log_choose(population, draws)
    return math.exp(ways)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
