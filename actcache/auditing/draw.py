"""Which sequences an audit looks at, and what the store has of them.

Sequences are drawn from evenly spread stretches of the store, so that many shards are seen. Where lengths differ, the
shortest and the longest sequence of a shard are taken as well: those are the ones that padding would change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError
from actcache.spec import lengths_of
from actcache.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSequence:
    """A sequence, and where its rows are."""

    sequence: int
    ids: NDArray[np.uint32]
    """`(T,)` its tokens, at its own length."""
    rows: NDArray[np.int64]
    """`(n,)` ids of its rows."""
    positions: NDArray[np.int64]
    """`(n,)` the position in the sequence that each row belongs to."""


def draw_sequences(
    store: Store, n_sequences: int, seed: int, within: range | None = None, *, one_shard_of: int = 1
) -> list[tuple[int, list[int]]]:
    """`(shard, sequences)` of at most `n_sequences` sequences that have rows; `within` limits them.

    Rows are shuffled within a shard, so whoever reads a sequence reads most of its shard; `one_shard_of` so many is
    read, at least one.

    The same store, number and seed give the same sequences.
    """
    spec, rng = store.spec, np.random.default_rng(seed)
    within = within or range(spec.n_sequences)
    shards = [s for s in store.committed if set(spec.shard_sequences(s)) & set(within)]
    if not shards:
        return []
    n_looked_at = min(-(-len(shards) // one_shard_of), n_sequences)
    edges = np.linspace(0, len(shards), n_looked_at + 1).astype(int)
    chosen = [shards[int(rng.integers(a, b))] for a, b in pairwise(edges.tolist())]
    share = np.diff(np.linspace(0, n_sequences, n_looked_at + 1).astype(int)).tolist()
    drawn = [(shard, _of_shard(store, shard, n, rng, within)) for shard, n in zip(chosen, share, strict=True)]
    return [(shard, sequences) for shard, sequences in drawn if sequences]


def _of_shard(store: Store, shard: int, n: int, rng: np.random.Generator, within: range) -> list[int]:
    first = store.spec.shard_sequences(shard).start
    here = np.unique(store.shard_row_table(shard, ["sequence"])["sequence"]).astype(np.int64)
    here = here[(here >= within.start) & (here < within.stop)]
    if not len(here):
        return []
    lengths = lengths_of(store.shard_documents(shard))[here - first]
    extremes = [] if (lengths == lengths[0]).all() else [int(here[lengths.argmin()]), int(here[lengths.argmax()])]
    others = rng.permutation(here).tolist()
    return list(dict.fromkeys([*others[:1], *extremes, *others]))[:n]


def stored_sequences(store: Store, shard: int, sequences: list[int]) -> Iterator[StoredSequence]:
    """The tokens and rows of some sequences of a shard.

    Raises:
        CorruptShardError: a row is said to belong to another token than its sequence has there.
    """
    table, span = store.shard_row_table(shard), store.spec.shard_sequences(shard)
    ids, documents = store.shard_tokens(shard), store.shard_documents(shard)
    lengths = lengths_of(documents)
    for sequence in sequences:
        mine = np.flatnonzero(table["sequence"] == sequence)
        tokens = ids[sequence - span.start][: lengths[sequence - span.start]]
        positions = table["position"][mine].astype(np.int64)
        if (positions >= len(tokens)).any() or (tokens[positions] != table["token"][mine]).any():
            raise CorruptShardError(
                f"the row table of shard {shard} of {store.path} names other tokens for sequence {sequence} than the "
                f"store has; run 'actcache verify {store.path}'"
            )
        rows = store.spec.shard_rows(shard).start + mine
        yield StoredSequence(sequence=sequence, ids=tokens, rows=rows, positions=positions)
