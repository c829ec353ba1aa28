"""The verb `sites`: what can be cached of a model.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any

from actcache.cli.options import Flag, Flat, RunOptions
from actcache.cli.screen import Screen
from actcache.errors import ConfigError
from actcache.spec import DTYPE_BYTES, Dtype

if TYPE_CHECKING:
    from actcache.lm.survey import Listed


def sites(
    model: str = "stories-4l",
    patterns: list[str] | None = None,
    /,
    *,
    run: Annotated[RunOptions | None, Flat] = None,
    length: int | None = None,
    store_dtype: Dtype = "bfloat16",
    json: Flag = False,
) -> int:
    """List what can be cached of a model, with shapes and bytes a token; given patterns, the sites that they mean.

    Module paths such as 'model.layers.3.mlp:out' are names of every model, and are listed for patterns that mean them.
    What has activations and is not offered stands at the end, with the reason.

    Parameters
    ----------
    model
        Base model: `stories-4l` (embedded), a Hugging Face name or folder, or a GGUF file.
    patterns
        Hook names or patterns, such as 'blocks.0.*'; without any, every name is listed, aliases too.
    length
        Tokens of a sequence, which decide the width of attention patterns; by default the model's context, at most 256.
    store_dtype
        Element type that bytes are counted in.
    json
        Print one JSON object on stdout.
    """
    if set(model) & set("*?["):
        raise ConfigError(f"the model comes first: actcache sites stories-4l {model!r}")
    with Screen(json=json) as screen:
        lm = (run or RunOptions()).open(model)
        found = [_described(site, DTYPE_BYTES[store_dtype]) for site in lm.list_sites(patterns, length=length)]
        refused = [
            {"name": name, "reason": reason}
            for name, reason in lm.refused_sites.items()
            if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
        ]
        result = {
            "model": lm.name,
            "store_dtype": store_dtype,
            "sites": found,
            "not_offered": refused,
            "disagreement": lm.disagreement,
        }
        text = _lines(found) + _refused_lines(refused)
        screen.result(result, lambda out: out.print(text, markup=False, highlight=False))
    return 0


def _described(listed: Listed, bytes_per_value: int) -> dict[str, Any]:
    site = listed.site
    return {
        "name": site.name,
        "shape": list(site.shape),
        "bytes_per_token": site.width * bytes_per_value,
        "instrumented": listed.instrumented,
    }


def _lines(found: list[dict[str, Any]]) -> str:
    """A line a name: shape, bytes a token uncompressed, and a mark where the plain model is not enough."""
    shapes = [" x ".join(map(str, site["shape"])) for site in found]
    names, widths = max(len(site["name"]) for site in found), max(map(len, shapes))
    sizes = max(len(f"{site['bytes_per_token']:,}") for site in found)
    lines = [
        f"{site['name']:<{names}}  {shape:>{widths}}  {site['bytes_per_token']:>{sizes},} B/token"
        + ("  instrumented" if site["instrumented"] else "")
        for site, shape in zip(found, shapes, strict=True)
    ]
    if any(site["instrumented"] for site in found):
        lines.append("instrumented: read from transformer-lens' model, in which everything is slower")
    return "\n".join(lines)


def _refused_lines(refused: list[dict[str, str]]) -> str:
    """The names that share a reason, behind the first of them."""
    by_reason: dict[str, list[str]] = {}
    for entry in refused:
        by_reason.setdefault(entry["reason"], []).append(entry["name"])
    lines = [
        f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in by_reason.items()
    ]
    return "\n".join(["", "not offered:", *lines]) if lines else ""
