"""Chunk codecs: bytes of one chunk to stored bytes and back, exactly as the Zarr v3 codec chain in the metadata says.

A codec is a string: the name of a preset, or the JSON text of a list of Zarr v3 codec metadata. Every chain ends in
crc32c, because without it a flipped byte reads back wrong and silent. Encoding and decoding release the GIL, so chunks
are worked on in threads. Only the codecs listed in `steps.py` and `filters.py` can be named, so that nothing in a
store's metadata reaches a codec that executes or unpickles.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.memory import Scratch
from actcache.store.filters import FILTERS, SERIALIZERS, Filter, Pcodec, Transpose
from actcache.store.quantise import dequantise_rows, feature_exponents, largest_rounding, quantise_rows
from actcache.store.steps import COMPRESSORS, DAMAGE, Blosc, Compressor, PlanesBlosc, Shuffle, Zstd, configuration

__all__ = [
    "CRC_BYTES",
    "PRESETS",
    "STORED_DTYPE",
    "TABLE",
    "Chain",
    "Scratch",
    "chain_of",
    "checksum_of",
    "choose_codec",
    "crc_bytes",
    "dequantise_rows",
    "expected_bytes_per_value",
    "feature_exponents",
    "matches",
    "parse_codec",
    "quantise_rows",
]

CRC_BYTES = 4
STORED_DTYPE: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
"""Logical dtype -> dtype in the arrays. Zarr has no bfloat16: its bits are stored as uint16."""
MAX_TEXT = 4096
"""Characters of a codec's JSON text."""
MAX_STEPS = 8
_LOSSLESS = ("lossless", "sparse")
_TRIAL_BYTES = 1 << 19
"""Size of the pieces that `choose_codec` tries: that of chunks, by default."""
_STEPS: dict[str, type[Any]] = {step.name: step for step in (*FILTERS, *SERIALIZERS, *COMPRESSORS)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What happens to a chunk on its way to the disk, in this order; a crc32c always comes last."""

    filters: tuple[Filter, ...] = ()
    """Array to array."""
    serializer: Pcodec | None = None
    """Array to bytes; None: the bytes as they lie in memory, little-endian."""
    compressors: tuple[Compressor, ...] = ()
    """Bytes to bytes."""
    quantised: bool = False
    """True when rows are stored as int8 with a scale each."""

    @property
    def is_raw(self) -> bool:
        """True when the stored bytes are those in memory."""
        return not (self.filters or self.serializer or self.compressors)

    def stored_dtype(self, logical: str) -> np.dtype[Any]:
        """The dtype of the array that holds values of this logical dtype.

        Raises:
            ConfigError: a filter of the chain does not work on it.
        """
        if self.quantised:
            return np.dtype(np.int8)
        stored = STORED_DTYPE[logical]
        self._dtypes(stored)
        return stored

    def zarr_codecs(self, stored: np.dtype[Any]) -> dict[str, Any]:
        """The chain in the words of zarr-python's `create_array`."""
        dtypes = self._dtypes(stored)
        words: dict[str, Any] = {
            "filters": [_metadata(step, dtype) for step, dtype in zip(self.filters, dtypes, strict=False)],
            "compressors": [*(_metadata(step, dtypes[-1]) for step in self.compressors), {"name": "crc32c"}],
        }
        if self.serializer is not None:
            words["serializer"] = _metadata(self.serializer, dtypes[-1])
        return words

    def largest_error(self, values: NDArray[np.float64], exponents: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """`(n, D)` the most by which storing may change each of some finite values `(n, D)`; zeros if it is lossless.

        `exponents` are a quantised site's powers of two, one a feature.
        """
        error = np.zeros(values.shape)
        if self.quantised:
            error += largest_rounding(values, exponents)
        for step in self.filters:
            error += step.largest_error(values)
        return error

    def encode(self, chunk: NDArray[Any]) -> tuple[Any, int]:
        """Encode one C-contiguous chunk; the payload (bytes-like) and its crc32c, which is stored right behind it.

        The payload of a chain without any step is the chunk's own memory. Lossy filters raise ValueError for values
        that they cannot hold.
        """
        values = chunk
        for step in self.filters:
            values = step.forward(values)
        payload: Any = self.serializer.forward(values) if self.serializer else values.reshape(-1).view(np.uint8)
        for compressor in self.compressors:
            payload = compressor.compress(payload, values.itemsize)
        return payload, google_crc32c.value(payload)

    def decode_into(self, stored: memoryview, out: NDArray[Any]) -> str | None:
        """Check and decode one stored chunk into the C-contiguous `out`; None, or what is wrong with the chunk.

        Whatever the stored bytes are, nothing outside `out` is written; after an error the content of `out` is
        undefined.
        """
        if len(stored) < CRC_BYTES:
            return f"is {len(stored)} bytes long, too short for a checksum"
        payload = stored[:-CRC_BYTES]
        if not matches(payload, checksum_of(stored)):
            return "does not match its checksum"
        try:
            if self.filters or self.serializer:
                self._decode_filtered(payload, out)
            else:
                self._expand(payload, out.reshape(-1).view(np.uint8), out.itemsize)
        except DAMAGE as error:
            return f"cannot be decoded: {error}"
        return None

    def _dtypes(self, stored: np.dtype[Any]) -> list[np.dtype[Any]]:
        """The dtypes before, between and behind the filters."""
        dtypes = [stored]
        for step in self.filters:
            step.check(dtypes[-1])
            dtypes.append(step.encoded_dtype(dtypes[-1]))
        return dtypes

    def _decode_filtered(self, payload: memoryview, out: NDArray[Any]) -> None:
        dtypes = self._dtypes(out.dtype)
        values = np.empty(out.size, dtypes[-1])
        if self.serializer is None:
            self._expand(payload, values.view(np.uint8), values.itemsize)
        else:
            room = np.empty(_bound(values.nbytes), np.uint8)
            n_bytes = self._expand(payload, room, values.itemsize, exact=False)
            self.serializer.backward(room[:n_bytes].tobytes(), values)
        for step, dtype in reversed(list(zip(self.filters, dtypes, strict=False))):
            target = out if step is self.filters[0] else np.empty(out.shape, dtype)
            step.backward(values, target)
            values = target.reshape(-1)
        if not self.filters:
            out.reshape(-1)[:] = values

    def _expand(self, payload: memoryview, out: NDArray[np.uint8], itemsize: int, *, exact: bool = True) -> int:
        """Undo the compressors, the last one first; the number of bytes at the start of `out`."""
        for position in range(len(self.compressors) - 1, 0, -1):
            room = np.empty(_bound(len(out)), np.uint8)
            payload = room.data[: self.compressors[position].expand(payload, room, itemsize)]
        if self.compressors:
            n_bytes = self.compressors[0].expand(payload, out, itemsize)
        else:
            n_bytes = len(payload)
            out[:n_bytes] = np.frombuffer(payload, np.uint8)[: len(out)]
        if n_bytes != len(out) and (exact or n_bytes > len(out)):
            raise ValueError(f"it holds {n_bytes} bytes where {len(out)} belong")
        return n_bytes


def _bound(n_bytes: int) -> int:
    """Room for so many bytes after compressors that found nothing to compress."""
    return n_bytes + n_bytes // 8 + (1 << 16)


def _metadata(step: Any, stored: np.dtype[Any] | None = None) -> dict[str, Any]:
    return {"name": step.name, "configuration": configuration(step, stored)}


# One block as large as a chunk: zstd then sees the high bytes of many values in a row, which are all that can be
# compressed, and steps over the low bytes. Blosc's own choice of 32 KiB mixes the two and is a third as fast to decode.
_ONE_BLOCK = 1 << 19
PRESETS: dict[str, Chain] = {
    "raw": Chain(),
    "fast": Chain(compressors=(Blosc(cname="lz4", clevel=5, shuffle="bitshuffle"),)),
    "lossless": Chain(compressors=(PlanesBlosc(cname="zstd", clevel=1, shuffle="shuffle", blocksize=_ONE_BLOCK),)),
    "sparse": Chain(compressors=(Zstd(level=1),)),
    "int8": Chain(quantised=True),
}
"""Codecs by name, measured in `docs/codecs.md`."""
TABLE = Chain(compressors=(Blosc(cname="zstd", clevel=1, shuffle="shuffle"),))
"""For tokens, the row table, statistics and commits: small integers, written once."""


def parse_codec(codec: str | Sequence[Mapping[str, Any]]) -> str:
    """The canonical text of a codec: a preset's name, or compact JSON with every option that has a fixed value.

    Raises:
        ConfigError: there is no such preset or codec, or one of its options is illegal.
    """
    if isinstance(codec, str) and codec in PRESETS:
        return codec
    chain = _parse_chain(_listed(codec))
    steps = [*chain.filters, *([chain.serializer] if chain.serializer else []), *chain.compressors]
    if not steps:
        return "raw"
    text = json.dumps([_metadata(step) for step in steps], separators=(",", ":"), sort_keys=True)
    if len(text) > MAX_TEXT:
        raise ConfigError(f"the codec is {len(text)} characters long, more than {MAX_TEXT}")
    return text


@lru_cache(maxsize=256)
def chain_of(codec: str) -> Chain:
    """The chain behind a codec's text.

    Raises:
        ConfigError: see `parse_codec`.
    """
    return PRESETS[codec] if codec in PRESETS else _parse_chain(_listed(codec))


def _listed(codec: str | Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    """The list of codec metadata, from text or as given."""
    if not isinstance(codec, str):
        return list(codec)
    if not codec.lstrip().startswith("["):
        raise ConfigError(
            f"no codec preset {codec[:64]!r}; there are {', '.join(PRESETS)}, or a list of Zarr v3 codec metadata"
        )
    if len(codec) > MAX_TEXT:
        raise ConfigError(f"the codec is {len(codec)} characters long, more than {MAX_TEXT}")
    try:
        listed: list[Any] = json.loads(codec)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the codec {codec[:64]!r} is no JSON list: {error}") from None
    return listed


def _parse_chain(listed: Sequence[Any]) -> Chain:
    """The chain of a list of Zarr v3 codec metadata; `bytes` and the last `crc32c` may be there and are implied."""
    if len(listed) > MAX_STEPS:
        raise ConfigError(f"the codec has {len(listed)} steps, more than {MAX_STEPS}")
    named = [_named(entry) for entry in listed]
    if named and named[-1][0] == "crc32c":
        named.pop()
    filters: list[Any] = []
    serializers: list[Any] = []
    compressors: list[Any] = []
    serialised = False
    for name, options in named:
        group = filters if _is(name, FILTERS) else serializers if _is(name, SERIALIZERS) else compressors
        if (serialised and group is not compressors) or (name == "bytes" and serialised):
            raise ConfigError(
                f"codec {name} cannot come that late: first filters, then one serializer, then compressors"
            )
        serialised = serialised or group is not filters
        if name == "bytes":
            if options not in ({}, {"endian": "little"}):
                raise ConfigError(f"bytes: values are stored little-endian, not {options!r}")
        else:
            group.append(_step(name, options))
    return _checked(
        Chain(filters=tuple(filters), serializer=next(iter(serializers), None), compressors=tuple(compressors))
    )


def _checked(chain: Chain) -> Chain:
    """The chain, unless its steps do not go together."""
    if any(isinstance(step, Shuffle) for step in chain.compressors[1:]) or (
        chain.serializer and any(isinstance(step, Shuffle) for step in chain.compressors)
    ):
        raise ConfigError("numcodecs.shuffle shuffles values: it must come before everything that compresses")
    if any(isinstance(step, Transpose) for step in chain.filters) and (len(chain.filters) > 1 or chain.serializer):
        # numcodecs flattens arrays in the order of their memory, so what it is given turned would come back unturned.
        raise ConfigError("transpose cannot be combined with the filters and serializers of numcodecs")
    return chain


def _is(name: str, steps: tuple[type[Any], ...]) -> bool:
    return any(step.name == name for step in steps)


def _named(entry: Any) -> tuple[str, dict[str, Any]]:
    """Name and configuration of one codec's metadata."""
    if not isinstance(entry, Mapping) or not set(entry) <= {"name", "configuration"}:
        raise ConfigError(f'a codec is {{"name": …, "configuration": {{…}}}}, not {str(entry)[:80]}')
    name, options = entry.get("name"), entry.get("configuration", {})
    if (
        not isinstance(name, str)
        or not isinstance(options, Mapping)
        or not all(isinstance(key, str) for key in options)
    ):
        raise ConfigError(f'a codec is {{"name": …, "configuration": {{…}}}}, not {str(entry)[:80]}')
    return name, dict(options)


def _step(name: str, options: dict[str, Any]) -> Any:
    """One step; its own checks raise ConfigError."""
    if name not in _STEPS:
        raise ConfigError(f"codec {name[:64]!r} cannot be used here; there are {', '.join(sorted(_STEPS))}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return _STEPS[name](**values)
    except TypeError as error:
        raise ConfigError(f"codec {name} does not take these options: {error}") from None


def choose_codec(chunks: Sequence[NDArray[Any]]) -> tuple[str, str]:
    """The lossless preset for values like these (C-contiguous arrays of stored dtype), and why in one sentence.

    Decided by sizes alone, so the same values always give the same choice: `sparse` when it is at least 5 % smaller
    than `lossless`, and `raw` when nothing saves 5 %. Of many values, pieces at equal distances are tried.
    """
    pieces = [flat[start : start + _TRIAL_BYTES] for flat in map(_flat_bytes, chunks) for start in _starts(len(flat))]
    n_bytes = sum(map(len, pieces))
    if not n_bytes:
        return "lossless", "lossless: there are no values to try"
    size = chunks[0].itemsize
    sizes = {name: sum(len(PRESETS[name].encode(p.view(f"u{size}"))[0]) for p in pieces) for name in _LOSSLESS}
    tried = {name: found / n_bytes for name, found in sizes.items()}
    best = "sparse" if tried["sparse"] <= 0.95 * tried["lossless"] else "lossless"
    if tried[best] > 0.95:
        return "raw", f"raw: lossless {tried['lossless']:.2f} of it, sparse {tried['sparse']:.2f}"
    other = "lossless" if best == "sparse" else "sparse"
    return best, f"{best}: {tried[best]:.2f} of raw, {other} {tried[other]:.2f}"


def _flat_bytes(chunk: NDArray[Any]) -> NDArray[np.uint8]:
    return chunk.reshape(-1).view(np.uint8)


def _starts(n_bytes: int) -> range:
    """Where the pieces to try begin: all of them, or 16 at equal distances."""
    n_pieces = max(1, n_bytes // _TRIAL_BYTES)
    return range(0, n_bytes if n_bytes < _TRIAL_BYTES else n_pieces * _TRIAL_BYTES, _TRIAL_BYTES * -(-n_pieces // 16))


def expected_bytes_per_value(codec: str, logical: str) -> float:
    """About what a value takes on disk, for a look at the free space before a run; rather too little than too much.

    What a store really takes depends on its values: these are the smallest of the measured figures, so that nobody is
    refused who has room.
    """
    chain = chain_of(codec)
    share = 1.0 if chain.is_raw else 0.02 if codec == "sparse" else 0.6 if codec in PRESETS else 0.0
    return share * chain.stored_dtype(logical).itemsize


def crc_bytes(crc: int) -> bytes:
    """A crc32c as it is stored."""
    return crc.to_bytes(CRC_BYTES, "little")


def checksum_of(stored: memoryview) -> int:
    """The crc32c that stands behind a stored payload; not yet compared with the payload."""
    return int.from_bytes(stored[-CRC_BYTES:], "little")


def matches(payload: memoryview, crc: int) -> bool:
    """True when the payload has this crc32c."""
    # The library takes arrays and bytes, no memoryviews.
    return bool(google_crc32c.value(np.frombuffer(payload, dtype=np.uint8)) == crc)


_RESIDUE = 0x48674BC7
"""The crc32c of any bytes with their own crc32c, little-endian, behind them."""


def is_whole(stored: bytes) -> bool:
    """True when a stored chunk matches the crc32c at its end. Of bytes, unlike arrays, it is taken without the GIL."""
    return len(stored) >= CRC_BYTES and bool(google_crc32c.value(stored) == _RESIDUE)
