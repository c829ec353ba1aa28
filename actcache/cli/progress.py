"""How far a long step is, in three forms: bars on a terminal, lines in a log, events for a program.

In: the arguments of the library's `progress` and `watch` callbacks. Out: stderr.

An event is a JSON object on a line of its own: `event`, `time` (UTC, ISO 8601), and

    stage     a long step begins: title, unit
    progress  at most once a second: title, unit, done, total, seconds; an extraction adds its speeds, its queue, and
              `sites` whenever the statistics are new
    done      the step has ended, with the fields of `progress`; done and total are null if nothing was left to do
    warning   message, category
    note      message
    error     message; the last line of a command that fails
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
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

from actcache import formats
from actcache.files import finite
from actcache.status import SiteStatus, Status

MOST_SITES = 8
"""Sites in the live summary: more would push everything else off the terminal."""
_EVENT_EVERY_S = 1.0
_LINE_AFTER_S = 30.0
_LINE_EVERY_AT_MOST_S = 600.0


class Stage:
    """A long step and how far it is."""

    def __init__(self, title: str, unit: str, teller: Teller) -> None:
        self.title, self.unit, self._teller = title, unit, teller
        self.done: int | None = None
        self.total: int | None = None
        self.status: Status | None = None
        self._began, self._ended = monotonic(), False
        teller.begin(self)

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return monotonic() - self._began

    def count(self, done: int, total: int) -> None:
        """Take the arguments of the library's `progress`."""
        self.done, self.total = done, total
        if not self._ended:
            self._teller.tell(self)

    def watch(self, status: Status) -> None:
        """Take the argument of an extraction's `watch`."""
        self.status = status
        if self.is_share:
            self.count(status.n_sequences_here, status.n_sequences_share)
        else:
            self.count(status.n_sequences_done, status.n_sequences)

    @property
    def is_share(self) -> bool:
        """Whether the extraction leaves sequences to other processes; only its own are counted then."""
        if self.status is None:
            return False
        before = self.status.n_sequences_done - self.status.n_sequences_here
        return before + self.status.n_sequences_share < self.status.n_sequences

    @property
    def left_s(self) -> float | None:
        """Seconds left, if an extraction knows."""
        left_s = self.status.eta_s if self.status else None
        return finite(left_s)  # type: ignore[no-any-return]  # a float or None

    def end(self, *, cut_short: bool) -> None:
        """End the stage; it is `cut_short` by an error or an interrupt."""
        if not self._ended:
            self._ended = True
            self._teller.end(self, cut_short=cut_short)


class Teller(Protocol):
    """One of the three forms."""

    def begin(self, stage: Stage) -> None:
        """A stage has begun."""

    def tell(self, stage: Stage) -> None:
        """A stage has made progress."""

    def end(self, stage: Stage, *, cut_short: bool) -> None:
        """A stage has ended."""

    def say(self, sentence: str) -> None:
        """Report something worth knowing."""

    def warn(self, message: str, category: str, *, loud: bool) -> None:
        """Report something that may be wrong; `loud` if it is about the user's activations or text."""

    def close(self) -> None:
        """Nothing more will be reported."""


class Bars:
    """On a terminal: a bar for each stage; below that of an extraction its speeds and the statistics of its sites."""

    def __init__(self, console: Console) -> None:
        self._console, self._display = console, _Display(console)
        self._tasks: dict[Stage, TaskID] = {}

    def begin(self, stage: Stage) -> None:
        """Draw an empty bar."""
        self._display.start()
        self._tasks[stage] = self._display.add_task(escape(stage.title), total=None, stage=stage)

    def tell(self, stage: Stage) -> None:
        """Move the bar."""
        self._display.watched = stage if stage.status else None
        self._display.update(self._tasks[stage], completed=stage.done or 0, total=stage.total)

    def end(self, stage: Stage, *, cut_short: bool) -> None:
        """Leave the bar as it is. What is below it disappears if a result follows, because that says it again."""
        if stage.total is None:
            self._display.update(self._tasks[stage], visible=False)
        if not cut_short:
            self._display.watched = None

    def say(self, sentence: str) -> None:
        """A dim line above the bars."""
        say(self._console, sentence)

    def warn(self, message: str, category: str, *, loud: bool) -> None:
        """A red line above the bars, or a dim one."""
        warn(self._console, message, loud=loud)

    def close(self) -> None:
        """Stop drawing."""
        self._display.stop()


class Lines:
    """In a log or a pipe: a line when a stage ends, and lines at growing intervals during an extraction."""

    def __init__(self, console: Console, *, first_after_s: float = _LINE_AFTER_S) -> None:
        self._console, self._wait_s, self._next_s = console, first_after_s, first_after_s
        self._first_after_s = first_after_s

    def begin(self, stage: Stage) -> None:
        """Start the clock; a line comes later."""
        self._wait_s = self._next_s = self._first_after_s

    def tell(self, stage: Stage) -> None:
        """Print a line when one is due: after 30 s, 1 min later, 2 min later, and so on up to every 10 min."""
        if stage.status is None or stage.seconds < self._next_s:
            return
        self._wait_s = min(2 * self._wait_s, _LINE_EVERY_AT_MOST_S)
        self._next_s = stage.seconds + self._wait_s
        left = f"about {formats.duration(stage.left_s)} left"
        self.say(", ".join([_pieces(stage), *_speeds(stage.status), formats.duration(stage.seconds), left]))

    def end(self, stage: Stage, *, cut_short: bool) -> None:
        """Print the last line, unless there was nothing to do."""
        if stage.total is not None:
            speeds = _speeds(stage.status, queue=False) if stage.status else []
            self.say(", ".join([_pieces(stage), *speeds, formats.duration(stage.seconds)]))

    def say(self, sentence: str) -> None:
        """Print a line."""
        say(self._console, sentence)

    def warn(self, message: str, category: str, *, loud: bool) -> None:
        """Print a line."""
        warn(self._console, message, loud=loud)

    def close(self) -> None:
        """Do nothing: nothing is open."""


class Events:
    """For a program: one JSON object a line."""

    def __init__(self, *, every_s: float = _EVENT_EVERY_S) -> None:
        self._every_s, self._next = every_s, 0.0
        self._sites: Mapping[str, SiteStatus] = {}
        # Warnings come from any thread, and mixed halves of two lines would not be JSON.
        self._alone = threading.Lock()

    def begin(self, stage: Stage) -> None:
        """The event `stage`."""
        self._next, self._sites = 0.0, {}
        self._emit("stage", title=stage.title, unit=stage.unit)

    def tell(self, stage: Stage) -> None:
        """The event `progress`, if the last one is a second old."""
        if monotonic() >= self._next:
            self._next = monotonic() + self._every_s
            self._emit("progress", **self._fields(stage))

    def end(self, stage: Stage, *, cut_short: bool) -> None:
        """The event `done`; for a stage that was cut short, `progress`."""
        self._emit("progress" if cut_short else "done", **self._fields(stage))

    def say(self, sentence: str) -> None:
        """The event `note`."""
        self._emit("note", message=sentence)

    def warn(self, message: str, category: str, *, loud: bool) -> None:
        """The event `warning`."""
        self._emit("warning", message=message, category=category)

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def _fields(self, stage: Stage) -> dict[str, Any]:
        names = ("title", "unit", "done", "total", "seconds")
        fields: dict[str, Any] = {name: getattr(stage, name) for name in names}
        if stage.status is None:
            return fields
        fields |= {name: getattr(stage.status, name) for name in _STATUS_FIELDS}
        # Statistics change once a shard; with many sites, repeating them would fill most of the log.
        if stage.status.sites != self._sites:
            self._sites = stage.status.sites
            fields["sites"] = {name: asdict(site) for name, site in self._sites.items()}
        return fields

    def _emit(self, event: str, **fields: Any) -> None:
        with self._alone:
            print(event_line(event, **fields), file=sys.stderr, flush=True)


_STATUS_FIELDS = (
    *("n_sequences_done", "n_sequences", "n_sequences_here", "n_sequences_share", "n_tokens", "tokens_per_s"),
    *("n_bytes", "bytes_per_s", "queue", "queue_size", "eta_s"),
)


def event_line(event: str, **fields: Any) -> str:
    """An event as a line of JSON."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json.dumps(finite({"event": event, "time": now, **fields}), default=str, allow_nan=False)


def say(console: Console, sentence: str) -> None:
    """Print a dim line."""
    console.print(f"[dim]{escape(sentence)}[/]", highlight=False)


def warn(console: Console, message: str, *, loud: bool) -> None:
    """Print a warning, red if it is `loud`."""
    if loud:
        console.print(f"[bold red]Warning:[/] [red]{escape(message)}[/]", highlight=False)
    else:
        say(console, f"Note: {message}")


def sites_worth_a_look(sites: Mapping[str, SiteStatus], most: int = MOST_SITES) -> dict[str, SiteStatus]:
    """At most `most` sites: first those with NaN or infinite values, next the dead ones, next the others in order."""
    alarming = sorted(sites, key=lambda name: (not _is_broken(sites[name]), not sites[name].dead))
    return {name: sites[name] for name in alarming[:most]}


class _Rate(ProgressColumn):
    """Tokens a second since an extraction began; pieces a second of any other stage, over the last half minute."""

    def render(self, task: Task) -> Text:
        stage: Stage = task.fields["stage"]
        if stage.status:
            return Text(f"{formats.count(stage.status.tokens_per_s)} tokens/s", style="dim")
        speed = task.finished_speed or task.speed
        return Text(f"{formats.number(speed)} {stage.unit}/s" if speed else "", style="dim")


class _Left(TimeRemainingColumn):
    """Time left, as an extraction estimates it: what earlier calls did says nothing about the speed of this one."""

    def render(self, task: Task) -> Text:
        left_s = task.fields["stage"].left_s
        if left_s is None:
            return super().render(task)
        minutes, seconds = divmod(round(left_s), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", style="progress.remaining")


class _Display(Progress):
    """The bars, and below them the extraction that is watched."""

    def __init__(self, console: Console) -> None:
        self.watched: Stage | None = None
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            _Left(),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.watched and self.watched.status:
            share = f" · a share of {self.watched.status.n_sequences:,} sequences" if self.watched.is_share else ""
            yield Text("  " + " · ".join(_speeds(self.watched.status)[1:]) + share, style="dim")
            if self.watched.status.sites:
                yield from _sites_summary(self.watched.status.sites)


def _sites_summary(sites: Mapping[str, SiteStatus]) -> Iterable[RenderableType]:
    shown = sites_worth_a_look(sites)
    table = Table(box=SIMPLE_HEAD, header_style="dim", pad_edge=False, collapse_padding=True, show_edge=False)
    table.add_column("  site", overflow="ellipsis")
    for heading in ("mean norm", "abs max", "zeros", "NaN", "Inf", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, site in shown.items():
        style = "bold red" if _is_broken(site) else "yellow" if site.dead else ""
        numbers = (formats.number(site.mean_norm), formats.number(site.abs_max), formats.percent(site.zero_fraction))
        counts, remark = (f"{site.n_nan:,}", f"{site.n_inf:,}"), "dead" if site.dead else ""
        table.add_row(f"  {escape(name)}", *numbers, *counts, remark, style=style)
    yield table
    others = [site for name, site in sites.items() if name not in shown]
    if others:
        n_alarming = sum(_is_broken(site) or site.dead for site in others)
        yield Text(f"  and {len(others)} more, {n_alarming or 'none'} of them with NaN or Inf, or dead", style="dim")


def _is_broken(site: SiteStatus) -> bool:
    return bool(site.n_nan or site.n_inf)


def _pieces(stage: Stage) -> str:
    return f"{stage.title}: {stage.done or 0:,} of {stage.total or 0:,} {stage.unit}"


def _speeds(status: Status, *, queue: bool = True) -> list[str]:
    """`["62,000 tokens/s", "310 MB/s stored", "1.2 GB so far", "queue 1 of 2 shards"]`."""
    stored = [f"{formats.size(status.bytes_per_s)}/s stored", f"{formats.size(status.n_bytes)} so far"]
    waiting = [f"queue {status.queue} of {status.queue_size} shards"] if queue and status.queue_size else []
    return [f"{formats.count(status.tokens_per_s)} tokens/s", *stored, *waiting]
