"""Which sequences an audit looks at, and what the store has of them.

Sequences are drawn from evenly spread stretches of the store, so that many shards are seen. Where lengths differ, the
shortest and the longest sequence of a shard are taken as well, because padding would change those.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Sequences of one shard that are audited."""

    shard: int
    sequences: list[int]
    chunk: int | None = None
    """The only chunk of the shard whose rows are looked at; None for every row that the sequences have."""


def draw_sequences(store: Store, n_sequences: int, seed: int, within: range | None = None) -> list[Drawn]:
    """At most `n_sequences` sequences with rows, from as many shards as possible; `within` limits them.

    The same store, number and seed give the same sequences.
    """
    rng, within = np.random.default_rng(seed), within or range(store.spec.n_sequences)
    return _of_shards(store, _spread(_shards_within(store, within), n_sequences, rng), n_sequences, rng, within)


def draw_cheaply(
    store: Store, n_sequences: int, within: range | None, *, one_shard_of: int, most_shards: int
) -> list[Drawn]:
    """Sequences of a small audit: all rows of some, and of every other shard one chunk.

    Rows are shuffled within a shard, so reading a sequence reads most of its shard. Therefore only
    one shard in every `one_shard_of` is read whole, for `n_sequences` sequences in all. Of at most `most_shards`
    others, one sequence's rows in one chunk are read: several processes may have made the shards, not all alike.
    """
    rng, within = np.random.default_rng(0), within or range(store.spec.n_sequences)
    shards = _shards_within(store, within)
    whole = _spread(shards, -(-len(shards) // one_shard_of), rng)
    drawn = _of_shards(store, whole, n_sequences, rng, within)
    for shard in _spread([shard for shard in shards if shard not in whole], most_shards, rng):
        for sequence in _of_shard(store, shard, 1, rng, within):
            row = int(np.argmax(store.shard_row_table(shard, ["sequence"])["sequence"] == sequence))
            drawn.append(Drawn(shard=shard, sequences=[sequence], chunk=row // store.spec.rows_per_chunk))
    return drawn


def _shards_within(store: Store, within: range) -> list[int]:
    """Committed shards that have some of the sequences."""
    spans = ((shard, store.spec.shard_sequences(shard)) for shard in store.committed)
    return [shard for shard, span in spans if span.start < within.stop and within.start < span.stop]


def _spread(shards: list[int], n: int, rng: np.random.Generator) -> list[int]:
    """At most `n` of the shards: one drawn from each of equal stretches."""
    edges = np.linspace(0, len(shards), min(len(shards), n) + 1).astype(int)
    return [shards[int(rng.integers(start, stop))] for start, stop in pairwise(edges.tolist())]


def _of_shards(
    store: Store, shards: list[int], n_sequences: int, rng: np.random.Generator, within: range
) -> list[Drawn]:
    """All rows of `n_sequences` sequences, shared out over some shards; shards without such rows are left out."""
    share = np.diff(np.linspace(0, n_sequences, len(shards) + 1).astype(int)).tolist()
    drawn = [
        Drawn(shard=shard, sequences=_of_shard(store, shard, n, rng, within))
        for shard, n in zip(shards, share, strict=True)
    ]
    return [entry for entry in drawn if entry.sequences]


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


def stored_sequences(store: Store, drawn: Drawn) -> Iterator[StoredSequence]:
    """The tokens and rows of the sequences that were drawn from a shard.

    Raises:
        CorruptShardError: the row table names another token than the sequence has there.
    """
    shard = drawn.shard
    table, span = store.shard_row_table(shard), store.spec.shard_sequences(shard)
    ids, documents = store.shard_tokens(shard), store.shard_documents(shard)
    lengths = lengths_of(documents)
    for sequence in drawn.sequences:
        mine = np.flatnonzero(table["sequence"] == sequence)
        if drawn.chunk is not None:
            mine = mine[mine // store.spec.rows_per_chunk == drawn.chunk]
        tokens = ids[sequence - span.start][: lengths[sequence - span.start]]
        positions = table["position"][mine].astype(np.int64)
        if (positions >= len(tokens)).any() or (tokens[positions] != table["token"][mine]).any():
            raise CorruptShardError(
                f"the row table of shard {shard} of {store.path} names other tokens for sequence {sequence} than the "
                f"store has",
                store=store.path,
            )
        rows = store.spec.shard_rows(shard).start + mine
        yield StoredSequence(sequence=sequence, ids=tokens, rows=rows, positions=positions)
