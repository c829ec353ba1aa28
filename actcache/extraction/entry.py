"""The verbs: make a store, extend it, add sites; each settles the details first and runs the model afterwards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.auditing import check_before_sealing
from actcache.errors import ConfigError, SiteError, StoreMismatchError
from actcache.extraction.run import run, tokens_in, tokens_of
from actcache.extraction.settle import (
    BatchSequences,
    batch_size,
    check_meanings,
    fastest_batch,
    meanings_of,
    open_if_there,
    provenance,
    store_spec,
    warn_of_other_circumstances,
    warn_of_the_slow_path,
    with_codecs,
)
from actcache.extraction.sink import pinned_for
from actcache.source import as_token_blocks
from actcache.spec import Dtype, Progress, StoreSpec, TokenBlocks
from actcache.status import Watch
from actcache.store import Check, Objects, Store, StoreWriter, open_store, to_write
from actcache.store_options import StoreOptions

if TYPE_CHECKING:
    from actcache.lm import LanguageModel, ResolvedSite


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
    batch_sequences: BatchSequences | None = None,
    threads: int | None = None,
    part: tuple[int, int] | None = None,
    audit: bool = True,
    durable: bool = True,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Store:
    """Write the activations at all sites that match the patterns, and return the sealed store.

    Args:
        lm: the base model.
        blocks: `(Q, T)` tokens, already in the order in which they are to be stored; ids as an array, tensor or list of
            equally long lists are taken too.
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
        batch_sequences: sequences in one forward pass; `auto` finds out how many make this model fast here. By default
            that of the store that is continued, or 32. Halved when memory does not suffice.
        threads: encoding threads; by default one per core.
        part: `(i, n)`, to make only part i of n (from 1 on) of the shards, while other processes, here or on other
            machines, make the others with the same call. The last process to finish seals the store; the others
            return one that is not sealed.
        audit: end with a small audit of what was made (see `actcache.audit`): one sequence of 300, at least four
            and at most 32. If it fails, nothing is deleted and the store is not sealed; without it the store is sealed.
        durable: flush what is written (`fsync`), so that a power cut loses no committed shard; False is for scratch.
        progress: called with (sequences done, sequences in all) after each forward pass.
        watch: called with a `Status` after each forward pass: speeds, queue, statistics.

    Raises:
        AuditError: what is stored is not what the model computes for its tokens; the message says where and why.
        SiteError: a pattern matches nothing. ConfigError: sizes do not fit together. NotAStoreError: `path` holds
        something else. StoreMismatchError: `path` holds a store of another model, text or spec. StoreBusyError: another
        process is writing it. StorageFullError: no room; make some and call again.

    Warns:
        UserWarning: once for a site that has NaN or infinite values, or whose rows are all the same; when a store is
        continued in other circumstances (versions, device, threads, batch), which may show in the last bits; and when a
        site makes the instrumented model run as well, which is slow.

    Examples:
        >>> store = ac.extract(lm, blocks, ["blocks.2.*resid_post", "blocks.3.*resid_post"], "resid.zarr")
        >>> store.sites, store.n_rows == 64 * (64 - 1)  # the first position of a sequence gets no row
        (['blocks.2.hook_resid_post', 'blocks.3.hook_resid_post'], True)
    """
    options = StoreOptions(
        codec=codec,
        dtype=dtype,
        skip_first=skip_first,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
    )
    if part is not None:
        _check_part(part)
    place, blocks = to_write(path, durable=durable), as_token_blocks(blocks)
    writer, batch = _begin(lm, blocks, patterns, place, options, batch_sequences, threads, shared=part is not None)
    return run(
        lm,
        writer,
        tokens_of(blocks, writer),
        batch,
        shards=None if part is None else range(part[0] - 1, writer.spec.n_shards, part[1]),
        check=_check(audit, lm, "extract"),
        progress=progress,
        watch=watch,
    )


def begin(
    lm: LanguageModel,
    blocks: TokenBlocks,
    patterns: Sequence[str],
    path: str | Path,
    options: StoreOptions,
    *,
    batch_sequences: BatchSequences | None = None,
    durable: bool = True,
) -> Store:
    """Create the store that `extract` would write, with its tokens and without a shard, for `fill` to go on with.

    Arguments and errors are those of `extract`. A store that is there already is returned as it is.
    """
    place, blocks = to_write(path, durable=durable), as_token_blocks(blocks)
    writer, _ = _begin(lm, blocks, patterns, place, options, batch_sequences, 1, shared=True, elsewhere=True)
    with writer:
        return writer.finish()


def fill(
    lm: LanguageModel,
    path: str | Path,
    shards: Sequence[int],
    *,
    batch_sequences: int | None = None,
    threads: int | None = None,
    audit: bool = True,
    durable: bool = True,
    watch: Watch | None = None,
) -> Store:
    """Make some shards of an existing store, from the tokens that lie in it, as one of several processes.

    Shards that exist, or that another process is making, are skipped. The process that makes the last one seals the
    store; otherwise the store returned is not sealed.

    Raises:
        StoreMismatchError: the store is of another model, or a name means something else. The others are those of
        `extract`.
    """
    place = to_write(path, durable=durable)
    store = open_store(place)
    _resolve(lm, store)
    batch = batch_size(batch_sequences, store, lambda: 0)
    spec = replace(store.spec, model=lm.identity_for(store.spec.model))
    writer = _writer(lm, place, spec, None, batch, threads, shared=True)
    check = _check(audit, lm, "extract")
    return run(lm, writer, tokens_in(store), batch, shards=list(shards), check=check, watch=watch)


def extend(
    lm: LanguageModel,
    path: str | Path,
    more: TokenBlocks,
    *,
    batch_sequences: BatchSequences | None = None,
    threads: int | None = None,
    audit: bool = True,
    durable: bool = True,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Store:
    """Append sequences to a store: afterwards it is what one extraction of all of them would have written.

    Until its last shard is made again (if that was not full), the store stays readable as it was. Called again with the
    same `more` after an interruption, it goes on; after it is done, nothing happens. It ends with a small audit of the
    new sequences, as `extract` does.

    Raises:
        StoreMismatchError: another model, or sequences of another length. The others are those of `extract`.

    Examples:
        >>> grown = ac.export(store, "grown.zarr")
        >>> others = ac.token_blocks(ac.read_texts("stories-corpus"), lm.tokenizer, length=64, count=16, seed=1)
        >>> ac.extend(lm, "grown.zarr", others).n_rows - store.n_rows == 16 * 63
        True
    """
    place = to_write(path, durable=durable)
    store, more = open_store(place), as_token_blocks(more)
    spec = replace(store.spec, model=lm.identity_for(store.spec.model))
    if more.sequence_length != spec.sequence_length:
        raise StoreMismatchError(
            f"{place} has sequences of {spec.sequence_length} tokens, the new ones have {more.sequence_length}; "
            f"make token blocks with length={spec.sequence_length}"
        )
    lm.check_ids(more.ids)
    blocks, text = _append(store, more)
    spec = replace(spec, n_sequences=blocks.n_sequences, text=text)
    resolved = _resolve(lm, store)
    batch = batch_size(batch_sequences, store, lambda: fastest_batch(lm, resolved, blocks))
    writer = _writer(lm, place, spec, blocks, batch, threads, grow=True)
    new = range(spec.n_sequences - more.n_sequences, spec.n_sequences)
    check = _check(audit, lm, "extend", sequences=new)
    return run(lm, writer, tokens_of(blocks, writer), batch, check=check, progress=progress, watch=watch)


def _append(store: Store, more: TokenBlocks) -> tuple[TokenBlocks, Mapping[str, Any]]:
    """The store's sequences followed by these, unless they are its last part already; and the spec's `text`."""
    blocks, text, digest = store.token_blocks(), store.spec.text, more.digest()
    parts = text.get("parts", [{**text, "n_sequences": store.spec.n_sequences}])
    if len(parts) > 1 and parts[-1]["tokens"] == digest:
        return blocks, text
    blocks = blocks.join(more)
    parts = [*parts, {**more.description, "tokens": digest, "n_sequences": more.n_sequences}]
    return blocks, {"tokens": blocks.digest(), "parts": parts}


def add_sites(
    lm: LanguageModel,
    path: str | Path,
    patterns: Sequence[str],
    *,
    codec: str | Mapping[str, str] = "lossless",
    batch_sequences: BatchSequences | None = None,
    threads: int | None = None,
    audit: bool = True,
    durable: bool = True,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Store:
    """Add sites to the rows that a store has; only those are computed, and until they are all there it stays as it was.

    The row table of every shard is compared with the store's, so that the new activations belong to the same tokens.
    It ends with a small audit of the new sites, as `extract` does.

    Raises:
        StoreMismatchError: another model. The others are those of `extract`.

    Examples:
        >>> ac.export(store, "more-sites.zarr").sites
        ['blocks.3.mlp.hook_in', 'blocks.3.hook_mlp_out']
        >>> larger = ac.add_sites(lm, "more-sites.zarr", ["blocks.3.hook_resid_post"])
        >>> len(larger.sites), larger.n_rows == store.n_rows
        (3, True)
    """
    place = to_write(path, durable=durable)
    store = open_store(place)
    blocks, spec = store.token_blocks(), store.spec
    new = [site for site in lm.resolve(patterns, length=spec.sequence_length) if site.site.name not in store.sites]
    check_meanings(place, spec.sites, [site.site for site in _known(lm, store)])
    warn_of_the_slow_path(lm, new)
    sites = with_codecs(lm, blocks, new, store, codec, spec)
    spec = replace(spec, model=lm.identity_for(spec.model), sites=(*spec.sites, *sites))
    batch = batch_size(batch_sequences, store, lambda: fastest_batch(lm, new, blocks))
    writer = _writer(lm, place, spec, blocks, batch, threads, grow=True)
    return run(
        lm,
        writer,
        tokens_of(blocks, writer),
        batch,
        kept_rows=store.kept_rows,
        check=_check(audit, lm, "add_sites", sites=[site.name for site in sites]),
        progress=progress,
        watch=watch,
    )


def _check(
    audit: bool, lm: LanguageModel, of: str, sites: Sequence[str] = (), sequences: range | None = None
) -> Check | None:
    return check_before_sealing(lm, of, sites, sequences) if audit else None


def _begin(
    lm: LanguageModel,
    blocks: TokenBlocks,
    patterns: Sequence[str],
    place: Objects,
    options: StoreOptions,
    batch_sequences: BatchSequences | None,
    threads: int | None,
    *,
    shared: bool,
    elsewhere: bool = False,
) -> tuple[StoreWriter, int]:
    """The writer of the store that is asked for, and the batch to fill it with."""
    resolved = lm.resolve(patterns, length=blocks.sequence_length)
    warn_of_the_slow_path(lm, resolved)
    spec = store_spec(lm, blocks, [site.site for site in resolved], options)
    found = open_if_there(place)
    batch = batch_size(batch_sequences, found, lambda: fastest_batch(lm, resolved, blocks))

    def open_writer(found: Store | None) -> StoreWriter:
        ours = replace(spec, sites=with_codecs(lm, blocks, resolved, found, options.codec, spec))
        if found:
            sites = meanings_of(place, found.spec.sites, ours.sites, warn=not found.sealed)
            ours = replace(ours, sites=sites, model=lm.identity_for(found.spec.model))
        return _writer(lm, place, ours, blocks, batch, threads, shared=shared, elsewhere=elsewhere)

    try:
        return open_writer(found), batch
    except StoreMismatchError:
        if not shared:
            raise
        # Another process may have begun the store in the meantime, with codecs that it has fitted itself.
        return open_writer(open_if_there(place)), batch


def _resolve(lm: LanguageModel, store: Store) -> list[ResolvedSite]:
    """A store's sites in the model, once it is clear that their names mean what they meant when it was begun."""
    resolved = lm.resolve(store.sites, length=store.spec.sequence_length)
    check_meanings(store.path, store.spec.sites, [site.site for site in resolved])
    return resolved


def _known(lm: LanguageModel, store: Store) -> list[ResolvedSite]:
    """The sites of a store that the model still has."""
    found: list[ResolvedSite] = []
    for name in store.sites:
        with suppress(SiteError):
            found += lm.resolve([name], length=store.spec.sequence_length)
    return found


def _writer(
    lm: LanguageModel,
    place: Objects,
    spec: StoreSpec,
    blocks: TokenBlocks | None,
    batch_sequences: int,
    threads: int | None,
    *,
    grow: bool = False,
    shared: bool = False,
    elsewhere: bool = False,
) -> StoreWriter:
    mine = provenance(None if elsewhere else lm, batch_sequences)
    writer = StoreWriter(
        place,
        spec,
        blocks,
        grow=grow,
        shared=shared,
        threads=threads or os.cpu_count() or 1,
        allocate=pinned_for(lm.device),
        provenance=mine,
    )
    if writer.pending():
        warn_of_other_circumstances(place, mine, writer.provenance)
    return writer


def _check_part(part: tuple[int, int]) -> None:
    i, n = part
    if type(i) is not int or type(n) is not int or not 1 <= i <= n:
        raise ConfigError(f"part must be (i, n), part i of n with i from 1 to n, not {part!r}")
