"""What a writer is given and what it reports: a shard's rows in memory, and how much has been committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.order import permutation
from actcache.spec import Site, StoreSpec
from actcache.store import codecs
from actcache.store.format.stats import merge

Allocate: TypeAlias = Callable[[tuple[int, int], np.dtype[Any]], NDArray[Any]]
"""Makes an array of a shape and a dtype, as `numpy.empty` does."""

N_BUFFERS = 2
"""Shards in memory by default: one is filled while the other is encoded."""


class ShardBuffers:
    """One shard's rows in memory, in stored dtype and reading order; reused from shard to shard.

    They are shuffled chunk by chunk when they are encoded, so that the thread of the forward pass only appends.
    """

    def __init__(self, spec: StoreSpec, sites: Sequence[Site], allocate: Allocate | None = None) -> None:
        dtype, make = codecs.STORED_DTYPE[spec.dtype], allocate or np.empty
        self.spec, self.shard = spec, -1
        self.rows: dict[str, NDArray[Any]] = {
            site.name: make((spec.rows_per_shard, site.width), dtype) for site in sites
        }
        self.kept: NDArray[np.int64] = np.empty(0, np.int64)
        self.order: NDArray[np.int64] = np.empty(0, np.int64)

    def shuffle(self, kept: NDArray[np.bool_] | None) -> None:
        """Say which of the shard's rows are in the buffers, and draw their order on disk: row i will be `order[i]`."""
        capacity = len(self.spec.shard_rows(self.shard))
        self.kept = np.arange(capacity) if kept is None else np.flatnonzero(kept)
        self.order = permutation(len(self.kept), self.spec.seed, self.shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What one writer has committed so far."""

    n_bytes: int = 0
    """Stored bytes of data and statistics."""
    n_shards: int = 0
    lines: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """By site: the statistics line of all rows that the writer has committed."""

    def with_shard(self, n_bytes: int, lines: Mapping[str, NDArray[np.float64]]) -> Written:
        """The sum of this and one more shard."""
        merged = {
            name: merge([self.lines[name], line] if name in self.lines else [line]) for name, line in lines.items()
        }
        return Written(n_bytes=self.n_bytes + n_bytes, n_shards=self.n_shards + 1, lines={**self.lines, **merged})
