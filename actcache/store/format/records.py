"""Commit records: what a shard has, with the checksum of each stored piece; the ledger and totals of a sealed store.

A record lists the crc32c of every chunk, of the index and of the statistics. With each object's own checksum alone, an
object that is whole but swapped with another, or left from an older store, would be read without complaint. Ledger and
totals are written at sealing, so that opening a sealed store and asking for statistics reads two small objects instead
of one a shard.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError
from actcache.spec import Site, StoreSpec
from actcache.store import codecs
from actcache.store.backends.objects import Objects
from actcache.store.format import stats
from actcache.store.format.binding import binding_in, frame_of
from actcache.store.format.keys import LEDGER_KEY, ROW_ARRAYS, ROWS, column_prefix, commit_key, total_key
from actcache.store.format.site_arrays import arrays_of, chunks_per_shard
from actcache.store.format.table_objects import FLOAT64, UINT8, encode_table, get_stored_table, get_table

HEAD_BYTES = 48
"""A record's head: sha256 (32), rows (8), stored bytes (8)."""


def committed_shards(objects: Objects, column: str) -> set[int]:
    """Shards whose record lies there, for one column."""
    names = (name.split(".") for name in objects.names(f"{column_prefix(column)}/commit"))
    shards = (parts[1] for parts in names if len(parts) == 3 and parts[0] == "c" and parts[2] == "0")
    return {int(shard) for shard in shards if shard.isdecimal() and shard == str(int(shard))}


def record_length(spec: StoreSpec, column: str) -> int:
    """L, bytes of a commit record: its head, then the crc32c of each stored piece.

    For a site those of its first array (each chunk, then the index), of the statistics line, and of its other arrays
    (likewise); for the row table those of its three arrays.
    """
    if column == ROWS:
        return HEAD_BYTES + codecs.CRC_BYTES * len(ROW_ARRAYS)
    arrays = arrays_of(spec, spec.site(column))
    return HEAD_BYTES + codecs.CRC_BYTES * (1 + len(arrays) * (chunks_per_shard(spec) + 1))


def checksum_place(spec: StoreSpec, array: int, chunk: int) -> int:
    """Which of a record's checksums is that of a chunk of a site's array, or (`chunks_per_shard`) of its index.

    `array` is its number among the site's arrays.
    """
    return array * (chunks_per_shard(spec) + 1) + bool(array) + chunk


def stats_place(spec: StoreSpec) -> int:
    """Which of a record's checksums is that of the statistics line."""
    return chunks_per_shard(spec) + 1


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


def record_object(spec: StoreSpec, column: str, shard: int, record: Record) -> tuple[str, bytes]:
    """Key and bytes of a commit record as it is stored."""
    data = record.to_bytes(record_length(spec, column))
    if not record.binding:
        return commit_key(column, shard), encode_table(np.frombuffer(data, np.uint8)[None])[1]
    frame = frame_of(data, record.binding)
    crc = codecs.RAW.encode(np.frombuffer(frame, np.uint8))[1]
    return commit_key(column, shard), frame + codecs.crc_bytes(crc)


def read_record(objects: Objects, spec: StoreSpec, column: str, shard: int) -> Record:
    """The commit record of a shard's column.

    Raises:
        CorruptShardError: it is missing or damaged.
    """
    key, length = commit_key(column, shard), record_length(spec, column)
    values, stored = get_stored_table(objects, key, (1, length), UINT8)
    try:
        binding = b"" if column == ROWS else binding_in(stored[: -codecs.CRC_BYTES], length)
        record = replace(Record.from_bytes(values.tobytes()), binding=binding)
        if record.n_rows > len(spec.shard_rows(shard)):
            raise ValueError(f"it lists {record.n_rows} rows, the shard has room for {len(spec.shard_rows(shard))}")
    except ValueError as error:
        raise CorruptShardError(f"{key} of {objects}: {error}", store=objects) from None
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
        raise CorruptShardError(f"{LEDGER_KEY} of {objects} lists impossible numbers of rows", store=objects)
    return ledger
