"""Statistics of activations, kept as one line per shard and merged exactly.

A line holds, for the rows whose values are all finite: their number, mean and sum of squared deviations per dimension,
the sum and maximum of their norms and how many of their values are zero; and for all rows how many values are NaN or
infinite. Lines are merged by the parallel update of Chan, Golub and LeVeque (1979), so neither the number of shards nor
a large common offset costs digits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK_VALUES = 1 << 16
"""Values widened to float64 at a time: half a megabyte, which stays in a core's cache."""
_SCALARS = ("count", "sum_norm", "max_norm", "n_zero", "n_nan", "n_inf")
LINE_FIELDS = ("mean", "sum_sq_deviations", "abs_max", *_SCALARS)


def line_length(width: int) -> int:
    """float64 values of a line: three per dimension, then the scalars."""
    return 3 * width + len(_SCALARS)


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteStats:
    """Statistics of one site over committed shards; rows with a NaN or infinity count only in `n_nan`, `n_inf`."""

    count: int
    """Rows that the other figures are taken over."""
    mean: NDArray[np.float64]
    """`(D,)` mean."""
    variance: NDArray[np.float64]
    """`(D,)` population variance."""
    dimension_abs_max: NDArray[np.float64]
    """`(D,)` largest absolute value of each dimension."""
    mean_norm: float
    """Mean of the rows' Euclidean norms."""
    rms_norm: float
    """Root of the mean squared norm."""
    max_norm: float
    """Largest norm of a row."""
    abs_max: float
    """Largest absolute value."""
    zero_fraction: float
    """Share of values that are exactly zero."""
    n_nan: int
    """Values that are NaN."""
    n_inf: int
    """Values that are infinite."""

    def summary(self) -> dict[str, Any]:
        """The scalars, JSON-able."""
        names = ("count", "mean_norm", "rms_norm", "max_norm", "abs_max", "zero_fraction", "n_nan", "n_inf")
        return {name: getattr(self, name) for name in names}


def widen(stored: NDArray[Any], out: NDArray[np.float64], logical: str) -> NDArray[np.float64]:
    """Stored values as float64 into `out`; bfloat16 bits become the upper half of a float32."""
    if logical == "bfloat16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one; it is counted later
        np.copyto(out, stored)
    return out


class LineBuilder:
    """Accumulates one line over blocks of `(rows, D)` stored values."""

    def __init__(self, width: int, logical: str) -> None:
        self.width, self.logical = width, logical
        self.block_rows = max(1, _BLOCK_VALUES // width)
        self._block = np.empty((self.block_rows, width))
        self.line = np.zeros(line_length(width))

    def add(self, rows: NDArray[Any]) -> None:
        """Take in `(n, D)` stored values."""
        for start in range(0, len(rows), self.block_rows):
            part = rows[start : start + self.block_rows]
            values = widen(part, self._block[: len(part)], self.logical)
            self.line = merge([self.line, _line_of(values)])


def _line_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    width = values.shape[1]
    line = np.zeros(line_length(width))
    abs_max = np.maximum(values.max(axis=0), -values.min(axis=0))
    n_nan = n_inf = 0
    if not np.isfinite(abs_max).all():
        n_nan, n_inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
        values = values[np.isfinite(values).all(axis=1)]
        abs_max = np.abs(values).max(axis=0, initial=0.0)
    n_zero = values.size - np.count_nonzero(values)
    line[-6:] = len(values), 0.0, 0.0, n_zero, n_nan, n_inf
    if len(values):
        norms = np.sqrt(np.einsum("nd,nd->n", values, values))
        mean = values.mean(axis=0)
        values -= mean
        line[:width] = mean
        line[width : 2 * width] = np.einsum("nd,nd->d", values, values)
        line[2 * width : 3 * width] = abs_max
        line[-5:-3] = norms.sum(), norms.max()
    return line


def merge(lines: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """One line for the rows of all lines."""
    result: NDArray[np.float64] | None = None
    for line in lines:
        result = line if result is None else _merge_two(result, line)
    if result is None:
        raise ValueError("no lines to merge")
    return result


def _merge_two(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    width = (len(a) - len(_SCALARS)) // 3
    n_a, n_b = a[-6], b[-6]
    out = a + b  # right for the sums: sum_norm, n_zero, n_nan, n_inf
    n = out[-6]
    share = n_b / n if n else 0.0
    shift = b[:width] - a[:width]
    out[:width] = a[:width] + shift * share
    out[width : 2 * width] += shift**2 * (n_a * share)
    out[2 * width : 3 * width] = np.maximum(a[2 * width : 3 * width], b[2 * width : 3 * width])
    out[-4] = max(a[-4], b[-4])
    return out


def stats_of(line: NDArray[np.float64]) -> SiteStats:
    """The readable form of a line."""
    width = (len(line) - len(_SCALARS)) // 3
    count, sum_norm, max_norm, n_zero, n_nan, n_inf = line[-6:]
    n = max(count, 1.0)
    mean, variance = line[:width].copy(), line[width : 2 * width] / n
    abs_max = line[2 * width : 3 * width].copy()
    return SiteStats(
        count=int(count),
        mean=mean,
        variance=variance,
        dimension_abs_max=abs_max,
        mean_norm=float(sum_norm / n),
        rms_norm=float(np.sqrt((variance + mean**2).sum())),
        max_norm=float(max_norm),
        abs_max=float(abs_max.max(initial=0.0)),
        zero_fraction=float(n_zero / (n * width)),
        n_nan=int(n_nan),
        n_inf=int(n_inf),
    )
