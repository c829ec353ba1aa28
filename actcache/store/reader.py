"""Open a store and read from it: rows, tokens, statistics, or single chunks into a caller's buffer.

Every byte that is handed out has been checked: the chunk's own crc32c, and that this crc32c is the one which the
shard's commit record lists, so that whole but misplaced objects (swapped, stale, of another store) are noticed as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError, SiteError, StoreError, StoreIncompleteError, StoreNotFoundError
from actcache.spec import StoreSpec, expand_names
from actcache.store import codecs, layout
from actcache.store.objects import Objects
from actcache.store.stats import SiteStats, line_length, merge, stats_of

if TYPE_CHECKING:
    import dask.array
    import torch


def open_store(path: str | Path | Objects) -> Store:
    """Open a store for reading; an unfinished one shows the shards committed at this moment.

    Raises:
        StoreNotFoundError: nothing is there. NotAStoreError: something else is. StoreVersionError: it is too new.
    """
    objects = path if isinstance(path, Objects) else Objects(path, read_only=True)
    root = layout.read_root(objects)
    if root.state == "creating":
        raise StoreNotFoundError(
            f"the store at {objects} was never finished being created; run 'actcache extract' again"
        )
    return Store(objects, root)


class Store:
    """An activation store, open for reading. Global row `r` lies in shard `r // spec.rows_per_shard`."""

    def __init__(self, objects: Objects, root: layout.Root) -> None:
        self.objects, self.root = objects, root
        self.spec: StoreSpec = root.spec
        self.fingerprint: str | None = root.fingerprint
        self._compression = codecs.preset(self.spec.codec)
        self.stored_dtype = codecs.STORED_DTYPE[self.spec.dtype]
        self.use_ledger = True
        self._records: dict[tuple[int, int], layout.Record] = {}
        self._indexes: dict[tuple[str, int], NDArray[np.uint64]] = {}

    def __repr__(self) -> str:
        return f"Store({str(self.objects)!r}, {self.n_rows:,} of {self.spec.n_rows:,} rows, {len(self.sites)} sites)"

    @property
    def path(self) -> str:
        """Where the store lies."""
        return str(self.objects)

    @property
    def sealed(self) -> bool:
        """True when every shard is committed and the fingerprint is written."""
        return self.root.state == "sealed"

    @property
    def sites(self) -> list[str]:
        """Names of the sites, in stored order."""
        return [site.name for site in self.spec.sites]

    @property
    def n_rows(self) -> int:
        """Rows that can be read now."""
        return sum(len(self.spec.shard_rows(shard)) for shard in self.committed)

    @cached_property
    def ledger(self) -> NDArray[np.uint8]:
        """`(S, C, 48)` heads of all records, of a sealed store."""
        shape = (self.spec.n_shards, len(self.spec.sites) + 1, layout.HEAD_BYTES)
        return layout.get_table(self.objects, "ledger/c/0/0/0", shape, layout.UINT8)[0]

    @cached_property
    def committed(self) -> list[int]:
        """Shards whose every column is committed."""
        if self.sealed:
            return list(range(self.spec.n_shards))
        return sorted(committed_columns(self.objects, self.spec, complete=True))

    def record(self, column: str, shard: int) -> layout.Record:
        """The commit record of a shard's column.

        Raises:
            CorruptShardError: it is missing or damaged. StoreIncompleteError: the shard is not committed yet.
        """
        number = layout.columns(self.spec).index(column)
        if (number, shard) not in self._records:
            if not self.sealed and shard not in self.committed:
                raise StoreIncompleteError(
                    f"shard {shard} of {self.path} is not written yet; finish 'actcache extract'"
                )
            shape = (1, 1, layout.record_length(self.spec))
            data = layout.get_table(self.objects, layout.commit_key(shard, number), shape, layout.UINT8)[0].tobytes()
            if self.sealed and self.use_ledger and data[: layout.HEAD_BYTES] != self.ledger[shard, number].tobytes():
                raise self.corrupt(column, shard, "has a commit record that differs from the ledger")
            try:
                self._records[number, shard] = layout.Record.from_bytes(data)
            except ValueError as error:
                raise self.corrupt(column, shard, str(error)) from None
        return self._records[number, shard]

    def corrupt(self, column: str, shard: int, reason: str) -> CorruptShardError:
        """The error that names a shard's column and what is wrong with it."""
        return CorruptShardError(
            f"shard {shard} of {column} in {self.path} {reason}; run 'actcache verify {self.path}'"
        )

    # --- activations -------------------------------------------------------------------------------------------

    def read_chunk(self, site: str, shard: int, chunk: int, out: NDArray[Any], scratch: codecs.Scratch) -> None:
        """Decode one inner chunk, checked, into the C-contiguous `(rows_per_chunk, D)` array `out`.

        `scratch` receives the stored bytes and is kept by the caller for the next call (one per thread).

        Raises:
            CorruptShardError: anything about the chunk is not as it was written.
        """
        offset, size = self._index(site, shard)[chunk].tolist()
        key, problem = layout.acts_key(site, shard), None
        if self._compression is None and size == out.nbytes + codecs.CRC_BYTES:
            # Nothing to decode: the values are read where they belong, their checksum beside them.
            payload, stored = out.reshape(-1).view(np.uint8).data, scratch.take(codecs.CRC_BYTES)
            n_read = self.objects.read_into(key, offset, payload, stored)
            if not codecs.matches(payload, codecs.checksum_of(stored)):
                problem = "does not match its checksum"
        else:
            stored = scratch.take(size)
            n_read = self.objects.read_into(key, offset, stored)
            problem = codecs.decode_into(stored, out, self._compression)
        if n_read != size:
            raise self.corrupt(site, shard, f"is missing or too short to hold chunk {chunk}")
        if problem is None and codecs.checksum_of(stored) != self.record(site, shard).checksums[chunk]:
            problem = "is not the one that was committed"
        if problem:
            raise self.corrupt(site, shard, f"is damaged: chunk {chunk} {problem}")

    def _index(self, site: str, shard: int) -> NDArray[np.uint64]:
        if (site, shard) not in self._indexes:
            record, n_chunks = self.record(site, shard), layout.chunks_per_shard(self.spec)
            key, n_bytes = layout.acts_key(site, shard), layout.index_bytes(self.spec)
            total = self.objects.size(key)
            if total < 0:
                raise self.corrupt(site, shard, "is missing")
            stored = memoryview(bytearray(n_bytes))
            if total < n_bytes or self.objects.read_into(key, total - n_bytes, stored) != n_bytes:
                raise self.corrupt(site, shard, f"is truncated: {total:,} bytes")
            index = np.empty((n_chunks, 2), "<u8")
            problem = codecs.decode_into(stored, index, None)
            if problem is None and codecs.checksum_of(stored) != record.checksums[n_chunks]:
                problem = "is not the one that was committed"
            used = index[:, 1] != np.iinfo(np.uint64).max
            # A damaged or hostile index must not make us read or allocate beyond the object.
            if problem is None and (index[used].sum(axis=1) > total - n_bytes).any():
                problem = "points outside the object"
            if problem:
                raise self.corrupt(site, shard, f"is damaged: its index {problem}")
            self._indexes[site, shard] = index
        return self._indexes[site, shard]

    def read(self, site: str, rows: slice | Sequence[int] | NDArray[np.int64], *, threads: int = 2) -> torch.Tensor:
        """Rows of a site as a `(n, D)` tensor in the logical dtype; `rows` is a slice, global row ids, or a mask.

        Raises:
            SiteError: no such site. IndexError: a row is out of range. CorruptShardError: a shard is damaged.
        """
        import torch

        self.check_site(site)
        wanted = self._row_ids(rows)
        width = self.spec.site(site).width
        values = np.empty((len(wanted), width), self.stored_dtype)
        chunk_ids, places, counts = np.unique(
            wanted // self.spec.rows_per_chunk, return_inverse=True, return_counts=True
        )
        # Which of the wanted rows each chunk holds, found by one sort and not by one scan a chunk.
        rows_of_chunk = np.split(np.argsort(places, kind="stable"), np.cumsum(counts)[:-1])

        def fetch(part: NDArray[np.int64]) -> None:
            buffer, scratch = np.empty((self.spec.rows_per_chunk, width), self.stored_dtype), codecs.Scratch()
            for number in part:
                chunk_id = int(chunk_ids[number])
                self.read_chunk(site, *divmod(chunk_id, layout.chunks_per_shard(self.spec)), buffer, scratch)
                here = rows_of_chunk[number]
                values[here] = buffer[wanted[here] - chunk_id * self.spec.rows_per_chunk]

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fetch, np.array_split(np.arange(len(chunk_ids)), threads)))
        tensor = torch.from_numpy(values)
        return tensor.view(torch.bfloat16) if self.spec.dtype == "bfloat16" else tensor

    def _row_ids(self, rows: slice | Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self.spec.n_rows))
        wanted = np.asarray(rows)
        if wanted.dtype == bool and wanted.shape == (self.spec.n_rows,):
            return np.flatnonzero(wanted)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise IndexError(
                f"rows of {self.path} are asked for by a slice, a list of row ids, or a mask of {self.spec.n_rows} "
                f"booleans, not by {wanted.dtype} of shape {wanted.shape}"
            )
        wanted = wanted.astype(np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.spec.n_rows):
            raise IndexError(
                f"rows {wanted.min()} to {wanted.max()} asked of {self.path}, which has 0 to {self.spec.n_rows - 1}"
            )
        return wanted

    def check_site(self, site: str) -> None:
        """Raise `SiteError`, naming the nearest sites, unless the store has this one."""
        if site not in self.sites:
            expand_names([site], self.sites)
            raise SiteError(
                f"no site {site!r} in {self.path}; a pattern is not enough here, there are {', '.join(self.sites)}"
            )

    # --- tables ------------------------------------------------------------------------------------------------

    def shard_row_table(self, shard: int) -> dict[str, NDArray[np.uint32]]:
        """`sequence`, `position` and `token` of each row of a shard, in row order."""
        record = self.record(layout.ROWS, shard)
        shape, table = (self.spec.rows_per_shard,), {}
        for name, expected in zip(layout.ROW_ARRAYS, record.checksums, strict=False):
            values, crc = layout.get_table(self.objects, layout.row_key(name, shard), shape, layout.UINT32)
            if crc != expected:
                raise self.corrupt(layout.ROWS, shard, f"is damaged: {name} is not the one that was committed")
            table[name] = values[: record.n_rows]
        return table

    def row_table(self) -> dict[str, NDArray[np.uint32]]:
        """`sequence`, `position` and `token` of every committed row, in row order; 12 bytes a row."""
        tables = [self.shard_row_table(shard) for shard in self.committed]
        return {name: np.concatenate([table[name] for table in tables]) for name in layout.ROW_ARRAYS}

    def tokens(self, array: str = "ids") -> NDArray[np.uint32]:
        """The `(Q, T)` token `ids`, or the `document` of each token."""
        per_chunk = min(layout.token_sequences_per_chunk(self.spec), self.spec.n_sequences)
        shape = (per_chunk, self.spec.sequence_length)
        n_chunks = -(-self.spec.n_sequences // per_chunk)
        keys = (f"tokens/{array}/c/{chunk}/0" for chunk in range(n_chunks))
        parts = [layout.get_table(self.objects, key, shape, layout.UINT32)[0] for key in keys]
        return np.concatenate(parts)[: self.spec.n_sequences]

    def shard_line(self, site: str, shard: int) -> NDArray[np.float64]:
        """The statistics line of a shard."""
        width = self.spec.site(site).width
        shape = (1, line_length(width))
        values, crc = layout.get_table(self.objects, layout.stats_key(site, shard), shape, layout.FLOAT64)
        if crc != self.record(site, shard).checksums[layout.chunks_per_shard(self.spec) + 1]:
            raise self.corrupt(site, shard, "is damaged: its statistics are not the ones that were committed")
        line: NDArray[np.float64] = values[0]
        return line

    def stats(self, site: str) -> SiteStats:
        """Statistics over all committed rows of a site.

        Raises:
            SiteError: no such site. StoreError: nothing is committed yet.
        """
        self.check_site(site)
        if self.sealed:
            shape = (line_length(self.spec.site(site).width),)
            return stats_of(
                layout.get_table(self.objects, f"{layout.site_prefix(site)}/total/c/0", shape, layout.FLOAT64)[0]
            )
        if not self.committed:
            raise StoreError(f"{self.path} has no committed shard yet, so there are no statistics of {site}")
        return stats_of(merge(self.shard_line(site, shard) for shard in self.committed))

    def heads(self) -> NDArray[np.uint64]:
        """`(shards, C, 2)` rows and stored bytes of each committed shard's columns."""
        if self.sealed:
            return self.ledger[:, :, 32:].copy().view("<u8")
        names = layout.columns(self.spec)
        records = [[self.record(name, shard) for name in names] for shard in self.committed]
        return np.array([[(r.n_rows, r.n_bytes) for r in row] for row in records], "<u8").reshape(-1, len(names), 2)

    def info(self) -> dict[str, Any]:
        """What the store is, how far it is, how large, and its statistics: JSON-able."""
        bytes_per_column = self.heads()[:, :, 1].sum(axis=0)
        raw_bytes = {s.name: self.n_rows * s.width * self.stored_dtype.itemsize for s in self.spec.sites}
        stored = dict(zip(layout.columns(self.spec), map(int, bytes_per_column), strict=True))
        sites = {
            site.name: {
                "shape": list(site.shape),
                "bytes": stored[site.name],
                "bytes_per_activation": stored[site.name] / max(1, self.n_rows * site.width),
                "ratio": stored[site.name] / max(1, raw_bytes[site.name]),
                **(self.stats(site.name).summary() if self.committed else {}),
            }
            for site in self.spec.sites
        }
        site_bytes = sum(stored[name] for name in self.sites)
        return {
            "path": self.path,
            "state": self.root.state,
            "fingerprint": self.fingerprint,
            "n_rows": self.n_rows,
            "n_rows_expected": self.spec.n_rows,
            "n_shards": len(self.committed),
            "n_shards_expected": self.spec.n_shards,
            "bytes": sum(stored.values()),
            "raw_bytes": sum(raw_bytes.values()),
            "compression_ratio": site_bytes / max(1, sum(raw_bytes.values())),
            "spec": self.spec.to_dict(),
            "sites": sites,
        }

    def as_dask(self, site: str) -> dask.array.Array:
        """The site as a lazy `(n_rows, D)` dask array with one block a shard, every read checked.

        numpy has no bfloat16, so such a store shows as float32, which holds every bfloat16 exactly.
        """
        import dask
        import dask.array
        import torch

        self.check_site(site)
        width = self.spec.site(site).width
        dtype = np.dtype("<f4") if self.spec.dtype == "bfloat16" else self.stored_dtype

        def load(start: int, stop: int) -> NDArray[Any]:
            rows = self.read(site, slice(start, stop))
            return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()

        blocks = []
        for shard in self.committed:
            rows = self.spec.shard_rows(shard)
            block = dask.delayed(load)(rows.start, rows.stop)
            blocks.append(dask.array.from_delayed(block, (len(rows), width), dtype))
        return dask.array.concatenate(blocks)


def committed_columns(objects: Objects, spec: StoreSpec, *, complete: bool) -> set[Any]:
    """Shards that have every column committed (`complete`), or all committed `(shard, column number)` pairs."""
    pairs = set()
    for key in objects.list("commit/c/"):
        parts = key.split("/")
        if len(parts) == 5 and not key.endswith(".partial"):
            pairs.add((int(parts[2]), int(parts[3])))
    if not complete:
        return pairs
    n_columns = len(spec.sites) + 1
    return {s for s in range(spec.n_shards) if all((s, c) in pairs for c in range(n_columns))}
