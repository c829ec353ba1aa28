"""Run the base model over token blocks and keep the activations: tokens x model -> a sealed store.

Work is done shard by shard, and a shard is a function of its own sequences only. So a run that was killed is continued
by the same call: shards that are committed stay, the others are made, and the bytes are those of an unbroken run.
The forward pass runs on this thread; encoding and disk run behind it, on as many bounded buffers as there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, StoreError, StoreMismatchError
from actcache.memory import keep_freed_memory
from actcache.spec import Dtype, Progress, Site, StoreSpec, TokenBlocks, check_positive
from actcache.store import ShardBuffers, Store, StoreWriter, open_store
from actcache.store.fit import codec_of, fitted, given, is_result_of, needs_trial
from actcache.store.sizes import default_sizes

if TYPE_CHECKING:
    from actcache.lm import LanguageModel, ResolvedSite

_ROWS_TO_TRY = 4096
"""Rows that `auto` tries codecs on."""


def store_spec(
    lm: LanguageModel,
    blocks: TokenBlocks,
    sites: Sequence[Site],
    *,
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
    widths = [site.width for site in sites]
    default_shard, default_chunk = default_sizes(
        widths, dtype, blocks.n_sequences, max(1, blocks.sequence_length - skip_first), sequences_per_shard
    )
    return StoreSpec(
        sites=tuple(sites),
        n_sequences=blocks.n_sequences,
        sequence_length=blocks.sequence_length,
        sequences_per_shard=default_shard,
        rows_per_chunk=default_chunk if rows_per_chunk is None else rows_per_chunk,
        skip_first=skip_first,
        dtype=dtype,
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
    codec: str | Mapping[str, str] = "lossless",
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
        path: folder or URL where the store is made, or continued when an earlier call was interrupted.
        codec: a preset (`raw`, `lossless`, `sparse`, `int8`), `auto` (the smallest lossless preset, tried for each site
            on the first sequences), the JSON text of a list of Zarr codecs, or any of these by pattern of site names.
        dtype: logical element type: `bfloat16`, `float16` or `float32`.
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
        something else. StoreMismatchError: `path` holds a store of another model, text or spec. StoreBusyError: another
        process is writing it. StorageFullError: no room; make some and call again.
    """
    check_positive("extract", batch_sequences=batch_sequences)
    resolved = lm.resolve(patterns, length=blocks.sequence_length)
    spec = store_spec(
        lm,
        blocks,
        [site.site for site in resolved],
        dtype=dtype,
        skip_first=skip_first,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
    )
    spec = replace(spec, sites=_with_codecs(lm, blocks, resolved, path, codec, spec))
    return _fill(lm, StoreWriter(path, spec, blocks, threads=_threads(threads)), blocks, batch_sequences, progress)


def extend(
    lm: LanguageModel,
    path: str | Path,
    more: TokenBlocks,
    *,
    batch_sequences: int = 32,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Store:
    """Append sequences to a store: afterwards it is what one extraction of all of them would have written.

    Until its last shard is made again (if that was not full), the store stays readable as it was. Called again with the
    same `more` after an interruption, it goes on; after it is done, nothing happens.

    Raises:
        StoreMismatchError: another model, or sequences of another length. The others are those of `extract`.
    """
    check_positive("extend", batch_sequences=batch_sequences)
    store = open_store(path)
    digest = more.digest()
    parts = store.spec.text.get("parts", [{**store.spec.text, "n_sequences": store.spec.n_sequences}])
    blocks, spec = store.token_blocks(), replace(store.spec, model=lm.identity)
    if more.sequence_length != spec.sequence_length:
        raise StoreMismatchError(
            f"{path} has sequences of {spec.sequence_length} tokens, the new ones have {more.sequence_length}; "
            f"make token blocks with length={spec.sequence_length}"
        )
    if len(parts) < 2 or parts[-1]["tokens"] != digest:
        blocks = blocks.join(more)
        parts = [*parts, {**more.description, "tokens": digest, "n_sequences": more.n_sequences}]
        spec = replace(spec, n_sequences=blocks.n_sequences, text={"tokens": blocks.digest(), "parts": parts})
    writer = StoreWriter(path, spec, blocks, grow=True, threads=_threads(threads))
    return _fill(lm, writer, blocks, batch_sequences, progress)


def add_sites(
    lm: LanguageModel,
    path: str | Path,
    patterns: Sequence[str],
    *,
    codec: str | Mapping[str, str] = "lossless",
    batch_sequences: int = 32,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Store:
    """Add sites to the rows that a store has; only those are computed, and until they are all there it stays as it was.

    The row table of every shard is held against the store's own, so that the new activations belong to the same tokens.

    Raises:
        StoreMismatchError: another model. The others are those of `extract`.
    """
    check_positive("add_sites", batch_sequences=batch_sequences)
    store = open_store(path)
    blocks, spec = store.token_blocks(), store.spec
    new = [site for site in lm.resolve(patterns, length=spec.sequence_length) if site.site.name not in store.sites]
    sites = _with_codecs(lm, blocks, new, path, codec, spec)
    spec = replace(spec, model=lm.identity, sites=(*spec.sites, *sites))
    writer = StoreWriter(path, spec, blocks, grow=True, threads=_threads(threads))
    return _fill(lm, writer, blocks, batch_sequences, progress, store.kept_rows)


def _threads(threads: int | None) -> int:
    return threads or os.cpu_count() or 1


def _fill(
    lm: LanguageModel,
    writer: StoreWriter,
    blocks: TokenBlocks,
    batch_sequences: int,
    progress: Progress | None,
    kept_rows: Callable[[int], NDArray[np.bool_] | None] = lambda shard: None,
) -> Store:
    """Make every pending shard: the forward pass here, encoding and disk behind it."""
    keep_freed_memory()
    with writer:
        spec, pending = writer.spec, writer.pending()
        sites = lm.resolve([site.name for site in writer.sites], length=spec.sequence_length) if pending else []
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
            kept = kept_rows(shard)
            if kept is not None:
                for rows in buffers.rows.values():
                    rows[: kept.sum()] = rows[: len(kept)][kept]
            writer.submit(buffers, ids, kept)
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


def _with_codecs(
    lm: LanguageModel,
    blocks: TokenBlocks,
    resolved: Sequence[ResolvedSite],
    path: str | Path,
    codec: str | Mapping[str, str],
    spec: StoreSpec,
) -> tuple[Site, ...]:
    """The sites with their codecs. What was found out for the store that is there is not found out again."""
    asked = {site.site.name: codec_of(site.site.name, codec) or "lossless" for site in resolved}
    known: dict[str, Site] = {}
    if any(map(needs_trial, asked.values())):
        with suppress(StoreError):
            known = {site.name: site for site in open_store(path).spec.sites}
    known = {name: site for name, site in known.items() if is_result_of(site, asked.get(name, ""))}
    to_try = [site for site in resolved if needs_trial(asked[site.site.name]) and site.site.name not in known]
    if to_try:
        known |= _tried(lm, blocks, to_try, asked, spec)
    return tuple(known.get(site.site.name) or given(site.site, asked[site.site.name]) for site in resolved)


def _tried(
    lm: LanguageModel,
    blocks: TokenBlocks,
    sites: Sequence[ResolvedSite],
    asked: Mapping[str, str],
    spec: StoreSpec,
) -> dict[str, Site]:
    """Each site with what suits the activations of the first sequences best, in chunks as they are going to be."""
    n_rows = max(_ROWS_TO_TRY, spec.rows_per_chunk)
    n_sequences = min(blocks.n_sequences, -(-n_rows // spec.rows_per_sequence))
    trial = replace(
        spec,
        sites=tuple(site.site for site in sites),
        n_sequences=n_sequences,
        sequences_per_shard=n_sequences,
        rows_per_chunk=spec.rows_per_sequence,
    )
    buffers = ShardBuffers(trial, trial.sites)
    _keep(lm, sites, np.asarray(blocks.ids[:n_sequences]), 0, buffers)
    whole = max(1, len(trial.shard_rows(0)) // spec.rows_per_chunk) * spec.rows_per_chunk
    return {
        site.name: fitted(site, asked[site.name], buffers.rows[site.name][:whole], spec.dtype, spec.rows_per_chunk)
        for site in trial.sites
    }
