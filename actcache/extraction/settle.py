"""Decisions before the first forward pass: the spec, codecs fitted to the sites, the batch size, provenance.

What decides a store's last bits but not its values (versions, threads, device, batch) stands beside the spec as
provenance: continuing in other circumstances is warned of instead of refused. A batch that was found by trying is kept
with the store, since a matrix product may round differently for another batch.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, StoreError, StoreMismatchError
from actcache.extraction.sink import Sink
from actcache.memory import is_out_of_memory
from actcache.spec import DTYPES, Site, StoreSpec, TokenBlocks, check_positive
from actcache.store import Objects, ShardBuffers, Store, open_store
from actcache.store.codecs.fit import codec_for, fit_to_first_rows, is_offered, is_result_of, needs_trial
from actcache.store.format.sizes import sizes_of
from actcache.store_options import StoreOptions

if TYPE_CHECKING:
    from actcache.lm import LanguageModel, ResolvedSite
from actcache.provenance import store_versions

BatchSequences = int | Literal["auto"]
"""Sequences in one forward pass, or `auto`: as many as make this model fast on this machine, found by trying."""
_BATCH_SEQUENCES = 32
_MOST_BATCH_TOKENS = 1 << 17
_WORTH_DOUBLING = 1.05
"""`auto` goes on doubling a batch while that makes the model so much faster."""
_TRIAL_S = 20.0


def store_spec(lm: LanguageModel, blocks: TokenBlocks, sites: Sequence[Site], options: StoreOptions) -> StoreSpec:
    """The spec of the store that `extract` would write, with default sizes filled in.

    Raises:
        ConfigError: sizes that do not fit together, sequences longer than the model takes, or ids unknown to it.
    """
    if options.dtype is None:
        raise ConfigError(f"extraction: dtype must be one of {', '.join(DTYPES)}, got None")
    lm.check_length(blocks.sequence_length)
    lm.check_ids(blocks.ids)
    sequences_per_shard, rows_per_chunk = sizes_of(
        options, [site.width for site in sites], blocks.n_sequences, blocks.sequence_length
    )
    return StoreSpec(
        sites=tuple(sites),
        n_sequences=blocks.n_sequences,
        sequence_length=blocks.sequence_length,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
        skip_first=options.skip_first,
        dtype=options.dtype,
        seed=options.seed,
        model=lm.identity,
        text={**blocks.description, "tokens": blocks.digest()},
    )


def open_if_there(path: Objects) -> Store | None:
    """The store that is continued; None where a new one is made, or where writing is going to say what is wrong."""
    with suppress(StoreError):
        return open_store(path)
    return None


def with_codecs(
    lm: LanguageModel,
    blocks: TokenBlocks,
    resolved: Sequence[ResolvedSite],
    found: Store | None,
    codec: str | Mapping[str, str],
    spec: StoreSpec,
) -> tuple[Site, ...]:
    """The sites with their codecs; what was fitted for the store that is `found` is not fitted again."""
    asked = {site.site.name: codec_for(site.site.name, codec) or "lossless" for site in resolved}
    fitted = {
        site.name: site
        for site in (found.spec.sites if found else ())
        if site.name in asked and _goes_on(asked[site.name]) and is_result_of(site, asked[site.name])
    }
    new = [site for site in resolved if site.site.name not in fitted]
    first_rows = _first_rows(lm, blocks, [site for site in new if needs_trial(asked[site.site.name])], spec)
    for site in new:
        name = site.site.name
        rows = partial(first_rows, name)
        fitted[name] = fit_to_first_rows(site.site, asked[name], rows, spec.dtype, spec.rows_per_chunk)
    # Only the model says what a name means, even if the codec comes from the store.
    return tuple(replace(fitted[site.site.name], meaning=site.site.meaning) for site in resolved)


def _goes_on(codec: str) -> bool:
    """Whether the codec of a store that is there goes on: it was fitted, or is a preset of earlier versions."""
    return needs_trial(codec) or not is_offered(codec)


def _first_rows(
    lm: LanguageModel, blocks: TokenBlocks, sites: Sequence[ResolvedSite], spec: StoreSpec
) -> Callable[[str, int], NDArray[Any]]:
    """Gives the first rows of a site; the model runs once, for all of these sites, when the first are asked for."""
    kept: dict[str, NDArray[Any]] = {}

    def first_rows(name: str, n_rows: int) -> NDArray[Any]:
        if not kept:
            kept.update(_run_on_first(lm, blocks, sites, spec, n_rows))
        return kept[name]

    return first_rows


def _run_on_first(
    lm: LanguageModel, blocks: TokenBlocks, sites: Sequence[ResolvedSite], spec: StoreSpec, n_rows: int
) -> dict[str, NDArray[Any]]:
    """At least `n_rows` rows of each site, of the first sequences, in whole chunks; fewer if the text ends before."""
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
    return {name: rows[: min(whole, sink.n_rows)] for name, rows in buffers.rows.items()}


def meanings_of(
    path: Objects | str, found: Sequence[Site], asked: Sequence[Site], *, warn: bool = True
) -> tuple[Site, ...]:
    """The sites that are asked for, without the meanings that the continued store does not record.

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


def provenance(lm: LanguageModel | None, batch_sequences: int) -> dict[str, Any]:
    """What else a store's last bits depend on: versions, batch, and the model's device and threads if it runs here."""
    import torch

    common = {"versions": {"python": platform.python_version(), **store_versions()}, "batch_sequences": batch_sequences}
    if lm is None:
        return common
    device = lm.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {**common, "device": f"{device.type}, {name}", "threads": torch.get_num_threads()}


def batch_size(asked: BatchSequences | None, found: Store | None, fastest: Callable[[], int]) -> int:
    """The batch that is asked for; where that is `auto` or nothing, that of the store that is there, or a new one.

    A matrix product may round differently for another batch, so a store is continued with its own batch size.
    """
    if asked is not None and asked != "auto":
        check_positive("extraction", batch_sequences=asked)
        return asked
    known = found.root.provenance.get("batch_sequences") if found else None
    if type(known) is int and known > 0:
        return known
    return fastest() if asked == "auto" else _BATCH_SEQUENCES


def fastest_batch(lm: LanguageModel, sites: Sequence[ResolvedSite], blocks: TokenBlocks) -> int:
    """Sequences in a batch: doubled from one sequence on, while that is worth it and there is memory for it."""
    ids, began = np.asarray(blocks.ids[:1]), perf_counter()
    most = max(1, min(blocks.n_sequences, _MOST_BATCH_TOKENS // blocks.sequence_length))
    batch, best, fastest = 1, 1, 0.0
    lm.capture(ids, sites)  # warm-up: the first pass is not representative
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
                value[-1, -1, -1].item()  # waits for a device that works asynchronously
            seconds.append(perf_counter() - began)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return 0.0
    return len(ids) / min(seconds)


def warn_of_other_circumstances(path: Objects, mine: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Warn if circumstances differ from those in which the store was begun: last bits of new shards may differ."""
    both = [key for key in found if key in mine]
    differences = [f"{key}: {found[key]!r}, now {mine[key]!r}" for key in both if found[key] != mine[key]]
    if differences:
        warnings.warn(
            f"{path} was begun in other circumstances ({'; '.join(differences)}), so what is added now may differ in "
            "its last bits from what an unbroken run would have given",
            stacklevel=3,
        )


def warn_of_the_slow_path(lm: LanguageModel, sites: Sequence[ResolvedSite]) -> None:
    """Warn of sites that only the instrumented model has, because it has to run beside the plain one for them."""
    slow = [site.site.name for site in sites if site.instrumented]
    if slow and lm.kind != "transformer_lens":
        named = ", ".join(slow[:3]) + ", ..." * (len(slow) > 3)
        warnings.warn(
            f"{named} can only be read in the model as transformer-lens runs it, which is several times slower; in a "
            "store of their own they would not slow down the other sites",
            stacklevel=4,
        )
