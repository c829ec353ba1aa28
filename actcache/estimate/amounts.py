"""How many tokens, rows, shards and chunks a store of a number of sequences has. Integers only, no disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actcache.spec import DTYPE_BYTES, MOST_OBJECT_BYTES, Dtype
from actcache.store.format.keys import token_chunk_sequences
from actcache.store.format.records import HEAD_BYTES
from actcache.store.format.sizes import sizes_of
from actcache.store_options import StoreOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be extracted, and how: the part of a plan that neither tokens nor workers change."""

    sites: Mapping[str, int]
    """Width by site."""
    options: StoreOptions
    """How the store is laid out."""
    sequence_length: int
    """T, tokens of a full sequence."""
    threads: int
    """Encoding threads."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row at all sites, in the store's dtype."""
        return sum(self.sites.values()) * DTYPE_BYTES[self.dtype]

    @property
    def dtype(self) -> Dtype:
        """Element type of the store."""
        return self.options.dtype or "float32"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the codec is left out, because a plan is made for all presets."""
        options = self.options
        return {
            "sites": dict(self.sites),
            "dtype": self.dtype,
            "skip_first": options.skip_first,
            "sequence_length": self.sequence_length,
            "sequences_per_shard": options.sequences_per_shard,
            "rows_per_chunk": options.rows_per_chunk,
            "threads": self.threads,
        }

    def sizes(self, n_sequences: int) -> tuple[int, int]:
        """Sequences of a shard and rows of a chunk, as `extract` would choose them for so many sequences."""
        return sizes_of(self.options, list(self.sites.values()), n_sequences, self.sequence_length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Amounts:
    """Amounts of a store, or of the several stores that very many tokens need."""

    n_tokens: int
    """Tokens that the model is run over."""
    n_sequences: int
    """Q."""
    n_rows: int
    """N, rows of each site."""
    sequences_per_shard: int
    """Sequences of a shard."""
    rows_per_chunk: int
    """Rows of the unit of reading."""
    n_shards: int
    """S."""
    n_chunks: int
    """Chunks of one site."""
    n_stores: int
    """Stores: the ledger of one, which is read as a whole, may be `MOST_OBJECT_BYTES` large."""
    token_chunks: int
    """Objects of each of the two token arrays."""

    @property
    def tokens_per_shard(self) -> float:
        """Tokens of a full shard."""
        return self.n_tokens / self.n_sequences * min(self.sequences_per_shard, self.n_sequences)


def amounts_of(asked: Asked, n_sequences: int, rows_per_sequence: float, tokens_per_sequence: float) -> Amounts:
    """Amounts for sequences with this average number of rows and tokens."""
    shard, chunk = asked.sizes(n_sequences)
    n_shards = math.ceil(n_sequences / shard)
    in_last = n_sequences - (n_shards - 1) * shard
    heads = HEAD_BYTES * (len(asked.sites) + 1)
    return Amounts(
        n_tokens=round(n_sequences * tokens_per_sequence),
        n_sequences=n_sequences,
        n_rows=round(n_sequences * rows_per_sequence),
        sequences_per_shard=shard,
        rows_per_chunk=chunk,
        n_shards=n_shards,
        n_chunks=(n_shards - 1) * _chunks(shard * rows_per_sequence, chunk)
        + _chunks(in_last * rows_per_sequence, chunk),
        n_stores=math.ceil(n_shards / (MOST_OBJECT_BYTES // heads)),
        token_chunks=math.ceil(n_sequences / token_chunk_sequences(shard, asked.sequence_length)),
    )


def _chunks(n_rows: float, rows_per_chunk: int) -> int:
    return math.ceil(round(n_rows) / rows_per_chunk)
