"""Small SVG figures for the report page: training curves, activation densities, losses.

In: numbers from `metrics.json`. Out: SVG text to put inline into HTML. Colours are CSS variables (`--ink`, `--muted`,
`--grid`, `--others`, `--layer-0` ...): one figure serves light and dark pages. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from itertools import pairwise
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# matplotlib knows no CSS variables, so it draws with these colours, each then replaced by its variable.
_INK, _MUTED, _GRID, _OTHERS = "#200001", "#200002", "#200003", "#200004"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)", _OTHERS: "var(--others)"}

_POINTS_PER_INCH = 72
_PANEL_SIZE = (230, 150)
_FONT_SIZE = 11


def curve_panel(histories: Sequence[Mapping[str, Any]], key: str, index: int, *, title: str, colour: int) -> str:
    """`histories[index]`'s curve of `key` against steps, in the colour of that layer, all others behind it in grey."""
    curves = [(h["step"], [math.nan if value is None else value for value in h[key]]) for h in histories]
    with _panel(f"{key}-{colour}", title) as (axes, out):
        for steps, values in curves:
            axes.plot(steps, values, color=_OTHERS, linewidth=1.1, solid_capstyle="round")
        steps, values = curves[index]
        axes.plot(steps, values, color=_layer(colour), linewidth=2.0, solid_capstyle="round")
        _log_axis(axes, [value for _, values in curves for value in values if value > 0])
        axes.set_xlim(0, max(max(steps) for steps, _ in curves))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return out.getvalue()


def density_panel(histogram: Mapping[str, Any], index: int, *, title: str, y_max: float) -> str:
    """How many latents fire on which share of the rows; those that never fired stand apart on the left."""
    edges, counts, n_never = histogram["log10_edges"], histogram["counts"], histogram["n_never"]
    with _panel(f"density-{index}", title) as (axes, out):
        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], counts, widths, align="edge", color=_layer(index), alpha=0.85, linewidth=0)
        never_at = edges[0] - 0.6
        axes.bar([never_at], [n_never], 0.4, color=_MUTED, linewidth=0)
        if n_never:
            axes.annotate(
                f"{n_never:,}", (never_at, n_never), (0, 3), textcoords="offset points", ha="center", color=_MUTED
            )
        axes.set_ylim(0, y_max * 1.15)
        axes.set_xlim(never_at - 0.5, edges[-1] + 0.1)
        powers = [p for p in range(math.floor(edges[0]) + 1, math.floor(edges[-1]) + 1) if p % 2 == 0]
        axes.xaxis.set_major_locator(FixedLocator([never_at, *powers]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "never" if x < edges[0] else _power(x)))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    return out.getvalue()


def loss_ranges(layers: Sequence[Mapping[str, Any]], *, width: int) -> str:
    """For each layer, where the spliced loss lies between the model's own and that of the zero-ablated MLP."""
    title, extent = "Cross-entropy: clean, spliced and zero-ablated", (width, 30 + 28 * len(layers))
    with _panel(f"losses-{width}", title, size=extent, grid="x") as (axes, out):
        for y, row in enumerate(layers):
            axes.plot([row["clean"], row["zero_ablated"]], [y, y], color=_GRID, linewidth=5, solid_capstyle="round")
            axes.plot([row["clean"], row["spliced"]], [y, y], color=_layer(y), linewidth=5, solid_capstyle="round")
            axes.plot(row["zero_ablated"], y, "o", color=_MUTED, markersize=6)
            axes.plot(row["clean"], y, "|", color=_INK, markersize=14, markeredgewidth=1.6)
            axes.plot(row["spliced"], y, "o", color=_layer(y), markersize=9)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.yaxis.set_major_locator(FixedLocator(range(len(layers))))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _plain(f"layer {layers[round(y)]['layer']}")))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=width // 100, steps=[1, 2, 5, 10]))
        axes.margins(x=0.03)
    return out.getvalue()


def _layer(index: int) -> str:
    return f"#3000{index % 256:02x}"


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula, whatever it holds."""
    return text.replace("$", r"\$")


def _power(exponent: float) -> str:
    """10 to a power, as text: `10⁻³`; `1` for the power 0."""
    return "1" if exponent == 0 else "10" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis over the values with two to five labelled ticks at round numbers."""
    low, high = min(values, default=0.1), max(values, default=1.0)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.25, high * 1.45)
    rounds = [m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5) if low / 1.25 <= m * 10.0**e <= high * 1.45]
    every = max(1, -(-len(rounds) // 4))
    axes.yaxis.set_major_locator(FixedLocator(rounds[::every]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.7g}"))


@contextmanager
def _panel(
    name: str, title: str, *, size: tuple[int, int] = _PANEL_SIZE, grid: Literal["x", "y"] = "y"
) -> Iterator[tuple[Axes, io.StringIO]]:
    """Axes in the page's manner; on leaving, the SVG stands in the buffer."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": _FONT_SIZE, "axes.axisbelow": True}):
        figure = Figure(figsize=(size[0] / _POINTS_PER_INCH, size[1] / _POINTS_PER_INCH), layout="constrained")
        axes = figure.add_subplot()
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, colors=_MUTED, pad=4)
        axes.grid(axis=grid, color=_GRID, linewidth=0.8)
        yield axes, out
        raw = io.StringIO()
        figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    out.write(_inline(raw.getvalue(), name, title))


def _inline(svg: str, name: str, title: str) -> str:
    """Make matplotlib's file fit for HTML: no prologue, no metadata, ids of its own, CSS colours, the page's font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(?<= id=")', f"{name}-", svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: (bold )?([\d.]+)px [^;\"]*", r"font: \1\2px var(--sans)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r"#3000([0-9a-f]{2})", lambda found: f"var(--layer-{int(found[1], 16)})", svg)
    label = escape(title, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
