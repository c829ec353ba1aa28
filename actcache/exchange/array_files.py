"""Plain arrays as a store: `.npy` files, and safetensors chunks as Llamascopium writes them.

In: a file or a folder for each hook. Out: a sealed store.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from actcache.errors import ConfigError, first_line
from actcache.exchange.foreign import TORCH_DTYPES, Origin, checked_ids, damage_explained, write
from actcache.files import path_of, shown, why_not_tensors
from actcache.spec import Dtype, Progress
from actcache.store import Store
from actcache.store_options import StoreOptions

_CHUNK_NAME = re.compile(r"(?:shard-(\d+)-)?chunk-(\d+)\.safetensors")
_HEADER_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Element types by their names in a safetensors header."""


def import_npy(
    arrays: Mapping[str, str | Path],
    path: str | Path,
    *,
    tokens: str | Path | NDArray[Any] | None = None,
    codec: str | Mapping[str, str] = "lossless",
    dtype: Dtype | None = None,
    skip_first: int = 0,
    seed: int = 0,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    threads: int = 2,
    durable: bool = True,
    progress: Progress | None = None,
) -> Store:
    """Make a store of `.npy` files, which are memory-mapped.

    Args:
        arrays: a file for each hook name: `(Q, T, D)`, or `(N, D)` for rows that belong to no sequence (each becomes a
            sequence of one token). All of one Q and T.
        path: folder or URL of the store; continued when an earlier call was interrupted.
        tokens: `(Q, T)` or `(N,)` token ids, an array or a file; zeros when there are none.
        codec: as for `extract`.
        dtype: logical element type; by default that of the files. A narrower one rounds.
        skip_first: leading positions of each sequence that are not kept.
        seed: seed of the shuffle of rows within shards.
        sequences_per_shard: sequences of a shard; by default 512, or as many as 131,072 rows where sequences are short,
            fewer where that would exceed 256 MB.
        rows_per_chunk: rows of the unit of reading; by default half a megabyte of the widest hook.
        threads: encoding threads.
        durable: as for `extract`.
        progress: called with (sequences done, in all).

    Raises:
        ConfigError: a file is missing, is no array of floating-point numbers, or does not go with the others. The
        others are those of `extract`.

    Examples:
        >>> np.save("acts.npy", np.random.default_rng(0).standard_normal((8, 16, 32), dtype=np.float32))
        >>> made = ac.import_npy({"blocks.0.hook_resid_post": "acts.npy"}, "from-npy.zarr", dtype="bfloat16")
        >>> made.n_rows, made.read("blocks.0.hook_resid_post", [0]).dtype
        (128, torch.bfloat16)
    """
    options = StoreOptions(
        codec=codec,
        dtype=dtype,
        skip_first=skip_first,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
    )
    if not isinstance(arrays, Mapping) or not arrays or not all(isinstance(hook, str) for hook in arrays):
        raise ConfigError(f"import: name at least one hook and its .npy file, in a mapping, not {shown(arrays)}")
    mapped = {hook: _open_npy(file) for hook, file in arrays.items()}
    for hook, values in mapped.items():
        if values.ndim not in (2, 3) or not values.size or values.dtype.name not in TORCH_DTYPES:
            raise ConfigError(
                f"{arrays[hook]} ({hook}) is {values.dtype} of shape {values.shape}; activations are float16, float32 "
                "or float64 of shape (sequences, positions, width) or (rows, width)"
            )
    first = next(iter(mapped))
    shape = mapped[first].shape[:-1]
    for hook, values in mapped.items():
        if values.shape[:-1] != shape:
            raise ConfigError(f"{hook} has the shape {values.shape}, but {first} has {mapped[first].shape}")
    n_sequences, length = (*shape, 1)[:2]
    dtypes = {hook: values.dtype.newbyteorder("=") for hook, values in mapped.items()}
    ids = None
    if tokens is not None:
        given = _open_npy(tokens) if isinstance(tokens, str | os.PathLike) else _array(tokens)
        ids = checked_ids(given, shape, "tokens").reshape(n_sequences, length)

    def read(hook: str, start: int, stop: int) -> torch.Tensor:
        # A copy in this machine's byte order: mapped values are read-only, and torch wants memory it can write to.
        values = np.array(mapped[hook][start:stop], dtypes[hook])
        return torch.from_numpy(values.reshape(stop - start, length, -1))

    origin = Origin(
        name=", ".join(path_of(file, "import").name for file in arrays.values()),
        form="npy",
        widths={hook: values.shape[-1] for hook, values in mapped.items()},
        dtypes={hook: TORCH_DTYPES[dtype.name] for hook, dtype in dtypes.items()},
        n_sequences=n_sequences,
        sequence_length=length,
        ids=ids,
        read=read,
    )
    return write(origin, path, options, threads=threads, durable=durable, progress=progress)


def import_safetensors(
    chunks: str | Path | Mapping[str, str | Path],
    path: str | Path,
    *,
    codec: str | Mapping[str, str] = "lossless",
    dtype: Dtype | None = None,
    skip_first: int = 0,
    seed: int = 0,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    threads: int = 2,
    durable: bool = True,
    progress: Progress | None = None,
) -> Store:
    """Make a store of safetensors chunks; positions that are masked become no rows.

    A chunk is a file `chunk-N.safetensors` (or `shard-M-chunk-N.safetensors`; in the order of these numbers) with
    `activation` `(B, T, D)`, `tokens` `(B, T)`, and perhaps `mask` `(B, T)`: 0 for what is padding or special. Where
    there is no `mask`, `attention_mask` takes its place. Chunks of single rows lack the axis T. All hooks have the same
    tokens and masks.

    Args:
        chunks: a folder that holds, for each hook, a folder of chunks of that name; or a folder for each hook name.
        path: folder or URL of the store; continued when an earlier call was interrupted.
        codec: as for `extract`.
        dtype: logical element type; by default that of the chunks. A narrower one rounds.
        skip_first: leading positions of each sequence that are not kept, beside those that are masked.
        seed: seed of the shuffle of rows within shards.
        sequences_per_shard: as for `import_npy`.
        rows_per_chunk: as for `import_npy`.
        threads: encoding threads.
        durable: as for `extract`.
        progress: called with (sequences done, in all).

    Raises:
        ConfigError: there are no chunks, one lacks a tensor or has another shape, or hooks differ in their tokens. The
        others are those of `extract`.

    Examples:
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> Path("chunks/blocks.0.hook_mlp_out").mkdir(parents=True)
        >>> chunk = {"activation": torch.randn(4, 16, 32), "tokens": torch.zeros(4, 16, dtype=torch.int64)}
        >>> save_file(chunk, "chunks/blocks.0.hook_mlp_out/chunk-00000000.safetensors")
        >>> ac.import_safetensors("chunks", "from-chunks.zarr").n_rows
        64
    """
    options = StoreOptions(
        codec=codec,
        dtype=dtype,
        skip_first=skip_first,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
    )
    folders = _hook_folders(chunks)
    found = {hook: _chunks_of(Path(folder)) for hook, folder in folders.items()}
    first = next(iter(found))
    for hook, files in found.items():
        if [chunk.shape for chunk in files] != [chunk.shape for chunk in found[first]]:
            n_files, shapes = len(found[first]), sorted({chunk.shape for chunk in found[first]})
            raise ConfigError(
                f"the {len(files)} chunks of {hook} are of {sorted({chunk.shape for chunk in files})} tokens, "
                f"but the {n_files} of {first} are of {shapes}"
            )
    ids, kept = _tables(found[first])
    for hook in list(found)[1:]:
        other_ids, other_kept = _tables(found[hook])
        if not np.array_equal(ids, other_ids) or not np.array_equal(kept, other_kept):
            raise ConfigError(
                f"{hook} and {first} differ in their tokens or masks, so their rows do not belong together"
            )

    firsts = np.cumsum([0, *(chunk.shape[0] for chunk in found[first])]).tolist()

    def read(hook: str, start: int, stop: int) -> torch.Tensor:
        parts = []
        number = bisect_right(firsts, start) - 1
        while start < stop:
            end = min(stop, firsts[number + 1])
            parts.append(found[hook][number].rows(start - firsts[number], end - firsts[number]))
            start, number = end, number + 1
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values.reshape(len(values), ids.shape[1], -1)

    origin = Origin(
        name=", ".join(dict.fromkeys(Path(folder).name for folder in folders.values())),
        form="safetensors",
        widths={hook: files[0].width for hook, files in found.items()},
        dtypes={hook: files[0].dtype for hook, files in found.items()},
        n_sequences=ids.shape[0],
        sequence_length=ids.shape[1],
        ids=ids,
        kept=None if kept.all() else kept,
        read=read,
    )
    return write(origin, path, options, threads=threads, durable=durable, progress=progress)


def _open_npy(file: str | Path) -> NDArray[Any]:
    where = path_of(file, "import: the .npy file")
    try:
        values = np.lib.format.open_memmap(where, mode="r")
    except FileNotFoundError:
        raise ConfigError(f"import: there is no file {where}") from None
    except Exception as error:  # headers are Python literals, and may be anything
        reason = first_line(error)[:200]
        raise ConfigError(f"import: {where} is not a .npy file of plain numbers ({reason})") from error
    return values.view(np.ndarray)


def _array(tokens: Any) -> NDArray[Any]:
    """Token ids that are in memory already."""
    with damage_explained("the array of tokens"):
        return np.asarray(tokens)


def _hook_folders(chunks: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    """The folder of each hook."""
    if isinstance(chunks, Mapping):
        if not all(isinstance(hook, str) for hook in chunks):
            raise ConfigError(f"import: chunks must be hooks and their folders, got {shown(chunks)}")
        folders = {hook: path_of(folder, f"import: the folder of {hook}") for hook, folder in chunks.items()}
    else:
        above = path_of(chunks, "import: chunks")
        inside = sorted(above.iterdir()) if above.is_dir() else []
        folders = {entry.name: entry for entry in inside if entry.is_dir() and any(entry.glob("*chunk-*.safetensors"))}
    if not folders:
        raise ConfigError(
            f"import: {chunks} holds no folder with files chunk-N.safetensors; name the folder above those of the "
            "hooks, or a folder for each hook"
        )
    return folders


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One file: what its header says, and pieces of it."""

    file: Path
    shape: tuple[int, ...]
    """`(B, T)`, or `(B,)` for single rows."""
    width: int
    dtype: torch.dtype
    mask: str | None
    """Name of the tensor that says which positions count."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Activations of some of its sequences."""
        with damage_explained(str(self.file)), safe_open(self.file, framework="pt") as tensors:
            values: torch.Tensor = tensors.get_slice("activation")[start:stop]
        return values

    def table(self, name: str) -> NDArray[Any]:
        """A whole tensor of the shape `(B, T)`."""
        with damage_explained(f"{name} in {self.file}"), safe_open(self.file, framework="pt") as tensors:
            values: NDArray[Any] = tensors.get_tensor(name).numpy()
        return values


def _chunks_of(folder: Path) -> list[_Chunk]:
    """The chunks of a hook in order, all of one length, width and dtype."""
    named = [(_CHUNK_NAME.fullmatch(file.name), file) for file in folder.glob("*chunk-*.safetensors")]
    files = sorted((int(name[1] or 0), int(name[2]), file) for name, file in named if name)
    if not files:
        raise ConfigError(f"import: {folder} holds no files chunk-N.safetensors")
    chunks = [_read_header(file) for *_, file in files]
    for chunk in chunks:
        same = (chunk.shape[1:], chunk.width, chunk.dtype, chunk.mask)
        if same != (chunks[0].shape[1:], chunks[0].width, chunks[0].dtype, chunks[0].mask):
            raise ConfigError(
                f"{chunk.file} has {chunk.dtype} activations of shape {(*chunk.shape, chunk.width)}, mask "
                f"{chunk.mask!r}, but {chunks[0].file.name} has {chunks[0].dtype} of "
                f"{(*chunks[0].shape, chunks[0].width)}, mask {chunks[0].mask!r}"
            )
    return chunks


def _read_header(file: Path) -> _Chunk:
    """What the header of a chunk says.

    Raises:
        ConfigError: it is not such a file, lacks a tensor, or its tensors do not fit together.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  # no dictionary
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            missing = {"activation", "tokens"} - shapes.keys()
            dtype = "" if missing else slices["activation"].get_dtype()
    except (SafetensorError, OSError, ValueError) as error:
        reason = why_not_tensors(file, error)
        raise ConfigError(f"import: {file} cannot be read as a safetensors file: it {reason}") from error
    if missing:
        raise ConfigError(f"import: {file} lacks {' and '.join(sorted(missing))}; it has {', '.join(sorted(shapes))}")
    mask = next((name for name in ("mask", "attention_mask") if name in shapes), None)
    shape = shapes["activation"][:-1]
    for name in ("tokens", mask):
        if name and shapes[name] != shape:
            raise ConfigError(
                f"import: {file} has activations of shape {shapes['activation']}, but {name} of shape {shapes[name]}"
            )
    if len(shape) not in (1, 2) or 0 in shapes["activation"] or dtype not in _HEADER_DTYPES:
        raise ConfigError(
            f"import: {file} has {dtype} activations of shape {shapes['activation']}; they should be floating-point "
            "numbers of shape (sequences, positions, width) or (rows, width)"
        )
    return _Chunk(file, shape, shapes["activation"][-1], _HEADER_DTYPES[dtype], mask)


def _tables(chunks: list[_Chunk]) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """`(Q, T)` tokens of all chunks, and which of the positions count."""
    ids = [checked_ids(chunk.table("tokens"), chunk.shape, f"tokens in {chunk.file}") for chunk in chunks]
    masks = [chunk.table(chunk.mask) != 0 if chunk.mask else np.ones(chunk.shape, bool) for chunk in chunks]
    length = (*chunks[0].shape, 1)[1]
    return np.concatenate(ids).reshape(-1, length), np.concatenate(masks).reshape(-1, length)
