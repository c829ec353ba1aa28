"""Write a part of a store, or all of it with another codec or other shard sizes, as a new store.

Every shard of the new store is made from the rows of its own sequences, wherever they lie in the old one. So the same
call continues an export that was killed, as it does for an extraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, StoreIncompleteError
from actcache.spec import Progress, Site, StoreSpec, expand_names
from actcache.store.backends.objects import Objects, to_write
from actcache.store.codecs.fit import codec_for, fit_to_first_rows
from actcache.store.format.sizes import default_sizes
from actcache.store.reading.rows import Rows
from actcache.store.store import Store
from actcache.store.writing.writer import StoreWriter


def export(
    store: Store,
    path: str | Path | Objects,
    *,
    sites: Sequence[str] = ("*",),
    codec: str | Mapping[str, str] | None = None,
    sequences: range | None = None,
    rows: Rows | None = None,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    threads: int = 2,
    durable: bool = True,
    progress: Progress | None = None,
) -> Store:
    """Copy a store, or a part of it, and return the new, sealed one.

    Args:
        store: a sealed store.
        path: folder or URL of the new store; continued when an earlier call was interrupted.
        sites: names or patterns of the sites to take.
        codec: as for `extract`; by default every site keeps its own.
        sequences: consecutive sequences to take; by default all.
        rows: slice, ids, mask or filter of the rows to take; shards are smaller by the rows that are left out.
        sequences_per_shard: sequences of a shard; by default the store's.
        rows_per_chunk: rows of the unit of reading; by default the store's, where it fits.
        threads: encoding threads.
        durable: as for `extract`.
        progress: called with (shards done, in all).

    Raises:
        StoreIncompleteError: the store is not sealed. SiteError: a pattern matches nothing. ConfigError: sequences that
        the store does not have. IndexError: rows that it does not have. The others are those of `extract`.

    Examples:
        >>> part = ac.export(store, "part.zarr", sites=["*.hook_mlp_out"], codec="int8", sequences=range(16))
        >>> part.sites, part.n_rows
        (['blocks.3.hook_mlp_out'], 1008)
    """
    if not store.sealed:
        raise StoreIncompleteError(f"{store.path} is not finished; finish 'actcache extract' before exporting it")
    chosen = range(store.spec.n_sequences) if sequences is None else sequences
    if chosen.step != 1 or not 0 <= chosen.start < chosen.stop <= store.spec.n_sequences:
        raise ConfigError(f"export: sequences {chosen} asked of {store.path}, which has 0 to {store.spec.n_sequences}")
    wanted = _wanted(store, rows)
    blocks, names = store.token_blocks().take(chosen), expand_names(sites, store.sites)
    spec = _spec(store, chosen, blocks.digest(), names, codec, wanted, sequences_per_shard, rows_per_chunk)
    with StoreWriter(to_write(path, durable=durable), spec, blocks, threads=threads) as writer:
        pending = writer.pending()
        for done, shard in enumerate(pending, spec.n_shards - len(pending) + 1):
            part = spec.shard_sequences(shard)
            ids, kept = _rows_of(store, range(chosen.start + part.start, chosen.start + part.stop), wanted)
            buffers = writer.acquire(shard)
            for site in writer.sites:
                values = store.read_stored(site.name, ids, threads=threads)
                buffers.rows[site.name][: len(ids)] = values
            writer.submit(buffers, blocks.ids[part.start : part.stop], kept)
            if progress:
                progress(done, spec.n_shards)
        return writer.finish()


def _wanted(store: Store, rows: Rows | None) -> NDArray[np.bool_] | None:
    """A mask over row ids; None for all rows."""
    if rows is None:
        return None
    mask = np.zeros(store.spec.n_rows, bool)
    mask[store.checked_rows(rows)] = True
    return mask


def _rows_of(
    store: Store, sequences: range, wanted: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids of the wanted rows of these sequences, in reading order, and a mask of them over all rows of these."""
    spec = store.spec
    ids, places = [], []
    for shard in range(
        sequences.start // spec.sequences_per_shard, (sequences.stop - 1) // spec.sequences_per_shard + 1
    ):
        table = store.shard_row_table(shard)
        here = shard * spec.rows_per_shard + np.arange(len(table["sequence"]))
        taken = (table["sequence"] >= sequences.start) & (table["sequence"] < sequences.stop)
        if wanted is not None:
            taken &= wanted[here]
        place = (table["sequence"].astype(np.int64) - sequences.start) * spec.rows_per_sequence
        ids.append(here[taken])
        places.append((place + table["position"] - spec.skip_first)[taken])
    all_places = np.concatenate(places)
    kept = np.zeros(len(sequences) * spec.rows_per_sequence, bool)
    kept[all_places] = True
    return np.concatenate(ids)[np.argsort(all_places)], kept


def _spec(
    store: Store,
    sequences: range,
    tokens: str,
    names: list[str],
    codec: str | Mapping[str, str] | None,
    wanted: NDArray[np.bool_] | None,
    sequences_per_shard: int | None,
    rows_per_chunk: int | None,
) -> StoreSpec:
    old = store.spec
    per_shard = sequences_per_shard or min(old.sequences_per_shard, len(sequences))
    if rows_per_chunk is None:
        widths = [old.site(name).width for name in names]
        fits = per_shard * old.rows_per_sequence % old.rows_per_chunk == 0
        default = default_sizes(widths, old.dtype, len(sequences), old.rows_per_sequence, per_shard)[1]
        rows_per_chunk = old.rows_per_chunk if fits else default
    origin = {
        "fingerprint": store.fingerprint,
        "codecs": {name: old.site(name).codec for name in names},
        "sequences": [sequences.start, sequences.stop],
        "n_rows": store.n_rows if wanted is None else int(wanted.sum()),
    }
    return replace(
        old,
        sites=tuple(_with_codec(store, old.site(name), codec, rows_per_chunk) for name in names),
        n_sequences=len(sequences),
        sequences_per_shard=per_shard,
        rows_per_chunk=rows_per_chunk,
        text={**old.text, "tokens": tokens, "exported_from": origin},
    )


def _with_codec(store: Store, site: Site, codec: str | Mapping[str, str] | None, rows_per_chunk: int) -> Site:
    asked = codec_for(site.name, codec or {})
    if asked is None:
        return site

    def first_rows(n_rows: int) -> NDArray[Any]:
        return store.read_stored(site.name, store.row_ids()[:n_rows])

    return fit_to_first_rows(site, asked, first_rows, store.spec.dtype, rows_per_chunk)
