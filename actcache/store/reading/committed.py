"""What of a store is committed: its root, the records of its shards, and how many rows there are.

In: the objects of a store and its root. Out: records, compared with the ledger if the store is sealed, and the errors
that name what is damaged.

The fingerprint is checked when a value is first read instead of when the store is opened, so that a store in trouble
can still be opened, named and verified. It costs the totals of all sites and one sha256 of the ledger, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptShardError, SiteError, StoreError, StoreIncompleteError
from actcache.memory import Kept
from actcache.spec import StoreSpec, expand_names
from actcache.store import codecs
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import ROWS, columns_of, commit_key
from actcache.store.format.records import HEAD_BYTES, Record, committed_shards, read_record, record_length
from actcache.store.format.root import Root
from actcache.store.format.sealed import Sealed, changed_since, check_open

_RECORD_BYTES = 32 << 20
"""Memory for commit records that are kept."""


class Committed:
    """The committed shards of a store.

    Args:
        objects: the objects of the store.
        root: its root attributes.
        lies_there: whether `root` is the root on disk; a writer also looks at a store as it was or will be.
        held_against_ledger: compare the records of a sealed store with its ledger; `verify` goes without if that is
            damaged.
    """

    def __init__(
        self, objects: Objects, root: Root, *, lies_there: bool = True, held_against_ledger: bool = True
    ) -> None:
        self.objects, self.root, self._lies_there = objects, root, lies_there
        self.spec: StoreSpec = root.spec
        self.stored_dtype = codecs.STORED_DTYPE[self.spec.dtype]
        self.is_checked = False
        self.held_against_ledger = held_against_ledger and self.sealed
        self._seal = Sealed(objects, root)
        self._columns = columns_of(self.spec)
        self._records = Kept[tuple[str, int], Record](_RECORD_BYTES)

    def __reduce__(self) -> tuple[Any, ...]:
        # What has been read so far is read again where the store is unpickled.
        return type(self), (self.objects, self.root)

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
            rows[shard] = self.record(ROWS, shard).n_rows
        return rows

    @property
    def fingerprint(self) -> str | None:
        """sha256 (hex) over all that the store holds, None unless it is sealed; raises like `check`."""
        self.check()
        return self.root.fingerprint

    def check(self) -> None:
        """Compare the root with what lies there, once, before the first value is read.

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
        """Tell damage from a change: what differs from this store's root may agree with a newer root."""
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
        """`(S, C, 48)` heads of all records of a sealed store; raises like `check`."""
        self.check()
        return self._seal.ledger

    def total(self, site: str) -> NDArray[np.float64]:
        """The merged statistics line of a site of a sealed store; raises like `check`."""
        self.check()
        return self._seal.totals[site]

    @cached_property
    def committed(self) -> list[int]:
        """Shards of which all columns are committed."""
        if self.sealed:
            return list(range(self.spec.n_shards))
        shards = set.intersection(*(committed_shards(self.objects, name) for name in self._columns))
        return sorted(shard for shard in shards if shard < self.spec.n_shards)

    def record(self, column: str, shard: int) -> Record:
        """The commit record of a shard's column.

        Raises:
            CorruptShardError: it is missing or damaged. StoreIncompleteError: the shard is not committed yet.
        """

        def read() -> tuple[Record, int]:
            record = self._read_record(column, shard)
            return record, 500 + 40 * len(record.checksums)  # of Python's integers

        return self._records.get((column, shard), read)

    def _read_record(self, column: str, shard: int) -> Record:
        self.check()
        if not self.sealed and self.objects.size(commit_key(column, shard)) < 0:
            raise StoreIncompleteError(f"shard {shard} of {self.path} is not written yet; finish 'actcache extract'")
        with self.explained():
            record = read_record(self.objects, self.spec, column, shard)
        if self.held_against_ledger:
            head = record.to_bytes(record_length(self.spec, column))[:HEAD_BYTES]
            if head != self.ledger[shard, self._columns.index(column)].tobytes():
                raise self.corrupt(column, shard, "has a commit record that differs from the ledger")
        return record

    def corrupt(self, column: str, shard: int, reason: str) -> CorruptShardError | StoreError:
        """The error that names a shard's column and what is wrong with it, or that the store has changed."""
        return self._changed() or CorruptShardError(
            f"shard {shard} of {column} in {self.path} {reason}", store=self.path
        )

    def check_site(self, site: str) -> None:
        """Raise `SiteError`, naming the nearest sites, unless the store has this one."""
        if site not in self.sites:
            expand_names([site], self.sites)
            raise SiteError(
                f"no site {site!r} in {self.path}; a pattern is not enough here, there are {', '.join(self.sites)}"
            )

    def heads(self, shards: Sequence[int] | None = None) -> NDArray[np.uint64]:
        """`(shards, C, 2)` rows and stored bytes of the columns of some shards, or of all that are committed."""
        if self.sealed:
            all_heads = self.ledger[:, :, 32:].copy().view("<u8")
            return all_heads if shards is None else all_heads[np.asarray(shards, np.int64)]
        records = [
            [self.record(name, shard) for name in self._columns]
            for shard in (self.committed if shards is None else shards)
        ]
        sizes = [[(record.n_rows, record.n_bytes) for record in row] for row in records]
        return np.array(sizes, "<u8").reshape(-1, len(self._columns), 2)
