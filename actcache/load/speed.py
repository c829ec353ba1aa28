"""How fast a loader is and what it waits for: counters that are cheap to keep."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderStats:
    """What a loader has delivered since it was made, and where the time went; see `Loader.stats`.

    Examples:
        >>> with ac.Loader(store, [site_out], batch_rows=512) as loader:
        ...     for batch in loader:
        ...         pass
        ...     stats = loader.stats()
        >>> stats.n_batches, stats.n_rows, stats.n_bytes == 7 * 512 * 128 * 2
        (7, 3584, True)
        >>> 0 <= stats.stall_fraction <= 1
        True
    """

    n_batches: int
    """Batches delivered."""
    n_rows: int
    """Rows in them."""
    n_bytes: int
    """Bytes of their values at all sites, in the store's element type."""
    seconds: float
    """From asking for the first batch to the delivery of the last one, the consumer's own work included."""
    wait_seconds: float
    """The part of `seconds` in which the consumer waited for batches."""
    read_seconds: float
    """How long decoding threads waited for the storage, for a core or for copies to a GPU; summed over threads."""
    decode_seconds: float
    """How long they checked, decompressed, and copied out of the page cache; summed over threads."""
    gather_seconds: float
    """How long the gathering thread made batches of decoded rows, or had a GPU make them."""

    @property
    def rows_per_s(self) -> float:
        """Rows a second."""
        return self.n_rows / self.seconds if self.seconds else 0.0

    @property
    def gb_per_s(self) -> float:
        """1e9 bytes of values a second."""
        return self.n_bytes / 1e9 / self.seconds if self.seconds else 0.0

    @property
    def stall_fraction(self) -> float:
        """Share of the time in which the consumer waited: near 0 if its own work takes longer than the loader's."""
        return self.wait_seconds / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.n_rows:,} rows in {self.seconds:.2f} s: {self.rows_per_s:,.0f} rows/s, {self.gb_per_s:.2f} GB/s, "
            f"waited {100 * self.stall_fraction:.0f} % of the time (read {self.read_seconds:.2f} s, "
            f"decode {self.decode_seconds:.2f} s, gather {self.gather_seconds:.2f} s)"
        )


class Clock:
    """Seconds by what they were spent on; several threads add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = {"read": 0.0, "decode": 0.0, "gather": 0.0, "wait": 0.0, "all": 0.0}

    def add(self, what: str, seconds: float) -> None:
        """Add seconds to one sum."""
        with self._lock:
            self._seconds[what] += seconds

    def __getitem__(self, what: str) -> float:
        return self._seconds[what]
