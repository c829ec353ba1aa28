"""A sample: some sequences of the text through the model, timed, in buffers as a writer has them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.estimate.footprint import resident_bytes
from actcache.extraction.sink import Sink
from actcache.order import permutation
from actcache.spec import DTYPE_BYTES, StoreSpec, TokenBlocks
from actcache.store import Objects, ShardBuffers
from actcache.store.codecs.fit import ROWS_TO_FIT
from actcache.store.writing.encode import ShardEncoder

if TYPE_CHECKING:
    from actcache.lm import LanguageModel, ResolvedSite

_SAMPLE_BYTES = 64 << 20
"""Size of the sample at all sites: some hundred chunks, encoded in tenths of a second."""
FEWEST_BATCHES = 3
_GROWTH = 4
"""Factor by which the batch to measure with grows while it is fast enough."""


class Sample:
    """Some of the first sequences in one shard of the planned store, and how long they took.

    The shard may have room for a few more sequences, so that chunks of the planned size divide it.
    """

    def __init__(
        self,
        lm: LanguageModel,
        blocks: TokenBlocks,
        sites: Sequence[ResolvedSite],
        spec: StoreSpec,
        n_sequences: int,
        batch_sequences: int,
    ) -> None:
        step = spec.rows_per_chunk // math.gcd(spec.rows_per_chunk, spec.rows_per_sequence)
        n_sequences = min(n_sequences, spec.sequences_per_shard, blocks.n_sequences)
        self.spec = replace(spec, n_sequences=n_sequences, sequences_per_shard=-(-n_sequences // step) * step)
        self.lm, self.sites, self.batch_sequences = lm, sites, batch_sequences
        self.blocks = blocks.take(range(n_sequences))
        self.ids, lengths = np.asarray(self.blocks.ids), self.blocks.lengths(range(n_sequences))
        self.buffers = ShardBuffers(self.spec, self.spec.sites)
        self.sink = Sink(self.buffers, lengths, None)
        self.n_rows, self.n_tokens = self.sink.n_rows, int(lengths.sum())
        self.seconds_per_token: list[float] = []
        self.n_tokens_timed = 0
        if not self.n_rows:
            raise ConfigError(
                f"no row would be kept: the sequences are not longer than the first {spec.skip_first} tokens, which "
                "are left out; make longer sequences, or choose a smaller skip_first"
            )

    def run(self) -> float:
        """Fill the buffers once, timing each batch; returns the seconds of all."""
        began = before = perf_counter()

        def count(n_sequences: int, n_tokens: int) -> None:
            nonlocal before
            _wait_for(self.lm)
            now = perf_counter()
            if n_tokens:
                self.seconds_per_token.append((now - before) / n_tokens)
            before = now

        self.sink.fill(self.lm, self.sites, self.ids, self.batch_sequences, count)
        seconds = perf_counter() - began
        self.n_tokens_timed += self.n_tokens
        return seconds

    def run_for(self, seconds: float) -> None:
        """Run at least once, until there are enough batches and `seconds` have passed."""
        began = perf_counter()
        while len(self.seconds_per_token) < FEWEST_BATCHES or perf_counter() - began < seconds:
            self.run()

    @property
    def order(self) -> NDArray[np.int64]:
        """`(n,)` the row at each place of the shard, shuffled as a writer does."""
        return permutation(self.n_rows, self.spec.seed, 0)

    def rows(self, site: str) -> NDArray[Any]:
        """`(n, D)` stored values of a site, in reading order."""
        return self.buffers.rows[site][: self.n_rows]

    def batches_of_rows(self, most: int) -> Iterator[NDArray[np.int64]]:
        """Row numbers, at most a chunk of them, from each batch of the text; from some batches if there are many."""
        n_batches = -(-self.spec.n_sequences // self.batch_sequences)
        ends = np.linspace(0, self.n_rows, min(n_batches, self.n_rows) + 1).astype(np.int64)
        for batch in np.unique(np.linspace(0, len(ends) - 2, min(most, len(ends) - 1)).astype(np.int64)):
            rows = ends[batch] + permutation(int(ends[batch + 1] - ends[batch]), self.spec.seed, 0)
            yield rows[: self.spec.rows_per_chunk]


def _wait_for(lm: LanguageModel) -> None:
    """Wait until the model's device has finished its work."""
    if lm.device.type == "cuda":
        import torch

        torch.cuda.synchronize(lm.device)


def sequences_wanted(spec: StoreSpec, batch_sequences: int) -> int:
    """Number of sequences in a sample large enough to measure sizes and speeds."""
    row_bytes = sum(site.width for site in spec.sites) * DTYPE_BYTES[spec.dtype]
    n_rows = max(ROWS_TO_FIT, 2 * spec.rows_per_chunk, _SAMPLE_BYTES // row_bytes)
    return max(FEWEST_BATCHES * batch_sequences, -(-n_rows // spec.rows_per_sequence))


@dataclass(frozen=True, kw_only=True, slots=True)
class Warm:
    """Measurements made while the model and the process were warmed up."""

    batch_sequences: int
    """Sequences in a batch to measure with."""
    batch_s: float
    """Seconds that one batch takes."""
    resident_before: int
    """Bytes of this process with all libraries, before it ran whole batches."""
    resident_after: tuple[int, ...]
    """The same after each of several batches of that size, without the rows kept."""


def warm_up(
    lm: LanguageModel,
    blocks: TokenBlocks,
    sites: Sequence[ResolvedSite],
    spec: StoreSpec,
    batch_sequences: int,
    limit_s: float,
) -> Warm:
    """Find the batch to measure with: the size asked for, or less if that would take longer than the limit.

    Without a limit (`inf`) it is always the size asked for.
    """
    one = Sample(lm, blocks, sites, spec, 1, 1)
    one.run()  # warm-up: the first pass of a process is not representative
    with tempfile.TemporaryDirectory(prefix="actcache-plan-") as folder:
        encoder = ShardEncoder(Objects(folder, read_only=False), one.spec)
        encoder.write(one.spec.sites[0], 0, one.rows(one.spec.sites[0].name), one.order)  # loads the compiled loops
    wanted = min(batch_sequences, spec.sequences_per_shard, blocks.n_sequences)
    before, batch, some, seconds = resident_bytes(), 1, one, one.run()
    while batch < wanted and seconds * _GROWTH <= limit_s:
        batch = min(wanted, batch * _GROWTH)
        some = Sample(lm, blocks, sites, spec, batch, batch)
        some.run()
        seconds = some.run()
    kept = some.n_rows * sum(site.width for site in spec.sites) * DTYPE_BYTES[spec.dtype]
    after = [resident_bytes() - kept]
    for _ in range(FEWEST_BATCHES - 1):
        some.run()
        after.append(resident_bytes() - kept)
    return Warm(batch_sequences=batch, batch_s=seconds, resident_before=before, resident_after=tuple(after))
