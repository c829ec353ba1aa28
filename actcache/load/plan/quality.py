"""How well a shuffle mixes, measured.

In: row ids of batches, and the sequence of each row. Out: a report with figures that a true permutation would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.load.plan.window_sizes import GOOD_RATIO

MOST_CORRELATION = 0.05
LEAST_P_VALUE = 1e-3
_RUNS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ShuffleReport:
    """How batches of an epoch compare with those of a true permutation of all rows.

    Examples:
        >>> with ac.Loader(store, [site_out], batch_rows=128) as loader:
        ...     report = loader.shuffle_report()
        >>> report.batch_rows, report.ratio > 0.97, report.good
        (128, True, True)
    """

    n_batches: int
    """Batches that were looked at: some in a row, at ten places of the epoch."""
    batch_rows: int
    """Rows of each batch."""
    distinct_sequences: float
    """Mean number of distinct sequences in a batch."""
    expected_sequences: float
    """The same for a true permutation, by the hypergeometric distribution."""
    serial_correlation: float
    """Correlation of the ids of rows that follow each other: 0 for a true permutation."""
    chi_square: float
    """Statistic of the table of row deciles by places in the epoch, in units of clusters: chunks are permuted as a
    whole, and their rows come together, so the statistic of rows is divided by the mean size of such clusters (the
    design effect of Kish and of Rao and Scott)."""
    p_value: float
    """Probability of a larger statistic if each cluster is equally likely at any place."""

    @property
    def ratio(self) -> float:
        """Distinct sequences over their expectation."""
        return self.distinct_sequences / self.expected_sequences

    @property
    def good(self) -> bool:
        """Whether the batches differ from those of a true permutation by nothing that a trainer would notice."""
        return (
            self.ratio >= GOOD_RATIO
            and abs(self.serial_correlation) <= MOST_CORRELATION
            and self.p_value >= LEAST_P_VALUE
        )

    def __str__(self) -> str:
        return (
            f"{self.distinct_sequences:,.0f} distinct sequences in a batch of {self.batch_rows:,} rows, "
            f"{self.ratio:.3f} of a true shuffle; serial correlation {self.serial_correlation:+.3f}; "
            f"chi-square p = {self.p_value:.3g}: {'good' if self.good else 'bad'}"
        )


def batches_to_look_at(n_batches: int, most: int) -> list[range]:
    """Runs of consecutive batches, at equal distances over the epoch."""
    n_runs = min(_RUNS, n_batches)
    length = max(1, min(most // _RUNS, n_batches // n_runs))
    starts = [round(run * (n_batches - length) / max(1, n_runs - 1)) for run in range(n_runs)]
    return [range(start, start + length) for start in starts]


def shuffle_report(
    runs: Sequence[Sequence[NDArray[np.int64]]],
    sequences_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    rows_per_sequence: NDArray[np.int64],
    n_row_ids: int,
    rows_per_chunk: int,
) -> ShuffleReport:
    """The report on some batches.

    Args:
        runs: `(B,)` row ids of consecutive batches, at several places of an epoch.
        sequences_of: gives the sequence of each of some rows.
        rows_per_sequence: `(Q,)` rows that each sequence has in an epoch.
        n_row_ids: all row ids are below this number.
        rows_per_chunk: rows of a chunk, which may come together.
    """
    batches = [batch for run in runs for batch in run]
    batch_rows = len(batches[0])
    statistic, p_value = _chi_square(runs, n_row_ids, rows_per_chunk)
    return ShuffleReport(
        n_batches=len(batches),
        batch_rows=batch_rows,
        distinct_sequences=float(np.mean([len(np.unique(sequences_of(batch))) for batch in batches])),
        expected_sequences=expected_sequences(rows_per_sequence, batch_rows),
        serial_correlation=_serial_correlation(runs),
        chi_square=statistic,
        p_value=p_value,
    )


def expected_sequences(rows_per_sequence: NDArray[np.int64], batch_rows: int) -> float:
    """Expected number of distinct sequences in a sample of rows without replacement.

    A sequence with k of N rows is absent with probability `C(N - k, B) / C(N, B)`.
    """
    n_rows, expected = int(rows_per_sequence.sum()), 0.0
    for size, count in zip(*(part.tolist() for part in np.unique(rows_per_sequence, return_counts=True)), strict=True):
        if n_rows - size < batch_rows:
            absent = 0.0
        else:
            tops = math.lgamma(n_rows - size + 1) - math.lgamma(n_rows - size - batch_rows + 1)
            absent = math.exp(tops - math.lgamma(n_rows + 1) + math.lgamma(n_rows - batch_rows + 1))
        expected += count * (1 - absent) if size else 0.0
    return expected


def _serial_correlation(runs: Sequence[Sequence[NDArray[np.int64]]]) -> float:
    """Correlation over pairs of consecutive rows of a run."""
    orders = [np.concatenate(list(run)).astype(float) for run in runs]
    before, after = (np.concatenate(parts) for parts in zip(*((o[:-1], o[1:]) for o in orders), strict=True))
    if len(before) < 2 or before.std() == 0 or after.std() == 0:
        return 0.0
    return float(np.corrcoef(before, after)[0, 1])


def _chi_square(
    runs: Sequence[Sequence[NDArray[np.int64]]], n_row_ids: int, rows_per_chunk: int
) -> tuple[float, float]:
    """Statistic of row decile by run, in clusters (rows of one chunk in one run), and its p-value."""
    import torch

    table, squares, n_rows = np.zeros((len(runs), 10)), 0.0, 0
    for number, run in enumerate(runs):
        rows = np.concatenate(list(run))
        table[number] = np.bincount(rows * 10 // n_row_ids, minlength=10)
        _, sizes = np.unique(rows // rows_per_chunk, return_counts=True)
        squares, n_rows = squares + float((sizes.astype(float) ** 2).sum()), n_rows + len(rows)
    table = table[:, table.sum(axis=0) > 0]
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / n_rows
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    if freedom == 0:
        return 0.0, 1.0
    statistic = float(((table - expected) ** 2 / expected).sum()) / (squares / n_rows)
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2))
    return statistic, float(p_value)
