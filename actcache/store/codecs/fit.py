"""Codecs that are fitted to a site's own activations, on the first of them, before its store is begun."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.spec import Site
from actcache.store.codecs.presets import PRESETS, chain_of, parse_codec
from actcache.store.codecs.quantise import feature_exponents

AUTO = "auto"


def codec_of(name: str, codec: str | Mapping[str, str]) -> str | None:
    """The codec that is asked for a site: one for all, or that of the first pattern that its name matches."""
    by_pattern = {"*": codec} if isinstance(codec, str) else codec
    return next((asked for pattern, asked in by_pattern.items() if fnmatchcase(name, pattern)), None)


def given(site: Site, codec: str) -> Site:
    """The site with a codec that does not depend on its activations."""
    return replace(site, codec=parse_codec(codec), codec_reason="", feature_exponents=())


def needs_trial(codec: str) -> bool:
    """True when a codec depends on the activations: `auto`, and those that quantise."""
    return codec == AUTO or chain_of(codec).quantised


def is_result_of(site: Site, asked: str) -> bool:
    """True when this is what fitting may have made of the codec that is asked for."""
    return bool(site.codec_reason) if asked == AUTO else site.codec == asked and not site.codec_reason


def fitted(site: Site, asked: str, rows: NDArray[Any], logical: str, rows_per_chunk: int) -> Site:
    """The site with the codec that is asked for, fitted to `rows (n, D)` of stored dtype."""
    if asked == AUTO:
        chunks = [rows[start : start + rows_per_chunk] for start in range(0, len(rows), rows_per_chunk)]
        codec, reason = choose_codec(chunks)
        return replace(site, codec=codec, codec_reason=reason, feature_exponents=())
    site = given(site, asked)
    if not chain_of(site.codec).quantised:
        return site
    exponents = feature_exponents(rows, logical)
    return replace(site, feature_exponents=tuple(exponents.tolist()) if exponents.any() else ())


_LOSSLESS = ("lossless", "sparse")


_TRIAL_BYTES = 1 << 19
"""Size of the pieces that `choose_codec` tries: that of chunks, by default."""


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
        return given(site, asked)
    return fitted(site, asked, first_rows(max(ROWS_TO_FIT, rows_per_chunk)), dtype, rows_per_chunk)
