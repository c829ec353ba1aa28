"""Which rows: those that exist, and those that a slice, row ids, a mask or a `RowFilter` select.

In: an open store and a selection of rows. Out: row ids; or, where the ids of all rows would take too much memory, one
mask for each shard.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.store.format.keys import ROWS
from actcache.store.reading.tables import Tables

Choice = range | slice | Collection[int]
"""How positions, sequences or documents are selected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFilter:
    """Selects rows by their origin: a row is selected when it meets all the conditions.

    Every activation is stored; a filter says which of them are read: `Loader(..., rows=RowFilter(...))`,
    `store.read(site, RowFilter(...))`.

    Examples:
        >>> late = ac.RowFilter(positions=range(32, 64), exclude_tokens=lm.tokenizer.all_special_ids)
        >>> store.read(site_out, late).shape[0] == len(store.checked_rows(late))
        True
        >>> with ac.Loader(store, [site_out], batch_rows=256, rows=late) as loader:
        ...     print(min(int(batch.positions.min()) for batch in loader))
        32
    """

    exclude_tokens: Collection[int] = ()
    """Token ids whose rows are left out."""
    only_tokens: Collection[int] | None = None
    """Token ids whose rows are selected; None for all."""
    positions: Choice | None = None
    """Positions in the sequence, counted from its first token, whether or not that has a row."""
    sequences: Choice | None = None
    """Sequences, as `row_table()["sequence"]` numbers them."""
    documents: Choice | None = None
    """Documents, as `tokens("document")` numbers them."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, slice) and name in ("positions", "sequences", "documents"):
                if name == "documents" and min(value.start or 0, value.stop or 0) < 0:
                    raise ConfigError(f"row filter: documents are not counted from the end, got {value}")
            elif value is not None and not isinstance(value, range):
                object.__setattr__(self, name, _numbers(name, value))

    @classmethod
    def without_special_tokens(cls, tokenizer: Any) -> RowFilter:
        """Leaves out the rows of a tokenizer's special tokens: those that begin, end, pad or separate texts.

        Add other conditions with `dataclasses.replace`.

        Args:
            tokenizer: a tokenizer of transformers, with `all_special_ids`.

        Raises:
            ConfigError: it has no `all_special_ids`.
        """
        special = getattr(tokenizer, "all_special_ids", None)
        if special is None:
            raise ConfigError(
                f"a {type(tokenizer).__name__} does not say which tokens are special; name them: "
                "RowFilter(exclude_tokens=[...])"
            )
        return cls(exclude_tokens=special)

    def of_shard(self, store: Tables, shard: int) -> NDArray[np.bool_]:
        """`(n,)` mask of a shard's rows that are selected; empty for a shard that is not committed.

        Raises:
            CorruptShardError: the row table, or the tokens that tell the documents, are damaged.
        """
        n_rows = int(store.shard_n_rows[shard])
        here = np.array(store.spec.shard_sequences(shard))
        if n_rows == 0 or not _select(here, self.sequences, store.spec.n_sequences).any():
            return np.zeros(n_rows, bool)
        wanted, table = np.ones(n_rows, bool), store.shard_row_table(shard, self._arrays())
        if self.sequences is not None:
            wanted &= _select(table["sequence"], self.sequences, store.spec.n_sequences)
        if self.positions is not None:
            wanted &= _select(table["position"], self.positions, store.spec.sequence_length)
        if self.only_tokens is not None:
            wanted &= _select(table["token"], self.only_tokens, 1 << 32)
        if self.exclude_tokens:
            wanted &= ~_select(table["token"], self.exclude_tokens, 1 << 32)
        if self.documents is not None:
            document = store.shard_documents(shard)[table["sequence"].astype(np.int64) - here[0], table["position"]]
            wanted &= _select(document, self.documents, 1 << 32)
        return wanted

    def _arrays(self) -> set[str]:
        """The arrays of the row table that the conditions need."""
        needed = {
            "sequence": self.sequences is not None or self.documents is not None,
            "position": self.positions is not None or self.documents is not None,
            "token": self.only_tokens is not None or bool(self.exclude_tokens),
        }
        return {name for name, is_needed in needed.items() if is_needed}


def _numbers(name: str, values: Any) -> tuple[int, ...]:
    """Distinct numbers in order; ConfigError when they are not numbers, so that what a filter holds is legal."""
    try:
        numbers = np.asarray(values if hasattr(values, "__array__") else list(values))
    except TypeError:
        numbers = np.empty((1, 0))
    if numbers.ndim != 1 or (numbers.size and (numbers.dtype.kind not in "iu" or numbers.min() < 0)):
        raise ConfigError(f"row filter: {name} must be numbers from 0 on, or a range, got {str(values)[:80]!r}")
    return tuple(np.unique(numbers).tolist())


def _select(values: NDArray[Any], choice: Choice | None, n: int) -> NDArray[np.bool_]:
    """Mask of the values, each below `n`, that a choice selects."""
    if choice is None:
        return np.ones(len(values), bool)
    if isinstance(choice, slice):
        choice = range(*choice.indices(n))
    if not isinstance(choice, range):
        return np.isin(values, np.array(choice, np.int64))
    if choice.step < 0:
        choice = choice[::-1]
    after = values.astype(np.int64) - choice.start
    chosen: NDArray[np.bool_] = (after >= 0) & (values < choice.stop) & (after % choice.step == 0)
    return chosen


Rows = slice | Sequence[int] | NDArray[Any] | RowFilter
"""How rows are selected: a slice of row ids, row ids, a mask over all of them, or a filter."""


def row_ids(store: Tables, start: int, stop: int) -> NDArray[np.int64]:
    """Ids of the rows from `start` up to `stop` that can be read now; takes memory only for those."""
    size, n_rows = store.spec.rows_per_shard, store.shard_n_rows
    shards = np.flatnonzero(n_rows)
    shards = shards[(shards >= start // size) & (shards * size < stop)].tolist()
    ranges = ((max(start, s * size), min(stop, s * size + int(n_rows[s]))) for s in shards)
    return np.concatenate([np.empty(0, np.int64), *(np.arange(first, last) for first, last in ranges)])


def _bounds(store: Tables, rows: slice) -> tuple[int, int, int]:
    """Start, stop and step of a slice of row ids.

    Raises:
        IndexError: they are not whole numbers. StoreIncompleteError: a shard with such rows is not written yet.
    """
    try:
        start, stop, step = rows.indices(store.spec.n_rows)
    except (TypeError, ValueError) as error:
        raise IndexError(f"rows of {store.path} are asked for by a slice of whole numbers, not {rows}") from error
    _check_written(store, start, stop)
    return start, stop, step


def checked_rows(store: Tables, rows: Rows) -> NDArray[np.int64]:
    """The row ids that are selected; IndexError when one of them does not exist."""
    if isinstance(rows, RowFilter):
        size = store.spec.rows_per_shard
        parts = (shard * size + np.flatnonzero(rows.of_shard(store, shard)) for shard in store.committed)
        return np.concatenate([np.empty(0, np.int64), *parts])
    if isinstance(rows, slice):
        start, stop, step = _bounds(store, rows)
        if step == 1:
            return row_ids(store, start, stop)
        wanted = np.arange(start, stop, step)
        return wanted[_exist(store, wanted)]
    wanted = np.asarray(rows)
    if wanted.dtype == bool and wanted.shape == (store.spec.n_rows,):
        wanted = np.flatnonzero(wanted)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise IndexError(
            f"rows of {store.path} are asked for by a slice, a list of row ids, or a mask of {store.spec.n_rows} "
            f"booleans, not by {wanted.dtype} of shape {wanted.shape}"
        )
    wanted = wanted.astype(np.int64)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= store.spec.n_rows):
        raise IndexError(
            f"rows {wanted.min()} to {wanted.max()} asked of {store.path}, which has 0 to {store.spec.n_rows - 1}"
        )
    absent = wanted[~_exist(store, wanted)]
    if len(absent):
        raise _left_out(store, int(absent[0]))
    return wanted


def shard_masks(store: Tables, rows: Rows) -> Callable[[int], NDArray[np.bool_]]:
    """A function from a committed shard to the `(n,)` mask of its rows that are selected.

    Raises:
        IndexError: a selected row does not exist. ConfigError: a row id is given twice.
    """
    size, n_rows = store.spec.rows_per_shard, store.shard_n_rows
    if isinstance(rows, RowFilter):
        return lambda shard: rows.of_shard(store, shard)
    if isinstance(rows, slice):
        start, stop, step = _bounds(store, rows)
        return lambda shard: _select(np.arange(n_rows[shard]) + shard * size, range(start, stop, step), 0)
    mask = np.asarray(rows)
    if mask.dtype == bool and mask.shape == (store.spec.n_rows,):
        for shard in np.flatnonzero(n_rows < size).tolist():
            absent = np.flatnonzero(mask[shard * size + n_rows[shard] : (shard + 1) * size])
            if len(absent):
                store.record(ROWS, shard)  # raises if the shard is not written yet
                raise _left_out(store, int(shard * size + n_rows[shard] + absent[0]))
        return lambda shard: mask[shard * size : shard * size + n_rows[shard]]
    ids = np.sort(checked_rows(store, mask))
    if (twice := ids[1:][ids[1:] == ids[:-1]]).size:
        raise ConfigError(f"row {twice[0]} is given more than once; give each row once: numpy.unique(rows)")

    def of_shard(shard: int) -> NDArray[np.bool_]:
        first, last = np.searchsorted(ids, (shard * size, (shard + 1) * size))
        wanted = np.zeros(n_rows[shard], bool)
        wanted[ids[first:last] - shard * size] = True
        return wanted

    return of_shard


def _left_out(store: Tables, row: int) -> IndexError:
    return IndexError(f"row {row} of {store.path} was left out when it was written; see Store.row_ids()")


def _check_written(store: Tables, start: int, stop: int) -> None:
    """StoreIncompleteError for the first shard with such rows that is not written yet."""
    if not store.sealed:
        low, high = sorted((start, stop))
        for shard in range(low // store.spec.rows_per_shard, -(-high // store.spec.rows_per_shard)):
            store.record(ROWS, shard)


def _exist(store: Tables, wanted: NDArray[np.int64]) -> NDArray[np.bool_]:
    shard, within = np.divmod(wanted, store.spec.rows_per_shard)
    if store.sealed:
        n_rows = store.shard_n_rows[shard]
    else:
        shards, places = np.unique(shard, return_inverse=True)
        n_rows = np.array([store.record(ROWS, s).n_rows for s in shards.tolist()], np.int64)[places]
    there: NDArray[np.bool_] = within < n_rows
    return there
