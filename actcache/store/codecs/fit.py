"""Which codec a site gets, fitted to the first of its own activations where that decides, before its store is begun.

The codec is a property of a site, since what suits a residual stream does not suit ReLU activations. `auto` and the
exponents of a quantiser are found on the first sequences before the store is begun and stand in its spec, so that a
shard stays a function of its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.spec import Site
from actcache.store.codecs.chain import Chain
from actcache.store.codecs.presets import PRESETS, offered, parse_codec, quantiser_of, stored_arrays

AUTO = "auto"


def codec_for(name: str, codec: str | Mapping[str, str]) -> str | None:
    """The codec that is asked for a site: one for all, or that of the first pattern that its name matches."""
    by_pattern = {"*": codec} if isinstance(codec, str) else codec
    return next((asked for pattern, asked in by_pattern.items() if fnmatchcase(name, pattern)), None)


def with_codec(site: Site, codec: str) -> Site:
    """The site with a codec that does not depend on its activations."""
    return replace(site, codec=parse_codec(codec), codec_reason="", feature_exponents=())


def needs_trial(codec: str) -> bool:
    """True when a codec depends on the activations: `auto`, and those that quantise."""
    return codec == AUTO or quantiser_of(codec) is not None


def is_offered(codec: str) -> bool:
    """False for a preset that only stores from earlier versions have."""
    return codec not in PRESETS or PRESETS[codec].offered


def is_result_of(site: Site, asked: str) -> bool:
    """True when this is what fitting may have made of the codec that is asked for."""
    return bool(site.codec_reason) if asked == AUTO else site.codec == asked and not site.codec_reason


def fit_codec(site: Site, asked: str, rows: NDArray[Any], logical: str, rows_per_chunk: int) -> Site:
    """The site with the codec that is asked for, fitted to `rows (n, D)` of stored dtype."""
    if asked == AUTO:
        chunks = [rows[start : start + rows_per_chunk] for start in range(0, len(rows), rows_per_chunk)]
        codec, reason = choose_codec(chunks)
        return replace(site, codec=codec, codec_reason=reason, feature_exponents=())
    site = with_codec(site, asked)
    quantiser = quantiser_of(site.codec)
    if quantiser is None:
        return site
    exponents = quantiser.fit(rows, logical)
    return replace(site, feature_exponents=tuple(exponents.tolist()) if exponents.any() else ())


_SAVES = 0.95
"""A codec has to make values smaller than this, relative to the alternative."""
_TRIAL_BYTES = 1 << 19
"""Size of the pieces that `choose_codec` tries: that of chunks, by default."""


def choose_codec(chunks: Sequence[NDArray[Any]]) -> tuple[str, str]:
    """The lossless preset for values like these (C-contiguous arrays of stored dtype), and why in one sentence.

    Decided by sizes alone, so the same values always give the same choice: the first that compresses (`lossless`),
    unless another is at least 5 % smaller, and `raw` when nothing saves 5 %. Of many values, pieces at equal distances
    are tried.
    """
    first, *others = chains = _lossless_chains()
    pieces = [flat[start : start + _TRIAL_BYTES] for flat in map(_flat_bytes, chunks) for start in _starts(len(flat))]
    n_bytes = sum(map(len, pieces))
    if not n_bytes:
        return first, f"{first}: there are no values to try"
    size = chunks[0].itemsize
    sizes = {name: sum(len(chain.encode(p.view(f"u{size}"))[0]) for p in pieces) for name, chain in chains.items()}
    tried = {name: found / n_bytes for name, found in sizes.items()}
    best = min(others, key=tried.__getitem__, default=first)
    best = best if tried[best] <= _SAVES * tried[first] else first
    if tried[best] > _SAVES:
        return "raw", f"raw: {first} {tried[first]:.2f} of it" + _shares(tried, others)
    return best, f"{best}: {tried[best]:.2f} of raw" + _shares(tried, [name for name in chains if name != best])


def _lossless_chains() -> dict[str, Chain]:
    """What `auto` tries: the chains of the presets that are lossless and compress, by name."""
    found = {preset.name: preset.codec for preset in offered() if preset.lossless}
    return {name: codec for name, codec in found.items() if isinstance(codec, Chain) and not codec.is_raw}


def _shares(tried: Mapping[str, float], names: Sequence[str]) -> str:
    return "".join(f", {name} {tried[name]:.2f}" for name in names)


def _flat_bytes(chunk: NDArray[Any]) -> NDArray[np.uint8]:
    return chunk.reshape(-1).view(np.uint8)


def _starts(n_bytes: int) -> range:
    """Where the pieces to try begin: all of them, or 16 at equal distances."""
    n_pieces = max(1, n_bytes // _TRIAL_BYTES)
    return range(0, n_bytes if n_bytes < _TRIAL_BYTES else n_pieces * _TRIAL_BYTES, _TRIAL_BYTES * -(-n_pieces // 16))


def expected_row_bytes(codec: str, logical: str, width: int) -> float:
    """A low estimate of the bytes of a row on disk, to compare with the free space before a run.

    What a store really takes depends on its values: the shares are the smallest that were measured, so that a run that
    fits is never refused. A chain given by hand counts as 0.
    """
    share = PRESETS[codec].least_share if codec in PRESETS else 0.0
    return share * sum(array.row_bytes for array in stored_arrays(codec, logical, width))


ROWS_TO_FIT = 4096
"""Rows that a codec is fitted to where it depends on the activations; one chunk, if that is more."""


def fit_to_first_rows(
    site: Site, asked: str, first_rows: Callable[[int], NDArray[Any]], dtype: str, rows_per_chunk: int
) -> Site:
    """The site with the codec that is asked for, fitted to its first rows if it depends on the activations.

    `first_rows(n)` gives about `n` rows `(n, D)` of stored dtype, or all if there are fewer; it is called only if they
    are needed.
    """
    if not needs_trial(asked):
        return with_codec(site, asked)
    return fit_codec(site, asked, first_rows(max(ROWS_TO_FIT, rows_per_chunk)), dtype, rows_per_chunk)
