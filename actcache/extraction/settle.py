"""What is settled before the first forward pass: the spec, codecs fitted to the sites, the batch size, provenance."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from actcache.errors import StoreError, StoreMismatchError
from actcache.extraction.sink import Sink
from actcache.memory import is_out_of_memory
from actcache.spec import Dtype, Site, StoreSpec, TokenBlocks, check_positive
from actcache.store import Objects, ShardBuffers, open_store
from actcache.store.codecs.fit import codec_of, fitted, given, is_result_of, needs_trial
from actcache.store.format.sizes import default_sizes

if TYPE_CHECKING:
    from actcache.lm import LanguageModel, ResolvedSite
from actcache.provenance import store_versions

BatchSequences = int | Literal["auto"]
"""Sequences in one forward pass, or `auto`: as many as make this model fast on this machine, found by trying."""


_ROWS_TO_TRY = 4096
"""Rows that `auto` tries codecs on."""


_BATCH_SEQUENCES = 32


_MOST_BATCH_TOKENS = 1 << 17


_WORTH_DOUBLING = 1.05
"""`auto` goes on doubling a batch while that makes the model so much faster."""


_TRIAL_S = 20.0


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
        ConfigError: sizes that do not fit together, sequences longer than the model takes, or ids unknown to it.
    """
    lm.check_length(blocks.sequence_length)
    lm.check_ids(blocks.ids)
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


def with_codecs(
    lm: LanguageModel,
    blocks: TokenBlocks,
    resolved: Sequence[ResolvedSite],
    path: Objects,
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
    found = (known.get(site.site.name) or given(site.site, asked[site.site.name]) for site in resolved)
    # What a name means is the model's to say, whatever the store says that the codec is known from.
    return tuple(replace(site, meaning=own.site.meaning) for site, own in zip(found, resolved, strict=True))


def meanings_of(
    path: Objects | str, found: Sequence[Site], asked: Sequence[Site], *, warn: bool = True
) -> tuple[Site, ...]:
    """The sites that are asked for, without a meaning where the store that is continued has none.

    Warns:
        UserWarning: the store does not say what its names meant.
    """
    silent = {site.name for site in found if site.meaning is None} & {site.name for site in asked if site.meaning}
    if silent and warn:
        warnings.warn(
            f"{path} does not say what {', '.join(sorted(silent))} meant when it was begun (an early version of "
            "actcache made it), so nothing shows whether what is added now is the same",
            stacklevel=4,
        )
    return tuple(replace(site, meaning=None) if site.name in silent else site for site in asked)


def check_meanings(path: Objects | str, found: Sequence[Site], asked: Sequence[Site]) -> None:
    """Raise `StoreMismatchError` if a name meant something else when the store was begun; warns as `meanings_of`."""
    known = {site.name: site.meaning for site in found}
    others = [
        f"sites.{site.name}.meaning: the store has {str(known[site.name])!r}, asked for {str(site.meaning)!r}"
        for site in meanings_of(path, found, asked)
        if known.get(site.name, site.meaning) != site.meaning
    ]
    if others:
        raise StoreMismatchError(
            f"the store at {path} was begun when names of its sites meant something else in this model, so it is left "
            "as it is:\n  "
            + "\n  ".join(others)
            + "\ngo on with the version of transformer-lens that it was begun with, or name another place"
        )


def _tried(
    lm: LanguageModel,
    blocks: TokenBlocks,
    sites: Sequence[ResolvedSite],
    asked: Mapping[str, str],
    spec: StoreSpec,
) -> dict[str, Site]:
    """Each site with what suits the activations of the first sequences best, in chunks as they are going to be."""
    n_rows = max(_ROWS_TO_TRY, spec.rows_per_chunk)
    lengths = blocks.lengths(range(min(blocks.n_sequences, n_rows)))
    enough = np.searchsorted(np.cumsum(np.maximum(lengths - spec.skip_first, 0)), n_rows)
    n_sequences = min(len(lengths), int(enough) + 1)
    trial = replace(
        spec,
        sites=tuple(site.site for site in sites),
        n_sequences=n_sequences,
        sequences_per_shard=n_sequences,
        rows_per_chunk=spec.rows_per_sequence,
    )
    buffers = ShardBuffers(trial, trial.sites)
    sink = Sink(buffers, lengths[:n_sequences], None)
    sink.fill(lm, sites, np.asarray(blocks.ids[:n_sequences]), _BATCH_SEQUENCES)
    whole = max(1, sink.n_rows // spec.rows_per_chunk) * spec.rows_per_chunk
    rows = {site.name: buffers.rows[site.name][: min(whole, sink.n_rows)] for site in trial.sites}
    return {
        site.name: fitted(site, asked[site.name], rows[site.name], spec.dtype, spec.rows_per_chunk)
        for site in trial.sites
    }


def provenance(lm: LanguageModel | None, batch_sequences: int) -> dict[str, Any]:
    """What else a store's last bits depend on: versions, batch, and device and threads of the model if it runs here."""
    import torch

    common = {"versions": {"python": platform.python_version(), **store_versions()}, "batch_sequences": batch_sequences}
    if lm is None:
        return common
    device = lm.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {**common, "device": f"{device.type}, {name}", "threads": torch.get_num_threads()}


def batch_size(asked: BatchSequences | None, path: Objects, find: Callable[[], int]) -> int:
    """The batch that is asked for; where that is `auto` or nothing, that of the store that is there, or a new one.

    A matrix product may round differently for another batch, so who continues a store had better keep to its batch.
    """
    if asked is not None and asked != "auto":
        check_positive("extraction", batch_sequences=asked)
        return asked
    with suppress(StoreError):
        known = open_store(path).root.provenance.get("batch_sequences")
        if type(known) is int and known > 0:
            return known
    return find() if asked == "auto" else _BATCH_SEQUENCES


def fastest_batch(lm: LanguageModel, sites: Sequence[ResolvedSite], blocks: TokenBlocks) -> int:
    """Sequences in a batch: doubled from one sequence on, while that is worth it and there is memory for it."""
    ids, began = np.asarray(blocks.ids[:1]), perf_counter()
    most = max(1, min(blocks.n_sequences, _MOST_BATCH_TOKENS // blocks.sequence_length))
    batch, best, fastest = 1, 1, 0.0
    lm.capture(ids, sites)  # the first forward pass of a process is none to measure
    while batch <= most and perf_counter() - began < _TRIAL_S:
        speed = _sequences_per_s(lm, sites, np.asarray(blocks.ids[:batch]))
        if speed < fastest * _WORTH_DOUBLING:
            break
        best, fastest, batch = batch, speed, 2 * batch
    return best


def _sequences_per_s(lm: LanguageModel, sites: Sequence[ResolvedSite], ids: np.ndarray) -> float:
    """Sequences a second in batches like this one, the better of two; 0 when there is no memory for it."""
    seconds = []
    try:
        for _ in range(2):
            began = perf_counter()
            values = lm.capture(ids, sites)
            for value in values.values():
                value[-1, -1, -1].item()  # a device that works on its own has to be waited for
            seconds.append(perf_counter() - began)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return 0.0
    return len(ids) / min(seconds)


def warn_of_other_circumstances(path: Objects, mine: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Say what is not as it was when the store was begun: shards made now may differ in their last bits."""
    both = [key for key in found if key in mine]
    differences = [f"{key}: {found[key]!r}, now {mine[key]!r}" for key in both if found[key] != mine[key]]
    if differences:
        warnings.warn(
            f"{path} was begun in other circumstances ({'; '.join(differences)}), so what is added now may differ in "
            "its last bits from what an unbroken run would have given",
            stacklevel=3,
        )


def warn_of_the_slow_path(lm: LanguageModel, sites: Sequence[ResolvedSite]) -> None:
    """Say which sites only the instrumented model has; with one of them it runs beside the plain one."""
    slow = [site.site.name for site in sites if site.instrumented]
    if slow and lm.kind != "transformer_lens":
        named = ", ".join(slow[:3]) + ", ..." * (len(slow) > 3)
        warnings.warn(
            f"{named} can only be read in the model as transformer-lens runs it, which is several times slower; in a "
            "store of their own they would not slow down the other sites",
            stacklevel=4,
        )
