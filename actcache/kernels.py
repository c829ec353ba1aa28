"""Compiled inner loops for what several passes of numpy are too slow for: one pass over memory, without the GIL.

In: arrays of stored values. Out: the same results as the numpy code that each caller keeps for where numba is missing.
They are compiled when they are first used and kept on disk, which takes about a second once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

Kernel = Callable[..., None]


@cache
def take_and_measure() -> Kernel | None:
    """Rows of bfloat16 bits gathered and measured; None without numba. See `_take_and_measure`."""
    return _compiled(_take_and_measure)


@cache
def take_widened() -> Kernel | None:
    """Rows of bfloat16 bits gathered as float32; None without numba. See `_take_widened`."""
    return _compiled(_take_widened)


@cache
def take_dequantised() -> Kernel | None:
    """Rows of int8 gathered and multiplied out as float32; None without numba. See `_take_dequantised`."""
    return _compiled(_take_dequantised)


def _compiled(function: Kernel) -> Kernel | None:
    try:
        from numba import njit
    except ImportError:
        return None
    # Sums may be split over vector lanes; NaN and infinities keep their meaning.
    options: dict[str, Any] = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        compiled: Kernel = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder where the compiled code could be kept
        compiled = njit(**options)(function)
    return compiled


def _take_and_measure(rows, wanted, out, wide, sums, squares, largest, scalars):  # type: ignore[no-untyped-def]
    """`out[i] = rows[wanted[i]]`, and what a line of statistics needs of those rows.

    Args:
        rows: `(N, D)` uint16, bits of bfloat16.
        wanted: `(n,)` int64.
        out: `(n, D)` uint16.
        wide: `(D,)` uint32, room to work in.
        sums, squares: `(D,)` float64, added to; rows with a value that is not finite are left out.
        largest: `(D,)` uint16, bits of the largest absolute values so far.
        scalars: `(6,)` float64: rows, sum of norms, largest norm, zeros, NaN, infinities so far.
    """
    magnitude, infinity = np.uint16(0x7FFF), np.uint16(0x7F80)
    values = wide.view(np.float32)
    width = rows.shape[1]
    for i in range(len(wanted)):
        source, target = rows[wanted[i]], out[i]
        top, n_zero = np.uint16(0), 0
        for j in range(width):
            bits = source[j]
            target[j] = bits
            wide[j] = np.uint32(bits) << np.uint32(16)
            size = np.uint16(bits & magnitude)
            top = max(top, size)
            n_zero += int(size == 0)
        if top >= infinity:
            for j in range(width):
                size = np.uint16(source[j] & magnitude)
                scalars[4] += size > infinity
                scalars[5] += size == infinity
            continue
        square_norm = 0.0
        for j in range(width):
            value = np.float64(values[j])
            square = value * value
            sums[j] += value
            squares[j] += square
            square_norm += square
        for j in range(width):
            largest[j] = max(largest[j], np.uint16(target[j] & magnitude))
        norm = np.sqrt(square_norm)
        scalars[0] += 1
        scalars[1] += norm
        scalars[2] = max(scalars[2], norm)
        scalars[3] += n_zero


def _take_widened(values, places, out):  # type: ignore[no-untyped-def]
    """`out[i] = values[places[i]]`, bfloat16 bits `(N, D)` uint16 as the bits `(B, D)` uint32 of float32."""
    for i in range(len(places)):
        source, target = values[places[i]], out[i]
        for j in range(values.shape[1]):
            target[j] = np.uint32(source[j]) << np.uint32(16)


def _take_dequantised(values, scales, weights, places, out):  # type: ignore[no-untyped-def]
    """`out[i] = values[places[i]] * scales[i] * weights`: int8 `(N, D)`, float32 `(B,)` and `(D,)`."""
    for i in range(len(places)):
        source, target, scale = values[places[i]], out[i], scales[i]
        for j in range(values.shape[1]):
            target[j] = (np.float32(source[j]) * scale) * weights[j]
