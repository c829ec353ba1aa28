"""Rows as int8 with one scale each: half the bytes of bfloat16, for a known error.

    scale = the largest |value| of the row / 127, rounded up to a bfloat16
    q     = rint(value / scale), from -127 to 127; the value comes back as q * scale, off by scale / 2 at most

A few features of a model may be a hundred times larger than the rest; they would set the scale of every row, and the
rest would be lost (measured in `docs/codecs.md`). So features may have a power of two each, by which they are divided
before and multiplied after; without, all of them have 1.

A row of zeros has the scale 0. A row with a NaN or an infinity has the scale NaN, so that all of it comes back as NaN
and none of it can be taken for numbers. Rounding the scale up, never down, is what keeps q within its range.

All works through a block of rows at a time that stays in the cache, and in numpy calls that release the GIL.

With the scale alone, models with a few very large features lose 5e-4 to 2.4e-3 of the variance (SmolLM2); with the
powers of two 1e-4. The scale has two bytes instead of four: at a width of 128 that is the difference between 0.508 and
0.516 of bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.kernels import take_int8
from actcache.kernels.bits import NAN, PATTERNS, round_bits_up, widen_bits
from actcache.store.codecs.quantiser import ACTS, BLOCK_VALUES, Loop, Powers, Steps, StoredArray

if TYPE_CHECKING:
    import torch

LEVELS = 127
_MAX_EXPONENT = 60
_ROUNDED_UP = 1 + 2.0**-7
"""By how much a scale may grow when it is rounded up to a bfloat16."""
_SCALE = "scale"


class Int8:
    """A `Quantiser`: rows of int8, with the bits of a bfloat16 as the scale of each."""

    def arrays(self, width: int) -> tuple[StoredArray, ...]:  # noqa: D102
        return (
            StoredArray(name=ACTS, element="int8", row_shape=(width,)),
            StoredArray(name=_SCALE, element="bfloat16", row_shape=()),
        )

    def fit(self, values: NDArray[Any], logical: str) -> NDArray[np.int8]:  # noqa: D102
        return feature_exponents(values, logical)

    def encode(  # noqa: D102
        self, values: NDArray[Any], logical: str, powers: Powers | None, out: Sequence[NDArray[Any]]
    ) -> None:
        codes, scales = out
        quantise_rows(values, logical, codes, scales, powers)

    def decode(  # noqa: D102
        self, parts: Sequence[NDArray[Any]], powers: Powers | None, out: NDArray[np.float32]
    ) -> None:
        codes, scales = parts
        out[:] = codes
        np.multiply(out, widen_bits(scales)[:, None], out=out)
        if powers is not None:
            np.multiply(out, powers, out=out)

    def largest_error(  # noqa: D102
        self, values: NDArray[np.float64], powers: Powers | None
    ) -> NDArray[np.float64]:
        grow = np.ones(values.shape[1]) if powers is None else powers.astype(np.float64)
        scales = np.abs(values / grow).max(axis=1, initial=0.0) / LEVELS * _ROUNDED_UP
        return np.asarray(scales[:, None] / 2 * grow)

    def loop(  # noqa: D102
        self, parts: Sequence[NDArray[Any]], powers: Powers | None, *, normalised: bool, rounded: bool
    ) -> Loop | None:
        kernel = take_int8(normalised=normalised, rounded=rounded)
        if kernel is None:
            return None
        (codes, scales), found = parts, kernel
        weights = np.ones(codes.shape[1], np.float32) if powers is None else powers

        def gather(places: NDArray[np.int64], out: NDArray[Any], *after: Any) -> None:
            found(codes, widen_bits(scales[places]), weights, places, out, *after)

        return gather

    def device_steps(self, parts: Sequence[torch.Tensor], width: int) -> tuple[torch.Tensor, Steps]:  # noqa: D102
        import torch

        codes, scales = parts
        return codes, [(torch.mul, scales.float()[:, None])]


def feature_exponents(values: NDArray[Any], logical: str) -> NDArray[np.int8]:
    """For each feature of `values` (R, D), of a logical dtype as stored, the power of two that it is divided by.

    `round(log2(largest |value| of the feature / median of those over features))`, and 0 for all that are not larger
    than the median: nothing is made larger, so that features that are nearly always zero stay harmless. Values that
    are not finite do not count. Exact arithmetic: the same rows give the same exponents, in any order, anywhere.
    """
    pattern = PATTERNS[logical]
    largest = np.zeros(values.shape[1], pattern.unsigned)
    step = max(1, BLOCK_VALUES // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        magnitudes = values[start : start + step].view(pattern.unsigned) & pattern.magnitude
        magnitudes[magnitudes >= pattern.infinity] = 0
        np.maximum(largest, magnitudes.max(axis=0, initial=0), out=largest)
    floats = _as_float32(largest, logical, np.empty(len(largest), np.float32)).astype(np.float64)
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
    powers: Powers | None = None,
) -> None:
    """Quantise `values` (R, D) of a logical dtype, as stored (bfloat16: its bits as uint16).

    `q_out` (R, D) takes the codes, `scale_out` (R,) the bits of the scales as bfloat16.
    """
    n_rows, width = values.shape
    if not width:
        scale_out[:] = 0
        return
    step = max(1, BLOCK_VALUES // width)
    work = np.empty((min(step, n_rows), width), np.float32)
    magnitudes = np.empty(work.shape, np.uint32)
    shrink = None if powers is None else np.float32(1) / powers
    # In a row that is not finite, the numbers on the way mean nothing; its codes are set at the end.
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            block = values[rows]
            floats = _as_float32(block, logical, work[: len(block)])
            if shrink is not None:
                np.multiply(floats, shrink, out=floats)
            bits, divisors = _scales(floats, magnitudes[: len(block)])
            scale_out[rows] = bits
            np.divide(floats, divisors[:, None], out=floats)
            np.rint(floats, out=floats)
            np.copyto(q_out[rows], floats, casting="unsafe")
            strange = bits == NAN
            if strange.any():
                q_out[rows][strange] = 0


def _scales(floats: NDArray[np.float32], magnitudes: NDArray[np.uint32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The scale of each row, as bfloat16 bits and as a number to divide by; `magnitudes` is scratch."""
    magnitude, infinity = np.uint32(PATTERNS["float32"].magnitude), PATTERNS["float32"].infinity
    largest_bits = np.bitwise_and(floats.view(np.uint32), magnitude, out=magnitudes).max(axis=1)
    exact = largest_bits.view(np.float32).astype(np.float64) / LEVELS
    near = exact.astype(np.float32)
    near = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    bits = round_bits_up(near)
    bits[largest_bits >= infinity] = NAN
    return bits, np.where(bits == 0, np.float32(1), widen_bits(bits))


def _as_float32(values: NDArray[Any], logical: str, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values as float32, in `out`."""
    if logical == "bfloat16":
        return widen_bits(values, out)
    out[...] = values.view({"float16": "<f2", "float32": "<f4"}[logical])
    return out
