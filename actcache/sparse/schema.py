"""What `metrics.json` may contain, as far as anything reads it: types, and which fields are required.

In: JSON of any kind. Out: None, or where and how it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actcache.files import shown

_MOST = 1e300
_MOST_POWER = 400.0
"""Largest power of ten: floating-point numbers end before it."""


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _layer(value: Any) -> bool:
    return isinstance(value, str) or type(value) is int


def _power(value: Any) -> bool:
    return _number(value) and abs(value) <= _MOST_POWER


_NAMES = {_number: "a number", _whole: "a whole number", _text: "text", _layer: "a name or a number", _power: "a power"}
_EACH = "*"
"""The key that stands for all keys of an object."""

_STAGE = {"seconds!": _number, "made_in_s": _number, **dict.fromkeys(("tokens_per_s", "rows_per_s"), _number)}
_SITE = {"shape!": [_whole], "bytes!": _number, "n_nan": _whole, "n_inf": _whole}
_SPEC = {"dtype!": _text, "skip_first": _whole, "model": {}, "text": {}}
_STORE = {
    **dict.fromkeys(("n_rows!", "bytes!", "raw_bytes!", "compression_ratio!", "bytes_per_activation!"), _number),
    **dict.fromkeys(("path!", "codec!", "fingerprint"), _text),
    "n_shards": _whole,
    "sites!": {_EACH: _SITE},
    "spec!": _SPEC,
}
_ROW = {
    "layer!": _layer,
    **dict.fromkeys(("site_in!", "site_out!", "path"), _text),
    **dict.fromkeys(("clean", "zero_ablated", "mean_ablated", "spliced", "loss_recovered", "l0", "fvu"), _number),
    **dict.fromkeys(("dead_fraction", "n_latents", "seconds", "n_rows"), _number),
    "history": {_EACH: [_number]},
    "density_histogram": {"log10_edges!": [_power], "counts!": [_number], "n_never!": _whole},
}
_METRICS = {
    "created": _text,
    "command": _text,
    "seconds": _number,
    **{name: {} for name in ("model", "text", "training", "machine", "versions")},
    "store": _STORE,
    "stages": {_EACH: {**_STAGE, "bytes_per_s": _number}},
    "layers": [_ROW],
}


def find_fault(metrics: Mapping[str, Any]) -> str | None:
    """The first fault of metrics, in words; None if there is none."""
    return _fault(metrics, _METRICS, "") or next(
        (fault for number, row in enumerate(metrics.get("layers") or []) if (fault := _uneven(row, number))), None
    )


def _fault(value: Any, schema: Any, where: str) -> str | None:
    """The first fault of a value. Anything may be null, except required fields (`!`)."""
    if isinstance(schema, Callable):  # type: ignore[arg-type]  # a form that mypy does not take
        return None if schema(value) else f"{where} is {shown(value)}, which should be {_NAMES[schema]}"
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{where} is {shown(value)}, which should be a list"
        inner, holes = schema[0], isinstance(schema[0], Callable)  # type: ignore[arg-type]
        pairs = [(n, item) for n, item in enumerate(value) if item is not None or not holes]
        return next((fault for n, item in pairs if (fault := _fault(item, inner, f"{where}[{n}]"))), None)
    if not isinstance(value, Mapping):
        return f"{where or 'it'} is {shown(value)}, which should be an object"
    for key, inner in schema.items():
        names = list(value) if key == _EACH else [key.removesuffix("!")]
        for name in names:
            inside = f"{where}.{name}" if where else name
            if value.get(name) is None:
                if key.endswith("!") or key == _EACH:
                    return f"{inside} is missing"
            elif fault := _fault(value[name], inner, inside):
                return fault
    return None


def _uneven(row: Mapping[str, Any], number: int) -> str | None:
    """What does not fit together in a layer's curves and histogram: lengths, or the order of edges."""
    history, histogram = row.get("history") or {}, row.get("density_histogram")
    steps = history.get("step") or []
    if history and (not steps or None in steps or any(len(column) != len(steps) for column in history.values())):
        return f"layers[{number}].history has columns that do not match its steps"
    edges: Sequence[Any] = histogram["log10_edges"] if histogram else [0, 1]
    if histogram and (len(histogram["counts"]) != len(edges) - 1 or None in [*edges, *histogram["counts"]]):
        return f"layers[{number}].density_histogram has counts that do not match its edges"
    return None if sorted(edges) == list(edges) else f"layers[{number}].density_histogram has edges out of order"
