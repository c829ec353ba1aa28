"""Format 1 on disk: which arrays there are, under which keys, with which codecs; and the commit record.

    NAME.zarr/                      attributes.actcache = {format_version, state, spec, fingerprint}
    ├── tokens/{ids, document}      (Q, T) uint32     a store is born with its tokens, in extraction order
    ├── rows/{sequence, position, token}  (N,) uint32 where each row came from; one chunk a shard
    ├── sites/<hook>/acts           (N, D)            one sharded object a shard
    ├── sites/<hook>/stats          (S, 3 D + 6)      one line a shard, see `stats.py`
    ├── sites/<hook>/total          (3 D + 6,)        the merged line, written when the store is sealed
    ├── commit                      (S, C, L) uint8   one record a shard and column; a shard counts iff they are there
    └── ledger                      (S, C, 48) uint8  all records' heads in one object, written when the store is sealed

Columns are `rows` and then the sites. Every chunk of every array ends in a crc32c; a commit record lists those
checksums, so a chunk that is whole but belongs somewhere else is noticed too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError, NotAStoreError, StoreNotFoundError, StoreVersionError
from actcache.spec import StoreSpec
from actcache.store import codecs, stats
from actcache.store.objects import Objects

FORMAT_VERSION = 1
ROWS = "rows"
ROW_ARRAYS = ("sequence", "position", "token")
TOKEN_ARRAYS = ("ids", "document")
HEAD_BYTES = 48
"""A record's head: sha256 (32), rows (8), stored bytes (8)."""
_INDEX_ENTRY_BYTES = 16
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
        if objects.root is not None and objects.root.exists() and not is_vacant(objects):
            raise NotAStoreError(f"{objects} holds something else, no activation store; name another place")
        raise StoreNotFoundError(f"no activation store at {objects}; make one with 'actcache extract --out {objects}'")
    try:
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


def is_vacant(objects: Objects) -> bool:
    """True when nothing at all lies there (an empty folder counts as nothing)."""
    return objects.root is None or not objects.root.exists() or not any(objects.root.iterdir())


def site_prefix(site: str) -> str:
    """Where a site's arrays lie. Hook names may hold no path: separators are written as `%2F`."""
    return "sites/" + site.replace("%", "%25").replace("/", "%2F").replace("\\", "%5C")


def acts_key(site: str, shard: int) -> str:
    """The sharded object of a site's shard."""
    return f"{site_prefix(site)}/acts/c/{shard}/0"


def stats_key(site: str, shard: int) -> str:
    """The statistics line of a site's shard."""
    return f"{site_prefix(site)}/stats/c/{shard}/0"


def row_key(array: str, shard: int) -> str:
    """One array of the row table, for a shard."""
    return f"{ROWS}/{array}/c/{shard}"


def commit_key(shard: int, column: int) -> str:
    """The record whose presence makes a shard's column count."""
    return f"commit/c/{shard}/{column}/0"


def columns(spec: StoreSpec) -> list[str]:
    """Names of the columns of `commit` and `ledger`."""
    return [ROWS, *(site.name for site in spec.sites)]


def chunks_per_shard(spec: StoreSpec) -> int:
    """Inner chunks of a shard."""
    return spec.rows_per_shard // spec.rows_per_chunk


def record_length(spec: StoreSpec) -> int:
    """L, bytes of a commit record: the head, then crc32c of each chunk, of the index and of the statistics line."""
    return HEAD_BYTES + codecs.CRC_BYTES * max(chunks_per_shard(spec) + 2, len(ROW_ARRAYS))


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


def create_arrays(objects: Objects, spec: StoreSpec) -> None:
    """Write the metadata of every array, through zarr-python, so that any Zarr v3 reader can open them."""
    import zarr

    group = zarr.open_group(objects.store, mode="r+")

    def table(name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype[Any], **extra: Any) -> None:
        chain = codecs.zarr_codecs(codecs.TABLE, dtype)
        group.create_array(
            name, overwrite=True, shape=shape, chunks=chunks, dtype=dtype, compressors=chain, fill_value=0, **extra
        )

    n_columns, length = len(spec.sites) + 1, record_length(spec)
    for name in TOKEN_ARRAYS:
        chunks = (min(token_sequences_per_chunk(spec), spec.n_sequences), spec.sequence_length)
        shape = (spec.n_sequences, spec.sequence_length)
        table(f"tokens/{name}", shape, chunks, UINT32, dimension_names=("sequence", "position"))
    for name in ROW_ARRAYS:
        table(f"{ROWS}/{name}", (spec.n_rows,), (spec.rows_per_shard,), UINT32, dimension_names=("row",))
    names = {"attributes": {"columns": columns(spec)}}
    table("commit", (spec.n_shards, n_columns, length), (1, 1, length), UINT8, **names)
    table("ledger", (spec.n_shards, n_columns, HEAD_BYTES), (spec.n_shards, n_columns, HEAD_BYTES), UINT8, **names)
    for site in spec.sites:
        prefix, line = site_prefix(site.name), stats.line_length(site.width)
        fields = {"attributes": {"fields": list(stats.LINE_FIELDS), "width": site.width}}
        table(f"{prefix}/stats", (spec.n_shards, line), (1, line), FLOAT64, **fields)
        table(f"{prefix}/total", (line,), (line,), FLOAT64, **fields)
        dtype = codecs.STORED_DTYPE[spec.dtype]
        group.create_array(
            f"{prefix}/acts",
            overwrite=True,
            shape=(spec.n_rows, site.width),
            chunks=(spec.rows_per_chunk, site.width),
            shards=(spec.rows_per_shard, site.width),
            dtype=dtype,
            compressors=codecs.zarr_codecs(codecs.preset(spec.codec), dtype),
            fill_value=0,
            attributes={"dtype": spec.dtype, "hook": site.name, "shape": list(site.shape)},
            dimension_names=("row", "feature"),
        )


def put_table(objects: Objects, key: str, values: NDArray[Any]) -> tuple[int, int]:
    """Store one whole chunk of a table array; its crc32c and stored bytes."""
    payload, crc = codecs.encode(np.ascontiguousarray(values), codecs.TABLE)
    data = payload + codecs.crc_bytes(crc)
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
    problem = codecs.decode_into(stored, out, codecs.TABLE)
    if problem:
        raise CorruptShardError(f"{key} of {objects} {problem}; run 'actcache verify {objects}'")
    return out, codecs.checksum_of(stored)


def index_of(sizes: list[int], n_chunks: int) -> NDArray[np.uint64]:
    """The `(n_chunks, 2)` shard index for chunks of these stored sizes laid end to end; absent chunks are all ones."""
    index = np.full((n_chunks, 2), np.iinfo(np.uint64).max, "<u8")
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return index


def index_bytes(spec: StoreSpec) -> int:
    """Stored bytes of a shard's index, its crc32c included."""
    return chunks_per_shard(spec) * _INDEX_ENTRY_BYTES + codecs.CRC_BYTES


def fingerprint(spec: StoreSpec, ledger: NDArray[np.uint8], totals: list[NDArray[np.float64]]) -> str:
    """sha256 over the spec and everything that the records say: equal stores have equal fingerprints."""
    digest = hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode())
    for part in (ledger, *totals):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def sealed(root: Root, mark: str) -> Root:
    """The root of the finished store."""
    return replace(root, state="sealed", fingerprint=mark)
