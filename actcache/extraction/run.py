"""The loop: forward passes on this thread; encoding and disk run behind it, on as many bounded buffers as there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is run, and who is told."""

    lm: LanguageModel
    writer: StoreWriter
    tokens: ShardTokens
    batch_sequences: int
    shards: Sequence[int] | None = None
    """The only shards to make; by default all that are missing."""
    kept_rows: Callable[[int], NDArray[np.bool_] | None] = lambda shard: None
    """Of a shard: the only rows to keep, for sites that are added to rows that were chosen before."""
    check: Check | None = None
    """Looks at the complete store before it is sealed."""
    progress: Progress | None = None
    watch: Watch | None = None

    def __call__(self) -> Store:
        """Make the shards, one after the other, and finish the store if they were the last."""
        keep_freed_memory()
        try:
            with self.writer as writer:
                self._make_shards()
                return writer.finish(self.check)
        except KeyboardInterrupt as interrupt:
            # Now that the writer is closed: what was under way when the interrupt came is on disk, too.
            interrupt.add_note(self._where_it_stands())
            raise

    def _make_shards(self) -> None:
        writer, spec = self.writer, self.writer.spec
        missing = writer.pending()
        pending = [shard for shard in missing if self.shards is None or shard in self.shards]
        if not pending:
            return
        sites = self.lm.resolve([site.name for site in writer.sites], length=spec.sequence_length)
        n_open = sum(len(spec.shard_sequences(shard)) for shard in missing)
        n_share = sum(len(spec.shard_sequences(shard)) for shard in pending)
        follower = Follower(writer, spec.n_sequences - n_open, n_share, self.progress, self.watch)
        batch_sequences = self.batch_sequences
        for shard in pending:
            if not writer.claim(shard):  # somebody else makes it
                continue
            ids, lengths = self.tokens(shard)
            buffers = writer.acquire(shard)
            sink = Sink(buffers, lengths, self.kept_rows(shard))
            batch_sequences = sink.fill(self.lm, sites, ids, batch_sequences, follower.count)
            writer.submit(buffers, ids, sink.kept)
        writer.wait()
        follower.end()

    def _where_it_stands(self) -> str:
        done = self.writer.spec.n_shards - len(self.writer.pending())
        return f"{done} of {self.writer.spec.n_shards} shards of {self.writer.objects} are on disk"


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
