"""The `zarr.json` files below the root: what every other reader of Zarr goes by.

In: a spec. Out: the files that zarr-python would write for it, put where they are missing, and compared with
those that are there. Nothing in this package reads values by them, so damage to them misleads other readers only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.spec import Site, StoreSpec
from actcache.store import codecs
from actcache.store.backends.objects import Objects
from actcache.store.format import stats
from actcache.store.format.keys import (
    LEDGER_KEY,
    ROW_ARRAYS,
    ROWS,
    TOKEN_ARRAYS,
    column_prefix,
    columns_of,
    site_prefix,
    token_sequences_per_chunk,
)
from actcache.store.format.records import HEAD_BYTES, record_length
from actcache.store.format.root import Root
from actcache.store.format.site_arrays import arrays_of
from actcache.store.format.table_objects import FLOAT64, UINT8, UINT32, put_table

_MOST_BYTES = 1 << 20
_TOKENS = "tokens/ids/zarr.json"
"""The file that is put first when a store is extended."""


def write_metadata(objects: Objects, spec: StoreSpec) -> None:
    """Put the metadata of every group and array where it is missing, outgrown or damaged; leave the rest alone."""
    wanted = _expected(spec)
    _mend(objects, _TOKENS, wanted[_TOKENS])
    objects.flush()  # it says what the others mean
    for key in sorted(wanted.keys() - {_TOKENS}):
        _mend(objects, key, wanted[key])


def put_ledger(objects: Objects, spec: StoreSpec, ledger: NDArray[np.uint8]) -> None:
    """Store the ledger, metadata and all: its one chunk has the shape of the whole, which differs after growth."""
    for key, data in _ledger(spec).items():
        objects.put(key, data)
    put_table(objects, LEDGER_KEY, ledger)


def mend_metadata(objects: Objects, root: Root) -> None:
    """Repair everything that `wrong_metadata` reports."""
    write_metadata(objects, root.spec)
    if root.state == "sealed":
        for key, wanted in _ledger(root.spec).items():
            _mend(objects, key, wanted)


def wrong_metadata(objects: Objects, root: Root) -> Iterator[tuple[str, str]]:
    """Key and fault of each `zarr.json` below the root that is not what the root says.

    Where an extension was begun, the metadata of the larger store is right too.
    """
    wanted = dict(_expected(root.spec))
    if root.state == "sealed":
        wanted |= _ledger(root.spec)
    grown = _metadata_of_growth(objects, root.spec)
    for key, data in wanted.items():
        found = _read_file(objects, key)
        reason = _first_difference(found, data)
        if reason and not (key in grown and _first_difference(found, grown[key]) is None):
            yield key, reason


def stored_length(objects: Objects) -> int | None:
    """T, the length of the sequences by the metadata of the token array; None where that is missing or damaged."""
    found = _parse(_read_file(objects, _TOKENS))
    try:
        length = found["shape"][1]
    except (KeyError, TypeError, IndexError):
        return None
    return length if type(length) is int else None


def differences(objects: Objects, spec: StoreSpec, site: Site) -> Iterator[tuple[str, Any, Any]]:
    """What a spec says of a site, and the metadata that its array was created with otherwise: name, and both values.

    Nothing where there is no such metadata, or where it is damaged. How many rows there are may differ: stores grow.
    """
    first = arrays_of(spec, site)[0]
    key = f"{site_prefix(site.name)}/{first.name}/zarr.json"
    found, wanted = _parse(_read_file(objects, key)), _sharded(spec, first, _about(spec, site))
    try:
        about = {"feature_exponents": [], "meaning": None, **found["attributes"]}
        about["rows of a shard"] = found["chunk_grid"]["configuration"]["chunk_shape"][0]
        about["rows of a chunk"] = found["codecs"][0]["configuration"]["chunk_shape"][0]
    except (KeyError, TypeError, IndexError):
        return
    said = {"feature_exponents": [], "meaning": None, **wanted["attributes"]}
    said |= {"rows of a shard": wanted["shards"][0], "rows of a chunk": wanted["chunks"][0]}
    yield from ((name, value, about[name]) for name, value in said.items() if name in about and about[name] != value)


def _mend(objects: Objects, key: str, wanted: bytes) -> None:
    stored = _read_file(objects, key)
    if _first_difference(stored, wanted) is None:
        objects.keep(key)
        return
    found, parsed = _parse(stored), json.loads(wanted)
    if isinstance(found, dict):  # what somebody else has added stays
        given, ours = found.get("attributes"), parsed.get("attributes", {})
        parsed = {**found, **parsed, "attributes": {**(given if isinstance(given, dict) else {}), **ours}}
    objects.put(key, json.dumps(parsed, indent=2).encode())


def _read_file(objects: Objects, key: str) -> bytes | None:
    """The bytes of a file; None if it is missing, empty if it is far too long."""
    data = objects.tail(key, _MOST_BYTES)
    return None if data is None else bytes(data) if len(data) < _MOST_BYTES else b""


def _parse(stored: bytes | None) -> Any:
    """What a file says; None if it is not JSON."""
    try:
        return json.loads(stored or b"")
    except (ValueError, RecursionError):
        return None


def _first_difference(stored: bytes | None, wanted: bytes) -> str | None:
    """What is wrong with a file; None when it says, in the words of any version of zarr, what is wanted."""
    if stored == wanted:
        return None
    if stored is None:
        return "is missing"
    found, parsed = _parse(stored), json.loads(wanted)
    if not isinstance(found, dict):
        return "is damaged"
    for name, value in parsed.pop("attributes", {}).items():
        attributes = found.get("attributes")
        if not isinstance(attributes, dict) or attributes.get(name) != value:
            return f"has another attribute {name!r}"
    wrong = [name for name, value in parsed.items() if _without_empty(found.get(name)) != _without_empty(value)]
    return f"has another {', '.join(wrong)}" if wrong else None


def _without_empty(value: Any) -> Any:
    """A value without what is empty in it, which one version of zarr writes and another leaves out."""
    if isinstance(value, dict):
        plain = {name: _without_empty(part) for name, part in value.items()}
        return {name: part for name, part in plain.items() if part is not None}
    if isinstance(value, list):
        return [_without_empty(part) for part in value] or None
    return value


def _metadata_of_growth(objects: Objects, spec: StoreSpec) -> Mapping[str, bytes]:
    """The metadata of the larger store that this one is growing into; empty if it is not growing."""
    found = _parse(_read_file(objects, _TOKENS))
    shape = found.get("shape") if isinstance(found, dict) else None
    if not isinstance(shape, list) or not shape or type(shape[0]) is not int or shape[0] <= spec.n_sequences:
        return {}
    try:
        return _expected(replace(spec, n_sequences=shape[0]))
    except ConfigError:
        return {}


def _expected(spec: StoreSpec) -> Mapping[str, bytes]:
    return _of_spec(json.dumps(spec.to_dict()), False)


def _ledger(spec: StoreSpec) -> Mapping[str, bytes]:
    return _of_spec(json.dumps(spec.to_dict()), True)


@lru_cache(maxsize=8)
def _of_spec(text: str, ledger: bool) -> Mapping[str, bytes]:
    spec = StoreSpec.from_dict(json.loads(text))
    if not ledger:
        return _metadata(_arrays(spec))
    shape = (spec.n_shards, len(spec.sites) + 1, HEAD_BYTES)
    settings = _table(shape, shape, UINT8, attributes={"columns": columns_of(spec)})
    return _metadata([("ledger", settings)])


def _metadata(arrays: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, bytes]:
    """The `zarr.json` of every group and array below the root, as zarr-python writes it into an empty store."""
    import zarr
    from zarr.storage import MemoryStore

    memory = MemoryStore()
    group = zarr.create_group(memory)
    for name, settings in arrays:
        group.create_array(name, fill_value=0, chunk_key_encoding={"name": "default", "separator": "."}, **settings)
    objects = Objects(memory, read_only=True)
    return {key: bytes(objects.get(key) or b"") for key in objects.list("") if key != "zarr.json"}


def _arrays(spec: StoreSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of every array but the ledger."""
    n_shards, table = spec.n_shards, _table
    for name in TOKEN_ARRAYS:
        shape, chunks = (
            (spec.n_sequences, spec.sequence_length),
            (token_sequences_per_chunk(spec), spec.sequence_length),
        )
        yield f"tokens/{name}", table(shape, chunks, UINT32, dimension_names=("sequence", "position"))
    for name in ROW_ARRAYS:
        yield (
            f"{ROWS}/{name}",
            table((spec.n_rows,), (spec.rows_per_shard,), UINT32, dimension_names=("row",)),
        )
    for column in columns_of(spec):
        length = record_length(spec, column)
        yield f"{column_prefix(column)}/commit", table((n_shards, length), (1, length), UINT8)
    for site in spec.sites:
        line, fields = stats.line_length(site.width), {"fields": list(stats.LINE_FIELDS), "width": site.width}
        prefix = site_prefix(site.name)
        yield f"{prefix}/stats", table((n_shards, line), (1, line), FLOAT64, attributes=fields)
        yield f"{prefix}/total", table((line,), (line,), FLOAT64, attributes=fields)
        for number, array in enumerate(arrays_of(spec, site)):
            attributes = {"dtype": array.element} if number else _about(spec, site)
            yield f"{prefix}/{array.name}", _sharded(spec, array, attributes)


def _table(shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any], **more: Any) -> dict[str, Any]:
    return {"shape": shape, "chunks": chunks, "dtype": dtype, **codecs.TABLE.zarr_codecs(dtype), **more}


def _about(spec: StoreSpec, site: Site) -> dict[str, Any]:
    """What a site is, as attributes of its first array."""
    about: dict[str, Any] = {"dtype": spec.dtype, "hook": site.name, "shape": list(site.shape), "codec": site.codec}
    about |= {"feature_exponents": list(site.feature_exponents)} if site.feature_exponents else {}
    about |= {"meaning": site.meaning.to_dict()} if site.meaning else {}
    return about


def _sharded(spec: StoreSpec, array: codecs.StoredArray, attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        "shape": (spec.n_rows, *array.row_shape),
        "chunks": (spec.rows_per_chunk, *array.row_shape),
        "shards": (spec.rows_per_shard, *array.row_shape),
        "dtype": array.dtype,
        **array.chain.zarr_codecs(array.dtype),
        "attributes": attributes,
        "dimension_names": ("row", "feature")[: 1 + len(array.row_shape)],
    }
