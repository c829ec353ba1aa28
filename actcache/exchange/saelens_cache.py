"""SAELens' cached activations: a folder of `datasets`, one column a hook (`Array2D`), and `token_ids`.

In: such a folder -> a sealed store. Out: a store -> such a folder, which a SAELens run with
`use_cached_activations=True` and `cached_activations_path` trains from (read in sae-lens 6.54).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from actcache.addresses import shown as shown_address
from actcache.errors import ConfigError, StoreError, StoreIncompleteError
from actcache.exchange.foreign import TORCH_DTYPES, Origin, checked_ids, damage_explained, write
from actcache.files import explained, path_of, read_json, shown, whole_file, write_whole
from actcache.kernels.bits import widen
from actcache.spec import Dtype, Progress, check_callable, check_positive, expand_names
from actcache.store import Store, refuse_inside_store
from actcache.store.store import checked_store
from actcache.store_options import StoreOptions

if TYPE_CHECKING:
    import datasets

TOKENS = "token_ids"
"""The column of token ids."""
_BATCH_BYTES = 64 << 20
"""About the size of a record batch of an exported column."""
_TOKEN_SEQUENCES = 4096
"""Sequences whose token ids are read at a time."""


def import_saelens(
    folder: str | Path,
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
    """Make a store of SAELens' cached activations: each column of activations becomes a site.

    The dataset is memory-mapped and read piece by piece. Only the token ids are in memory as a whole.

    Args:
        folder: what `CacheActivationsRunner` wrote, or `Dataset.save_to_disk`.
        path: folder or URL of the store; continued when an earlier call was interrupted.
        codec: as for `extract`.
        dtype: logical element type; by default that of the columns. `bfloat16`, which Arrow does not have, rounds.
        skip_first: leading positions of each sequence that are not kept.
        seed: seed of the shuffle of rows within shards.
        sequences_per_shard: as for `import_npy`.
        rows_per_chunk: as for `import_npy`.
        threads: encoding threads.
        durable: as for `extract`.
        progress: called with (sequences done, in all).

    Raises:
        ConfigError: there is no such dataset, or its columns are not of one length. The others are those of `extract`.

    Examples:
        >>> folder = ac.export_saelens(store, "saelens-cache")
        >>> made = ac.import_saelens(folder, "from-saelens.zarr", dtype="bfloat16")
        >>> made.n_rows == store.n_rows, made.sites == store.sites
        (True, True)
    """
    options = StoreOptions(
        codec=codec,
        dtype=dtype,
        skip_first=skip_first,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
    )
    folder = path_of(folder, "import: folder")
    dataset = _open_dataset(folder)
    shapes, dtypes = _hooks(dataset, folder)
    length = next(iter(shapes.values()))[0]
    tables = dataset.with_format("arrow")

    def read(hook: str, start: int, stop: int) -> torch.Tensor:
        with damage_explained(f"the dataset in {folder}"):
            column = tables.select_columns([hook])[start:stop].column(hook)
            column.validate(full=True)  # offsets that lead out of the file would end the process
        return _tensor(column, (stop - start, *shapes[hook]), f"{hook}, sequences {start} to {stop - 1} of {folder}")

    origin = Origin(
        name=folder.name,
        form="saelens",
        widths={hook: width for hook, (_, width) in shapes.items()},
        dtypes=dtypes,
        n_sequences=len(dataset),
        sequence_length=length,
        ids=_token_ids(dataset, length, folder) if TOKENS in dataset.column_names else None,
        read=read,
    )
    return write(origin, path, options, threads=threads, durable=durable, progress=progress)


def _open_dataset(folder: Path) -> datasets.Dataset:
    from datasets import Dataset, load_from_disk

    if not (folder / "dataset_dict.json").exists():  # of several splits, which are refused below
        _check_files(folder)
    with damage_explained(f"the dataset in {folder}"):
        found = load_from_disk(str(folder))
    if not isinstance(found, Dataset):
        raise ConfigError(f"import: {folder} holds several splits ({', '.join(found)}); name the folder of one")
    if not len(found):
        raise ConfigError(f"import: the dataset in {folder} is empty")
    return found


def _check_files(folder: Path) -> None:
    """Raise ConfigError unless the folder is what `save_to_disk` writes, with all the files that it lists."""
    for name in ("state.json", "dataset_info.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"import: {folder} is not a folder that datasets.load_from_disk opens: there is no {name}; name the "
                "folder that CacheActivationsRunner wrote (cached_activations_path)"
            )
        try:
            content = read_json(folder / name)
        except (ValueError, OSError) as error:
            raise ConfigError(f"import: {folder / name} {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"import: {folder / name} should be a JSON object, and is {shown(content)}")
        if name != "state.json":
            continue
        files = content.get("_data_files")
        entries = files if isinstance(files, list) else []
        named = [str(entry.get("filename", "")) if isinstance(entry, dict) else "" for entry in entries]
        if not named:
            raise ConfigError(f"import: {folder / name} names no files of data: its _data_files is {shown(files)}")
        for file in named:
            if Path(file).name != file or not (folder / file).is_file():
                raise ConfigError(f"import: {folder / name} names {shown(file)}, which is not a file in that folder")


def _hooks(dataset: datasets.Dataset, folder: str | Path) -> tuple[dict[str, tuple[int, int]], dict[str, torch.dtype]]:
    """`(T, D)` and element type of each column of activations."""
    from datasets import Array2D

    columns = {name: feature for name, feature in dataset.features.items() if isinstance(feature, Array2D)}
    if not columns:
        raise ConfigError(
            f"import: {folder} has no column of activations (Array2D of positions by width); its columns are "
            f"{', '.join(dataset.column_names)}"
        )
    for name, feature in columns.items():
        if feature.dtype not in TORCH_DTYPES or None in feature.shape or 0 in feature.shape:
            raise ConfigError(
                f"import: {name} in {folder} is {feature.dtype} of shape {tuple(feature.shape)}; activations are "
                "float16, float32 or float64 of a fixed number of positions and features"
            )
    lengths = {name: feature.shape[0] for name, feature in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"import: the columns of {folder} are of different lengths: {lengths}")
    shapes = {name: (int(feature.shape[0]), int(feature.shape[1])) for name, feature in columns.items()}
    return shapes, {name: TORCH_DTYPES[feature.dtype] for name, feature in columns.items()}


def _tensor(column: pa.ChunkedArray, shape: tuple[int, int, int], where: str) -> torch.Tensor:
    """A column of lists of lists as a tensor; ConfigError unless each list has its promised length."""
    parts = []
    for chunk in column.chunks:
        values = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
        for n_values in shape[1:]:
            # An Array2D promises a shape, but Arrow does not enforce it.
            if values.null_count or not pc.all(pc.equal(values.value_lengths(), n_values)).as_py():
                raise ConfigError(f"import: {where} are not all of shape {shape[1:]}, as the dataset says they are")
            values = values.flatten()
        if values.null_count:
            raise ConfigError(f"import: {where} have values that are missing (null)")
        parts.append(values.to_numpy())
    # The only copy: memory-mapped values are read-only, and torch wants memory that it can write to.
    return torch.from_numpy(np.concatenate(parts)).view(shape)


def _token_ids(dataset: datasets.Dataset, length: int, folder: str | Path) -> NDArray[np.uint32]:
    plain = dataset.select_columns([TOKENS]).with_format("numpy")
    ids = np.empty((len(dataset), length), np.uint32)
    for start in range(0, len(ids), _TOKEN_SEQUENCES):
        part = ids[start : start + _TOKEN_SEQUENCES]
        with damage_explained(f"{TOKENS} in {folder}"):
            values = np.asarray(plain[start : start + len(part)][TOKENS])
        part[:] = checked_ids(values, part.shape, f"{TOKENS} in {folder}, from sequence {start} on,")
    return ids


def export_saelens(
    store: Store,
    folder: str | Path,
    *,
    sites: Sequence[str] = ("*",),
    dtype: Literal["float16", "float32"] | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Path:
    """Write sites of a store as a dataset that SAELens trains from, sequences in their order.

    `context_size` is then `store.spec.rows_per_sequence`: positions that were left out when the store was written are
    not there. In memory is one shard of the sites that are taken.

    Args:
        store: a sealed store without rows left out.
        folder: where the dataset is made; continued when an earlier call was interrupted.
        sites: names or patterns of the sites to take; each becomes a column.
        dtype: element type; by default that of the store, and float32 for bfloat16, which Arrow does not have.
        threads: decoding threads.
        progress: called with (shards done, in all).

    Raises:
        StoreIncompleteError: the store is not sealed. StoreError: it leaves rows out, so its sequences are not whole.
        SiteError: a pattern matches nothing. ConfigError: the folder holds something else, or values are beyond what
        the dtype holds.

    Examples:
        >>> folder = ac.export_saelens(store, "for-saelens", sites=[site_out])
        >>> from datasets import load_from_disk
        >>> load_from_disk(str(folder)).column_names
        ['blocks.3.hook_mlp_out', 'token_ids']
    """
    checked_store(store, "export")
    check_callable("export", progress=progress)
    check_positive("export", threads=threads)
    if not store.sealed:
        raise StoreIncompleteError(f"{store.path} is not finished; finish 'actcache extract' before exporting it")
    if store.n_rows != store.spec.n_rows:
        raise StoreError(
            f"{store.path} has {store.n_rows:,} of the {store.spec.n_rows:,} rows of its sequences, the others were "
            "left out; SAELens' layout is made of whole sequences, so export a store that leaves none out"
        )
    if "://" in str(folder):
        raise ConfigError(
            f"export: {shown_address(folder)} is a URL; SAELens' layout is written to a folder of this machine"
        )
    names, out = expand_names(sites, store.sites), path_of(folder, "export: folder")
    if not names:
        raise ConfigError(f"export: name at least one site; the store has {', '.join(store.sites)}")
    if dtype not in (None, "float16", "float32"):
        raise ConfigError(f"export: SAELens' layout has float16 and float32, not {dtype}")
    target = np.dtype(dtype or ("float16" if store.spec.dtype == "float16" else "float32"))
    features = _features(store, names, target)
    _begin(store, out, features)
    ids = store.tokens()[:, store.spec.skip_first :]
    if ids.max() >= 1 << 31:
        raise ConfigError(f"export: {store.path} has token ids up to {ids.max()}; SAELens' layout holds int32")
    n_shards = store.spec.n_shards
    files = [f"data-{shard:05d}-of-{n_shards:05d}.arrow" for shard in range(n_shards)]
    for shard, file in enumerate(files):
        if not (out / file).exists():
            sequences = store.spec.shard_sequences(shard)
            values = {name: _in_order(store, name, shard, target, threads) for name in names}
            values[TOKENS] = ids[sequences.start : sequences.stop].astype(np.int32)
            _put_table(out / file, values, features.arrow_schema)
        if progress:
            progress(shard + 1, n_shards)
    write_whole(out / "state.json", json.dumps(_state(store, files, features), indent=2))
    return out


def _features(store: Store, names: list[str], dtype: np.dtype[Any]) -> datasets.Features:
    from datasets import Array2D, Features, Value
    from datasets import Sequence as SequenceOf

    length = store.spec.rows_per_sequence
    columns = {name: Array2D(shape=(length, store.spec.site(name).width), dtype=dtype.name) for name in names}
    return Features({**columns, TOKENS: SequenceOf(Value("int32"), length=length)})


def _begin(store: Store, out: Path, features: datasets.Features) -> None:
    """Make the folder, or check that an earlier call of the same export has made it."""
    from datasets import DatasetInfo

    origin = {"exported_from": store.fingerprint, "by": "actcache"}
    info = DatasetInfo(description=json.dumps(origin), features=features)
    refuse_inside_store(out)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        file = out / "dataset_info.json"
        if all(place.suffix == ".partial" for place in out.iterdir()):
            with tempfile.TemporaryDirectory() as beside:
                info.write_to_directory(beside)
                write_whole(file, Path(beside, file.name).read_bytes())
            return
    found = None
    with suppress(Exception):  # whatever is there, if it cannot be read it is not ours
        found = DatasetInfo.from_directory(str(out)) if file.exists() else None
    if found is None or (found.description, found.features) != (info.description, info.features):
        raise ConfigError(f"export: {out} holds something else; name another folder")


def _in_order(store: Store, site: str, shard: int, dtype: np.dtype[Any], threads: int) -> NDArray[Any]:
    """`(q, T, D)` activations of a shard's sequences."""
    spec, table = store.spec, store.shard_row_table(shard)
    rows = spec.shard_rows(shard)
    place = table["sequence"].astype(np.int64) * spec.rows_per_sequence + table["position"] - spec.skip_first
    stored = store.read_stored(site, slice(rows.start, rows.stop), threads=threads)
    ordered = np.empty(stored.shape, dtype)
    for part in np.array_split(np.arange(len(rows)), max(1, stored.nbytes // _BATCH_BYTES)):
        wide = widen(stored[part], spec.dtype)
        try:
            with np.errstate(over="raise"):
                ordered[place[part] - rows.start] = wide.astype(dtype, copy=False)
        except FloatingPointError:
            raise ConfigError(f"export: {site} has values beyond what {dtype} holds; choose float32") from None
    return ordered.reshape(len(spec.shard_sequences(shard)), spec.rows_per_sequence, -1)


def _put_table(file: Path, values: Mapping[str, NDArray[Any]], schema: pa.Schema) -> None:
    """An Arrow stream file, whole or not at all."""
    n_sequences = len(values[TOKENS])
    widest = max(array[0].nbytes for array in values.values())
    per_batch = max(1, _BATCH_BYTES // widest)
    partial, n_bytes = file.with_suffix(".partial"), sum(array.nbytes for array in values.values())
    with (
        explained(file, f"{n_bytes:,} bytes"),
        whole_file(str(file), str(partial), flushed=True) as descriptor,
        os.fdopen(descriptor, "wb", closefd=False) as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        for start in range(0, n_sequences, per_batch):
            arrays = [_column(values[f.name][start : start + per_batch], f.type) for f in schema]
            stream.write_batch(pa.record_batch(arrays, schema=schema))


def _column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """An array of two or three axes as lists, or lists of lists."""
    if values.ndim == 2:
        return pa.array(list(values), kind)
    column = pa.array(values.reshape(-1))
    for n_values in reversed(values.shape[1:]):
        column = pa.ListArray.from_arrays(np.arange(0, len(column) + 1, n_values, dtype=np.int32), column)
    return pa.ExtensionArray.from_storage(kind, column)


def _state(store: Store, files: list[str], features: datasets.Features) -> dict[str, Any]:
    """What `datasets` stores about a saved dataset; it names caches by the fingerprint, made here from the contents."""
    contents = json.dumps([store.fingerprint, features.to_dict()])
    return {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": hashlib.sha256(contents.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
