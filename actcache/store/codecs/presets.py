"""Codecs by name or by their Zarr v3 metadata: from text to what stores the values, and back to one canonical text.

A codec is a string: the name of a preset, or the JSON text of a list of Zarr v3 codec metadata.

`lossless` is zstd behind a byte shuffle in one block: 0.67 to 0.69 of bfloat16 on residual streams, where lz4 behind a
bit shuffle had 0.78 to 0.85, and it takes hardly longer. zstd takes 128 KiB at a time, and a chunk needs 256 KiB for
its high and low bytes to fall into different ones, so narrow sites get at least that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from actcache.errors import ConfigError
from actcache.store.codecs.chain import RAW, Chain
from actcache.store.codecs.int8 import Int8
from actcache.store.codecs.quantiser import ACTS, Quantiser, StoredArray
from actcache.store.codecs.steps import STEPS, Blosc, PlanesBlosc, Transpose, Zstd

MAX_TEXT = 4096
"""Characters of a codec's JSON text."""
MAX_STEPS = 8
_IMPLIED = ("bytes", "crc32c")
"""Steps that every chain has, whether they are named or not."""

# One block as large as a chunk: zstd then sees the high bytes of many values in a row, which are all that can be
# compressed, and steps over the low bytes. Blosc's own choice of 32 KiB mixes the two and is a third as fast to decode.
_ONE_BLOCK = 1 << 19

TABLE = Chain(compressors=(Blosc(cname="zstd", clevel=1, shuffle="shuffle"),))
"""For tokens, the row table, statistics and commits: small integers, written once."""

Codec: TypeAlias = Chain | Quantiser


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A codec with a name. `auto`, the look at the free space, `plan`, errors and tests of the docs go by these."""

    name: str
    codec: Codec
    says: str
    """What it is for, in a few words."""
    lossless: bool
    """Values come back bit by bit; `auto` chooses among these."""
    least_share: float = 1.0
    """The smallest share of its arrays' bytes that was measured on disk (`docs/codecs.md`)."""
    offered: bool = True
    """Whether it can be asked for. Stores that have it can be read either way."""


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(name="raw", codec=RAW, says="no compression", lossless=True),
        Preset(
            name="lossless",
            codec=Chain(compressors=(PlanesBlosc(cname="zstd", clevel=1, shuffle="shuffle", blocksize=_ONE_BLOCK),)),
            says="zstd behind a byte shuffle, for dense values",
            lossless=True,
            least_share=0.6,
        ),
        Preset(
            name="sparse",
            codec=Chain(compressors=(Zstd(level=1),)),
            says="zstd, for values that are mostly zero",
            lossless=True,
            least_share=0.02,
        ),
        Preset(
            name="int8",
            codec=Int8(),
            says="a byte a value and a scale a row, for a known error",
            lossless=False,
        ),
        Preset(
            name="fast",
            codec=Chain(compressors=(Blosc(cname="lz4", clevel=5, shuffle="bitshuffle"),)),
            says="lz4 behind a bit shuffle",
            lossless=True,
            least_share=0.6,
            offered=False,  # hardly faster than `lossless`, for a sixth more bytes
        ),
    )
}
"""By name, measured in `docs/codecs.md`."""


class UnknownCodecError(ConfigError):
    """There is no preset, or no step, of this name."""


def offered() -> list[Preset]:
    """The presets that can be asked for."""
    return [preset for preset in PRESETS.values() if preset.offered]


def parse_codec(codec: str | Sequence[Mapping[str, Any]]) -> str:
    """The canonical text of a codec that is asked for: a preset's name, or compact JSON with every fixed option.

    Raises:
        ConfigError: there is no such preset or step, the preset is not offered, or an option is invalid.
    """
    if isinstance(codec, str) and codec in PRESETS:
        if not PRESETS[codec].offered:
            raise ConfigError(f"the codec preset {codec!r} is no longer offered; {_choices()}")
        return codec
    steps = _parse_chain(_parse_list(codec)).metadata()
    if not steps:
        return "raw"
    text = json.dumps(steps, separators=(",", ":"), sort_keys=True)
    if len(text) > MAX_TEXT:
        raise ConfigError(f"the codec is {len(text)} characters long, more than {MAX_TEXT}")
    return text


def resolve_codec(codec: str) -> Codec:
    """The chain or quantiser behind a codec's text, whether or not it is offered.

    Raises:
        ConfigError: see `parse_codec`.
    """
    return PRESETS[codec].codec if codec in PRESETS else _chain_by_hand(codec)


def quantiser_of(codec: str) -> Quantiser | None:
    """The quantiser behind a codec's text; None where values are stored as they are."""
    found = resolve_codec(codec)
    return None if isinstance(found, Chain) else found


def stored_arrays(codec: str, logical: str, width: int) -> tuple[StoredArray, ...]:
    """The arrays in which a codec keeps values `(N, width)` of a logical dtype."""
    found = resolve_codec(codec)
    if isinstance(found, Chain):
        return (StoredArray(name=ACTS, element=logical, row_shape=(width,), chain=found),)
    return found.arrays(width)


@lru_cache(maxsize=256)
def _chain_by_hand(codec: str) -> Chain:
    return _parse_chain(_parse_list(codec))


def _choices() -> str:
    return f"there are {', '.join(preset.name for preset in offered())}, or a list of Zarr v3 codec metadata"


def _parse_list(codec: str | Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    """The list of codec metadata, from its text or as it is."""
    if not isinstance(codec, str):
        return list(codec)
    if not codec.lstrip().startswith("["):
        raise UnknownCodecError(f"no codec preset {codec[:64]!r}; {_choices()}")
    if len(codec) > MAX_TEXT:
        raise ConfigError(f"the codec is {len(codec)} characters long, more than {MAX_TEXT}")
    try:
        listed: list[Any] = json.loads(codec)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the codec {codec[:64]!r} is not a JSON list: {error}") from None
    return listed


def _parse_chain(listed: Sequence[Any]) -> Chain:
    """The chain of a list of Zarr v3 codec metadata; `bytes` and the last `crc32c` may be there and are implied."""
    if len(listed) > MAX_STEPS:
        raise ConfigError(f"the codec has {len(listed)} steps, more than {MAX_STEPS}")
    named = [_name_and_options(entry) for entry in listed]
    if named and named[-1][0] == "crc32c":
        named.pop()
    transpose: Transpose | None = None
    compressors: list[Any] = []
    serialised = False
    for name, options in named:
        if serialised and name in ("bytes", Transpose.name):
            raise ConfigError(f"codec {name} cannot come that late: first transpose, then bytes, then compressors")
        if name == "bytes":
            if options not in ({}, {"endian": "little"}):
                raise ConfigError(f"bytes: values are stored little-endian, not {options!r}")
            serialised = True
            continue
        step = _step(name, options)
        if not isinstance(step, Transpose):
            compressors.append(step)
            serialised = True
        elif transpose is not None:
            raise ConfigError("codec transpose can be named once only")
        else:
            transpose = step
    return Chain(transpose=transpose, compressors=tuple(compressors))


def _name_and_options(entry: Any) -> tuple[str, dict[str, Any]]:
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
    if name not in STEPS:
        there_are = ", ".join(sorted((*STEPS, *_IMPLIED)))
        raise UnknownCodecError(f"codec {name[:64]!r} cannot be used here; there are {there_are}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return STEPS[name](**values)
    except TypeError as error:
        raise ConfigError(f"codec {name} does not take these options: {error}") from None
