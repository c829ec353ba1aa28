"""The report page: `metrics.json` of a run -> one HTML file that needs nothing else.

In: a run directory. Out: `report.html` in it, with style and figures inline; no script, no request to anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from actcache import formats
from actcache.errors import StateError, first_line
from actcache.files import own_partial, path_of, write_whole
from actcache.report import figures, view
from actcache.sparse.metrics import read_metrics

_CURVES = (
    ("loss", "Training loss", "Squared error of the scaled output, summed over its dimensions, plus the L1 penalty."),
    ("fvu", "Unexplained variance", "FVU: 0 is a perfect copy of the MLP's output, 1 is no better than its mean."),
    ("l0", "Active latents per token", "L0: how many latents are above zero at once."),
)


def write_report(run: Path | str) -> Path:
    """Write `RUN/report.html` from `RUN/metrics.json`, and return its path.

    Raises:
        RunNotFoundError: the folder has no `metrics.json`.
        StateError: `metrics.json` cannot be read, or holds what no page can show; an older page stays as it is.

    Examples:
        >>> from actcache.cli import main
        >>> settings = ["--site-in", site_in, "--site-out", site_out, "--n-steps", "20", "--warmup-steps", "5"]
        >>> main(["train", "acts.zarr", "--out", "run", *settings, "--json"])  # doctest: +ELLIPSIS
        {...}
        0
        >>> ac.write_report("run").name
        'report.html'
    """
    from actcache.store import refuse_inside_store

    folder = path_of(run, "run")
    refuse_inside_store(folder)
    metrics = read_metrics(folder)
    try:
        page = render(metrics)
    except Exception as error:  # drawn and formatted by others, of numbers that anybody may have written
        reason = first_line(error)
        raise StateError(
            f"{folder / 'metrics.json'} holds something that cannot be shown ({reason[:200]}); run the command that "
            "made it again"
        ) from error
    # JSON can hold half of a pair of surrogates, which no encoding can write.
    file = folder / "report.html"
    return write_whole(file, page.encode("utf-8", "replace"), beside=own_partial(file))


def render(metrics: Mapping[str, Any]) -> str:
    """The page as HTML text. Parts that the run has not produced (yet) are left out."""
    layers = metrics.get("layers", [])
    words = (view.headline, view.lede, view.tiles, view.store_line, view.stages, view.facts, view.sites, view.created)
    return _environment().get_template("page.html.jinja").render(
        metrics=metrics,
        layers=layers,
        hues=_hues(len(layers)),
        ranges=_ranges(layers),
        curves=_curve_groups(layers),
        densities=_density_panels(layers),
        snippets=view.snippets(metrics),
        **{word.__name__: word(metrics) for word in words},
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (formats.duration, formats.count, formats.percent, formats.decimals, formats.number, formats.plain):
        environment.filters[function.__name__] = function
    return environment


def _hues(n_layers: int) -> list[int]:
    """A walk from blue over violet and red to amber: neighbouring layers look alike, distant ones do not."""
    return [round(255 + 165 * i / max(1, n_layers - 1)) % 360 for i in range(n_layers)]


def _ranges(layers: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """The losses drawn for a wide and for a narrow window; style sheets show one of them."""
    complete = all(None not in (row.get(key) for key in ("clean", "spliced", "zero_ablated")) for row in layers)
    widths = {"broad": 760, "narrow": 340} if layers and complete else {}
    return {name: _svg(figures.loss_ranges(layers, width=width)) for name, width in widths.items()}


def _curve_groups(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One group of panels per measured quantity, one panel per layer that has a history of it."""
    groups = []
    for key, title, text in _CURVES:
        having = [(i, row) for i, row in enumerate(layers) if (row.get("history") or {}).get(key)]
        histories = [row["history"] for _, row in having]
        panels = [
            {
                "layer": row["layer"],
                "index": i,
                "last": row["history"][key][-1],
                "svg": _svg(figures.curve_panel(histories, key, j, title=f"{title}, layer {row['layer']}", colour=i)),
            }
            for j, (i, row) in enumerate(having)
        ]
        if panels:
            groups.append({"title": title, "text": text, "panels": panels})
    return groups


def _density_panels(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    having = [(i, row, row["density_histogram"]) for i, row in enumerate(layers) if row.get("density_histogram")]
    y_max = max((n for *_, histogram in having for n in histogram["counts"]), default=1)
    return [
        {
            "layer": row["layer"],
            "index": i,
            "svg": _svg(figures.density_panel(histogram, i, title=f"Density, layer {row['layer']}", y_max=y_max)),
        }
        for i, row, histogram in having
    ]


def _svg(text: str) -> Markup:
    # The figures escape every word that comes from the run, so their text may stand in the page as it is.
    return Markup(text)  # noqa: S704
