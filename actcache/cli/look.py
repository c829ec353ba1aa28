"""The verbs that look at what is there and change nothing: `sites`, `info`, `report` (`plan` is in `plan.py`).

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from actcache.cli.options import STORE, FlatRun, Json, ModelName, RunOptions
from actcache.cli.screen import Screen
from actcache.cli.store_view import show_store
from actcache.errors import ConfigError
from actcache.spec import DTYPE_BYTES, Dtype

if TYPE_CHECKING:
    from actcache.lm.survey import Listed


def sites(
    model: ModelName = "stories-4l",
    patterns: list[str] | None = None,
    /,
    *,
    run: FlatRun = None,
    length: int | None = None,
    store_dtype: Annotated[Dtype, Parameter(group=STORE)] = "bfloat16",
    json: Json = False,
) -> int:
    """List the sites of a model that can be stored, with shapes and bytes per token.

    Module paths such as 'model.layers.3.mlp:out' name sites of every model; they are listed where a pattern matches
    them. Modules that have activations but are not offered stand at the end, with the reason.

    Parameters
    ----------
    patterns
        Names of sites, or patterns such as 'blocks.0.*'; without any, every name is listed, aliases too.
    length
        Tokens in a sequence, which decide the width of attention patterns; by default the model's context, at most 256.
    store_dtype
        Element type on disk.
    """
    if set(model) & set("*?["):
        raise ConfigError(f"the model comes first: actcache sites stories-4l {model!r}")
    with Screen(json=json) as screen:
        lm = (run or RunOptions()).open(model)
        found = [_site_facts(site, DTYPE_BYTES[store_dtype]) for site in lm.list_sites(patterns, length=length)]
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
        text = _site_lines(found) + _refused_lines(refused)
        screen.result(result, lambda out: out.print(text, markup=False, highlight=False))
    return 0


def _site_facts(listed: Listed, bytes_per_value: int) -> dict[str, Any]:
    site = listed.site
    return {
        "name": site.name,
        "shape": list(site.shape),
        "bytes_per_token": site.width * bytes_per_value,
        "instrumented": listed.instrumented,
    }


def _site_lines(found: list[dict[str, Any]]) -> str:
    """A line for each name: shape, bytes per token uncompressed, and a mark where the plain model is not enough."""
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
    """A line for each reason, with the names that share it."""
    by_reason: dict[str, list[str]] = {}
    for entry in refused:
        by_reason.setdefault(entry["reason"], []).append(entry["name"])
    lines = [
        f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in by_reason.items()
    ]
    return "\n".join(["", "not offered:", *lines]) if lines else ""


def info(store: str, /, *, json: Json = False) -> int:
    """Show what a store holds: its sites, their codecs, sizes and statistics, and how far each shard is.

    Parameters
    ----------
    store
        A store.
    """
    from actcache.store import open_store

    with Screen(json=json) as screen:
        show_store(screen, open_store(store))
    return 0


def report(run: Path, /, *, json: Json = False) -> int:
    """Write a run's report: one HTML page that needs no other file.

    Parameters
    ----------
    run
        The run directory, with its metrics.json.
    """
    from actcache.report import write_report

    with Screen(json=json) as screen:
        page = write_report(run)
        screen.result({"report": str(page)}, lambda out: out.print(str(page), highlight=False))
    return 0
