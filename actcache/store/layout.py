"""Format 1 on disk: which arrays there are, under which keys, with which codecs; and the commit record.

    NAME.zarr/                      attributes.actcache = what `Root.attributes` says
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
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError, CorruptShardError, NotAStoreError, StoreNotFoundError, StoreVersionError
from actcache.spec import Site, StoreSpec
from actcache.store import codecs, stats
from actcache.store.binding import binding_in, frame_of
from actcache.store.objects import Objects

FORMAT_VERSION = 1
ROWS = "rows"
ROW_ARRAYS = ("sequence", "position", "token")
TOKEN_ARRAYS = ("ids", "document")
HEAD_BYTES = 48
"""A record's head: sha256 (32), rows (8), stored bytes (8)."""
LEDGER_KEY = "ledger/c.0.0.0"
_INDEX_ENTRY_BYTES = 16
_MOST_ROOT_BYTES = 1 << 22
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
    """sha256 over spec, ledger and totals; only a sealed store has one."""
    digests: tuple[str, ...] = ()
    """sha256 (hex) of the ledger, then of each site's total: by them each is known by itself. Of a sealed store."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How the store came to be (versions, device, batch): for people, and no part of what the fingerprint says."""

    def attributes(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "format_version": FORMAT_VERSION,
            "state": self.state,
            "spec": self.spec.to_dict(),
            "fingerprint": self.fingerprint,
            "digests": list(self.digests),
            **({"provenance": dict(self.provenance)} if self.provenance else {}),
        }


def read_root(objects: Objects) -> Root:
    """The root attributes of the store behind `objects`.

    Raises:
        StoreNotFoundError: nothing is there.
        NotAStoreError: something else is there.
        StoreVersionError: a newer version wrote it.
    """
    data = objects.get("zarr.json") if objects.size("zarr.json") <= _MOST_ROOT_BYTES else memoryview(b"")
    if data is None:
        if objects.exists_any():
            raise NotAStoreError(f"{objects} holds something else, no activation store; name another place")
        raise StoreNotFoundError(f"no activation store at {objects}; make one with 'actcache extract --out {objects}'")
    try:
        attributes = json.loads(bytes(data))["attributes"]["actcache"]
        version = attributes["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotAStoreError(f"{objects} is no activation store: its zarr.json has no 'actcache' attributes") from None
    if type(version) is not int or not 0 < version <= FORMAT_VERSION:
        raise StoreVersionError(
            f"{objects} has format version {str(version)[:40]}, this actcache reads up to {FORMAT_VERSION}; "
            "upgrade actcache"
        )
    try:
        return _root(attributes)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptShardError(f"the attributes of {objects} are damaged: {str(error)[:300]}") from None


def _root(attributes: dict[str, Any]) -> Root:
    """The root that `Root.attributes` described; KeyError, TypeError or ValueError when it is not legal."""
    root = Root(
        state=attributes["state"],
        spec=StoreSpec.from_dict(attributes["spec"]),
        fingerprint=attributes["fingerprint"],
        digests=tuple(attributes["digests"]),
        provenance=attributes.get("provenance", {}),
    )
    if not isinstance(root.provenance, dict):
        raise ValueError("its provenance is no mapping")
    if root.state not in ("creating", "open", "sealed"):
        raise ValueError(f"there is no state {root.state!r}")
    if root.state != "sealed" and (root.fingerprint is not None or root.digests):
        raise ValueError(f"its state is {root.state!r}, and yet it has the fingerprint of a sealed store")
    if root.state == "sealed" and len(root.digests) != len(columns(root.spec)):
        raise ValueError(f"{len(columns(root.spec))} digests belong there, it has {len(root.digests)}")
    for site in root.spec.sites:
        codecs.chain_of(site.codec).stored_dtype(root.spec.dtype)
    return root


def write_root(objects: Objects, root: Root) -> None:
    """Put the root attributes: one atomic put, which is what makes a store open or sealed."""
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": {"actcache": root.attributes()}}
    data = json.dumps(metadata, indent=2).encode()
    if len(data) > _MOST_ROOT_BYTES // 4:  # long lists of exponents, a line each
        data = json.dumps(metadata, separators=(",", ":")).encode()
    if len(data) > _MOST_ROOT_BYTES:
        raise ConfigError(
            f"what {objects} holds takes {len(data):,} bytes to describe, at most {_MOST_ROOT_BYTES:,} are possible; "
            "spread the sites over several stores"
        )
    objects.commit([("zarr.json", data)])


@lru_cache(maxsize=4096)  # asked for with every chunk
def site_prefix(site: str) -> str:
    """Where a site's arrays lie. A hook name may hold anything: all that could make a path of it is percent-encoded."""
    name = quote(site, safe=":@+,=()[] ")
    # Dots alone lead elsewhere, and zarr.json is the group's own metadata.
    return "sites/" + (name.replace(".", "%2E") if not name.strip(".") or name == "zarr.json" else name)


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
    shards = (parts[1] for parts in names if len(parts) == 3 and parts[0] == "c" and parts[2] == "0")
    return {int(shard) for shard in shards if shard.isdecimal() and shard == str(int(shard))}


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
    binding: bytes = b""
    """Of a site's record: what its shard belongs to, see `binding.py`; empty where that is not said."""

    def to_bytes(self, length: int) -> bytes:
        """The record's values as stored, padded with zeros to `length` bytes."""
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


def array_chain(site: Site, array: str) -> codecs.Chain:
    """The codecs of a sharded array's chunks; scales are stored as they are."""
    return codecs.chain_of(site.codec if array == "acts" else "raw")


def array_dtype(spec: StoreSpec, site: Site, array: str) -> np.dtype[Any]:
    """The dtype in a sharded array; scales are the bits of bfloat16 numbers."""
    return array_chain(site, array).stored_dtype(spec.dtype if array == "acts" else "bfloat16")


def encode_table(values: NDArray[Any]) -> tuple[int, bytes]:
    """One whole chunk of a table array as it is stored, and its crc32c."""
    payload, crc = codecs.TABLE.encode(np.ascontiguousarray(values))
    return crc, bytes(payload) + codecs.crc_bytes(crc)


def put_table(objects: Objects, key: str, values: NDArray[Any]) -> tuple[int, int]:
    """Store one whole chunk of a table array; its crc32c and stored bytes."""
    crc, data = encode_table(values)
    objects.put(key, data)
    return crc, len(data)


def get_table(
    objects: Objects, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, at_least: int = 0
) -> tuple[NDArray[Any], int]:
    """One whole chunk of a table array and its crc32c; stored in `at_least` so many bytes.

    Raises:
        CorruptShardError: the object is missing or damaged; never answered with fill values.
    """
    values, stored = _get_stored_table(objects, key, shape, dtype, at_least=at_least)
    return values, codecs.checksum_of(stored)


def _get_stored_table(
    objects: Objects, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], *, at_least: int = 0
) -> tuple[NDArray[Any], memoryview]:
    """See `get_table`; with the stored bytes."""
    most = math.prod(shape) * dtype.itemsize * 9 // 8 + (1 << 16)
    too_long = objects.is_local and objects.size(key) > most  # nothing of that size is even read
    stored = memoryview(b"") if too_long else objects.get(key)
    if stored is None:
        raise CorruptShardError(f"{key} of {objects} is missing; run 'actcache verify {objects}'")
    if len(stored) < at_least or too_long:
        raise CorruptShardError(f"{key} of {objects} has another length; run 'actcache verify {objects}'")
    out = np.empty(shape, dtype)
    problem = codecs.TABLE.decode_into(stored, out)
    if problem:
        raise CorruptShardError(f"{key} of {objects} {problem}; run 'actcache verify {objects}'")
    return out, stored


def sha256_of(values: NDArray[Any]) -> str:
    """sha256 (hex) of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def index_of(sizes: list[int], n_chunks: int) -> NDArray[np.uint64]:
    """The `(n_chunks, 2)` shard index for chunks of these stored sizes laid end to end; absent chunks are all ones."""
    index = np.full((n_chunks, 2), ABSENT_CHUNK, "<u8")
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum([0, *sizes])[:-1]
    return index


def index_bytes(spec: StoreSpec) -> int:
    """Stored bytes of a shard's index, its crc32c included."""
    return chunks_per_shard(spec) * _INDEX_ENTRY_BYTES + codecs.CRC_BYTES


def record_object(spec: StoreSpec, column: str, shard: int, record: Record) -> tuple[str, bytes]:
    """Key and bytes of a commit record as it is stored."""
    data = record.to_bytes(record_length(spec, column))
    if not record.binding:
        return commit_key(column, shard), encode_table(np.frombuffer(data, np.uint8)[None])[1]
    frame = frame_of(data, record.binding)
    crc = codecs.chain_of("raw").encode(np.frombuffer(frame, np.uint8))[1]
    return commit_key(column, shard), frame + codecs.crc_bytes(crc)


def read_record(objects: Objects, spec: StoreSpec, column: str, shard: int) -> Record:
    """The commit record of a shard's column.

    Raises:
        CorruptShardError: it is missing or damaged.
    """
    key, length = commit_key(column, shard), record_length(spec, column)
    values, stored = _get_stored_table(objects, key, (1, length), UINT8)
    try:
        binding = b"" if column == ROWS else binding_in(stored[: -codecs.CRC_BYTES], length)
        record = replace(Record.from_bytes(values.tobytes()), binding=binding)
        if record.n_rows > len(spec.shard_rows(shard)):
            raise ValueError(f"it lists {record.n_rows} rows, the shard has room for {len(spec.shard_rows(shard))}")
    except ValueError as error:
        raise CorruptShardError(f"{key} of {objects}: {error}; run 'actcache verify {objects}'") from None
    return record


def read_total(objects: Objects, site: Site) -> NDArray[np.float64]:
    """The merged statistics line of a site of a sealed store."""
    return get_table(objects, total_key(site.name), (stats.line_length(site.width),), FLOAT64)[0]


def read_ledger(objects: Objects, spec: StoreSpec) -> NDArray[np.uint8]:
    """`(S, C, 48)` heads of all records of a sealed store.

    Raises:
        CorruptShardError: it is missing, damaged, or lists what cannot be.
    """
    shape = (spec.n_shards, len(spec.sites) + 1, HEAD_BYTES)
    # Digests cannot be compressed, and those of the row tables all differ.
    ledger, _ = get_table(objects, LEDGER_KEY, shape, UINT8, at_least=32 * spec.n_shards)
    n_rows = ledger[:, :, 32:40].copy().view("<u8")[:, :, 0]
    room = np.full((spec.n_shards, 1), spec.rows_per_shard, np.uint64)
    room[-1] = len(spec.shard_rows(spec.n_shards - 1))
    if (n_rows > room).any() or (n_rows != n_rows[:, :1]).any():
        raise CorruptShardError(
            f"{LEDGER_KEY} of {objects} lists numbers of rows that cannot be; run 'actcache verify {objects}'"
        )
    return ledger
