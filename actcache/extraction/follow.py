"""Follows an extraction: progress, speed, and warnings about its activations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from time import perf_counter

import numpy as np

from actcache.spec import Progress
from actcache.status import SiteStatus, Status, Watch
from actcache.store import StoreWriter
from actcache.store.format.stats import stats_of


class Follower:
    """Counts what is done, calls `progress` and `watch`, and warns once about each bad site.

    Args:
        writer: knows what has been stored.
        n_done: sequences that were done by earlier calls.
        n_share: sequences that this call is going to do.
        progress: called with (sequences done, sequences in all).
        watch: called with a `Status`.
    """

    def __init__(
        self, writer: StoreWriter, n_done: int, n_share: int, progress: Progress | None, watch: Watch | None
    ) -> None:
        self._writer, self._progress, self._watch = writer, progress, watch
        self._n_done, self._n_share, self._n_here, self._n_tokens = n_done, n_share, 0, 0
        self._began, self._n_shards = perf_counter(), 0
        self._sites: Mapping[str, SiteStatus] = {}
        self._warned: set[str] = set()

    def count(self, n_sequences: int, n_tokens: int) -> None:
        """Record that more sequences have passed the model."""
        self._n_here += n_sequences
        self._n_tokens += n_tokens
        self.look()
        n_sequences_all = self._writer.spec.n_sequences
        if self._progress:
            self._progress(self._n_done + self._n_here, n_sequences_all)
        if self._watch:
            self._watch(self.status())

    def end(self) -> None:
        """Report the final state, once everything is stored."""
        self.look()
        if self._watch:
            self._watch(self.status())

    def look(self) -> None:
        """Take in the statistics of newly stored shards, and warn of NaN, infinite and constant values."""
        written = self._writer.written
        if written.n_shards == self._n_shards:
            return
        self._n_shards = written.n_shards
        self._sites = {name: _site_status(line) for name, line in written.lines.items()}
        for name, site in self._sites.items():
            alarm = _alarm(site)
            if alarm and name not in self._warned:
                self._warned.add(name)
                warnings.warn(f"{name}: {alarm}", stacklevel=4)

    def status(self) -> Status:
        """The current status."""
        return Status(
            n_sequences_done=self._n_done + self._n_here,
            n_sequences=self._writer.spec.n_sequences,
            n_sequences_here=self._n_here,
            n_sequences_share=self._n_share,
            n_tokens=self._n_tokens,
            seconds=perf_counter() - self._began,
            n_bytes=self._writer.written.n_bytes,
            queue=self._writer.queued,
            queue_size=self._writer.n_buffers,
            sites=self._sites,
        )


def _site_status(line: np.ndarray) -> SiteStatus:
    stats = stats_of(line)
    return SiteStatus(
        mean_norm=stats.mean_norm,
        abs_max=stats.abs_max,
        zero_fraction=stats.zero_fraction,
        n_nan=stats.n_nan,
        n_inf=stats.n_inf,
        dead=stats.count > 1 and not stats.variance.any(),
    )


def _alarm(site: SiteStatus) -> str:
    if site.n_nan or site.n_inf:
        return (
            f"{site.n_nan:,} values are NaN and {site.n_inf:,} infinite; the model overflows (try it in bfloat16 or "
            "float32) or its weights are damaged"
        )
    return "every row is the same, so there is nothing to learn from this site" if site.dead else ""
