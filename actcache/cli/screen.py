"""What the terminal shows: bars with the time left on stderr, tables or one JSON object on stdout.

In: results of library calls. Out: text. The only room that knows rich.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from actcache.report import finite, formats
from actcache.spec import Progress as OnProgress

Metrics = Mapping[str, Any]


class _Rate(ProgressColumn):
    """Pieces a second, averaged over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text(f"{formats.number(speed)} {unit}/s" if speed else "", style="dim")


class Screen:
    """One command's output; a context manager, because bars are live while it is open."""

    def __init__(self, *, json: bool = False) -> None:
        self._json = json
        self._out, self._err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
        if not self._out.is_terminal:
            # A pipe has no width; tables must not be cut to one that is assumed.
            self._out.width = 200
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
            console=self._err,
        )
        # Where nobody looks on, in a log or a pipe, a stage is one line at its end instead of a bar.
        self._live = self._err.is_terminal
        self._current: TaskID | None = None
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> Screen:
        self._warnings.__enter__()
        warnings.showwarning = lambda message, *_where, **_more: self.say(f"Note: {message}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._warnings.__exit__(kind, error, trace)

    def stage(self, title: str, unit: str) -> OnProgress:
        """Begin a bar; the one before is finished."""
        self._close_stage()
        if self._live:
            self._bars.start()
        task = self._current = self._bars.add_task(title, total=None, unit=unit)
        return lambda done, total: self._bars.update(task, completed=done, total=total)

    def _close_stage(self) -> None:
        if self._current is not None:
            task = self._bars.tasks[self._current]
            if task.total is None:
                # Nothing was left to do for it, so it never spoke.
                self._bars.update(self._current, visible=False)
            elif not self._live:
                pieces = f"{task.completed:,.0f} of {task.total:,.0f} {task.fields['unit']}"
                self.say(f"{task.description}: {pieces}, {formats.duration(task.elapsed or 0)}")
        self._current = None

    def _stop(self) -> None:
        self._close_stage()
        if self._live:
            self._bars.stop()

    def say(self, sentence: str) -> None:
        """A line on stderr, above the bars."""
        self._err.print(f"[dim]{escape(sentence)}[/]", highlight=False)

    def result(self, payload: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Print the result: the payload as JSON if that was asked for, otherwise what `show` prints."""
        self._stop()
        if self._json:
            print(json.dumps(finite(payload), default=str, allow_nan=False))
        else:
            show(self._out)


def results_table(layers: Sequence[Metrics]) -> Table:
    """One line a sparse MLP: losses, share recovered, L0, FVU, dead latents."""
    headings = ("layer", "clean", "zero-ablated", "spliced", "loss recovered", "L0", "FVU", "dead")
    table = _table(headings)
    for row in layers:
        losses = [formats.decimals(row.get(key)) for key in ("clean", "zero_ablated", "spliced")]
        recovered = f"[bold]{formats.percent(row.get('loss_recovered'))}[/]"
        l0, fvu = formats.decimals(row.get("l0"), 1), formats.decimals(row.get("fvu"))
        table.add_row(str(row["layer"]), *losses, recovered, l0, fvu, formats.percent(row.get("dead_fraction")))
    return table


def stages_table(stages: Mapping[str, Metrics]) -> Table:
    """One line a stage: seconds and speeds."""
    table = _table(("stage", "time", "speed"), left=("stage", "speed"))
    for name, stage in stages.items():
        made = stage.get("made_in_s")
        note = f" [dim](reused{f', made in {formats.duration(made)}' if made else ''})[/]" if stage["reused"] else ""
        table.add_row(name + note, formats.duration(stage["seconds"]), " · ".join(formats.rates(stage)))
    return table


def sites_table(sites: Mapping[str, Metrics]) -> Table:
    """One line a cached site: width, bytes, statistics; NaN and infinite values stand out."""
    headings = ("site", "width", "codec", "on disk", "of raw", "mean norm", "abs max", "zeros", "NaN", "Inf")
    table = _table(headings, left=("site", "codec"))
    for name, site in sites.items():
        broken = [f"[bold red]{site[key]:,}[/]" if site.get(key) else "0" for key in ("n_nan", "n_inf")]
        table.add_row(
            escape(name),
            "x".join(map(str, site["shape"])),
            "by hand" if site["codec"].startswith("[") else site["codec"],
            formats.size(site["bytes"]),
            formats.percent(site["ratio"]),
            *(formats.number(site.get(key)) for key in ("mean_norm", "abs_max")),
            formats.percent(site.get("zero_fraction")),
            *broken,
        )
    return table


def store_lines(info: Metrics) -> str:
    """State, size and origin of a store in a few lines."""
    spec = info["spec"]
    rows = f"{info['n_rows']:,} of {info['n_rows_expected']:,} rows"
    shards = f"{info['n_shards']} of {info['n_shards_expected']} shards"
    size = f"{formats.size(info['bytes'])} on disk for {formats.size(info['raw_bytes'])} of {spec['dtype']} activations"
    return "\n".join(
        [
            f"[bold]{escape(str(info['path']))}[/]  {info['state']}, {rows}, {shards}",
            size,
            f"model {escape(str(spec['model'].get('name', '?')))}, {spec['n_sequences']:,} sequences of "
            f"{spec['sequence_length']} tokens, first {spec['skip_first']} of each not kept",
            f"fingerprint {info['fingerprint'] or '(when it is sealed)'}",
        ]
    )


def paths_lines(paths: Mapping[str, Path | str]) -> str:
    """What was written where."""
    width = max(map(len, paths))
    return "\n".join(f"[dim]{name:<{width}}[/]  {escape(str(path))}" for name, path in paths.items())


def error_line(message: str) -> None:
    """A clean line on stderr, for errors that are the user's to mend."""
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def _table(headings: Sequence[str], *, left: Sequence[str] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table
