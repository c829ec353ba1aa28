"""What the terminal shows: progress and warnings on stderr, tables or one JSON object on stdout.

In: results of library calls. Out: text. Only this room, with `progress.py` behind it, knows rich.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from actcache import formats
from actcache.cli.interrupts import Interrupts
from actcache.cli.progress import Bars, Events, Lines, Stage, Teller, event_line
from actcache.files import finite
from actcache.spec import Progress
from actcache.status import Watch

Metrics = Mapping[str, Any]
_OWN_CODE = f"{Path(__file__).parent.parent}{os.sep}"


class Screen:
    """One command's output; a context manager, because bars are live and interrupts are handled while it is open.

    With `json` the result is one JSON object, and everything on stderr is events (see `progress.py`). Without it there
    are bars where somebody looks on, and lines in a log.
    """

    def __init__(self, *, json: bool = False) -> None:
        self._json = json
        self._out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
        if not self._out.is_terminal:
            # A pipe has no width; tables must not be cut to one that is assumed.
            self._out.width = 200
        self._teller: Teller = Events() if json else Bars(err) if err.is_terminal else Lines(err)
        self._stage: Stage | None = None
        self._warnings = warnings.catch_warnings()
        self._warned: set[str] = set()
        self._interrupts = Interrupts(self.say, lambda message: error_text(message, json=json))

    def __enter__(self) -> Screen:
        self._warnings.__enter__()
        warnings.showwarning = self._warn
        self._interrupts.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.__exit__(kind, error, trace)
        self._stop(cut_short=error is not None)
        self._warnings.__exit__(kind, error, trace)

    def stage(self, title: str, unit: str) -> Progress:
        """Begin a long step; the one before is finished. What is returned is told (pieces done, pieces in all)."""
        return self._begin(title, unit).count

    def watch(self, title: str) -> Watch:
        """Begin an extraction; the step before is finished. What is returned is told its `Status` now and then."""
        return self._begin(title, "sequences").watch

    def _begin(self, title: str, unit: str) -> Stage:
        self._end_stage(cut_short=False)
        self._stage = Stage(title, unit, self._teller)
        return self._stage

    def _end_stage(self, *, cut_short: bool) -> None:
        if self._stage:
            self._stage.end(cut_short=cut_short)
        self._stage = None

    def _stop(self, *, cut_short: bool) -> None:
        self._end_stage(cut_short=cut_short)
        self._teller.close()

    def say(self, sentence: str) -> None:
        """A line on stderr, above the bars."""
        self._teller.say(sentence)

    def _warn(
        self, message: Warning | str, category: type[Warning], filename: str, *_where: object, **_more: object
    ) -> None:
        """What `warnings.warn` leads to. Our own warnings are about the user's data; other libraries' seldom are."""
        if str(message) not in self._warned:
            self._warned.add(str(message))
            loud = category is UserWarning and filename.startswith(_OWN_CODE)
            self._teller.warn(str(message), category.__name__, loud=loud)

    def result(self, payload: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Print the result: the payload as JSON if that was asked for, otherwise what `show` prints."""
        self._stop(cut_short=False)
        if self._json:
            print(json.dumps(finite(payload), default=str, allow_nan=False))
        else:
            show(self._out)


def results_table(layers: Sequence[Metrics]) -> Table:
    """One line a sparse MLP: losses, share recovered, L0, FVU, dead latents."""
    headings = ("layer", "clean", "zero-ablated", "spliced", "loss recovered", "L0", "FVU", "dead")
    table = empty_table(headings)
    for row in layers:
        losses = [formats.decimals(row.get(key)) for key in ("clean", "zero_ablated", "spliced")]
        recovered = f"[bold]{formats.percent(row.get('loss_recovered'))}[/]"
        l0, fvu = formats.decimals(row.get("l0"), 1), formats.decimals(row.get("fvu"))
        table.add_row(str(row["layer"]), *losses, recovered, l0, fvu, formats.percent(row.get("dead_fraction")))
    return table


def stages_table(stages: Mapping[str, Metrics]) -> Table:
    """One line a stage: seconds and speeds."""
    table = empty_table(("stage", "time", "speed"), left=("stage", "speed"))
    for name, stage in stages.items():
        made = stage.get("made_in_s")
        note = f" [dim](reused{f', made in {formats.duration(made)}' if made else ''})[/]" if stage["reused"] else ""
        table.add_row(name + note, formats.duration(stage["seconds"]), " · ".join(formats.rates(stage)))
    return table


def sites_table(sites: Mapping[str, Metrics]) -> RenderableType:
    """One line a cached site: width, bytes, statistics; NaN and infinite values stand out.

    A terminal too narrow for all of that does without the codec and its ratio.
    """
    lines = [_site_line(name, site) for name, site in sites.items()]
    tables = []
    for left_out in ((), ("codec", "of raw")):
        headings = [heading for heading in _SITE_HEADINGS if heading not in left_out]
        table = empty_table(headings, left=("site", "codec"))
        for line in lines:
            table.add_row(*(line[heading] for heading in headings))
        tables.append(table)
    return _FirstThatFits(tables)


_SITE_HEADINGS = ("site", "width", "codec", "on disk", "of raw", "mean norm", "abs max", "zeros", "NaN", "Inf")


def _site_line(name: str, site: Metrics) -> dict[str, str]:
    broken = [f"[bold red]{site[key]:,}[/]" if site.get(key) else "0" for key in ("n_nan", "n_inf")]
    values = (
        escape(name),
        "x".join(map(str, site["shape"])),
        "by hand" if site["codec"].startswith("[") else site["codec"],
        formats.size(site["bytes"]),
        formats.percent(site["ratio"]),
        *(formats.number(site.get(key)) for key in ("mean_norm", "abs_max")),
        formats.percent(site.get("zero_fraction")),
        *broken,
    )
    return dict(zip(_SITE_HEADINGS, values, strict=True))


@dataclass(frozen=True)
class _FirstThatFits:
    """Shows as the first of some tables that is not wider than the terminal, or as the last."""

    tables: Sequence[Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)
        fitting = (t for t in self.tables if console.measure(t, options=unbounded).maximum <= options.max_width)
        yield next(fitting, self.tables[-1])


def store_lines(info: Metrics) -> Table:
    """State, size and origin of a store, a line each; longer ones go on below themselves."""
    spec = info["spec"]
    rows = f"{info['n_rows']:,} of {info['n_rows_expected']:,} rows"
    shards = f"{info['n_shards']:,} of {info['n_shards_expected']:,} shards committed"
    size = f"{formats.size(info['bytes'])} on disk"
    if info["raw_bytes"]:
        share = formats.percent(info["bytes"] / info["raw_bytes"])
        size += f", {share} of {formats.size(info['raw_bytes'])} of {spec['dtype']} activations"
    if info["n_shards_measured"] < info["n_shards"]:
        size += f"; this and the statistics are estimates from {info['n_shards_measured']:,} of the shards"
    lines = [
        ("state", f"{info['state']}, {rows}, {shards}"),
        ("size", size),
        *_model_lines(spec["model"]),
        *_text_lines(spec),
        ("made with", _listed({key: value for key, value in info["provenance"].items() if key != "audits"})),
        *(("audit", line) for line in formats.audit_lines(info["provenance"])),
        ("fingerprint", info["fingerprint"] or "(when it is sealed)"),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("store", Text(str(info["path"]), style="bold"))
    for name, line in lines:
        if line:
            table.add_row(name, escape(line))
    return table


def _model_lines(model: Metrics) -> list[tuple[str, str]]:
    named = [str(model[name]) for name in ("name", "class", "dtype") if model.get(name)]
    digests = {name: model.get(name) for name in ("weights", "tokenizer")}
    others = {key: value for key, value in model.items() if key not in ("name", "class", "dtype", *digests)}
    described = ", ".join(filter(None, [*named, _listed(others)]))
    return [("model", described or "unknown"), ("", _listed(digests))]


def _text_lines(spec: Metrics) -> list[tuple[str, str]]:
    """The tokens and how they were made; of a store that was extended, part by part."""
    kept = f"first {spec['skip_first']} of each not kept" if spec["skip_first"] else "all kept"
    shape = f"{spec['n_sequences']:,} sequences of {spec['sequence_length']} tokens, {kept}"
    parts = spec["text"].get("parts")
    made = [
        # The length is in the first line, the tokenizer with the model.
        _listed({key: value for key, value in part.items() if key not in ("tokenizer", "length")})
        for part in (parts if isinstance(parts, list) else [spec["text"]])
        if isinstance(part, Mapping)
    ]
    return [("text", shape), *(("", line) for line in made)]


def _listed(settings: Metrics) -> str:
    """`device cpu, threads 2, torch 2.13.0`: what is known, nested settings one after the other."""
    listed = [
        _listed(value) if isinstance(value, Mapping) else f"{key.replace('_', ' ')} {formats.plain(value)}"
        for key, value in settings.items()
        if value is not None
    ]
    return ", ".join(filter(None, listed))


def paths_lines(paths: Mapping[str, Path | str]) -> str:
    """What was written where."""
    width = max(map(len, paths))
    return "\n".join(f"[dim]{name:<{width}}[/]  {escape(str(path))}" for name, path in paths.items())


def error_line(message: str, *, json: bool = False) -> None:
    """A clean line on stderr, for errors that are the user's to mend; with `json` an event."""
    if json:
        print(error_text(message, json=True), file=sys.stderr)
    else:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def error_text(message: str, *, json: bool = False) -> str:
    """The same, without colours."""
    return event_line("error", message=message) if json else f"error: {message}"


def empty_table(headings: Sequence[str], *, left: Sequence[str] = ()) -> Table:
    """A table of the house style; columns are right-aligned but for those in `left`."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for heading in headings:
        # Where a terminal is too narrow, the names in the first column go on below themselves: numbers are never cut.
        is_first = heading == headings[0]
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=not is_first, overflow="fold")
    return table


def show_store(screen: Screen, found: Mapping[str, Any]) -> None:
    """Print what a store is."""

    def show(out: Console) -> None:
        out.print(store_lines(found), highlight=False)
        out.print(sites_table(found["sites"]))
        for name, site in found["sites"].items():
            if site["codec_reason"]:
                out.print(f"[dim]{name}: {site['codec_reason']}[/]", highlight=False)

    shown: Callable[[Console], None] = show
    screen.result(found, shown)


def _place(column: str, shard: int) -> str:
    return f"{column}, shard {shard}" if shard >= 0 else column
