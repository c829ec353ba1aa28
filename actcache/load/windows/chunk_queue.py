"""The chunks of a window, taken in turn by the threads that decode them, and announced to a disk in advance.

In: a store and the chunks of a window. Out: each chunk, to one thread. A future for each chunk would cost up to a tenth
of its decoding, mostly in threads that wait for one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from actcache.load.plan.epochs import Part
from actcache.store.format.site_arrays import chunks_per_shard

if TYPE_CHECKING:
    from actcache.store import Store

_ANNOUNCED = 16
"""Chunks announced to a disk in advance: a few megabytes, enough for its full speed."""


class Wanted(NamedTuple):
    """The rows of a chunk that a window needs."""

    array: str
    """Which of the site's arrays."""
    site: str
    part: Part


class ChunkQueue:
    """The chunks that a window needs, each for one of the threads that iterate.

    After a read had to wait for the disk, the next chunks are announced to it for a while, so that decoding threads do
    not wait; a store in the page cache does not pay for announcements.
    """

    def __init__(self, store: Store, wanted: Sequence[Wanted]) -> None:
        self._store, self._wanted = store, wanted
        self._numbers = iter(range(len(wanted)))
        self._n_waits = store.objects.n_waits
        self._announced = 0
        self._announce_until = 0

    def __iter__(self) -> Iterator[Wanted]:
        # The interpreter's lock lets one thread at a time take the next number of a range.
        for number in self._numbers:
            if self._store.objects.n_waits != self._n_waits:
                self._n_waits, self._announce_until = self._store.objects.n_waits, number + 4 * _ANNOUNCED
            if number < self._announce_until:
                self._announce(number + 1, number + 1 + _ANNOUNCED)
            yield self._wanted[number]

    def _announce(self, first: int, until: int) -> None:
        """Announce chunks that are not announced yet; it is harmless if two threads announce the same one."""
        first, self._announced = max(first, self._announced), max(until, self._announced)
        per_shard = chunks_per_shard(self._store.spec)
        for array, site, part in self._wanted[first:until]:
            self._store.expect_chunk(site, *divmod(part.chunk, per_shard), array=array)
