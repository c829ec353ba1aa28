"""Codecs that are fitted to a site's own activations, on the first of them, before its store is begun."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from numpy.typing import NDArray

from actcache.spec import Site
from actcache.store.codecs import chain_of, choose_codec, parse_codec
from actcache.store.quantise import feature_exponents

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
