"""The loop: forward passes on this thread; other threads encode and write, with a bounded number of buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.extraction.follow import Follower
from actcache.extraction.sink import Sink
from actcache.memory import keep_freed_memory
from actcache.spec import Progress, TokenBlocks, lengths_of
from actcache.status import Watch
from actcache.store import Check, Store, StoreWriter

if TYPE_CHECKING:
    from actcache.lm import LanguageModel

ShardTokens = Callable[[int], tuple[NDArray[np.uint32], NDArray[np.int64]]]
"""Of a shard: its sequences' ids `(q, T)` and lengths `(q,)`."""


def run(
    lm: LanguageModel,
    writer: StoreWriter,
    tokens: ShardTokens,
    batch_sequences: int,
    *,
    shards: Sequence[int] | None = None,
    kept_rows: Callable[[int], NDArray[np.bool_] | None] = lambda shard: None,
    check: Check | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Store:
    """Make the shards, one after the other, and finish the store if they were the last.

    Args:
        lm: the model.
        writer: of the store; closed afterwards.
        tokens: of a shard.
        batch_sequences: sequences in one forward pass.
        shards: the only shards to make; by default all that are missing.
        kept_rows: of a shard, the only rows to keep: for sites that are added to rows that were chosen before.
        check: looks at the complete store before it is sealed.
        progress: called with (sequences done, sequences in all).
        watch: called with a `Status`.
    """
    keep_freed_memory()
    try:
        with writer:
            missing = writer.pending()
            pending = [shard for shard in missing if shards is None or shard in shards]
            if pending:
                follower = _follower(writer, missing, pending, progress, watch)
                _make_shards(lm, writer, pending, tokens, kept_rows, batch_sequences, follower)
            return writer.finish(check)
    except KeyboardInterrupt as interrupt:
        # Now that the writer is closed: what was under way when the interrupt came is on disk, too.
        done = writer.spec.n_shards - len(writer.pending())
        interrupt.add_note(f"{done} of {writer.spec.n_shards} shards of {writer.objects} are on disk")
        raise


def _follower(
    writer: StoreWriter, missing: Sequence[int], pending: Sequence[int], progress: Progress | None, watch: Watch | None
) -> Follower:
    spec = writer.spec
    n_open, n_share = (sum(len(spec.shard_sequences(shard)) for shard in some) for some in (missing, pending))
    return Follower(writer, spec.n_sequences - n_open, n_share, progress, watch)


def _make_shards(
    lm: LanguageModel,
    writer: StoreWriter,
    pending: Sequence[int],
    tokens: ShardTokens,
    kept_rows: Callable[[int], NDArray[np.bool_] | None],
    batch_sequences: int,
    follower: Follower,
) -> None:
    sites = lm.resolve([site.name for site in writer.sites], length=writer.spec.sequence_length)
    for shard in pending:
        if not writer.claim(shard):  # another process makes it
            continue
        ids, lengths = tokens(shard)
        buffers = writer.acquire(shard)
        sink = Sink(buffers, lengths, kept_rows(shard))
        batch_sequences = sink.fill(lm, sites, ids, batch_sequences, follower.count)
        writer.submit(buffers, ids, sink.kept)
    writer.wait()
    follower.end()


def tokens_of(blocks: TokenBlocks, writer: StoreWriter) -> ShardTokens:
    """A shard's tokens, of the blocks that the store is made from."""

    def tokens(shard: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        sequences = writer.spec.shard_sequences(shard)
        return np.asarray(blocks.ids[sequences.start : sequences.stop]), blocks.lengths(sequences)

    return tokens


def tokens_in(store: Store) -> ShardTokens:
    """A shard's tokens, of the store itself."""

    def tokens(shard: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        return store.shard_tokens(shard), lengths_of(store.shard_documents(shard))

    return tokens
