"""The loops themselves. Each works through few arrays and along rows, so that the compiler makes vector code of it.

In: arrays of stored values. Out: filled arrays.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from actcache.kernels.bits import NAN, PATTERNS

_BLOCK_ROWS = 256
"""Rows measured at a time: they stay in the cache from one step to the next."""
_ROUNDED_ROWS = 16
"""Rows rounded at a time, for the same reason."""
_BFLOAT16 = PATTERNS["bfloat16"]
_MAGNITUDE, _INFINITY = np.uint16(_BFLOAT16.magnitude), np.uint16(_BFLOAT16.infinity)


def _compiled(function: Callable[..., Any]) -> Any:
    # Sums may be split over vector lanes; NaN and infinities keep their meaning.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    return _kept(function, options)


def _compiled_exactly(function: Callable[..., Any]) -> Any:
    # No two steps made one: the same bits as numpy's, which rounds after each.
    return _kept(function, {"nogil": True, "error_model": "numpy"})


def _kept(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder where the compiled code could be kept
        return njit(**options)(function)


@_compiled
def take_and_measure(rows, wanted, out, wide, sums, squares, largest, scalars):
    """`out[i] = rows[wanted[i]]`, and what a line of statistics needs of those rows.

    Args:
        rows: `(N, D)` uint16, bits of bfloat16.
        wanted: `(n,)` int64.
        out: `(n, D)` uint16.
        wide: `(2, D)` uint32, room to work in.
        sums, squares: `(D,)` float64, added to; rows with a value that is not finite are left out.
        largest: `(D,)` uint16, bits of the largest absolute values so far.
        scalars: `(6,)` float64: rows, sum of norms, largest norm, zeros, NaN, infinities so far.
    """
    width = rows.shape[1]
    top, zeros = np.empty(width, np.uint16), np.empty(width, np.uint16)
    square_norms = np.empty(_BLOCK_ROWS)
    for start in range(0, len(wanted), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(wanted))
        block = out[start:stop]
        _take(rows, wanted[start:stop], block)
        top[:] = 0
        zeros[:] = 0
        _magnitudes(block, top, zeros)
        if top.max() >= _INFINITY:
            _measure_row_by_row(block, sums, squares, largest, scalars)
            continue
        np.maximum(largest, top, largest)
        scalars[0] += len(block)
        scalars[3] += zeros.sum()
        _add_up(block, wide, sums, squares, square_norms)
        for i in range(len(block)):
            norm = np.sqrt(square_norms[i])
            scalars[1] += norm
            scalars[2] = max(scalars[2], norm)


@_compiled
def _take(rows, wanted, out):
    for i in range(len(wanted)):
        row = wanted[i]
        for j in range(rows.shape[1]):
            out[i, j] = rows[row, j]


@_compiled
def _magnitudes(block, top, zeros):
    """Largest magnitude and number of zeros of each column; a block has too few rows for the count to overflow."""
    for i in range(block.shape[0]):
        for j in range(block.shape[1]):
            size = np.uint16(block[i, j] & _MAGNITUDE)
            top[j] = max(top[j], size)
            zeros[j] = np.uint16(zeros[j] + np.uint16(size == 0))


@_compiled
def _add_up(block, wide, sums, squares, square_norms):
    """Two rows at a time, so that the sums are fetched and stored half as often."""
    values, width, n_rows = wide.view(np.float32), block.shape[1], block.shape[0]
    for i in range(0, n_rows // 2 * 2, 2):
        for j in range(width):
            wide[0, j] = np.uint32(block[i, j]) << np.uint32(16)
        for j in range(width):
            wide[1, j] = np.uint32(block[i + 1, j]) << np.uint32(16)
        norm_0, norm_1 = 0.0, 0.0
        for j in range(width):
            value_0, value_1 = np.float64(values[0, j]), np.float64(values[1, j])
            square_0, square_1 = value_0 * value_0, value_1 * value_1
            sums[j] += value_0 + value_1
            squares[j] += square_0 + square_1
            norm_0 += square_0
            norm_1 += square_1
        square_norms[i], square_norms[i + 1] = norm_0, norm_1
    if n_rows % 2:
        norm_0 = 0.0
        for j in range(width):
            wide[0, j] = np.uint32(block[n_rows - 1, j]) << np.uint32(16)
        for j in range(width):
            value_0 = np.float64(values[0, j])
            square_0 = value_0 * value_0
            sums[j] += value_0
            squares[j] += square_0
            norm_0 += square_0
        square_norms[n_rows - 1] = norm_0


@_compiled
def _measure_row_by_row(block, sums, squares, largest, scalars):
    """A block in which something is not finite: rows with such values are counted apart."""
    word = np.empty(1, np.uint32)
    value = word.view(np.float32)
    for i in range(block.shape[0]):
        n_nan, n_infinite, n_zero = 0, 0, 0
        for j in range(block.shape[1]):
            size = np.uint16(block[i, j] & _MAGNITUDE)
            n_nan += int(size > _INFINITY)
            n_infinite += int(size == _INFINITY)
            n_zero += int(size == 0)
        scalars[4] += n_nan
        scalars[5] += n_infinite
        if n_nan or n_infinite:
            continue
        square_norm = 0.0
        for j in range(block.shape[1]):
            largest[j] = max(largest[j], np.uint16(block[i, j] & _MAGNITUDE))
            word[0] = np.uint32(block[i, j]) << np.uint32(16)
            square = np.float64(value[0]) * np.float64(value[0])
            sums[j] += np.float64(value[0])
            squares[j] += square
            square_norm += square
        scalars[0] += 1
        scalars[1] += np.sqrt(square_norm)
        scalars[2] = max(scalars[2], np.sqrt(square_norm))
        scalars[3] += n_zero


@_compiled
def split_planes(values, low, high):
    """The lower and the upper bytes `(N,)` uint8 of `(N,)` uint16."""
    for i in range(len(values)):
        low[i] = np.uint8(values[i] & np.uint16(255))
        high[i] = np.uint8(values[i] >> np.uint16(8))


@_compiled
def take_widened(values, places, out):
    """`out[i] = values[places[i]]`, bfloat16 bits `(N, D)` uint16 as the bits `(B, D)` uint32 of float32."""
    for i in range(len(places)):
        source, target = values[places[i]], out[i]
        for j in range(values.shape[1]):
            target[j] = np.uint32(source[j]) << np.uint32(16)


@_compiled
def take_dequantised(values, scales, weights, places, out):
    """`out[i] = values[places[i]] * scales[i] * weights`: int8 `(N, D)`, float32 `(B,)` and `(D,)`."""
    for i in range(len(places)):
        source, target, scale = values[places[i]], out[i], scales[i]
        for j in range(values.shape[1]):
            target[j] = (np.float32(source[j]) * scale) * weights[j]


@_compiled_exactly
def take_widened_normalised(values, places, out, mean, scale):
    """`out[i] = (values[places[i]] - mean) * scale`: of bfloat16 bits `(N, D)` uint16, float32 `(B, D)`."""
    bits = out.view(np.uint32)
    for i in range(len(places)):
        source, raw, target = values[places[i]], bits[i], out[i]
        for j in range(values.shape[1]):
            raw[j] = np.uint32(source[j]) << np.uint32(16)
        for j in range(values.shape[1]):
            target[j] = (target[j] - mean[j]) * scale


@_compiled_exactly
def take_dequantised_normalised(values, scales, weights, places, out, mean, scale):
    """`out[i] = (values[places[i]] * scales[i] * weights - mean) * scale`, see `take_dequantised`."""
    for i in range(len(places)):
        source, target, row_scale = values[places[i]], out[i], scales[i]
        for j in range(values.shape[1]):
            target[j] = ((np.float32(source[j]) * row_scale) * weights[j] - mean[j]) * scale


@_compiled_exactly
def round_to_bfloat16(bits, out):
    """float32 bits `(B, D)` uint32 to bfloat16 bits `(B, D)` uint16, to the nearest, ties to even; NaN stays NaN."""
    for i in range(bits.shape[0]):
        for j in range(bits.shape[1]):
            word = bits[i, j]
            nearest = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            out[i, j] = np.uint16(NAN) if is_nan else np.uint16(nearest)


@_compiled_exactly
def take_dequantised_rounded(values, scales, weights, places, out):
    """`take_dequantised`, into bfloat16 bits `(B, D)` uint16."""
    wide = np.empty((_ROUNDED_ROWS, values.shape[1]), np.float32)
    for start in range(0, len(places), _ROUNDED_ROWS):
        here = slice(start, min(start + _ROUNDED_ROWS, len(places)))
        some = wide[: here.stop - start]
        take_dequantised(values, scales[here], weights, places[here], some)
        round_to_bfloat16(some.view(np.uint32), out[here])


@_compiled_exactly
def take_widened_normalised_rounded(values, places, out, mean, scale):
    """`take_widened_normalised`, into bfloat16 bits `(B, D)` uint16."""
    wide = np.empty((_ROUNDED_ROWS, values.shape[1]), np.float32)
    for start in range(0, len(places), _ROUNDED_ROWS):
        here = slice(start, min(start + _ROUNDED_ROWS, len(places)))
        some = wide[: here.stop - start]
        take_widened_normalised(values, places[here], some, mean, scale)
        round_to_bfloat16(some.view(np.uint32), out[here])


@_compiled_exactly
def take_dequantised_normalised_rounded(values, scales, weights, places, out, mean, scale):
    """`take_dequantised_normalised`, into bfloat16 bits `(B, D)` uint16."""
    wide = np.empty((_ROUNDED_ROWS, values.shape[1]), np.float32)
    for start in range(0, len(places), _ROUNDED_ROWS):
        here = slice(start, min(start + _ROUNDED_ROWS, len(places)))
        some = wide[: here.stop - start]
        take_dequantised_normalised(values, scales[here], weights, places[here], some, mean, scale)
        round_to_bfloat16(some.view(np.uint32), out[here])
