"""Codecs by name or by their Zarr v3 metadata: from text to a chain of steps, and back to one canonical text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from actcache.errors import ConfigError
from actcache.store.codecs.chain import Chain, _metadata
from actcache.store.codecs.compressors import (
    COMPRESSORS,
    Blosc,
    PlanesBlosc,
    Shuffle,
    Zstd,
)
from actcache.store.codecs.filters import FILTERS, SERIALIZERS, Transpose

MAX_TEXT = 4096
"""Characters of a codec's JSON text."""


MAX_STEPS = 8


_STEPS: dict[str, type[Any]] = {step.name: step for step in (*FILTERS, *SERIALIZERS, *COMPRESSORS)}


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
