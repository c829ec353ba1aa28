"""Run the base model over token blocks and keep the activations: tokens x model -> a sealed store.

Work is done shard by shard, and a shard is a function of its own sequences only. So a run that was killed is continued
by the same call: shards that are committed stay, the others are made, and the bytes are those of an unbroken run.
The forward pass runs on this thread; encoding and disk run behind it, on as many bounded buffers as there are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actcache.errors import ConfigError
from actcache.memory import keep_freed_memory
from actcache.spec import Dtype, Progress, Site, StoreSpec, TokenBlocks, check_positive
from actcache.store import Store, StoreWriter
from actcache.store.codecs import STORED_DTYPE

if TYPE_CHECKING:
    from actcache.lm import LanguageModel, ResolvedSite
    from actcache.store import ShardBuffers

_SHARD_BYTES = 256 << 20
"""Default size of one shard of all sites, before compression; two of them are in memory."""
_CHUNK_BYTES = 1 << 19
"""Default size of the unit of reading, before compression: what it costs to ask for one is then no matter."""
_SEQUENCES_PER_SHARD = 512
"""Each chunk is a sample of the shard's sequences; of 512, a window of many chunks shuffles like the whole store."""


def store_spec(
    lm: LanguageModel,
    blocks: TokenBlocks,
    sites: Sequence[Site],
    *,
    codec: str = "lossless",
    dtype: Dtype = "bfloat16",
    skip_first: int = 1,
    seed: int = 0,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
) -> StoreSpec:
    """The spec of the store that `extract` would write, with default sizes filled in.

    Raises:
        ConfigError: sizes that do not fit together, or sequences longer than the model's context.
    """
    if lm.n_ctx is not None and blocks.sequence_length > lm.n_ctx:
        raise ConfigError(
            f"sequences of {blocks.sequence_length} tokens, but {lm.name} has a context of {lm.n_ctx}; "
            f"make token blocks with length={lm.n_ctx} or less"
        )
    rows_per_sequence = max(1, blocks.sequence_length - skip_first)
    row_bytes = [site.width * STORED_DTYPE[dtype].itemsize for site in sites if dtype in STORED_DTYPE]
    if sequences_per_shard is None:
        by_memory = _SHARD_BYTES // max(1, sum(row_bytes) * rows_per_sequence)
        sequences_per_shard = max(1, min(_SEQUENCES_PER_SHARD, by_memory, blocks.n_sequences))
    if rows_per_chunk is None:
        at_most = max(1, _CHUNK_BYTES // max([1, *row_bytes]))
        rows_per_chunk = _largest_divisor(sequences_per_shard * rows_per_sequence, at_most)
    return StoreSpec(
        sites=tuple(sites),
        n_sequences=blocks.n_sequences,
        sequence_length=blocks.sequence_length,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
        skip_first=skip_first,
        dtype=dtype,
        codec=codec,
        seed=seed,
        model=lm.identity,
        text={**blocks.description, "tokens": blocks.digest()},
    )


def extract(
    lm: LanguageModel,
    blocks: TokenBlocks,
    patterns: Sequence[str],
    path: str | Path,
    *,
    codec: str = "lossless",
    dtype: Dtype = "bfloat16",
    skip_first: int = 1,
    seed: int = 0,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    batch_sequences: int = 32,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Store:
    """Write the activations at all sites that match the patterns, and return the sealed store.

    Args:
        lm: the base model.
        blocks: `(Q, T)` tokens, already in the order in which they are to be stored.
        patterns: hook names or glob patterns of them, such as `blocks.*.hook_mlp_out`.
        path: where the store is made, or continued when an earlier call was interrupted.
        codec: preset `raw` or `lossless`.
        dtype: element type on disk: `bfloat16`, `float16` or `float32`.
        skip_first: leading positions of each sequence that are not kept: they have the least context and, in many
            models, extreme norms.
        seed: seed of the shuffle of rows within shards.
        sequences_per_shard: sequences of a shard; by default 512, fewer where that would exceed 256 MB.
        rows_per_chunk: rows of the unit of reading; by default half a megabyte of the widest site.
        batch_sequences: sequences in one forward pass.
        threads: encoding threads; by default one per core.
        progress: called with (sequences done, sequences in all) after each forward pass.

    Raises:
        SiteError: a pattern matches nothing. ConfigError: sizes do not fit together. NotAStoreError: `path` holds
        something else. StoreMismatchError: `path` holds a store of another model, text or spec. StorageFullError: no
        room; make some and call again.
    """
    check_positive("extract", batch_sequences=batch_sequences)
    sites = lm.resolve(patterns, length=blocks.sequence_length)
    spec = store_spec(
        lm,
        blocks,
        [resolved.site for resolved in sites],
        codec=codec,
        dtype=dtype,
        skip_first=skip_first,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
    )
    keep_freed_memory()
    with StoreWriter(path, spec, blocks, threads=threads or os.cpu_count() or 1) as writer:
        pending = writer.pending()
        done = spec.n_sequences - sum(len(spec.shard_sequences(shard)) for shard in pending)
        for shard in pending:
            buffers = writer.acquire(shard)
            sequences = spec.shard_sequences(shard)
            ids = np.asarray(blocks.ids[sequences.start : sequences.stop])
            for start in range(0, len(ids), batch_sequences):
                batch = ids[start : start + batch_sequences]
                _keep(lm, sites, batch, start, buffers)
                done += len(batch)
                if progress:
                    progress(done, spec.n_sequences)
            writer.submit(buffers, ids)
        return writer.finish()


def _keep(lm: LanguageModel, sites: Sequence[ResolvedSite], ids: np.ndarray, first: int, buffers: ShardBuffers) -> None:
    """Capture one batch and append its rows to the shard's buffers."""
    import torch

    spec = buffers.spec
    begin, n_rows = first * spec.rows_per_sequence, len(ids) * spec.rows_per_sequence
    for name, acts_QTD in lm.capture(ids, sites).items():
        target = torch.from_numpy(buffers.rows[name][begin : begin + n_rows])
        if spec.dtype == "bfloat16":
            target = target.view(torch.bfloat16)
        target.view(len(ids), spec.rows_per_sequence, -1).copy_(acts_QTD[:, spec.skip_first :])


def _largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is no larger than `at_most`."""
    divisors = {d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)}
    return max(d for d in divisors if d <= at_most)
