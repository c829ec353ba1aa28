"""Format 1 on disk: which arrays there are, under which keys, with which codecs; and the commit record.

    NAME.zarr/                      attributes.actcache = {format_version, state, spec, fingerprint}
    ├── tokens/{ids, document}      (Q, T) uint32     a store is born with its tokens, in extraction order
    ├── rows/{sequence, position, token}  (N,) uint32 where each row came from; one chunk a shard
    ├── rows/commit                 (S, L) uint8      one record a shard
    ├── sites/<hook>/acts           (N, D)            one sharded object a shard
    ├── sites/<hook>/scale          (N,) uint16       of quantised sites: one scale a row, sharded like `acts`
    ├── sites/<hook>/stats          (S, 3 D + 6)      one line a shard, see `stats.py`
    ├── sites/<hook>/commit         (S, L) uint8      one record a shard; a shard counts iff all its records are there
    ├── sites/<hook>/total          (3 D + 6,)        the merged line, written when the store is sealed
    └── ledger                      (S, C, 48) uint8  all records' heads in one object, written when the store is sealed

Columns are `rows` and then the sites. Every chunk of every array ends in a crc32c; a commit record lists those
checksums, so a chunk that is whole but belongs somewhere else is noticed too. Chunk keys have dots (`c.17.0`), so that
a folder of ten thousand shards is one folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError, NotAStoreError, StoreNotFoundError, StoreVersionError
from actcache.spec import Site, StoreSpec
from actcache.store import codecs, stats
from actcache.store.objects import Objects

FORMAT_VERSION = 1
ROWS = "rows"
ROW_ARRAYS = ("sequence", "position", "token")
TOKEN_ARRAYS = ("ids", "document")
HEAD_BYTES = 48
"""A record's head: sha256 (32), rows (8), stored bytes (8)."""
LEDGER_KEY = "ledger/c.0.0.0"
_INDEX_ENTRY_BYTES = 16
_MOST_ROOT_BYTES = 1 << 26
ABSENT_CHUNK = np.iinfo(np.uint64).max
"""Offset and size of a chunk that a shard does not have, as the sharding codec defines it."""
ABSENT_ROW = np.iinfo(np.uint32).max
"""What the row table says for row ids that a shard leaves out."""
UINT8, UINT32, FLOAT64 = np.dtype("u1"), np.dtype("<u4"), np.dtype("<f8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    """The root attributes: what a store says of itself."""

    state: str
    """`creating` (not yet usable), `open` (shards are being added) or `sealed` (finished)."""
    spec: StoreSpec
    """What the store holds."""
    fingerprint: str | None = None
    """sha256 over spec and ledger; only a sealed store has one."""

    def attributes(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "format_version": FORMAT_VERSION,
            "state": self.state,
            "spec": self.spec.to_dict(),
            "fingerprint": self.fingerprint,
        }


def read_root(objects: Objects) -> Root:
    """The root attributes of the store behind `objects`.

    Raises:
        StoreNotFoundError: nothing is there.
        NotAStoreError: something else is there.
        StoreVersionError: a newer version wrote it.
    """
    data = objects.get("zarr.json")
    if data is None:
        if objects.exists_any():
            raise NotAStoreError(f"{objects} holds something else, no activation store; name another place")
        raise StoreNotFoundError(f"no activation store at {objects}; make one with 'actcache extract --out {objects}'")
    try:
        if len(data) > _MOST_ROOT_BYTES:
            raise ValueError
        attributes = json.loads(bytes(data))["attributes"]["actcache"]
        version = attributes["format_version"]
    except (ValueError, KeyError, TypeError):
        raise NotAStoreError(f"{objects} is no activation store: its zarr.json has no 'actcache' attributes") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreVersionError(
            f"{objects} has format version {version}, this actcache reads up to {FORMAT_VERSION}; upgrade actcache"
        )
    try:
        spec = StoreSpec.from_dict(attributes["spec"])
        return Root(state=attributes["state"], spec=spec, fingerprint=attributes["fingerprint"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptShardError(f"the attributes of {objects} are damaged: {error}") from error


def write_root(objects: Objects, root: Root) -> None:
    """Put the root attributes: one atomic put, which is what makes a store open or sealed."""
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": {"actcache": root.attributes()}}
    objects.put("zarr.json", json.dumps(metadata, indent=2).encode())


def site_prefix(site: str) -> str:
    """Where a site's arrays lie. A hook name may hold anything: all that could make a path of it is percent-encoded."""
    name = quote(site, safe=":@+,=()[] ")
    return "sites/" + (name if name.strip(".") else name.replace(".", "%2E"))


def column_prefix(column: str) -> str:
    """Where a column's arrays lie."""
    return ROWS if column == ROWS else site_prefix(column)


def sharded_key(site: str, array: str, shard: int) -> str:
    """The sharded object of a site's shard; `array` is `acts` or `scale`."""
    return f"{site_prefix(site)}/{array}/c.{shard}" + (".0" if array == "acts" else "")


def stats_key(site: str, shard: int) -> str:
    """The statistics line of a site's shard."""
    return f"{site_prefix(site)}/stats/c.{shard}.0"


def total_key(site: str) -> str:
    """The merged statistics of a site."""
    return f"{site_prefix(site)}/total/c.0"


def row_key(array: str, shard: int) -> str:
    """One array of the row table, for a shard."""
    return f"{ROWS}/{array}/c.{shard}"


def token_key(array: str, chunk: int) -> str:
    """One chunk of a token array."""
    return f"tokens/{array}/c.{chunk}.0"


def commit_key(column: str, shard: int) -> str:
    """The record whose presence makes a shard's column count."""
    return f"{column_prefix(column)}/commit/c.{shard}.0"


def committed_shards(objects: Objects, column: str) -> set[int]:
    """Shards whose record lies there, for one column."""
    names = (name.split(".") for name in objects.names(f"{column_prefix(column)}/commit"))
    return {int(parts[1]) for parts in names if len(parts) == 3 and parts[0] == "c" and parts[1].isdecimal()}


def columns(spec: StoreSpec) -> list[str]:
    """Names of the columns: what a shard is committed by."""
    return [ROWS, *(site.name for site in spec.sites)]


def arrays_of(site: Site) -> tuple[str, ...]:
    """The sharded arrays of a site."""
    return ("acts", "scale") if codecs.chain_of(site.codec).quantised else ("acts",)


def exponents_of(site: Site) -> NDArray[np.int8] | None:
    """`(D,)` powers of two that the features of a quantised site are multiplied by; None for none."""
    return np.array(site.feature_exponents, np.int8) if site.feature_exponents else None


def chunks_per_shard(spec: StoreSpec) -> int:
    """Inner chunks of a shard."""
    return spec.rows_per_shard // spec.rows_per_chunk


def record_length(spec: StoreSpec, column: str) -> int:
    """L, bytes of a commit record: its head, then the crc32c of each stored piece.

    For a site those of `acts` (each chunk, then the index), of the statistics line, and of `scale` (likewise) if it is
    quantised; for the row table those of its three arrays.
    """
    if column == ROWS:
        return HEAD_BYTES + codecs.CRC_BYTES * len(ROW_ARRAYS)
    arrays = arrays_of(spec.site(column))
    return HEAD_BYTES + codecs.CRC_BYTES * (1 + len(arrays) * (chunks_per_shard(spec) + 1))


def checksum_place(spec: StoreSpec, array: str, chunk: int) -> int:
    """Which of a record's checksums is that of a sharded array's chunk, or (`chunks_per_shard`) of its index."""
    return chunk if array == "acts" else chunks_per_shard(spec) + 2 + chunk


def stats_place(spec: StoreSpec) -> int:
    """Which of a record's checksums is that of the statistics line."""
    return chunks_per_shard(spec) + 1


def token_sequences_per_chunk(spec: StoreSpec) -> int:
    """Sequences in a chunk of the token arrays: whole shards, about a megabyte."""
    per_shard = spec.sequences_per_shard
    return per_shard * max(1, (1 << 18) // (per_shard * spec.sequence_length))


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A commit record: how many rows and bytes a shard's column has, and the crc32c of each of its stored pieces."""

    n_rows: int
    n_bytes: int
    checksums: tuple[int, ...]

    def to_bytes(self, length: int) -> bytes:
        """The record as stored, padded with zeros to `length` bytes."""
        body = np.array([self.n_rows, self.n_bytes], "<u8").tobytes()
        body += np.array(self.checksums, "<u4").tobytes()
        body = body.ljust(length - 32, b"\0")
        return hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The record that `to_bytes` wrote; ValueError when it is damaged."""
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise ValueError("the commit record does not match its digest")
        n_rows, n_bytes = np.frombuffer(data[32:HEAD_BYTES], "<u8").tolist()
        return cls(n_rows=n_rows, n_bytes=n_bytes, checksums=tuple(np.frombuffer(data[HEAD_BYTES:], "<u4").tolist()))


def write_metadata(objects: Objects, spec: StoreSpec) -> None:
    """Put the metadata of every array that lacks it or has grown; nothing happens when all is as the spec says."""
    for key, wanted in _metadata(_arrays(spec)).items():
        stored = objects.get(key)
        found = None if stored is None else json.loads(bytes(stored))
        if found is None:
            objects.put(key, wanted)
        elif found.get("shape") != json.loads(wanted).get("shape"):
            objects.put(key, json.dumps({**found, "shape": json.loads(wanted)["shape"]}, indent=2).encode())


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
        yield f"{ROWS}/{name}", table((spec.n_rows,), (spec.rows_per_shard,), UINT32, dimension_names=("row",))
    for column in columns(spec):
        length = record_length(spec, column)
        yield f"{column_prefix(column)}/commit", table((n_shards, length), (1, length), UINT8)
    for site in spec.sites:
        line, fields = stats.line_length(site.width), {"fields": list(stats.LINE_FIELDS), "width": site.width}
        prefix = site_prefix(site.name)
        yield f"{prefix}/stats", table((n_shards, line), (1, line), FLOAT64, attributes=fields)
        yield f"{prefix}/total", table((line,), (line,), FLOAT64, attributes=fields)
        for array in arrays_of(site):
            yield f"{prefix}/{array}", _sharded(spec, site, array)


def _table(shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any], **more: Any) -> dict[str, Any]:
    return {"shape": shape, "chunks": chunks, "dtype": dtype, **codecs.TABLE.zarr_codecs(dtype), **more}


def _sharded(spec: StoreSpec, site: Site, array: str) -> dict[str, Any]:
    width = (site.width,) if array == "acts" else ()
    chain, dtype = array_chain(site, array), array_dtype(spec, site, array)
    about = {"dtype": spec.dtype, "hook": site.name, "shape": list(site.shape), "codec": site.codec}
    about |= {"feature_exponents": list(site.feature_exponents)} if site.feature_exponents else {}
    return {
        "shape": (spec.n_rows, *width),
        "chunks": (spec.rows_per_chunk, *width),
        "shards": (spec.rows_per_shard, *width),
        "dtype": dtype,
        **chain.zarr_codecs(dtype),
        "attributes": about if array == "acts" else {"dtype": "bfloat16"},
        "dimension_names": ("row", "feature")[: 1 + len(width)],
    }


def array_chain(site: Site, array: str) -> codecs.Chain:
    """The codecs of a sharded array's chunks; scales are stored as they are."""
    return codecs.chain_of(site.codec if array == "acts" else "raw")


def array_dtype(spec: StoreSpec, site: Site, array: str) -> np.dtype[Any]:
    """The dtype in a sharded array; scales are the bits of bfloat16 numbers."""
    return array_chain(site, array).stored_dtype(spec.dtype if array == "acts" else "bfloat16")


def put_ledger(objects: Objects, spec: StoreSpec, ledger: NDArray[np.uint8]) -> None:
    """Store the ledger, metadata and all: its one chunk has the shape of the whole, which differs after growth."""
    settings = _table(ledger.shape, ledger.shape, UINT8, attributes={"columns": columns(spec)})
    for key, data in _metadata([("ledger", settings)]).items():
        objects.put(key, data)
    put_table(objects, LEDGER_KEY, ledger)


def encode_table(values: NDArray[Any]) -> tuple[int, bytes]:
    """One whole chunk of a table array as it is stored, and its crc32c."""
    payload, crc = codecs.TABLE.encode(np.ascontiguousarray(values))
    return crc, bytes(payload) + codecs.crc_bytes(crc)


def put_table(objects: Objects, key: str, values: NDArray[Any]) -> tuple[int, int]:
    """Store one whole chunk of a table array; its crc32c and stored bytes."""
    crc, data = encode_table(values)
    objects.put(key, data)
    return crc, len(data)


def get_table(objects: Objects, key: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[NDArray[Any], int]:
    """One whole chunk of a table array and its crc32c.

    Raises:
        CorruptShardError: the object is missing or damaged; never answered with fill values.
    """
    stored = objects.get(key)
    if stored is None:
        raise CorruptShardError(f"{key} of {objects} is missing; run 'actcache verify {objects}'")
    out = np.empty(shape, dtype)
    problem = codecs.TABLE.decode_into(stored, out)
    if problem:
        raise CorruptShardError(f"{key} of {objects} {problem}; run 'actcache verify {objects}'")
    return out, codecs.checksum_of(stored)


def index_of(sizes: list[int], n_chunks: int) -> NDArray[np.uint64]:
    """The `(n_chunks, 2)` shard index for chunks of these stored sizes laid end to end; absent chunks are all ones."""
    index = np.full((n_chunks, 2), ABSENT_CHUNK, "<u8")
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum([0, *sizes])[:-1]
    return index


def index_bytes(spec: StoreSpec) -> int:
    """Stored bytes of a shard's index, its crc32c included."""
    return chunks_per_shard(spec) * _INDEX_ENTRY_BYTES + codecs.CRC_BYTES


def read_record(objects: Objects, spec: StoreSpec, column: str, shard: int) -> Record:
    """The commit record of a shard's column.

    Raises:
        CorruptShardError: it is missing or damaged.
    """
    key, shape = commit_key(column, shard), (1, record_length(spec, column))
    data = get_table(objects, key, shape, UINT8)[0].tobytes()
    try:
        return Record.from_bytes(data)
    except ValueError as error:
        raise CorruptShardError(f"{key} of {objects}: {error}; run 'actcache verify {objects}'") from None


def read_total(objects: Objects, site: Site) -> NDArray[np.float64]:
    """The merged statistics line of a site of a sealed store."""
    return get_table(objects, total_key(site.name), (stats.line_length(site.width),), FLOAT64)[0]


def read_ledger(objects: Objects, spec: StoreSpec) -> NDArray[np.uint8]:
    """`(S, C, 48)` heads of all records of a sealed store."""
    return get_table(objects, LEDGER_KEY, (spec.n_shards, len(spec.sites) + 1, HEAD_BYTES), UINT8)[0]
