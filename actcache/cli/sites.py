"""The verb `sites`: what can be cached of a model.

In: options, documented where they are defined. Out: a result on stdout (`--json`: one object), an exit code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from actcache.cli.options import Flag, Flat, ModelOptions
from actcache.cli.screen import Screen


def sites(
    patterns: list[str] | None = None,
    /,
    *,
    model: Annotated[ModelOptions | None, Flat] = None,
    length: int = 256,
    json: Flag = False,
) -> int:
    """List what can be cached of a model; given names or patterns, say which sites they mean, with their widths.

    Parameters
    ----------
    patterns
        Hook names or patterns, such as 'blocks.0.*'; without any, every name is listed.
    length
        Tokens of a sequence, which decide the width of attention patterns.
    json
        Print one JSON object on stdout.
    """
    with Screen(json=json) as screen:
        lm = (model or ModelOptions()).load()
        resolved = lm.resolve(patterns, length=length) if patterns else []
        named = [{"name": place.site.name, "shape": list(place.site.shape)} for place in resolved]
        found = named if patterns else [{"name": name} for name in lm.site_names]
        lines = "\n".join(_site_line(site) for site in found)
        screen.result({"model": lm.name, "sites": found}, lambda out: out.print(lines, markup=False, highlight=False))
    return 0


def _site_line(site: Mapping[str, Any]) -> str:
    return f"{site['name']}  {' x '.join(map(str, site['shape']))}" if "shape" in site else str(site["name"])
