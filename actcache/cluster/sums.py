"""Adds up the workers' reports to one status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any

from actcache.cluster.worker import Report
from actcache.spec import StoreSpec
from actcache.status import SiteStatus, Status

_COUNTS = ("n_sequences", "n_tokens", "n_bytes")


class Sums:
    """Adds up the newest report of each attempt at a task.

    Args:
        spec: of the store.
        committed: shards that exist at the beginning.
    """

    def __init__(self, spec: StoreSpec, committed: Iterable[int]) -> None:
        self._spec, self._began = spec, perf_counter()
        self._n_before = self._n_committed = self._sequences_of(committed)
        self._running: dict[str, Report] = {}
        self._ended: set[str] = set()
        self._past = dict.fromkeys(_COUNTS, 0)
        self._past_sites: dict[str, SiteStatus] = {}

    def take(self, report: Report) -> None:
        """Take in a report of a running attempt."""
        if report["attempt"] not in self._ended and "n_tokens" in report:
            self._running[report["attempt"]] = report

    def end(self, report: Report) -> None:
        """Take in the last report of an attempt, which has no counts if there was nothing to do."""
        self.take(report)
        self._ended.add(report["attempt"])
        self._put_away(self._running.pop(report["attempt"], None))

    def found(self, committed: Iterable[int]) -> None:
        """Take the store's shards, while no task runs, as the base that later reports are added to."""
        for report in self._running.values():  # reports of workers that died
            self._put_away(report)
        self._running.clear()
        self._ended.clear()
        self._n_committed, self._past["n_sequences"] = self._sequences_of(committed), 0

    def status(self) -> Status:
        """The current status of the whole."""
        running = list(self._running.values())
        totals = {name: self._past[name] + sum(report[name] for report in running) for name in _COUNTS}
        n_done = min(self._n_committed + totals["n_sequences"], self._spec.n_sequences)
        sites, weight = self._past_sites, self._past["n_tokens"]
        for report in running:
            sites = _join(sites, weight, report)
            weight += report["n_tokens"]
        return Status(
            n_sequences_done=n_done,
            n_sequences=self._spec.n_sequences,
            n_sequences_here=n_done - self._n_before,
            n_sequences_share=self._spec.n_sequences - self._n_before,
            n_tokens=totals["n_tokens"],
            seconds=perf_counter() - self._began,
            n_bytes=totals["n_bytes"],
            queue=sum(report["queue"] for report in running),
            queue_size=sum(report["queue_size"] for report in running),
            sites=sites,
        )

    def _sequences_of(self, shards: Iterable[int]) -> int:
        return sum(len(self._spec.shard_sequences(shard)) for shard in shards)

    def _put_away(self, report: Report | None) -> None:
        if report is None:
            return
        self._past_sites = _join(self._past_sites, self._past["n_tokens"], report)
        for name in _COUNTS:
            self._past[name] += report[name]


def _join(sites: Mapping[str, SiteStatus], n_tokens: int, report: Report) -> dict[str, SiteStatus]:
    """Merge the statistics of `n_tokens` tokens with those of a report. Means are weighted by tokens, not by rows."""
    both = dict(sites)
    for name, plain in report["sites"].items():
        other = SiteStatus(**plain)
        both[name] = _mean(both[name], n_tokens, other, report["n_tokens"]) if name in both else other
    return both


def _mean(a: SiteStatus, n_a: int, b: SiteStatus, n_b: int) -> SiteStatus:
    share = n_b / max(1, n_a + n_b)
    weighted: dict[str, Any] = {
        name: (1 - share) * getattr(a, name) + share * getattr(b, name) for name in ("mean_norm", "zero_fraction")
    }
    return SiteStatus(
        **weighted,
        abs_max=max(a.abs_max, b.abs_max),
        n_nan=a.n_nan + b.n_nan,
        n_inf=a.n_inf + b.n_inf,
        dead=a.dead and b.dead,
    )
