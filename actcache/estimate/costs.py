"""A plan: measured once, and computed for any number of tokens and workers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from actcache.addresses import shown
from actcache.errors import ConfigError
from actcache.estimate.amounts import Amounts, Asked, amounts_of
from actcache.estimate.footprint import Host, Memory, host_of, memory_of
from actcache.estimate.measure import Measured, measure
from actcache.estimate.preset import PresetPlan, Terms, preset_plan
from actcache.extraction import BatchSequences, store_spec
from actcache.extraction.settle import fastest_batch
from actcache.source import as_token_blocks
from actcache.spec import TokenBlocks, check_positive
from actcache.store import Objects
from actcache.store_options import StoreOptions

if TYPE_CHECKING:
    from actcache.lm import LanguageModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What an extraction is going to cost; made by `plan`."""

    model: str
    """Name of the base model."""
    asked: Asked
    """Sites, dtype and how sequences become rows."""
    amounts: Amounts
    """Tokens, rows, shards, chunks."""
    workers: int
    """Processes that share the work, each with a machine like this one."""
    batch_sequences: int
    """Sequences in one forward pass."""
    out: str | None
    """Where the store is going to be."""
    free_bytes: int | None
    """Free space there; None for buckets, and if no place was named."""
    forward_s: float
    """Seconds of the forward passes alone, all workers side by side."""
    forward_s_range: tuple[float, float]
    """The same at the speed of the fastest batch of the sample, and of the slowest."""
    memory: Memory
    """Memory of one worker."""
    presets: Mapping[str, PresetPlan]
    """By preset, and `auto`."""
    terms: Terms
    """Prices and expected use."""
    measured: Measured
    """The measurements that everything is computed from."""
    host: Host
    """The process that measured."""

    def scaled(self, n_tokens: int | None = None, workers: int | None = None) -> Plan:
        """The same for another number of tokens, or of workers that share the shards.

        Workers are assumed to be as fast as this machine, and to wait neither for each other nor for the storage. Those
        beyond the number of shards are idle.

        Raises:
            ConfigError: a number below one.
        """
        tokens = self.amounts.n_tokens if n_tokens is None else n_tokens
        workers = self.workers if workers is None else workers
        check_positive("plan", n_tokens=tokens, workers=workers)
        same = tokens == self.amounts.n_tokens
        n_sequences = self.amounts.n_sequences if same else math.ceil(tokens / self.measured.tokens_per_sequence)
        return _make_plan(
            self.measured,
            self.asked,
            self.terms,
            self.host,
            n_sequences=n_sequences,
            workers=workers,
            batch_sequences=self.batch_sequences,
            model=self.model,
            out=self.out,
            free_bytes=self.free_bytes,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        memory = {**asdict(self.memory), "total": self.memory.total, "total_range": self.memory.total_range}
        return {**asdict(self), "asked": self.asked.to_dict(), "memory": memory}


def plan(
    lm: LanguageModel,
    blocks: TokenBlocks,
    patterns: Sequence[str],
    *,
    options: StoreOptions | None = None,
    terms: Terms | None = None,
    out: str | Path | None = None,
    batch_sequences: BatchSequences = 32,
    threads: int | None = None,
    n_tokens: int | None = None,
    workers: int = 1,
    time_budget_s: float = 20.0,
    sample_sequences: int | None = None,
) -> Plan:
    """Estimate what `extract` with these arguments is going to cost, from a few real batches, and how certain that is.

    Args:
        lm: the base model.
        blocks: `(Q, T)` tokens: all, or a part of them together with `n_tokens`.
        patterns: hook names or glob patterns of them.
        options: how the store is going to be laid out; its codec is not used, because a plan covers all presets.
        terms: prices, and how the store is going to be used.
        out: where the store is going to be; only the free space there is looked up.
        batch_sequences: sequences in one forward pass, or `auto`: as many as make this model fast here.
        threads: encoding threads; by default one per core.
        n_tokens: tokens in all, where the blocks are a part of them.
        workers: processes that share the work.
        time_budget_s: about how long the measurement may take. A slow model takes longer: at least three batches of
            one sequence are run.
        sample_sequences: measure on so many of the first sequences (one shard at most), however long it takes; bytes
            and amounts do not depend on how fast or busy the machine is in that case. By default on as many as
            `time_budget_s` allows.

    Raises:
        SiteError: a pattern matches nothing. ConfigError: sizes that do not fit together, sequences longer than the
        model's context or with nothing to keep.
    """
    given = {
        "batch_sequences": batch_sequences,
        "threads": threads,
        "n_tokens": n_tokens,
        "workers": workers,
        "sample_sequences": sample_sequences,
    }
    check_positive("plan", **{name: n for name, n in given.items() if n is not None and n != "auto"})
    if not (math.isfinite(time_budget_s) and time_budget_s > 0):
        raise ConfigError(f"plan: time_budget_s must be a number above 0, got {time_budget_s!r}")
    options = options or StoreOptions()
    free_bytes = None if out is None else Objects(out, read_only=True).free_bytes()
    blocks = as_token_blocks(blocks)
    resolved = lm.resolve(patterns, length=blocks.sequence_length)
    asked = Asked(
        sites={place.site.name: place.site.width for place in resolved},
        options=options,
        sequence_length=blocks.sequence_length,
        threads=threads or os.cpu_count() or 1,
    )
    batch = fastest_batch(lm, resolved, blocks) if batch_sequences == "auto" else batch_sequences
    began = perf_counter()
    n_sequences = blocks.n_sequences if n_tokens is None else _sequences_of(n_tokens, blocks)
    sequences_per_shard, rows_per_chunk = asked.sizes(n_sequences)
    sized = replace(options, sequences_per_shard=sequences_per_shard, rows_per_chunk=rows_per_chunk)
    spec = store_spec(lm, blocks, [place.site for place in resolved], sized)
    measured = measure(
        lm,
        blocks,
        resolved,
        spec,
        batch_sequences=batch,
        threads=asked.threads,
        time_budget_s=time_budget_s,
        sample_sequences=sample_sequences,
        setup_s=perf_counter() - began,
    )
    before, after = measured.resident_bytes
    return _make_plan(
        measured,
        asked,
        terms or Terms(),
        host_of(
            lm,
            asked,
            before=before,
            after=after,
            after_range=measured.resident_range,
            n_sequences=measured.batch_sequences,
        ),
        n_sequences=n_sequences,
        workers=workers,
        batch_sequences=batch,
        model=lm.name,
        out=None if out is None else shown(out),
        free_bytes=free_bytes,
    )


def _sequences_of(n_tokens: int, blocks: TokenBlocks) -> int:
    """Sequences for this number of tokens, if all are like the given ones."""
    there = int(blocks.lengths(range(blocks.n_sequences)).sum())
    return math.ceil(n_tokens * blocks.n_sequences / max(1, there))


def _make_plan(
    measured: Measured,
    asked: Asked,
    terms: Terms,
    host: Host,
    *,
    n_sequences: int,
    workers: int,
    batch_sequences: int,
    model: str,
    out: str | None,
    free_bytes: int | None,
) -> Plan:
    amounts = amounts_of(asked, n_sequences, measured.rows_per_sequence, measured.tokens_per_sequence)
    typical, fast, slow = (
        amounts.n_tokens * forward_s / workers
        for forward_s in (measured.forward_s_per_token, *measured.forward_s_range)
    )
    return Plan(
        model=model,
        asked=asked,
        amounts=amounts,
        workers=workers,
        batch_sequences=batch_sequences,
        out=out,
        free_bytes=free_bytes,
        forward_s=typical,
        forward_s_range=(fast, slow),
        memory=memory_of(host, asked, amounts, batch_sequences),
        presets={
            name: preset_plan(costs, measured, asked, amounts, terms, workers=workers, free_bytes=free_bytes)
            for name, costs in measured.presets.items()
        },
        terms=terms,
        measured=measured,
        host=host,
    )
