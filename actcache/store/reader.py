"""Open a store and read from it: rows, tokens, statistics, or single chunks into a caller's buffer.

Every byte that is handed out has been checked: the chunk's own crc32c, and that this crc32c is the one which the
shard's commit record lists, so that whole but misplaced objects (swapped, stale, of another store) are noticed as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError, SiteError, StoreError, StoreIncompleteError, StoreNotFoundError
from actcache.spec import StoreSpec, TokenBlocks, expand_names
from actcache.store import codecs, layout, tables, values, views
from actcache.store.context import Context, context
from actcache.store.covariance import covariance
from actcache.store.indexes import Index, Indexes, Kept
from actcache.store.objects import Objects
from actcache.store.rows import Rows, checked_rows, row_ids
from actcache.store.sealed import Sealed, changed_since, check_open
from actcache.store.stats import SiteStats
from actcache.store.tokens import TokenArrays

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray

_RECORD_BYTES = 32 << 20
"""Of commit records that are kept."""


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
    """An activation store, open for reading.

    A row id is an index into the store's arrays: row `r` lies in shard `r // spec.rows_per_shard`. Mostly every id up
    to `spec.n_rows` is a row; a shard that leaves rows out ends before its last ids.
    """

    def __init__(self, objects: Objects, root: layout.Root, *, lies_there: bool = True) -> None:
        # A writer also looks at stores as they were, or as they are going to be: with a root that does not lie there.
        self.objects, self.root, self._lies_there = objects, root, lies_there
        self.spec: StoreSpec = root.spec
        self.stored_dtype = codecs.STORED_DTYPE[self.spec.dtype]
        self.use_ledger, self.is_checked = True, False
        self._seal = Sealed(objects, root)
        self._columns = layout.columns(self.spec)
        self._sites = {site.name: site for site in self.spec.sites}
        self._records = Kept[tuple[str, int], layout.Record](_RECORD_BYTES)
        self._indexes = Indexes()
        self._tokens = TokenArrays(objects, root.spec)

    def __reduce__(self) -> tuple[Any, ...]:
        # What was read so far is read again where the store is unpickled.
        return Store, (self.objects, self.root)

    def __repr__(self) -> str:
        try:
            n_rows = f"{self.n_rows:,} of {self.spec.n_rows:,} rows"
        except OSError:  # a store in trouble can still be named
            n_rows = "an unknown number of rows"
        return f"Store({str(self.objects)!r}, {n_rows}, {len(self.sites)} sites)"

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

    @cached_property
    def n_rows(self) -> int:
        """Rows that can be read now."""
        return int(self.shard_n_rows.sum())

    @cached_property
    def shard_n_rows(self) -> NDArray[np.int64]:
        """`(S,)` rows of each shard, 0 where it is not committed."""
        if self.sealed:
            return self.heads()[:, 0, 0].astype(np.int64)
        rows = np.zeros(self.spec.n_shards, np.int64)
        for shard in self.committed:
            rows[shard] = self.record(layout.ROWS, shard).n_rows
        return rows

    @property
    def fingerprint(self) -> str | None:
        """sha256 (hex) over all that the store is, None unless it is sealed; raises like `check`."""
        self.check()
        return self.root.fingerprint

    def check(self) -> None:
        """Hold what the root says against what lies there, when it is first asked for: no value is read before.

        Raises:
            CorruptShardError: they disagree. StoreError: the store has changed since it was opened.
        """
        if self.is_checked:
            return
        with self.explained():
            if self.sealed:
                self._seal.check_fingerprint()
            else:
                check_open(self.objects, self.spec)
        self.is_checked = True

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Tell damage from a change: what is not as this store's root says may be as a newer one says."""
        try:
            yield
        except CorruptShardError as error:
            changed = self._changed()
            if changed is None:
                raise
            raise changed from error

    def _changed(self) -> StoreError | None:
        return changed_since(self.objects, self.root) if self._lies_there else None

    @property
    def ledger(self) -> NDArray[np.uint8]:
        """`(S, C, 48)` heads of all records, of a sealed store; raises like `check`."""
        self.check()
        return self._seal.ledger

    def total(self, site: str) -> NDArray[np.float64]:
        """The merged statistics line of a site of a sealed store; raises like `check`."""
        self.check()
        return self._seal.totals[site]

    @cached_property
    def committed(self) -> list[int]:
        """Shards whose every column is committed."""
        if self.sealed:
            return list(range(self.spec.n_shards))
        shards = set.intersection(*(layout.committed_shards(self.objects, name) for name in self._columns))
        return sorted(shard for shard in shards if shard < self.spec.n_shards)

    def record(self, column: str, shard: int) -> layout.Record:
        """The commit record of a shard's column.

        Raises:
            CorruptShardError: it is missing or damaged. StoreIncompleteError: the shard is not committed yet.
        """

        def read() -> tuple[layout.Record, int]:
            record = self._read_record(column, shard)
            return record, 500 + 40 * len(record.checksums)  # of Python's integers

        return self._records.get((column, shard), read)

    def _read_record(self, column: str, shard: int) -> layout.Record:
        self.check()
        if not self.sealed and self.objects.size(layout.commit_key(column, shard)) < 0:
            raise StoreIncompleteError(f"shard {shard} of {self.path} is not written yet; finish 'actcache extract'")
        with self.explained():
            record = layout.read_record(self.objects, self.spec, column, shard)
        if self.sealed and self.use_ledger:
            head = record.to_bytes(layout.record_length(self.spec, column))[: layout.HEAD_BYTES]
            if head != self.ledger[shard, self._columns.index(column)].tobytes():
                raise self.corrupt(column, shard, "has a commit record that differs from the ledger")
        return record

    def corrupt(self, column: str, shard: int, reason: str) -> CorruptShardError | StoreError:
        """The error that names a shard's column and what is wrong with it, or says that the store has changed."""
        return self._changed() or CorruptShardError(
            f"shard {shard} of {column} in {self.path} {reason}; run 'actcache verify {self.path}'"
        )

    # --- activations -------------------------------------------------------------------------------------------

    def read_chunk(
        self, site: str, shard: int, chunk: int, out: NDArray[Any], scratch: codecs.Scratch, *, array: str = "acts"
    ) -> None:
        """Decode one inner chunk, checked, into the C-contiguous `(rows_per_chunk, D)` array `out`.

        `scratch` receives the stored bytes and is kept by the caller for the next call (one per thread). Of a quantised
        site, `array="scale"` gives the `(rows_per_chunk,)` scales.

        Raises:
            CorruptShardError: anything about the chunk is not as it was written.
        """
        index = self.index(site, array, shard)
        offset, size = index.spans[chunk].tolist()
        key, chain = layout.sharded_key(site, array, shard), layout.array_chain(self._sites[site], array)
        if chain.is_raw and size == out.nbytes + codecs.CRC_BYTES:
            # Nothing to decode: the values are read where they belong, their checksum beside them.
            payload, stored = out.reshape(-1).view(np.uint8).data, scratch.take(codecs.CRC_BYTES)
            n_read = self.objects.read_into(key, offset, payload, stored)
            sound = n_read == size and codecs.matches(payload, codecs.checksum_of(stored))
            problem = None if sound else "does not match its checksum"
        else:
            stored = scratch.take(size)
            n_read = self.objects.read_into(key, offset, stored)
            problem = chain.decode_into(stored, out) if n_read == size else ""
        if n_read != size:
            raise self.corrupt(site, shard, f"is missing or too short to hold chunk {chunk} of {array}")
        self.check_chunk(site, array, shard, chunk, stored, index, problem)

    def index(self, site: str, array: str, shard: int) -> Index:
        """Where the chunks of a sharded object lie; CorruptShardError when it is not as written."""
        return self._indexes.of(self, site, array, shard)

    def expect_chunk(self, site: str, shard: int, chunk: int, *, array: str = "acts") -> None:
        """Say that an inner chunk is going to be read soon, so that a disk can begin to."""
        offset, size = self.index(site, array, shard).spans[chunk].tolist()
        self.objects.expect(layout.sharded_key(site, array, shard), offset, size)

    def fetch_chunk(self, site: str, shard: int, chunk: int, *, array: str = "acts") -> memoryview:
        """The stored bytes of one inner chunk, not yet checked: the part of `read_chunk` that waits for the storage."""
        offset, size = self.index(site, array, shard).spans[chunk].tolist()
        stored = self.objects.span(layout.sharded_key(site, array, shard), offset, size)
        if stored is None or len(stored) != size:
            raise self.corrupt(site, shard, f"is missing or too short to hold chunk {chunk} of {array}")
        return stored

    def decode_chunk(
        self, site: str, shard: int, chunk: int, stored: memoryview, out: NDArray[Any], *, array: str = "acts"
    ) -> None:
        """Check and decode what `fetch_chunk` gave: the part of `read_chunk` that works the processor."""
        problem = layout.array_chain(self._sites[site], array).decode_into(stored, out)
        self.check_chunk(site, array, shard, chunk, stored, self.index(site, array, shard), problem)

    def check_chunk(
        self, site: str, array: str, shard: int, chunk: int, stored: memoryview, index: Index, problem: str | None
    ) -> None:
        """Raise unless there is no problem with a stored chunk, and it is the one that was committed."""
        if problem is None and codecs.checksum_of(stored) != index.checksums[chunk]:
            problem = "is not the one that was committed"
        if problem:
            raise self.corrupt(site, shard, f"is damaged: chunk {chunk} of {array} {problem}")

    def check_sharded(self, site: str, array: str, shard: int) -> None:
        """Read one sharded object from end to end and hold every byte against the commit record.

        Raises:
            CorruptShardError: a byte, or the length, is not as it was written.
        """
        values.check_sharded(self, site, array, shard)

    def read(self, site: str, rows: Rows, *, threads: int = 2) -> torch.Tensor:
        """Rows of a site as a `(n, D)` tensor in the logical dtype; `rows` is a slice, row ids, a mask, or a filter.

        Raises:
            SiteError: no such site. IndexError: a row is out of range. CorruptShardError: a shard is damaged.
        """
        import torch

        tensor = torch.from_numpy(self.read_stored(site, rows, threads=threads))
        return tensor.view(torch.bfloat16) if self.spec.dtype == "bfloat16" else tensor

    def read_stored(self, site: str, rows: Rows, *, threads: int = 2) -> NDArray[Any]:
        """What `read` gives, as a numpy array; numpy has no bfloat16, so those are given as the bits of uint16."""
        return values.read_stored(self, site, rows, threads)

    def row_ids(self) -> NDArray[np.int64]:
        """Ids of all rows that can be read now, in order: `range(n_rows)`, unless shards are not full or not there."""
        return row_ids(self, 0, self.spec.n_rows)

    def checked_rows(self, rows: Rows) -> NDArray[np.int64]:
        """The row ids that a slice, ids, a mask or a filter mean; IndexError when there is one that is no row."""
        return checked_rows(self, rows)

    def check_site(self, site: str) -> None:
        """Raise `SiteError`, naming the nearest sites, unless the store has this one."""
        if site not in self.sites:
            expand_names([site], self.sites)
            raise SiteError(
                f"no site {site!r} in {self.path}; a pattern is not enough here, there are {', '.join(self.sites)}"
            )

    # --- tables ------------------------------------------------------------------------------------------------

    def shard_row_table(self, shard: int, arrays: Collection[str] = layout.ROW_ARRAYS) -> dict[str, NDArray[np.uint32]]:
        """`sequence`, `position` and `token` of each row of a shard, or those that are named, in row order."""
        return tables.shard_row_table(self, shard, arrays)

    def kept_rows(self, shard: int) -> NDArray[np.bool_] | None:
        """`(q * rows_per_sequence,)` which rows of the shard's sequences there are, in reading order; None for all."""
        return tables.kept_rows(self, shard)

    def row_table(self) -> dict[str, NDArray[np.uint32]]:
        """`sequence`, `position` and `token` of every committed row, in row order; 12 bytes a row."""
        return tables.row_table(self)

    def tokens(self, array: str = "ids") -> NDArray[np.uint32]:
        """The `(Q, T)` token `ids`, or the `document` of each token.

        Raises:
            CorruptShardError: they are not the ones that the store was begun with.
        """
        self.check()
        with self.explained():
            return self._tokens.whole(array)

    def check_tokens(self) -> None:
        """Hold all tokens against the digest in the spec, in little memory; raises like `tokens`."""
        self.check()
        with self.explained():
            self._tokens.check()

    def shard_tokens(self, shard: int) -> NDArray[np.uint32]:
        """`(q, T)` token ids of a shard's sequences, of which only that part of the tokens is read.

        The shard need not be committed. Whoever goes from shard to shard reads every chunk of the tokens once.

        Raises:
            IndexError: no such shard. CorruptShardError: the tokens are missing or damaged.
        """
        return self._tokens_of_shard("ids", shard)

    def shard_documents(self, shard: int) -> NDArray[np.uint32]:
        """`(q, T)` number of the text that each token of `shard_tokens` is from; raises like that."""
        return self._tokens_of_shard("document", shard)

    def _tokens_of_shard(self, array: str, shard: int) -> NDArray[np.uint32]:
        self.check()
        with self.explained():
            return self._tokens.of_shard(array, shard)

    def token_blocks(self) -> TokenBlocks:
        """The store's tokens as they were given to `extract`."""
        ids, document = (self.tokens(name) for name in layout.TOKEN_ARRAYS)
        return TokenBlocks(ids=ids, document=document, description=self.spec.text)

    def context(self, row: int, before: int = 16, after: int = 16, *, across_documents: bool = False) -> Context:
        """The tokens around the one that a row belongs to, and where they are from.

        Sequences are in shuffled order, so a context never reaches beyond its own. Packed ones have pieces of several
        texts; by default only that of the row is given.

        Args:
            row: a row id.
            before: tokens before it, at most.
            after: tokens after it, at most.
            across_documents: give what stands in the sequence, of whatever text.

        Raises:
            IndexError: there is no such row. StoreIncompleteError: its shard is not written yet. CorruptShardError:
            what has to be read is damaged.
        """
        return context(self, row, before, after, across_documents)

    def shard_line(self, site: str, shard: int) -> NDArray[np.float64]:
        """The statistics line of a shard."""
        return tables.shard_line(self, site, shard)

    def stats(self, site: str, *, shards: Sequence[int] | None = None, rows: Rows | None = None) -> SiteStats:
        """Statistics over all committed rows of a site or those of some shards, or over some rows, which are then read.

        Raises:
            SiteError: no such site. StoreError: there is no such row. IndexError: a row is none.
        """
        return tables.stats(self, site, shards, rows)

    def covariance(self, site: str, rows: Rows | None = None, *, threads: int = 2) -> NDArray[np.float64]:
        """`(D, D)` population covariance of a site's dimensions, over all committed rows or some of them.

        Calculated in float64 from one pass over the values as they are read; rows with NaN or an infinity are left out,
        as in `stats`. Takes memory for about three such matrices.

        Raises:
            SiteError: no such site. StoreError: there is no row to calculate it from. IndexError: a row is none.
            ConfigError: the matrix would take more than 8 GiB.
        """
        return covariance(self, site, rows, threads)

    def heads(self, shards: Sequence[int] | None = None) -> NDArray[np.uint64]:
        """`(shards, C, 2)` rows and stored bytes of the columns of some shards, or of all that are committed."""
        return tables.heads(self, shards)

    # --- views -------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What the store is, how far it is, how large, and its statistics: JSON-able."""
        return views.info(self)

    def as_dask(self, site: str) -> dask.array.Array:
        """The site as a lazy `(n_rows, D)` dask array, see `views.as_dask`."""
        return views.as_dask(self, site)

    def as_xarray(self, sites: Sequence[str] | str | None = None) -> xarray.Dataset:
        """Sites (all by default) as a lazy xarray dataset, see `views.as_xarray`."""
        return views.as_xarray(self, sites)
