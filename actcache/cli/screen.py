"""Where output goes: progress and warnings to stderr, a table or one JSON object to stdout; tables of the house style.

In: results of library calls. Out: text, and the exit codes.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

from actcache import formats
from actcache.cli.interrupts import Interrupts
from actcache.cli.progress import Bars, Events, Lines, Stage, Teller, event_line
from actcache.files import finite
from actcache.spec import Progress
from actcache.status import Watch

FINE, USER_ERROR, UNSOUND = 0, 1, 2
"""Exit codes: done; something that the user can mend; unsound data."""
Metrics = Mapping[str, Any]
_UNBOUNDED = 10_000
_OWN_CODE = f"{Path(__file__).parent.parent}{os.sep}"


class Screen:
    """One command's output; a context manager, because bars are live and interrupts are handled while it is open.

    With `json` the result is one JSON object, and everything on stderr is events (see `progress.py`). Without it a
    terminal shows bars, and a log gets lines.
    """

    def __init__(self, *, json: bool = False) -> None:
        self._json = json
        self._out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
        if not self._out.is_terminal:
            self._out.width = _UNBOUNDED  # a pipe has no width: no line is folded
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
        """Begin a long step and end the one before; the function returned takes (pieces done, pieces in all)."""
        return self._begin(title, unit).count

    def watch(self, title: str) -> Watch:
        """Begin an extraction and end the step before; the function returned takes its `Status` now and then."""
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
        """Show what `warnings.warn` reports. Our own warnings are about the user's data; those of others seldom are."""
        if str(message) not in self._warned:
            self._warned.add(str(message))
            loud = category is UserWarning and filename.startswith(_OWN_CODE)
            self._teller.warn(str(message), category.__name__, loud=loud)

    def result(self, payload: Mapping[str, Any], show: Callable[[Console], None]) -> None:
        """Print the result: with `json` the payload, otherwise what `show` prints (in a pipe without padding)."""
        self._stop(cut_short=False)
        if self._json:
            print(json.dumps(finite(payload), default=str, allow_nan=False))
        elif self._out.is_terminal:
            show(self._out)
        else:
            with self._out.capture() as shown:
                show(self._out)
            print("\n".join(line.rstrip() for line in shown.get().splitlines()))


def results_table(layers: Sequence[Metrics]) -> Table:
    """A line for each sparse MLP: losses, share recovered, L0, FVU, dead latents."""
    headings = ("layer", "clean", "zero-ablated", "spliced", "loss recovered", "L0", "FVU", "dead")
    table = empty_table(headings)
    for row in layers:
        losses = [formats.decimals(row.get(key)) for key in ("clean", "zero_ablated", "spliced")]
        recovered = f"[bold]{formats.percent(row.get('loss_recovered'))}[/]"
        l0, fvu = formats.decimals(row.get("l0"), 1), formats.decimals(row.get("fvu"))
        table.add_row(str(row["layer"]), *losses, recovered, l0, fvu, formats.percent(row.get("dead_fraction")))
    return table


def stages_table(stages: Mapping[str, Metrics]) -> Table:
    """A line for each stage: seconds and speeds."""
    table = empty_table(("stage", "time", "speed"), left=("stage", "speed"))
    for name, stage in stages.items():
        made = stage.get("made_in_s")
        note = f" [dim](reused{f', made in {formats.duration(made)}' if made else ''})[/]" if stage["reused"] else ""
        table.add_row(name + note, formats.duration(stage["seconds"]), " · ".join(formats.rates(stage)))
    return table


def paths_lines(paths: Mapping[str, Path | str]) -> str:
    """A line for each thing that was written, with its path."""
    width = max(map(len, paths))
    return "\n".join(f"[dim]{name:<{width}}[/]  {escape(str(path))}" for name, path in paths.items())


def error_line(message: str, *, json: bool = False) -> None:
    """Print an error on stderr, as one clean line; with `json` as an event."""
    if json:
        print(error_text(message, json=True), file=sys.stderr)
    else:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def error_text(message: str, *, json: bool = False) -> str:
    """An error as one line without colours; with `json` as an event."""
    return event_line("error", message=message) if json else f"error: {message}"


def empty_table(headings: Sequence[str], *, left: Sequence[str] = ()) -> Table:
    """A table of the house style; columns are right-aligned, except those in `left`."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for heading in headings:
        # On a terminal that is too narrow, only the names in the first column are folded: numbers are never cut.
        is_first = heading == headings[0]
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=not is_first, overflow="fold")
    return table


def labelled_lines(lines: Iterable[tuple[str, RenderableType]]) -> Table:
    """A line for each label, dim, and its text; long texts are folded beside their label, empty ones are left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in lines:
        if line:
            table.add_row(label, escape(line) if isinstance(line, str) else line)
    return table
