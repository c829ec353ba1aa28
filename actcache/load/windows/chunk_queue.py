"""The chunks of a window, taken in turn by the threads that decode them; a disk hears of them in advance.

A future for each chunk would cost as much as a tenth of its decoding, most of it in threads waiting for one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from actcache.load.plan.epochs import Part
from actcache.store.format.site_arrays import chunks_per_shard

if TYPE_CHECKING:
    from actcache.store import Store

_ANNOUNCED = 16
"""Chunks that a disk is told of in advance: some megabytes, where it is as fast as it can be."""


class Wanted(NamedTuple):
    """Rows of a chunk that belong to a window."""

    array: str
    """Which of the site's arrays."""
    site: str
    part: Part


class ChunkQueue:
    """What a window needs, each for one of the threads that iterate.

    Once a read had to wait for the disk, the chunks that come are announced to it, and for a while thereafter: threads
    that decode should not wait, and a store in the system's memory should not pay for it.
    """

    def __init__(self, store: Store, wanted: Sequence[Wanted]) -> None:
        self._store, self._wanted = store, wanted
        self._numbers = iter(range(len(wanted)))
        self._waits, self._announced, self._announce_until = store.objects.n_waits, 0, 0

    def __iter__(self) -> Iterator[Wanted]:
        # The next of a range is taken by one thread at a time: the interpreter's lock sees to that.
        for number in self._numbers:
            if self._store.objects.n_waits != self._waits:
                self._waits, self._announce_until = self._store.objects.n_waits, number + 4 * _ANNOUNCED
            if number < self._announce_until:
                self._announce(number + 1, number + 1 + _ANNOUNCED)
            yield self._wanted[number]

    def _announce(self, first: int, until: int) -> None:
        """Announce those that are not announced yet; that two threads announce one is no harm."""
        first, self._announced = max(first, self._announced), max(until, self._announced)
        per_shard = chunks_per_shard(self._store.spec)
        for array, site, part in self._wanted[first:until]:
            self._store.expect_chunk(site, *divmod(part.chunk, per_shard), array=array)
