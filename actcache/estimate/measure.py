"""Measurements on a sample: a few batches through the model, then encoded, stored and read with every preset.

In: a model, tokens, the spec of the store that is planned. Out: `Measured`, costs by the row, shard and token. What is
written lies in a temporary folder that is deleted afterwards.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from actcache.estimate.joint import contention
from actcache.estimate.sample import FEWEST_BATCHES, Sample, sequences_wanted, warm_up
from actcache.memory import Scratch, keep_freed_memory
from actcache.order import permutation
from actcache.spec import Site, StoreSpec, TokenBlocks
from actcache.store import Objects, Store, StoreWriter
from actcache.store.codecs.fit import AUTO, fit_to_first_rows
from actcache.store.codecs.presets import offered
from actcache.store.format.keys import stats_key, token_sequences_per_chunk
from actcache.store.format.site_arrays import arrays_of, index_bytes
from actcache.store.format.table_objects import UINT32, encode_table
from actcache.store.writing.encode import ShardEncoder

if TYPE_CHECKING:
    from actcache.lm import LanguageModel, ResolvedSite

_TABLE_ROWS = 1 << 20
"""Rows of a shard's row table that are encoded to see how large it is."""
_JOINT_CODEC = "lossless"
"""The preset that is encoded beside the model, to see how much they slow each other down."""
_BATCHES_ENCODED = 10
"""Most batches that are encoded one by one, to see how much their sizes differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteCosts:
    """What a row of a site costs with a codec."""

    codec: str
    """The preset; for `auto`, the one that it chose."""
    bytes_per_row: float
    """Stored bytes of a row in a chunk, checksum included."""
    bytes_per_row_range: tuple[float, float]
    """The same for the batches with the smallest and largest rows; of more than ten, without a tenth at each end."""
    bytes_per_shard: int
    """Further bytes in every shard: the indexes of its chunks and its line of statistics."""
    pads_chunks: bool
    """Whether a partly filled chunk takes as many bytes as a full one; compressed padding takes almost none."""
    encode_s_per_row: float
    """Seconds to shuffle, measure, compress and write a row, on one thread of an idle machine."""
    encode_s_range: tuple[float, float]
    """The same in the fastest and in the slowest of the measurements."""
    read_s_per_row: float
    """Seconds to read, check and decode a row, on as many threads as there are cores, from the page cache."""
    read_s_range: tuple[float, float]
    """The same in the fastest and in the slowest of the measurements."""
    n_arrays: int
    """Sharded objects in a shard: one, and those that a quantiser keeps beside it, such as scales."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PresetCosts:
    """What a preset costs at all sites."""

    sites: Mapping[str, SiteCosts]
    n_metadata: int
    """`zarr.json` objects of the store."""
    metadata_bytes: int
    """Bytes of those objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measurements of the sample; seconds are those of this machine."""

    n_tokens: int
    """Tokens that were run through the model and timed."""
    n_rows: int
    """Rows that were encoded and read."""
    rows_per_sequence: float
    """Rows that a sequence gives, on average."""
    tokens_per_sequence: float
    """Tokens of a sequence, on average."""
    batch_sequences: int
    """Sequences in a batch; fewer than asked for if that would have taken too long."""
    forward_s_per_token: float
    """Seconds for the model and the copy into a shard's buffers: the median batch."""
    forward_s_range: tuple[float, float]
    """The same for the fastest and the slowest batch; of more than ten, without a tenth at each end."""
    contention: float
    """Seconds by which one second of encoding (on one thread) delays the model beside it, kappa. It is 1 / cores where
    the model fills all cores, and nearly 0 where the model runs on a device of its own."""
    resident_bytes: tuple[int, int]
    """Memory of this process before and after it ran whole batches, buffers not counted."""
    resident_range: tuple[int, int]
    """Memory after the batches that left the least and the most."""
    setup_s: float
    """Seconds before the first batch: digests of weights and tokens."""
    row_table_bytes_per_row: float
    """Sequence, position and token of a row, compressed."""
    token_bytes: float
    """Id and document of a token, compressed."""
    presets: Mapping[str, PresetCosts]
    """Costs by preset."""


def measure(
    lm: LanguageModel,
    blocks: TokenBlocks,
    sites: Sequence[ResolvedSite],
    spec: StoreSpec,
    *,
    batch_sequences: int,
    threads: int,
    time_budget_s: float,
    sample_sequences: int | None,
    setup_s: float,
) -> Measured:
    """Run the sample: `sample_sequences`, however long they take, or else as many as fit into `time_budget_s`.

    The latter takes longer only if three batches of one sequence do. Apart from times, the measurements of the former
    depend on the text and the model alone.
    """
    keep_freed_memory()
    began = perf_counter()
    limit_s = time_budget_s / 10 if sample_sequences is None else math.inf
    warm = warm_up(lm, blocks, sites, spec, batch_sequences, limit_s)
    batch, batch_s = warm.batch_sequences, warm.batch_s
    if sample_sequences is None:
        most = batch * max(FEWEST_BATCHES, int(0.3 * time_budget_s / batch_s))
        sample = Sample(lm, blocks, sites, spec, min(most, sequences_wanted(spec, batch)), batch)
        sample.run_for(0.1 * time_budget_s)
    else:
        sample = Sample(lm, blocks, sites, spec, sample_sequences, batch)
        sample.run_for(0.0)
    chosen = _fit_sites(sample)
    with tempfile.TemporaryDirectory(prefix="actcache-plan-") as folder:
        costs = {name: _costs(sample, chosen[name], Path(folder) / name) for name in _preset_names()}
        left_s = 0.0
        if sample_sequences is None:
            left_s = max(2 * batch_s, min(0.2 * time_budget_s, time_budget_s - (perf_counter() - began)))
        encode_s = {name: site.encode_s_per_row for name, site in costs[_JOINT_CODEC].sites.items()}
        kappa = contention(sample, chosen[_JOINT_CODEC], encode_s, Path(folder), threads, left_s, FEWEST_BATCHES)
    lengths = blocks.lengths(range(blocks.n_sequences))
    return Measured(
        n_tokens=sample.n_tokens_timed,
        n_rows=sample.n_rows,
        rows_per_sequence=float(np.maximum(lengths - spec.skip_first, 0).mean()),
        tokens_per_sequence=float(lengths.mean()),
        batch_sequences=batch,
        forward_s_per_token=float(np.median(sample.seconds_per_token)),
        forward_s_range=_range(sample.seconds_per_token),
        contention=kappa,
        resident_bytes=(warm.resident_before, warm.resident_after[0]),
        resident_range=(min(warm.resident_after), max(warm.resident_after)),
        setup_s=setup_s,
        row_table_bytes_per_row=_row_table_bytes(spec, blocks),
        token_bytes=_token_bytes(spec, blocks),
        presets={**costs, AUTO: _auto(costs, chosen[AUTO])},
    )


def _preset_names() -> list[str]:
    return [preset.name for preset in offered()]


def _fit_sites(sample: Sample) -> dict[str, tuple[Site, ...]]:
    """The sites with every preset, and with `auto`; fitted to as many rows as an extraction would fit them to."""
    spec = sample.spec

    def with_codec(asked: str, site: Site) -> Site:
        rows = sample.rows(site.name)
        return fit_to_first_rows(site, asked, lambda n_rows: rows[:n_rows], spec.dtype, spec.rows_per_chunk)

    return {asked: tuple(with_codec(asked, site) for site in spec.sites) for asked in (*_preset_names(), AUTO)}


def _costs(sample: Sample, sites: tuple[Site, ...], folder: Path) -> PresetCosts:
    """Store the sample, time the encoding of each site on one thread and its reading on all."""
    spec = replace(sample.spec, sites=sites)
    store = _store_sample(sample, spec, folder.with_suffix(".zarr"))
    encoder, order = ShardEncoder(Objects(folder, read_only=False), spec), sample.order
    found = {}
    for site in sites:
        arrays = arrays_of(spec, site)
        per_shard = len(arrays) * index_bytes(spec) + store.objects.size(stats_key(site.name, 0))
        pads = all(array.chain.is_raw for array in arrays)
        n_rows = -(-sample.n_rows // spec.rows_per_chunk) * spec.rows_per_chunk if pads else sample.n_rows
        bytes_per_row = (store.info()["sites"][site.name]["bytes"] - per_shard) / n_rows
        encode_s = _seconds(partial(encoder.write, site, 0, sample.rows(site.name), order), sample.n_rows)
        read_s = _seconds(partial(_read, store, site), sample.n_rows)
        found[site.name] = SiteCosts(
            codec=site.codec,
            bytes_per_row=bytes_per_row,
            bytes_per_row_range=_bytes_range(sample, encoder, site, bytes_per_row),
            bytes_per_shard=per_shard,
            pads_chunks=pads,
            encode_s_per_row=min(encode_s),
            encode_s_range=(min(encode_s), max(encode_s)),
            read_s_per_row=min(read_s),
            read_s_range=(min(read_s), max(read_s)),
            n_arrays=len(arrays),
        )
    metadata = [key for key in store.objects.list("") if key.endswith("zarr.json")]
    return PresetCosts(
        sites=found, n_metadata=len(metadata), metadata_bytes=sum(store.objects.size(key) for key in metadata)
    )


def _bytes_range(sample: Sample, encoder: ShardEncoder, site: Site, bytes_per_row: float) -> tuple[float, float]:
    """How small and how large the rows of single batches are, relative to those of the whole sample.

    A chunk of each batch is encoded. It may be partly filled, which makes its rows larger, in all batches alike.
    """
    batches = list(sample.batches_of_rows(_BATCHES_ENCODED))
    fewest = min(map(len, batches))
    besides = len(arrays_of(sample.spec, site)) * index_bytes(sample.spec)
    sizes = np.empty(len(batches))
    for i, rows in enumerate(batches):
        record, _ = encoder.write(site, 0, sample.rows(site.name), rows[:fewest])
        sizes[i] = record.n_bytes - besides - encoder.objects.size(stats_key(site.name, 0))
    low, high = _range((sizes / sizes.mean() * bytes_per_row).tolist())
    return min(low, bytes_per_row), max(high, bytes_per_row)


def _store_sample(sample: Sample, spec: StoreSpec, path: Path) -> Store:
    """The sample as a store."""
    spec = replace(spec, text={"tokens": sample.blocks.digest()})
    with StoreWriter(path, spec, sample.blocks, threads=_cores()) as writer:
        buffers = writer.acquire(0)
        for site in spec.sites:
            buffers.rows[site.name][: sample.n_rows] = sample.rows(site.name)
        writer.submit(buffers, sample.ids, sample.sink.kept)
        return writer.finish()


def _read(store: Store, site: Site) -> None:
    """Read every chunk of a site, checked and decoded as in a loader."""
    spec, arrays = store.spec, arrays_of(store.spec, site)
    n_chunks, n_threads = -(-store.n_rows // spec.rows_per_chunk), _cores()

    def read_some(thread: int) -> None:
        scratch = Scratch()
        parts = [np.empty((spec.rows_per_chunk, *array.row_shape), array.dtype) for array in arrays]
        for chunk in range(thread, n_chunks, n_threads):
            for array, part in zip(arrays, parts, strict=True):
                store.read_chunk(site.name, 0, chunk, part, scratch, array=array.name)

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(read_some, range(n_threads)))


def _auto(costs: Mapping[str, PresetCosts], chosen: tuple[Site, ...]) -> PresetCosts:
    """Costs of `auto`: at each site, those of the preset that it chose there."""
    found = {site.name: costs[site.codec].sites[site.name] for site in chosen}
    return replace(costs[_JOINT_CODEC], sites=found)


def _row_table_bytes(spec: StoreSpec, blocks: TokenBlocks) -> float:
    """Compressed bytes of a row's sequence, position and token, in a table as a shard has it."""
    sequences = np.arange(spec.sequences_per_shard) % blocks.n_sequences
    n_rows = min(spec.rows_per_shard, _TABLE_ROWS)
    order = permutation(spec.rows_per_shard, spec.seed, 0)[:n_rows]
    sequence, position = np.divmod(order, spec.rows_per_sequence)
    position += spec.skip_first
    token = np.asarray(blocks.ids[: len(np.unique(sequences))])[sequences[sequence], position]
    columns = [np.ascontiguousarray(values, UINT32) for values in (sequence, position, token)]
    return sum(len(encode_table(values)[1]) for values in columns) / n_rows


def _token_bytes(spec: StoreSpec, blocks: TokenBlocks) -> float:
    """Compressed bytes of a token's id and document, in a chunk as the store has it."""
    n_sequences = min(blocks.n_sequences, token_sequences_per_chunk(spec))
    parts = [np.asarray(values[:n_sequences], UINT32) for values in (blocks.ids, blocks.document)]
    n_tokens = int(blocks.lengths(range(n_sequences)).sum())
    return sum(len(encode_table(values)[1]) for values in parts) / max(1, n_tokens)


def _seconds(work: Callable[[], object], n_rows: int) -> list[float]:
    """Seconds per row of some work, measured twice."""

    def once() -> float:
        began = perf_counter()
        work()
        return (perf_counter() - began) / n_rows

    return [once(), once()]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value; of more than ten, without a tenth at each end."""
    return float(np.quantile(values, 0.1, method="lower")), float(np.quantile(values, 0.9, method="higher"))


def _cores() -> int:
    return os.cpu_count() or 1
