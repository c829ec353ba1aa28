"""Whole sequences in reading order, from a store whose rows are shuffled within their shards.

In: a plan and a store, whose row tables are read. Out: the plan in reading order; the places of rows in that order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.load.plan.epochs import Plan, Reading
from actcache.store.format.site_arrays import chunks_per_shard

if TYPE_CHECKING:
    from actcache.store import Store


def with_reading_order(plan: Plan, store: Store, row_bytes: int, memory_bytes: int) -> Plan:
    """The plan with its rows in reading order; a batch is as many whole sequences as fit `batch_rows`.

    Raises:
        ConfigError: a sequence does not fit in a batch, or two shards do not fit in the memory.
    """
    per_batch = plan.batch_rows // store.spec.rows_per_sequence
    if per_batch == 0:
        raise ConfigError(
            f'loader: order="sequence" gives whole sequences of {store.spec.rows_per_sequence} rows; batch_rows must '
            f"be at least that, got {plan.batch_rows}"
        )
    if plan.lanes != 1:
        raise ConfigError(f'loader: order="sequence" has one lane, the order of the store, got lanes={plan.lanes}')
    counts = rows_per_sequence(store, plan)
    before = np.concatenate([[0], np.cumsum(counts[counts > 0])])
    starts = before[::per_batch]
    if starts[-1] != plan.n_rows and not plan.drop_last:
        starts = np.append(starts, plan.n_rows)
    per_shard = chunks_per_shard(store.spec)
    reading = Reading(chunks_per_shard=per_shard, batch_starts=starts)
    in_order = replace(plan, reading=reading, chunks_per_window=per_shard)
    if 2 * in_order.most_window_rows * row_bytes > memory_bytes:
        raise ConfigError(
            'loader: order="sequence" holds two whole shards, because rows are shuffled within them; '
            f"give it memory={2 * in_order.most_window_rows * row_bytes} or more, or make a store "
            "with fewer sequences_per_shard"
        )
    return in_order


def reading_order(store: Store, row_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of `row_ids`, all of one shard, in the order of their sequences and positions."""
    shard = int(row_ids[0]) // store.spec.rows_per_shard
    table, within = store.shard_row_table(shard), row_ids - shard * store.spec.rows_per_shard
    return np.lexsort((table["position"][within], table["sequence"][within]))


def rows_per_sequence(store: Store, plan: Plan) -> NDArray[np.int64]:
    """`(Q,)` how many rows each sequence has in a plan; reads the row tables if rows are left out."""
    spec = store.spec
    if plan.n_rows == spec.n_rows:
        return np.full(spec.n_sequences, spec.rows_per_sequence, np.int64)
    counts, per_shard = np.zeros(spec.n_sequences, np.int64), spec.rows_per_shard // spec.rows_per_chunk
    table = plan.chunk_table
    chunks = np.arange(plan.n_chunks) if table is None else table[:, 0]
    for shard, of_shard in ((int(part[0]) // per_shard, part) for part in _by_shard(chunks, per_shard)):
        rows = plan.row_ids(of_shard) - shard * spec.rows_per_shard
        counts += np.bincount(store.shard_row_table(shard)["sequence"][rows], minlength=spec.n_sequences)
    return counts


def _by_shard(chunks: NDArray[np.int64], per_shard: int) -> list[NDArray[np.int64]]:
    return np.split(chunks, np.flatnonzero(np.diff(chunks // per_shard)) + 1)
