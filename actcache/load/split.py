"""Training and validation rows, divided by whole sequences.

In: a store, a share and a seed. Out: two row filters that no sequence passes both of.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.spec import check_number, integer
from actcache.store import RowFilter, checked_store

if TYPE_CHECKING:
    from actcache.store import Store


def split_sequences(store: Store, validation: float = 0.05, seed: int = 0) -> tuple[RowFilter, RowFilter]:
    """Filters for training and for validation: all rows of a sequence pass the same one.

    Rows of a sequence see the same text, so a split by rows would validate on text that was trained on. The side of a
    sequence depends on the seed and its number alone, so it stays the same when the store grows or is made again. The
    share is met by chance, to within about `sqrt(validation / n_sequences)`.

    Args:
        store: the store to split.
        validation: share of the sequences, between 0 and 1.
        seed: decides which sequences.

    Raises:
        ConfigError: the share is not between 0 and 1, or leaves one side without a sequence.

    Examples:
        >>> train, held_out = ac.split_sequences(store, validation=0.25, seed=0)
        >>> len(store.checked_rows(train)) + len(store.checked_rows(held_out)) == store.n_rows
        True
        >>> set(train.sequences) & set(held_out.sequences)
        set()
    """
    checked_store(store, "split")
    check_number("split", 0, 1, validation=validation)
    if not 0 < validation < 1:
        raise ConfigError(f"split: validation must be a share between 0 and 1, got {validation!r}")
    seed = integer("split", "seed", seed)
    held_out = _fractions(store.spec.n_sequences, seed) < validation
    if held_out.all() or not held_out.any():
        raise ConfigError(
            f"split: {validation} of {store.spec.n_sequences} sequences leaves one side without any; choose another "
            "share or seed"
        )
    return RowFilter(sequences=np.flatnonzero(~held_out)), RowFilter(sequences=np.flatnonzero(held_out))


def _fractions(n: int, seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for each of n sequences, from its number and the seed alone (splitmix64)."""
    start = int.from_bytes(hashlib.sha256(f"split,{seed}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        words = np.uint64(start) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
    return (words >> np.uint64(11)).astype(np.float64) / 2.0**53
