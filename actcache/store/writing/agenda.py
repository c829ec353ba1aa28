"""Which shards of a store have to be written, column by column, and which of them this writer may write.

In: the spec that the store shall have, the root that it had before, and the commit records that lie there. Out: missing
columns and shards, claims of shards that several writers share, and records taken back before their data is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable

from actcache.spec import Site, StoreSpec
from actcache.store.backends.objects import Objects
from actcache.store.format.keys import columns_of, commit_key
from actcache.store.format.records import committed_shards
from actcache.store.format.root import Root
from actcache.store.locks.lock import WriterLock


class Agenda:
    """What is left to write.

    Args:
        objects: the objects of the store.
        spec: what the store shall hold when it is finished.
        before: the root of the store before it grew; None if it does not grow.
    """

    def __init__(self, objects: Objects, spec: StoreSpec, before: Root | None = None) -> None:
        self.objects, self.spec, self.before = objects, spec, before
        self._columns = columns_of(spec)
        self.outgrown = self._find_outgrown()
        """The shard that was the last and partial one before the store grew: it has to be written again."""
        self._n_sealed, self._added = self._find_sealed()
        self.read_records()

    def read_records(self) -> None:
        """See which records lie there now: other writers may have committed shards, or a repair taken some back."""
        self._committed = {name: committed_shards(self.objects, name) for name in self._columns}

    def _find_outgrown(self) -> int | None:
        if self.before is None:
            return None
        before = self.before.spec
        has_grown = self.spec.n_sequences > before.n_sequences and before.n_sequences % before.sequences_per_shard
        return before.n_shards - 1 if has_grown else None

    def _find_sealed(self) -> tuple[int, list[str]]:
        """How many shards, from the first on, were sealed before the store grew, and the columns added to those."""
        if self.before is None or self.before.state != "sealed":
            return 0, []
        known = columns_of(self.before.spec)
        added = [name for name in self._columns if name not in known]
        return self.before.spec.n_shards - (self.outgrown is not None), added

    def columns_written_together(self, shard: int) -> list[str]:
        """All columns of a shard, or those that are added to it if it was sealed: what is sealed is not made again."""
        return self._added if shard < self._n_sealed else self._columns

    def missing(self, shard: int) -> list[str]:
        """Columns of a shard that have to be written: none, or all that are written together."""
        names = self.columns_written_together(shard)
        is_there = all(shard in self._committed[name] for name in names)
        return [] if is_there and shard != self.outgrown else names

    def pending(self) -> list[int]:
        """Shards that have to be written, the outgrown one last: until then the store stays what it was."""
        shards = [shard for shard in range(self.spec.n_shards) if self.missing(shard)]
        return sorted(shards, key=lambda shard: (shard == self.outgrown, shard))

    def done(self) -> dict[int, list[str]]:
        """The columns written together of each shard that is not pending."""
        shards = range(self.spec.n_shards)
        return {shard: self.columns_written_together(shard) for shard in shards if not self.missing(shard)}

    def sites_to_write(self) -> list[Site]:
        """Sites of which a shard is missing."""
        names = {name for shard in self.pending() for name in self.missing(shard)}
        return [site for site in self.spec.sites if site.name in names]

    def note_committed(self, shard: int, names: Iterable[str]) -> None:
        """Count columns of a shard as committed."""
        for name in names:
            self._committed[name].add(shard)

    def uncommit(self, shards: Iterable[int]) -> None:
        """Delete the records of what is to be written again: no record may outlive the data that it lists."""
        for shard in shards:
            self._delete_records(shard, self.columns_written_together(shard))

    def uncommit_outgrown(self) -> None:
        """Delete all records of the outgrown shard, which from now on is pending like any other."""
        if self.outgrown is not None:
            self._delete_records(self.outgrown, self._columns)
            self.outgrown = None

    def _delete_records(self, shard: int, names: Iterable[str]) -> None:
        for name in names:
            if shard in self._committed[name]:
                self.objects.delete(commit_key(name, shard))
                self._committed[name].discard(shard)

    def claim(self, shard: int, lock: WriterLock) -> bool:
        """Claim a shard that is missing; False when it is not missing, or another writer is writing it."""
        if not self.missing(shard) or lock.holds(shard):
            return bool(self.missing(shard))
        if not lock.claim(shard):
            return False
        # Another writer may have committed it since the records were listed.
        names = self.columns_written_together(shard)
        self.note_committed(shard, [name for name in names if self.objects.size(commit_key(name, shard)) >= 0])
        if not self.missing(shard):
            lock.unclaim(shard)
            return False
        return True
