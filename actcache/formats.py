"""Numbers as people read them: times, bytes, counts, shares. In: a value or None. Out: text, a dash for None."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"  # noqa: RUF001  # a dash, as typeset tables have it


def duration(seconds: float | None) -> str:
    """`37 ms`, `0.8 s`, `41 s`, `2 min 05 s`, `3 h 07 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 0.095:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units with three digits: `1.07 GB`."""
    if n_bytes is None:
        return NOTHING
    power = min(4, int(math.log10(n_bytes * 1.0006) // 3)) if n_bytes >= 1 else 0
    value = n_bytes / 1000**power
    digits = 0 if power == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    return NOTHING if value is None else f"{value:,.0f}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of one as a percentage: `98.2 %`."""
    return NOTHING if share is None else f"{100 * share:.{digits}f} %"


def decimals(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of decimals, for columns."""
    return NOTHING if value is None else f"{value:,.{digits}f}"


def number(value: float | None) -> str:
    """Three significant digits, with an exponent only where people would write one."""
    if value is None:
        return NOTHING
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2g}"
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2 if abs(value) >= 0.9995 else 3
    return f"{value:,.{digits}f}"


def plain(value: Any) -> str:
    """Any setting as a person would write it: digests cut short, lists joined."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: NOTHING}[value]
    if isinstance(value, str):
        is_digest = len(value) >= 40 and set(value) <= set("0123456789abcdef")
        return value[:12] + "…" if is_digest else value
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    return ", ".join(map(plain, value)) if isinstance(value, Sequence) else f"{value:,}"


def rates(stage: Mapping[str, Any]) -> list[str]:
    """The speeds that a stage has measured: `52,300 tokens/s`, `310 MB/s`."""
    units = (("tokens_per_s", "tokens/s"), ("rows_per_s", "rows/s"))
    found = [f"{stage[key]:,.0f} {unit}" for key, unit in units if stage.get(key)]
    return [*found, f"{size(stage['bytes_per_s'])}/s"] if stage.get("bytes_per_s") else found


def audit_lines(provenance: Mapping[str, Any]) -> list[str]:
    """What a store's provenance says of its audits, a line each: `sound after extract: 4 sequences, ...`."""
    audits = provenance.get("audits")
    if not isinstance(audits, list):
        return []
    return [_audit_line(entry) for entry in audits if isinstance(entry, Mapping)]


def _audit_line(entry: Mapping[str, Any]) -> str:
    found = entry.get("sites")
    sites = {n: s for n, s in found.items() if isinstance(s, Mapping)} if isinstance(found, Mapping) else {}
    of, looked_at = plain(entry.get("of")), f"{plain(entry.get('n_sequences'))} sequences at {len(sites)} sites"
    failed = [name for name, site in sites.items() if site.get("sound") is not True]
    if entry.get("sound") is True and not failed:
        return f"sound after {of}: {looked_at} are what the model computes"
    if not failed:
        return f"FAILED after {of}: {looked_at}"
    worst = sites[failed[0]]
    reasons = worst.get("reasons")
    reason = f", {reasons[0]}" if isinstance(reasons, list) and reasons else ""
    error = worst.get("max_relative_error")
    off = "not to be compared" if error is None else f"off by {plain(error)}, {plain(worst.get('tolerance'))} allowed"
    more = f", and {len(failed) - 1} sites more" if len(failed) > 1 else ""
    return f"FAILED after {of}: {failed[0]} is {off}{reason}{more}"
