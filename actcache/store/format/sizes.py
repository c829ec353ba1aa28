"""Default sizes of shards and chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from actcache.spec import DTYPE_BYTES, Dtype
from actcache.store_options import StoreOptions

_SHARD_BYTES = 256 << 20
"""Default size of one shard of all sites, before compression; two of them are in memory."""
_CHUNK_BYTES = 1 << 19
"""Default size of the unit of reading, before compression: large enough that the cost of a request does not matter."""
_NARROW_CHUNK_BYTES, _WIDE_CHUNK_BYTES = 1 << 18, 1 << 20
"""Of sites of different widths, at least so much of the narrowest, for `lossless` works on whole blocks of high bytes
that zstd takes 128 KiB at a time; but no more than that of the widest."""
_SEQUENCES_STEP = 16
_SEQUENCES_PER_SHARD = 512
"""Each chunk is a sample of the shard's sequences; of 512, a window of many chunks shuffles like the whole store."""


def default_sizes(
    widths: Sequence[int],
    dtype: Dtype,
    n_sequences: int,
    rows_per_sequence: int,
    sequences_per_shard: int | None = None,
) -> tuple[int, int]:
    """Default sequences of a shard and rows of a chunk for sites of these widths."""
    row_bytes = [width * DTYPE_BYTES.get(dtype, 4) for width in widths]
    if sequences_per_shard is None:
        by_memory = _SHARD_BYTES // max(1, sum(row_bytes) * rows_per_sequence)
        sequences_per_shard = max(1, min(_SEQUENCES_PER_SHARD, by_memory, n_sequences))
        # An even number of sequences, so that there is a number of rows near the wanted one that divides the shard's.
        step = _SEQUENCES_STEP if sequences_per_shard >= _SEQUENCES_STEP else 1
        up = n_sequences == sequences_per_shard
        sequences_per_shard = (sequences_per_shard + up * (step - 1)) // step * step
    widest, narrowest = max([1, *row_bytes]), min([_CHUNK_BYTES, *row_bytes])
    wanted = max(_CHUNK_BYTES // widest, -(-_NARROW_CHUNK_BYTES // narrowest))
    at_most = max(1, min(wanted, _WIDE_CHUNK_BYTES // widest))
    return sequences_per_shard, largest_divisor(max(1, sequences_per_shard) * rows_per_sequence, at_most)


def sizes_of(options: StoreOptions, widths: Sequence[int], n_sequences: int, sequence_length: int) -> tuple[int, int]:
    """Sequences of a shard and rows of a chunk as they are asked for, with defaults filled in."""
    n_rows = max(1, sequence_length - options.skip_first)
    sequences_per_shard, rows_per_chunk = default_sizes(
        widths, options.dtype or "float32", n_sequences, n_rows, options.sequences_per_shard
    )
    return sequences_per_shard, options.rows_per_chunk or rows_per_chunk


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is no larger than `at_most`."""
    divisors = {d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
    return max(d for d in divisors if d <= at_most)
