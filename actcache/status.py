"""The argument of `watch`: how far an extraction is, how fast, and what its activations look like so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteStatus:
    """Statistics of a site over the rows that an extraction has stored so far."""

    mean_norm: float
    """Mean Euclidean norm of a row."""
    abs_max: float
    """Largest absolute value."""
    zero_fraction: float
    """Share of the values that are zero."""
    n_nan: int
    """Values that are not a number."""
    n_inf: int
    """Infinite values."""
    dead: bool
    """Whether all rows are equal: nothing can be learned from such a site."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How far an extraction is, and how fast; passed to `watch` after each forward pass."""

    n_sequences_done: int
    """Sequences whose forward pass is done, those of earlier calls included."""
    n_sequences: int
    """Sequences in all."""
    n_tokens: int
    """Tokens that this call has run the model over."""
    seconds: float
    """Since this call began to extract."""
    n_bytes: int
    """Bytes that this call has stored, compressed."""
    queue: int
    """Shards that wait to be encoded or are being encoded."""
    queue_size: int
    """Shards that fit in memory: if `queue` stays at this number, encoding or the disk is the limit."""
    sites: Mapping[str, SiteStatus]
    """Statistics of what this call has stored; empty before its first shard."""
    n_sequences_here: int
    """Sequences of `n_sequences_done` that this call has done."""
    n_sequences_share: int
    """Sequences that this call is going to do, of `n_sequences`."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, since this call began."""
        return self.n_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes stored a second."""
        return self.n_bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float:
        """Seconds left at this speed; infinite before the first sequence."""
        left = self.n_sequences_share - self.n_sequences_here
        return self.seconds * left / self.n_sequences_here if self.n_sequences_here else math.inf


Watch = Callable[[Status], None]
"""`watch(status)`: called by an extraction after each forward pass."""


Say = Callable[[str], None]
"""`say(sentence)`: called by long functions that report more than progress."""


def ignore(*_: object) -> None:
    """Stands in for a callback that the caller did not give."""
