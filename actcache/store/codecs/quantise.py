"""Rows as int8 with one scale each: half the bytes of bfloat16, for a known error.

    scale = the largest |value| of the row / 127, rounded up to a bfloat16
    q     = rint(value / scale), from -127 to 127; the value comes back as q * scale, off by scale / 2 at most

A few features of a model may be a hundred times larger than the rest; they would set the scale of every row, and the
rest would be lost (measured in `docs/codecs.md`). So features may have a power of two each, by which they are divided
before and multiplied after; without, all of them have 1.

A row of zeros has the scale 0. A row with a NaN or an infinity has the scale NaN, so that all of it comes back as NaN
and none of it can be taken for numbers. Rounding the scale up, never down, is what keeps q within its range.

The kernels work through a block of rows at a time that stays in the cache, and in numpy calls that release the GIL.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 127
_MAX_EXPONENT = 60
NAN_SCALE = 0x7FC0
"""Bits of the bfloat16 that marks a row with values that are not finite."""
_ROUNDED_UP = 1 + 2.0**-7
"""By how much a scale may grow when it is rounded up to a bfloat16."""
_BLOCK_VALUES = 1 << 15
_UNSIGNED: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<u2"),
    "float32": np.dtype("<u4"),
}
_MAGNITUDE: dict[str, Any] = {
    "bfloat16": np.uint16(0x7FFF),
    "float16": np.uint16(0x7FFF),
    "float32": np.uint32(0x7FFFFFFF),
}
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
"""Bits of the smallest pattern that is no finite number, the sign left out."""


def feature_exponents(values: NDArray[Any], logical: str) -> NDArray[np.int8]:
    """For each feature of `values` (R, D), of a logical dtype as stored, the power of two that it is divided by.

    `round(log2(largest |value| of the feature / median of those over features))`, and 0 for all that are not larger
    than the median: nothing is made larger, so that features that are nearly always zero stay harmless. Values that
    are not finite do not count. Exact arithmetic: the same rows give the same exponents, in any order, anywhere.
    """
    dtype = _UNSIGNED[logical]
    largest = np.zeros(values.shape[1], dtype)
    step = max(1, _BLOCK_VALUES // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        magnitudes = values[start : start + step].view(dtype) & _MAGNITUDE[logical]
        magnitudes[magnitudes >= _INFINITY[logical]] = 0
        np.maximum(largest, magnitudes.max(axis=0, initial=0), out=largest)
    floats = _widen(largest, logical, np.empty(len(largest), np.float32)).astype(np.float64)
    some = floats[floats > 0]
    if not len(some):
        return np.zeros(len(largest), np.int8)
    mantissas, exponents = np.frexp(floats / np.median(some))
    rounded = exponents - (mantissas < np.sqrt(0.5))
    found: NDArray[np.int8] = np.clip(rounded, 0, _MAX_EXPONENT).astype(np.int8)
    return found


def quantise_rows(
    values: NDArray[Any],
    logical: str,
    q_out: NDArray[np.int8],
    scale_out: NDArray[np.uint16],
    exponents: NDArray[np.int8] | None = None,
) -> None:
    """Quantise `values` (R, D) of a logical dtype, as stored (bfloat16: its bits as uint16).

    `q_out` (R, D) takes the codes, `scale_out` (R,) the bits of the scales as bfloat16; `exponents` (D,) are the
    features' powers of two.
    """
    n_rows, width = values.shape
    if not width:
        scale_out[:] = 0
        return
    step = max(1, _BLOCK_VALUES // width)
    work = np.empty((min(step, n_rows), width), np.float32)
    magnitudes = np.empty(work.shape, np.uint32)
    shrink = None if exponents is None else np.ldexp(np.float32(1), -exponents.astype(np.int32))
    # Of a row that is not finite, every number is nonsense on the way; its codes are set in the end.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            block = values[rows]
            floats = _widen(block, logical, work[: len(block)])
            if shrink is not None:
                np.multiply(floats, shrink, out=floats)
            bits, divisors = _scales(floats, magnitudes[: len(block)])
            scale_out[rows] = bits
            np.divide(floats, divisors[:, None], out=floats)
            np.rint(floats, out=floats)
            np.copyto(q_out[rows], floats, casting="unsafe")
            strange = bits == NAN_SCALE
            if strange.any():
                q_out[rows][strange] = 0


def dequantise_rows(
    q: NDArray[np.int8],
    scale_bits: NDArray[np.uint16],
    out: NDArray[Any],
    exponents: NDArray[np.int8] | None = None,
) -> None:
    """Values (R, D) of codes and scales, into `out`: float32, or uint16 for the bits of bfloat16 (to nearest)."""
    n_rows, width = q.shape
    scales = (scale_bits.astype(np.uint32) << 16).view(np.float32)[:, None]
    grow = None if exponents is None else np.ldexp(np.float32(1), exponents.astype(np.int32))
    step = max(1, _BLOCK_VALUES // max(1, width))
    work = np.empty((min(step, n_rows), width), np.float32) if out.dtype != np.float32 else None
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        floats = out[rows] if work is None else work[: len(q[rows])]
        floats[:] = q[rows]
        np.multiply(floats, scales[rows], out=floats)
        if grow is not None:
            np.multiply(floats, grow, out=floats)
        if work is not None:
            bits = floats.view(np.uint32)
            bits += ((bits >> 16) & 1) + 0x7FFF
            bits >>= 16
            np.copyto(out[rows], bits, casting="unsafe")


def largest_rounding(values: NDArray[np.float64], exponents: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """`(R, D)` the most that quantising changes each of some finite values `(R, D)`: half a step of its row."""
    grow = np.ldexp(1.0, np.zeros(values.shape[1], int) if exponents is None else exponents.astype(int))
    scales = np.abs(values / grow).max(axis=1, initial=0.0) / LEVELS * _ROUNDED_UP
    return np.asarray(scales[:, None] / 2 * grow)


def _scales(floats: NDArray[np.float32], magnitudes: NDArray[np.uint32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The scale of each row, as bfloat16 bits and as a number to divide by; `magnitudes` is scratch."""
    # Without their signs, the bits of floats are ordered as the floats are, with NaN above infinity above the rest.
    largest_bits = np.bitwise_and(floats.view(np.uint32), _MAGNITUDE["float32"], out=magnitudes).max(axis=1)
    exact = largest_bits.view(np.float32).astype(np.float64) / LEVELS
    near = exact.astype(np.float32)
    near = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    bits = ((near.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
    bits[largest_bits >= _INFINITY["float32"]] = NAN_SCALE
    scales = (bits.astype(np.uint32) << 16).view(np.float32)
    return bits, np.where(bits == 0, np.float32(1), scales)


def _widen(values: NDArray[Any], logical: str, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values as float32, in `out`."""
    if logical == "bfloat16":
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = values.view({"float16": "<f2", "float32": "<f4"}[logical])
    return out
