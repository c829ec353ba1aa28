"""What every importer hands over, and how a store is written from it.

In: an `Origin`, activations that lie somewhere else. Out: a sealed store. As with an extraction, each shard is a
function of its own sequences only, so an import that was killed is continued by the same call.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.errors import ActcacheError, ConfigError, first_line
from actcache.files import path_of
from actcache.kernels.bits import bits_tensor
from actcache.spec import (
    DTYPES,
    Dtype,
    Progress,
    Site,
    StoreSpec,
    TokenBlocks,
    check_callable,
    check_positive,
)
from actcache.store import ShardBuffers, Store, StoreWriter, to_write
from actcache.store.codecs.chain import STORED_DTYPE
from actcache.store.codecs.fit import codec_for, fit_to_first_rows
from actcache.store.format.sizes import default_sizes
from actcache.store_options import StoreOptions

TORCH_DTYPES = {name: getattr(torch, name) for name in (*DTYPES, "float64")}
"""What activations may be stored as elsewhere; float64 only comes in rounded."""
_PIECE_BYTES = 16 << 20
"""About how much of one site is read at a time."""
_ROWS_TOGETHER = 256
"""Shorter sequences than this are taken several at a time when default sizes are chosen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Activations that lie somewhere else, in reading order, read piece by piece."""

    name: str
    """What they are called: the last part of a path, so that a store does not depend on where its origin lay."""
    form: str
    """`saelens`, `npy` or `safetensors`."""
    widths: Mapping[str, int]
    """D of each hook, in the order in which they become sites."""
    dtypes: Mapping[str, torch.dtype]
    """Element type of each hook."""
    n_sequences: int
    """Q."""
    sequence_length: int
    """T."""
    ids: NDArray[np.uint32] | None
    """`(Q, T)` token ids; None when the origin has none."""
    kept: NDArray[np.bool_] | None = None
    """`(Q, T)` which positions become rows; all by default."""
    read: Callable[[str, int, int], torch.Tensor]
    """`read(hook, start, stop)`: `(stop - start, T, D)` activations of these sequences."""


def write(
    origin: Origin,
    path: str | Path,
    options: StoreOptions,
    *,
    threads: int,
    durable: bool,
    progress: Progress | None,
) -> Store:
    """Write the activations into a store, or go on with it; see the importers for what the options mean."""
    check_callable("import", progress=progress)
    check_positive("import", threads=threads)
    if "://" not in str(path) and (isinstance(path, str | os.PathLike) or path is None):
        path = path_of(path, "import: path")
    blocks = _token_blocks(origin)
    dtype = common_dtype(origin.dtypes) if options.dtype is None else options.dtype
    spec = _spec(origin, blocks, options, dtype)
    with StoreWriter(to_write(path, durable=durable), spec, blocks, threads=threads) as writer:
        pending = writer.pending()
        done = spec.n_sequences - sum(len(spec.shard_sequences(shard)) for shard in pending)
        for shard in pending:
            sequences = spec.shard_sequences(shard)
            buffers = writer.acquire(shard)
            for n_filled in _fill(origin, sequences, buffers):
                if progress:
                    progress(done + n_filled, spec.n_sequences)
            done += len(sequences)
            ids = np.asarray(blocks.ids[sequences.start : sequences.stop])
            writer.submit(buffers, ids, _kept(origin, spec, sequences))
        return writer.finish()


@contextmanager
def damage_explained(what: str) -> Iterator[None]:
    """Turn anything that another library raises while it reads a file into one sentence about the file."""
    try:
        yield
    except ActcacheError:
        raise
    except Exception as error:
        reason = first_line(error)[:200]
        raise ConfigError(f"import: {what} is damaged, or not what it should be ({reason})") from error


def common_dtype(dtypes: Mapping[str, torch.dtype]) -> Dtype:
    """The element type that holds the values of all hooks exactly.

    Raises:
        ConfigError: no dtype holds all of them, because some are float64.
    """
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes.values()}
    if "float64" in names:
        hook = next(hook for hook, dtype in dtypes.items() if dtype == torch.float64)
        raise ConfigError(f"{hook} is float64, which stores do not have; name a dtype, to which it is rounded")
    return next(name for name in DTYPES if names == {name} or name == "float32")


def checked_ids(values: NDArray[Any], shape: tuple[int, ...], where: str) -> NDArray[np.uint32]:
    """Token ids as a store holds them.

    Raises:
        ConfigError: another shape, not whole numbers, or numbers out of the range of token ids.
    """
    if values.shape != shape:
        raise ConfigError(f"{where} has the shape {values.shape}, but the activations are of {shape} tokens")
    if values.dtype.kind not in "iu" or (values.size and not 0 <= int(values.min()) <= int(values.max()) < 1 << 32):
        raise ConfigError(f"{where} holds values that are not token ids: whole numbers from 0 to 2**32 - 1")
    return values.astype(np.uint32)


def _token_blocks(origin: Origin) -> TokenBlocks:
    """The tokens; each sequence counts as a document of its own, because nothing is known of documents."""
    shape = (origin.n_sequences, origin.sequence_length)
    # Broadcast: what is the same for a whole sequence, or for all of them, takes no memory.
    documents = np.broadcast_to(np.arange(origin.n_sequences, dtype=np.uint32)[:, None], shape)
    ids = np.broadcast_to(np.uint32(0), shape) if origin.ids is None else origin.ids
    description: dict[str, Any] = {"length": origin.sequence_length, "documents": "one a sequence"}
    if origin.ids is None:
        description["note"] = "the origin has no token ids; all are 0 here"
    if origin.kept is not None:
        # Two masks over the same tokens are different rows.
        description["mask"] = hashlib.sha256(np.packbits(origin.kept).data).hexdigest()
    return TokenBlocks(ids=ids, document=documents, description=description)


def _spec(origin: Origin, blocks: TokenBlocks, options: StoreOptions, dtype: Dtype) -> StoreSpec:
    sequences_per_shard, rows_per_chunk = _default_sizes(origin, options, dtype)
    spec = StoreSpec(
        sites=tuple(Site(name=name, shape=(width,)) for name, width in origin.widths.items()),
        n_sequences=origin.n_sequences,
        sequence_length=origin.sequence_length,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=options.rows_per_chunk or rows_per_chunk,
        skip_first=options.skip_first,
        dtype=dtype,
        seed=options.seed,
        model={"name": f"imported from {origin.name}", "format": origin.form, "sample": _sample_digest(origin)},
        text={**blocks.description, "tokens": blocks.digest()},
    )
    return replace(spec, sites=tuple(_with_codec(origin, spec, site, options.codec) for site in spec.sites))


def _default_sizes(origin: Origin, options: StoreOptions, dtype: Dtype) -> tuple[int, int]:
    """Default sizes; single rows, or very short sequences, count by the group, lest shards and chunks be tiny."""
    widths, n_rows = list(origin.widths.values()), max(1, origin.sequence_length - options.skip_first)
    sequences_per_shard = options.sequences_per_shard
    if sequences_per_shard is None:
        group = max(1, _ROWS_TOGETHER // n_rows)
        n_groups = -(-origin.n_sequences // group)
        sequences_per_shard = group * default_sizes(widths, dtype, n_groups, n_rows * group)[0]
    return default_sizes(widths, dtype, origin.n_sequences, n_rows, sequences_per_shard)


def _sample_digest(origin: Origin) -> str:
    """sha256 (hex) over the first and the last sequence of each hook: other activations of the same tokens differ."""
    digest = hashlib.sha256()
    for hook in origin.widths:
        for start in (0, origin.n_sequences - 1):
            digest.update(origin.read(hook, start, start + 1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _with_codec(origin: Origin, spec: StoreSpec, site: Site, codec: str | Mapping[str, str]) -> Site:
    def first_rows(n_rows: int) -> NDArray[Any]:
        first = range(min(spec.n_sequences, -(-n_rows // spec.rows_per_sequence)))
        rows = origin.read(site.name, first.start, first.stop)[:, spec.skip_first :].flatten(0, 1)
        kept = _kept(origin, spec, first)
        if kept is not None and kept.any():
            rows = rows[torch.from_numpy(kept)]
        # In whole chunks, as they are going to be; fewer rows than one chunk are all there is.
        rows = rows[: len(rows) // spec.rows_per_chunk * spec.rows_per_chunk or None]
        stored = np.empty(rows.shape, STORED_DTYPE[spec.dtype])
        _store_rows(rows, stored, spec.dtype, site.name)
        return stored

    return fit_to_first_rows(
        site, codec_for(site.name, codec) or "lossless", first_rows, spec.dtype, spec.rows_per_chunk
    )


def _kept(origin: Origin, spec: StoreSpec, sequences: range) -> NDArray[np.bool_] | None:
    """Which rows of these sequences there are, in reading order; None for all."""
    if origin.kept is None:
        return None
    return origin.kept[sequences.start : sequences.stop, spec.skip_first :].reshape(-1)


def _fill(origin: Origin, sequences: range, buffers: ShardBuffers) -> Iterator[int]:
    """Put the kept rows of these sequences into the first rows of the buffers; yields how many sequences are in."""
    spec = buffers.spec
    row_bytes = max(origin.widths[hook] * origin.dtypes[hook].itemsize for hook in origin.widths)
    per_piece = max(1, _PIECE_BYTES // (row_bytes * spec.sequence_length))
    begin = 0
    for start in range(sequences.start, sequences.stop, per_piece):
        piece = range(start, min(start + per_piece, sequences.stop))
        kept = _kept(origin, spec, piece)
        n_rows = len(piece) * spec.rows_per_sequence if kept is None else int(kept.sum())
        for hook in buffers.rows:
            rows = origin.read(hook, piece.start, piece.stop)[:, spec.skip_first :].flatten(0, 1)
            rows = rows if kept is None else rows[torch.from_numpy(kept)]
            _store_rows(rows, buffers.rows[hook][begin : begin + n_rows], spec.dtype, hook)
        begin += n_rows
        yield piece.stop - sequences.start


def _store_rows(rows: torch.Tensor, out: NDArray[Any], dtype: Dtype, hook: str) -> None:
    """Copy rows into a buffer of the stored dtype.

    Raises:
        ConfigError: finite values that the dtype cannot hold.
    """
    target = bits_tensor(out, dtype)
    target.copy_(rows)
    narrower = torch.finfo(target.dtype).max < torch.finfo(rows.dtype).max
    if narrower and bool((target.isinf() & ~rows.isinf()).any()):
        largest = rows[~rows.isinf()].abs().nan_to_num().max().item()
        raise ConfigError(
            f"{hook} has values up to {largest:.4g}, beyond what {dtype} holds; begin a new store with another dtype"
        )
