"""Array to array, and array to bytes: the filters and serializers that a codec chain given by hand may name.

Frozen dataclasses, like the compressors. Whether a step works at all depends on the dtype that is stored:
the bits of bfloat16 values are stored as uint16, and rounding the bits of a float as if they were a number is wrong.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numcodecs import BitRound as NumcodecsBitRound
from numcodecs import FixedScaleOffset as NumcodecsFixedScaleOffset
from numcodecs import Quantize as NumcodecsQuantize
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.store.codecs.compressors import check_one_of, check_whole

_DTYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<f2", "<f4")


class Filter(Protocol):
    """Array to array."""

    name: ClassVar[str]
    """The codec's name in Zarr metadata."""

    def check(self, stored: np.dtype[Any]) -> None:
        """ConfigError where it does not work on this dtype."""

    def encoded_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """The dtype that it turns the stored dtype into."""

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """The encoded values, as many as there were, in any shape; ValueError when they cannot be held."""

    def backward(self, encoded: NDArray[Any], out: NDArray[Any]) -> None:
        """Decode flat values into the C-contiguous `out`."""

    def largest_error(self, values: NDArray[np.float64]) -> NDArray[np.float64] | float:
        """The most that it changes each of some values by; 0 if it is lossless."""


def _check_kind(step: Any, stored: np.dtype[Any], kinds: str) -> None:
    if stored.kind not in kinds:
        note = " (which holds the bits of bfloat16 values)" if stored == np.dtype("<u2") else ""
        raise ConfigError(f"{step.name} does not work on values stored as {stored.name}{note}; leave it out")


def _check_dtype(step: Any, stored: np.dtype[Any], kinds: str) -> None:
    _check_kind(step, stored, kinds)
    if step.dtype is not None and step.dtype != stored.str:
        raise ConfigError(
            f"{step.name}: dtype is {step.dtype!r}, but values are stored as {stored.str!r}; leave it out"
        )


def _check_held(step: Any, values: NDArray[Any], decoded: NDArray[Any]) -> None:
    # A NaN that comes back as a number, or a number as infinity, would be read as an activation.
    if not np.array_equal(np.isfinite(values.reshape(-1)), np.isfinite(decoded.reshape(-1))):
        raise ValueError(f"{step.name} cannot hold these values: some are too large for it, or not finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """`numcodecs.delta`: differences of neighbours, of integers only: sums of floats are inexact and NaN spreads."""

    name: ClassVar[str] = "numcodecs.delta"
    dtype: str | None = None
    """None: the stored dtype, the only one that is legal."""

    def __post_init__(self) -> None:
        check_one_of(self, "dtype", (None, *_DTYPES))

    def check(self, stored: np.dtype[Any]) -> None:
        """See `Filter`."""
        _check_dtype(self, stored, "ui")

    def encoded_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Filter`."""
        return stored

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """See `Filter`."""
        flat = values.reshape(-1)
        return np.concatenate([flat[:1], np.diff(flat)])

    def backward(self, encoded: NDArray[Any], out: NDArray[Any]) -> None:
        """See `Filter`."""
        np.add.accumulate(encoded, out=out.reshape(-1), dtype=out.dtype)

    def largest_error(self, values: NDArray[np.float64]) -> float:
        """See `Filter`."""
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Transpose:
    """Zarr's `transpose`: feature by feature in place of row by row."""

    name: ClassVar[str] = "transpose"
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        check_one_of(self, "order", ((0, 1), (1, 0)))
        if any(type(axis) is not int for axis in self.order):
            raise ConfigError(f"{self.name}: order must be whole numbers, not {self.order!r}")

    def check(self, stored: np.dtype[Any]) -> None:
        """See `Filter`."""

    def encoded_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Filter`."""
        return stored

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """See `Filter`."""
        return np.ascontiguousarray(values.transpose(self.order))

    def backward(self, encoded: NDArray[Any], out: NDArray[Any]) -> None:
        """See `Filter`."""
        turned = out.transpose(self.order)
        turned[...] = encoded.reshape(turned.shape)

    def largest_error(self, values: NDArray[np.float64]) -> float:
        """See `Filter`."""
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BitRound:
    """`numcodecs.bitround`: fewer bits of the mantissa. Lossy."""

    name: ClassVar[str] = "numcodecs.bitround"
    keepbits: int

    def __post_init__(self) -> None:
        check_whole(self, "keepbits", range(24))

    def check(self, stored: np.dtype[Any]) -> None:
        """See `Filter`."""
        _check_kind(self, stored, "f")
        if self.keepbits > np.finfo(stored).nmant:
            raise ConfigError(f"{self.name}: keepbits is {self.keepbits}, {stored.name} has {np.finfo(stored).nmant}")

    def encoded_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Filter`."""
        return stored

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """See `Filter`."""
        encoded: NDArray[Any] = NumcodecsBitRound(self.keepbits).encode(values).view(values.dtype)
        _check_held(self, values, encoded)
        return encoded

    def backward(self, encoded: NDArray[Any], out: NDArray[Any]) -> None:
        """See `Filter`."""
        out.reshape(-1)[:] = encoded

    def largest_error(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Filter`."""
        return np.abs(values) * 2.0 ** -(self.keepbits + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantize:
    """`numcodecs.quantize`: so many decimal digits. Lossy."""

    name: ClassVar[str] = "numcodecs.quantize"
    digits: int
    dtype: str | None = None
    """None: the stored dtype, the only one that is legal."""

    def __post_init__(self) -> None:
        check_whole(self, "digits", range(-30, 31))
        check_one_of(self, "dtype", (None, *_DTYPES))

    def check(self, stored: np.dtype[Any]) -> None:
        """See `Filter`."""
        _check_dtype(self, stored, "f")

    def encoded_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Filter`."""
        return stored

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """See `Filter`."""
        with np.errstate(over="ignore", invalid="ignore"):
            encoded = NumcodecsQuantize(self.digits, values.dtype).encode(values)
        _check_held(self, values, encoded)
        return np.asarray(encoded)

    def backward(self, encoded: NDArray[Any], out: NDArray[Any]) -> None:
        """See `Filter`."""
        out.reshape(-1)[:] = encoded

    def largest_error(self, values: NDArray[np.float64]) -> float:
        """See `Filter`."""
        return 0.5 * 10.0**-self.digits


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedScaleOffset:
    """`numcodecs.fixedscaleoffset`: `round((x - offset) * scale)` as another dtype. Lossy."""

    name: ClassVar[str] = "numcodecs.fixedscaleoffset"
    offset: float
    scale: float
    dtype: str | None = None
    """None: the stored dtype, the only one that is legal."""
    astype: str | None = None
    """None: the stored dtype."""

    def __post_init__(self) -> None:
        for option in ("offset", "scale"):
            value = getattr(self, option)
            if type(value) not in (int, float) or not math.isfinite(value) or (option == "scale" and not value):
                raise ConfigError(f"{self.name}: {option} must be a number, the scale not 0; it is {value!r}")
        check_one_of(self, "dtype", (None, *_DTYPES))
        check_one_of(self, "astype", (None, *_DTYPES))

    def check(self, stored: np.dtype[Any]) -> None:
        """See `Filter`."""
        _check_dtype(self, stored, "f")

    def encoded_dtype(self, stored: np.dtype[Any]) -> np.dtype[Any]:
        """See `Filter`."""
        return stored if self.astype is None else np.dtype(self.astype)

    def forward(self, values: NDArray[Any]) -> NDArray[Any]:
        """See `Filter`."""
        codec = self._codec(values.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            encoded = codec.encode(values)
            decoded = codec.decode(encoded).reshape(values.shape)
            # Whole numbers that do not fit wrap around: they come back, as other numbers.
            error = np.abs(decoded.astype(np.float64) - values)
            rounding = np.finfo(values.dtype).eps * (np.abs(values) + abs(self.offset) + np.abs(decoded))
        _check_held(self, values, decoded)
        if np.any(error > 0.5 / abs(self.scale) + 2 * rounding):
            raise ValueError(f"{self.name} cannot hold these values as {encoded.dtype.name}: choose another scale")
        return np.asarray(encoded)

    def backward(self, encoded: NDArray[Any], out: NDArray[Any]) -> None:
        """See `Filter`."""
        with np.errstate(over="ignore", invalid="ignore"):
            out.reshape(-1)[:] = self._codec(out.dtype).decode(encoded)

    def largest_error(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Filter`. The offset is added and taken off in the stored dtype, which rounds it."""
        rounding = np.finfo(np.float16 if self.dtype == "<f2" else np.float32).eps * abs(self.offset)
        return np.full(values.shape, 0.5 / abs(self.scale) + 2 * rounding)

    def _codec(self, stored: np.dtype[Any]) -> Any:
        return NumcodecsFixedScaleOffset(self.offset, self.scale, stored, self.encoded_dtype(stored))


@dataclass(frozen=True, kw_only=True, slots=True)
class Pcodec:
    """`numcodecs.pcodec`, a serializer: numbers to bytes. Needs the package pcodec; read by zarr-python and zarrs."""

    name: ClassVar[str] = "numcodecs.pcodec"
    level: int = 8
    mode_spec: str = "auto"
    delta_spec: str = "auto"

    def __post_init__(self) -> None:
        check_whole(self, "level", range(13))
        check_one_of(self, "mode_spec", ("auto", "classic"))
        check_one_of(self, "delta_spec", ("auto", "none", "try_consecutive", "try_lookback"))
        if importlib.util.find_spec("pcodec") is None:
            raise ConfigError(f"{self.name} needs the package pcodec; 'pip install pcodec'")

    def forward(self, values: NDArray[Any]) -> Any:
        """The bytes of the values."""
        from numcodecs.pcodec import PCodec

        options = {"mode_spec": self.mode_spec, "delta_spec": self.delta_spec}
        return PCodec(self.level, **options).encode(values.reshape(-1))

    def backward(self, payload: bytes, out: NDArray[Any]) -> None:
        """Decode into the flat `out`; ValueError unless the payload fills it exactly."""
        from pcodec import standalone

        progress = standalone.simple_decompress_into(payload, out)
        if progress.n_processed != out.size or not progress.finished:
            raise ValueError(f"it does not hold just the {out.size} values that belong here")


FILTERS: tuple[type[Any], ...] = (Transpose, Delta, BitRound, Quantize, FixedScaleOffset)
SERIALIZERS: tuple[type[Any], ...] = (Pcodec,)
